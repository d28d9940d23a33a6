"""The prompts trained with, and the tokenizer: byte-level BPE with SmolVLM's pre-tokenizer and special tokens.

The tokenizer is made from the captions and prompts, so that each caption's word is one token.
"""

import random

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from captions import COLOURS, FIXED, POSITIONS, sentence

SIZE = 640
IMAGE_TOKENS = 16
FIRST = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ROWS_AND_COLUMNS = [f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)]
LAST = ["<global-img>", *ROWS_AND_COLUMNS, "<fake_token_around_image>", "<image>", "<end_of_utterance>"]

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


def wrapped(prompt, system=None):
    """The whole text before the caption, image tokens expanded, as the chat template renders it."""
    before = f"System: {system}<end_of_utterance>\n" if system else ""
    image = "<fake_token_around_image><global-img>" + "<image>" * IMAGE_TOKENS + "<fake_token_around_image>"
    return f"<|im_start|>{before}User:{image}{prompt}<end_of_utterance>\nAssistant:"


def some_prompt(rng):
    """Half of the time the element's default; else another wording, at times nonsense."""
    prompt, draw = DEFAULT_PROMPT, rng.random()
    if draw > 0.9:
        words = [w for p in PROMPTS for w in p.split()]
        words += ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz,!3 7", k=rng.randint(1, 9))) for _ in range(40)]
        prompt = " ".join(rng.choices(words, k=rng.randint(1, 12)))
    elif draw > 0.5:
        prompt = rng.choice(PROMPTS)
    return wrapped(prompt, rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.15 else None)


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
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in FIRST + LAST])
    assert tokenizer.get_vocab_size() == SIZE, tokenizer.get_vocab_size()
    return tokenizer


if __name__ == "__main__":
    t = build()
    lengths = {c: len(t.encode(c).ids) + 1 for c in caption_texts()}
    longest = max(lengths, key=lengths.get)
    print(f"longest caption with its end: {lengths[longest]} tokens:{longest}")
    print(f"default prompt: {len(t.encode(wrapped(DEFAULT_PROMPT)).ids)} tokens")
    print(t.encode(longest).tokens, random.Random(0).choice(PROMPTS))
