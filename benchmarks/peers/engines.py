"""One engine in a process of its own: loads its form of the model once, then answers with measurements.

    python -m benchmarks.peers.engines ENGINE HOME THREADS

`cpu.py` runs this and knows what the figures mean, `model.py` writes the models; here is how each library is driven. Libraries
are imported where they are used, so that an engine's memory is its own.
"""

from __future__ import annotations

import contextlib
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import answer_questions, status_bytes, version

GROUP, PROMPT = 128, 16
MIN_SECONDS = 0.3  # shorter measurements are repeated
TRUTH_IDS = [[(7 * i + 11 * j) % 1000 + 100 for i in range(2 * PROMPT)] for j in range(2)]


# The engines ----------------------------------------------------------------------------------------------------------


class Engine:
    """One model, loaded: `feed` gives each sequence tokens more, after `reset`, and returns the last logits of each."""

    package: str
    head = "int8"
    about: dict[str, Any] = {}  # noqa: RUF012

    def room(self, sequences: int, tokens: int) -> None:
        """Make ready, outside of the measured time, for that many sequences of that many tokens."""

    def tune(self) -> None:
        """Find the best settings by trial; not part of loading."""

    def reset(self, sequences: int) -> None:
        raise NotImplementedError

    def feed(self, rows: list[list[int]]) -> Any:
        raise NotImplementedError

    def array(self, logits: Any) -> Any:
        """What `feed` gives, as a float32 array (sequences, vocabulary)."""
        return logits.float().numpy()

    def start(self, prompts: list[list[int]]) -> Any:
        self.reset(len(prompts))
        return self.feed(prompts)

    def decode_seconds(self, sequences: int, tokens: int) -> float:
        self.start([[5 + i] * PROMPT for i in range(sequences)])
        began = time.perf_counter()
        for _ in range(tokens):
            self.feed([[9]] * sequences)
        return time.perf_counter() - began

    def prefill_seconds(self, tokens: int) -> float:
        began = time.perf_counter()
        self.start([[5] * tokens])
        return time.perf_counter() - began


class NeoxLite(Engine):
    package = "neox-lite"

    def __init__(self, folder: Path, threads: int, truth: bool = False) -> None:
        import torch

        from neox_lite import GPTNeoXForCausalLM
        from neox_lite.kernels import reference

        torch.set_num_threads(threads)
        exact = {"dtype": torch.float32} if truth else {"head": "int8"}
        self.model = GPTNeoXForCausalLM.from_pretrained(folder, **exact)
        if truth:
            self.model.ops = reference
        self.about = {"weights": f"{folder.name} g{GROUP}", "backend": self.model.ops.name}

    def room(self, sequences: int, tokens: int) -> None:
        self.pool, self.block_tables = self.model.new_pool(sequences * -(-tokens // 128)), []

    def reset(self, sequences: int) -> None:
        for block_table in self.block_tables:
            self.pool.free(block_table)
        self.block_tables = [self.pool.new() for _ in range(sequences)]

    def feed(self, rows: list[list[int]]) -> Any:
        return self.model.step(self.pool, self.block_tables, rows)


class LlamaCpp(Engine):
    """Through the C interface; a context as large as needed, with flash attention where a trial says that it helps."""

    package = "llama-cpp-python"

    def __init__(self, file: Path, threads: int, repack: bool = True) -> None:
        import llama_cpp

        self.c, self.threads, self.context, self.flash = llama_cpp, threads, None, 1
        self.batch = llama_cpp.llama_batch_init(512, 0, 1)
        self.silent = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self.silent, None)
        options = llama_cpp.llama_model_default_params()
        options.use_extra_bufts = repack
        self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), options)
        if not self.model:
            raise RuntimeError(f"llama.cpp did not open {file.name}")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        system = llama_cpp.llama_print_system_info().decode().strip()
        weights = {"int4": "Q4_0", "int8": "Q8_0"}[file.stem]
        self.about = {"weights": f"{weights}, each g{GROUP} scale four times", "repacked": repack, "system": system}

    def tune(self) -> None:
        self.flash = min((self.trial(flash), flash) for flash in (1, 0))[1]
        self.about["flash attention"] = bool(self.flash)

    def trial(self, flash: int) -> float:
        self.flash = flash
        self.room(1, 128 + PROMPT)
        self.prefill_seconds(128)
        return self.prefill_seconds(128) + self.decode_seconds(1, 8)

    def room(self, sequences: int, tokens: int) -> None:
        if self.context:
            self.c.llama_free(self.context)
        options = self.c.llama_context_default_params()
        options.n_ctx, options.n_seq_max = sequences * -(-tokens // 256) * 256, sequences
        options.n_threads = options.n_threads_batch = self.threads
        options.flash_attn_type = self.flash
        self.context = self.c.llama_init_from_model(self.model, options)

    def reset(self, sequences: int) -> None:
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), True)
        self.length = 0

    def feed(self, rows: list[list[int]]) -> Any:
        batch, at = self.batch, 0
        for sequence, row in enumerate(rows):
            for i, token in enumerate(row):
                batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, self.length + i, 1
                batch.seq_id[at][0], batch.logits[at] = sequence, i == len(row) - 1
                at += 1
        batch.n_tokens = at
        self.length += len(rows[0])
        if self.c.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        return self.c.llama_get_logits(self.context), len(rows)

    def array(self, logits: Any) -> Any:
        import numpy

        return numpy.ctypeslib.as_array(logits[0], (logits[1], self.vocab)).copy()


class OpenVino(Engine):
    """The model that optimum-intel exported, run by OpenVINO itself, its head cut to the last token of a prompt.

    Where the CPU has bfloat16, OpenVINO computes in it unless `float32`: quicker, and visible in the error.
    """

    package = "openvino"

    def __init__(self, folder: Path, threads: int, float32: bool = False) -> None:
        import numpy
        import openvino

        core, self.np = openvino.Core(), numpy
        model = core.read_model(folder / "openvino_model.xml")
        node = model.output("logits").get_node()
        while node.get_type_name() != "MatMul":
            node = node.input_value(0).get_node()
        ops, one = openvino.opset13, numpy.array([1])
        last = ops.slice(node.input_value(0), numpy.array([-1]), numpy.array([2**31 - 1]), one, one)
        node.input(0).replace_source_output(last.output(0))
        options = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
        options |= {"INFERENCE_PRECISION_HINT": "f32"} if float32 else {}
        compiled = core.compile_model(model, "CPU", options)
        self.request = compiled.create_infer_request()
        names = ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION", "DYNAMIC_QUANTIZATION_GROUP_SIZE")
        self.about = {"weights": f"int4 g{GROUP}", **{name: str(compiled.get_property(name)) for name in names}}

    def reset(self, sequences: int) -> None:
        self.request.reset_state()
        self.length = 0

    def feed(self, rows: list[list[int]]) -> Any:
        ids = self.np.array(rows)
        count, width = ids.shape
        positions = self.np.arange(self.length, self.length + width)[None].repeat(count, 0)
        self.length += width
        mask = self.np.ones((count, self.length), self.np.int64)
        beams = self.np.arange(count, dtype=self.np.int32)
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "beam_idx": beams}
        self.request.infer(given, share_inputs=True)
        return self.request.get_tensor("logits").data

    def array(self, logits: Any) -> Any:
        return logits[:, -1].copy()


class CTranslate2(Engine):
    """Its generator runs a whole greedy search at once, so a decode is the difference of a long and a short search."""

    package = "ctranslate2"

    def __init__(self, folder: Path, threads: int) -> None:
        import ctranslate2

        self.generator = ctranslate2.Generator(str(folder), "cpu", compute_type="int8", intra_threads=threads)
        self.about = {"weights": "int8, one scale a row", "compute_type": self.generator.compute_type}

    def search(self, prompts: list[list[int]], tokens: int) -> float:
        names = [[str(token) for token in prompt] for prompt in prompts]
        length = {"min_length": tokens, "max_length": tokens, "include_prompt_in_result": False, "beam_size": 1}
        began = time.perf_counter()
        self.generator.generate_batch(names, **length)
        return time.perf_counter() - began

    def decode_seconds(self, sequences: int, tokens: int) -> float:
        prompts = [[5 + i] * PROMPT for i in range(sequences)]
        short = self.search(prompts, 1)
        return self.search(prompts, tokens + 1) - short

    def prefill_seconds(self, tokens: int) -> float:
        return self.search([[5] * tokens], 1)

    def start(self, prompts: list[list[int]]) -> Any:
        return self.generator.forward_batch(prompts, return_log_probs=False)

    def array(self, logits: Any) -> Any:
        import numpy

        return numpy.array(logits)[:, -1]


class Transformers(Engine):
    package = "transformers"
    head = "bfloat16"

    def __init__(self, folder: Path, threads: int, nf4: bool = False) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        self.torch, options = torch, {"dtype": torch.bfloat16}
        self.about = {"weights": "bfloat16"}
        if nf4:
            self.package = "bitsandbytes"
            four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
            options |= {"quantization_config": transformers.BitsAndBytesConfig(**four), "device_map": "cpu"}
            self.about = {"weights": "nf4, block 64, scales not quantized"}
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()

    def reset(self, sequences: int) -> None:
        self.cache = None

    def feed(self, rows: list[list[int]]) -> Any:
        with self.torch.no_grad():
            ids = self.torch.tensor(rows)
            out = self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values
        return out.logits[:, -1]


# How to load each from the form of the model that it needs, and what must be written before that form.
ENGINES: dict[str, tuple[Any, str, list[str]]] = {
    "neox-lite-int4": (NeoxLite, "int4", []),
    "neox-lite-int8": (NeoxLite, "int8", []),
    "llama.cpp-q4_0": (LlamaCpp, "int4.gguf", ["int4"]),
    "llama.cpp-q4_0-as-stored": (partial(LlamaCpp, repack=False), "int4.gguf", ["int4"]),
    "llama.cpp-q8_0": (LlamaCpp, "int8.gguf", ["int8"]),
    "openvino-int4": (OpenVino, "openvino", ["plain"]),
    "openvino-int4-f32": (partial(OpenVino, float32=True), "openvino", ["plain"]),
    "ctranslate2-int8": (CTranslate2, "ctranslate2", ["plain"]),
    "transformers-bf16": (Transformers, "plain", []),
    "bitsandbytes-nf4": (partial(Transformers, nf4=True), "plain", []),
}
REFERENCE = "reference"


def work(name: str, home: Path, threads: int) -> None:
    """Load an engine, then answer "decode n", "batch b n", "prefill n" and "error"."""
    is_truth = name == REFERENCE
    began = time.perf_counter()
    make, form, _ = (partial(NeoxLite, truth=True), "int4", []) if is_truth else ENGINES[name]
    engine = make(home / form, threads)
    loaded = time.perf_counter() - began
    engine.room(1, PROMPT + 1)
    if not is_truth:
        engine.decode_seconds(1, 1)
    ready = time.perf_counter() - began
    engine.tune()

    def answer(question: str) -> dict[str, Any]:
        verb, *numbers = question.split()
        if verb == "error":
            return {"error": errors(engine, home / "truth.npy", write=is_truth)}
        sequences, tokens = [1, *map(int, numbers)][-2:]
        engine.room(sequences, tokens + PROMPT)
        seconds: list[float] = []
        while sum(seconds) < MIN_SECONDS:
            once = engine.prefill_seconds(tokens) if verb == "prefill" else engine.decode_seconds(sequences, tokens)
            seconds.append(once)
        held = status_bytes(peak_rss_bytes="VmHWM", rss_bytes="VmRSS", anonymous_bytes="RssAnon")
        return {"tokens_per_s": sequences * tokens * len(seconds) / sum(seconds), **held}

    about = {"version": version(engine.package), "load_s": loaded, "first_token_s": ready, "head": engine.head}
    answer_questions({**about, **engine.about}, answer)


def errors(engine: Engine, path: Path, write: bool) -> dict[str, dict[str, float]] | None:
    """The logits after each of TRUTH_IDS, fed at once and one by one: largest and rms error over the truth's rms."""
    import numpy

    engine.room(len(TRUTH_IDS), 2 * PROMPT)
    found = {"prefill": engine.array(engine.start(TRUTH_IDS))}
    if write:
        numpy.save(path, found["prefill"])
        return None
    with contextlib.suppress(NotImplementedError):
        logits = engine.start([ids[:PROMPT] for ids in TRUTH_IDS])
        for i in range(PROMPT, 2 * PROMPT):
            logits = engine.feed([[ids[i]] for ids in TRUTH_IDS])
        found["decode"] = engine.array(logits)
    truth = numpy.load(path)
    unit = float(numpy.sqrt((truth**2).mean()))
    wrong = {how: numpy.abs(logits - truth) / unit for how, logits in found.items()}
    return {how: {"max": float(e.max()), "rms": float(numpy.sqrt((e**2).mean()))} for how, e in wrong.items()}


if __name__ == "__main__":
    work(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
