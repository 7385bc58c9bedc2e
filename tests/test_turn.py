"""One turn of a chat: what fits, what ends an answer and how long it may be, and that all three chats agree."""

import asyncio
from types import SimpleNamespace

import pytest
from support.serving import application, ask_json

from neox_lite import GenerationConfig, GPTNeoXForCausalLM, GPTNeoXTokenizerFast
from neox_lite.errors import ContextLengthError
from neox_lite_app.conversations.conversation import Conversation, Store
from neox_lite_app.conversations.prompt_forms import FORMS, TemplateForm
from neox_lite_app.conversations.turn import fit, prepare, room_for_answer
from neox_lite_app.paths import DEMO
from neox_lite_app.serving.engine import Engine
from neox_lite_app.session import Session

TOKENIZER = GPTNeoXTokenizerFast.from_pretrained(DEMO)
FORM = FORMS["dialogue"]
QUESTION = [{"role": "user", "content": "Who art thou?"}]


def model(context=512, **settings):
    return SimpleNamespace(tokenizer=TOKENIZER, generation_config=GenerationConfig(**settings), context=context)


# What fits -------------------------------------------------------------------------------------------------------------


def words(messages):
    """As many ids as words, and two of a system text."""
    return [0] * (sum(len(message["content"].split()) for message in messages) + 2)


def talk(turns, *, answered=False):
    conversation = Conversation()
    for number in range(turns):
        conversation.append("user", f"question {number}")
        if answered or number < turns - 1:
            conversation.append("assistant", "an answer of five words")
    return conversation.chat()


@pytest.mark.parametrize("answered", [False, True])
@pytest.mark.parametrize("most", [9, 10, 16, 17, 150, 283, 284])
def test_the_oldest_turns_are_dropped_until_the_rest_fits(most, answered):
    messages = talk(40, answered=answered)
    dropped, ids = fit(messages, most + 5, 5, words)
    assert ids == words(messages[dropped:]) and len(ids) <= most and messages[dropped]["role"] == "user"
    if dropped:
        assert most < 150 or len(ids) > 0.7 * most  # not many more than must be
    assert (dropped == 0) == (len(words(messages)) <= most)


def test_what_is_dropped_is_the_same_for_several_turns():
    """Prompts that begin alike are computed once, so the beginning must not move with every turn."""
    dropped = [fit(talk(turns), 160, 10, words)[0] for turns in range(40, 100)]
    assert dropped == sorted(dropped) and dropped[0] > 0
    assert len(set(dropped)) <= 60 / 4 and len(set(dropped)) > 5


def test_a_long_last_message_stays_alone_and_leaves_the_rest_to_the_answer():
    messages = [*talk(3)[:-1], {"role": "user", "content": "much " * 50}]
    assert fit(messages, 60, 20, words) == (4, words(messages[4:]))
    with pytest.raises(ContextLengthError, match=r"takes 52 tokens .* room for 51"):
        fit(messages, 52, 20, words)


def test_long_chats_are_counted_a_few_times_only():
    calls = []
    fit(talk(1000), 60, 10, lambda messages: calls.append(1) or words(messages))
    assert len(calls) < 14


def test_an_answer_has_room_as_asked_up_to_half_of_the_context():
    assert [room_for_answer(asked, 2048) for asked in (None, 16, 4096)] == [512, 16, 1024]
    assert room_for_answer(None, 512) == 128


# The turn --------------------------------------------------------------------------------------------------------------


def test_an_answer_ends_at_the_ids_and_texts_of_the_form_of_the_file_and_of_the_request():
    own = model(eos_token_id=[0, 7], stop_strings="END")
    options = prepare(own, FORM, QUESTION, {"stop": ["x", "END"]}).options
    assert options["eos_token_id"] == [0, 7] and options["stop_strings"] == ["\nUser:", "\nAssistant:", "END", "x"]
    assert prepare(own, FORM, QUESTION, {"eos_token_id": []}).options["eos_token_id"] == []
    assert prepare(own, FORM, QUESTION, {"stop": ["x"]}, constrained=True).options["stop_strings"] == ["x"]


def test_the_cap_is_the_smaller_of_what_was_asked_and_what_fits():
    prompt = len(prepare(model(), FORM, QUESTION, {}).ids)
    for asked, cap in ((None, 512 - prompt), (9, 9), (512 - prompt, 512 - prompt), (4096, 512 - prompt)):
        turn = prepare(model(), FORM, QUESTION, {"max_new_tokens": asked} if asked else {})
        assert turn.options["max_new_tokens"] == cap and (turn.requested_tokens is not None) == (asked == 4096)
    assert turn.notes == [f"max_new_tokens is 4096, but the context has room for {512 - prompt} after the prompt"]


def test_a_strict_turn_is_sent_as_it_is():
    long = [{"role": "user", "content": "word " * 1000}]
    turn = prepare(model(), FORM, long, {"max_new_tokens": 4096}, strict=True)
    assert len(turn.ids) > 512 and turn.options["max_new_tokens"] == 4096 and turn.notes == []


def test_words_of_a_template_end_an_answer_only_at_the_beginning_of_a_line():
    template = "{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}\n{% endfor %}Assistant:"
    turn = prepare(model(), TemplateForm(template, {}), QUESTION, {})
    assert turn.options["stop_strings"] == ["\nUser:"]


# The terminal, the page and the API ------------------------------------------------------------------------------------

DOORS = ["terminal", "page", "api"]


@pytest.fixture(scope="module")
def engine():
    engine = Engine()
    loaded = GPTNeoXForCausalLM.from_pretrained(DEMO, device_map="cpu")
    # The third token of the greedy answer ends a text too, as a further end of generation_config.json does.
    greedy = loaded.generate(
        TOKENIZER(FORM.render(QUESTION), return_tensors="pt").input_ids, max_new_tokens=3, stop_strings=list(FORM.stops)
    )
    loaded.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=[0, int(greedy[0, -1])], top_k=40)
    engine.load(str(DEMO), lambda: loaded)
    yield engine
    engine.close()


@pytest.fixture
def say(engine, tmp_path, monkeypatch):
    """Ask one of the three for an answer -> (its sequence, None where it was refused; notes)."""
    tickets, submit = [], engine.submit
    monkeypatch.setattr(engine, "submit", lambda job: tickets.append(submit(job)) or tickets[-1])

    def answer(door, **settings):
        notes = {"terminal": in_terminal, "page": on_page, "api": over_api}[door](engine, settings, tmp_path)
        sequence = tickets[-1]._sequence if tickets else None
        return sequence, notes

    return answer


def in_terminal(engine, settings, folder):
    session = Session(engine, FORM, Conversation(), settings)
    session.say(QUESTION[0]["content"])
    list(session.answer())
    return session.notes


def on_page(engine, settings, folder):
    chat = pytest.importorskip("neox_lite_app.page.chat")
    events = pytest.importorskip("neox_lite_app.page.events")
    conversation = Conversation()
    conversation.append("user", QUESTION[0]["content"])
    answer = conversation.append("assistant")
    asked = chat.ChatRequest({"do_sample": settings["temperature"] > 0, **settings}, FORM.name, "tab")

    async def notices():
        updates = chat.Chat(engine, Store(folder), events.Running()).answer(conversation, answer, asked)
        return [update["notice"] async for update in updates if "notice" in update]

    return asyncio.run(notices())


def over_api(engine, settings, folder):
    body = {"messages": QUESTION, **settings}
    if (tokens := body.pop("max_new_tokens", None)) is not None:
        body["max_tokens"] = tokens
    reply = asyncio.run(ask_json(application(engine), "/v1/chat/completions", body))
    return [reply.json()["error"]["code"]] if reply.status != 200 else []


@pytest.mark.parametrize("door", DOORS)
def test_ends_and_top_k_of_generation_config_hold_for_an_answer(say, door):
    sequence, _ = say(door, temperature=0)
    assert len(sequence.tokens) == 3 and sequence.finish_reason == "stop"
    assert set(FORM.stops) == set(sequence.options.stop_strings)
    sequence, _ = say(door, temperature=0.8, max_new_tokens=2)
    assert sequence.options.sampling.top_k == 40


@pytest.mark.parametrize("door", DOORS)
def test_more_new_tokens_than_fit_are_cut_down_in_a_chat_and_refused_by_the_api(say, door):
    sequence, (note,) = say(door, temperature=0, max_new_tokens=4096)
    if door == "api":
        assert sequence is None and note == "context_length_exceeded"
    else:
        assert len(sequence.prompt) + sequence.max_tokens == 512
        assert f"has room for {sequence.max_tokens} after the prompt" in note
