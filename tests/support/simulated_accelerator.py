"""A simulated accelerator: memory of its own, two queues that run as late as they may, and a judge of what races.

Its memory is the host's, told apart by address. Copies run only when something waits for them, and what they will overwrite
is unreadable from the moment they are given. Every access is compared with the events that were waited for.
"""

import threading
import weakref
from dataclasses import dataclass, field

import torch

from neox_lite.kernels import reference
from neox_lite.kernels.graphs import EagerRunner


class Race(AssertionError):
    """Two queues touch the same memory, and nothing orders the two."""


class OutOfMemory(RuntimeError):
    pass


@dataclass
class Memory:
    """An allocation, and when each queue last read and wrote it."""

    kind: str
    start: int
    nbytes: int
    tensor: torch.Tensor
    reads: dict = field(default_factory=dict)
    writes: dict = field(default_factory=dict)
    sent: tuple | None = None  # staging memory: what it held when it was last copied from, and when that was


@dataclass(frozen=True)
class Mark:
    queue: str
    known: dict  # queue -> how much of it is done at this point


class SimulatedAccelerator:
    """An `Accelerator`. eager: copies run at once rather than at the last moment."""

    device = torch.device("cpu")

    def __init__(self, limit_bytes=1 << 62, eager=False, backend=reference):
        self.limit_bytes, self.eager, self._backend = limit_bytes, eager, backend
        self.allocated = self.peak = self.staged = 0
        self.bytes_up = self.bytes_down = self.crossings = 0
        self._memory = []
        self._passing = weakref.WeakValueDictionary()  # activations on the device, by id
        self._time = {"compute": 0, "copy": 0}
        self._known = {queue: {"compute": 0, "copy": 0} for queue in ("compute", "copy", "host")}
        self._pending = []
        self._lock = threading.RLock()

    # The Accelerator ------------------------------------------------------------------------------------------------------

    def operations(self, exact):
        return Watched(self, self._backend if self._backend is reference else self._backend.bind(exact))

    def empty(self, nbytes):
        with self._lock:
            if self.allocated + nbytes > self.limit_bytes:
                raise OutOfMemory(
                    f"{self.allocated} bytes of {self.limit_bytes} are in use, {nbytes} more are asked for"
                )
            self.allocated += nbytes
            self.peak = max(self.peak, self.allocated)
            return self._new("device", nbytes)

    def staging(self, nbytes):
        self.staged += nbytes
        return self._new("staging", nbytes)

    def upload(self, x, dtype):
        with self._lock:
            assert self.find(x, "device") is None, "what is uploaded is on the device already"
            self.crossings += 1
            return self.passing(x.to(dtype, copy=True))

    def download(self, x, dtype):
        with self._lock:
            self.check_on_device(x)
            self.crossings += 1
            return x.to(dtype, copy=True)

    def copy(self, to, source):
        with self._lock:
            assert to.nbytes == source.nbytes
            if not to.nbytes:
                return
            self._tick("copy")
            target, origin = self.find(to), self.find(source)
            assert {target.kind, origin.kind} == {"device", "staging"}, "copies are between the two memories"
            if target.kind == "device":
                self.bytes_up += to.nbytes
            else:
                self.bytes_down += to.nbytes
            self._access("copy", target, writes=True)
            self._access("copy", origin, writes=False)
            if origin.kind == "device":
                source = source.clone()  # the device is in order: what it holds at this point is what will be copied
                target.sent = None
            else:
                self._check_host(origin)
            self._pending.append((self._time["copy"], to, source))
            if self.eager:
                self._run(self._time["copy"])
            else:
                to.view(torch.uint8).fill_(255)

    def record(self, queue):
        with self._lock:
            return Mark(queue, {**self._known[queue], queue: self._time[queue]})

    def wait_event(self, queue, event):
        with self._lock:
            self._learn(queue, event)
            if queue == "compute":
                self._run(event.known["copy"])

    def synchronize(self, event):
        with self._lock:
            self._learn("host", event)
            self._run(event.known["copy"])

    # Memory ---------------------------------------------------------------------------------------------------------------

    def _new(self, kind, nbytes):
        tensor = torch.full((nbytes,), 255, dtype=torch.uint8)
        with self._lock:
            self._memory.append(Memory(kind, tensor.data_ptr(), nbytes, tensor))
        return tensor

    def adopt(self, tensor):
        """Count a tensor that others made as memory of the device."""
        self.allocated += tensor.nbytes
        self.peak = max(self.peak, self.allocated)
        self._memory.append(Memory("device", tensor.data_ptr(), tensor.nbytes, tensor))

    def find(self, tensor, kind=None):
        """The allocation a tensor lies in."""
        start = tensor.data_ptr()
        found = next((m for m in self._memory if m.start <= start < m.start + m.nbytes), None)
        return found if kind is None or (found is not None and found.kind == kind) else None

    def passing(self, tensor):
        """Note an activation that was made on the device."""
        self._passing[id(tensor)] = tensor
        return tensor

    def check_on_device(self, tensor):
        if id(tensor) not in self._passing and self.find(tensor, "device") is None:
            raise AssertionError(f"a tensor of shape {tuple(tensor.shape)} is used on the device, but lies on the host")

    # Order ----------------------------------------------------------------------------------------------------------------

    def compute(self, reads, writes=()):
        """Operations are given to the compute queue, and run at once."""
        with self._lock:
            self._tick("compute")
            for tensor in (*reads, *writes):
                self.check_on_device(tensor)
                if (memory := self.find(tensor, "device")) is not None:
                    self._access("compute", memory, writes=any(tensor is w for w in writes))

    def _check_host(self, staging):
        """Where the host has written since the last copy from there, it must have waited for that copy."""
        if staging.sent is not None and not torch.equal(staging.sent[0], staging.tensor):
            self._check("host", "copy", staging.sent[1], staging)
        staging.sent = staging.tensor.clone(), self._time["copy"]

    def _learn(self, queue, event):
        self._known[queue] = {q: max(t, event.known[q]) for q, t in self._known[queue].items()}

    def _tick(self, queue):
        self._time[queue] += 1
        self._known[queue][queue] = self._time[queue]

    def _access(self, queue, memory, writes):
        for other, time in memory.writes.items():
            self._check(queue, other, time, memory)
        if writes:
            for other, time in memory.reads.items():
                self._check(queue, other, time, memory)
        (memory.writes if writes else memory.reads)[queue] = self._time[queue]

    def _check(self, queue, other, time, memory):
        if other != queue and self._known[queue][other] < time:
            raise Race(f"{queue} touches {memory.nbytes} bytes of {memory.kind} memory that {other} may still be using")

    def _run(self, until):
        while self._pending and self._pending[0][0] <= until:
            _, to, source = self._pending.pop(0)
            to.copy_(source)


class Watched:
    """Operations that say to the simulated device what they touch."""

    def __init__(self, device, ops):
        self._device, self._ops, self.name = device, ops, ops.name

    def activation_dtype(self, weights, device):
        return self._ops.activation_dtype(weights, device)

    def pass_runner(self, forward, device, limit, vocabulary=None):
        return EagerRunner(forward, "a simulated device runs operation by operation")

    def _results(self, out):
        for tensor in out if isinstance(out, list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self._device.passing(tensor)
        return out

    def embed(self, ids, weight, dtype):
        self._device.compute([weight])
        return self._results(self._ops.embed(ids, weight, dtype))

    def layer_norms(self, x, lns, next_weights):
        self._device.compute([x, *(t for gain, bias, _ in lns for t in (gain, bias))])
        return self._results(self._ops.layer_norms(x, lns, next_weights))

    def grouped_linear(self, inputs, weights, addends, activations, next_weights):
        self._device.compute([*_tensors(inputs), *_stored(weights), *(a for a in addends if a is not None)])
        return self._results(self._ops.grouped_linear(inputs, weights, addends, activations, next_weights))

    def attention(self, qkv, cache, layer, batch, rotary, next_weight):
        self._device.compute([*_tensors([qkv]), rotary], [of[layer] for of in (cache.storage, cache.scales) if of])
        return self._results(self._ops.attention(qkv, cache, layer, batch, rotary, next_weight))

    def linear_residual(self, inputs, weights, addends, x):
        self._device.compute([*_tensors(inputs), x, *_stored(weights), *(a for a in addends if a is not None)])
        return self._results(self._ops.linear_residual(inputs, weights, addends, x))

    def head(self, x, rows, norm, weight):
        self._device.compute([x, *norm[:2], *_stored([weight])])
        return self._results(self._ops.head(x, rows, norm, weight))

    def final_norm(self, x, norm):
        self._device.compute([x, *norm[:2]])
        return self._results(self._ops.final_norm(x, norm))


def _tensors(inputs):
    return [x for x in inputs if isinstance(x, torch.Tensor)]


def _stored(weights):
    return [tensor for weight in weights for tensor in weight.tensors.values()]
