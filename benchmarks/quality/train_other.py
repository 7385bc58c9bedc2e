"""Train the second model of formats.py: the demo's shape on Python's own standard library. Not committed: made anew.

    python -m benchmarks.quality.train_other --out /tmp/other [--minutes 15]

The text is the .py files at the top of the running Python's standard library, shuffled with a fixed seed so that training
and held-out parts are alike, 3 MB of them. train_demo.py does the rest; with --minutes the weights depend on the
machine's speed.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

TEXT_BYTES = 3_000_000


def standard_library() -> str:
    """Modules one after another, a blank line between, up to about TEXT_BYTES."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    random.Random(0).shuffle(files)
    texts: list[str] = []
    for file in files:
        texts.append(file.read_text(encoding="utf-8").strip())
        if sum(map(len, texts)) > TEXT_BYTES:
            break
    return "\n\n".join(texts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "stdlib.txt"
        text.write_text(standard_library(), encoding="utf-8")
        script = Path(__file__).with_name("train_demo.py")
        options = {"text": text, "out": args.out, "minutes": args.minutes, "threads": args.threads}
        flags = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        subprocess.run([sys.executable, str(script), *flags], check=True)


if __name__ == "__main__":
    main()
