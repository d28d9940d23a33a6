"""Renders scenes with gst-launch-1.0, scaled as the element scales them, into a folder of arrays.

    python3 render.py OUT [SET...]   # OUT/{mask,plain,held-out}.npy: uint8 [frames, 256, 256, 3]; .json: what each is
                                     # OUT/{clips,held-out-clips}.npy: the same, a clip's frames in a row

Only frames and clips that have a caption are kept.
"""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np

from captions import ball_centre, bar_left
from scenes import held_out, held_out_clips, kind, training, training_clips, way

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


def clips_of(scene):
    """Pictures and rows of a scene's clips: a row for each clip, its frames one after the other from `at` on."""
    clips = {frames: c for frames, c in scene.clips().items() if c}
    if not clips:
        return np.zeros((0, SIDE, SIDE, 3), np.uint8), []
    base = asdict(scene)
    rows = [{**base, "kind": way(c), "numbers": n, "caption": c, "facts": [facts(scene, i) for i in n]}
            for n, c in clips.items()]  # fmt: skip
    return render(scene)[[i // scene.step for n in clips for i in n]], rows


def frames_of(scene):
    base = {"kind": kind(scene), **asdict(scene)}
    rows = [{**base, "frame": i, "caption": c, **facts(scene, i)} for i, c in scene.captions().items()]
    if not any(r["caption"] for r in rows):
        return np.zeros((0, SIDE, SIDE, 3), np.uint8), []
    keep = [r["caption"] is not None for r in rows]
    return render(scene)[keep], [r for r in rows if r["caption"]]


def render_all(scenes, path, of=frames_of):
    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(of, scenes))
    rows = [r for _, rows in parts for r in rows]
    if of is clips_of:
        at = 0
        for row in rows:
            row["at"], at = at, at + row["clip"]
    np.save(path.with_suffix(".npy"), np.concatenate([p for p, _ in parts]))
    path.with_suffix(".json").write_text(json.dumps(rows), encoding="utf-8")
    print(f"{path.name}: {len(rows)} {'clips' if of is clips_of else 'frames'}", flush=True)


if __name__ == "__main__":
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    for name, scenes in {**training(), "held-out": held_out()}.items():
        if name in sys.argv[2:] or not sys.argv[2:]:
            render_all(scenes, out / name)
    for name, scenes in {"clips": training_clips(), "held-out-clips": held_out_clips()}.items():
        if name in sys.argv[2:] or not sys.argv[2:]:
            render_all(scenes, out / name, clips_of)
