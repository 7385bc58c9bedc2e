"""neox-lite compare: any number of folders beside their source on a text, one model in memory at a time.

What later models are compared with lies in scratch files: the source's last states, which its head turns into log-probabilities
anew for each of them (a vocabulary of 50,000 log-probabilities would take ten times the room), and its states after each layer.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neox_lite import GPTNeoXConfig, GPTNeoXForCausalLM
from neox_lite.checkpoint.reader import Checkpoint
from neox_lite.errors import ArgumentError, NeoxLiteError
from neox_lite.files import disk_errors, free_bytes
from neox_lite.formats import Weight, label
from neox_lite.hub import resolve
from neox_lite.layers import Linear
from neox_lite.loading.quantize import SLICE_ELEMENTS
from neox_lite.loading.skeleton import Skeleton
from neox_lite.units import dtype_name

from ..load_for_command import load
from ..terminal import bar, fold, note, print_json, read_text, terminal_width
from .quality import Head, Quality, cut, last_states, measure, table
from .quality_plot import draw

LAYER_BYTES = 1 << 30  # scratch for states after each layer; it decides how many windows they are compared on


def compare(args: argparse.Namespace) -> None:
    text = read_text(args.text)
    if args.plot is not None:
        _check_plot(Path(args.plot))
    paths = [args.source, *args.folders]
    _check_configs(paths, args.context, layers := args.layers or args.plot is not None)
    source = load(args.source, args, kv="fp16")  # what a smaller cache costs is then part of the distance
    windows = cut(source, text, args.context)[: args.windows]
    with Reference(source, windows, layers) as reference:
        with _bar(paths, 0) as progress:
            rows = [measure(source, windows, reference.fill(source, progress), None, args.source)]
        del source
        tables: list[list[LayerErrors]] = []
        for i, path in enumerate(args.folders, 1):
            gc.collect()
            row, errors = _score(reference, windows, args, paths, i)
            rows.append(row)
            if layers:
                with bar(f"[{i + 1}/{len(paths)}] weights of {path}", "layer") as progress:
                    weights = list(weight_errors(args.source, path, progress))
                tables.append([LayerErrors(n, e, w) for n, (e, w) in enumerate(zip(errors, weights, strict=True))])
    _report(args, rows, tables, windows, reference.layer_windows)
    if args.plot is not None:
        with disk_errors(Path(args.plot)):
            Path(args.plot).write_text(
                draw([asdict(r) for r in rows], [_by_layer(t) for t in tables]), encoding="utf-8"
            )
        note(f"{args.plot} is drawn; a browser shows it")
    if broken := [row.path for row in rows if not math.isfinite(row.perplexity)]:
        raise NeoxLiteError(
            f"{', '.join(broken)}: outputs are not finite: see neox-lite verify, which names the reason"
        )


def _check_plot(path: Path) -> None:
    if path.suffix.lower() != ".svg":
        raise ArgumentError(f"--plot is {str(path)!r}, expected a name that ends in .svg, which every browser opens")
    if not path.absolute().parent.is_dir():
        raise ArgumentError(f"--plot: {path.absolute().parent}: no such folder")
    is_new = not os.path.lexists(path)
    with disk_errors(path):
        path.open("a").close()
        if is_new:
            path.unlink()


def _check_configs(paths: list[str], context: int, layers: bool) -> None:
    """Say at once, not after an hour's scoring of the source, what cannot be compared."""
    keys = ["vocab_size", *(("num_hidden_layers", "hidden_size", "intermediate_size") if layers else ())]
    resolved = [resolve(path) for path in paths]
    configs = [GPTNeoXConfig.from_pretrained(folder) for folder in resolved]
    for folder in resolved:
        Checkpoint.open(folder).close()  # its headers are whole
    for path, config in zip(paths, configs, strict=True):
        for key in keys:
            expected, found = getattr(configs[0], key), getattr(config, key)
            if found != expected:
                raise ArgumentError(f"{path}: {key} is {found}, but {paths[0]} has {expected}")
        if context > config.max_position_embeddings:
            raise ArgumentError(f"--context is {context}, but {path} has {config.max_position_embeddings} positions")


def _bar(paths: list[str], i: int) -> Any:
    return bar(f"[{i + 1}/{len(paths)}] {paths[i]}", "window")


def _score(
    reference: Reference, windows: Tensor, args: argparse.Namespace, paths: list[str], i: int
) -> tuple[Quality, list[float]]:
    """Load the i-th model and compare it: its row, and the error of its states after each layer."""
    model = load(paths[i], args, args.head)
    head, errors = Head.of(model), LayerMeter(reference)
    each = errors if reference.layer_windows else None
    with _bar(paths, i) as progress:
        states = last_states(model, windows, progress, each)
        found = map(head.log_probabilities, states)
        return measure(model, windows, found, reference.log_probabilities(), paths[i]), errors.means()


# The source's outputs -------------------------------------------------------------------------------------------------


class Scratch:
    """Tensors of one kind by number, in a file without a name, which the system removes however this process ends."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape, self.dtype, self.nbytes = shape, dtype, math.prod(shape) * dtype.itemsize
        self._file = tempfile.TemporaryFile()  # noqa: SIM115

    def write(self, i: int, x: Tensor) -> None:
        with disk_errors(Path(tempfile.gettempdir())):
            self._file.seek(i * self.nbytes)
            self._file.write(x.to("cpu", self.dtype).contiguous().view(torch.uint8).numpy().data)

    def read(self, i: int) -> Tensor:
        self._file.seek(i * self.nbytes)
        return torch.frombuffer(bytearray(self._file.read(self.nbytes)), dtype=self.dtype).view(self.shape)

    def close(self) -> None:
        self._file.close()


class Reference:
    """What models are compared with, of a source that need not stay: its states in scratch files, and its head.

    layer_windows: the first so many windows are measured layer by layer too.
    """

    def __init__(self, source: GPTNeoXForCausalLM, windows: Tensor, layers: bool) -> None:
        self.windows, self.head = windows, Head.of(source)
        self.count, self.layers = len(windows), len(source.gpt_neox.blocks)
        shape, dtype = (windows.shape[1], source.config.hidden_size), source.compute_dtype
        self.device = self.head.weight.device
        self._last, self._after = Scratch(shape, dtype), Scratch(shape, dtype)
        room = LAYER_BYTES // (self.layers * self._after.nbytes)
        self.layer_windows = min(max(1, room), self.count) if layers else 0
        needed = (self.count + self.layers * self.layer_windows) * self._last.nbytes
        where = Path(tempfile.gettempdir())
        if needed > (free := free_bytes(where)):
            raise ArgumentError(
                f"{where}: needs {needed} bytes for the source's states, {free} are free; use fewer --windows, or set "
                "TMPDIR to another folder"
            )

    def fill(self, source: GPTNeoXForCausalLM, progress: Any) -> Iterator[Tensor]:
        """Run the source, keep its states, and give its log-probabilities, window after window."""
        each = self._keep if self.layer_windows else None
        for i, x in enumerate(last_states(source, self.windows, progress, each)):
            self._last.write(i, x)
            yield self.head.log_probabilities(x)

    def log_probabilities(self) -> Iterator[Tensor]:
        return (self.head.log_probabilities(self._last.read(i).to(self.device)) for i in range(self.count))

    def after(self, window: int, layer: int) -> Tensor:
        """x (context, hidden) of a window after a layer, on the CPU."""
        return self._after.read(window * self.layers + layer)

    def _keep(self, window: int, layer: int, x: Tensor) -> None:
        if window < self.layer_windows:
            self._after.write(window * self.layers + layer, x)

    def __enter__(self) -> Reference:
        return self

    def __exit__(self, *_: object) -> None:
        self._last.close()
        self._after.close()


# Errors by layer ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinearError:
    """||W - W'|| / ||W|| of one linear layer, and how it is stored."""

    error: float
    format: str


@dataclass(frozen=True)
class LayerErrors:
    """One layer beside the source's. hidden: mean over tokens of ||x - x'|| / ||x|| after it, all layers before included."""

    layer: int
    hidden: float
    weights: dict[str, LinearError]


class LayerMeter:
    """Collects how far a model's states are from the source's: to be called as last_states' `each`."""

    def __init__(self, reference: Reference) -> None:
        self.reference, self.errors = reference, torch.zeros(reference.layers, dtype=torch.double)

    def __call__(self, window: int, layer: int, x: Tensor) -> None:
        if window < self.reference.layer_windows:
            truth = self.reference.after(window, layer).float()
            distance = (x.cpu().float() - truth).norm(dim=-1) / truth.norm(dim=-1)
            self.errors[layer] += distance.double().mean()

    def means(self) -> list[float]:
        return (self.errors / max(1, self.reference.layer_windows)).tolist()


class Linears:
    """A folder's linear weights by name, a few rows at a time, whatever their format."""

    def __init__(self, path: str) -> None:
        folder = resolve(path)
        self.config = GPTNeoXConfig.from_pretrained(folder)
        self._checkpoint = Checkpoint.open(folder)
        self._skeleton = Skeleton(GPTNeoXForCausalLM, self.config, self._checkpoint)

    def module(self, name: str) -> Linear:
        return self._skeleton.model.get_submodule(name)  # type: ignore[return-value]

    def weight(self, name: str) -> Weight:
        module = self.module(name)
        shapes = module.format.specs(module.shape, torch.float16)
        stored = {key: self._checkpoint.tensor(self._skeleton.stored(f"{name}.{key}")) for key in shapes}
        laid = {key: module.format.laid(key, stored[key], shape) for key, (_, shape) in shapes.items()}
        return Weight(module.format.opened(laid, module.shape), module.shape, laid)


def weight_errors(source: str, path: str, progress: Any) -> Iterator[dict[str, LinearError]]:
    """For each layer, the errors of its linear weights under their names in it."""
    ours, theirs = Linears(path), Linears(source)
    names, count = list(ours.config.linear_shapes), ours.config.num_hidden_layers
    for layer in range(count):
        yield {name: _weight_error(f"gpt_neox.layers.{layer}.{name}", ours, theirs) for name in names}
        progress(layer + 1, count)


def _weight_error(name: str, ours: Linears, theirs: Linears) -> LinearError:
    found, reference = ours.weight(name), theirs.weight(name)
    (out, columns), error, norm = found.shape, 0.0, 0.0
    step = max(1, SLICE_ELEMENTS // columns)
    for start in range(0, out, step):
        stop = min(out, start + step)
        truth = reference.decode(torch.float32, start, stop)
        norm += float(truth.square().sum(dtype=torch.double))
        error += float((found.decode(torch.float32, start, stop) - truth).square().sum(dtype=torch.double))
    plain = dtype_name(next(iter(found.tensors.values())).dtype)
    return LinearError(math.sqrt(error / norm) if norm else math.sqrt(error), label(found.format, plain))


# Reports --------------------------------------------------------------------------------------------------------------


def _by_layer(errors: list[LayerErrors]) -> list[dict[str, Any]]:
    return [asdict(layer) for layer in errors]


def _report(
    args: argparse.Namespace, rows: list[Quality], tables: list[list[LayerErrors]], windows: Tensor, layer_windows: int
) -> None:
    count, context = windows.shape
    if args.json:
        found = [asdict(row) for row in rows]
        for row, errors in zip(found[1:], tables, strict=False):
            row["layers"] = _by_layer(errors)
        beside = {"windows": count, "context": context, "layer_windows": layer_windows}
        print_json({"rows": found, **beside})
        return
    note(
        f"{count} windows of {context} tokens; KL in nats a token, with its standard error; docs/compare.md says what is good"
    )
    print(table([asdict(row) for row in rows]))
    for path, errors in zip(args.folders, tables, strict=False) if args.layers else ():
        heading = (
            f"{path}: relative error of each weight, and of the hidden state after each layer ({layer_windows} windows)"
        )
        print("\n" + "\n".join(fold(heading, terminal_width())))
        print(layer_table(errors))


def layer_table(errors: list[LayerErrors]) -> str:
    """Errors by layer as aligned text; where formats differ, with each weight's."""
    names = list(errors[0].weights)
    mixed = len({w.format for layer in errors for w in layer.weights.values()}) > 1

    def cell(weight: LinearError) -> str:
        return f"{weight.error:.3%}" + (f" {weight.format:<9}" if mixed else "")

    titles = [name.rpartition(".")[2] for name in names]
    widths = [max(len(title), 19 if mixed else 8) + 2 for title in titles]
    head = (
        "layer" + "".join(f"{title:>{width}}" for title, width in zip(titles, widths, strict=True)) + "  hidden state"
    )
    lines = [
        f"{layer.layer:>5}"
        + "".join(f"{cell(layer.weights[n]):>{width}}" for n, width in zip(names, widths, strict=True))
        + f"{layer.hidden:>14.3%}"
        for layer in errors
    ]
    return "\n".join([head, *lines])
