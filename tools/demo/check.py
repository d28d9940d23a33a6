"""Judges an exported folder with transformers: greedy captions of the rendered held-out frames and clips.

    python3 check.py models/demo FRAMES [every n-th frame and clip]

Loads everything from the folder, nothing from the training code but the frames' true captions and the prompts. A clip
is shown as the element shows it: its frames as pictures, each behind its time.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor, SmolVLMForConditionalGeneration

from vocabulary import CLIP_PROMPT, DEFAULT_PROMPT, clip_content, clip_seconds


def content(row):
    """What the user says, in the chat template's form."""
    if row["clip"] == 1:
        parts = [None, DEFAULT_PROMPT]
    else:
        interval = row["clip"] * row["step"] * row["framerate"][1] / row["framerate"][0]
        parts = [*clip_content(*clip_seconds(row["clip"], interval)), CLIP_PROMPT]
    return [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]


def judge(model, processor, path, every):
    """{kind: [right, all]} of a set"""
    pictures = np.load(path.with_suffix(".npy"), mmap_mode="r")
    rows = json.loads(path.with_suffix(".json").read_text())
    score = {}
    for i in range(0, len(rows), every):
        row, at = rows[i], rows[i].get("at", i)
        messages = [{"role": "user", "content": content(row)}]
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        images = [Image.fromarray(picture) for picture in pictures[at : at + row["clip"]]]
        inputs = processor(text=text, images=[images], do_resize=False, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        caption = processor.tokenizer.decode(out, skip_special_tokens=True)
        entry = score.setdefault(f"{row['clip']} frames: {row['kind']}" if row["clip"] > 1 else row["kind"], [0, 0])
        entry[0] += caption == row["caption"]
        entry[1] += 1
    return score


def main(folder, frames, every=1):
    torch.set_num_threads(1)
    model = SmolVLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    for name in "held-out", "held-out-clips":
        score = judge(model, processor, Path(frames) / name, every)
        for kind, (right, count) in sorted(score.items()):
            print(f"{kind:36} {right:4} of {count:4}  {right / count:7.2%}")
        right, count = (sum(e[j] for e in score.values()) for j in (0, 1))
        classes = sum(r / n for r, n in score.values()) / len(score)
        print(f"{name}: {right / count:.2%} of {count}, over classes {classes:.2%}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
