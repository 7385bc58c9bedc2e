"""One turn of a chat: messages and settings -> the prompt's ids, and the options of `generate` for its answer.

The only place that knows how much room an answer gets, how long it may be and what ends it; the terminal, the page and the API
call it. Knows no engine, no terminal, no page and no HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from neox_lite import GenerationConfig, GPTNeoXTokenizerFast
from neox_lite.errors import ContextLengthError

from .prompt_forms import Form, Messages, Reader

MIN_ANSWER = 512  # tokens that old turns make room for where nobody asks for a number, at most a quarter of the context


class ChatModel(Protocol):
    """What a turn needs to know of a model. context: tokens that a sequence may hold."""

    @property
    def tokenizer(self) -> GPTNeoXTokenizerFast: ...
    @property
    def generation_config(self) -> GenerationConfig: ...
    @property
    def context(self) -> int: ...


@dataclass(frozen=True)
class Turn:
    """An answer that is to be written: its prompt, and how.

    options: those of `generate`. dropped: how many of the oldest messages do not fit and are not sent. requested_tokens:
    max_new_tokens of the request where that is more than fits, else None.
    """

    form: Form
    ids: list[int]
    options: dict[str, Any]
    open_answer: str | None = None
    dropped: int = 0
    requested_tokens: int | None = None

    def reader(self) -> Reader:
        """Turns the model's text into the answer."""
        return self.form.reader(self.open_answer)

    @property
    def notes(self) -> list[str]:
        """What people are to know before the answer, a line each."""
        return [text for text in (dropped_note(self.dropped), self.capped_note) if text is not None]

    @property
    def capped_note(self) -> str | None:
        """That the answer may be no longer than fits, where more was requested."""
        if self.requested_tokens is None:
            return None
        room = self.options["max_new_tokens"]
        return f"max_new_tokens is {self.requested_tokens}, but the context has room for {room} after the prompt"


def dropped_note(dropped: int) -> str | None:
    """What people are to see in place of so many messages that are not sent."""
    return f"context full: the oldest {dropped} messages are no longer sent to the model" if dropped else None


def prepare(
    model: ChatModel,
    form: Form,
    messages: Messages,
    options: Mapping[str, Any],
    system: str | None = None,
    open_answer: str | None = None,
    *,
    strict: bool = False,
    constrained: bool = False,
) -> Turn:
    """The turn that answers the last of the messages, or goes on with `open_answer`.

    options: of `generate`, as far as they are given; max_new_tokens is cut down to what fits, and without it an answer may fill
    the context. strict: nothing is dropped and nothing is cut down, as the OpenAI API has it: who submits the job refuses what
    does not fit. constrained: the answer is text of a grammar, which may hold the form's own stop texts.
    Raises ContextLengthError where the last turn alone leaves no room for an answer.
    """
    tokenizer, context, config = model.tokenizer, model.context, model.generation_config
    given = dict(options)

    # 1. The prompt.
    def encode(part: Messages) -> list[int]:
        return form.encode(tokenizer, part, system, open_answer)

    requested = given.get("max_new_tokens")
    dropped, ids = (
        (0, encode(messages)) if strict else fit(messages, context, room_for_answer(requested, context), encode)
    )
    # 2. What ends the answer.
    if "eos_token_id" not in given:
        given["eos_token_id"] = sorted({*end_ids(given, config), *form.stop_ids(tokenizer)})
    own = [] if constrained else [*form.stops, *_several(config.stop_strings)]
    given["stop_strings"] = list(dict.fromkeys([*own, *given.pop("stop", []), *given.get("stop_strings", [])]))
    # 3. How long it may be.
    fits = context - len(ids)
    if not strict:
        given["max_new_tokens"] = fits if requested is None else min(requested, fits)
    capped = requested is not None and requested > fits and not strict
    return Turn(form, ids, given, open_answer, dropped, requested if capped else None)


def end_ids(options: Mapping[str, Any], config: GenerationConfig) -> list[int]:
    """Ids that end a text: as the options say, else generation_config.json's."""
    return _several(options.get("eos_token_id", config.eos_token_id))


def _several(value: Any) -> list[Any]:
    """A setting that holds nothing, one value or several, as several."""
    return [] if value is None else [value] if isinstance(value, int | str) else list(value)


def room_for_answer(requested: int | None, context: int) -> int:
    """Tokens that the prompt leaves to the answer: as many as requested, at most half of the context."""
    return min(MIN_ANSWER, context // 4) if requested is None else min(requested, context // 2)


def fit(messages: Messages, context: int, room: int, encode: Callable[[Messages], list[int]]) -> tuple[int, list[int]]:
    """Drop the oldest whole turns (a user's message and its answer) until the prompt leaves `room` tokens of the context.

    messages: of alternating roles, a user's first. encode: ids of the whole prompt made of them, the system text included.
    Returns how many messages are dropped, and the prompt of the others. Some turns go together, so that the next prompts begin
    like this one, and what is in the KV cache serves them. The last turn always stays: where it alone is longer, the answer has
    what is left of the context; where nothing is left, ContextLengthError says so with the numbers.
    """
    most = context - room
    ids = encode(messages)
    if len(ids) <= most:
        return 0, ids
    steps = _steps(messages, most)
    few, many = 0, len(steps) - 1
    ids = encode(messages[2 * steps[many] :])
    if len(ids) >= context:
        raise ContextLengthError(
            f"the last message takes {len(ids)} tokens with the system text, and the context has room for {context - 1} "
            "before an answer; shorten it"
        )
    # `many` is known to be enough, or all that can be done.
    while few < many and len(ids) <= most:
        middle = (few + many) // 2
        if len(found := encode(messages[2 * steps[middle] :])) <= most:
            many, ids = middle, found
        else:
            few = middle + 1
    return 2 * steps[many], ids


def _steps(messages: Messages, most: int) -> list[int]:
    """How many turns may be dropped: whenever they hold as many bytes more as the prompt may have tokens, and all but the last.

    A token has three or four bytes, so that is a quarter of the context or so, and the same turns whatever comes later.
    """
    turns, size, steps = max(0, len(messages) - 1) // 2, 0, []
    for turn in range(1, turns):
        full = size // max(most, 1)
        size += sum(len(message["content"].encode()) for message in messages[2 * turn - 2 : 2 * turn])
        if size // max(most, 1) > full:
            steps.append(turn)
    return [*steps, turns]
