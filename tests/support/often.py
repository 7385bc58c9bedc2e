"""How often tests repeat what is random. NEOX_LITE_TIMES=10 is the long form: ten times as often."""

import os

TIMES = int(os.environ.get("NEOX_LITE_TIMES", "1"))


def times(usual: int) -> int:
    return usual * TIMES
