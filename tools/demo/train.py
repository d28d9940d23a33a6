"""Trains the demo model on the frames that render.py made and the pictures that real.py collected.

    torchrun --nproc-per-node 2 train.py FRAMES CHECKPOINT --minutes 40 [--resume CHECKPOINT or FOLDER]

Two processes of one thread each; the steps in bfloat16 where the CPU has it (without, it takes eight times as long as
float32), the weights in float32. The learning rate follows the clock, so that training ends when it was told to, on a
busy machine too. A checkpoint (averaged weights) is written every few minutes, with the accuracy on the held-out frames
and clips. A step is of pictures or of clips of one length. Beside the captions, small auxiliary heads guide the
training, and are thrown away: on the picture tokens (kind of picture, thirds, colours), on each of them (whether
the ball is there, and where), on what the decoder has behind each frame (where the ball is, how far it came) and before
it says which way the ball moves (how far).
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
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch.nn import functional as F

import model as shape
import vocabulary
from data import NAMES, Examples, labels

PLACE = re.compile(r", (at|on|in|moving|not) .*")
CLIP_LENGTHS = {4: 0.5, 3: 0.22, 2: 0.22, 1: 0.06}  # how often


def pixels(pictures):
    x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float()
    return (x / 255 - 0.5) / 0.5


class Texts:
    """Captions as tokens, with a weight for each: a picture's place and colours are what is hard."""

    def __init__(self, tokenizer):
        self.tokenizer, self.cache = tokenizer, {}
        self.end = tokenizer.token_to_id("<end_of_utterance>")
        self.fake = tokenizer.token_to_id("<fake_token_around_image>")
        self.heavy = {tokenizer.token_to_id("Ġ" + n) for n in NAMES}

    def caption(self, text):
        if text not in self.cache:
            ids = self.tokenizer.encode(text).ids + [self.end]
            place = self.place(text) or 99
            heavy = [3.0 if i >= place else 2.0 if i == 0 or t in self.heavy else 1.0 for i, t in enumerate(ids)]
            if text == vocabulary.UNKNOWN_CAPTION:  # its first token decides, the others are always the same
                heavy = [3.0] + [0.2] * (len(ids) - 1)
            self.cache[text] = ids, heavy
        return self.cache[text]

    def place(self, text):
        """Which token says the place or the way; 0 where none does."""
        return len(self.tokenizer.encode(PLACE.sub(",", text)).ids) if " ball " in text or " bar " in text else 0

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
    score, wrong, prompts = {}, [], {}
    for i, row in enumerate(rows):
        prompts.setdefault(default_prompt(row), []).append((row, range(i, i + 1) if row["clip"] == 1 else clip(row)))
    for prompt, part in ((p, v[i : i + 16]) for p, v in prompts.items() for i in range(0, len(v), 16)):
        ids, targets, weights = texts.batch(prompt, [row["caption"] for row, _ in part])
        image = shape.features(model, pixels([frames[i] for _, at in part for i in at]))
        best = shape.logits(model, image, ids, targets.shape[1]).argmax(-1)
        right = ((best == targets) | (weights == 0)).all(1).tolist()
        for (row, _), ok, guess in zip(part, right, best):
            entry = score.setdefault(row["kind"], [0, 0])
            entry[0] += ok
            entry[1] += 1
            if not ok:
                wrong.append((row, texts.tokenizer.decode(guess.tolist()).split(".")[0]))
    return score, wrong


def clip(row):
    return range(row["at"], row["at"] + row["clip"])


def default_prompt(row):
    """As the element asks about a row's frame or clip."""
    if row["clip"] == 1:
        return vocabulary.wrapped(vocabulary.DEFAULT_PROMPT)
    interval = row["clip"] * row["step"] * row["framerate"][1] / row["framerate"][0]
    return vocabulary.wrapped_clip(vocabulary.CLIP_PROMPT, *vocabulary.clip_seconds(row["clip"], interval))


def held_out(folder, name):
    rows = json.loads((folder / f"{name}.json").read_text())
    for row in rows:
        row["kind"] = f"{row['clip']} frames, {row['kind']}" if row["clip"] > 1 else row["kind"]
    return np.load(folder / f"{name}.npy", mmap_mode="r"), rows


def held_out_real(folder):
    """Of what real.py wrote: no test pictures."""
    paths = sorted(folder.rglob("*.jpg"))
    pictures = [np.asarray(Image.open(p).convert("RGB").resize((256, 256), Image.BILINEAR)) for p in paths]
    row = {"clip": 1, "caption": vocabulary.UNKNOWN_CAPTION}
    return np.stack(pictures), [{**row, "kind": p.relative_to(folder).parts[0], "path": p} for p in paths]


def summary(score):
    overall = sum(r for r, _ in score.values()) / sum(n for _, n in score.values())
    classes = sum(r / n for r, n in score.values()) / len(score)
    weak = {k: f"{r}/{n}" for k, (r, n) in score.items() if r < n}
    return f"exact {overall:.2%}, {classes:.2%} over classes; not all right: {weak}"


def restored(model, heads, path):
    if path.is_dir():  # an exported model: no heads, and its tokenizer may have been another
        vocabularies = Tokenizer.from_file(str(path / "tokenizer.json")), vocabulary.build()
        state = load_file(path / "model.safetensors")
        model.load_state_dict(shape.with_vocabulary(state, *(v.get_vocab() for v in vocabularies)))
        return
    saved = torch.load(path)
    model.load_state_dict(saved["model"])
    own = heads.state_dict()
    heads.load_state_dict({k: v for k, v in saved["head"].items() if v.shape == own[k].shape}, strict=False)


def distance(guess, true):
    """Of places or ways in the picture, where there is a ball."""
    known = ~true[..., 0].isnan()
    return F.smooth_l1_loss(guess[known], 8 * true[known], beta=0.1) if known.any() else 0


def place_loss(guess, centres):
    """Which picture token has the ball's centre in its part of the picture; from that one, where it is."""
    side = round(guess.shape[1] ** 0.5)
    column, row = (centres.nan_to_num(0.5) * side).long().clamp(0, side - 1).unbind(1)
    token = row * side + column
    which = F.cross_entropy(guess[..., 0], token.where(~centres[:, 0].isnan(), -100), reduction="sum") / len(guess)
    return which + distance(guess[torch.arange(len(guess)), token, 1:], centres - 0.5)


def motion_loss(heads, states, ids, fake, centres):
    """Where the ball is, behind each frame, two layers up; how far it came since the frame before, three layers up."""
    behind = (ids == fake).nonzero()[:, 1].view(len(ids), -1)[:, 1::2]
    here = torch.arange(len(ids))[:, None]
    two, three = (F.rms_norm(states[layer][here, behind], states[layer].shape[-1:]) for layer in (2, 3))
    loss = distance(heads[0](two).float(), centres - 0.5)
    return loss + (distance(heads[1](three[:, 1:]).float(), centres.diff(dim=1)) if centres.shape[1] > 1 else 0)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("frames", type=Path)
    p.add_argument("checkpoint", type=Path)
    p.add_argument("--minutes", type=float, default=40)
    p.add_argument("--resume", type=Path)
    p.add_argument("--batch", type=int, default=16, help="pictures per process")
    p.add_argument("--unknown", type=int, default=4, help="so many more that are no test pictures")
    p.add_argument("--held-out-real", type=Path, help="what real.py wrote, to be judged on, too")
    p.add_argument("--clips", type=float, default=0.45, help="this part of the steps is of clips")
    p.add_argument("--rate", type=float, default=2e-3)
    p.add_argument("--mark-places", action="store_true", help="see model.mark_places; once, before clips are trained")
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(a.seed)
    model = shape.build()
    examples = Examples(a.frames, seed=1000 * a.seed + rank + 1)
    sizes = [len(examples.templates), 3, 3, len(NAMES), len(NAMES)]
    width = shape.CONFIG["text_config"]["hidden_size"]
    head = [torch.nn.Linear(16 * width, sum(sizes)), torch.nn.Linear(width, 3)]
    head = torch.nn.ModuleList(head + [torch.nn.Linear(width, 2) for _ in range(3)])
    if a.resume:
        restored(model, head, a.resume)
    if a.mark_places:
        with torch.no_grad():
            head[1].weight[1:] = 0.7 * shape.mark_places(model)
    if torch.cpu._is_avx512_bf16_supported():
        fast, fast_head = shape.in_bfloat16(model), copy.deepcopy(head).bfloat16()
    else:
        fast, fast_head = copy.deepcopy(model), copy.deepcopy(head)
    precision = fast.dtype
    turns = random.Random(a.seed)  # the same in both processes: they wait for each other
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

    begin = time.monotonic()
    step, running = 0, {True: [0.0, 1e-9], False: [0.0, 1e-9]}
    progress, judged = 0.0, 0
    while progress < 1:
        rate = a.rate * min(1, (step + 1) / 150) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * progress)))
        for g in optimizer.param_groups:
            g["lr"] = rate
        of_clips = turns.random() < a.clips
        frames = turns.choices(list(CLIP_LENGTHS), CLIP_LENGTHS.values())[0]
        if of_clips:
            pictures, centres, parts, captions = examples.clip_batch(frames, a.batch, a.unknown)
            prompt = vocabulary.some_clip_prompt(prompts, frames)
        else:
            some = [examples.example() for _ in range(a.batch)]
            some += [examples.unknown_example() for _ in range(a.unknown)]
            pictures, captions, centres = zip(*some)
            prompt = vocabulary.some_prompt(prompts)
        ids, targets, weights = texts.batch(prompt, captions)
        with torch.no_grad():
            torch._foreach_copy_(fast_parameters, parameters)
        image = shape.features(fast, pixels(pictures).to(precision))
        shown = image[torch.tensor(parts).flatten()] if of_clips else image
        states = shape.states(fast, shown, ids)
        last = states[-1][:, -targets.shape[1] :]
        out = fast.lm_head(last).float()
        loss = (
            F.cross_entropy(out.flatten(0, 1), targets.flatten(), reduction="none") * weights.flatten()
        ).sum() / weights.sum()
        said = loss.item()
        centres = torch.tensor(centres)
        loss = loss + 0.1 * place_loss(fast_head[1](image).float(), centres)
        tracks = centres[torch.tensor(parts)] if of_clips else centres[:, None]
        loss = loss + 0.15 * motion_loss(fast_head[3:], states, ids, texts.fake, tracks)
        if of_clips:
            here = last[torch.arange(len(captions)), [texts.place(c) for c in captions]]
            loss = loss + 0.1 * distance(fast_head[2](here).float(), tracks[:, -1] - tracks[:, 0])
        if not of_clips:
            wanted = torch.tensor([labels(c, examples.templates) for c in captions])
            for column, guess in enumerate(fast_head[0](image.flatten(1)).float().split(sizes, dim=1)):
                if (wanted[:, column] >= 0).any():
                    loss = loss + 0.1 * F.cross_entropy(guess, wanted[:, column])
        loss.backward()
        clock = torch.tensor([(time.monotonic() - begin) / 60 / a.minutes * world if rank == 0 else 0.0, said])
        gradients = (torch.zeros_like(q) if q.grad is None else q.grad for q in fast_parameters)
        flat = torch.cat([*(g.flatten().float() for g in gradients), clock])
        dist.all_reduce(flat)
        flat /= world
        progress = flat[-2].item()
        # of captions alone, pictures and clips apart: sums that fade, and their weights
        running[of_clips] = [0.98 * s + 0.02 * new for s, new in zip(running[of_clips], (flat[-1].item(), 1))]
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
            picture, moving = (s / w for s, w in (running[False], running[True]))
            print(f"step {step} {progress:.1%} loss {picture:.4f}, of clips {moving:.4f} rate {rate:.1e}", flush=True)
        if progress >= 1 or progress * a.minutes > 8 * (judged + 1):
            judged = int(progress * a.minutes / 8)
            judge.load_state_dict(average)
            sets = {n: (held_out, a.frames, n) for n in ("held-out", "held-out-clips")}
            if a.held_out_real:
                sets["held-out-real"] = held_out_real, a.held_out_real
            mine = list(sets)[rank::world]
            scores = {n: evaluate(judge, texts, *sets[n][0](*sets[n][1:]))[0] for n in mine}
            all_scores = [None] * world
            dist.all_gather_object(all_scores, scores)
            if rank == 0:
                scores = {n: score for some in all_scores for n, score in some.items()}
                saved = {"model": average, "head": head.state_dict(), "step": step, "score": scores}
                torch.save(saved, a.checkpoint)
                for name, score in scores.items():
                    print(f"step {step} {name}: {summary(score)}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
