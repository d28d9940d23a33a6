"""Writes the demo model's folder: bfloat16 weights under the official names, tokenizer and configuration files.

    python3 export.py CHECKPOINT models/demo

The model card, README.md, is written by hand.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

import model as shape
import vocabulary

CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
SPECIAL = {
    "additional_special_tokens": ["<fake_token_around_image>", "<image>", "<end_of_utterance>"],
    "bos_token": "<|im_start|>",
    "eos_token": "<end_of_utterance>",
    "pad_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
}
SIDE = shape.CONFIG["vision_config"]["image_size"]
PREPROCESSOR = {
    "do_convert_rgb": True,
    "do_image_splitting": False,
    "do_normalize": True,
    "do_pad": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "SmolVLMImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "max_image_size": {"longest_edge": SIDE},
    "processor_class": "SmolVLMProcessor",
    "resample": 1,
    "rescale_factor": 1 / 255,
    "size": {"longest_edge": 4 * SIDE},
}


def main(checkpoint, folder):
    folder.mkdir(parents=True, exist_ok=True)
    state = torch.load(checkpoint)["model"]
    weights = {k: v.to(torch.bfloat16).contiguous() for k, v in sorted(state.items())}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer = vocabulary.build()
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {name: tokenizer.token_to_id(name) for name in vocabulary.FIRST + vocabulary.LAST}
    assert ids["<image>"] == shape.CONFIG["image_token_id"] and ids["<|im_end|>"] == shape.CONFIG["pad_token_id"]
    assert ids["<end_of_utterance>"] == shape.CONFIG["text_config"]["eos_token_id"]
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    files = {
        "config.json": shape.CONFIG,
        "generation_config.json": {
            "_from_model_config": True,
            "bos_token_id": ids["<|im_start|>"],
            "eos_token_id": ids["<end_of_utterance>"],
            "pad_token_id": ids["<|im_end|>"],
        },
        "preprocessor_config.json": PREPROCESSOR,
        "processor_config.json": {"image_seq_len": vocabulary.IMAGE_TOKENS, "processor_class": "SmolVLMProcessor"},
        "special_tokens_map.json": SPECIAL,
        "tokenizer_config.json": {
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": shape.CONFIG["text_config"]["max_position_embeddings"],
            "processor_class": "SmolVLMProcessor",
            "tokenizer_class": "PreTrainedTokenizerFast",
            **SPECIAL,
        },
    }
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "model.safetensors").chmod(0o644)
    print(
        f"{sum(v.numel() for v in weights.values()):,} parameters,",
        sum(f.stat().st_size for f in folder.iterdir()),
        "bytes",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
