"""Measurements of neox-lite, beside its peers and by itself; README.md says which command answers which question."""

import sys
from pathlib import Path

# From a checkout, without installing it.
sys.path[:0] = [str(Path(__file__).parents[1] / room) for room in (".", "quant", "app")]
