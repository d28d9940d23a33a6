"""A checkpoint like SmolVLM-256M's with random weights and fewer layers: it says nonsense, and takes its time."""

import json
import os
import pathlib
import shutil
import struct

HUB = pathlib.Path(__file__).resolve().parents[2] / "tests" / "data" / "hub" / "SmolVLM-256M-Instruct"
# The upper byte of a BF16 of about ±0.01 to ±0.03; the lower is random.
UPPER = bytes(0x3C | (n & 0x80) for n in range(256))
ONE = b"\x80\x3f"


def shapes(config):
    """Each tensor's shape by its name."""
    text, vision = config["text_config"], config["vision_config"]
    width, inner, vocabulary = text["hidden_size"], text["intermediate_size"], text["vocab_size"]
    heads, key_heads, size = text["num_attention_heads"], text["num_key_value_heads"], text["head_dim"]
    yield "lm_head.weight", [vocabulary, width]
    yield "model.text_model.embed_tokens.weight", [vocabulary, width]
    yield "model.text_model.norm.weight", [width]
    for layer in range(text["num_hidden_layers"]):
        at = f"model.text_model.layers.{layer}."
        yield at + "input_layernorm.weight", [width]
        yield at + "post_attention_layernorm.weight", [width]
        yield at + "mlp.down_proj.weight", [width, inner]
        yield at + "mlp.gate_proj.weight", [inner, width]
        yield at + "mlp.up_proj.weight", [inner, width]
        for name, count in (("q", heads), ("k", key_heads), ("v", key_heads)):
            yield f"{at}self_attn.{name}_proj.weight", [count * size, width]
        yield at + "self_attn.o_proj.weight", [width, heads * size]
    wide, inner, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    at = "model.vision_model."
    yield at + "embeddings.patch_embedding.weight", [wide, 3, patch, patch]
    yield at + "embeddings.patch_embedding.bias", [wide]
    yield at + "embeddings.position_embedding.weight", [(vision["image_size"] // patch) ** 2, wide]
    for layer in range(vision["num_hidden_layers"]):
        for name in ("layer_norm1", "layer_norm2"):
            yield f"{at}encoder.layers.{layer}.{name}.weight", [wide]
            yield f"{at}encoder.layers.{layer}.{name}.bias", [wide]
        for name, out, into in [("mlp.fc1", inner, wide), ("mlp.fc2", wide, inner)] + [
            (f"self_attn.{part}", wide, wide) for part in ("q_proj", "k_proj", "v_proj", "out_proj")
        ]:
            yield f"{at}encoder.layers.{layer}.{name}.weight", [out, into]
            yield f"{at}encoder.layers.{layer}.{name}.bias", [out]
    yield at + "post_layernorm.weight", [wide]
    yield at + "post_layernorm.bias", [wide]
    yield "model.connector.modality_projection.proj.weight", [width, wide * config["scale_factor"] ** 2]


def numbers(name, count):
    """BF16 values: ones for the scale of a norm, else random."""
    if "norm" in name and name.endswith("weight"):
        return ONE * count
    raw = bytearray(os.urandom(count * 2))
    raw[1::2] = raw[1::2].translate(UPPER)
    return bytes(raw)


def make(folder, text_layers=4, vision_layers=2):
    """Writes the checkpoint, about 200 MB, whole or not at all; keeps one that is there."""
    if os.path.exists(folder):
        return
    unfinished = folder + ".unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(HUB, unfinished)
    config = json.loads((HUB / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = text_layers
    config["vision_config"]["num_hidden_layers"] = vision_layers
    with open(os.path.join(unfinished, "config.json"), "w") as file:
        json.dump(config, file)
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes(config):
        count = 2
        for n in shape:
            count *= n
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + count]}
        at += count
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with open(os.path.join(unfinished, "model.safetensors"), "wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for name, about in header.items():
            if name != "__metadata__":
                begin, end = about["data_offsets"]
                file.write(numbers(name, (end - begin) // 2))
    os.rename(unfinished, folder)
