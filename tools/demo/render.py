"""Renders scenes with gst-launch-1.0, scaled as the element scales them, into a folder of arrays.

    python3 render.py OUT        # OUT/{mask,plain,held-out}.npy: uint8 [frames, 256, 256, 3]; .json: what each frame is

Only frames that have a caption are kept.
"""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np

from captions import ball_centre, bar_left
from scenes import held_out, kind, training

SIDE = 256
SCALE = (
    f"videoconvertscale method=bilinear2 add-borders=false ! "
    f"video/x-raw,format=RGB,width={SIDE},height={SIDE},pixel-aspect-ratio=1/1"
)


def render(scene):
    """uint8 [frames, SIDE, SIDE, 3]: the frames kept"""
    command = f"gst-launch-1.0 -q {scene.source()} ! {SCALE} ! fdsink fd=1 sync=false"
    data = subprocess.run(command.split(), capture_output=True, check=True).stdout
    pictures = np.frombuffer(data, np.uint8).reshape(-1, SIDE, SIDE, 3)
    assert len(pictures) == (scene.frames - 1) * scene.step + 1, f"{len(pictures)} frames: {command}"
    return pictures[:: scene.step]


def facts(scene, frame):
    """What the trainer's recolouring and its auxiliary head need to know beside the caption."""
    if scene.pattern == "ball":
        return {"centre": ball_centre(scene, frame)}
    if scene.pattern == "bar":
        return {"left": bar_left(scene, frame), "bar": scene.width // 7 / scene.width}
    return {}


def render_all(scenes, path):
    def one(scene):
        base = {"kind": kind(scene), **asdict(scene)}
        rows = [{**base, "frame": i, "caption": c, **facts(scene, i)} for i, c in scene.captions().items()]
        if not any(r["caption"] for r in rows):
            return np.zeros((0, SIDE, SIDE, 3), np.uint8), []
        keep = [r["caption"] is not None for r in rows]
        return render(scene)[keep], [r for r in rows if r["caption"]]

    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(one, scenes))
    np.save(path.with_suffix(".npy"), np.concatenate([p for p, _ in parts]))
    path.with_suffix(".json").write_text(json.dumps([r for _, rows in parts for r in rows]), encoding="utf-8")
    print(f"{path.name}: {sum(len(rows) for _, rows in parts)} frames", flush=True)


if __name__ == "__main__":
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    for name, scenes in {**training(), "held-out": held_out()}.items():
        render_all(scenes, out / name)
