"""Make the family's models at full size with random weights, for bench.py.

    python weights.py OUT [--device cuda] [MODEL …]

OUT/<model>/checkpoint is what vlmnarrate and transformers read; what is there already is kept.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "peers"))
import prepare  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("models", nargs="+", choices=["256m", "500m", "2.2b"])
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    for model in options.models:
        folder = options.out / model / "checkpoint"
        if folder.exists():
            continue
        start = time.monotonic()
        unfinished = folder.with_name("unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        prepare.checkpoint(model, unfinished, options.device)
        unfinished.rename(folder)
        print(f"{model}: {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
