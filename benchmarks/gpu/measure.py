"""On a GPU: kernels against float64, whole models beside their peers, kernels one by one; a JSON. No network.

    python benchmarks/gpu.py [--out benchmarks/results] [--minutes 9] [--only int4,nf4] [--packages DIR] [--checks]
    python benchmarks/gpu.py --rehearse          without a GPU: every path once, interpreted, small; its times mean nothing

The most important sections come first, the file is written after each row, and a fault or a hang costs its own section
(sections.py). --only runs some of them and adds what it finds to a file of the same device, so that a long measurement may be
several commands. Where torch sees no CUDA device, the checks that also run on the CPU are made, and the exit code is 0.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import ROOT, command_line, some_of, version, words, write_json
from benchmarks.gpu.sections import Section, Supervisor, Worker
from neox_lite_app.load_for_command import default_threads

LIMITS_S = {  # of each section, in their order; the first checks are of what a decode step of the 20B launches
    "first checks": 100, "copy": 10, "int4": 120, "transformers": 100, "int8": 60, "nf4": 90, "pairs": 90,
    "torch tinygemm": 60, "fp16": 60, "cap 12": 90, "cap 8": 90, "cap 16": 90, "cap 24": 90, "gemlite": 90, "attention": 60,
    "tuned": 120, "tokens": 90, "peers": 90, "slices": 60, "checks": 240,
}  # fmt: skip
SECTIONS = tuple(Section(name, limit_s) for name, limit_s in LIMITS_S.items())
CAPS = ("cap 12", "cap 8", "cap 16", "cap 24")
MODELS = ("int4", "int8", "nf4", "fp16", "transformers", "torch tinygemm", "gemlite", "tuned")
# In processes of their own: they start others, or limit the memory of theirs.
ALONE = ("first checks", "checks", *CAPS)
TABLES = {**dict.fromkeys(MODELS, "models"), **dict.fromkeys(CAPS, "caps"), "first checks": "checks"}
# What these lack is no fault of ours.
PEER_SECTIONS = ("transformers", "torch tinygemm", "gemlite", "nf4", "peers")
UNLIMITED_S = 1e4  # interpreted kernels are slow


# In a worker ----------------------------------------------------------------------------------------------------------


def work(names: Sequence[str], seconds: float, rehearse: bool) -> None:
    """Measure these sections and report them on stdout."""
    torch.set_grad_enabled(False)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_num_threads(default_threads())
    deadline = time.monotonic() + seconds
    cuda = torch.cuda.is_available() and not rehearse
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")

    def rows(name: str) -> Iterator[dict[str, Any]]:
        limit_s = UNLIMITED_S if rehearse else LIMITS_S[name]
        return measured(name, device, rehearse, min(deadline, time.monotonic() + limit_s))

    usable = torch.cuda.synchronize if cuda else lambda: None
    Worker(usable).run((name, partial(rows, name)) for name in names)


def measured(name: str, device: torch.device, rehearse: bool, deadline: float) -> Iterator[dict[str, Any]]:
    """The rows of a section."""
    from benchmarks.gpu import checks

    if name in ("first checks", "checks"):
        cases = checks.cases_on_cpu
        if rehearse or device.type == "cuda":
            first, every = checks.cases_first, checks.cases_on_gpu
            cases = checks.cases_interpreted if rehearse else first if name == "first checks" else every
        yield from checks.check_all(list(cases()), device, deadline - time.monotonic())
        return
    # They import Triton, which a machine that only makes checks may lack.
    from benchmarks.gpu import kernels, models
    from neox_lite.kernels import dispatch
    from neox_lite_app.models.random_model import config_of

    clock = kernels.Clock(device, deadline)
    config, lengths = config_of("20b"), models.Lengths()
    if rehearse:
        config, lengths = config_of("1x128x2").copy(vocab_size=72, intermediate_size=128), models.SHORT
    whole = models.Models(clock, config, lengths)
    if name in CAPS:
        yield from whole.capped(int(name.split()[1]))
    elif name in ("int4", "int8", "nf4", "fp16"):
        yield from whole.ours(name)
    elif name in ("transformers", "tuned"):
        yield from getattr(whole, name)()
    elif name in MODELS:
        yield from whole.peer(name)
    else:
        sizes = kernels.REHEARSAL if rehearse else kernels.FULL
        bench = kernels.Bench(clock, sizes, dispatch.load("triton").bind(False))
        for row in getattr(bench, name)():
            yield row
            if clock.late():
                raise TimeoutError("no time was left for what may be left")


# The report -----------------------------------------------------------------------------------------------------------


def describe() -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__, "device": None}
    found["packages"] = {name: version(name) for name in ("triton", "gemlite", "bitsandbytes", "transformers")}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        driver = Path("/proc/driver/nvidia/version")
        found |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda,
            "driver": driver.read_text().splitlines()[0] if driver.exists() else None,
        }
    return found


def earlier(path: Path) -> dict[str, Any]:
    """What an earlier run has written."""
    with suppress(ValueError, KeyError, TypeError):
        found = json.loads(path.read_text())
        if isinstance(found["left_out"], dict) and isinstance(found["section_s"], dict):
            return found
    raise SystemExit(f"{path}: is no file of this program, so nothing can be added to it; move it away")


class Report:
    """What was found, in a file that is written again whenever more is."""

    def __init__(self, found: dict[str, Any], folder: Path | None, add: bool) -> None:
        """add: to what the file holds, if that is of the same device."""
        self.found, self.path = found, None
        if folder is not None:
            name = "rehearsal" if found["rehearsal"] else (found["device"] or "no device").lower().replace(" ", "_")
            self.path = folder / f"gpu_{name}.json"
            if add and self.path.exists():
                newer = {key: found[key] for key in ("ok", "torch", "packages", "declined")}
                self.found = {**earlier(self.path), **newer}

    def begin(self, names: Sequence[str]) -> None:
        """Drop what an earlier run found in these sections."""
        for name in names:
            self.found["left_out"].pop(name, None)
            self.found["section_s"].pop(name, None)
            if name != "copy":
                table = TABLES.get(name, name)
                self.found[table] = [row for row in self.found.get(table, []) if row.get("section") != name]
        if "tuned" in names:
            self.found["choices"] = []

    def row(self, section: str, row: dict[str, Any]) -> None:
        print(f"{section}: {json.dumps(row)}", file=sys.stderr)
        if section == "copy":
            self.found["copy_gb_per_s"] = row
            return
        copy = self.found.get("copy_gb_per_s")
        if copy and "gb_per_s" in row:
            row["share_of_copy"] = row["gb_per_s"] / copy["median"]
        table = row.pop("table", TABLES.get(section, section))
        self.found.setdefault(table, []).append({**row, "section": section})
        self.save()

    def fault(self, section: str, why: str) -> None:
        print(f"{section}: {why}", file=sys.stderr)
        self.found["left_out"][section] = why
        self.save()

    def done(self, section: str, seconds: float) -> None:
        self.found["section_s"][section] = seconds
        self.save()

    def judge(self) -> None:
        """ok: all checks passed and no section of ours failed, of those that were repeated the last time."""
        wrong = [check for check in self.found.get("checks", []) if not check["ok"]]
        for check in wrong:
            print(f"WRONG: {json.dumps(check)}", file=sys.stderr)
        left_out = self.found["left_out"].items()
        faults = [name for name, why in left_out if name not in PEER_SECTIONS and "no time was left" not in why]
        self.found["ok"] = not wrong and not faults

    def save(self) -> None:
        if self.path:
            write_json(self.path, self.found)


def chosen(args: argparse.Namespace, all_of_them: bool) -> list[Section]:
    """The sections to run, in their order; all_of_them: not the checks alone."""
    names = args.only or [name for name in LIMITS_S if not args.rehearse or name not in ("checks", "int8", *CAPS[1:])]
    if args.checks or not all_of_them:
        names = ["checks"]
    found = [section for section in SECTIONS if section.name in names]
    return [replace(section, limit_s=UNLIMITED_S) for section in found] if args.rehearse else found


def command_of(args: argparse.Namespace) -> Callable[[Sequence[str], float], list[str]]:
    """The command of a worker for sections; those that want a process of their own come alone."""

    def command(names: Sequence[str], seconds: float) -> list[str]:
        together = next((i for i, name in enumerate(names) if name in ALONE), len(names)) or 1
        flags = ["--rehearse"] if args.rehearse else []
        flags += ["--packages", args.packages] if args.packages else []
        program = [sys.executable, str(ROOT / "benchmarks" / "gpu.py")]
        return [*program, "--worker", ",".join(names[:together]), "--minutes", str(seconds / 60), *flags]

    return command


def main() -> int:
    begun, parser = time.monotonic(), command_line(__doc__)
    parser.add_argument("--minutes", type=float, help="what would begin later is left out (default 9; 60 to rehearse)")
    parser.add_argument("--only", type=some_of(LIMITS_S), metavar="NAME,NAME", help=f"of {', '.join(LIMITS_S)}")
    parser.add_argument("--packages", metavar="DIR", help="peers that are unpacked there and not installed")
    parser.add_argument("--checks", action="store_true", help="correctness only, all of it")
    parser.add_argument("--rehearse", action="store_true", help="every path once, in Triton's interpreter")
    parser.add_argument("--worker", type=words, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.minutes = args.minutes or (60.0 if args.rehearse else 9.0)
    if args.worker:
        work(args.worker, 60 * args.minutes, args.rehearse)
        return 0
    from neox_lite.kernels import dispatch

    cuda = torch.cuda.is_available() and not args.rehearse
    if not cuda and not args.rehearse:
        print("no CUDA device: only the checks that also run on the CPU are made", file=sys.stderr)
    declined = dispatch.reasons(torch.device("cuda", 0) if cuda else torch.device("cpu"))
    found = describe() | {"rehearsal": args.rehearse, "ok": True, "left_out": {}, "section_s": {}}
    found["declined"] = {name: reason for name, reason in declined.items() if reason is not None}
    report = Report(found, args.out, add=bool(args.only))
    if cuda and "triton" in found["declined"]:
        print(f"only checks are made, and ours fail: {found['declined']['triton']}", file=sys.stderr)
    sections = chosen(args, args.rehearse or (cuda and "triton" not in found["declined"]))
    report.begin([section.name for section in sections])
    try:
        deadline = begun + 60 * args.minutes
        Supervisor(command_of(args), deadline, report.row, report.fault, report.done).run(sections)
    except KeyboardInterrupt:
        print(f"stopped; what was found is in {report.path or 'the lines above'}", file=sys.stderr)
        return 130
    report.judge()
    print(json.dumps(report.found, indent=1))
    report.save()
    return 0 if report.found["ok"] else 1
