"""The API as its clients use it: OpenAI's own client, recorded requests of three front ends, and nonsense."""

import asyncio
import contextlib
import http.client
import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support.often import times
from support.serving import application, ask, ask_json, demo_engine, exchange, scope_of, serving

openai = pytest.importorskip("openai", reason="needs pip install '.[test]'")
httpx = pytest.importorskip("httpx", reason="needs pip install '.[test]'")

from neox_lite import GPTNeoXForCausalLM  # noqa: E402
from neox_lite_app.conversations.prompt_forms import form_of  # noqa: E402
from neox_lite_app.paths import DEMO  # noqa: E402
from neox_lite_app.serving import api, schema  # noqa: E402
from neox_lite_app.serving.engine import Engine  # noqa: E402
from neox_lite_app.serving.responses import Tokens, event  # noqa: E402

PROMPT = "KING RICHARD III:\n"
CHAT = [{"role": "user", "content": "Who are you?"}]
RECORDED = sorted((Path(__file__).parent / "requests").glob("*.json"))
FUZZ, DISCONNECTS = times(640), times(16)


@pytest.fixture(scope="module")
def engine():
    with demo_engine() as engine:
        yield engine


@pytest.fixture(scope="module")
def app(engine):
    return application(engine)


@pytest.fixture(scope="module")
def url(app):
    with serving(app) as url:
        yield url


@pytest.fixture
def before_step(engine, monkeypatch):
    """Have something done before each pass of the model."""

    def arrange(do):
        step = type(engine._model).step

        def wrapped(self, *given, **options):
            do()
            return step(self, *given, **options)

        monkeypatch.setattr(type(engine._model), "step", wrapped)

    return arrange


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def model():
    return GPTNeoXForCausalLM.from_pretrained(DEMO, device_map="cpu")


def complete(client, **options):
    return client.completions.create(
        **{"model": "demo_model", "prompt": PROMPT, "max_tokens": 12, "seed": 1, **options}
    )


def chat(client, **options):
    return client.chat.completions.create(
        **{"model": "demo_model", "messages": CHAT, "max_tokens": 12, "seed": 1, **options}
    )


def post(url, path, body, **options):
    return httpx.post(f"{url}{path}", json=body, timeout=60, **options)


def idle(engine):
    """Whether all slots are free, after at most a while."""
    for _ in range(500):
        if engine.status().active == engine.status().waiting == 0:
            return True
        time.sleep(0.02)
    return False


# Models, health, metrics ----------------------------------------------------------------------------------------------


def test_the_loaded_model_is_listed_and_found_by_its_name_and_another_is_not(client):
    (listed,) = client.models.list().data
    assert listed.id == "demo_model" and listed.owned_by == "neox-lite" and listed.max_model_len == 512
    assert client.models.retrieve("demo_model") == listed
    for call in (complete, chat):
        with pytest.raises(openai.NotFoundError) as error:
            call(client, model="gpt-4o")
        assert error.value.code == "model_not_found" and "demo_model" in error.value.message
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")


def test_without_a_model_and_after_one_that_failed_to_load_everything_says_so():
    with contextlib.closing(Engine()) as engine, serving(application(engine)) as url:
        health = httpx.get(f"{url}/health")
        assert (health.status_code, health.json()["status"]) == (503, "empty")
        assert httpx.get(f"{url}/v1/models").json()["data"] == []
        reply = post(url, "/v1/completions", {"prompt": "x"})
        assert reply.status_code == 503 and reply.json()["error"]["code"] == "model_not_loaded"
        with pytest.raises(ZeroDivisionError):
            engine.load("broken", lambda: 1 // 0)
        health = httpx.get(f"{url}/health")
        assert (health.status_code, health.json()["status"]) == (503, "failed")


def test_metrics_count_requests_tokens_and_waiting_times(engine):
    app = application(engine)

    def metric(name):
        text = asyncio.run(ask(app, "GET", "/metrics")).body.decode()
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))

    with serving(app) as url:
        post(url, "/v1/completions", {"prompt": PROMPT, "max_tokens": 5, "n": 2})
        post(url, "/v1/completions", {"prompt": 7.5})
        httpx.get(f"{url}/strange")
    assert metric('neox_lite_requests_total{route="/v1/completions",status="200"}') == 1
    assert metric('neox_lite_requests_total{route="/v1/completions",status="400"}') == 1
    assert metric('neox_lite_requests_total{route="other",status="404"}') == 1
    assert metric("neox_lite_completion_tokens_total") == 10
    assert metric("neox_lite_time_to_first_token_seconds_count") == 2
    assert metric("neox_lite_time_between_tokens_seconds_count") == 8
    assert metric("neox_lite_memory_bytes") > 1e6
    assert metric("neox_lite_model_info") == 1


# Completions ----------------------------------------------------------------------------------------------------------


def test_a_greedy_completion_is_what_generate_gives(client, model):
    ids = model.tokenizer(PROMPT, return_tensors="pt").input_ids
    expected = model.tokenizer.decode(model.generate(ids, max_new_tokens=12)[0, ids.shape[1] :])
    reply = complete(client, temperature=0)
    assert reply.choices[0].text == expected and reply.choices[0].finish_reason == "length"
    assert reply.usage.prompt_tokens == ids.shape[1] and reply.usage.completion_tokens == 12
    assert reply.usage.total_tokens == ids.shape[1] + 12
    assert reply.object == "text_completion" and reply.id.startswith("cmpl-") and reply.system_fingerprint
    assert complete(client, max_tokens=openai.NOT_GIVEN).usage.completion_tokens == 16
    assert complete(client, prompt="").usage.prompt_tokens == 1  # the model's own start


def test_prompts_may_be_texts_ids_or_several_of_either(client, model):
    texts = [PROMPT, "QUEEN:\n"]
    ids = [model.tokenizer(text).input_ids for text in texts]
    alone = [complete(client, prompt=text, temperature=0).choices[0].text for text in texts]
    assert complete(client, prompt=ids[0], temperature=0).choices[0].text == alone[0]
    for prompts in (texts, ids):
        reply = complete(client, prompt=prompts, temperature=0)
        assert [choice.text for choice in reply.choices] == alone
        assert [choice.index for choice in reply.choices] == [0, 1]
        assert reply.usage.prompt_tokens == sum(map(len, ids)) and reply.usage.completion_tokens == 24


def test_a_seed_repeats_and_n_gives_different_samples_of_it(client):
    first = complete(client, n=3)
    assert [c.text for c in complete(client, n=3).choices] == [c.text for c in first.choices]
    assert len({c.text for c in first.choices}) == 3
    assert complete(client).choices[0].text == first.choices[0].text
    assert complete(client, seed=2).choices[0].text != first.choices[0].text
    assert complete(client, seed=-5).choices[0].text == complete(client, seed=2**64 - 5).choices[0].text
    assert first.usage.prompt_tokens == complete(client).usage.prompt_tokens  # the prompt counts once
    assert len({complete(client, seed=openai.NOT_GIVEN).choices[0].text for _ in range(4)}) > 1


def test_the_pieces_of_a_stream_join_to_the_whole(client):
    whole = complete(client, n=2, max_tokens=40)
    texts = ["", ""]
    for chunk in complete(client, n=2, max_tokens=40, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
        usage = chunk.usage
    assert texts == [choice.text for choice in whole.choices]
    assert usage.completion_tokens == 80 and usage.prompt_tokens == whole.usage.prompt_tokens


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_the_framing_of_events_is_exact(url, path):
    body = {"prompt": PROMPT} if path == "/v1/completions" else {"messages": CHAT}
    reply = post(url, path, body | {"max_tokens": 6, "stream": True, "stream_options": {"include_usage": True}})
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = reply.text.split("\n\n")
    assert events.pop() == "" and events.pop() == "data: [DONE]"
    chunks = [json.loads(each.removeprefix("data: ")) for each in events]
    assert all(each.startswith("data: {") and "\n" not in each for each in events)
    assert [chunk["choices"] == [] for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert all(chunk["usage"] is None for chunk in chunks[:-1]) and chunks[-1]["usage"]["completion_tokens"] == 6
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]][-1] == "length"
    assert "usage" not in post(url, path, body | {"max_tokens": 3, "stream": True}).text


def test_a_stop_string_is_cut_off(client):
    text = complete(client, max_tokens=40, temperature=0).choices[0].text
    stop = text[10:14]
    reply = complete(client, max_tokens=40, temperature=0, stop=[stop, "never"])
    assert reply.choices[0].text == text[: text.index(stop)] and reply.choices[0].finish_reason == "stop"
    assert complete(client, max_tokens=40, temperature=0, stop=stop).choices[0].text == reply.choices[0].text


def test_characters_that_take_several_tokens_are_never_torn(client):
    chunks = complete(client, stream=True, max_tokens=60, extra_body={"regex": "é漢😀{8}!"})
    pieces = [chunk.choices[0].text for chunk in chunks]
    assert "".join(pieces) == "é漢" + "😀" * 8 + "!" and not any("\ufffd" in piece for piece in pieces)


def test_a_prompt_that_came_before_is_counted_as_cached(client):
    long = PROMPT * 40
    complete(client, prompt=long)
    details = complete(client, prompt=long).usage.prompt_tokens_details
    assert details.cached_tokens >= 128


# Log-probabilities, as lm-evaluation-harness reads them ---------------------------------------------------------------


def scores(model, ids):
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].float().log_softmax(-1)


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("as_ids", [True, False])
def test_echo_gives_the_log_probability_of_every_token_of_the_prompt(client, model, max_tokens, as_ids):
    text = "KING RICHARD III:\nNow is the winter of our discontent"
    ids = model.tokenizer(text).input_ids
    expected = scores(model, ids)
    options = {"echo": True, "logprobs": 2, "max_tokens": max_tokens, "temperature": 0}
    reply = complete(client, prompt=ids if as_ids else text, **options)
    found = reply.choices[0].logprobs
    assert reply.choices[0].text.startswith(text) and reply.usage.completion_tokens == max_tokens
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(ids) + max_tokens
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
    wanted = expected[range(len(ids) - 1), ids[1:]]
    # float32 sums in another order; 2e-3 is a rounding of 16-bit activations
    assert torch.tensor(found.token_logprobs[1 : len(ids)]) == pytest.approx(wanted, abs=2e-3)
    for row, (value, top) in enumerate(zip(found.token_logprobs[1:], found.top_logprobs[1:], strict=True)):
        best = expected[row].max().item() if row < len(ids) - 1 else max(top.values())
        # how the harness sees that a token is the greedy one
        assert max(top.values()) == pytest.approx(best, abs=2e-3) and value in top.values()
    assert "".join(found.tokens) == reply.choices[0].text
    starts = [found.text_offset[i] + len(t) for i, t in enumerate(found.tokens)]
    assert found.text_offset[1:] == starts[:-1]


def test_a_batch_of_prompts_is_scored_like_each_alone(client, model):
    prompts = [model.tokenizer(text).input_ids for text in ("To be, or not", "My lord", "Enter GHOST")]
    options = {"echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
    together = complete(client, prompt=prompts, **options).choices
    for prompt, choice in zip(prompts, together, strict=True):
        alone = complete(client, prompt=prompt, **options).choices[0].logprobs.token_logprobs
        assert choice.logprobs.token_logprobs[1:] == pytest.approx(alone[1:], abs=2e-3)


def test_streamed_log_probabilities_are_those_of_the_whole(client):
    whole = complete(client, logprobs=3, echo=True).choices[0]
    tokens, values, text = [], [], ""
    for chunk in complete(client, logprobs=3, echo=True, stream=True):
        text += chunk.choices[0].text
        if chunk.choices[0].finish_reason:
            break
        tokens += chunk.choices[0].logprobs.tokens
        values += chunk.choices[0].logprobs.token_logprobs
    assert tokens == whole.logprobs.tokens and text == whole.text
    assert values[1:] == pytest.approx(whole.logprobs.token_logprobs[1:], abs=2e-3)


def test_part_of_a_character_is_written_as_bytes(client, model):
    reply = complete(client, logprobs=0, max_tokens=20, extra_body={"regex": "😀"})
    assert reply.choices[0].text == "😀" and reply.choices[0].finish_reason == "stop"
    parts = [token for token in reply.choices[0].logprobs.tokens if token.startswith("bytes:")]
    assert bytes.fromhex("".join(parts).replace("bytes:", "").replace("\\x", "")) == "😀".encode()
    assert Tokens(model.tokenizer).text(10**6) == ""  # beyond the vocabulary


# Chat -----------------------------------------------------------------------------------------------------------------


def test_a_chat_is_the_models_prompt_form(client, model):
    messages = [{"role": "system", "content": "Be brief."}, *CHAT]
    form = form_of(str(DEMO), model.tokenizer)
    ids = form.encode(model.tokenizer, messages)
    reply = chat(client, messages=messages, temperature=0)
    whole = model.tokenizer.decode(model.generate(torch.tensor([ids]), max_new_tokens=12)[0, len(ids) :])
    reader = form.reader()
    expected = reader.put(whole) + reader.end("length")
    assert reply.choices[0].message.content == expected and reply.choices[0].message.role == "assistant"
    assert reply.usage.prompt_tokens == len(ids) and reply.object == "chat.completion"


def test_roles_and_parts_say_the_same_as_plain_messages(client):
    plain = chat(client, messages=[{"role": "system", "content": "Be brief."}, *CHAT]).choices[0].message.content
    parts = [{"type": "text", "text": "Who are"}, {"type": "text", "text": " you?"}]
    other = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    assert chat(client, messages=other).choices[0].message.content == plain


def test_a_chat_goes_on_to_the_end_of_the_context_or_to_max_completion_tokens(client):
    reply = chat(client, max_tokens=openai.NOT_GIVEN, extra_body={"ignore_eos": True, "regex": None}, stop="\x00")
    total = reply.usage.total_tokens
    assert total <= 512 and (reply.choices[0].finish_reason == "stop" or total == 512)
    assert chat(client, max_tokens=openai.NOT_GIVEN, max_completion_tokens=5).usage.completion_tokens <= 5


def test_a_streamed_chat_opens_with_the_role_and_joins_to_the_whole(client):
    whole = chat(client, n=2)
    texts, roles = ["", ""], []
    for chunk in chat(client, n=2, stream=True):
        for choice in chunk.choices:
            roles += [choice.delta.role] if choice.delta.role else []
            texts[choice.index] += choice.delta.content or ""
    assert roles == ["assistant"] * 2 and texts == [choice.message.content for choice in whole.choices]


def test_a_chat_reports_the_likeliest_tokens(client):
    content = chat(client, logprobs=True, top_logprobs=3, temperature=0).choices[0].logprobs.content
    for entry in content:
        assert len(entry.top_logprobs) == 3 and entry.logprob == max(top.logprob for top in entry.top_logprobs)
        assert bytes(entry.bytes).decode() == entry.token
    assert chat(client, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    assert chat(client).choices[0].logprobs is None


def test_an_answer_that_was_begun_can_be_continued(client, model):
    messages = [*CHAT, {"role": "assistant", "content": "I am the"}]
    reply = chat(client, messages=messages, extra_body={"continue_final_message": True, "add_generation_prompt": False})
    expected = form_of(str(DEMO), model.tokenizer).encode(model.tokenizer, CHAT, open_answer="I am the")
    assert reply.usage.prompt_tokens == len(expected)


# Sampling -------------------------------------------------------------------------------------------------------------


def test_a_bias_forces_and_forbids_tokens(client, model):
    (token,) = model.tokenizer("\n").input_ids
    forced = complete(client, logit_bias={str(token): 100}, temperature=0)
    assert set(forced.choices[0].text) == {"\n"}
    free = complete(client, temperature=0, max_tokens=30).choices[0].text
    assert "\n" in free
    assert "\n" not in complete(client, temperature=0, max_tokens=30, logit_bias={str(token): -100}).choices[0].text


def test_top_k_of_one_is_greedy_and_minus_one_is_all(client):
    assert complete(client, extra_body={"top_k": 1}).choices[0].text == complete(client, temperature=0).choices[0].text
    everything = complete(client).choices[0].text
    assert {complete(client, extra_body={"top_k": k}).choices[0].text for k in (-1, 0)} == {everything}


CHANGES = [{"top_p": 0.01}, {"frequency_penalty": 2.0}, {"presence_penalty": 2.0}, {"temperature": 3.0}]
FURTHER = {"min_p": 0.9, "typical_p": 0.05, "repetition_penalty": 5.0, "no_repeat_ngram_size": 1}
CHANGES += [{"extra_body": {name: value}} for name, value in FURTHER.items()]


@pytest.mark.parametrize("options", CHANGES, ids=str)
def test_each_option_changes_the_text(client, options):
    plain = [complete(client, max_tokens=40, seed=seed).choices[0].text for seed in range(3)]
    assert [complete(client, max_tokens=40, seed=seed, **options).choices[0].text for seed in range(3)] != plain


def test_no_token_comes_twice_where_that_is_asked_for(client):
    reply = complete(client, max_tokens=60, logprobs=0, extra_body={"no_repeat_ngram_size": 1})
    tokens = reply.choices[0].logprobs.tokens
    assert len(set(tokens)) == len(tokens)


def test_the_end_of_text_can_be_held_back_or_ignored(client, model):
    eos = {str(model.tokenizer.eos_token_id): 100}
    assert complete(client, logit_bias=eos).usage.completion_tokens == 1
    assert complete(client, logit_bias=eos, extra_body={"min_tokens": 4}).usage.completion_tokens == 5
    assert complete(client, logit_bias=eos, extra_body={"ignore_eos": True}).usage.completion_tokens == 12


# What is refused ------------------------------------------------------------------------------------------------------

HUGE = 10**30
NO_SCHEMAS = ("[" * 9000, "[" * 200 + "]" * 200, '"\\ud800"', "NaN", "9" * 5000, '{"a":1e999}')
BOTH = [
    *[("max_tokens", value) for value in (-2, 1.5, "8", True, HUGE, [], {})],
    *[("temperature", value) for value in (-0.1, 101, "hot", True, HUGE, [1])],
    *[("top_p", value) for value in (-0.1, 1.1, "x", HUGE)],
    *[("n", value) for value in (0, -1, 129, 1.5, "2", HUGE, True)],
    *[("stop", value) for value in (["x"] * 65, "", [""], [1], {"a": 1}, "x" * 257, 5, [["x"]])],
    *[("seed", value) for value in (1.5, "x", 2**64, -(2**63) - 1, True)],
    *[("stream", value) for value in ("yes", 1, [])],
    *[("stream_options", value) for value in ([], "x", {"include_usage": 1}, {"other": True}, {"include_usage": True})],
    *[("frequency_penalty", value) for value in (2.1, -2.1, "x")],
    *[("presence_penalty", value) for value in (2.1, -2.1, None.__class__.__name__)],
    *[("logit_bias", value) for value in ([1], {"x": 1}, {"1": 101}, {"1": "x"}, {"-1": 1}, {str(HUGE): 1}, {"²": 1})],
    *[("logit_bias", {str(i): 1 for i in range(1025)})],
    *[("user", value) for value in (5, "x" * 1025)],
    *[("model", value) for value in (5, [], "x" * 1025)],
    *[("top_k", value) for value in (-2, 1.5, HUGE)],
    *[("min_p", value) for value in (-1, 2)],
    *[("typical_p", value) for value in (-1, 2)],
    *[("repetition_penalty", value) for value in (0, -1, 1000)],
    *[("no_repeat_ngram_size", value) for value in (-1, HUGE)],
    *[("min_tokens", value) for value in (-1, HUGE)],
    *[("ignore_eos", value) for value in (1, "x")],
    *[("response_format", value) for value in ("json", [], {"type": "xml"}, {}, {"type": "json_schema"})],
    *[("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": 5}})],
    *[("response_format", {"type": "text", "other": 1})],
    *[("regex", value) for value in ("(", "x" * 5000, 5, "(?=a)b")],
    *[("guided_json", value) for value in ({"type": "banana"}, "{", 5, [], {"$ref": "http://localhost/x"}, "5")],
    *[("guided_json", value) for value in NO_SCHEMAS],
    *[("tools", value) for value in ([{"type": "function"}], {}, "x")],
    *[("tool_choice", value) for value in ("required", {"type": "function"})],
    *[("mirostat_mode", 2), ("num_beams", 4), ("dry_multiplier", 0.8), ("guidance_scale", 1.5), ("tfs", 0.9)],
    *[("max_new_tokens", 5), ("sampler_seed", 3), ("stopping_strings", ["x"])],  # alone
    *[("no_such_field", 1), ("temprature", 1), ("", 1), ("😀", 1)],
]
NO_PROMPTS = (5, None, {}, [], [[]] * 129, ["a", 5], [1, "a"], [-1], [2**40], [1.5], [True], [[[1]]])
COMPLETION_ONLY = [
    *[("prompt", value) for value in NO_PROMPTS],
    *[("prompt", value) for value in ([10**7], [[1, 2], [10**7]])],
    *[("logprobs", value) for value in (-1, 21, True, 1.5, "x")],
    *[("echo", value) for value in (1, "x")],
    *[("best_of", value) for value in (2, 0, "x")],
    *[("suffix", value) for value in ("after", 5)],
    ("messages", CHAT),
]
CHAT_ONLY = [
    *[("messages", value) for value in (None, [], "x", {}, [5], [[]], [{}], [{"role": "user"}], [{"content": "x"}])],
    *[("messages", [{"role": role, "content": "x"}]) for role in ("tool", "function", "king", 5, None, [])],
    *[("messages", [{"role": "user", "content": value}]) for value in (5, {}, [5], [{}], [{"type": "text"}], None)],
    *[("messages", [{"role": "user", "content": [{"type": kind, "text": "x"}]}]) for kind in ("image_url", 5, None)],
    *[("messages", [{"role": "user", "content": "x", "other": 1}])],
    *[("messages", [{"role": "assistant", "content": None, "tool_calls": [{"id": "x"}]}])],
    *[("logprobs", value) for value in (1, "x")],
    *[("top_logprobs", value) for value in (-1, 21, True, 1)],  # 1 without logprobs
    *[("max_completion_tokens", value) for value in (-1, "x", HUGE)],
    *[("continue_final_message", value) for value in (True, "x")],
    ("add_generation_prompt", False),
    ("modalities", ["audio"]),
    ("functions", [{"name": "f"}]),
    ("prompt", "x"),
]
TABLE = [("/v1/completions", *case) for case in BOTH + COMPLETION_ONLY]
TABLE += [("/v1/chat/completions", *case) for case in BOTH + CHAT_ONLY]


@pytest.mark.parametrize(("path", "field", "value"), TABLE, ids=lambda v: repr(v)[:40])
def test_a_bad_field_is_refused_by_its_name(app, path, field, value):
    body = {"prompt": PROMPT} if path == "/v1/completions" else {"messages": CHAT}
    reply = asyncio.run(ask_json(app, path, body | {"max_tokens": 2} | {field: value}))
    error = reply.json()["error"]
    assert reply.status == 400
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert error["param"] is None or error["param"].startswith(field) or value is None
    assert error["message"] and len(error["message"]) < 1000
    assert field in error["message"]


def test_the_nearest_name_is_offered(app):
    error = asyncio.run(ask_json(app, "/v1/completions", {"prompt": "x", "temprature": 1})).json()["error"]
    assert "did you mean temperature?" in error["message"] and error["code"] == "unknown_parameter"


NO_OBJECTS = [b"", b"{", b"[]", b"5", b'"x"', b"null", b"\xff\xfe", b'{"prompt": "\\ud800"}', b'{"\\ud800": 1}']
NO_VALUES = [b'"user": "\\ud800"', b'"metadata": [NaN]', b'"metadata": [-1e999]', b'"temperature": NaN']
NO_VALUES += [b'"temperature": Infinity', b'"temperature": 1e999', b'"max_tokens": ' + b"9" * 5000]
NO_VALUES += [b'"metadata": ' + b'{"a":' * 200 + b"1" + b"}" * 200]
NO_OBJECTS += [b'{"prompt": "x", ' + value + b"}" for value in NO_VALUES] + [b'{"prompt": ["\\udfff"]}']
NO_OBJECTS += [b'{"prompt": ' + b"[" * depth + b"]" * depth + b"}" for depth in (500, 100_000)]


@pytest.mark.parametrize("body", NO_OBJECTS, ids=lambda b: repr(b[:30]))
def test_what_is_not_a_json_object_is_refused(app, body):
    reply = asyncio.run(ask_json(app, "/v1/completions", body))
    assert reply.status == 400 and reply.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("method", "path", "options", "status"),
    [
        ("POST", "/v1/completions", {"data": {"prompt": "x"}}, 415),
        ("POST", "/v1/completions", {"content": b'{"prompt":"x"}'}, 415),
        *[("GET", "/v1/embeddings", {}, 404), ("POST", "/v1/x/y", {}, 404)],
        *[("GET", "/v1/completions", {}, 405), ("DELETE", "/v1/models", {}, 405)],
    ],
)
def test_other_types_paths_and_methods_are_refused_in_the_same_form(url, method, path, options, status):
    reply = httpx.request(method, f"{url}{path}", **options)
    assert reply.status_code == status and set(reply.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("call", "options"),
    [
        *[(call, {"max_tokens": 512, "stream": stream}) for call in (complete, chat) for stream in (True, False)],
        *[(complete, {"prompt": prompt}) for prompt in ("word " * 100_000, [5] * 513)],
    ],
    ids=["completion-stream", "completion", "chat-stream", "chat", "words", "tokens"],
)
def test_more_than_the_context_holds_is_refused_with_the_numbers(client, call, options):
    with pytest.raises(openai.BadRequestError) as error:
        call(client, **options)
    assert error.value.code == "context_length_exceeded" and "512" in error.value.message


def test_the_tables_of_fields_do_not_overlap():
    known = schema.COMPLETION.keys() | schema.CHAT.keys()
    tables = [known, schema.HARMLESS.keys(), schema.OFF_ONLY.keys(), schema.REPEATED.keys()]
    assert sum(map(len, tables)) == len(set().union(*tables))
    assert set(schema.REPEATED.values()) <= known


@pytest.mark.parametrize("path", RECORDED, ids=lambda p: p.stem)
def test_recorded_requests_of_front_ends_are_answered(url, path):
    recorded = json.loads(path.read_text(encoding="utf-8"))
    body = recorded.get("body")
    if body is not None:
        body["model"] = "demo_model"
    asked = {"json": body, "headers": recorded.get("headers"), "timeout": 60}
    reply = httpx.request(recorded["method"], url + recorded["path"], **asked)
    assert reply.status_code == 200, reply.text
    if body is not None and body.get("stream"):
        assert reply.text.endswith("data: [DONE]\n\n") and '"error"' not in reply.text
    else:
        assert reply.json().get("choices") or reply.json().get("data")


# Many at a time, those who leave, and faults --------------------------------------------------------------------------


def test_24_clients_get_each_its_own_answer(url):
    def talk(number):
        sentinel = f"client-{number:03d}-{random.Random(number).getrandbits(40):010x}"
        body = {"prompt": f"{number}: {PROMPT}", "max_tokens": 60, "regex": f"{sentinel}: [a-z ]{{8}}", "stream": True}
        body["user"] = sentinel
        text = ""
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as reply:
            for line in reply.iter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
        return text.startswith(sentinel) and len(text) == len(sentinel) + 10

    with ThreadPoolExecutor(24) as pool:
        assert all(pool.map(talk, range(24)))


@pytest.mark.parametrize("stream", [True, False])
def test_a_closed_connection_frees_its_slot(engine, url, stream):
    host, port = url.removeprefix("http://").split(":")
    body = {"prompt": PROMPT, "max_tokens": 400, "stream": stream, "ignore_eos": True}
    before = engine.status().active

    def leave(number):
        connection = http.client.HTTPConnection(host, int(port))
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        if stream:
            connection.getresponse().read(10)
        else:
            time.sleep(0.01 * (number % 3))
        connection.sock.close() if connection.sock else connection.close()
        connection.close()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(leave, range(DISCONNECTS)))
    assert before == 0 and idle(engine)
    assert post(url, "/v1/completions", {"prompt": PROMPT, "max_tokens": 2}).status_code == 200


def test_who_leaves_stops_the_work_within_a_token(engine, url, before_step):
    """The generated tokens of an answer that is left stay far below what was asked for."""
    seen = []
    before_step(lambda: (seen.append(1), time.sleep(0.005)))
    body = {"prompt": PROMPT, "max_tokens": 480, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as reply:
        next(reply.iter_bytes())
    assert idle(engine) and len(seen) < 240


def test_who_leaves_is_counted_as_such(engine):
    body = json.dumps({"prompt": PROMPT, "max_tokens": 400, "ignore_eos": True}).encode()
    scope = scope_of("POST", "/v1/completions", {"content-type": "application/json"})
    messages = [{"type": "http.request", "body": body}, {"type": "http.disconnect"}]
    sent = asyncio.run(exchange(application(engine), scope, messages))
    assert sent[0]["status"] == api.CLOSED and idle(engine)


def test_a_full_queue_answers_429_and_recovers():
    with demo_engine(sequences=1, waiting=1) as engine, serving(application(engine)) as url:
        body = {"prompt": PROMPT, "max_tokens": 400, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as first:
            next(first.iter_bytes())
            reply = post(url, "/v1/completions", {"prompt": [PROMPT] * 4, "max_tokens": 400})
            assert reply.status_code == 429 and reply.json()["error"]["code"] == "rate_limit_exceeded"
            assert int(reply.headers["retry-after"]) >= 1
            assert engine.status().waiting == 0  # what fitted of the refused request was taken back
        assert idle(engine)
        assert post(url, "/v1/completions", {"prompt": PROMPT, "max_tokens": 2}).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_fault_of_the_engine_is_a_503_in_words_and_the_next_request_works(url, stream, before_step, monkeypatch):
    body = {"prompt": f"{stream} {PROMPT}", "max_tokens": 4, "stream": stream}
    before_step(fall_off)
    reply = post(url, "/v1/completions", body)
    monkeypatch.undo()
    assert reply.status_code == 503 and reply.json()["error"]["code"] == "engine_error"
    assert "the card fell off" in reply.json()["error"]["message"]
    assert post(url, "/v1/completions", body).status_code == 200


def fall_off():
    raise RuntimeError("the card fell off")


def test_a_fault_in_the_middle_of_a_stream_is_an_event(client, before_step):
    steps = iter(range(100))
    before_step(lambda: next(steps) < 3 or fall_off())
    with pytest.raises(openai.APIError, match="the card fell off"):
        list(complete(client, stream=True, prompt="Another: "))


def test_a_model_that_is_unloaded_ends_its_answers_in_words():
    with demo_engine() as engine, serving(application(engine)) as url:
        body = {"prompt": PROMPT, "max_tokens": 480, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as reply:
            lines = reply.iter_lines()
            next(lines)
            engine.unload()
            assert '"model_not_loaded"' in list(filter(None, lines))[-1]


def test_long_silence_is_broken_by_comments(url, before_step, monkeypatch):
    monkeypatch.setattr(api, "KEEP_ALIVE_S", 0.02)
    free = threading.Event()
    before_step(lambda: free.wait(20))
    with httpx.stream("POST", f"{url}/v1/completions", json={"prompt": "Slow: ", "stream": True}, timeout=60) as reply:
        lines = reply.iter_lines()
        assert next(lines).startswith(":")
        free.set()
        assert list(filter(None, lines))[-1] == "data: [DONE]"


def test_separators_of_unicode_do_not_break_events():
    assert len((event({"text": "a\u2028b\u2029c\x85d\ne"})).decode().splitlines()) == 2


# Fuzz -----------------------------------------------------------------------------------------------------------------


class Fuzzer:
    """Requests that are mostly right, and wrong in one or two places."""

    ODD = (
        *(None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63), 2**64, 10**40, 0.5, -0.0, 1e-320, 1e308, -1e308),
        *("", "x", "\x00", "\n", "é漢😀", "<|endoftext|>", "x" * 3000, "-1", "NaN", "null", "../../etc/passwd"),
        *([], {}, [[]], [None], [1, "x"], {"type": "text"}, {"": ""}, [0] * 600, ["x"] * 20, {"a": {"b": [1]}}),
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer"}}},
        *("[a-z]{2}", "(a|b)*", "(", {"type": "object", "properties": {"a": {"type": "string"}}}, {"enum": []}),
    )
    TABLES = (schema.COMPLETION, schema.CHAT, schema.OFF_ONLY, schema.HARMLESS, schema.REPEATED)
    NAMES = sorted(set().union(*TABLES))

    def __init__(self, seed):
        self.random = random.Random(seed)

    def request(self):
        choice = self.random.choice
        path = choice(("/v1/completions", "/v1/chat/completions"))
        good = {"prompt": choice((PROMPT, [PROMPT, "x"], [5, 6], [[5], [6, 7]], ""))}
        if path == "/v1/chat/completions":
            good = {"messages": self.messages()}
        body = good | {"max_tokens": choice((0, 1, 2)), "stream": choice((True, False))}
        for _ in range(self.random.choice((0, 1, 1, 2, 3))):
            body[choice(self.NAMES)] = choice(self.ODD)
        raw = json.dumps(body).encode()
        match self.random.randrange(20):
            case 0:
                raw = raw[: self.random.randrange(len(raw))]
            case 1:
                at = self.random.randrange(len(raw))
                raw = raw[:at] + bytes([self.random.randrange(256)]) + raw[at + 1 :]
        return path, raw

    def messages(self):
        roles = ("user", "assistant", "system", "developer", "tool", "user", "user", None)
        parts = [{"type": "text", "text": "x"}], [{"type": "image_url"}]
        contents = ("Hello", "", None, *parts, 5, "<|endoftext|>", "é😀")
        count = self.random.choice((0, 1, 1, 1, 2, 5))
        return [{"role": self.random.choice(roles), "content": self.random.choice(contents)} for _ in range(count)]


def test_no_request_is_answered_with_a_server_error(engine, app):
    counts = {}

    async def fuzz():
        fuzzers = [Fuzzer(seed) for seed in range(8)]

        async def one(fuzzer, many):
            for _ in range(many):
                path, raw = fuzzer.request()
                reply = await ask_json(app, path, raw)
                counts[reply.status] = counts.get(reply.status, 0) + 1
                assert reply.status in (200, 400, 404), (path, raw, reply.body)
                if reply.status != 200:
                    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
                elif b'"error"' in reply.body:  # in a stream: only what a grammar gives up on
                    assert b'"invalid_request_error"' in reply.body, (path, raw, reply.body)

        await asyncio.gather(*(one(fuzzer, FUZZ // 8) for fuzzer in fuzzers))

    asyncio.run(fuzz())
    print(counts)
    assert counts[200] > FUZZ / 20 and counts[400] > FUZZ / 4
    assert idle(engine)
