"""Capture and replay on a CUDA device: the one module that knows torch.cuda.CUDAGraph. Knows no step and no table."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class CudaGraphs:
    """Graphs of one device, which share their memory because only one of them runs at a time: in the current stream's order."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory = torch.cuda.graph_pool_handle()

    def capture(self, step: Callable[[], object]) -> Callable[[], object]:
        """Call step once, so that everything is compiled and loaded, then record it -> what runs it again."""
        here, stream, graph = (
            torch.cuda.current_stream(self._device),
            torch.cuda.Stream(self._device),
            torch.cuda.CUDAGraph(),
        )
        stream.wait_stream(here)
        with torch.cuda.device(self._device):
            with torch.cuda.stream(stream):
                step()
            # Other threads may go on using the device: a capture minds its own thread alone.
            with torch.cuda.graph(graph, self._memory, stream, capture_error_mode="thread_local"):
                step()
        here.wait_stream(stream)
        return graph.replay

    def staging(self, nbytes: int) -> Tensor:
        """Memory of the host, (nbytes,) uint8, that `copy` reads and writes while the host goes on."""
        return torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True)

    def copy(self, to: Tensor, source: Tensor) -> None:
        """In the current stream's order, not waited for."""
        to.copy_(source, non_blocking=True)

    def mark(self) -> torch.cuda.Event:
        """A point in the stream: everything given to it before."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def wait(self, mark: torch.cuda.Event) -> None:
        mark.synchronize()
