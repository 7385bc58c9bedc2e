"""A device without a GPU on which steps are captured and replayed: captures are checked, replays are launches and nothing else.

A CUDA graph repeats launches: the same kernels over the same grids, with the same addresses and numbers. So while a step runs
here, whatever a graph could not repeat is an error, and so is a second run that launches anything else than the first.
Work runs as late as the order allows, that the host finds nothing early and overwrites nothing that is still to be read.
"""

import contextlib
import math

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from neox_lite.kernels.triton import device_calls

VIEWS = {
    "alias", "as_strided", "detach", "expand", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose",
    "permute", "unbind", "unsqueeze", "view", "_unsafe_view",
}  # fmt: skip
NEW = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
READS = {"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__repr__", "__format__"}


class NotCapturable(Exception):
    """A step does what a graph cannot repeat."""


class _HostReads(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in READS or (name == "to" and "cpu" in args[1:]):
            raise NotCapturable(f"Tensor.{name} brings numbers to the host")
        return func(*args, **(kwargs or {}))


class _Capturing(TorchDispatchMode):
    """Views, and new memory out of the same pieces every time; nothing else of torch's."""

    def __init__(self, memory):
        super().__init__()
        self.memory, self.taken = memory, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in VIEWS:
            return func(*args, **(kwargs or {}))
        if name in ("to", "contiguous") and func(*args, **(kwargs or {})) is args[0]:
            return args[0]
        if name not in NEW:
            raise NotCapturable(f"aten.{name} is neither a launch nor new memory")
        wanted = func(*args, **(kwargs or {}))
        if self.taken == len(self.memory):
            self.memory.append(wanted)
        found = self.memory[self.taken]
        self.taken += 1
        if (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
            raise NotCapturable(
                f"{tuple(wanted.shape)} {wanted.dtype} where {tuple(found.shape)} {found.dtype} was asked for"
            )
        return found


class _InOrder(TorchDispatchMode):
    """What the host has torch do to memory of the device comes after what was given to the device before."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in VIEWS:
            return func(*args, **(kwargs or {}))
        tensors = [a for a in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
        if any(t.untyped_storage().data_ptr() in self.device.addresses for t in tensors):
            self.device.run()
        return func(*args, **(kwargs or {}))


class SimulatedGraphs:
    """`steps.Graphs`, within `with simulated:`. late: work runs when it is waited for, else at once.

    dry: nothing runs, launches are only compared. captures: how many graphs were made. replays: how often one ran. launches: of
    the last step that was captured. behind: most work that was still to be done when more was given.
    """

    def __init__(self, late=True, dry=False):
        self.late, self.dry = late, dry
        self.captures, self.replays, self.behind, self.launches = 0, 0, 0, []
        self.addresses = set()  # where the device's memory begins
        self._queue, self._done, self._stack = [], 0, contextlib.ExitStack()
        self._recording = None  # of launches, while a step is captured
        self._runs = True  # launches that are recorded

    def __enter__(self):
        stack = self._stack
        for name in ("launch", "mm", "nf4_mm"):
            stack.callback(setattr, device_calls, name, getattr(device_calls, name))
            setattr(device_calls, name, self._hook(name, getattr(device_calls, name)))
        stack.enter_context(_InOrder(self))
        return self

    def __exit__(self, *error):
        self._stack.close()

    def __call__(self, device):
        return self

    # Graphs -----------------------------------------------------------------------------------------------------------

    def capture(self, step):
        memory = []
        first = self._record(step, memory, runs=not self.dry)
        launches = self._record(step, memory, runs=False)
        _compare(first, launches)
        self.captures, self.launches = self.captures + 1, launches

        def replay():
            _compare(launches, self._record(step, memory, runs=False))  # what it would launch now
            self.replays += 1
            self._give(lambda: [run() for _, run in launches if not self.dry])

        return replay

    def staging(self, nbytes):
        return torch.zeros(nbytes, dtype=torch.uint8)

    def copy(self, to, source):
        assert to.shape == source.shape
        self._give(lambda: to.copy_(source))

    def mark(self):
        return self._done + len(self._queue)

    def wait(self, mark):
        self.run(mark)

    # How --------------------------------------------------------------------------------------------------------------

    def run(self, mark=math.inf):
        """What was given to the device, up to a mark."""
        while self._queue and self._done < mark:
            self._done += 1
            work = self._queue.pop(0)
            with _disable_current_modes():
                work()

    def _give(self, work):
        self.behind = max(self.behind, len(self._queue))
        self._queue.append(work)
        if not self.late:
            self.run()

    def _record(self, step, memory, runs):
        if runs:
            self.run()
        self._recording, self._runs = [], runs
        try:
            with _disable_current_modes(), _Capturing(memory), _HostReads():
                step()
            return self._recording
        finally:
            self._recording = None

    def _hook(self, name, function):
        def hooked(*arguments, **options):
            def run():
                with _disable_current_modes(), torch._C.DisableTorchFunction():
                    function(*arguments, **options)

            if self._recording is None:
                self.run()
            else:
                self.addresses |= {
                    a.untyped_storage().data_ptr() for a in arguments if isinstance(a, torch.Tensor) and a.numel()
                }
                self._recording.append(((name, *map(_said, arguments), *_said(options)), run))
            if self._recording is None or self._runs:
                run()

        return hooked


def _said(argument):
    """What a graph would keep of an argument."""
    if isinstance(argument, torch.Tensor):
        return argument.data_ptr(), argument.dtype
    if isinstance(argument, dict):
        return sorted(argument.items())
    return argument


def _compare(first, second):
    if len(first) != len(second):
        raise NotCapturable(f"{len(second)} launches, where there were {len(first)}")
    for i, ((a, _), (b, _)) in enumerate(zip(first, second, strict=True)):
        for j, (x, y) in enumerate(zip(a, b, strict=True)):
            if x is not y and x != y:
                kernel = getattr(a[1], "__name__", a[0])
                raise NotCapturable(f"launch {i}, argument {j} of {kernel}: {y} where it was {x}")
