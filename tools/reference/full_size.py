"""Write the 256M and 500M models at full size with random weights, and their goldens, to a folder of yours.

    python full_size.py OUT [--model 256m|500m]

OUT/<model> has the same files and golden format as tests/data/reference/<member>, the real tokenizer and bfloat16
weights (0.5 and 1 GB). Nothing of it belongs in the repository.
"""

import argparse
import itertools
import shutil
import time
from pathlib import Path

import torch
from transformers.utils import logging

import reference as ref
import small_models as small

MODELS = {"256m": "SmolVLM-256M-Instruct", "500m": "SmolVLM-500M-Instruct"}
BF16_LIMIT = 1.5e-2  # as in small_models.py, at ten times the depth: the sums of the residual stream alone give 1e-2
RESIDUAL = 0.5  # smaller branches, whose own rounding then matters less
ONE = [small.user(small.IMAGE, small.say(small.DESCRIBE))]
CASES = [
    dict(name="one_picture", messages=ONE, pictures=[(640, 427)], all_logits=True, vision_states=True),
    dict(name="side_256", messages=ONE, pictures=[(427, 640)], side=256, vision_states=True),
]


def build(name, out):
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ref.HUB / MODELS[name], folder)
    shutil.copy(ref.HUB / MODELS["256m"] / "tokenizer.json", folder)
    for seed in itertools.count():
        print(f"{name}: seed {seed}")
        small.write_weights({"dtype": torch.bfloat16, "residual": RESIDUAL}, folder, seed)
        if results := small.attempt(folder, CASES, BF16_LIMIT):
            break
    facts = {"member": f"smolvlm-{name}", "style": "official", "dtype": "bfloat16", "seed": seed}
    ref.write_goldens(folder, facts, results)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", choices=MODELS)
    options = parser.parse_args()
    logging.disable_progress_bar()
    for name in [options.model] if options.model else MODELS:
        start = time.monotonic()
        build(name, options.out)
        print(f"{name}: {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
