"""Tokens a second, with a clock that tests set."""

import pytest

from neox_lite_app.serving.token_clock import RecentRate, TokenClock


@pytest.fixture
def at(monkeypatch):
    """Sets the time."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, seconds)


def test_an_answer_s_speed_is_that_between_its_first_and_its_last_token(at):
    at(10.0)
    clock = TokenClock()
    assert clock.wait_s is None and clock.tokens_per_s is None
    at(12.0)
    clock.tick()
    assert clock.wait_s == 2.0 and clock.tokens_per_s is None
    for seconds in (12.5, 13.0):
        at(seconds)
        clock.tick()
    assert (clock.tokens, clock.wait_s, clock.tokens_per_s) == (3, 2.0, 2.0)


def test_the_recent_rate_forgets_what_is_long_ago(at):
    rate = RecentRate(seconds=5.0, least_s=0.25)
    rate.add(8)
    assert rate.tokens_per_s == 0.0
    rate.add(8)
    assert rate.tokens_per_s == 16 / 0.25
    at(4.0)
    assert rate.tokens_per_s == 4.0
    at(5.5)
    assert rate.tokens_per_s == 0.0
