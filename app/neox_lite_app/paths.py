"""Where things lie: the bundled model, and what is the user's own: conversations, models, the terminal's history."""

from __future__ import annotations

import os
from pathlib import Path

DEMO = Path(__file__).parent / "demo_model"  # a small model trained on Shakespeare's plays


def data_folder(name: str) -> Path:
    """A folder of this name in NEOX_LITE_DATA, by default ~/.local/share/neox-lite (XDG_DATA_HOME moves it); not made here."""
    given = os.environ.get("NEOX_LITE_DATA")
    root = Path(given) if given else Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share") / "neox-lite"
    return root.expanduser().absolute() / name
