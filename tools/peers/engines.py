"""One engine of compare.py, in a process of its own.

    python engines.py KIND FOLDER SIDE THREADS [DEVICE]

Loads, says so in one line of JSON, and for each line that it reads makes a caption of 20 tokens and says in one line
how long each stage took, in ms. With a device, as torch names it, it is one of those of ../gpu.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np

TOKENS = 20
PROMPT = "Describe this frame in one sentence."


def peak():
    """Most memory that the process has taken, MiB."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def tokens_of_a_picture(folder, side):
    config = json.loads((folder / "checkpoint" / "config.json").read_text())
    return (side // config["vision_config"]["patch_size"] // config["scale_factor"]) ** 2


def prompt_ids(folder, tokens):
    """Ids of the prompt, and where the picture stands in it."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "checkpoint" / "tokenizer.json"))
    picture = "<fake_token_around_image><global-img>" + "<image>" * tokens + "<fake_token_around_image>"
    text = f"<|im_start|>User:{picture}{PROMPT}<end_of_utterance>\nAssistant:"
    ids = np.array(tokenizer.encode(text, add_special_tokens=False).ids)
    image = tokenizer.token_to_id("<image>")
    return ids, np.flatnonzero(ids == image)


def angles(text_config, start, n):
    """Cosines and sines `[n, head_dim]` of the positions from `start` on."""
    size = text_config["head_dim"]
    frequencies = 1.0 / text_config["rope_theta"] ** (np.arange(0, size, 2, dtype=np.float32) / size)
    turns = np.arange(start, start + n, dtype=np.float32)[:, None] * frequencies
    turns = np.concatenate([turns, turns], -1)
    return np.cos(turns), np.sin(turns)


def causal(past, n):
    """What to add to the scores, `[n, past + n]`."""
    return np.triu(np.full((n, past + n), -np.inf, np.float32), past + 1)


class Graphs:
    """Exported graphs behind two functions; embedding, cache and choice are numpy."""

    def __init__(self, folder, side):
        self.config = json.loads((folder / "checkpoint" / "config.json").read_text())["text_config"]
        self.table = np.load(folder / "onnx" / "embed_tokens.npy", mmap_mode="r")
        self.ids, self.places = prompt_ids(folder, tokens_of_a_picture(folder, side))
        self.pixels = np.random.default_rng(0).uniform(-1, 1, (1, 3, side, side)).astype(np.float32)

    def caption(self):
        c = self.config
        n = len(self.ids)
        shape = (c["num_hidden_layers"], c["num_key_value_heads"], n + TOKENS, c["head_dim"])
        keys, values = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        cos, sin = angles(c, 0, n + TOKENS)
        mask = causal(0, n)

        def step(x, past, mask):
            n = x.shape[1]
            at = slice(past, past + n)
            logits, k, v = self.decode(x, cos[at], sin[at], mask, keys[:, :, :past], values[:, :, :past])
            keys[:, :, at], values[:, :, at] = k, v
            return int(logits.argmax())

        times = [time.perf_counter()]
        features = self.see(self.pixels)
        times.append(time.perf_counter())
        x = self.table[self.ids]
        x[self.places] = features
        token = step(x[None], 0, mask)
        times.append(time.perf_counter())
        for i in range(TOKENS - 1):
            mask = np.zeros((1, n + i + 1), np.float32)
            token = step(self.table[token][None, None], n + i, mask)
        times.append(time.perf_counter())
        return times


class OnnxRuntime(Graphs):
    def __init__(self, folder, side, threads, kind):
        import onnxruntime as ort

        super().__init__(folder, side)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        names = [f"vision-{side}{kind}", f"decoder{kind}"]
        files = [str(folder / "onnx" / f"{name}.onnx") for name in names]
        cpu = ["CPUExecutionProvider"]
        self.vision, self.decoder = (ort.InferenceSession(file, options, providers=cpu) for file in files)
        self.names = [i.name for i in self.decoder.get_inputs()]

    def see(self, pixels):
        return self.vision.run(None, {"pixels": pixels})[0]

    def decode(self, *inputs):
        return self.decoder.run(None, dict(zip(self.names, map(np.ascontiguousarray, inputs))))


class OpenVino(Graphs):
    def __init__(self, folder, side, threads):
        import openvino as ov

        super().__init__(folder, side)
        core = ov.Core()
        core.set_property("CPU", {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"})
        files = [str(folder / "openvino" / f"{name}.xml") for name in [f"vision-{side}", "decoder"]]
        self.vision, self.decoder = (core.compile_model(file, "CPU").create_infer_request() for file in files)

    def see(self, pixels):
        return self.vision.infer([pixels])[0]

    def decode(self, *inputs):
        made = self.decoder.infer(list(map(np.ascontiguousarray, inputs)))
        return made[0], made[1], made[2]


class Transformers:
    """The model's own modules, as `generate` runs them, without what it does besides."""

    def __init__(self, folder, side, threads, dtype, compiled, device="cpu"):
        import torch
        from transformers import AutoModelForImageTextToText, DynamicCache, StaticCache

        torch.set_num_threads(threads)
        self.torch = torch
        model = AutoModelForImageTextToText.from_pretrained(folder / "checkpoint", dtype=getattr(torch, dtype)).eval()
        model = model.to(device)
        ids, places = prompt_ids(folder, tokens_of_a_picture(folder, side))
        self.ids, self.places = torch.tensor(ids, device=device)[None], torch.tensor(places, device=device)
        # In the memory of the host, as a picture comes.
        self.pixels = torch.rand(1, 1, 3, side, side, dtype=model.dtype) * 2 - 1
        self.whole = torch.ones(1, 1, side, side, dtype=torch.bool, device=device)
        self.positions = torch.arange(len(ids) + TOKENS, device=device)[None]
        self.table = model.model.text_model.embed_tokens
        text, head = model.model.text_model, model.lm_head
        config = model.config.text_config

        def step(x, positions, cache):
            made = text(inputs_embeds=x, position_ids=positions, past_key_values=cache, use_cache=True)
            return head(made.last_hidden_state[:, -1]).argmax(-1)

        self.whole_model, self.model, self.step = model, model.model, step
        self.cache = lambda: DynamicCache(config=config)
        if compiled:
            self.model.vision_model = torch.compile(self.model.vision_model)
            self.step = torch.compile(step)
            self.cache = lambda: StaticCache(config=config, max_cache_len=len(ids) + TOKENS)

    def now(self):
        """The time, when all is done that a GPU was told to do."""
        if self.ids.is_cuda:
            self.torch.cuda.synchronize()
        return time.perf_counter()

    def caption(self):
        with self.torch.inference_mode():
            times = [self.now()]
            pixels = self.pixels.to(self.ids.device)
            features = self.model.get_image_features(pixels, self.whole).pooler_output[0]
            times.append(self.now())
            cache, n = self.cache(), self.ids.shape[1]
            x = self.table(self.ids)
            x[0, self.places] = features
            said = [self.step(x, self.positions[:, :n], cache)]
            times.append(self.now())
            for at in range(n, n + TOKENS - 1):
                said.append(self.step(self.table(said[-1])[None], self.positions[:, at : at + 1], cache))
            self.said = self.torch.cat(said).tolist()
            times.append(self.now())
        return times


class Captured(Transformers):
    """Its modules as in graphs.py, with a cache of fixed size and no Python in between: a CUDA graph each of the
    picture, the prompt and a token. Transformers' own code can't be captured: it asks the GPU for numbers on the way.

    Compiled layer by layer, since they are alike: as a whole it would take minutes. Off a GPU the same functions run
    as they are, so that they can be tried.
    """

    def __init__(self, folder, side, threads, dtype, compiled, device):
        import graphs
        import torch

        super().__init__(folder, side, threads, dtype, False, device)
        model, config, n = self.whole_model, self.whole_model.config.text_config, self.ids.shape[1]
        vision = graphs.Vision(model, side).eval()
        reader, talker = graphs.Decoder(model).eval(), graphs.Decoder(model).eval()
        if compiled:
            vision.layer = torch.compile(vision.layer, dynamic=False)
            reader.layer = torch.compile(reader.layer, dynamic=False)
            # A product with one token only reads weights, for which code made to measure is better than a library's.
            tuned = {"coordinate_descent_tuning": True} if self.ids.is_cuda else None
            talker.layer = torch.compile(talker.layer, dynamic=False, options=tuned)
            talker.logits = torch.compile(talker.logits, dynamic=False, options=tuned)
        self.picture = self.pixels[0].pin_memory() if self.ids.is_cuda else self.pixels[0]
        # Rows of a mask must be of a multiple of 8 for the fast kernels.
        room = -(-(n + TOKENS) // 8) * 8
        with torch.inference_mode():
            self.on_device = self.picture.to(device)
            self.made = torch.zeros(TOKENS, dtype=torch.long, device=device)
            places = torch.arange(room, device=device)
            shape = (config.num_hidden_layers, config.num_key_value_heads, room, config.head_dim)
            keys, values = (torch.zeros(shape, dtype=model.dtype, device=device) for _ in range(2))
            at = torch.zeros(1, dtype=torch.long, device=device)
            cos, sin = (table[0] for table in model.model.text_model.rotary_emb(keys, places[None]))
            seen = torch.zeros(room, dtype=model.dtype, device=device)
            features = vision(self.on_device)

            def see():
                features.copy_(vision(self.on_device))

            def read():
                x = self.table(self.ids)
                x[0, self.places] = features
                self.made[:1] = reader(x, cos[:n], sin[:n], None, keys, values, places[:n]).argmax(-1)
                at.fill_(n)

            def say():
                x = self.table(self.made[at - n])[None]
                mask = seen.masked_fill(places > at[:, None], -torch.inf)
                logits = talker(x, cos[at], sin[at], mask, keys, values, at)
                self.made[at - n + 1] = logits.argmax(-1)
                at.add_(1)

            self.see, self.read, self.say = map(self.capture, (see, read, say))

    def capture(self, stage):
        cuda = self.torch.cuda
        if not self.ids.is_cuda:
            return stage
        # What is only done the first time, on a stream beside as the documentation has it.
        beside = cuda.Stream()
        beside.wait_stream(cuda.current_stream())
        with cuda.stream(beside):
            for _ in range(3):
                stage()
        cuda.current_stream().wait_stream(beside)
        graph = cuda.CUDAGraph()
        with cuda.graph(graph, capture_error_mode="thread_local"):
            stage()
        return graph.replay

    def caption(self):
        with self.torch.inference_mode():
            times = [self.now()]
            self.on_device.copy_(self.picture, non_blocking=True)
            self.see()
            times.append(self.now())
            self.read()
            times.append(self.now())
            for _ in range(TOKENS - 1):
                self.say()
            self.said = self.made.tolist()
            times.append(self.now())
        return times


class Llama:
    """llama.cpp through its own functions: its programs encode a picture twice in this version."""

    def __init__(self, folder, side, threads, text, mmproj):
        import ctypes

        import llama_cpp
        from llama_cpp import mtmd_cpp as mtmd

        self.c, self.llama, self.mtmd = ctypes, llama_cpp, mtmd
        llama_cpp.llama_backend_init()
        silent = llama_cpp.llama_log_callback(lambda *_: None)
        self.silent = silent
        llama_cpp.llama_log_set(silent, None)
        settings = llama_cpp.llama_model_default_params()
        file = folder / "gguf" / f"text-{text}.gguf"
        model = llama_cpp.llama_model_load_from_file(str(file).encode(), settings)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_threads, settings.n_threads_batch = 512, threads, threads
        self.context = llama_cpp.llama_init_from_model(model, settings)
        self.width = llama_cpp.llama_model_n_embd(model)
        self.words = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        settings = mtmd.mtmd_context_params_default()
        settings.use_gpu, settings.print_timings, settings.n_threads = False, False, threads
        file = folder / "gguf" / f"mmproj-{side}-{mmproj}.gguf"
        self.encoder = mtmd.mtmd_init_from_file(str(file).encode(), model, settings)
        # Of what it cuts a picture into, the first piece with as many tokens as one square has.
        rgb = np.random.default_rng(0).integers(0, 256, side * side * 3, np.uint8)
        pixels = rgb.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        bitmap = mtmd.mtmd_bitmap_init(side, side, pixels)
        chunks = mtmd.mtmd_input_chunks_init()
        what = mtmd.mtmd_input_text()
        what.text = mtmd.mtmd_default_marker()
        what.text_len, what.add_special, what.parse_special = len(what.text), False, True
        bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
        assert mtmd.mtmd_tokenize(self.encoder, chunks, ctypes.byref(what), bitmaps, 1) == 0
        count = tokens_of_a_picture(folder, side)
        pieces = (mtmd.mtmd_input_chunks_get(chunks, i) for i in range(mtmd.mtmd_input_chunks_size(chunks)))
        kinds = ((mtmd.mtmd_input_chunk_get_type(c), mtmd.mtmd_input_chunk_get_n_tokens(c), c) for c in pieces)
        self.picture = next(c for kind, tokens, c in kinds if (kind, tokens) == (1, count))
        ids, places = prompt_ids(folder, count)
        self.before, self.after = ids[: places[0]], ids[places[-1] + 1 :]
        self.count, self.kept = count, (rgb, bitmap, chunks)

    def run(self, n, past, ids=None, values=None, last=True):
        batch = self.llama.llama_batch_init(n, self.width if values is not None else 0, 1)
        batch.n_tokens = n
        for i in range(n):
            batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = past + i, 1, 0
            batch.logits[i] = last and i == n - 1
            if values is None:
                batch.token[i] = int(ids[i])
        if values is not None:
            self.c.memmove(batch.embd, values, 4 * n * self.width)
        assert self.llama.llama_decode(self.context, batch) == 0
        token = None
        if last:
            logits = self.llama.llama_get_logits_ith(self.context, -1)
            token = int(np.ctypeslib.as_array(logits, (self.words,)).argmax())
        self.llama.llama_batch_free(batch)
        return token

    def caption(self):
        self.llama.llama_memory_clear(self.llama.llama_get_memory(self.context), True)
        times = [time.perf_counter()]
        assert self.mtmd.mtmd_encode_chunk(self.encoder, self.picture) == 0
        features = self.mtmd.mtmd_get_output_embd(self.encoder)
        times.append(time.perf_counter())
        past = len(self.before)
        self.run(past, 0, self.before, last=False)
        self.run(self.count, past, values=features, last=False)
        past += self.count
        token = self.run(len(self.after), past, self.after)
        past += len(self.after)
        times.append(time.perf_counter())
        for i in range(TOKENS - 1):
            token = self.run(1, past + i, [token])
        times.append(time.perf_counter())
        return times


ENGINES = {
    "onnxruntime-f32": lambda f, s, t: OnnxRuntime(f, s, t, ""),
    "onnxruntime-int8": lambda f, s, t: OnnxRuntime(f, s, t, "-int8"),
    "openvino-int8": lambda f, s, t: OpenVino(f, s, t),
    "transformers-f32": lambda f, s, t: Transformers(f, s, t, "float32", False),
    "transformers-bf16": lambda f, s, t: Transformers(f, s, t, "bfloat16", False),
    "transformers-f32-compiled": lambda f, s, t: Transformers(f, s, t, "float32", True),
    "transformers-bf16-compiled": lambda f, s, t: Transformers(f, s, t, "bfloat16", True),
    "llama.cpp-q4_0": lambda f, s, t: Llama(f, s, t, "q4_0", "q8_0"),
    "llama.cpp-q8_0": lambda f, s, t: Llama(f, s, t, "q8_0", "q8_0"),
}


# Those of ../gpu: in bf16, on a device that comes last.
ON_GPU = {
    "transformers": lambda f, s, t, d: Transformers(f, s, t, "bfloat16", False, d),
    "pytorch-graphs": lambda f, s, t, d: Captured(f, s, t, "bfloat16", False, d),
    "pytorch-compiled": lambda f, s, t, d: Captured(f, s, t, "bfloat16", True, d),
}


def main():
    kind, folder, side, threads, *device = sys.argv[1:]
    engine = (ON_GPU if device else ENGINES)[kind](Path(folder), int(side), int(threads), *device)

    def say(**what):
        print(json.dumps(what), flush=True)

    say(ready=True)
    for _ in sys.stdin:
        times = engine.caption()
        vision, prefill, decode = (1e3 * (b - a) for a, b in zip(times, times[1:]))
        say(vision=vision, prefill=prefill, decode=decode, peak=peak())


if __name__ == "__main__":
    main()
