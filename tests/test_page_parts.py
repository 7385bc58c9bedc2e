"""What the page is made of, without a browser: settings, badges, the work it starts, and how answers are sent."""

import asyncio
import json
import re
import time

import pytest

pytest.importorskip("gradio", reason="needs pip install '.[page]'")

from neox_lite.errors import ArgumentError
from neox_lite.generation.parameters import SAMPLED
from neox_lite_app.cli import build_parser
from neox_lite_app.models.local_models import LocalModel
from neox_lite_app.page import badges, model_tab
from neox_lite_app.page.events import PageEvent
from neox_lite_app.page.settings import DEFAULT, FIELDS, options_of
from neox_lite_app.page.stream import Feed, batches
from neox_lite_app.page.work import Work
from neox_lite_app.paths import DEMO
from neox_lite_app.serving.engine import Engine
from neox_lite_app.serving.jobs import Update

ARGS = build_parser().parse_args(["serve", "--device", "cpu"])


@pytest.fixture
def engine():
    engine = Engine()
    yield engine
    engine.close()


# Models ---------------------------------------------------------------------------------------------------------------


def test_nf4_is_offered_where_the_library_for_it_is_there(engine, monkeypatch):
    found = [None, object()]
    monkeypatch.setattr(badges.importlib.util, "find_spec", lambda name: found.pop(0))
    assert badges.offered() == ("int4", "int8") and badges.offered() == ("int4", "int8", "nf4")
    for formats in (("int4", "int8"), ("int4", "int8", "nf4")):
        for module in (badges, model_tab):
            monkeypatch.setattr(module, "offered", lambda formats=formats: formats)
        tab = model_tab.Tab(engine, ARGS)
        shown = asyncio.run(anext(tab.list(PageEvent({}, "tab"))))["models"]
        assert shown["formats"] == formats and all(tuple(member["plans"]) == formats for member in shown["family"])
        with pytest.raises(ArgumentError, match=f"expected {' or '.join(formats)}"):
            tab.quantize(PageEvent({"model": "m", "format": "fp4"}, "tab"))


@pytest.mark.parametrize("format", ["float16", "int4 g128", "int8 g32", "nf4", "nf4-double"])
def test_a_card_offers_to_quantize_16_bits_alone_and_says_where_a_tokenizer_is_missing(format):
    with_one, without = (LocalModel("m", "/m", "folder", format=format, tokenizer=has) for has in (True, False))
    card = model_tab.local_card(with_one)
    assert card["plain"] == (format == "float16") and card["problem"] == ""
    assert "no tokenizer.json" in model_tab.local_card(without)["problem"]


def test_a_cancel_that_comes_too_late_leaves_the_model_able_to_wake(engine):
    work = Work(engine, ARGS)
    work.load(str(DEMO))
    task, deadline = work.task, time.monotonic() + 60
    while task.state == "running" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert task.state == "done"
    work.cancel()
    task.progress(1, 1)  # as when the engine loads it again


# Settings -------------------------------------------------------------------------------------------------------------


def test_options_are_what_the_controls_show():
    neutral = {field.name: field.neutral for field in FIELDS}
    assert options_of(neutral) == {"do_sample": True, **neutral} == options_of({})
    greedy = options_of({"temperature": 0})
    assert greedy["do_sample"] is False and not greedy.keys() & SAMPLED
    given = {**DEFAULT, "stop": "\\n\\n\nEND", "logit_bias": "5:-1, 7:2.5", "seed": "3"}
    options = options_of(given)
    assert options_of({"stop": "\u2028"})["stop"] == []
    assert options["stop"] == ["\n\n", "END"] and options["logit_bias"] == {5: -1.0, 7: 2.5} and options["seed"] == 3


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"temperature": "hot"}, "Temperature is 'hot'"),
        ({"temperature": ""}, "Temperature is empty"),
        ({"top_p": 7}, "Top-p is 7"),
        ({"min_p": float("nan")}, "Min-p is nan"),
        ({"top_k": 1e400}, "Top-k is inf"),
        ({"seed": "-1"}, "Seed"),
        ({"seed": "9" * 40}, "Seed"),
        ({"seed": "9" * 5000}, "Seed"),
        ({"logit_bias": "a:b"}, "Logit bias"),
        ({"stop": "x" * 1000}, "Stop strings"),
        ({"max_new_tokens": []}, "Max new tokens"),
    ],
)
def test_a_wrong_setting_is_named(values, words):
    with pytest.raises(ArgumentError, match=re.escape(words)):
        options_of(values)


# Streams --------------------------------------------------------------------------------------------------------------


class Ready:
    """A ticket whose steps are all there at once."""

    def __init__(self, count):
        self.steps = [Update("a", 5) for _ in range(count)] + [Update("", None, "stop")]
        self.cancelled = False

    async def __aiter__(self):
        for step in self.steps:
            yield step

    def cancel(self):
        self.cancelled = True


def test_tokens_that_come_fast_are_sent_together_and_a_stream_that_is_given_up_cancels_its_job():
    ticket = Ready(5000)

    async def sent():
        return [batch async for batch in batches(Ready(5000))]

    async def begin():
        steps = batches(ticket)
        await anext(steps)
        await steps.aclose()

    found = asyncio.run(sent())
    assert sum(map(len, found)) == 5001 and len(found) < 100
    asyncio.run(begin())
    assert ticket.cancelled


def test_a_feed_grows_at_its_end_only():
    feed = Feed()
    before = feed.value
    after = feed.add({"answer": {"text": "a\nb"}})
    assert after.startswith(before) and json.loads(after.splitlines()[1]) == {"answer": {"text": "a\nb"}}
