"""What measurements share: paths, the machine's description, JSON files, processes that work in turns. Knows no engine."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DEMO = ROOT / "app" / "neox_lite_app" / "demo_model"


def command_line(
    doc: str | None, *, rounds: int | None = None, threads: bool = False, scratch: str | None = None, out: Any = None
) -> argparse.ArgumentParser:
    """A parser whose help is the module's own text, with the options that many measurements have. out: its default."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if rounds:
        parser.add_argument(
            "--rounds", type=int, default=rounds, help=f"measurements of each figure (default {rounds})"
        )
    if threads:
        parser.add_argument(
            "--threads", type=int, default=os.cpu_count(), help="for all that is measured (default: all)"
        )
    if scratch:
        folder = Path(tempfile.gettempdir()) / f"neox-lite-{scratch}"
        parser.add_argument("--scratch", type=Path, default=folder, help=f"for models and logs (default {folder})")
    parser.add_argument("--out", type=Path, default=out, help="file, or folder, of the JSON")
    return parser


def quartiles(values: list[float]) -> dict[str, Any]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": middle, "quartiles": [low, high]}


def words(text: str) -> list[str]:
    """A list in an argument, comma between."""
    return text.split(",")


def some_of(known: Collection[str]) -> Callable[[str], list[str]]:
    """The type of an argument: known names, comma between."""

    def parse(text: str) -> list[str]:
        if unknown := [name for name in words(text) if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
        return words(text)

    return parse


def json_of(command: list[str], env: dict[str, str]) -> dict[str, Any]:
    """The JSON in the last line that a command prints. Raises RuntimeError with the last line of its errors where it fails."""
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(last_line(done.stderr))
    return json.loads(last_line(done.stdout))


def version(package: str) -> str | None:
    if package == "neox-lite":
        from neox_lite import __version__

        return __version__
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def module(name: str, *arguments: object) -> list[str]:
    """The command of a measurement by its module's name below benchmarks; it needs `environment()`."""
    return [sys.executable, "-m", f"benchmarks.{name}", *map(str, arguments)]


def environment(checkout: Path = ROOT, **changes: str) -> dict[str, str]:
    """This process's, where a checkout is importable without being installed."""
    rooms = os.pathsep.join(str(checkout / room) for room in (".", "quant", "app"))
    return {**os.environ, "PYTHONPATH": rooms, **changes}


def threads_of(count: int) -> dict[str, str]:
    """Environment in which every library takes so many threads."""
    return {f"{library}_NUM_THREADS": str(count) for library in ("OMP", "MKL", "NUMBA", "OPENBLAS")}


def write_json(path: Path, value: Any) -> None:
    """Replace the file as a whole: a reader never sees a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.replace(path)


def model_folder(shape: str, format: str, scratch: Path, **changes: int) -> Path:
    """The folder of a shape's random model, written if it is not there: int4, int8 (both with an int8 head) or fp16.

    changes: of the config, as vocab_size. The tokenizer is the bundled model's.
    """
    from neox_lite.formats import DENSE, GroupInt
    from neox_lite_app.models.random_model import RandomModel, config_of

    folder = scratch / "-".join([shape, *([] if format == "int4" else [format]), *map(str, changes.values())])
    if not (folder / "config.json").is_file():
        packing = DENSE if format == "fp16" else GroupInt({"int4": 4, "int8": 8}[format], 128)
        model = RandomModel(config_of(shape).copy(**changes), packing, small_head=format != "fp16")
        model.write(folder, lambda done, total: None)
        for path in DEMO.glob("*token*.json"):
            shutil.copy(path, folder)
    return folder


def machine() -> dict[str, Any]:
    info = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    info = {key.strip(): value.strip() for key, value in info.items()}
    flags = set(info.get("flags", "").split())
    known = ("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")
    return {
        "cpu": info.get("model name", platform.machine()),
        "cores": os.cpu_count(),
        "features": [flag for flag in known if flag in flags],
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
    }


class Worker:
    """A process that answers questions, a JSON line each; it is stopped except while it is asked, so no two work at once."""

    def __init__(
        self, name: str, command: list[str], env: dict[str, str], log: Path, folder: Path | None = None
    ) -> None:
        """folder: to run in."""
        self.name, self.command, self.env, self.log, self.folder = name, command, env, log, folder
        log.parent.mkdir(parents=True, exist_ok=True)
        self.start()

    def start(self) -> None:
        with self.log.open("w") as log:
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
            self.process = subprocess.Popen(self.command, env=self.env, cwd=self.folder, text=True, **pipes)
        self.greeting = self.read()
        self.process.send_signal(signal.SIGSTOP)

    def ask(self, question: str) -> dict[str, Any]:
        """One measurement; `others_cpu` is the share of the machine that other processes took meanwhile."""
        if self.process.poll() is not None:
            self.start()
        assert self.process.stdin
        began, busy, own = time.perf_counter(), busy_seconds(), own_seconds(self.process.pid)
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write(question + "\n")
        self.process.stdin.flush()
        found = self.read()
        self.process.send_signal(signal.SIGSTOP)
        others = (busy_seconds() - busy) - (own_seconds(self.process.pid) - own)
        available = (time.perf_counter() - began) * (os.cpu_count() or 1)
        return {**found, "others_cpu": max(0.0, others / available)}

    def read(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(last_line(self.log.read_text(errors="replace")))  # it died; its log says why
        return json.loads(line)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def busy_seconds() -> float:
    """CPU seconds that all processes, and the hypervisor, have taken so far."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def own_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "ended without a word")


def answer_questions(greeting: dict[str, Any], answer: Callable[[str], dict[str, Any]]) -> None:
    """The side of the process itself: a JSON line first, and one for each line of stdin. What libraries print is none."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps(greeting), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(line.rstrip("\n"))), file=answers, flush=True)


def status_bytes(process: int | str = "self", **fields: str) -> dict[str, int]:
    """Counters of a process in /proc, by the kernel's names, as bytes."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return {name: int(status[field].split()[0]) << 10 for name, field in fields.items()}
