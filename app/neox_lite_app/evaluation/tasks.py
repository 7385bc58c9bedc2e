"""neox-lite eval: a model, or two, on tasks of lm-evaluation-harness. Knows the harness's tasks and results, no scoring."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import gc
import io
import json
import logging
import math
import os
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import neox_lite
from neox_lite import GPTNeoXForCausalLM
from neox_lite.errors import ArgumentError
from neox_lite.files import disk_errors
from neox_lite.formats import label
from neox_lite.units import dtype_name

from ..conversations.prompt_forms import form_of
from ..load_for_command import format_name, load
from ..terminal import bar, note, print_json
from .answer_cache import AnswerCache, stamps

SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}  # the harness's own
DRAWS = 1000  # of a bootstrap
SLOW_DRAWS = 100  # where a metric reads all texts each time; the harness's own number
SLOW = ("bleu", "chrf", "chrfpp", "ter")


def evaluate(args: argparse.Namespace) -> None:
    with _silence():
        _require_harness()
        manager = _manager(args)
    if args.tasks == ["list"]:
        print_json({"tasks": manager.all_tasks}) if args.json else print("\n".join(manager.all_tasks))
        return
    if args.output is not None:
        _check_output(Path(args.output))
    began = time.perf_counter()
    suite = Suite.load(manager, args)
    runs = [] if args.compare is None else [suite.run(args.compare, args, is_source=True)]
    gc.collect()  # the source's memory
    runs.append(suite.run(args.model, args))
    rows = suite.rows(runs[-1]) if args.compare is None else suite.compared(*runs)
    result = {**runs[-1].facts, "results": rows, "task_hashes": suite.hashes(runs[-1])}
    if args.compare is not None:
        result["source"] = runs[0].facts
    result |= {"versions": suite.versions, "settings": suite.settings, "seconds": time.perf_counter() - began}
    if args.output is not None:
        _write(Path(args.output), {**result, "samples": runs[-1].samples})
    if args.json:
        print_json(result)
    else:
        print(table(rows))


def _require_harness() -> None:
    try:
        import lm_eval.evaluator  # noqa: F401
    except ImportError as error:
        raise ArgumentError(f"eval needs lm-evaluation-harness ({error}): pip install 'neox-lite[eval]'") from error


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep the harness and its libraries from writing: bars, log lines, and prints among our results."""
    before = logging.root.manager.disable
    jobs = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"  # its bootstrap would fork a process that holds a model, for each core
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)
        if jobs is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = jobs


def _manager(args: argparse.Namespace) -> Any:
    """Who finds tasks: among those in --include-path, and where these are not all, among the harness's own."""
    from lm_eval.tasks import TaskManager

    for folder in args.include_path:
        if not Path(folder).is_dir():
            raise ArgumentError(f"--include-path: {folder}: no such folder")
    if args.include_path and args.tasks != ["list"]:
        own = TaskManager(include_path=args.include_path, include_defaults=False)
        if all(own.match_tasks([name]) for name in args.tasks):
            return own  # at once, where its own 14,000 take seconds
    return TaskManager(include_path=args.include_path or None)


def _check_output(path: Path) -> None:
    if not path.absolute().parent.is_dir():
        raise ArgumentError(f"--output: {path.absolute().parent}: no such folder")
    if path.is_dir():
        raise ArgumentError(f"--output: {path}: is a folder; give the name of a file")


def _write(path: Path, result: dict[str, Any]) -> None:
    from lm_eval.utils import handle_non_serializable

    text = json.dumps(result, indent=1, default=handle_non_serializable)
    with disk_errors(path):
        path.write_text(text + "\n", encoding="utf-8")
    note(f"{path} holds the results, and every document with its answers")


@dataclass
class Run:
    """One model's results. samples: of each task, what was asked, answered and scored, document by document."""

    facts: dict[str, Any]
    results: dict[str, Any]
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


@dataclass
class Suite:
    """Tasks with their documents, the same for every model."""

    loaded: dict[str, Any]
    settings: dict[str, Any]

    @classmethod
    def load(cls, manager: Any, args: argparse.Namespace) -> Suite:
        """Find the tasks and fetch their documents. Raises ArgumentError, in one line, for the first that cannot be had."""
        import numpy

        random.seed(SEEDS["random"])
        numpy.random.seed(SEEDS["numpy"])
        torch.manual_seed(SEEDS["torch"])
        loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
        names = _names(manager, args.tasks)
        with bar("read the tasks", "task") as progress:
            for i, name in enumerate(names):
                found = _load(manager, name)
                for kind, into in loaded.items():
                    into |= found.get(kind) or {}
                progress(i + 1, len(names))
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                raise ArgumentError(
                    f"task {name}: runs programs that the model writes, which eval never does; leave it out"
                )
            if getattr(task, "MULTIMODAL", False):
                raise ArgumentError(f"task {name}: asks about pictures, which these models do not see; leave it out")
            own = task.get_config("num_fewshot")
            if own == 0 and args.num_fewshot:
                note(f"{name}: is asked without examples, as its file says; --num-fewshot does not change that")
            elif args.num_fewshot is not None or own is None:
                task.set_config(key="num_fewshot", value=args.num_fewshot or 0)
            if (shots := task.get_config("num_fewshot") or 0) > (available := _examples(task) if shots else 0):
                raise ArgumentError(
                    f"task {name}: has {available} examples beside each document, not {shots}: --num-fewshot {available}"
                )
        settings = {
            "num_fewshot": args.num_fewshot,
            "limit": args.limit,
            "apply_chat_template": args.apply_chat_template,
            "exact": args.exact,
            "seeds": SEEDS,
        }
        return cls(loaded, settings)

    @property
    def versions(self) -> dict[str, Any]:
        own = {name: task.VERSION for name, task in self.loaded["tasks"].items()}
        packages = {"neox_lite": neox_lite.__version__, "torch": torch.__version__}
        return {**packages, "lm_eval": metadata.version("lm-eval"), "tasks": own}

    def run(self, path: str, args: argparse.Namespace, is_source: bool = False) -> Run:
        """Ask a model; it is let go at the end. is_source: an adapter, a smaller head or cache are part of the difference."""
        from lm_eval import evaluator

        from .harness import NeoxLiteLM

        began = time.perf_counter()
        state = _random_state()
        if is_source:
            model = load(path, args, revision=None, adapter=None, kv="fp16")
        else:
            model = load(path, args, args.head)
        form = form_of(path, model.tokenizer) if args.apply_chat_template else None
        if form is not None:
            note(f"{path}: chats are written in the form {form.name!r}")
        answers = AnswerCache(_identity(model, args), args.fresh)
        try:
            lm = NeoxLiteLM(model, form, answers, path if args.compare is not None else "")
            _set_random_state(state)
            for task in self.loaded["tasks"].values():
                task.set_fewshot_seed(seed=SEEDS["fewshot"])
            with _silence():
                results = evaluator.evaluate(
                    lm,
                    self.loaded,
                    limit=args.limit,
                    bootstrap_iters=DRAWS,
                    apply_chat_template=args.apply_chat_template,
                    fewshot_as_multiturn=args.apply_chat_template,
                )
        finally:
            answers.close()
            _set_random_state(state)
        if lm.cut:
            note(f"{path}: {lm.cut} requests were longer than {lm.max_length} tokens and lost their beginning")
        facts = {
            "model": path,
            "format": format_name(model),
            "head": label(model.embed_out.format, dtype_name(model.dtype)),
            "kv": model.kv,
            "requests": lm.requests,
            "known_before": lm.found,
            "computed_tokens": lm.computed,
            "seconds": time.perf_counter() - began,
        }
        return Run(facts, results, results.pop("samples"))

    def rows(self, run: Run) -> list[dict[str, Any]]:
        """A row for each metric of each task and group."""
        return [row for name, found in run.results["results"].items() for row in self._rows(name, found, run)]

    def _rows(self, name: str, found: dict[str, Any], run: Run) -> Iterator[dict[str, Any]]:
        for key, value in found.items():
            metric, _, filter = key.partition(",")
            if not filter or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = found.get(f"{metric}_stderr,{filter}")
            yield {
                "task": name,
                "n_shot": run.results["n-shot"].get(name),
                "metric": metric,
                "filter": filter,
                "value": value,
                "stderr": error if isinstance(error, float) and math.isfinite(error) else None,
                "documents": len(documents(run.samples.get(name, ()), filter)) or None,
            }

    def compared(self, source: Run, run: Run) -> list[dict[str, Any]]:
        """Rows with the source's value, the difference from it, the standard error of that, and the share of equal answers."""
        rows = []
        for before, row in zip(self.rows(source), self.rows(run), strict=True):
            task, filter = self.loaded["tasks"].get(row["task"]), row["filter"]
            pairs = [documents(one.samples.get(row["task"], ()), filter) for one in (source, run)]
            known = task is not None and len(pairs[0]) > 1
            row |= {
                "source": before["value"],
                "difference": row["value"] - before["value"],
                "difference_stderr": difference_error(task, row["metric"], *pairs) if known else None,
                "equal_answers": equal_answers(task, *pairs) if known else None,
            }
            rows.append(row)
        return rows

    def hashes(self, run: Run) -> dict[str, str]:
        """Of all documents, prompts and targets of a task, as the harness itself writes them down."""
        from lm_eval.utils import hash_string

        keys = ("doc_hash", "prompt_hash", "target_hash")
        return {
            name: hash_string("".join(s[k] for s in samples for k in keys)) for name, samples in run.samples.items()
        }


def documents(samples: Sequence[dict[str, Any]], filter: str) -> list[dict[str, Any]]:
    """One filter's samples in the order of the documents."""
    return sorted((one for one in samples if one["filter"] == filter), key=lambda one: one["doc_id"])


def difference_error(task: Any, metric: str, before: list[dict[str, Any]], after: list[dict[str, Any]]) -> float | None:
    """The standard error of a metric's difference between two models on the same documents.

    Of a mean, from the documents' differences; of another metric, from draws of documents for both models at once. None where
    such a draw has no value.
    """
    from lm_eval.api.metrics import mean

    a, b = ([one[metric] for one in samples] for samples in (before, after))
    metric_of = task.aggregation().get(metric, mean)
    if metric_of is mean:
        differences = [float(y) - float(x) for x, y in zip(a, b, strict=True)]
        return statistics.stdev(differences) / math.sqrt(len(differences))
    draw, found = random.Random(SEEDS["random"]), []
    with _silence():
        for _ in range(SLOW_DRAWS if metric in SLOW else DRAWS):
            chosen = draw.choices(range(len(a)), k=len(a))
            try:
                found.append(float(metric_of([b[i] for i in chosen])) - float(metric_of([a[i] for i in chosen])))
            except (ArithmeticError, ValueError):  # as where one kind of answer is missing
                return None
    return statistics.stdev(found)


def equal_answers(task: Any, before: list[dict[str, Any]], after: list[dict[str, Any]]) -> float | None:
    """The share of documents on which two models choose, say, or would say the same; None where they only give a number."""
    kind = task.OUTPUT_TYPE
    if kind == "loglikelihood_rolling":
        return None

    def answer(sample: dict[str, Any]) -> Any:
        answers = sample["filtered_resps"]
        if kind == "multiple_choice":
            values = [value for value, _ in answers]
            return values.index(max(values))
        return [greedy for _, greedy in answers] if kind == "loglikelihood" else answers

    return sum(answer(a) == answer(b) for a, b in zip(before, after, strict=True)) / len(before)


def _examples(task: Any) -> int:
    """How many solved examples a document can be given: it is none for itself."""
    with _silence():
        examples = list(task.fewshot_docs())
    return len(examples) - (next(iter(task.eval_docs)) in examples)


def _names(manager: Any, patterns: list[str]) -> list[str]:
    """The tasks, groups and tags that are meant, patterns such as mmlu_* among them."""
    found: list[str] = []
    for pattern in patterns:
        names = manager.match_tasks([pattern])
        if not names:
            near = difflib.get_close_matches(pattern, manager.all_tasks, 1)
            raise ArgumentError(
                f"--tasks: no task is called {pattern!r}"
                + (f"; nearest is {near[0]!r}" if near else "")
                + "; see --tasks list"
            )
        found += [name for name in names if name not in found]
    return found


def _load(manager: Any, name: str) -> dict[str, Any]:
    try:
        with _silence():
            found: dict[str, Any] = manager.load([name])
    except Exception as error:  # whatever tasks and data sets raise: they are other people's files
        reason = " ".join(str(error).split()) or "no reason given"
        if _is_network(error):
            raise ArgumentError(
                f"task {name}: its documents cannot be fetched, because the hub cannot be reached ({reason[:120]}); "
                "tasks with files of yours: --include-path, docs/evaluation.md"
            ) from error
        raise ArgumentError(f"task {name}: cannot be loaded: {type(error).__name__}: {reason[:300]}") from error
    return found


def _is_network(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ConnectionError | TimeoutError):
            return True
        if type(error).__module__.partition(".")[0] in ("httpx", "httpcore", "requests", "urllib3", "huggingface_hub"):
            return True
        if "offline" in type(error).__name__.lower():
            return True
        error = error.__cause__ or error.__context__
    return False


def _identity(model: GPTNeoXForCausalLM, args: argparse.Namespace) -> dict[str, Any]:
    """All that an answer depends on, beside what is asked: the model's files, how it runs, and what computes."""
    folder = model.source.folder
    assert folder is not None  # it was loaded from one
    own = Path(__file__).parent
    adapter = model.adapter.settings.path.parent if model.adapter is not None else None
    return {
        "files": [str(folder.resolve()), stamps(folder)],
        "code": [stamps(Path(neox_lite.__file__).parent), stamps(own)],
        "torch": torch.__version__,
        "dtypes": [str(model.dtype), str(model.compute_dtype)],
        "head": label(model.embed_out.format, ""),
        "kv": model.kv,
        "exact": model.exact,
        "layers": None if model.placement is None else list(model.placement.layers),
        "backends": sorted((side, ops.name) for side, ops in model.runner.layers.ops.items()),
        "adapter": None if adapter is None else [str(adapter.resolve()), stamps(adapter)],
    }


def _random_state() -> Any:
    import numpy

    return random.getstate(), numpy.random.get_state(), torch.get_rng_state()


def _set_random_state(state: Any) -> None:
    import numpy

    random.setstate(state[0])
    numpy.random.set_state(state[1])
    torch.set_rng_state(state[2])


# Output ---------------------------------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as aligned text; with a source, its value, the difference and the share of equal answers too."""
    compared = any("source" in row for row in rows)
    titles = ["task", "n-shot", "metric"]
    titles += ["source", "model", "difference", "± error", "equal"] if compared else ["value", "± error"]
    cells = [titles, *(_cells(row, compared) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    left = {0, 2}
    lines = [
        "  ".join(
            cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]
    return "\n".join(line.rstrip() for line in lines)


def _cells(row: dict[str, Any], compared: bool) -> list[str]:
    def number(value: float | None, sign: str = "") -> str:
        return "" if value is None else format(value, f"{sign}.4f")

    metric = row["metric"] if row["filter"] == "none" else f"{row['metric']} ({row['filter']})"
    shots = "" if row["n_shot"] is None else str(row["n_shot"])
    found = [row["task"], shots, metric]
    if not compared:
        return [*found, number(row["value"]), number(row["stderr"])]
    equal = "" if row["equal_answers"] is None else format(row["equal_answers"], ".2%")
    differences = [number(row["difference"], "+"), number(row["difference_stderr"])]
    return [*found, number(row["source"]), number(row["value"]), *differences, equal]
