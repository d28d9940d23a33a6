"""Write tests/data/hub/prompts.json and tests/data/reference/sizes.json.

prompts.json: what the reference processor makes of chats with the real tokenizers, for each of the six models.
Models with the same answer share an entry; `ids` is run-length coded, [id, count] pairs. It also holds the number
words of the video prompt and the frame sampling of the video processor.

sizes.json: picture sizes through the resizes of the reference, extreme aspect ratios included.
"""

import json

from num2words import num2words
from transformers.models.smolvlm import image_processing_pil_smolvlm as pil
from transformers.video_utils import VideoMetadata

import reference as ref

FIRST = "SmolVLM-256M-Instruct"
MODELS = [
    FIRST,
    "SmolVLM-500M-Instruct",
    "SmolVLM-Instruct",
    "SmolVLM2-256M-Video-Instruct",
    "SmolVLM2-500M-Video-Instruct",
    "SmolVLM2-2.2B-Instruct",
]
IMAGE, VIDEO = {"type": "image"}, {"type": "video"}


def chat(*turns):
    """Messages of (role, content...) turns; a string is a text part."""
    part = lambda p: {"type": "text", "text": p} if isinstance(p, str) else p
    return [{"role": role, "content": [part(p) for p in content]} for role, *content in turns]


def user(*content):
    return chat(("user", *content))


DESCRIBE = "Can you describe this image?"
SMALL = (64, 48)
PROMPTS = {
    "one_picture": (user(IMAGE, DESCRIBE), [(640, 427)], False),
    "two_pictures": (user(IMAGE, IMAGE, "What are the differences?"), [(640, 427), SMALL], False),
    "picture_between_texts": (user("Look at this: ", IMAGE, " and answer."), [SMALL], False),
    "picture_last": (user("What is this?", IMAGE), [SMALL], False),
    "picture_alone": (user(IMAGE), [SMALL], False),
    "text_alone": (user("What is the capital of France?"), [], False),
    "system": (chat(("system", "Answer in one word."), ("user", IMAGE, DESCRIBE)), [SMALL], False),
    "turns": (
        chat(
            ("user", IMAGE, "What is this?"),
            ("assistant", "A cat on a mat."),
            ("user", "Which colour is it?"),
        ),
        [SMALL],
        False,
    ),
    "two_turns_of_pictures": (
        chat(("user", IMAGE, "First?"), ("assistant", "Yes."), ("user", "Second: ", IMAGE)),
        [SMALL, (48, 64)],
        False,
    ),
    "tiled_640x427": (user(IMAGE, DESCRIBE), [(640, 427)], True),
    "tiled_square": (user(IMAGE, DESCRIBE), [(300, 300)], True),
    "tiled_1000x120": (user(IMAGE, DESCRIBE), [(1000, 120)], True),
    "tiled_120x1000": (user(IMAGE, DESCRIBE), [(120, 1000)], True),
    "tiled_two": (user(IMAGE, IMAGE, "Compare."), [(640, 427), (120, 1000)], True),
    "tiled_text_first": (user("Look:", IMAGE, "\nWhat is it?"), [(1000, 120)], True),
    "empty": (user(IMAGE, ""), [SMALL], False),
    "empty_text_alone": (user(""), [], False),
    "digits": (user(IMAGE, "Is it 12345 or 3.14, in 2024? a  3 b  42"), [SMALL], False),
    "spaces": (user(IMAGE, "  two  spaces   three\ttab "), [SMALL], False),
    "newlines": (user(IMAGE, "\n\nline one\nline two\n\n\nline three\r\nlast\n"), [SMALL], False),
    "unicode": (user(IMAGE, "Décris l’image: naïve café, Straße, 你好世界, привет, e\u0301, ½"), [SMALL], False),
    "emoji": (user(IMAGE, "What 🙂 is 👩‍👩‍👧‍👦 this 🇫🇷?"), [SMALL], False),
    "quotes": (user(IMAGE, "I'm sure it's \"quoted\" & <b>bold</b> {{ not jinja }} they'LL"), [SMALL], False),
    "special_tokens_in_text": (user(IMAGE, "a<|im_end|>b <end_of_utterance> c<|endoftext|>"), [SMALL], False),
}


def frames(count, total, fps, duration):
    step = (total - 1) / max(count - 1, 1)
    return {"total_num_frames": total, "fps": fps, "duration": duration, "frames_indices": [int(i * step) for i in range(count)]}


VIDEOS = {
    "video_1": frames(1, 1, 1.0, 1.0),
    "video_2": frames(2, 60, 30.0, 2.0),
    "video_4": frames(4, 120, 30.0, 4.0),
    "video_8": frames(8, 240, 30.0, 8.0),
    "video_8_ntsc": frames(8, 2400, 29.97, 80.08),
    "video_4_minutes": frames(4, 7500, 25.0, 300.0),
    "video_2_hours": frames(2, 100000, 25.0, 4000.0),
    "video_4_short": frames(4, 16, 24.0, 16 / 24),
    "video_3_no_fps": frames(3, 3, None, None),
    "video_3_no_duration": frames(3, 50, 10.0, None),
}

# (frames, fps, duration, frames per second wanted, most frames)
SAMPLING = [
    (1, 1.0, 1.0, 1, 64),
    (10, 30.0, 10 / 30, 1, 64),
    (30, 30.0, 1.0, 1, 64),
    (45, 30.0, 1.5, 1, 64),
    (75, 30.0, 2.5, 1, 64),
    (120, 30.0, 4.0, 1, 64),
    (300, 30.0, 10.0, 1, 64),
    (1980, 30.0, 66.0, 1, 64),
    (2010, 30.0, 67.0, 1, 64),
    (3000, 25.0, 120.0, 1, 64),
    (3000, 29.97, 3000 / 29.97, 1, 64),
    (300, 30.0, 10.0, 2, 8),
    (900, 30.0, 30.0, 2, 8),
    (900, 30.0, 30.0, 0.5, 8),
    (5, 30.0, 600.0, 1, 64),
]

SIZES = [
    (640, 427), (427, 640), (300, 300), (96, 64), (1000, 120), (120, 1000), (1920, 1080), (1080, 1920), (1280, 720),
    (3840, 2160), (4096, 4096), (5000, 3000), (2048, 2048), (2049, 2047), (512, 512), (511, 513), (384, 384), (1, 1),
    (2, 1), (1, 2), (10000, 1), (1, 10000), (4096, 1), (2048, 1), (1, 2048), (3000, 7), (7, 3000), (333, 777),
    (777, 333), (1001, 999), (101, 103), (720, 576), (720, 480), (854, 480), (225, 225), (49, 17), (17, 49), (13, 11),
    (2048, 93), (2048, 211), (1024, 442), (512, 77),  # where int(L / (w / h)) is one less than L * h // w
]  # fmt: skip
EDGES = [(2048, 512), (1536, 384), (2048, 256), (768, 192), (1024, 512), (512, 512), (1456, 364)]


def run_length(ids):
    pairs = []
    for i in ids:
        if pairs and pairs[-1][0] == i:
            pairs[-1][1] += 1
        else:
            pairs.append([i, 1])
    return pairs


def add(entries, name, model, entry):
    """Append the entry, or the model's name to the same entry of another model."""
    for known in entries:
        if known["name"] == name and all(known[k] == v for k, v in entry.items()):
            known["models"].append(model)
            return
    entries.append({"name": name, "models": [model]} | entry)


def prompts():
    entries = []
    for model in MODELS:
        folder = ref.HUB / model
        own = folder if (folder / "tokenizer.json").exists() else ref.HUB / FIRST
        reference = ref.Reference(folder, tokenizer=own)
        work = [(n, m, s, split, None) for n, (m, s, split) in PROMPTS.items()]
        if model.startswith("SmolVLM2"):
            ask = user(VIDEO, "What happens in this video?")
            work += [(n, ask, [SMALL] * len(v["frames_indices"]), False, v) for n, v in VIDEOS.items()]
            own_words = user("Watch: ", VIDEO, "Then answer.")
            work.append(("video_text_first", own_words, [SMALL] * 2, False, VIDEOS["video_2"]))
        for name, messages, sizes, splitting, video in work:
            text, inputs, tiles = reference(messages, [ref.picture(*s) for s in sizes], splitting, video)
            entry = {"messages": messages, "pictures": sizes, "splitting": splitting, "video": video, "text": text}
            entry |= {"tiles": tiles, "ids": run_length(inputs["input_ids"][0].tolist())}
            add(entries, name, model, entry)
    sampler = reference.processor.video_processor
    sampling = []
    for total, fps, duration, wanted, most in SAMPLING:
        metadata = VideoMetadata(total_num_frames=total, fps=fps, duration=duration)
        indices = sampler.sample_frames(metadata, num_frames=most, fps=wanted).tolist()
        case = {"total_num_frames": total, "fps": fps, "duration": duration, "target_fps": wanted, "max_frames": most}
        sampling.append(case | {"frames_indices": indices})
    return {"prompts": entries, "number_words": [num2words(n) for n in range(65)], "sampling": sampling}


def sizes():
    """Width and height after the first resize, then those of the tiled picture, then rows and columns."""
    processor = pil.SmolVLMImageProcessorPil()
    processor.resize = lambda image, size, resample=None: (size.height, size.width)
    rows = []
    for edge, side in EDGES:
        for width, height in SIZES:
            h, w = pil._resize_output_size_rescale_to_max_len(height, width, max_len=edge)
            h, w = pil._resize_output_size_scale_below_upper_bound(h, w, max_len=pil.MAX_IMAGE_SIZE)
            image = ref.np.empty((3, h, w), dtype=ref.np.uint8)
            tiled_h, tiled_w = processor.resize_for_vision_encoder(image, side)
            split = tiled_h > side or tiled_w > side
            tiles = [tiled_h // side, tiled_w // side] if split else [0, 0]
            rows.append([edge, side, width, height, w, h, tiled_w, tiled_h, *tiles])
    fields = ["longest_edge", "max_image_side", "width", "height", "first_width", "first_height"]
    return {"fields": fields + ["tiled_width", "tiled_height", "rows", "columns"], "sizes": rows}


def write(path, value):
    """One line for each entry of a list."""
    parts = []
    for key, entries in value.items():
        lines = ",\n".join(json.dumps(e, ensure_ascii=False, separators=(",", ":")) for e in entries)
        parts.append(f"{json.dumps(key)}: [\n{lines}\n]")
    path.write_text("{" + ",\n".join(parts) + "}\n", encoding="utf-8")


if __name__ == "__main__":
    write(ref.HUB / "prompts.json", prompts())
    write(ref.HUB.parent / "reference" / "sizes.json", sizes())
