"""A machine without a GPU whose speed is known, so that no test that is not about measuring waits for it."""

from weakref import WeakSet

import pytest

from neox_lite.offload import placement, profile
from neox_lite.offload.plan import HardwareProfile, Rates

KNOWN = HardwareProfile(Rates(40e9, 1e12), 1e9, 400 << 20, None)


def known_machine(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(profile, "load", lambda: KNOWN)
    patch.setattr(profile, "measure", lambda *given: KNOWN)
    patch.setattr(placement, "PLANNED", WeakSet())
