"""What clients of other servers send and read: the end of a stream, numbers that mean none, words that they look for."""

import asyncio
import json

import pytest
from support.serving import application, ask, demo_engine

PROMPT = "KING RICHARD III:\n"
CHAT = [{"role": "user", "content": "Who are you?"}]


@pytest.fixture(scope="module")
def app():
    with demo_engine() as engine:
        yield application(engine)


def post(app, path, **body):
    return asyncio.run(ask(app, "POST", path, json.dumps(body).encode(), {"Content-Type": "application/json"}))


def chunks(reply):
    lines = [line.removeprefix("data: ") for line in reply.body.decode().split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line)["choices"][0] for line in lines[:-1]]


@pytest.mark.parametrize("stop", [[], ["the"]], ids=["length", "stop"])
@pytest.mark.parametrize("kind", ["chat/completions", "completions"])
def test_the_last_chunk_of_a_stream_has_no_text(app, kind, stop):
    body = {"messages": CHAT} if kind.startswith("chat") else {"prompt": PROMPT}
    body |= {"max_tokens": 24, "temperature": 0, "stop": stop}
    whole = post(app, f"/v1/{kind}", **body).json()["choices"][0]
    parts = chunks(post(app, f"/v1/{kind}", **body, stream=True))
    texts = [(c["delta"].get("content") or "") if "delta" in c else c["text"] for c in parts]
    assert "".join(texts) == (whole["message"]["content"] if "message" in whole else whole["text"]) != ""
    assert [c["finish_reason"] for c in parts] == [None] * (len(parts) - 1) + [whole["finish_reason"]]
    assert parts[-1].get("delta", {}) == {} and parts[-1].get("text", "") == ""


def test_a_seed_of_minus_one_is_another_one_each_time(app):
    answers = {
        post(app, "/v1/completions", prompt=PROMPT, seed=-1, max_tokens=12).body.split(b'"text":')[1] for _ in range(4)
    }
    assert len(answers) > 1
    same = {
        post(app, "/v1/completions", prompt=PROMPT, seed=-2, max_tokens=12).json()["choices"][0]["text"]
        for _ in range(3)
    }
    assert len(same) == 1


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_a_limit_of_minus_one_is_none(app, name):
    """An answer then goes on to the end of the context, 512 tokens, or to its own end."""
    reply = post(app, "/v1/chat/completions", messages=CHAT, temperature=0, **{name: -1}).json()
    assert reply["choices"][0]["finish_reason"] == "stop" or reply["usage"]["total_tokens"] == 512
    if name == "max_tokens":
        reply = post(app, "/v1/completions", prompt=PROMPT, temperature=0, ignore_eos=True, max_tokens=-1).json()
        assert reply["usage"]["total_tokens"] == 512


def test_a_prompt_beyond_the_context_is_refused_in_the_words_that_clients_look_for(app):
    for path, body in (
        ("/v1/completions", {"prompt": "the " * 600}),
        ("/v1/completions", {"prompt": PROMPT, "max_tokens": 600}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "the " * 600}]}),
    ):
        reply = post(app, path, **body)
        error = reply.json()["error"]
        assert (reply.status, error["code"]) == (400, "context_length_exceeded")
        assert "maximum context length is 512 tokens" in error["message"]


OTHERS = [
    {"messages": [{"type": "text", "role": "user", "content": "hello"}]},
    {"stop": [f"stop {i}" for i in range(40)]},
    {"ban_eos_token": True, "ignore_eos": True},
    {"legacy_api": False, "tfs_z": 1, "cache_prompt": True, "trim_stop": True, "grammar": "", "logit_bias": []},
]


@pytest.mark.parametrize("more", OTHERS, ids=lambda more: next(iter(more)))
def test_fields_of_other_programs_that_change_nothing_are_taken(app, more):
    assert post(app, "/v1/chat/completions", **{"messages": CHAT, "max_tokens": 2, **more}).status == 200


def test_those_that_would_change_something_are_refused_by_name(app):
    for more, words in (
        ({"messages": [{"type": "image", "role": "user", "content": "x"}]}, "messages[0].type"),
        ({"ban_eos_token": True}, "ban_eos_token is read only where it repeats ignore_eos"),
        ({"grammar": "root ::= x"}, "grammar is not supported"),
        ({"max_tokens": -2}, "max_tokens is -2"),
    ):
        reply = post(app, "/v1/chat/completions", **{"messages": CHAT, "max_tokens": 2, **more})
        assert reply.status == 400 and words in reply.json()["error"]["message"]


@pytest.mark.parametrize("prompt", ["", [5], ["KING", "KING"]], ids=str)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_prompt_of_one_token_is_scored(app, prompt, stream):
    body = {"prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 2, "stream": stream}
    reply = post(app, "/v1/completions", **body)
    assert reply.status == 200
    found = chunks(reply) if stream else reply.json()["choices"]
    scored = [c["logprobs"]["token_logprobs"] for c in found if c["logprobs"]]
    assert scored and all(values[0] is None for values in scored)
