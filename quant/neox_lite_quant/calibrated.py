"""gptq as a conversion uses it: its memory and disk, its calibration text, and the tensors of each linear layer."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from neox_lite.errors import ArgumentError
from neox_lite.layers import Linear
from neox_lite.loading.save import Rows
from neox_lite.loading.skeleton import Skeleton
from neox_lite.modeling.causal_lm import GPTNeoXForCausalLM
from neox_lite.offload.memory import free_memory

from . import calibrate
from .blockwise import Blockwise, memory_bytes, operations_of, scratch_bytes, steps_of
from .calibrate import Calibration, shape_of

PROBE = 1024  # rows of a product that is timed


class Calibrated:
    """The linear layers of a model, quantized block by block. Call `prepare` first, then `rows` in the order of the layers."""

    def __init__(
        self,
        skeleton: Skeleton,
        dtype: torch.dtype,
        path: str | os.PathLike[str] | None,
        windows: int | None,
    ) -> None:
        """path: of the calibration text, None for text that the model writes."""
        self._skeleton, self._config, self._dtype = skeleton, skeleton.model.config, dtype
        self._path = None if path is None else Path(path)
        self._shape = shape_of(self._config, self._path is None, windows)
        if self._path is not None:
            calibrate.read_texts(self._path)  # raises for a wrong file before anything starts
        if self._path is None and not isinstance(skeleton.model, GPTNeoXForCausalLM):
            raise ArgumentError(
                f"{skeleton.checkpoint.folder}: {type(skeleton.model).__name__} has no vocabulary head to write its own "
                "calibration text with; give --calibration FILE"
            )
        self.memory_bytes = memory_bytes(self._config, *self._shape)
        self.scratch_bytes = scratch_bytes(self._config, *self._shape)
        self._blocks: Blockwise | None = None
        self._begin: Callable[[], Blockwise] | None = None

    def predict_seconds(self) -> float:
        """A forecast from a measured matrix product; passes through the model reach about half of its speed."""
        a, best = torch.rand(PROBE, PROBE), float("inf")
        for _ in range(5):
            began = time.perf_counter()
            a @ a
            best = min(best, time.perf_counter() - began)
        return 2 * best / (2 * PROBE**3) * operations_of(self._config, *self._shape)

    def prepare(self, destination: Path, progress: Callable[[int, int], object]) -> dict[str, Any]:
        """Check the memory and read or write the text; returns its fields for the manifest. `rows` starts the quantization."""
        free = free_memory()[1]
        if free is not None and self.memory_bytes > free:
            raise ArgumentError(
                f"gptq takes up to {self.memory_bytes / 1e9:.1f} GB of memory for this model, {free / 1e9:.1f} GB are free; "
                "try --method balance, which needs little"
            )
        folder, (count, context) = self._skeleton.checkpoint.folder, self._shape
        steps = steps_of(self._config, count, context)
        before = 0
        if self._path is None:
            before = context
            total = before + steps
            text = calibrate.own_text(folder, self._config, count, lambda done, _: progress(done, total))
        else:
            text = calibrate.from_file(self._path, folder, self._config, count)
        self._begin = lambda: self._blockwise(text, destination, lambda done, of: progress(before + done, before + of))
        return text.manifest()

    def _blockwise(self, text: Calibration, scratch: Path, progress: Callable[[int, int], object]) -> Blockwise:
        skeleton = self._skeleton
        return Blockwise(
            skeleton.checkpoint,
            self._config,
            skeleton.stored,
            lambda name: self._linear(name).format,  # type: ignore[arg-type, return-value]
            self._dtype,
            text.windows,
            scratch,
            progress,
        )

    def rows(self, name: str) -> Rows:
        """A linear layer's tensors, under the names they have in the folder."""
        if self._blocks is None:
            assert self._begin is not None, "not prepared"
            self._blocks = self._begin()
        prefix = f"{self._skeleton.model.base_model_prefix}." if not name.startswith("gpt_neox.") else ""
        found = self._blocks.tensors(f"{prefix}{name}")
        linear = self._linear(name)
        tensors = {**found, **linear.format.constants(linear.shape, self._dtype)}
        return [(f"{name}.{key}", tensor, 0) for key, tensor in tensors.items()]

    def _linear(self, name: str) -> Linear:
        return self._skeleton.model.base_model.get_submodule(name.removeprefix("gpt_neox."))  # type: ignore[return-value]
