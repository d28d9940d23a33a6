"""How the cost of a caption grows: with the picture, its tokens, the threads, the model, and with what changes.

    python cost.py --checkpoint 256m=FOLDER [--checkpoint 500m=FOLDER] [--rounds 5] --out benches/results/cost

Times every caption in turn, in one run, of models with random weights that prepare.py has made, writes the medians to
OUT.csv and draws them: `--draw` alone draws the table that is there.
"""

import argparse
import csv
import os
import statistics
from pathlib import Path

from compare import STAGES, ours, take_turns

USUAL = {"model": "256m", "side": 256, "threads": 2, "tokens": 20, "scene": "cut"}
VARIED = {
    "side": [192, 224, 256, 384, 512],
    "tokens": [5, 20, 50, 100],
    "threads": [1, 2],
    "model": ["256m", "500m"],
    "scene": ["cut", "slow", "static"],
}
TITLES = {
    "side": "image-size, px",
    "tokens": "tokens",
    "threads": "threads",
    "model": "model",
    "scene": "scene",
}


def cases(models):
    found = []
    for field, values in VARIED.items():
        for value in values:
            case = USUAL | {field: value}
            if case["model"] in models and case not in found:
                found.append(case)
    return found


def measure(checkpoints, rounds):
    programs = {}
    for number, case in enumerate(cases(checkpoints)):
        arguments = [case["side"], case["threads"], "q8-0", case["scene"], case["tokens"]]
        programs[number] = (ours(checkpoints[case["model"]], *arguments), case["threads"])
    for engine, case in zip(take_turns(programs, rounds), cases(checkpoints)):
        medians = {stage: statistics.median(t[stage] for t in engine.times) for stage in STAGES}
        yield case | {stage: round(value, 1) for stage, value in medians.items()}


def draw(rows, path):
    """One panel for each thing that varies; bars of the stages, in ms."""
    colours = {"vision": "#2a6f97", "prefill": "#e09f3e", "decode": "#9e2a2b"}
    highest = max(sum(float(row[stage]) for stage in STAGES) for row in rows)
    parts, x, height, base = [], 60, 240, 290
    scale = height / highest
    for ms in range(0, int(highest) + 1, 250):
        y = base - ms * scale
        parts.append(f'<line x1="50" x2="WIDTH" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="44" y="{y + 4:.1f}" text-anchor="end">{ms}</text>')
    for field, values in VARIED.items():
        start = x
        for value in values:
            wanted = {name: str(known) for name, known in (USUAL | {field: value}).items()}
            row = next((row for row in rows if all(str(row[name]) == known for name, known in wanted.items())), None)
            if row is None:
                continue
            y = base
            for stage in STAGES:
                part = float(row[stage]) * scale
                y -= part
                parts.append(f'<rect x="{x}" y="{y:.1f}" width="30" height="{part:.1f}" fill="{colours[stage]}"/>')
            total = sum(float(row[stage]) for stage in STAGES)
            parts.append(f'<text x="{x + 15}" y="{y - 4:.1f}" text-anchor="middle">{total:.0f}</text>')
            parts.append(f'<text x="{x + 15}" y="{base + 16}" text-anchor="middle">{value}</text>')
            x += 42
        parts.append(f'<text x="{(start + x - 12) / 2}" y="{base + 36}" text-anchor="middle">{TITLES[field]}</text>')
        x += 24
    for number, stage in enumerate(STAGES):
        left = 60 + 90 * number
        parts.append(f'<rect x="{left}" y="12" width="12" height="12" fill="{colours[stage]}"/>')
        parts.append(f'<text x="{left + 18}" y="22">{stage}</text>')
    parts.append(f'<text x="{left + 100}" y="22">ms a caption</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{x}" height="340" font-family="sans-serif" font-size="11">'
    body = "\n".join(parts).replace("WIDTH", str(x - 20))
    path.write_text(f'{head}\n<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n')


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", action="append", default=[], metavar="MODEL=FOLDER")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benches/results/cost"))
    parser.add_argument("--draw", action="store_true", help="only draw")
    options = parser.parse_args()
    table = options.out.with_suffix(".csv")
    if not options.draw:
        checkpoints = dict(pair.split("=", 1) for pair in options.checkpoint)
        if not checkpoints:
            parser.error("--checkpoint is needed, or --draw")
        rows = list(measure(checkpoints, options.rounds))
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*USUAL, *STAGES], lineterminator=os.linesep)
            writer.writeheader()
            writer.writerows(rows)
    with table.open(newline="") as file:
        draw(list(csv.DictReader(file)), options.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
