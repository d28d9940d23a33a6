"""Make what compare.py measures: models of full size with random weights, and the peers' forms of them.

    python prepare.py OUT [--model 256m|500m] [--sides 256 512]

In OUT/<model>: checkpoint/ (what vlmnarrate and transformers read), onnx/ (f32 and int8), openvino/ (f32 with int8
weights) and gguf/ (of several types). What is there already is kept.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import engines
import graphs

REFERENCE = Path(__file__).resolve().parents[1] / "reference"
sys.path.insert(0, str(REFERENCE))
import reference as ref  # noqa: E402
import small_models as small  # noqa: E402
from full_size import MODELS, RESIDUAL  # noqa: E402


def checkpoint(name, folder, device="cpu"):
    """Random weights as in the reference's goldens; which they are doesn't matter for the time they take."""
    hub = {"2.2b": "SmolVLM-Instruct"} | MODELS
    shutil.copytree(ref.HUB / hub[name], folder)
    if not (folder / "tokenizer.json").exists():
        shutil.copy(ref.HUB / hub["256m"] / "tokenizer.json", folder)
    small.write_weights({"dtype": torch.bfloat16, "residual": RESIDUAL}, folder, 0, device)


def inputs(model, n, past):
    text = model.config.text_config
    cache = torch.randn(text.num_hidden_layers, text.num_key_value_heads, past, text.head_dim)
    angles = engines.angles(ref.read_json(model.checkpoint / "config.json")["text_config"], past, n)
    tensors = [torch.randn(1, n, text.hidden_size), *angles, engines.causal(past, n), cache, cache + 1]
    return tuple(torch.as_tensor(t) for t in tensors)


def check(model, vision, decoder, side):
    """The graphs say what transformers says."""
    pixels = torch.randn(1, 3, side, side)
    expected = model.model.get_image_features(pixels[None], torch.ones(1, 1, side, side, dtype=torch.bool))
    expected = getattr(expected, "pooler_output", expected)
    expected = expected[0] if isinstance(expected, (list, tuple)) else expected
    near(vision(pixels), expected.reshape(-1, expected.shape[-1]))
    x, cos, sin, mask, keys, values = inputs(model, 40, 0)
    logits, keys, values = decoder(x, cos, sin, mask, keys, values)
    near(logits[0], model(inputs_embeds=x).logits[0, -1])
    _, cos, sin, mask, *_ = inputs(model, 1, 40)
    y = torch.randn(1, 1, x.shape[-1])
    logits, *_ = decoder(y, cos, sin, mask, keys, values)
    near(logits[0], model(inputs_embeds=torch.cat([x, y], 1)).logits[0, -1])


def near(found, expected):
    off = ((found - expected).norm() / expected.norm()).item()
    assert off < 1e-3, off


def to_onnx(vision, decoder, model, folder, side):
    from onnxruntime.quantization import QuantType, quant_pre_process, quantize_dynamic

    folder.mkdir(parents=True, exist_ok=True)
    names = [(f"vision-{side}", vision, (torch.randn(1, 3, side, side),), {}, ["pixels"], ["features"])]
    if not (folder / "decoder-int8.onnx").exists():
        axes = {"x": {1: "n"}, "cos": {0: "n"}, "sin": {0: "n"}, "mask": {0: "n", 1: "total"}}
        axes |= {"keys": {2: "past"}, "values": {2: "past"}}
        outputs = ["logits", "new_keys", "new_values"]
        np.save(folder / "embed_tokens.npy", model.model.text_model.embed_tokens.weight.numpy())
        names.append(("decoder", decoder, inputs(model, 7, 5), axes, list(axes), outputs))
    for name, module, example, axes, given, made in names:
        plain, cleaned = folder / f"{name}.onnx", folder / f"{name}-clean.onnx"
        named = {"input_names": given, "output_names": made, "dynamic_axes": axes}
        torch.onnx.export(module, example, str(plain), dynamo=False, opset_version=17, **named)
        quant_pre_process(str(plain), str(cleaned), skip_symbolic_shape=True)
        quantize_dynamic(str(cleaned), str(folder / f"{name}-int8.onnx"), weight_type=QuantType.QInt8, per_channel=True)
        cleaned.unlink()


def to_openvino(vision, decoder, model, folder, side):
    import nncf
    import openvino as ov

    folder.mkdir(parents=True, exist_ok=True)
    graph = ov.convert_model(vision, example_input=torch.randn(1, 3, side, side), input=[1, 3, side, side])
    ov.save_model(nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_ASYM), folder / f"vision-{side}.xml")
    if not (folder / "decoder.xml").exists():
        graph = ov.convert_model(decoder, example_input=inputs(model, 7, 5))
        ov.save_model(nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_ASYM), folder / "decoder.xml")


def to_gguf(source, folder, llama, sides):
    import ctypes

    import llama_cpp

    folder.mkdir(parents=True, exist_ok=True)

    def convert(source, out, kind, *options):
        command = [sys.executable, str(llama / "convert_hf_to_gguf.py"), str(source), "--outfile", str(out)]
        subprocess.run([*command, "--outtype", kind, *options], check=True)

    convert(source, folder / "text-bf16.gguf", "bf16")
    for kind in ["Q8_0", "Q4_0"]:
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
        files = [str(folder / f"text-{name}.gguf").encode() for name in ["bf16", kind.lower()]]
        assert llama_cpp.llama_model_quantize(*files, ctypes.byref(settings)) == 0
    for side in sides:
        # It knows one side, the table's.
        with tempfile.TemporaryDirectory() as other:
            other = Path(other) / "checkpoint"
            shutil.copytree(source, other)
            config = ref.read_json(other / "config.json")
            config["vision_config"]["image_size"] = side
            ref.write_json(other / "config.json", config)
            settings = ref.read_json(other / "preprocessor_config.json")
            ref.write_json(other / "preprocessor_config.json", settings | {"max_image_size": {"longest_edge": side}})
            state = load_file(other / "model.safetensors")
            name = "model.vision_model.embeddings.position_embedding.weight"
            state[name] = state[name][: (side // config["vision_config"]["patch_size"]) ** 2].contiguous()
            ref.save_file(state, other / "model.safetensors", metadata={"format": "pt"})
            for kind in ["bf16", "q8_0"]:
                convert(other, folder / f"mmproj-{side}-{kind}.gguf", kind, "--mmproj")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", choices=MODELS, default="256m")
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--llama", type=Path, help="a checkout of llama.cpp, for its converter; without it, no GGUF")
    options = parser.parse_args()
    folder = options.out / options.model
    source = folder / "checkpoint"
    if not source.exists():
        print("random weights", flush=True)
        checkpoint(options.model, source)
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32, attn_implementation="sdpa").eval()
    model.checkpoint = source
    decoder = graphs.Decoder(model).eval()
    with torch.no_grad():
        for side in options.sides:
            if (folder / "openvino" / f"vision-{side}.xml").exists():
                continue
            vision = graphs.Vision(model, side).eval()
            print(f"graphs for {side} pixels", flush=True)
            check(model, vision, decoder, side)
            to_onnx(vision, decoder, model, folder / "onnx", side)
            to_openvino(vision, decoder, model, folder / "openvino", side)
        if options.llama and not (folder / "gguf" / "text-q4_0.gguf").exists():
            to_gguf(source, folder / "gguf", options.llama, options.sides)


if __name__ == "__main__":
    main()
