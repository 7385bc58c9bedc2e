"""Tokens a second: of one answer, and of the last seconds. Knows no model and no job."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field


@dataclass
class TokenClock:
    """When the tokens of an answer came, in seconds of time.monotonic(). start_s: when it was asked for."""

    start_s: float = field(default_factory=lambda: time.monotonic())
    first_s: float | None = None
    last_s: float | None = None
    tokens: int = 0

    def tick(self) -> None:
        """A token is there."""
        self.last_s = time.monotonic()
        self.first_s = self.last_s if self.first_s is None else self.first_s
        self.tokens += 1

    @property
    def wait_s(self) -> float | None:
        """From the question to the first token; None before it."""
        return None if self.first_s is None else self.first_s - self.start_s

    @property
    def tokens_per_s(self) -> float | None:
        """Between the first and the last token; None where these are one, or came at once."""
        if self.first_s is None or self.last_s is None or self.last_s == self.first_s:
            return None
        return (self.tokens - 1) / (self.last_s - self.first_s)


class RecentRate:
    """Tokens a second of all answers together, over the last `seconds`. Not safe for threads."""

    def __init__(self, seconds: float, least_s: float) -> None:
        """least_s: that is divided by at least."""
        self._seconds, self._least_s = seconds, least_s
        self._counts: deque[tuple[float, int]] = deque()

    def add(self, tokens: int) -> None:
        self._counts.append((time.monotonic(), tokens))

    @property
    def tokens_per_s(self) -> float:
        now, counts = time.monotonic(), self._counts
        while counts and counts[0][0] < now - self._seconds:
            counts.popleft()
        if len(counts) < 2:
            return 0.0
        return sum(count for _, count in counts) / max(now - counts[0][0], self._least_s)
