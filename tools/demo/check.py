"""Judges an exported folder with transformers: greedy captions of the rendered held-out frames.

    python3 check.py models/demo FRAMES [every n-th frame]

Loads everything from the folder, nothing from the training code but the frames' true captions.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor, SmolVLMForConditionalGeneration

from vocabulary import DEFAULT_PROMPT


def main(folder, frames, every=1):
    torch.set_num_threads(1)
    model = SmolVLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": DEFAULT_PROMPT}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    pictures = np.load(Path(frames) / "held-out.npy", mmap_mode="r")
    rows = json.loads((Path(frames) / "held-out.json").read_text())
    score = {}
    for i in range(0, len(rows), every):
        inputs = processor(text=text, images=[Image.fromarray(pictures[i])], do_resize=False, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        caption = processor.tokenizer.decode(out, skip_special_tokens=True)
        entry = score.setdefault(rows[i]["kind"], [0, 0])
        entry[0] += caption == rows[i]["caption"]
        entry[1] += 1
    for kind, (right, count) in sorted(score.items()):
        print(f"{kind:28} {right:4} of {count:4}  {right / count:7.2%}")
    right, count = (sum(e[j] for e in score.values()) for j in (0, 1))
    print(f"overall {right / count:.2%}, over classes {sum(r / n for r, n in score.values()) / len(score):.2%}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
