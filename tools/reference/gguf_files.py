"""Write tests/data/gguf: a small random-weight SmolVLM, and the GGUF files that llama.cpp makes of it.

    python gguf_files.py LLAMA_CPP [--out FOLDER]

LLAMA_CPP is a checkout of llama.cpp, whose convert_hf_to_gguf.py does the work, as it did for the published files. One
thing in it is patched: it knows a pre-tokenizer by the hash of what the published vocabulary makes of a text, which a
small vocabulary can't match; here it is told that this is SmolLM's.

Widths are multiples of 32, the rows of a Q8_0 block, so that llama.cpp leaves no matrix in 16 bits. Query and key
heads differ in number, as do their rows' orders in the two formats.
"""

import argparse
import runpy
import shutil
import sys
import tempfile
from pathlib import Path

import torch

import reference as ref
import small_models as small

OUT = Path(__file__).resolve().parents[2] / "tests" / "data" / "gguf"
NAME = "SmolVLM-Small"
SIDE = 128
VISION = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 2, "image_size": SIDE}
TEXT = small.text(heads=4, kv_heads=2, head_dim=16, intermediate=96) | {"num_hidden_layers": 2}
MEMBER = dict(hub="SmolVLM-256M-Instruct", text=TEXT, dtype=torch.bfloat16)
SEED = 1
# As the published repositories: more than one precision, and more projectors than text files.
FILES = [("bf16", "BF16", True), ("q8_0", "Q8_0", True), ("f16", "f16", False)]
# What is read of the checkpoint.
KEPT = ("config.json", "generation_config.json", "preprocessor_config.json", "chat_template.jinja", "tokenizer.json", "model.safetensors")


def write_checkpoint(folder):
    folder.mkdir()
    small.write_configs(MEMBER, folder)
    config = ref.read_json(folder / "config.json")
    config["vision_config"] |= VISION
    ref.write_json(folder / "config.json", config)
    settings = ref.read_json(folder / "preprocessor_config.json")
    settings |= {"max_image_size": {"longest_edge": SIDE}, "size": {"longest_edge": 4 * SIDE}}
    ref.write_json(folder / "preprocessor_config.json", settings)
    small.write_weights(MEMBER, folder, SEED)


def convert(llama, checkpoint, outfile, outtype, *options):
    sys.argv = ["convert_hf_to_gguf.py", str(checkpoint), "--outfile", str(outfile), "--outtype", outtype, *options]
    runpy.run_path(str(llama / "convert_hf_to_gguf.py"), run_name="__main__")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("llama", type=Path, metavar="LLAMA_CPP")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    sys.path[1:1] = [str(options.llama), str(options.llama / "gguf-py")]
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda *_: "smollm"
    small.MERGES = 120
    with tempfile.TemporaryDirectory() as temporary:
        # The converter takes the model's name from the folder's.
        made = Path(temporary) / NAME
        write_checkpoint(made)
        shutil.rmtree(options.out, ignore_errors=True)
        options.out.mkdir(parents=True)
        for outtype, tag, text in FILES:
            if text:
                convert(options.llama, made, options.out / f"{NAME}-{tag}.gguf", outtype)
            convert(options.llama, made, options.out / f"mmproj-{NAME}-{tag}.gguf", outtype, "--mmproj")
        (options.out / NAME).mkdir()
        for file in KEPT:
            shutil.copy(made / file, options.out / NAME / file)
            (options.out / NAME / file).chmod(0o644)


if __name__ == "__main__":
    main()
