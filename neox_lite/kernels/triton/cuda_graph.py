"""Capture and replay on a CUDA device: the one module that knows torch.cuda.CUDAGraph. Knows no step and no table."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

CAPTURING = threading.RLock()  # torch allows one capture at a time in a process; sizes are timed as one warms up


class CudaGraphs:
    """Graphs of one device, which share their memory because only one of them runs at a time: in the current stream's order."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # memory is shared between captures on the same stream

    def capture(self, step: Callable[[], object]) -> Callable[[], object]:
        """Call step once, so that everything is compiled and loaded, then record it -> what runs it again."""
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        try:
            with CAPTURING, torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                self._stream.wait_stream(here)
                step()
                # Other threads may go on using the device: a capture minds its own thread alone.
                with torch.cuda.graph(graph, self._memory, self._stream, capture_error_mode="thread_local"):
                    step()
        finally:
            here.wait_stream(self._stream)
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
