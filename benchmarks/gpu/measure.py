"""On a GPU: kernels against float64, whole models beside their peers, kernels one by one; a JSON and a plot. No network.

    python benchmarks/gpu.py [--out benchmarks/results] [--minutes 9] [--only int4,nf4] [--packages DIR] [--checks]
    python benchmarks/gpu.py --rehearse          without a GPU: every path once, interpreted, small; its times mean nothing
    python benchmarks/gpu.py --plot FILE.json    draw what was measured elsewhere

Runs from a checkout without installing. The most important sections come first, the file is written after each, and a fault or
a hang costs its own section (sections.py). --only runs some of them and adds what it finds to a file of the same device, so
that a long measurement may be several commands. --packages DIR: peers that are unpacked there and not installed. Where torch
sees no CUDA device it makes the checks that also run on the CPU and exits with 0 and `"device": null`.
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
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import ROOT
from benchmarks.gpu.sections import Section, Supervisor, Worker
from neox_lite_app.load_for_command import default_threads

SECTIONS = (
    Section("first checks", 100),  # of what a decode step of the 20B launches
    Section("copy", 10),
    Section("int4", 120),
    Section("transformers", 100),
    Section("int8", 60),
    Section("nf4", 90),
    Section("pairs", 90),
    Section("torch tinygemm", 60),
    Section("fp16", 60),
    Section("cap 12", 90),
    Section("cap 8", 90),
    Section("cap 16", 90),
    Section("cap 24", 90),
    Section("gemlite", 90),
    Section("attention", 60),
    Section("tuned", 120),
    Section("tokens", 90),
    Section("peers", 90),
    Section("slices", 60),
    Section("checks", 240),
)
CAPS = ("cap 12", "cap 8", "cap 16", "cap 24")
MODELS = ("int4", "int8", "nf4", "fp16", "transformers", "torch tinygemm", "gemlite", "tuned")
ALONE = ("first checks", "checks", *CAPS)  # in processes of their own: they start others, or limit the memory of theirs
TABLES = {**dict.fromkeys(MODELS, "models"), **dict.fromkeys(CAPS, "caps"), "first checks": "checks"}
PEER_SECTIONS = ("transformers", "torch tinygemm", "gemlite", "nf4", "peers")  # what they lack is no fault of ours


# In a worker ----------------------------------------------------------------------------------------------------------


def work(names: Sequence[str], seconds: float, rehearse: bool) -> None:
    """Measure these sections and tell of them on stdout."""
    torch.set_grad_enabled(False)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_num_threads(default_threads())
    deadline = time.monotonic() + seconds
    cuda = torch.cuda.is_available() and not rehearse
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    limits = {section.name: 1e4 if rehearse else section.limit_s for section in SECTIONS}

    def rows(name: str) -> Iterator[dict[str, Any]]:
        return measured(name, device, rehearse, min(deadline, time.monotonic() + limits[name]))

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
    from benchmarks.gpu import kernels, models
    from neox_lite.kernels import dispatch
    from neox_lite_app.models.random_model import config_of

    clock = kernels.Clock(device, deadline)
    config, lengths = config_of("20b"), models.Lengths()
    if rehearse:
        config, lengths = config_of("1x128x2").copy(vocab_size=72, intermediate_size=128), models.SHORT
    whole = models.Models(clock, config, lengths)
    sizes = kernels.REHEARSAL if rehearse else kernels.FULL
    if name in CAPS:
        yield from whole.capped(int(name.split()[1]))
    elif name in ("int4", "int8", "nf4", "fp16"):
        yield from whole.ours(name)
    elif name in ("transformers", "tuned"):
        yield from getattr(whole, name)()
    elif name in MODELS:
        yield from whole.peer(name)
    else:
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


def version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


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
            folder.mkdir(parents=True, exist_ok=True)
            name = "rehearsal" if found["rehearsal"] else (found["device"] or "no device").lower().replace(" ", "_")
            self.path = folder / f"gpu_{name}.json"
            if add and self.path.exists():
                self.found = {
                    **earlier(self.path),
                    **{key: found[key] for key in ("ok", "torch", "packages", "declined")},
                }

    def begin(self, names: Sequence[str]) -> None:
        """Forget what an earlier run found in these sections."""
        for name in names:
            self.found["left_out"].pop(name, None)
            self.found["section_s"].pop(name, None)
            if name == "copy":
                continue
            table = TABLES.get(name, name)
            self.found[table] = [row for row in self.found.get(table, []) if row.get("section") != name]
        self.found["choices"] = [row for row in self.found.get("choices", []) if "tuned" not in names]

    def tell(self, section: str, row: dict[str, Any]) -> None:
        print(f"{section}: {json.dumps(row)}", file=sys.stderr)
        if section == "copy":
            self.found["copy_gb_per_s"] = row
            return
        copy = self.found.get("copy_gb_per_s")
        if copy and "gb_per_s" in row:
            row["share_of_copy"] = row["gb_per_s"] / copy["median"]
        table = row.pop("table", TABLES.get(section, section))
        self.found.setdefault(table, []).append({**row, "section": section})
        self.keep()

    def fault(self, section: str, why: str) -> None:
        print(f"{section}: {why}", file=sys.stderr)
        self.found["left_out"][section] = why
        self.keep()

    def done(self, section: str, seconds: float) -> None:
        self.found["section_s"][section] = seconds
        self.keep()

    def judge(self) -> None:
        """Whether all checks passed and no section of ours failed, of those that were repeated the last time."""
        wrong = [check for check in self.found.get("checks", []) if not check["ok"]]
        for check in wrong:
            print(f"WRONG: {json.dumps(check)}", file=sys.stderr)
        left_out = self.found["left_out"].items()
        faults = [name for name, why in left_out if name not in PEER_SECTIONS and "no time was left" not in why]
        self.found["ok"] = not wrong and not faults

    def keep(self) -> None:
        if self.path:
            partial_file = self.path.with_suffix(".part")
            partial_file.write_text(self.text + "\n")
            partial_file.replace(self.path)

    @property
    def text(self) -> str:
        """The JSON."""
        return json.dumps(self.found, indent=1)


def wanted(args: argparse.Namespace, cuda: bool, triton: bool) -> list[Section]:
    """The sections to run, in their order."""
    if args.checks or not (args.rehearse or (cuda and triton)):
        return [section for section in SECTIONS if section.name == "checks"]
    names = args.only.split(",") if args.only else [section.name for section in SECTIONS]
    if args.rehearse and not args.only:
        names = [name for name in names if name not in ("checks", "int8", *CAPS[1:])]  # the same paths again
    chosen = [section for section in SECTIONS if section.name in names]
    return [replace(section, limit_s=1e4) for section in chosen] if args.rehearse else chosen  # interpreted is slow


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for the JSON and the plot")
    parser.add_argument("--minutes", type=float, help="what would begin later is left out (default 9; 60 to rehearse)")
    parser.add_argument("--only", metavar="NAME,NAME", help=f"of {', '.join(s.name for s in SECTIONS)}")
    parser.add_argument("--packages", metavar="DIR", help="peers that are unpacked there")
    parser.add_argument("--checks", action="store_true", help="correctness only, all of it")
    parser.add_argument("--rehearse", action="store_true", help="every path once, in Triton's interpreter")
    parser.add_argument("--plot", type=Path, metavar="JSON", help="only draw this file's plot")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(given)
    known = {section.name for section in SECTIONS}
    if args.only and (unknown := [name for name in args.only.split(",") if name not in known]):
        parser.error(f"--only names {', '.join(unknown)}; there are {', '.join(s.name for s in SECTIONS)}")
    if args.minutes is None:
        args.minutes = 60.0 if args.rehearse else 9.0
    return args


def command_of(args: argparse.Namespace) -> Callable[[Sequence[str], float], list[str]]:
    """Of a worker for sections; those that want a process of their own come alone."""

    def command(names: Sequence[str], seconds: float) -> list[str]:
        together = next((i for i, name in enumerate(names) if name in ALONE), len(names)) or 1
        flags = ["--rehearse"] if args.rehearse else []
        flags += ["--packages", args.packages] if args.packages else []
        program = [sys.executable, str(ROOT / "benchmarks" / "gpu.py")]
        return [*program, "--worker", ",".join(names[:together]), "--minutes", str(seconds / 60), *flags]

    return command


def plot(result: dict[str, Any], path: Path) -> None:
    """Share of copy bandwidth at one token, tokens against time beside peers, prefill against cuBLAS."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(16, 5))
    rows = [r for r in result.get("pairs", []) if "share_of_copy" in r]
    names = [f"{r['shape']} {r['format']}\n{r['launch']}" for r in rows]
    left.barh(names[::-1], [100 * r["share_of_copy"] for r in rows][::-1], color="tab:orange")
    left.axvline(100, color="black", linewidth=0.8)
    left.set_title("one token: weight bytes a second,\n% of a device copy", fontsize=10)
    left.tick_params(axis="y", labelsize=6)
    measured = [*result.get("tokens", []), *result.get("peers", [])]
    found = sorted((r for r in measured if r.get("format") == "int4"), key=lambda r: r["tokens"])
    for engine in dict.fromkeys(r["engine"] for r in found):
        points = [(r["tokens"], r["us"]) for r in found if r["engine"] == engine]
        color = "tab:orange" if engine == "neox-lite" else None
        middle.loglog(*zip(*points, strict=True), marker="o", markersize=3, label=engine, color=color)
    middle.set_title("int4 h to 4h: microseconds by tokens", fontsize=10)
    middle.legend(fontsize=8)
    slices = result.get("slices", [])
    for name in dict.fromkeys(key for row in slices for key in row if key != "tokens"):
        points = [(r["tokens"], r["cublas fp16"] / r[name]) for r in slices if name in r]
        right.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    right.set_title("prompts: speed relative to cuBLAS fp16", fontsize=10)
    right.legend(fontsize=8)
    middle.set_xlabel("tokens")
    right.set_xlabel("tokens")
    figure.suptitle(f"{result['device']}, torch {result['torch']}, triton {result['packages']['triton']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> int:
    begun, args = time.monotonic(), parse()
    if args.worker:
        work(args.worker.split(","), 60 * args.minutes, args.rehearse)
        return 0
    if args.plot:
        plot(json.loads(args.plot.read_text()), args.plot.with_suffix(".png"))
        return 0
    from neox_lite.kernels import dispatch

    cuda = torch.cuda.is_available() and not args.rehearse
    if not cuda and not args.rehearse:
        print("no CUDA device: only the checks that also run on the CPU are made", file=sys.stderr)
    declined = dispatch.reasons(torch.device("cuda", 0) if cuda else torch.device("cpu"))
    found = describe() | {"rehearsal": args.rehearse, "ok": True, "left_out": {}, "section_s": {}}
    found["declined"] = {name: reason for name, reason in declined.items() if reason is not None}
    report = Report(found, args.out, add=bool(args.only))
    sections = wanted(args, cuda, "triton" not in found["declined"])
    if cuda and "triton" in found["declined"]:
        print(f"only checks are made, and ours fail: {found['declined']['triton']}", file=sys.stderr)
    report.begin([section.name for section in sections])
    deadline = begun + 60 * args.minutes
    try:
        Supervisor(command_of(args), deadline, report.tell, report.fault, report.done).run(sections)
    except KeyboardInterrupt:
        print(f"stopped; what was found is in {report.path or 'the lines above'}", file=sys.stderr)
        return 130
    report.judge()
    print(report.text)
    report.keep()
    if report.path and report.found.get("pairs"):
        try:
            plot(report.found, report.path.with_suffix(".png"))
        except ImportError:
            print("no plot: matplotlib is not installed; --plot draws it elsewhere", file=sys.stderr)
    return 0 if report.found["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
