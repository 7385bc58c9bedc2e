"""A device with memory of its own, as offload uses it: buffers, copies beside the computing, and the order of the two.

Knows no layer and no plan.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ..kernels import dispatch
from ..kernels.backend import Backend

Queue = Literal["compute", "copy"]
Event = Any  # a point in a queue: everything given to the queue before it


class Accelerator(Protocol):
    """Work is given to two queues and runs later: what operations compute, and what `copy` moves. Neither waits for the
    other, nor does the host wait for them, unless they are asked to."""

    @property
    def device(self) -> torch.device: ...

    def operations(self, exact: bool) -> Backend:
        """What computes on the device."""
        ...

    def empty(self, nbytes: int) -> Tensor:
        """Memory of the device, (nbytes,) uint8."""
        ...

    def staging(self, nbytes: int) -> Tensor:
        """Memory of the host, (nbytes,) uint8, that `copy` reads and writes while the host goes on."""
        ...

    def upload(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """A tensor of the host on the device, in the order of the compute queue."""
        ...

    def download(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """A tensor of the device on the host, once it is computed."""
        ...

    def copy(self, to: Tensor, source: Tensor) -> None:
        """On the copy queue, between memory of the device and staging memory of as many bytes."""
        ...

    def record(self, queue: Queue) -> Event: ...

    def wait_event(self, queue: Queue, event: Event) -> None:
        """What is given to the queue from now on runs after the event."""
        ...

    def synchronize(self, event: Event) -> None:
        """Until everything before the event is done."""
        ...


class Cuda:
    """An NVIDIA GPU: the compute queue is the calling thread's current stream."""

    def __init__(self, device: torch.device, max_bytes: int | None = None) -> None:
        """max_bytes: torch is to take no more than so much more of the device's memory than it has, in all of this process."""
        self.device = torch.device("cuda", device.index if device.index is not None else torch.cuda.current_device())
        self._copies = torch.cuda.Stream(self.device)
        if max_bytes is not None:
            total = torch.cuda.get_device_properties(self.device).total_memory
            max_bytes += torch.cuda.memory_reserved(self.device)
            torch.cuda.set_per_process_memory_fraction(min(1.0, max(0, max_bytes) / total), self.device)

    def operations(self, exact: bool) -> Backend:
        return dispatch.choose(self.device, exact)

    def empty(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def staging(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def upload(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(self.device).to(dtype)

    def download(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to("cpu").to(dtype)

    def copy(self, to: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self._copies):
            to.copy_(source, non_blocking=True)

    def _stream(self, queue: Queue) -> torch.cuda.Stream:
        return self._copies if queue == "copy" else torch.cuda.current_stream(self.device)

    def record(self, queue: Queue) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(self._stream(queue))
        return event

    def wait_event(self, queue: Queue, event: torch.cuda.Event) -> None:
        self._stream(queue).wait_event(event)

    def synchronize(self, event: torch.cuda.Event) -> None:
        event.synchronize()
