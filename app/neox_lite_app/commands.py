"""Every command: where its function is, what it takes, and what it says of itself. Runs nothing, and imports nothing heavy."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import NamedTuple

from neox_lite.generation.parameters import NUMBERS

QUANTIZED = ("int4", "int8", "nf4", "nf4-double")  # formats.FORMATS, which would import torch


class Command(NamedTuple):
    """When it is given, `module` is imported and its `function` called with the values of what `options` adds to a parser."""

    name: str
    module: str
    options: Callable[[argparse.ArgumentParser], None]
    help: str
    function: str | None = None  # None: called as the command is


def _demo(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--seed", type=_count, metavar="S", default=1, help="of the sampled passage (default 1)")
    _add_running(sub, head=False, adapter=False)


def _quantize(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("source", metavar="SRC", help="folder or hub id of the checkpoint")
    sub.add_argument(
        "destination", metavar="DST", nargs="?", help="folder to write (default: SRC's name plus the format)"
    )
    sub.add_argument(
        "--format", choices=QUANTIZED, help="default int4; nf4 and nf4-double, with scales in 8 bits, are bitsandbytes'"
    )
    sub.add_argument(
        "--group-size", type=int, choices=(32, 64, 128), help="weights per scale (default 128, of nf4 always 64)"
    )
    sub.add_argument(
        "--target-size",
        metavar="SIZE",
        help="most that the folder may take, as 12GB: each linear layer gets int4 or int8 so that the least is lost",
    )
    sub.add_argument(
        "--head",
        choices=("int8", "none"),
        default="int8",
        help="a small vocabulary head beside the 16-bit one, for machines short of memory (default int8)",
    )
    sub.add_argument(
        "--method",
        choices=("mse", "rtn", "balance", "gptq"),
        help="of int4 and int8: scale search (default), round to nearest, scale search on balanced columns, or calibrated",
    )
    sub.add_argument(
        "--calibration",
        metavar="FILE",
        help="of gptq: text, or .jsonl with a text a line (default: text that the model writes itself)",
    )
    sub.add_argument(
        "--calibration-windows",
        type=_positive,
        metavar="N",
        help="of gptq: windows of 512 tokens of FILE (default 128), or of 128 of its own text (default 512)",
    )
    sub.add_argument(
        "--dtype",
        choices=("float16", "bfloat16"),
        help="of all that is not quantized, and of the KV cache (default: the checkpoint's, float16 for float32)",
    )
    sub.add_argument("--revision", help="branch, tag or commit of a hub id")
    sub.add_argument(
        "--keep-source",
        action="store_true",
        help="fetch a hub id into the hub cache and keep it there (default: fetch, convert, delete file by file)",
    )
    sub.add_argument("--threads", type=_threads, metavar="N", help="CPU threads (default: one for each core)")
    sub.add_argument("--dry-run", action="store_true", help="print sizes and expected time, and write nothing")
    _add_json(sub)


def _export(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", metavar="MODEL")
    sub.add_argument("destination", metavar="OUT", help="file to write; one that exists is never replaced")
    sub.add_argument("--to", choices=("gguf",), default="gguf", help="the file's format (default gguf)")
    sub.add_argument(
        "--head", choices=("f16", "q8_0"), default="f16", help="vocabulary head: as it is, or the folder's int8 one"
    )
    sub.add_argument("--revision", help="branch, tag or commit of a hub id")
    _add_json(sub)


def _import(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("source", metavar="FILE.gguf")
    sub.add_argument("destination", metavar="DST", help="folder to write")
    sub.add_argument(
        "--dtype", choices=("float16", "bfloat16", "float32"), help="of all that is not quantized (default: the file's)"
    )
    sub.add_argument(
        "--hidden-act",
        choices=("gelu", "gelu_fast"),
        help="where the file does not say it: Pythia's, or GPT-NeoX-20B's",
    )
    _add_json(sub)


def _push(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("folder", metavar="DIR")
    sub.add_argument("hub_id", metavar="HUB_ID", help="OWNER/NAME; made if it does not exist")
    sub.add_argument("--compare", metavar="FILE", help="what `neox-lite compare --json` printed: the card's table")
    sub.add_argument("--base-model", metavar="HUB_ID", help="of the source (default: what the folder says)")
    sub.add_argument("--license", metavar="NAME", help="as apache-2.0 (default: that of the base model's card)")
    sub.add_argument("--private", action="store_true", help="make the repository private")
    sub.add_argument(
        "--revision", metavar="BRANCH", help="branch to upload to, made if it does not exist (default main)"
    )
    sub.add_argument("--dry-run", action="store_true", help="print the card and the sizes, and upload nothing")
    _add_json(sub)


def _verify(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("folder", metavar="DIR")
    _add_json(sub)


def _compare(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("source", metavar="SOURCE", help="the checkpoint they were made from")
    sub.add_argument("folders", metavar="DIR", nargs="+")
    sub.add_argument("--windows", type=_positive, metavar="N", help="use the first N windows only")
    sub.add_argument(
        "--layers", action="store_true", help="also the errors of weights and hidden states, layer by layer"
    )
    sub.add_argument("--plot", metavar="FILE.svg", help="draw KL against bits per weight, and the errors by layer")
    _add_text(sub)
    _add_running(sub)


def _generate(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", metavar="MODEL")
    sub.add_argument("--prompt", required=True, help="the text to continue; - reads it from stdin")
    sub.add_argument("--max-new-tokens", type=_count, metavar="N", help="default: to the end of the context")
    _add_sampling(sub, None, "default: generation_config.json's, else greedy")
    _add_context(sub)
    drafts = sub.add_mutually_exclusive_group()
    drafts.add_argument(
        "--draft", metavar="MODEL", help="a smaller model with the same tokenizer guesses ahead: the same text, sooner"
    )
    drafts.add_argument("--lookup", action="store_true", help="guess ahead from the prompt, for text that repeats it")
    _add_running(sub, revision=True)


def _chat(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", metavar="MODEL")
    sub.add_argument("--system", metavar="TEXT", help="system text before the conversation")
    sub.add_argument("--form", metavar="NAME", help="prompt form (default: the model's own; docs/chat.md lists them)")
    sub.add_argument("--resume", action="store_true", help="go on with the newest saved conversation")
    sub.add_argument(
        "--max-new-tokens", type=_positive, metavar="N", help="of an answer (default: what the context leaves)"
    )
    _add_sampling(sub, 0.8, "default 0.8")
    _add_context(sub)
    _add_running(sub, revision=True, json=False)


def _serve(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", metavar="MODEL", nargs="?", help="default: none; one is chosen on the page")
    sub.add_argument("--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1: this machine only)")
    sub.add_argument("--port", type=_integer(0, 65535), default=7860, help="0 for any that is free (default 7860)")
    sub.add_argument(
        "--api-key",
        metavar="KEY",
        help="who does not send it is refused; auto makes one up (default: NEOX_LITE_API_KEY's)",
    )
    sub.add_argument(
        "--allowed-host", action="append", default=[], metavar="NAME", help="a further name of this server"
    )
    sub.add_argument("--no-page", dest="page", action="store_false", help="the API alone, without gradio")
    sub.add_argument("--form", help="prompt form of chats, as dolly (default: the model's own)")
    sub.add_argument("--max-sequences", type=_positive, metavar="N", default=64, help="generated together (default 64)")
    sub.add_argument("--queue", type=_count, metavar="N", default=256, help="that wait at most (default 256)")
    sub.add_argument(
        "--idle-unload", type=_positive, metavar="SECONDS", help="return the memory after so long without use"
    )
    sub.add_argument("--context", type=_positive, metavar="N", help="tokens to provide for (default: the model's own)")
    _add_engine(sub)
    _add_running(sub, revision=True, json=False)


def _perplexity(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", metavar="MODEL")
    _add_text(sub)
    _add_running(sub, revision=True)


def _eval(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", metavar="MODEL", nargs="?", help="may be left out with --tasks list")
    sub.add_argument(
        "--tasks",
        type=lambda text: text.split(","),
        required=True,
        metavar="NAME,NAME",
        help="tasks, groups or patterns such as 'mmlu_*'; list shows what there is",
    )
    sub.add_argument(
        "--num-fewshot", type=_count, metavar="N", help="solved examples before each (default: the task's)"
    )
    sub.add_argument("--limit", type=_positive, metavar="N", help="use the first N documents of each task only")
    sub.add_argument(
        "--include-path",
        action="append",
        default=[],
        metavar="DIR",
        help="folder with task files of yours; may be given several times",
    )
    sub.add_argument(
        "--compare", metavar="SOURCE", help="ask this model the same, and print differences with their errors"
    )
    sub.add_argument(
        "--apply-chat-template", action="store_true", help="write prompts as chats, in the model's own form"
    )
    sub.add_argument("--output", metavar="FILE.json", help="write the results there, with every document and answer")
    sub.add_argument("--fresh", action="store_true", help="ask everything anew (default: go on where a run ended)")
    _add_running(sub, revision=True)


def _bench(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", metavar="MODEL", nargs="?")
    sub.add_argument("--shape", help="20b, a Pythia such as pythia-1.4b, or LxHxA: layers x hidden size x heads")
    sub.add_argument("--format", choices=("int4", "int8", "nf4", "fp16"), help="default: int4 for a shape, MODEL's own")
    sub.add_argument("--group-size", type=int, choices=(32, 64, 128), help="of a shape, default 128")
    sub.add_argument("--scratch", metavar="DIR", help="write the shape's random model there and run it mapped")
    sub.add_argument("--prefill", type=_counts, metavar="N,N", default=[128, 512], help="prompts (default 128,512)")
    sub.add_argument("--decode", type=_positive, metavar="N", default=32, help="tokens to time (default 32)")
    sub.add_argument("--batch", type=_counts, metavar="N,N", default=[1, 4, 8], help="sequences (default 1,4,8)")
    sub.add_argument(
        "--context",
        type=_counts_from_0,
        metavar="N,N",
        help="cached before decoding; batches after the first (default 128; on a GPU 0,1024,2048, as far as there is room)",
    )
    _add_running(sub, revision=True)


def _plan(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", metavar="MODEL", nargs="?")
    sub.epilog = "Exit code 0 says that there is an answer, not that MODEL fits: see fits and short_by in --json."
    sub.add_argument(
        "--format",
        choices=(*QUANTIZED, "fp16"),
        help="of a plain checkpoint: quantized, the default int4, or as it is",
    )
    sub.add_argument("--context", type=_positive, metavar="N", help="tokens to provide for (default: the model's own)")
    _add_memory(sub)
    _add_head(sub)
    sub.add_argument("--card", metavar="NAME", help="a GPU by its specifications, such as 'RTX 3060', not the one here")
    sub.add_argument("--revision", help="branch, tag or commit of a hub id")
    _add_json(sub)


def _list(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("folders", metavar="DIR", nargs="*", help="look there too: a model, or a folder of models")
    _add_json(sub)


def _info(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", metavar="MODEL")
    sub.add_argument("--revision", help="branch, tag or commit of a hub id")
    _add_json(sub)


def _doctor(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--measure", action="store_true", help="measure its speed anew, on which predictions rest")
    _add_json(sub)


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def _add_text(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text to score")
    parser.add_argument("--context", type=_positive, metavar="N", default=512, help="tokens a window (default 512)")


def _add_sampling(parser: argparse.ArgumentParser, temperature: float | None, default: str) -> None:
    """A flag for each number of sampling. default: of the temperature, in words."""
    for parameter in NUMBERS:
        flag, kind = f"--{parameter.name.replace('_', '-')}", _count if parameter.kind is int else float
        help = f"{parameter.help} ({default})" if parameter.name == "temperature" else parameter.help
        parser.add_argument(flag, type=kind, metavar=parameter.flag, help=help)
    parser.set_defaults(temperature=temperature)
    parser.add_argument(
        "--stop", action="append", metavar="TEXT", help="end before this text; may be given several times"
    )


def _add_context(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--context", type=_positive, metavar="N", help="prompt and new tokens together, at most the model's own"
    )


def _add_running(
    parser: argparse.ArgumentParser,
    revision: bool = False,
    head: bool = True,
    json: bool = True,
    adapter: bool = True,
) -> None:
    """What every command that runs a model takes."""
    if adapter:
        parser.add_argument(
            "--adapter", metavar="DIR", help="LoRA adapter to run beside the weights: a folder of peft's, or a hub id"
        )
    if revision:
        parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    _add_memory(parser)
    parser.add_argument("--threads", type=_threads, metavar="N", help="CPU threads (default: one for each core)")
    parser.add_argument(
        "--exact",
        action="store_true",
        help="float32 activations for quantized weights, not 8-bit ones: slower on a CPU",
    )
    parser.add_argument("--warm", action="store_true", help="read all weights from the disk before starting")
    if head:
        _add_head(parser)
    if json:
        _add_json(parser)


def _add_memory(parser: argparse.ArgumentParser) -> None:
    """What a plan takes."""
    parser.add_argument(
        "--gpu-memory", metavar="SIZE", help="most to take, as 8GiB (default: what is free, but a margin)"
    )
    parser.add_argument("--cpu-memory", metavar="SIZE", help="likewise, of the CPU's")
    parser.add_argument(
        "--kv",
        choices=("fp16", "int8"),
        help="KV cache in 16 bits or about half (default: fp16 where that fits as well)",
    )


def _add_head(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--head", choices=("fp16", "int8"), help="vocabulary head of a quantized folder (default: likewise)"
    )


def _add_engine(parser: argparse.ArgumentParser) -> None:
    """What serves: this package, or an installed vLLM, which runs on several GPUs and machines."""
    parser.add_argument(
        "--engine",
        choices=("neox-lite", "vllm"),
        default="neox-lite",
        help="vllm: hand the folder to an installed vLLM",
    )
    group = parser.add_argument_group("with --engine vllm")
    group.add_argument("--tensor-parallel", type=_positive, metavar="N", help="GPUs that share each layer")
    group.add_argument("--pipeline-parallel", type=_positive, metavar="N", help="groups of GPUs that share the layers")
    group.add_argument("--distributed", choices=("mp", "ray"), help="processes of this machine, or Ray across machines")


def _integer(low: int, high: int | None = None) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"{value} is below {low}")
        if high is not None and value > high:
            raise argparse.ArgumentTypeError(f"{value} is above {high}")
        return value

    parse.__name__ = "number"
    return parse


def _numbers(least: int) -> Callable[[str], list[int]]:
    """Numbers of at least `least` between commas, none so large that torch could not count it."""

    def parse(text: str) -> list[int]:
        return [_integer(least, 1 << 20)(word) for word in text.split(",")]

    parse.__name__ = "list of numbers"
    return parse


_counts, _counts_from_0 = _numbers(1), _numbers(0)
_count, _positive = _integer(0), _integer(1)
_threads = _integer(1, 8 * (os.cpu_count() or 1))  # a few too many are only slow, thousands never end


COMMANDS = (
    Command("demo", "demo", _demo, "the whole job on the bundled small model: quantize, compare, generate"),
    Command("quantize", "models.convert", _quantize, "turn a checkpoint into an int4, int8 or nf4 folder"),
    Command("export", "models.convert", _export, "write a model as a file for another program: GGUF, for llama.cpp"),
    Command(
        "import",
        "models.convert",
        _import,
        "turn a GGUF file into a model folder: Q4_0 and Q8_0 exactly",
        "import_file",
    ),
    Command("push", "models.push", _push, "upload a folder to the model hub, with a model card"),
    Command("verify", "models.inspect_model", _verify, "check a folder: hashes, shapes, finite values"),
    Command("compare", "evaluation.compare", _compare, "quality of quantized folders against their source on a text"),
    Command("generate", "generate", _generate, "continue a prompt"),
    Command("chat", "chat", _chat, "talk with a model in the terminal"),
    Command("serve", "server", _serve, "chat page in the browser, and an OpenAI-compatible API"),
    Command("perplexity", "evaluation.quality", _perplexity, "perplexity of a model on a text"),
    Command(
        "eval", "evaluation.tasks", _eval, "tasks of lm-evaluation-harness: few-shot accuracy and the like", "evaluate"
    ),
    Command(
        "bench", "bench", _bench, "speed of a model, or of random weights in a shape, beside what this memory gives"
    ),
    Command(
        "plan",
        "models.plan",
        _plan,
        "what goes where, bytes and predicted speed; without MODEL, of every known checkpoint",
    ),
    Command("list", "models.local_models", _list, "models on this machine", "show"),
    Command("info", "models.inspect_model", _info, "what a model or an adapter is: architecture, format, sizes"),
    Command("doctor", "doctor", _doctor, "what this machine has, what will be used, and why not more"),
)
