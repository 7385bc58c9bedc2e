"""The API key, the sessions of browsers that gave it, and a limit on guessing. Knows no HTTP."""

from __future__ import annotations

import hashlib
import ipaddress
import math
import secrets
import time
from collections.abc import Callable

GUESSES = 10  # different wrong keys from one address within WINDOW_S
WINDOW_S = 60.0
SESSION_S = 30 * 24 * 3600
MAX_SESSIONS = 1024
MAX_ADDRESSES = 4096


class Keys:
    """One key. A session is a random token, not the key; only its digest is kept."""

    session_s = SESSION_S

    def __init__(self, key: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._key, self._clock = _digest(key), clock
        self._sessions: dict[bytes, float] = {}  # digest -> when it ends, oldest first
        self._wrong: dict[str, dict[bytes, float]] = {}  # address -> digests of wrong keys and when they came

    def check(self, given: str, address: str) -> bool:
        """Whether it is the key; a wrong one counts against the address. One program's same wrong key counts once."""
        digest = _digest(given)
        if secrets.compare_digest(digest, self._key):
            return True
        self._recent(address)[digest] = self._clock()
        return False

    def blocked_s(self, address: str) -> int:
        """Seconds until keys from this address are looked at again; 0: now."""
        recent = self._recent(address)
        return math.ceil(WINDOW_S - (self._clock() - min(recent.values()))) if len(recent) >= GUESSES else 0

    def _recent(self, address: str) -> dict[bytes, float]:
        since, place = self._clock() - WINDOW_S, _network(address)
        recent = {digest: at for digest, at in self._wrong.pop(place, {}).items() if at > since}
        while len(self._wrong) >= MAX_ADDRESSES:
            del self._wrong[next(iter(self._wrong))]
        self._wrong[place] = recent
        return recent

    def new_session(self) -> str:
        while len(self._sessions) >= MAX_SESSIONS:
            del self._sessions[next(iter(self._sessions))]
        token = secrets.token_urlsafe(32)
        self._sessions[_digest(token)] = self._clock() + SESSION_S
        return token

    def know_session(self, token: str) -> bool:
        return self._sessions.get(_digest(token), -math.inf) > self._clock()

    def forget_session(self, token: str) -> None:
        self._sessions.pop(_digest(token), None)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _network(address: str) -> str:
    """The address, or of an IPv6 one the network, in which a guesser has addresses without end."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    return address if found.version == 4 else str(ipaddress.ip_network((int(found) >> 64 << 64, 64)))
