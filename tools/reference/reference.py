"""What the reference scripts share: test pictures, the reference processor and model, one golden case.

The judge is transformers with the Pillow image processors, float32 and eager attention. Tokens come from
`tokenizer.json` through the tokenizers library, because `GPT2Tokenizer` of transformers 5 rebuilds the
pre-tokenizer without its Digits step.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import PIL
import tokenizers
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor
from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor

HUB = Path(__file__).resolve().parents[2] / "tests" / "data" / "hub"
STEPS = 20  # greedy tokens per case
VISION_ROWS = 32  # rows kept of each vision state


def read_json(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def write_json(path, value, indent=2):
    text = json.dumps(value, indent=indent, ensure_ascii=False, separators=None if indent else (",", ":"))
    Path(path).write_text(text + "\n", encoding="utf-8")


def picture(width, height, dx=0, dy=0):
    """The test picture, computed instead of stored: [height, width, 3] u8."""
    x = np.arange(dx, dx + width, dtype=np.int64)[None, :, None]
    y = np.arange(dy, dy + height, dtype=np.int64)[:, None, None]
    c = np.arange(3, dtype=np.int64)[None, None, :]
    value = ((x * x * (c + 1) + 3 * y * y + x * y * (2 * c + 1)) >> 6) + 5 * ((x >> 4) ^ (y >> 4))
    return (value & 255).astype(np.uint8)


def load_tokenizer(folder):
    special = read_json(folder / "special_tokens_map.json")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")),
        clean_up_tokenization_spaces=False,
        **{name: special[name] for name in ("bos_token", "eos_token", "pad_token", "unk_token")},
        additional_special_tokens=special["additional_special_tokens"],
    )


class Reference:
    """The reference processor of one checkpoint folder, at one encoder side (None: the native side)."""

    def __init__(self, folder, side=None, longest_edge=None, tokenizer=None):
        folder = Path(folder)
        config = read_json(folder / "config.json")
        settings = read_json(folder / "preprocessor_config.json")
        settings = {k: v for k, v in settings.items() if k not in ("image_processor_type", "processor_class")}
        if side is not None:
            settings["max_image_size"] = {"longest_edge": side}
        if longest_edge is not None:
            settings["size"] = {"longest_edge": longest_edge}
        self.side = settings["max_image_size"]["longest_edge"]
        self.longest_edge = settings["size"]["longest_edge"]
        grid = self.side // config["vision_config"]["patch_size"] // config["scale_factor"]
        self.plain = tokenizers.Tokenizer.from_file(str((tokenizer or folder) / "tokenizer.json"))
        hf_tokenizer = load_tokenizer(tokenizer or folder)
        arguments = {
            "image_seq_len": grid * grid,
            "chat_template": (folder / "chat_template.jinja").read_text(encoding="utf-8"),
        }
        image_settings = {k: v for k, v in settings.items() if k != "video_sampling"}
        if config["model_type"] == "smolvlm":
            self.processor = SmolVLMProcessor(
                SmolVLMImageProcessorPil(**image_settings),
                hf_tokenizer,
                SmolVLMVideoProcessor(**json.loads(json.dumps(settings))),
                **arguments,
            )
        else:
            self.processor = Idefics3Processor(Idefics3ImageProcessorPil(**image_settings), hf_tokenizer, **arguments)

    def render(self, messages):
        return self.processor.apply_chat_template(messages, add_generation_prompt=True)

    def __call__(self, messages, pictures=(), splitting=False, video=None):
        """Prompt text, inputs (input_ids, pixel_values, ...) and the [rows, columns] of each picture.

        With `video` (its metadata) the pictures are the frames, already sampled. Its pixels are those of the Pillow
        processor; `video_pixels` are those of the video processor, which resizes with torchvision.
        """
        text = self.render(messages)
        images = [Image.fromarray(p) for p in pictures]
        options = {"return_tensors": "pt", "add_special_tokens": False}
        tiles = []
        if video is not None:
            inputs = self.processor(
                text=text,
                videos=[np.stack(pictures)],
                video_metadata=[dict(video)],
                do_sample_frames=False,
                **options,
            )
            frames = self.processor.image_processor([images], do_image_splitting=False, return_tensors="pt")
            inputs["video_pixels"] = inputs["pixel_values"]
            inputs["pixel_values"] = frames["pixel_values"]
        elif images:
            layout = self.processor.image_processor(
                [images], do_image_splitting=splitting, return_row_col_info=True, return_tensors="pt"
            )
            tiles = [list(t) for t in zip(layout["rows"][0], layout["cols"][0])]
            inputs = self.processor(text=text, images=[images], do_image_splitting=splitting, **options)
        else:
            inputs = self.processor(text=text, **options)
        ids = inputs["input_ids"][0].tolist()
        expanded = self.processor.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert self.plain.encode(expanded, add_special_tokens=False).ids == ids, "tokenization differs"
        return text, inputs, tiles


def load_models(folder):
    """The same checkpoint in float32 and in bfloat16."""
    load = AutoModelForImageTextToText.from_pretrained
    return [load(folder, dtype=d, attn_implementation="eager").eval() for d in (torch.float32, torch.bfloat16)]


@torch.no_grad()
def greedy(model, inputs, steps=STEPS):
    """The logits of `steps` greedy tokens [steps, vocabulary], end of text ignored, and the tokens."""
    pixels = {k: inputs[k] for k in ("pixel_values", "pixel_attention_mask") if k in inputs}
    out = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=True, **pixels)
    rows = [out.logits[0, -1].float()]
    tokens = [int(rows[-1].argmax())]
    while len(rows) < steps:
        out = model(input_ids=torch.tensor([[tokens[-1]]]), past_key_values=out.past_key_values, use_cache=True)
        rows.append(out.logits[0, -1].float())
        tokens.append(int(rows[-1].argmax()))
    return torch.stack(rows), tokens


def margins(logits):
    top = logits.topk(2, dim=-1).values
    return [round(float(m), 5) for m in top[:, 0] - top[:, 1]]


class VisionStates:
    """Records the states of the vision tower and the connector, picture 0 only, during one forward pass."""

    def __init__(self, model):
        vision = model.model.vision_model
        modules = {"vision.embeddings": vision.embeddings}
        modules |= {f"vision.layer.{i}": layer for i, layer in enumerate(vision.encoder.layers)}
        modules |= {"vision.post_layernorm": vision.post_layernorm, "connector": model.model.connector}
        self.states = {}
        self.hooks = [m.register_forward_hook(self.keep(name)) for name, m in modules.items()]

    def keep(self, name):
        def hook(module, args, output):
            output = output[0] if isinstance(output, tuple) else output
            self.states.setdefault(name, output[0].clone())

        return hook

    def __enter__(self):
        return self.states

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


class AttentionPeaks:
    """Records how selective each attention layer is, picture 0 only, during one forward pass.

    The peak of a query is its largest weight times the number of keys it sees, 1 where attention is flat; that of a
    layer is the mean over heads and queries.
    """

    def __init__(self, model):
        towers = {"vision": model.model.vision_model.encoder.layers, "text": model.model.text_model.layers}
        self.peaks = {name: {} for name in towers}
        self.hooks = [
            layer.self_attn.register_forward_hook(self.keep(self.peaks[name], i))
            for name, layers in towers.items()
            for i, layer in enumerate(layers)
        ]

    def keep(self, peaks, i):
        def hook(module, args, output):
            if i not in peaks:
                weights = output[1][0]
                seen = (weights > 0).sum(-1)
                peaks[i] = round(float((weights.max(-1).values * seen).mean()), 2)

        return hook

    def __enter__(self):
        return self.peaks

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


def relative_l2(ours, reference):
    return float((ours - reference).double().norm() / reference.double().norm())


def pixels_u8(pixel_values):
    """[pictures, 3, H, W] u8 of normalised reference pixels (mean and deviation 0.5)."""
    pixels = pixel_values[0].double()
    return ((pixels * 0.5 + 0.5) * 255).round().to(torch.uint8)


def sha256(tensor):
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def compare_video(model, inputs, pixels, stride):
    """What the pixels of the video processor change against those of the Pillow processor."""
    video_pixels = pixels_u8(inputs["video_pixels"])
    logits, tokens = greedy(model, {**inputs, "pixel_values": inputs["video_pixels"]})
    difference = (video_pixels.int() - pixels.int()).abs()
    facts = {
        "resampling": "torchvision LANCZOS on u8, antialias",
        "pixels_sha256": sha256(video_pixels),
        "max_difference": int(difference.max()),
        "differing": round(float((difference > 0).float().mean()), 5),
        "tokens": tokens,
        "min_margin": min(margins(logits)),
    }
    return {"video_processor": facts}, {"video_processor.pixels": video_pixels[:, :, ::stride], "video_processor.logits": logits[:1]}


def run_case(folder, models, case, tokenizer=None):
    """One golden case: its entry for golden.json and its tensors for golden.safetensors."""
    full, half = models
    reference = Reference(folder, case.get("side"), case.get("longest_edge"), tokenizer)
    pictures = [picture(*p) for p in case["pictures"]]
    video = case.get("video")
    splitting = case.get("splitting", False)
    text, inputs, tiles = reference(case["messages"], pictures, splitting, video)

    with VisionStates(full) as states, AttentionPeaks(full) as peaks:
        logits, tokens = greedy(full, inputs)
    logits_bf16, tokens_bf16 = greedy(half, inputs)
    full.set_attn_implementation("sdpa")
    logits_sdpa, _ = greedy(full, inputs, steps=1)
    full.set_attn_implementation("eager")
    sdpa_error = float((logits_sdpa[0] - logits[0]).abs().max())
    assert sdpa_error < 1e-3, f"sdpa differs from eager by {sdpa_error}"

    pixels = pixels_u8(inputs["pixel_values"])
    stride = case.get("row_stride", 16)
    tensors = {
        "pixels": pixels[:, :, ::stride],
        "connector": states["connector"],
        "logits": logits if case.get("all_logits") else logits[:1],
        "logits_bf16": logits_bf16[0],
    }
    if case.get("vision_states"):
        patches = states["vision.embeddings"].shape[0]
        rows = torch.linspace(0, patches - 1, min(VISION_ROWS, patches)).round().long()
        tensors["vision.rows"] = rows
        tensors |= {name: state[rows] for name, state in states.items() if name != "connector"}
    facts = {}
    if video:
        facts, more = compare_video(full, inputs, pixels, stride)
        tensors |= more
    entry = {
        "name": case["name"],
        "messages": case["messages"],
        "pictures": [dict(zip(("width", "height", "dx", "dy"), (*p, 0, 0))) for p in case["pictures"]],
        "video": video,
        "splitting": splitting,
        "max_image_side": reference.side,
        "longest_edge": reference.longest_edge,
        "prompt": text,
        "input_ids": inputs["input_ids"][0].tolist(),
        "tiles": tiles,
        "pixel_pictures": pixels.shape[0],
        "pixels_sha256": sha256(pixels),
        "pixels_row_stride": stride,
        "tokens": tokens,
        "margins": margins(logits),
        "min_margin": min(margins(logits)),
        "tokens_bf16": tokens_bf16,
        "margins_bf16": margins(logits_bf16),
        "min_margin_bf16": min(margins(logits_bf16)),
        "logits_bf16_relative_l2": float(f"{relative_l2(logits_bf16[0], logits[0]):.2e}"),
        "attention_peaks": {tower: list(layers.values()) for tower, layers in peaks.items()},
        "logits_sdpa_error": float(f"{sdpa_error:.2e}"),
        "tensors": sorted(f"{case['name']}.{name}" for name in tensors),
    } | facts
    return entry, {f"{case['name']}.{name}": t.contiguous() for name, t in tensors.items()}


def write_goldens(folder, facts, results):
    """golden.json (facts of the member, then its cases) and golden.safetensors."""
    tensors = {}
    for _, part in results:
        tensors |= part
    save_file(tensors, folder / "golden.safetensors")
    versions = {m.__name__: m.__version__ for m in (transformers, torch, tokenizers, PIL)}
    header = json.dumps(facts | {"versions": versions}, ensure_ascii=False)
    cases = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry, _ in results)
    (folder / "golden.json").write_text(f'{header[:-1]}, "cases": [\n{cases}\n]}}\n', encoding="utf-8")


def fill_weights(model, seed, dtype, residual=1.0):
    """Random weights, exact in `dtype`, that amplify rounding no more than trained ones do.

    Attention is selective (see AttentionPeaks) but not so sharp that the rounding of its scores shows, and the
    2 × depth residual branches of a tower add up to about `residual` times the size of their input.
    """
    device = model.device
    generator = torch.Generator(device).manual_seed(seed)
    config = model.config
    gains = {"q_proj": 1.1, "k_proj": 1.1, "lm_head": 8.0}
    branches = dict.fromkeys(("out_proj", "fc2", "o_proj", "down_proj"), 1.0)
    if config.tie_word_embeddings:
        # A token must not predict itself, nor two tokens each other: the MLPs weigh as much as the embedding, whose
        # product with itself the random signs of the last norm take away.
        branches |= {"o_proj": 0.4, "down_proj": 1.8}
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            noise = torch.randn(weight.shape, generator=generator, device=device)
            tower = config.vision_config if "vision_model" in name else config.text_config
            if "norm" in name and name.endswith("weight"):
                value = 1 + 0.05 * noise
                if config.tie_word_embeddings and name.endswith("text_model.norm.weight"):
                    value *= noise.sign()
            elif name.endswith("bias"):
                value = 0.05 * noise
            elif "position_embedding" in name:
                value = 0.5 * noise
            elif "embed_tokens" in name:
                value = 0.7 * noise if config.tie_word_embeddings else noise
            else:
                gain = next((g for part, g in gains.items() if part in name), 1.0)
                branch = next((g for part, g in branches.items() if part in name), None)
                if branch is not None:
                    gain = residual * branch / (2 * tower.num_hidden_layers) ** 0.5
                value = gain * noise / weight[0].numel() ** 0.5
            weight.copy_(value.to(dtype).float())
