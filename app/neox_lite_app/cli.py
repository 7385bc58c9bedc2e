"""The `neox-lite` command: arguments in, one call, results on stdout, everything else on stderr.

Exit codes: 0 done, 1 failed with one line saying why, 2 wrong usage, 130 interrupted. Heavy imports happen inside commands,
so that help and usage errors are immediate.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib import import_module, metadata
from typing import Any, NoReturn

from .commands import COMMANDS

EPILOG = """\
MODEL is a folder or a hub id such as EleutherAI/pythia-1.4b. First time here: neox-lite demo
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    _prepare_streams()
    try:
        args = _parse(argv)
        warnings.showwarning = _one_line_warning
        with _plain_interrupt():
            module = import_module(f".{args.module}", __package__)
        code = module.__dict__[args.function](args)
        sys.stdout.flush()
        return code or 0
    except KeyboardInterrupt:
        print("\nneox-lite: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get("NEOX_LITE_DEBUG"):
            raise
        print(f"neox-lite: error: {_one_line(error)}", file=sys.stderr)
        return 1


@contextlib.contextmanager
def _plain_interrupt() -> Iterator[None]:
    """Let Ctrl-C end the process at once: while torch is imported, Python's own handling of it can be swallowed."""
    try:
        previous = signal.signal(signal.SIGINT, signal.SIG_DFL)
    except ValueError:  # not the main thread, where signals are not ours
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _prepare_streams() -> None:
    """Let every text pass: into nothing where a stream is closed, escaped where stdout's encoding lacks a character."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, PTH123
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    for name in ("destination", "model"):  # before 3.12.7, argparse gives up on optional ones that stand after options
        if len(rest) == 1 and not rest[0].startswith("-") and vars(args).get(name, "") is None:
            setattr(args, name, rest.pop())
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if args.command == "bench" and (args.model is None) == (args.shape is None):
        parser.error("bench takes either MODEL or --shape")
    if args.command == "eval" and args.model is None and args.tasks != ["list"]:
        parser.error("eval takes MODEL, except with --tasks list")
    if args.command == "serve" and args.engine != "vllm":
        given = [flag for flag in ("tensor_parallel", "pipeline_parallel", "distributed") if vars(args)[flag]]
        if given:
            parser.error(f"--{given[0].replace('_', '-')} is for --engine vllm; the engine here runs on one GPU")
    return args


def _one_line(error: Exception) -> str:
    """The message of an error; for one we did not foresee, its kind and how to see where it came from."""
    from neox_lite.errors import NeoxLiteError

    text = " ".join(str(error).split())
    if isinstance(error, NeoxLiteError):
        return text
    if isinstance(error, MemoryError) or "out of memory" in text.lower() or ("alloc" in text and "memory" in text):
        return f"out of memory ({text or 'no detail'}); try a smaller model, or neox-lite quantize --format int4"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'output'}: {error.strerror}"
    return f"{type(error).__name__}: {text} (unexpected; NEOX_LITE_DEBUG=1 shows where)"


def _one_line_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"neox-lite: warning: {' '.join(str(message).split())}", file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line that names the mistake and the way to the help."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="neox-lite",
        description="Run GPT-NeoX-20B and every checkpoint of its architecture on hardware people own.",
        epilog=EPILOG,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"neox-lite {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    for command in COMMANDS:
        sub = commands.add_parser(
            command.name,
            help=command.help,
            description=command.help[0].upper() + command.help[1:] + ".",
            allow_abbrev=False,
        )
        sub.set_defaults(module=command.module, function=command.function or command.name)
        command.options(sub)
    return parser


def _version() -> str:
    """Read from the installed metadata, so that --version needs no torch."""
    try:
        return metadata.version("neox-lite")
    except metadata.PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
