"""Trains the demo model on the frames that render.py made.

    torchrun --nproc-per-node 2 train.py FRAMES CHECKPOINT --minutes 40 [--resume CHECKPOINT]

Two processes of one thread each; the steps in bfloat16, the weights in float32. The learning rate follows the clock,
so that training ends when it was told to, on a busy machine too. A checkpoint (averaged weights) is written every few
minutes, with the accuracy on the held-out frames. Beside the captions, a small auxiliary head on the picture tokens
(kind of picture, thirds, colours) guides the vision part; it is thrown away.
"""

import argparse
import copy
import json
import math
import random
import re
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F

import model as shape
import vocabulary
from data import NAMES, Examples, labels

PLACE = re.compile(r", (at|on|in) .*")


def pixels(pictures):
    x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float()
    return (x / 255 - 0.5) / 0.5


class Texts:
    """Captions as tokens, with a weight for each: a picture's place and colours are what is hard."""

    def __init__(self, tokenizer):
        self.tokenizer, self.cache = tokenizer, {}
        self.end = tokenizer.token_to_id("<end_of_utterance>")
        self.heavy = {tokenizer.token_to_id("Ġ" + n) for n in NAMES}

    def caption(self, text):
        if text not in self.cache:
            ids = self.tokenizer.encode(text).ids + [self.end]
            place = len(self.tokenizer.encode(PLACE.sub(",", text)).ids) if " ball " in text or " bar " in text else 99
            heavy = [3.0 if i >= place else 2.0 if i == 0 or t in self.heavy else 1.0 for i, t in enumerate(ids)]
            self.cache[text] = ids, heavy
        return self.cache[text]

    def batch(self, prompt, captions):
        """ids [batch, prompt + longest - 1], targets and weights [batch, longest]"""
        prompt = self.tokenizer.encode(prompt).ids
        rows = [self.caption(c) for c in captions]
        longest = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([prompt + (i + [self.end] * (longest - len(i)))[:-1] for i, _ in rows])
        targets = torch.tensor([i + [0] * (longest - len(i)) for i, _ in rows])
        weights = torch.tensor([w + [0.0] * (longest - len(w)) for _, w in rows])
        return ids, targets, weights


@torch.no_grad()
def evaluate(model, texts, frames, rows):
    """Exact captions per kind: {kind: [right, all]}. All tokens right at once is what greedy decoding needs."""
    score, wrong = {}, []
    for start in range(0, len(rows), 32):
        part = rows[start : start + 32]
        ids, targets, weights = texts.batch(vocabulary.wrapped(vocabulary.DEFAULT_PROMPT), [r["caption"] for r in part])
        image = shape.features(model, pixels(frames[start : start + 32]))
        best = shape.logits(model, image, ids, targets.shape[1]).argmax(-1)
        right = ((best == targets) | (weights == 0)).all(1).tolist()
        for row, ok, guess in zip(part, right, best):
            entry = score.setdefault(row["kind"], [0, 0])
            entry[0] += ok
            entry[1] += 1
            if not ok:
                wrong.append((row, texts.tokenizer.decode(guess.tolist()).split(".")[0]))
    return score, wrong


def summary(score):
    overall = sum(r for r, _ in score.values()) / sum(n for _, n in score.values())
    classes = sum(r / n for r, n in score.values()) / len(score)
    weak = {k: f"{r}/{n}" for k, (r, n) in score.items() if r < n}
    return f"exact {overall:.2%} of frames, {classes:.2%} over classes; not all right: {weak}"


def main():
    p = argparse.ArgumentParser()
    p.add_argument("frames", type=Path)
    p.add_argument("checkpoint", type=Path)
    p.add_argument("--minutes", type=float, default=40)
    p.add_argument("--resume", type=Path)
    p.add_argument("--batch", type=int, default=16, help="per process")
    p.add_argument("--rate", type=float, default=2e-3)
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(a.seed)
    model = shape.build()
    examples = Examples(a.frames, seed=1000 * a.seed + rank + 1)
    sizes = [len(examples.templates), 3, 3, len(NAMES), len(NAMES)]
    head = torch.nn.Linear(16 * shape.CONFIG["text_config"]["hidden_size"], sum(sizes))
    if a.resume:
        saved = torch.load(a.resume)
        model.load_state_dict(saved["model"])
        head.load_state_dict(saved["head"])
    fast, fast_head = shape.in_bfloat16(model), copy.deepcopy(head).bfloat16()
    texts = Texts(vocabulary.build())
    prompts = random.Random(a.seed + rank)
    parameters = [*model.parameters(), *head.parameters()]
    fast_parameters = [*fast.parameters(), *fast_head.parameters()]
    decayed = [q for q in parameters if q.ndim > 1]
    plain = [q for q in parameters if q.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=a.rate, betas=(0.9, 0.98), fused=True)
    average = {k: v.clone() for k, v in model.state_dict().items()}
    judge = shape.build()

    begin = last = time.monotonic()
    step, running = 0, 0.0
    progress = 0.0
    while progress < 1:
        rate = a.rate * min(1, (step + 1) / 150) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * progress)))
        for g in optimizer.param_groups:
            g["lr"] = rate
        pictures, captions = zip(*(examples.example() for _ in range(a.batch)))
        ids, targets, weights = texts.batch(vocabulary.some_prompt(prompts), captions)
        with torch.no_grad():
            torch._foreach_copy_(fast_parameters, parameters)
        image = shape.features(fast, pixels(pictures).bfloat16())
        out = shape.logits(fast, image, ids, targets.shape[1]).float()
        loss = (
            F.cross_entropy(out.flatten(0, 1), targets.flatten(), reduction="none") * weights.flatten()
        ).sum() / weights.sum()
        wanted = torch.tensor([labels(c, examples.templates) for c in captions])
        for column, guess in enumerate(fast_head(image.flatten(1)).float().split(sizes, dim=1)):
            if (wanted[:, column] >= 0).any():
                loss = loss + 0.1 * F.cross_entropy(guess, wanted[:, column])
        loss.backward()
        clock = torch.tensor([(time.monotonic() - begin) / 60 / a.minutes * world if rank == 0 else 0.0, loss.item()])
        flat = torch.cat([*(q.grad.flatten().float() for q in fast_parameters), clock])
        dist.all_reduce(flat)
        flat /= world
        progress, running = flat[-2].item(), 0.98 * running + 0.02 * flat[-1].item()
        flat *= min(1, 1 / flat[:-2].norm().item())
        for q, g in zip(parameters, flat[:-2].split([q.numel() for q in parameters])):
            q.grad = g.view_as(q)
        optimizer.step()
        for q in fast_parameters:
            q.grad = None
        step += 1
        with torch.no_grad():
            keep = min(0.998, step / (step + 20))
            for k, v in model.state_dict().items():
                average[k].lerp_(v, 1 - keep)
        if rank == 0 and step % 100 == 0:
            print(f"step {step} {progress:.1%} loss {running / (1 - 0.98**step):.4f} rate {rate:.1e}", flush=True)
        if rank == 0 and (progress >= 1 or time.monotonic() - last > 240):
            judge.load_state_dict(average)
            frames = np.load(a.frames / "held-out.npy", mmap_mode="r")
            rows = json.loads((a.frames / "held-out.json").read_text())
            score, _ = evaluate(judge, texts, frames, rows)
            torch.save({"model": average, "head": head.state_dict(), "step": step, "score": score}, a.checkpoint)
            print(f"step {step} {summary(score)}", flush=True)
            last = time.monotonic()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
