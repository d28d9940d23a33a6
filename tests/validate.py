#!/usr/bin/python3
"""Checks JSON lines on stdin against a JSON Schema: validate.py SCHEMA. Says which lines are wrong, and why."""

import json
import sys

from jsonschema import Draft202012Validator

with open(sys.argv[1], encoding="utf-8") as file:
    schema = json.load(file)
Draft202012Validator.check_schema(schema)
validator = Draft202012Validator(schema)
wrong = number = 0
for number, line in enumerate(sys.stdin, 1):
    for error in validator.iter_errors(json.loads(line)):
        print(f"line {number}: {'.'.join(map(str, error.absolute_path)) or 'caption'}: {error.message}")
        wrong += 1
if not number:
    sys.exit("no lines")
sys.exit(wrong > 0)
