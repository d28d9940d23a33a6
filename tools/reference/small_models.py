"""Write a small random-weight model in the shape of each SmolVLM family member, and its goldens.

    python small_models.py [MEMBER ...] [--out FOLDER]

Each folder `tests/data/reference/<member>` looks like a downloaded checkpoint and adds golden.json and
golden.safetensors. Image side, patch, shuffle factor, ratio of heads, special tokens and file styles are those
of the real member; widths, depths and vocabulary are small.
"""

import argparse
import itertools
import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.utils import logging

import reference as ref

OUT = Path(__file__).resolve().parents[2] / "tests" / "data" / "reference"
BF16_LIMIT = 8e-3  # relative L2 of the reference's bfloat16 logits from its float32 ones
MERGES = 290  # of the real tokenizer, the least that the test prompts need plus the most frequent
SMALL_VISION = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 96, "num_hidden_layers": 3}
SMALL_VISION_14 = {"hidden_size": 72, "num_attention_heads": 3, "intermediate_size": 144, "num_hidden_layers": 3}


def text(heads, kv_heads, head_dim, intermediate):
    return {
        "hidden_size": heads * head_dim,
        "head_dim": head_dim,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
        "num_hidden_layers": 3,
    }


# style: "official" as published, "saved" as save_pretrained of transformers 5 writes it, "nested" official with the
# older names `model.text_model.model.*`; seed: the first one tried, as found by an earlier run.
MEMBERS = {
    "smolvlm-256m": dict(hub="SmolVLM-256M-Instruct", text=text(9, 3, 8, 144), dtype=torch.bfloat16, seed=2),
    "smolvlm-500m": dict(hub="SmolVLM-500M-Instruct", text=text(15, 5, 8, 160), dtype=torch.bfloat16, seed=2, shards=3),
    "smolvlm-2.2b": dict(hub="SmolVLM-Instruct", text=text(4, 4, 16, 128), dtype=torch.float32, seed=3, style="nested"),
    "smolvlm2-256m": dict(
        hub="SmolVLM2-256M-Video-Instruct", text=text(9, 3, 8, 144), dtype=torch.bfloat16, seed=4, style="saved", tied=True
    ),
    "smolvlm2-500m": dict(hub="SmolVLM2-500M-Video-Instruct", text=text(15, 5, 8, 160), dtype=torch.bfloat16, seed=5),
    "smolvlm2-2.2b": dict(hub="SmolVLM2-2.2B-Instruct", text=text(4, 4, 16, 128), dtype=torch.float16, seed=4, style="saved"),
}

# Texts whose tokens the small tokenizer keeps, so that its prompts are cut as the real ones are.
SAMPLES = ["User:", "\nAssistant:", "System:", "\n\n", "\nFrame from 00:01:", "Can you describe this image?"]

IMAGE, VIDEO = {"type": "image"}, {"type": "video"}
DESCRIBE = SAMPLES[-1]


def say(words):
    return {"type": "text", "text": words}


def user(*content):
    return {"role": "user", "content": list(content)}


SYSTEM = {"role": "system", "content": [say("You are a helpful assistant.")]}


def cases(member):
    """The golden cases; the sizes of the pictures vary from member to member."""
    sizes = [(640, 427), (427, 640), (300, 300), (96, 64)]
    turn = list(MEMBERS).index(member) % 4
    sizes = sizes[turn:] + sizes[:turn]
    native, patch = (384, 14) if "2.2b" in member else (512, 16)
    small = {14: (336, 252), 16: (384, 256, 192)}[patch]
    one = [user(IMAGE, say(DESCRIBE))]
    result = [
        dict(name="one_picture", messages=one, pictures=sizes[:1], all_logits=True, vision_states=True),
        dict(
            name="two_pictures",
            messages=[user(IMAGE, IMAGE, say("What are the differences between 2 images?"))],
            pictures=sizes[1:3],
            row_stride=32,
        ),
        dict(
            name="system_text_first",
            messages=[SYSTEM, user(say("Look at this: "), IMAGE, say(" What is in it?"))],
            pictures=[(1000, 120)],
            row_stride=32,
        ),
    ]
    for side in small:
        # The smallest side also shrinks the first resize, so that both settings are tried.
        edge = {"longest_edge": 4 * side} if side == min(small) else {}
        result.append(
            dict(name=f"side_{side}", messages=one, pictures=sizes[3:], side=side, vision_states=True, **edge)
        )
    tiled = (1000, 120) if turn % 2 else (96, 64)  # 1 or 3 rows of 4 tiles, at 1024 px 1 or 2 rows of 2
    # The published 2048 px of the patch 16 members are tried once: 13 pictures are much work for a test.
    edge = {} if patch == 14 or member == "smolvlm-256m" else {"longest_edge": 1024}
    result.append(dict(name="tiled", messages=one, pictures=[tiled], splitting=True, row_stride=64, **edge))
    if member.startswith("smolvlm2"):
        frames = [(*sizes[0], 37 * k, 11 * k) for k in range(4)]
        meta = {"total_num_frames": 120, "fps": 30.0, "duration": 4.0, "frames_indices": [0, 39, 79, 119]}
        result.append(
            dict(
                name="video",
                messages=[user(VIDEO, say("What happens in this video?"))],
                pictures=frames,
                video=meta,
                row_stride=64,
            )
        )
    return result


def small_tokenizer(hub):
    """The real tokenizer cut down to its byte tokens, MERGES merges and every special token, ids renumbered."""
    source = hub if (hub / "tokenizer.json").exists() else ref.HUB / "SmolVLM-256M-Instruct"
    spec = ref.read_json(source / "tokenizer.json")
    real = Tokenizer.from_file(str(source / "tokenizer.json"))
    merges = [tuple(m) for m in spec["model"]["merges"]]
    parents = {a + b: (a, b) for a, b in reversed(merges)}
    rank = {m: i for i, m in enumerate(merges)}
    wanted = set()

    def want(token):
        if token in parents and parents[token] not in wanted:
            wanted.add(parents[token])
            for part in parents[token]:
                want(part)

    for sample in SAMPLES:
        for token in real.encode(sample, add_special_tokens=False).tokens:
            want(token)
    for merge in merges:
        if len(wanted) == MERGES:
            break
        wanted.add(merge)
    kept = sorted(wanted, key=rank.get)

    by_id = sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].get)
    added = {t["content"] for t in spec["added_tokens"]}
    first = [t for t in by_id if t in added or len(t) == 1]
    vocab = {t: i for i, t in enumerate(dict.fromkeys(first + [a + b for a, b in kept]))}
    for token in spec["added_tokens"]:
        token["id"] = vocab.setdefault(token["content"], len(vocab))
    base = sum(1 for t in vocab if t in spec["model"]["vocab"])
    spec["model"]["vocab"] = {t: i for t, i in vocab.items() if i < base}
    spec["model"]["merges"] = [list(m) for m in kept]
    return spec, vocab, base


def write_configs(member, folder):
    """The configuration files of the real member with small numbers."""
    hub = ref.HUB / member["hub"]
    spec, vocab, base = small_tokenizer(hub)
    for name in ("preprocessor_config.json", "processor_config.json", "special_tokens_map.json", "chat_template.jinja"):
        shutil.copy(hub / name, folder / name)
    (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")

    config = ref.read_json(hub / "config.json")
    config["text_config"] |= member["text"] | {"vocab_size": len(vocab)}
    small_vision = SMALL_VISION_14 if config["vision_config"]["patch_size"] == 14 else SMALL_VISION
    config["vision_config"] |= small_vision
    config |= {"vocab_size": len(vocab), "image_token_id": vocab["<image>"]}
    dtype = str(member["dtype"]).removeprefix("torch.")
    config["torch_dtype"] = config["text_config"]["torch_dtype"] = dtype
    if member.get("tied"):
        config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    ref.write_json(folder / "config.json", config)

    generation = ref.read_json(hub / "generation_config.json") | {"eos_token_id": vocab["<end_of_utterance>"]}
    ref.write_json(folder / "generation_config.json", generation)
    tokens = ref.read_json(hub / "added_tokens.json")
    ref.write_json(folder / "added_tokens.json", {t: vocab[t] for t in tokens})
    settings = ref.read_json(hub / "tokenizer_config.json")
    decoder = {str(vocab[t["content"]]): t for t in settings["added_tokens_decoder"].values()}
    ref.write_json(folder / "tokenizer_config.json", settings | {"added_tokens_decoder": decoder, "vocab_size": base})


def write_weights(member, folder, seed, device="cpu"):
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    ref.fill_weights(model, seed, member["dtype"], member.get("residual", 1.0))
    state = {n: w.to("cpu", member["dtype"]).contiguous() for n, w in sorted(model.state_dict().items())}
    if member.get("tied"):
        del state["lm_head.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def shard(folder, count):
    """Split model.safetensors in `count` files of about the same size, with an index."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    total, seen, parts, weight_map = sum(t.nbytes for t in state.values()), 0, [{} for _ in range(count)], {}
    for name, tensor in state.items():
        part = min(count - 1, seen * count // total)
        seen += tensor.nbytes
        parts[part][name] = tensor
        weight_map[name] = f"model-{part + 1:05}-of-{count:05}.safetensors"
    for i, part in enumerate(parts):
        save_file(part, folder / f"model-{i + 1:05}-of-{count:05}.safetensors", metadata={"format": "pt"})
    ref.write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def nest(folder):
    """The names of older descriptions of the 2.2B model."""

    def rename(name):
        if name == "lm_head.weight":
            return "model.text_model.lm_head.weight"
        return name.replace("model.text_model.", "model.text_model.model.", 1)

    state = {rename(n): t for n, t in load_file(folder / "model.safetensors").items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def save_again(member, folder):
    """Replace the folder's files by what save_pretrained of transformers 5 writes."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=member["dtype"])
    processor = ref.Reference(folder).processor
    for file in folder.iterdir():
        file.unlink()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def healthy(entry, bf16_limit):
    """Whether a case can judge: decided choices, varied tokens, selective attention, bfloat16 close to float32."""
    return (
        entry["min_margin"] > 1e-2
        and len(set(entry["tokens"])) > 4
        and min(peak for layers in entry["attention_peaks"].values() for peak in layers) > 3
        and entry["logits_bf16_relative_l2"] <= bf16_limit
    )


def attempt(folder, work, bf16_limit):
    """Golden results of every case, or None where one is not healthy."""
    models = ref.load_models(folder)
    results = []
    for case in work:
        entry, tensors = ref.run_case(folder, models, case)
        peaks = [min(layers) for layers in entry["attention_peaks"].values()]
        print(f"  {entry['name']}: {len(entry['input_ids'])} ids, min margin {entry['min_margin']}", end="")
        print(f" (bf16 {entry['min_margin_bf16']}), {len(set(entry['tokens']))} distinct, peaks {peaks}", end="")
        print(f", bf16 relative L2 {entry['logits_bf16_relative_l2']}", flush=True)
        if not healthy(entry, bf16_limit):
            return None
        results.append((entry, tensors))
    return results


def build(name, out):
    member = MEMBERS[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / name
        folder.mkdir()
        write_configs(member, folder)
        for seed in itertools.count(member["seed"]):
            print(f"{name}: seed {seed}")
            write_weights(member, folder, seed)
            if results := attempt(folder, cases(name), BF16_LIMIT):
                break
        style = member.get("style", "official")
        if style == "saved":
            save_again(member, folder)
        elif style == "nested":
            nest(folder)
        if "shards" in member:
            shard(folder, member["shards"])
        facts = {"member": name, "style": style, "dtype": str(member["dtype"]).removeprefix("torch."), "seed": seed}
        ref.write_goldens(folder, facts, results)
        shutil.rmtree(out / name, ignore_errors=True)
        shutil.copytree(folder, out / name)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("members", nargs="*", choices=[*MEMBERS, []], metavar="MEMBER")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    logging.disable_progress_bar()
    for name in options.members or MEMBERS:
        build(name, options.out)


if __name__ == "__main__":
    main()
