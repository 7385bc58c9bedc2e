"""neox-lite serve --engine vllm: the same folder, prompt form, port, key and limits as a `vllm serve` command line.

Knows vLLM's flags and nothing of its insides. What vLLM has no flag for gets a line each.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from neox_lite import GPTNeoXConfig
from neox_lite.checkpoint.reader import Checkpoint
from neox_lite.errors import ArgumentError, FormatError, UnsupportedError
from neox_lite.files import disk_errors, write_atomically
from neox_lite.formats import DENSE, Format, GroupInt, formats_of
from neox_lite.hub import resolve
from neox_lite.loading.quantized_cache import cache_root
from neox_lite.modeling.causal_lm import GPTNeoXForCausalLM
from neox_lite.modeling.heads import class_of
from neox_lite.tokenizer import GPTNeoXTokenizerFast
from neox_lite.units import DTYPES

from ..conversations.prompt_forms import Form, TurnForm, form_of
from ..terminal import note

KEY_VARIABLE = "VLLM_API_KEY"  # read by vLLM; an argument would stand in the process list
# Flags of ours that vLLM has nothing for: attribute -> (values that ask for nothing, what is so there).
LEFT_OUT: dict[str, tuple[tuple[object, ...], str]] = {
    "page": ((False,), "the chat page: vLLM serves the API alone (--no-page)"),
    "device": (("auto", "cuda"), "--device: vLLM takes the GPUs that CUDA_VISIBLE_DEVICES names"),
    "gpu_memory": ((None,), "--gpu-memory: vLLM takes nine tenths of each GPU"),
    "cpu_memory": ((None,), "--cpu-memory: no layer stays in the CPU's memory there"),
    "kv": ((None, "fp16"), "--kv: the KV cache has 16 bits there"),
    "head": ((None, "fp16"), "--head: the vocabulary head is the folder's 16-bit one there"),
    "threads": ((None,), "--threads: vLLM chooses its own"),
    "exact": ((False,), "--exact: activations have 16 bits there"),
    "warm": ((False,), "--warm: vLLM copies all weights to the GPUs anyway"),
    "queue": ((256,), "--queue: vLLM's queue has no bound"),
    "idle_unload": ((None,), "--idle-unload: vLLM keeps its memory"),
    "allowed_host": (([],), "--allowed-host: vLLM answers to any name; put a proxy in front of it"),
}


def hand_over(args: argparse.Namespace, key: str | None) -> NoReturn:
    """Become `vllm serve` with what the arguments say. Raises a NeoxLiteError where vLLM could not run it."""
    if args.model is None:
        raise ArgumentError("--engine vllm needs MODEL: vLLM loads it once, at its start")
    if args.adapter is not None:
        raise ArgumentError("--adapter is for the engine here; vLLM's own flags are --enable-lora and --lora-modules")
    if args.port == 0:
        raise ArgumentError("--engine vllm needs a --port; 0, any that is free, is for the engine here")
    program = _program()
    folder = resolve(args.model, args.revision)
    config = GPTNeoXConfig.from_pretrained(folder)
    check(folder, config, args)
    form = form_of(args.model, GPTNeoXTokenizerFast.from_pretrained(folder), args.form)
    command = [program, *arguments(args, folder, config, form)]
    for line in _left_out(args, folder, form):
        note(f"not handed over: {line}")
    note(f"hand over to vLLM: {shlex.join(command)}")
    environment = {name: value for name, value in os.environ.items() if name != "NEOX_LITE_API_KEY"}
    if key is not None:
        environment[KEY_VARIABLE] = key
        if args.api_key == "auto":
            note(f"API key, shown this once: {key}")
    sys.stdout.flush()
    os.execve(program, command, environment)


def _program() -> str:
    """vLLM's command: of this environment, else of the PATH."""
    beside = str(Path(sys.executable).parent)
    found = shutil.which("vllm", path=beside) or shutil.which("vllm")
    if found is None:
        raise UnsupportedError(
            "--engine vllm needs vLLM, which is not installed: pip install vllm, on Linux with a GPU (docs/ecosystem.md)"
        )
    return found


def arguments(args: argparse.Namespace, folder: Path, config: GPTNeoXConfig, form: Form) -> list[str]:
    """What stands after `vllm`."""
    words = ["serve", str(folder.absolute()), "--served-model-name", _served_name(args.model)]
    words += ["--host", args.host, "--port", str(args.port)]
    words += ["--max-model-len", str(args.context or config.max_position_embeddings)]
    words += ["--max-num-seqs", str(args.max_sequences)]
    if config.dtype in DTYPES:
        words += ["--dtype", str(config.dtype)]
    words += ["--tensor-parallel-size", str(args.tensor_parallel or 1)]
    words += ["--pipeline-parallel-size", str(args.pipeline_parallel or 1)]
    if args.distributed:
        words += ["--distributed-executor-backend", args.distributed]
    if isinstance(form, TurnForm):  # a chat template of the folder's own is found there
        words += ["--chat-template", str(_template_file(form))]
    return words


def _served_name(model: str) -> str:
    """What clients call the model, as they do here: of a folder its last part, a hub id as it is."""
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else model


def check(folder: Path, config: GPTNeoXConfig, args: argparse.Namespace) -> None:
    """Raise where the folder cannot go to vLLM, or cannot be cut into so many parts."""
    if class_of(config) is not GPTNeoXForCausalLM:
        raise ArgumentError(f"{folder}: is a {class_of(config).__name__}; --engine vllm serves language models")
    if args.context is not None and args.context > config.max_position_embeddings:
        raise ArgumentError(f"--context is {args.context}, but the model was made for {config.max_position_embeddings}")
    formats = formats_of(config.quantization_config)
    for name, columns in (("attention.dense", config.hidden_size), ("mlp.dense_4h_to_h", config.intermediate_size)):
        for format in dict.fromkeys(formats(f"gpt_neox.layers.{i}.{name}") for i in range(config.num_hidden_layers)):
            if format != DENSE and not isinstance(format, GroupInt):
                raise FormatError(
                    f"{folder}: {format.name} is not handed to vLLM; make a folder of int4 or int8 for it"
                )
            _check_parts(args.tensor_parallel or 1, config.num_attention_heads, columns, name, format)
    if (args.pipeline_parallel or 1) > config.num_hidden_layers:
        raise ArgumentError(
            f"--pipeline-parallel is {args.pipeline_parallel}, but the model has {config.num_hidden_layers} layers"
        )
    with Checkpoint.open(folder) as checkpoint:
        if any(file.suffix == ".pt" for file in checkpoint.files):
            raise FormatError(
                f"{folder}: vLLM does not read EleutherAI's layer files; run neox-lite quantize on them first"
            )


def _check_parts(parts: int, heads: int, columns: int, name: str, format: Format) -> None:
    if heads % parts:
        raise ArgumentError(f"--tensor-parallel is {parts}, which does not divide the {heads} attention heads")
    whole = format.group_size if isinstance(format, GroupInt) else 1
    if columns % (parts * whole):
        raise ArgumentError(
            f"--tensor-parallel is {parts}: {columns} columns of {name} do not make {parts} parts of whole groups of {whole}; "
            "take fewer parts or quantize with a smaller --group-size"
        )


def _left_out(args: argparse.Namespace, folder: Path, form: Form) -> Iterator[str]:
    yield from (text for name, (unset, text) in LEFT_OUT.items() if getattr(args, name) not in unset)
    if form.stops:
        yield f'texts that end an answer; clients send them: "stop": {json.dumps(form.stops, ensure_ascii=False)}'
    if args.distributed == "ray":
        yield f"the folder itself: every machine needs it at {folder.absolute()}"


# The prompt form as a template ------------------------------------------------------------------------------------------


def template_of(form: TurnForm) -> str:
    """A Jinja chat template that writes what the form writes, whatever a reader does with line breaks of templates."""
    newline = f" | replace({chr(10)!a}, {form.newline!a})" if form.newline != "\n" else ""
    content = f"message['content']{newline}"
    gap = f"{{{{ {form.gap!a} if message['content'] }}}}" if form.gap else ""
    no_system = "messages | selectattr('role', 'equalto', 'system') | list | length == 0"
    intro = f"{form.system.before!a} ~ {form.default_system!a}{newline} ~ {form.system.after!a}"
    parts = [f"{{% if {no_system} %}}{{{{ {intro} }}}}{{% endif %}}"] if form.default_system else []
    parts.append("{% for message in messages %}")
    for word, role, around in (
        ("if", "user", form.user),
        ("elif", "assistant", form.answer),
        ("elif", "system", form.system),
    ):
        parts.append(f"{{% {word} message['role'] == '{role}' %}}{{{{ {around.before!a} }}}}")
        parts.append(f"{gap if role == 'assistant' else ''}{{{{ {content} }}}}{{{{ {around.after!a} }}}}")
    parts.append("{% else %}{{ raise_exception('roles are user, assistant and system') }}{% endif %}{% endfor %}")
    parts.append(f"{{% if add_generation_prompt %}}{{{{ {form.answer.before!a} }}}}{{% endif %}}")
    return "".join(parts)


def _template_file(form: TurnForm) -> Path:
    """The template in a file that outlives this process, under a name that tells its content."""
    text = template_of(form)
    path = cache_root() / "vllm" / f"{form.name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.jinja"
    if not path.is_file():
        with disk_errors(path):
            write_atomically(path, text, durable=False)
    return path
