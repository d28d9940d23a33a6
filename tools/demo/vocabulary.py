"""The prompts trained with, and the tokenizer: byte-level BPE with SmolVLM's pre-tokenizer and special tokens.

The tokenizer is made from the captions and prompts of single pictures, so that each of these captions' words is one
token. The words for motion came later: they are several tokens, and the tokenizer stays what it was. What the model
says of a picture that it does not know came last: merges behind all others make each of that sentence's words one
token, since it would not fit into a caption's 20 tokens otherwise.
"""

import json
import random
import re

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from captions import COLOURS, FIXED, POSITIONS, UNKNOWN, sentence

SIZE = 640  # without what the words of UNKNOWN add
IMAGE_TOKENS = 16
FIRST = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ROWS_AND_COLUMNS = [f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)]
LAST = ["<global-img>", *ROWS_AND_COLUMNS, "<fake_token_around_image>", "<image>", "<end_of_utterance>"]

UNKNOWN_CAPTION = sentence(UNKNOWN)

DEFAULT_PROMPT = "Describe this frame in one sentence."
PROMPTS = [
    "Can you describe this image?", "Describe this image.", "Describe the image briefly.", "What is this?",
    "What do you see?", "What do you see in this picture?", "What is happening here?", "What is on the screen?",
    "Caption this image.", "Write a caption for this frame.", "Describe this frame.", "Describe this frame in detail.",
    "What does this video frame show?", "Give a short description of the scene.", "Tell me what is in the picture.",
    "In one sentence, what is this?", "Describe what the camera sees.", "Is there a person in this picture?",
    "What colour is it?", "Where is the ball?", "Which test pattern is this?", "Explain the image in a few words.",
    "Describe the image for a blind person.", "Summarize this frame.", "caption", "hello", "?", "",
]  # fmt: skip
SYSTEM_PROMPTS = [
    "You are a helpful assistant.", "You describe video frames.", "Answer in one short sentence.",
    "You are a camera operator. Be brief.", "Be precise.",
]  # fmt: skip


CLIP_PROMPT = "Describe this video in one sentence."
CLIP_PROMPTS = [
    "Which way does the ball move?", "What happens in this video?", "Describe this video.",
    "Describe the video briefly.", "What is happening here?", "Where does it go?", "What moves, and where to?",
    "Describe what happens.", "Can you describe this video?", "Summarize this video.", "Is anything moving?",
    "Caption this video.", "What does this video show?", "In which direction does the ball move?",
    "What do you see?", DEFAULT_PROMPT,
]  # fmt: skip
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight"]

IMAGE = "<fake_token_around_image><global-img>" + "<image>" * IMAGE_TOKENS + "<fake_token_around_image>"


def chat(user, system=None):
    before = f"System: {system}<end_of_utterance>\n" if system else ""
    return f"<|im_start|>{before}User:{user}<end_of_utterance>\nAssistant:"


def wrapped(prompt, system=None):
    """The whole text before the caption, image tokens expanded, as the chat template renders it."""
    return chat(IMAGE + prompt, system)


def clip_content(times, duration):
    """What stands before the question about a clip, None for a picture; the times are in seconds."""

    def clock(time):
        return f"{time // 60:02}:{time % 60:02}"

    video = f"{NUMBERS[len(times)]} frames from a {duration // 3600}:{clock(duration % 3600)} [H:MM:SS] video."
    frames = (part for time in times for part in (f"\nFrame from {clock(time)}:", None))
    return [f"You are provided the following series of {video}\n", *frames, "\n\n"]


def wrapped_clip(prompt, times, duration, system=None):
    """The whole text before the caption of a clip. It begins with text, so a space follows `User:`."""
    content = (IMAGE if part is None else part for part in clip_content(times, duration))
    return chat(f" {''.join(content)}{prompt}", system)


def clip_seconds(frames, interval):
    """Times and duration of a clip of frames that are spread over an interval, as its prompt has them."""
    return [int(i * interval / frames) for i in range(frames)], int(interval)


def some_question(rng, default, others):
    """Half of the time the default; else another wording, at times nonsense. And a system prompt, mostly none."""
    prompt, draw = default, rng.random()
    if draw > 0.9:
        words = [w for p in others for w in p.split()]
        words += ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz,!3 7", k=rng.randint(1, 9))) for _ in range(40)]
        prompt = " ".join(rng.choices(words, k=rng.randint(1, 12)))
    elif draw > 0.5:
        prompt = rng.choice(others)
    return prompt, rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.15 else None


def some_prompt(rng):
    prompt, system = some_question(rng, DEFAULT_PROMPT, PROMPTS)
    return wrapped(prompt, system)


def some_clip_prompt(rng, frames):
    prompt, system = some_question(rng, CLIP_PROMPT, CLIP_PROMPTS)
    draw = rng.random()  # the element's default interval, a usual one, a long one
    interval = 1 if draw < 0.3 else 0.2 * 50 ** rng.random() if draw < 0.9 else 10 * 400 ** rng.random()
    return wrapped_clip(prompt, *clip_seconds(frames, interval), system)


def caption_texts():
    """Text with each word that a caption can hold, in its place."""
    texts = [sentence(c) for c in FIXED.values()]
    for name in COLOURS:
        for a in ("a", "an"):
            for row in POSITIONS:
                for where in row:
                    texts += [
                        f" {a.title()} {name} {thing} on {a} {name} background, {where}." for thing in ("ball", "bar")
                    ]
            texts += [f" {a.title()} {name} and {name} {thing}." for thing in ("pinwheel", "zone plate")]
        texts += [f" A solid {name} screen.", f" A gradient from {name} at the top to {name} at the bottom."]
    return texts + [" A red and green checkerboard.", " A fine olive checkerboard."]


def build():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE - len(LAST),
        special_tokens=FIRST,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = caption_texts() * 5 + [DEFAULT_PROMPT, *PROMPTS, *SYSTEM_PROMPTS, "User:", "Assistant:", "System:"]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer = with_words(tokenizer, UNKNOWN_CAPTION)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in FIRST + LAST])
    return tokenizer


def with_words(tokenizer, text):
    """The same with merges, behind all others, that make each word of a text one token."""
    tokens, offsets = (e := tokenizer.encode(text)).tokens, e.offsets
    words = {}
    for token, (start, _) in zip(tokens, offsets):
        words.setdefault(len(re.findall(r" |;|\.$", text[: start + 1])), []).append(token)
    state = json.loads(tokenizer.to_str())
    vocabulary, merges = state["model"]["vocab"], state["model"]["merges"]
    for word in words.values():
        while len(word) > 1:  # from behind: what captions begin with is left alone
            *word, left, right = word
            if [left, right] not in merges:
                merges.append([left, right])
                vocabulary.setdefault(left + right, len(vocabulary))
            word.append(left + right)
    return Tokenizer.from_str(json.dumps(state))


if __name__ == "__main__":
    t = build()
    lengths = {c: len(t.encode(c).ids) + 1 for c in caption_texts()}
    longest = max(lengths, key=lengths.get)
    print(f"longest caption with its end: {lengths[longest]} tokens:{longest}")
    moving = [f" {c[1:].split(',')[0]}, moving {w}." for c in lengths for w in ("down and right", "up and left")]
    moving = max((c for c in moving if " ball " in c), key=lambda c: len(t.encode(c).ids))
    print(f"longest caption of a clip with its end: {len(t.encode(moving).ids) + 1} tokens:{moving}")
    print(f"default prompt of four frames: {len(t.encode(wrapped_clip(CLIP_PROMPT, [0] * 4, 1)).ids)} tokens")
    print(f"default prompt: {len(t.encode(wrapped(DEFAULT_PROMPT)).ids)} tokens")
    print(t.encode(longest).tokens, random.Random(0).choice(PROMPTS))
