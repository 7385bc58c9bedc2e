"""Mutation check: product files with one seeded change each, run against the tests that reach it; knows nothing of the product.

    python tests/support/mutants.py --results mutants.jsonl [--tree .] [--count 200] [--areas cache,loader]
    python tests/support/mutants.py --results mutants.jsonl --report

1. The tests of each area run once and record which product functions each test enters, and its processor time.
2. Each mutant changes one place in a copy of the tree and runs the tests that enter the changed function, short ones first, up
   to --seconds of recorded time. It is killed when a test fails or the run ends by a limit, and survives otherwise.
3. Every result is a line of --results; a run that was stopped goes on where it ended. Recorded tests are in RESULTS.tests.json.

The number of mutants of each area is fixed, and names of functions and the seed choose them, so two versions compare by area.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import itertools
import json
import os
import resource
import shutil
import signal
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

AREAS: dict[str, tuple[float, tuple[str, ...], tuple[str, ...]]] = {
    # share of the mutants, product files, test files; a pattern that matches nothing names a file of another version
    "kernels": (
        0.25,
        ("neox_lite/kernels/reference.py", "neox_lite/kernels/cpu/*.py", "neox_lite/kernels/dispatch.py"),
        ("test_cpu_*.py", "test_encode.py", "test_contracts.py", "test_kernel*.py", "test_backend*.py"),
    ),
    "scheduler": (
        0.15,
        ("neox_lite/scheduler.py", "neox_lite/generation/scheduler.py"),
        ("test_schedule*.py", "test_cache.py"),
    ),
    "cache": (0.125, ("neox_lite/cache.py",), ("test_cache.py", "test_schedule*.py")),
    "loader": (
        0.2,
        (
            *(f"neox_lite/{name}.py" for name in ("loading", "checkpoint", "safetensors_file", "blueprint")),
            *(f"neox_lite/{name}.py" for name in ("load_options", "encoding")),
            *(f"neox_lite/loading/{name}.py" for name in ("load", "apply", "options", "quantize", "skeleton")),
            *(f"neox_lite/checkpoint/{name}.py" for name in ("reader", "safetensors_file")),
            "neox_lite/core/source.py",
        ),
        (
            "test_loading.py",
            "test_checkpoint*.py",
            "test_foreign_folders.py",
            "test_quantize.py",
            "test_safetensors*.py",
        ),
    ),
    "writer": (
        0.15,
        (
            *(f"neox_lite/{name}.py" for name in ("folder_writer", "saving")),
            *(f"neox_lite/checkpoint/{name}.py" for name in ("folder_writer", "manifest")),
            *("neox_lite/files.py", "neox_lite/loading/save.py"),
        ),
        ("test_checkpoint*.py", "test_interrupted.py", "test_loading.py", "test_quantize.py", "test_files.py"),
    ),
    "security": (
        0.125,
        ("app/neox_lite_app/serving/guard.py", "app/neox_lite_app/serving/security.py"),
        ("test_guard.py", "test_security.py"),
    ),
}
# Triton's kernels are in no area, and its interpreter takes minutes.
NOT_RECORDED = ["-k", "not triton"]
ADDRESS_SPACE_BYTES = 12 << 30
IDLE_S = 40  # no process of a run works for so long: it waits for something that never comes

# Changes --------------------------------------------------------------------------------------------------------------

COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitAnd,
}
# What no test should look at: types, texts of errors and warnings, how an object prints itself, sizes of caches of results, and
# checks that a zip is of equal lengths.
SKIPPED_FIELDS = {"annotation", "returns", "decorator_list", "bases"}
SKIPPED_KEYWORDS = {"maxsize", "stacklevel", "help", "strict"}
SKIPPED_FUNCTIONS = {"__repr__", "__str__"}
SKIPPED_CALLS = {"warn", "warning", "info", "debug", "print"}


@dataclass(frozen=True)
class Site:
    """A place and a change, under names that do not depend on line numbers; `line` is for people, `entry` finds the tests."""

    path: str
    function: str
    operator: str
    ordinal: int
    line: int
    entry: int  # first line of the function around it, 0 outside of functions

    @property
    def key(self) -> tuple[str, str, str, int]:
        return self.path, self.function, self.operator, self.ordinal


class Changes:
    """All changes of a parsed file, in the order of its text."""

    def __init__(self, path: str, tree: ast.Module) -> None:
        self.path, self.found = path, list[tuple[Site, Callable[[], object]]]()
        self.names: list[str] = []
        self.entries = [0]
        self.ordinals: Counter[tuple[str, str]] = Counter()
        self.fields(tree)

    def add(self, operator: str, node: Any, apply: Callable[[], object]) -> None:
        function = ".".join(self.names)
        ordinal = self.ordinals[function, operator]
        self.ordinals[function, operator] += 1
        self.found.append((Site(self.path, function, operator, ordinal, node.lineno, self.entries[-1]), apply))

    def fields(self, node: ast.AST) -> None:
        for name, value in ast.iter_fields(node):
            if name in SKIPPED_FIELDS:
                continue
            if isinstance(value, ast.AST):
                self.visit(value, partial(setattr, node, name))
            elif isinstance(value, list):
                if name in ("body", "orelse", "finalbody"):
                    self.statements(node, value)
                for i, item in enumerate(value):
                    if isinstance(item, ast.AST):
                        self.visit(item, partial(value.__setitem__, i))

    def statements(self, node: ast.AST, block: list[Any]) -> None:
        """Statements removed, and functions that return before one of their statements."""
        if self.entries[-1] == 0:
            return
        for i, statement in enumerate(block):
            is_call = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)
            if (is_call and not skipped_call(statement.value)) or isinstance(statement, (ast.Assign, ast.AugAssign)):
                self.add("remove", statement, partial(block.__setitem__, i, ast.Pass()))
            plain = not isinstance(statement, (ast.Return, ast.Raise, ast.FunctionDef, ast.Import, ast.ImportFrom))
            if i and plain and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                self.add("return", statement, partial(block.insert, i, ast.Return(None)))

    def visit(self, node: Any, put: Callable[[Any], object]) -> None:
        if isinstance(node, (ast.Raise, ast.Assert, ast.JoinedStr)) or (
            isinstance(node, ast.Call) and skipped_call(node)
        ):
            return
        if isinstance(node, ast.keyword) and node.arg in SKIPPED_KEYWORDS:
            return
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            if node.name not in SKIPPED_FUNCTIONS:
                self.named(node)
            return
        self.change(node, put)
        self.fields(node)

    def named(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> None:
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
        self.names.append(node.name)
        self.entries.append(0 if isinstance(node, ast.ClassDef) else first)
        self.fields(node)
        self.entries.pop()
        self.names.pop()

    def change(self, node: Any, put: Callable[[Any], object]) -> None:
        """The changes of one expression or statement, without those of what is inside it."""
        if isinstance(node, ast.Compare):
            for i, op in enumerate(node.ops):
                for other in COMPARISONS[type(op)]:
                    self.add("compare", node, partial(node.ops.__setitem__, i, other()))
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
            self.add("bool", node, partial(put, ast.Constant(not node.value)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, int):
            for value in (node.value + 1, node.value - 1):
                self.add("integer", node, partial(put, ast.Constant(value)))
        elif isinstance(node, ast.BoolOp):
            self.add(
                "and/or", node, partial(setattr, node, "op", ast.Or() if isinstance(node.op, ast.And) else ast.And())
            )
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            self.add("not", node, partial(put, node.operand))
        elif isinstance(node, (ast.BinOp, ast.AugAssign)) and type(node.op) in ARITHMETIC:
            self.add("arithmetic", node, partial(setattr, node, "op", ARITHMETIC[type(node.op)]()))
        elif isinstance(node, ast.Slice):
            for end in ("lower", "upper"):
                if (bound := getattr(node, end)) is not None:
                    self.add("slice", node, partial(setattr, node, end, None))
                    moved = ast.BinOp(bound, ast.Add(), ast.Constant(1))
                    self.add("slice", node, partial(setattr, node, end, moved))


def skipped_call(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    return name in SKIPPED_CALLS


def sites(tree: Path, patterns: tuple[str, ...]) -> list[Site]:
    files = sorted({path for pattern in patterns for path in tree.glob(pattern)})
    return [
        site
        for f in files
        for site, _ in Changes(str(f.relative_to(tree)), ast.parse(f.read_text(encoding="utf-8"))).found
    ]


def mutated(text: str, site: Site) -> tuple[str, str, str]:
    """The file's text with the change, and the changed lines before and after."""
    tree = ast.parse(text)
    before = ast.unparse(tree)
    apply = next(apply for found, apply in Changes(site.path, tree).found if found.key == site.key)
    apply()
    after = ast.unparse(ast.fix_missing_locations(tree))
    old, new = before.splitlines(), after.splitlines()
    at = next((i for i, pair in enumerate(zip(old, new, strict=False)) if pair[0] != pair[1]), 0)
    return after, old[at].strip(), new[at].strip()


def sample(tree: Path, area: str, count: int, seed: int) -> list[Site]:
    """So many changes of an area, the operators in turn; a function has the same ones in whichever file it stands."""

    def rank(site: Site) -> bytes:
        return hashlib.sha256(f"{seed} {site.function} {site.operator} {site.ordinal}".encode()).digest()

    groups: dict[str, list[Site]] = defaultdict(list)
    for site in sites(tree, AREAS[area][1]):
        groups[site.operator].append(site)
    turns = itertools.zip_longest(*(sorted(groups[operator], key=rank) for operator in sorted(groups)))
    return [site for turn in turns for site in turn if site is not None][:count]


# Runs of pytest in processes of their own ------------------------------------------------------------------------------


class Recorder:
    """A pytest plugin: processor seconds of each test that passes, and the product functions that it enters."""

    def __init__(self, tree: Path, files: set[str]) -> None:
        self.keys = {str(tree / name): name for name in files}
        self.known: dict[int, tuple[Any, str | None]] = {}  # the code is held, so its id stays its own
        self.entered: set[str] = set()
        self.failed: set[str] = set()
        self.tests: dict[str, tuple[float, list[str]]] = {}

    def note(self, frame: Any, event: str, argument: Any) -> None:
        if event != "call":
            return
        code = frame.f_code
        if id(code) not in self.known:
            name = self.keys.get(code.co_filename)
            self.known[id(code)] = code, name and f"{name}:{code.co_firstlineno}"
        if (key := self.known[id(code)][1]) is not None:
            self.entered.add(key)

    def pytest_runtest_protocol(self, item: Any) -> None:
        self.entered, self.began = set(), sum(os.times()[:4])
        threading.setprofile(self.note)
        sys.setprofile(self.note)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if not report.passed:
            self.failed.add(report.nodeid)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        sys.setprofile(None)
        threading.setprofile(None)
        if nodeid not in self.failed:
            self.tests[nodeid] = round(sum(os.times()[:4]) - self.began, 3), sorted(self.entered)


class Chosen:
    """A pytest plugin: runs these tests only, in this order within a file, and remembers the one that failed."""

    def __init__(self, tests: list[str]) -> None:
        self.rank = {test: i for i, test in enumerate(tests)}
        self.failed = ""

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        chosen = [item for item in items if item.nodeid in self.rank]
        first: dict[str, int] = {}
        for item in sorted(chosen, key=lambda item: self.rank[item.nodeid]):
            first.setdefault(item.nodeid.partition("::")[0], len(first))
        items[:] = sorted(chosen, key=lambda i: (first[i.nodeid.partition("::")[0]], self.rank[i.nodeid]))

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.failed:
            self.failed = report.nodeid


def in_child(
    work: Path, files: list[str], options: list[str], plugin: Any, answer: Callable[[], Any], cpu_s: int
) -> Any:
    """pytest over these files in a forked process: its exit code and the plugin's answer, or the limit that ended it."""
    ours, theirs = os.pipe()
    scratch = work.with_name(f"{work.name}.tmp")
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.chdir(work)
        os.close(ours)
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 5))
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        import pytest

        common = ["-q", "-p", "no:cacheprovider", f"--basetemp={scratch}", "--rootdir=."]
        code = int(pytest.main([*common, *options, *files], plugins=[plugin]))
        with os.fdopen(theirs, "w") as out:
            json.dump([code, answer()], out)
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as pipe:
        ended = watched(pid, pipe)
    shutil.rmtree(scratch, ignore_errors=True)
    return ended


def watched(pid: int, pipe: Any) -> Any:
    """Wait for a child: what it answers, or a word for how it ended. Processes that it leaves behind are ended."""
    text: list[str] = []
    reader = threading.Thread(target=lambda: text.append(pipe.read()), daemon=True)
    reader.start()
    work, since = -1.0, time.monotonic()
    ended, status = 0, 0
    while not ended:
        time.sleep(0.2)
        ended, status = os.waitpid(pid, os.WNOHANG)
        members = list(session(pid))
        now = sum(ticks for _, _, ticks in members)
        if now != work or any(state in "RD" for _, state, _ in members):
            work, since = now, time.monotonic()
        if not ended and time.monotonic() - since > IDLE_S:
            os.kill(pid, signal.SIGKILL)
            since = time.monotonic()
            status = -1
            os.waitpid(pid, 0)
            break
    for member, _, _ in session(pid):
        os.kill(member, signal.SIGKILL)
    reader.join()
    if text[0]:
        return json.loads(text[0])
    if status == -1:
        return ["idle", None]
    by_cpu = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)
    return ["processor time" if by_cpu else "crash", None]


def session(leader: int) -> Iterator[tuple[int, str, int]]:
    """(process, state, clock ticks used) of each process of a session."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == leader and fields[0] != "Z":
            yield int(path.parent.name), fields[0], int(fields[11]) + int(fields[12])


# The tests of a change -------------------------------------------------------------------------------------------------


def record(tree: Path, work: Path, areas: list[str], store: Path) -> dict[str, tuple[float, list[str]]]:
    """Run every test file of the areas once, unless `store` has it, and return its tests."""
    held: dict[str, dict[str, Any]] = json.loads(store.read_text()) if store.exists() else {}
    sources = {s for area in AREAS for p in AREAS[area][1] for s in (str(f.relative_to(tree)) for f in tree.glob(p))}
    files = dict.fromkeys(f for area in areas for p in AREAS[area][2] for f in sorted((tree / "tests").glob(p)))
    for file in files:
        if file.name in held:
            continue
        began, recorder = time.monotonic(), Recorder(work, sources)
        code, tests = in_child(work, [f"tests/{file.name}"], NOT_RECORDED, recorder, lambda r=recorder: r.tests, 3600)
        if tests is None:
            raise SystemExit(f"{file.name}: the tests end by {code} on the unchanged tree")
        held[file.name] = tests
        store.write_text(json.dumps(held))
        print(f"{file.name}: {len(tests)} tests recorded in {time.monotonic() - began:.0f} s", flush=True)
    return {test: found for file in files for test, found in held[file.name].items()}


def tests_of(site: Site, area: str, recorded: dict[str, tuple[float, list[str]]], budget_s: float) -> list[str]:
    """Tests that enter the changed function, then those that enter its file, a case of each in turn, within the budget."""
    entry = f"{site.path}:{site.entry}"
    chosen: list[str] = []
    spent = 0.0
    mine = {t: v for t, v in recorded.items() if any(Path(t.partition("::")[0]).match(name) for name in AREAS[area][2])}
    direct = {t for t, (_, entered) in mine.items() if entry in entered}
    near = {t for t, (_, entered) in mine.items() if any(e.startswith(site.path + ":") for e in entered)} - direct
    for group in (direct, near):
        cases: dict[str, list[str]] = defaultdict(list)
        for test in sorted(group, key=lambda t: (mine[t][0], t)):
            cases[test.partition("[")[0]].append(test)
        turns = sorted(cases.values(), key=lambda tests: mine[tests[0]][0])
        for test in (t for turn in itertools.zip_longest(*turns) for t in turn if t is not None):
            if spent + mine[test][0] <= budget_s or not chosen:
                chosen.append(test)
                spent += mine[test][0]
    return chosen


# Command ---------------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> None:
    tree, results = args.tree.resolve(), args.results.resolve()
    work = results.with_name(f"{results.name}.tree")
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(tree, work, ignore=shutil.ignore_patterns(".git", ".*_cache", "__pycache__", "results"))
    import_heavy_modules()
    recorded = record(tree, work, args.areas, results.with_name(f"{results.name}.tests.json"))
    done = {(r["path"], r["function"], r["operator"], r["ordinal"]) for r in read(results)}
    for area in args.areas:
        for site in sample(tree, area, round(args.count * AREAS[area][0]), args.seed):
            if site.key not in done:
                row = judged(site, area, work, tests_of(site, area, recorded, args.seconds), recorded)
                with results.open("a") as out:
                    out.write(json.dumps(row) + "\n")
                print(
                    f"{area} {site.path}:{site.line} {site.operator}: {row['result']} in {row['seconds']} s", flush=True
                )
    report(results)


def judged(site: Site, area: str, work: Path, tests: list[str], recorded: dict[str, Any]) -> dict[str, Any]:
    path = work / site.path
    text = path.read_text(encoding="utf-8")
    after, old, new = mutated(text, site)
    began, cpu = time.monotonic(), sum(os.times()[2:4])
    chosen = Chosen(tests)
    limit_s = round(60 + 3 * sum(recorded[test][0] for test in tests))
    files = list(dict.fromkeys(test.partition("::")[0] for test in tests))
    code: int | str = 0
    path.write_text(after, encoding="utf-8")
    try:
        if tests:
            code, _ = ended = in_child(work, files, ["-x"], chosen, lambda: chosen.failed, limit_s)
            chosen.failed = ended[1] or ""
    finally:
        path.write_text(text, encoding="utf-8")
    result = (
        {0: "survived", 5: "survived"}.get(code, "killed") if isinstance(code, int) else "timeout"
    )  # 5: none was left
    result = "killed" if code == "crash" else result
    figures = {"seconds": round(time.monotonic() - began, 1), "cpu_s": round(sum(os.times()[2:4]) - cpu, 1)}
    row = {"area": area, **asdict(site), "before": old, "after": new, "result": result, "by": chosen.failed or code}
    return {**row, "tests": len(tests), **figures}


def import_heavy_modules() -> None:
    """What every run imports anyway is imported once, before processes are forked; nothing of the product."""
    limits = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")}
    os.environ.update({**limits, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1", "TRITON_INTERPRET": "1"})
    sys.dont_write_bytecode = True
    import pytest
    import torch
    import transformers

    assert pytest and torch and transformers


def read(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def report(results: Path) -> None:
    rows = read(results)
    for title, key in (("area", "area"), ("operator", "operator")):
        print(f"{title:12}{'killed':>8}{'of':>6}{'share':>8}{'timeouts':>10}{'no test':>9}{'CPU s each':>12}")
        for name in [*dict.fromkeys(row[key] for row in rows), "all"]:
            mine = [row for row in rows if name in (row[key], "all")]
            killed = sum(row["result"] != "survived" for row in mine)
            late, untested = (sum(row["result"] == "timeout" for row in mine), sum(not row["tests"] for row in mine))
            each = sum(row["cpu_s"] for row in mine) / max(1, len(mine))
            print(
                f"{name:12}{killed:>8}{len(mine):>6}{killed / max(1, len(mine)):>8.1%}{late:>10}{untested:>9}{each:>12.1f}"
            )
    for row in rows:
        if row["result"] == "survived":
            print(f"survived: {row['path']}:{row['line']} {row['function']}: {row['before']}  ->  {row['after']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="JSON lines, one a mutant; added to")
    parser.add_argument("--tree", type=Path, default=Path.cwd(), help="checkout to test; it is copied, never changed")
    parser.add_argument("--count", type=int, default=200, help="mutants in all, shared among the areas (default 200)")
    parser.add_argument("--areas", type=lambda text: text.split(","), default=list(AREAS), help=",".join(AREAS))
    parser.add_argument("--seconds", type=float, default=20.0, help="of tests for a mutant, as recorded (default 20)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--list", action="store_true", help="print the mutants and end")
    parser.add_argument("--report", action="store_true", help="print what --results holds and end")
    args = parser.parse_args()
    if args.report:
        report(args.results)
    elif args.list:
        for area in args.areas:
            for site in sample(args.tree, area, round(args.count * AREAS[area][0]), args.seed):
                _, old, new = mutated((args.tree / site.path).read_text(encoding="utf-8"), site)
                print(
                    f"{area} {site.path}:{site.line} {site.function} {site.operator} {site.ordinal}: {old}  ->  {new}"
                )
    else:
        run(args)


if __name__ == "__main__":
    main()
