"""Prompt forms: how a model wants a conversation written down, and where its answer ends. Knows no engine and no page.

The family's checkpoints are older than chat templates, so their forms stand in a table here, with the strings of their model
cards. A tokenizer's own chat_template comes before the table, and a form that is chosen by name before both.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken

from neox_lite.errors import ArgumentError, NeoxLiteError
from neox_lite.tokenizer import GPTNeoXTokenizerFast, check_text

from .templates import TemplateError, render_template
from .written_tokens import Hiding, counts, encode_parts, open_end, unused

MAX_RENDERS = 256  # of a prompt, to find the special tokens that people wrote
Messages = Sequence[Mapping[str, str]]  # {"role": "user" | "assistant" | "system", "content": text}
ROLES = ("user", "assistant", "system")
TEMPLATE = "template"  # the name of the form that a tokenizer brings along


class PromptError(NeoxLiteError, ValueError):
    """Messages that a prompt form cannot write down."""


class Form:
    """How a conversation is written as a prompt. stops: texts that end an answer."""

    name: str
    title: str
    stops: tuple[str, ...]
    stop_tokens: tuple[str, ...]
    newline: str = "\n"  # what stands for a line break
    raw: bool = False  # the text goes to the model as it is
    may_change_text: bool = False  # what people wrote does not stand in the prompt letter by letter

    def render(self, messages: Messages, system: str | None = None, open_answer: str | None = None) -> str:
        """The prompt up to where the model is to write. open_answer: the beginning of an answer that it is to continue."""
        for message in messages:
            if message.get("role") not in ROLES or not isinstance(message.get("content"), str):
                found = f"{message.get('role')!r} with a content of {type(message.get('content')).__name__}"
                raise PromptError(f"a message is of the role {found}, expected {', '.join(ROLES)} with a text")
        return self._render(messages, system, open_answer)

    def encode(
        self,
        tokenizer: GPTNeoXTokenizerFast,
        messages: Messages,
        system: str | None = None,
        open_answer: str | None = None,
    ) -> list[int]:
        """The prompt as ids: the form's own special tokens are that, and what looks like one in a text is plain text."""
        if self.raw:
            ids: list[int] = tokenizer(self.render(messages, system, open_answer)).input_ids
            return ids
        control = self._control(tokenizer)
        texts = [*(str(message.get("content")) for message in messages), system or "", open_answer or ""]
        hiding = Hiding(control, texts)
        prompt = check_text(self.render(messages, system, open_answer), "prompt")
        hidden = [{**message, "content": hiding.hide(message.get("content"))} for message in messages]
        own_system, own_answer = hiding.hide(system), hiding.hide(open_answer)
        # 1. The prompt, in which what people wrote is hidden while it is rendered, or shown to a template that looks at it.
        choices = [[(prompt, True)]]
        if hiding.found:
            choices = [list(hiding.parts(self.render(hidden, own_system, own_answer)))]
            if "".join(text for text, _ in choices[0]) != prompt:
                choices.insert(0, self._parts_one_by_one(prompt, control, messages, system, open_answer))
        # 2. The one that has no special token but the form's own.
        if self.may_change_text:
            own = self._own_tokens(control, messages, system, open_answer)
            choices = [parts for parts in choices if own is None or not counts(control, parts) - own]
            if not choices:
                raise PromptError(
                    "the chat template makes a special token of what somebody wrote; take out what looks like one, or choose "
                    "another form"
                )
        if choices[0] == [(prompt, True)]:
            return list(tokenizer.encode(prompt, add_special_tokens=False))
        return encode_parts(tokenizer, control, iter(choices[0]))

    def _own_tokens(
        self, control: Mapping[str, AddedToken], messages: Messages, system: str | None, open_answer: str | None
    ) -> Counter[str] | None:
        """How many of each special token the form itself writes around texts that can write none; None: these cannot anyway."""
        signs = {char for token in control for char in token if not char.isalnum()}
        texts = [*(message["content"] for message in messages), system or "", open_answer or ""]
        if not any(char in text for text in texts for char in signs):
            return None
        others = dict(zip(sorted(signs), unused("".join(texts), len(signs)), strict=True))
        table = str.maketrans(others)
        turns = [{**message, "content": message["content"].translate(table)} for message in messages]
        answer = None if open_answer is None else open_answer.translate(table)
        return counts(control, [(self.render(turns, system and system.translate(table), answer), True)])

    def _parts_one_by_one(
        self,
        prompt: str,
        control: Mapping[str, AddedToken],
        messages: Messages,
        system: str | None,
        open_answer: str | None,
    ) -> list[tuple[str, bool]]:
        """The prompt as (text, whether it may hold special tokens): a token that somebody wrote shows where signs in its place
        come out. One that does not show, because the template looks at it, is looked for message by message."""
        texts = [*(message["content"] for message in messages), system or "", open_answer or ""]
        (sign,) = unused(prompt + "".join(texts), 1)
        tokens = sorted(control, key=len, reverse=True)
        plain, renders = bytearray(len(prompt)), 0

        def mark(token: str, pattern: str, where: list[int]) -> bool:
            """Whether signs in place of a token in some texts come out as they went in."""
            nonlocal renders
            renders += 1
            marks = sign * len(token)
            changed = [re.sub(pattern, marks, text) if i in where else text for i, text in enumerate(texts)]
            turns = [{**m, "content": c} for m, c in zip(messages, changed, strict=False)]
            found = self.render(turns, changed[-2] or system, changed[-1] if open_answer is not None else None)
            if found.replace(marks, token) != prompt:
                return False
            for match in re.finditer(re.escape(marks), found):
                plain[match.start() : match.end()] = b"\1" * len(token)
            return True

        for token in tokens:
            where = [i for i, text in enumerate(texts) if token in text]
            if where and not mark(token, re.escape(token), where) and len(where) > 1:
                for i in where if renders + len(where) <= MAX_RENDERS else ():
                    mark(token, re.escape(token), [i])
        # Also the beginning of a token at the end of a text, which the form could complete.
        for i, text in enumerate(texts):
            if (size := open_end(text, tokens)) and renders < MAX_RENDERS:
                mark(text[-size:], rf"{re.escape(text[-size:])}\Z", [i])
        runs = re.finditer(rb"\x00+|\x01+", bytes(plain))
        return [(prompt[run.start() : run.end()], not plain[run.start()]) for run in runs]

    def stop_ids(self, tokenizer: GPTNeoXTokenizerFast) -> list[int]:
        """Ids that end an answer: the form's own, and the tokenizer's end of text."""
        found = [tokenizer.backend_tokenizer.token_to_id(token) for token in self.stop_tokens]
        return sorted({index for index in (*found, tokenizer.eos_token_id) if index is not None})

    def reader(self, open_answer: str | None = None) -> Reader:
        """Turns the model's text into an answer."""
        return Reader(self.newline, begun=bool(open_answer), raw=self.raw)

    def _render(self, messages: Messages, system: str | None, open_answer: str | None) -> str:
        raise NotImplementedError

    def _own_text(self) -> str:
        """Text that holds all that the form itself writes."""
        raise NotImplementedError

    def _control(self, tokenizer: GPTNeoXTokenizerFast) -> dict[str, AddedToken]:
        """The tokens that people's texts must not be able to write; not those of whitespace and plain words."""
        own = self._own_text()
        return {
            token.content: token
            for token in tokenizer.added_tokens_decoder.values()
            if token.content.strip() not in ("", self.newline)
            and (token.special or (token.content in own and not token.content.isalnum()))
        }


class Around(NamedTuple):
    """What stands before and after a text."""

    before: str
    after: str


_LINE = Around("", "\n")


@dataclass(frozen=True)
class TurnForm(Form):
    """A form that writes every turn alike. gap: between the answer's beginning and its text, written by the model itself.

    default_system: the text for where none is given. ids: pattern of the hub ids and folder names it belongs to; tokens: those
    that tell its tokenizer from others.
    """

    name: str
    title: str
    user: Around
    answer: Around
    gap: str = ""
    system: Around = _LINE
    default_system: str = ""
    stops: tuple[str, ...] = ()
    stop_tokens: tuple[str, ...] = ()
    newline: str = "\n"
    raw: bool = False
    ids: str = "(?!)"
    tokens: tuple[str, ...] = ()

    def _render(self, messages: Messages, system: str | None, open_answer: str | None) -> str:
        if not any(message["role"] == "system" for message in messages):
            system = system or self.default_system
        parts = [self._turn("system", system)] if system else []
        parts += [self._turn(message["role"], message["content"]) for message in messages]
        end = self._text(open_answer or "")
        return "".join([*parts, self.answer.before, self.gap if end else "", end])

    def _turn(self, role: str, text: str) -> str:
        around = {"user": self.user, "assistant": self.answer, "system": self.system}[role]
        gap = self.gap if role == "assistant" and text else ""
        return f"{around.before}{gap}{self._text(text)}{around.after}"

    def _text(self, text: str) -> str:
        return text if self.newline == "\n" else text.replace("\n", self.newline)

    def _own_text(self) -> str:
        return "\n".join([*self.user, *self.answer, *self.system])


class TemplateForm(Form):
    """The chat_template of a tokenizer, rendered by templates.py."""

    name = TEMPLATE
    title = "The model's own chat template"
    may_change_text = True

    def __init__(self, template: str, tokens: Mapping[str, str]) -> None:
        """tokens: bos_token and the like, which templates write themselves."""
        self._template, self._tokens = template, dict(tokens)

    @classmethod
    def of(cls, tokenizer: GPTNeoXTokenizerFast) -> TemplateForm:
        if tokenizer.chat_template is None:
            raise ArgumentError(f"{tokenizer.name_or_path} has no chat template; choose {', '.join(FORMS)}")
        return cls(tokenizer.chat_template, tokenizer.special_tokens_map)

    @property
    def stops(self) -> tuple[str, ...]:  # type: ignore[override]
        """What ends an answer as text: that token, or all that stands between an answer and the next message.

        A line break before it belongs to it: an answer may well hold "User:" in the middle of a line.
        """
        between = self._between.strip()
        space = self._between[: self._between.find(between)]
        return self.stop_tokens or (("\n" * ("\n" in space) + between,) if len(between) > 2 else ())

    @cached_property
    def stop_tokens(self) -> tuple[str, ...]:  # type: ignore[override]
        """The token that ends an answer: what looks like one after it."""
        found = re.match(r"\s*(<[^<>\s]{1,40}>|\[[^\[\]\s]{1,40}\])", self._between)
        return (found[1],) if found else ()

    @cached_property
    def _between(self) -> str:
        first, second = unused("", 2)
        talk = [("user", "hello"), ("assistant", first), ("user", second)]
        try:
            text = self._render([{"role": role, "content": content} for role, content in talk], None, None)
        except TemplateError:  # rendering a prompt raises it
            return ""
        after = text.partition(first)[2]
        return after.partition(second)[0] if second in after else ""

    def _render(self, messages: Messages, system: str | None, open_answer: str | None) -> str:
        turns = [dict(message) for message in messages]
        if system:
            turns.insert(0, {"role": "system", "content": system})
        given = {"messages": turns, "tools": None, "documents": None, "add_generation_prompt": open_answer is None}
        variables: dict[str, Any] = {**self._tokens, **given}
        if open_answer is None:
            return render_template(self._template, variables)
        (mark,) = unused("".join(turn["content"] for turn in turns) + open_answer, 1)
        # The mark also protects whitespace that a template would trim.
        turns.append({"role": "assistant", "content": open_answer + mark})
        text, found, _ = render_template(self._template, variables).rpartition(mark)
        if not found:
            raise PromptError("the chat template does not show the answer that is to be continued; choose another form")
        return text.replace(mark, "")

    def _own_text(self) -> str:
        return "\n".join([self._template, *self._tokens.values()])


# Known forms -----------------------------------------------------------------------------------------------------------

_INTRO = "Below is an instruction that describes a task. Write a response that appropriately completes the request."  # Dolly's
_STABLELM = """\
# StableLM Tuned (Alpha version)
- StableLM is a helpful and harmless open-source AI language model developed by StabilityAI.
- StableLM is excited to be able to help the user, but will refuse to do anything that could be considered harmful to the user.
- StableLM is more than just an information source, StableLM is also able to write poetry, short stories, and make jokes.
- StableLM will refuse to participate in anything that could harm a human."""
_HUMAN_BOT = TurnForm(
    "human-bot",
    "<human>: / <bot>: (GPT-NeoXT-Chat, RedPajama-INCITE-Chat)",
    user=Around("<human>: ", "\n"),
    answer=Around("<bot>:", "\n"),
    gap=" ",
    stops=("\n<human>:", "<human>:"),
    ids="gpt-neoxt-chat|pythia-chat|redpajama-incite.*chat",
)
_JAPANESE = TurnForm(
    "japanese",
    "ユーザー: / システム: (LINE, rinna bilingual)",
    user=Around("ユーザー: ", "\n"),
    answer=Around("システム: ", "\n"),
    stops=("\nユーザー:",),
    ids="japanese-large-lm.*instruct|bilingual-gpt-neox.*instruct",
)

# The first whose pattern fits a name, then the first whose tokens a tokenizer has, else `dialogue`.
_TABLE = (
    TurnForm(
        "dialogue",
        "User: / Assistant: (base models)",
        user=Around("User: ", "\n"),
        answer=Around("Assistant:", "\n"),
        gap=" ",
        system=Around("", "\n\n"),
        default_system="A conversation between a user and a helpful assistant.",
        stops=("\nUser:", "\nAssistant:"),
    ),
    TurnForm("completion", "The text itself (base models)", Around("", ""), Around("", ""), raw=True),
    _HUMAN_BOT,
    TurnForm(
        "question-answer",
        "Q: / A: (RedPajama-INCITE-Instruct)",
        user=Around("Q: ", "\n"),
        answer=Around("A:", "\n"),
        gap=" ",
        stops=("\nQ:",),
        ids="redpajama-incite.*instruct",
    ),
    TurnForm(
        "dolly",
        "### Instruction: / ### Response: (Dolly v2)",
        user=Around("### Instruction:\n", "\n\n"),
        answer=Around("### Response:\n", "\n\n### End\n\n"),
        system=Around("", "\n\n"),
        default_system=_INTRO,
        stops=("### End", "### Instruction:"),
        stop_tokens=("### End",),
        ids="dolly",
        tokens=("### End", "### Instruction:"),
    ),
    replace(
        _HUMAN_BOT,
        name="h2ogpt",
        title="<human>: / <bot>: (h2oGPT)",
        stops=("\n<human>:", "<human>:", "\n<bot>:", "<bot>:"),
        ids="h2ogpt(?!-gm)",
    ),
    TurnForm(
        "h2ogpt-gm",
        "<|prompt|> / <|answer|> (h2oGPT GM)",
        user=Around("<|prompt|>", "<|endoftext|>"),
        answer=Around("<|answer|>", "<|endoftext|>"),
        stops=("<|prompt|>",),
        stop_tokens=("<|prompt|>",),
        ids="h2ogpt-gm",
        tokens=("<|prompt|>", "<|answer|>"),
    ),
    TurnForm(
        "oasst",
        "<|prompter|> / <|assistant|> (OpenAssistant)",
        user=Around("<|prompter|>", "<|endoftext|>"),
        answer=Around("<|assistant|>", "<|endoftext|>"),
        system=Around("<|system|>", "<|endoftext|>"),
        stops=("<|prompter|>",),
        stop_tokens=("<|prompter|>",),
        ids="oasst|openassistant",
        tokens=("<|prompter|>", "<|assistant|>"),
    ),
    TurnForm(
        "stablelm",
        "<|USER|> / <|ASSISTANT|> (StableLM tuned alpha)",
        user=Around("<|USER|>", ""),
        answer=Around("<|ASSISTANT|>", ""),
        system=Around("<|SYSTEM|>", "\n"),
        default_system=_STABLELM,
        stops=("<|USER|>",),
        stop_tokens=("<|USER|>", "<|ASSISTANT|>", "<|SYSTEM|>", "<|padding|>", "<|endoftext|>"),
        ids="stablelm-tuned-alpha",
        tokens=("<|USER|>", "<|ASSISTANT|>"),
    ),
    _JAPANESE,
    replace(  # its tokenizer has no line break
        _JAPANESE,
        name="rinna",
        title="ユーザー: / システム: with <NL> (rinna 3.6b)",
        user=Around("ユーザー: ", "<NL>"),
        answer=Around("システム: ", "<NL>"),
        system=Around("", "<NL>"),
        newline="<NL>",
        stops=("<NL>ユーザー:",),
        ids="japanese-gpt-neox.*instruct",
    ),
)
FORMS: Mapping[str, TurnForm] = {form.name: form for form in _TABLE}


def form_of(name_or_folder: str, tokenizer: GPTNeoXTokenizerFast, choice: str | None = None) -> Form:
    """The form of a model: the chosen one, else its chat template, else the table's by its name or its tokens."""
    if choice is not None:
        return form_named(choice, tokenizer)
    if tokenizer.chat_template is not None:
        return TemplateForm.of(tokenizer)
    name, vocabulary = _name(name_or_folder), tokenizer.get_vocab()
    by_name = (form for form in _TABLE if re.search(form.ids, name))
    by_tokens = (form for form in _TABLE if form.tokens and all(token in vocabulary for token in form.tokens))
    return next(by_name, None) or next(by_tokens, FORMS["dialogue"])


def form_named(name: str, tokenizer: GPTNeoXTokenizerFast) -> Form:
    """A form by its name in `names`."""
    check_name(name)
    return TemplateForm.of(tokenizer) if name == TEMPLATE else FORMS[name]


def check_name(name: str) -> None:
    """Refuse what is no form's name, also before there is a tokenizer."""
    if name not in (*FORMS, TEMPLATE):
        raise ArgumentError(f"prompt form: found {name[:100]!r}, expected one of {', '.join([*FORMS, TEMPLATE])}")


def names(tokenizer: GPTNeoXTokenizerFast | None = None) -> list[tuple[str, str]]:
    """(title, name) of every form that can be chosen."""
    own = [(TemplateForm.title, TEMPLATE)] if tokenizer is not None and tokenizer.chat_template is not None else []
    return [*own, *((form.title, form.name) for form in _TABLE)]


def _name(name_or_folder: str) -> str:
    """The model's name, in lower case: of a hub id or a folder, also of the hub cache, whose folders are commits."""
    path = Path(name_or_folder).expanduser()
    path = path.resolve() if path.is_dir() else path
    commit = re.fullmatch("[0-9a-f]{40}", path.name)
    return (path.parent.parent if commit else path).name.lower()


# Answers ---------------------------------------------------------------------------------------------------------------


class Reader:
    """Turns the model's text into an answer, piece by piece: without space around it, and with line breaks as they are."""

    def __init__(self, newline: str = "\n", begun: bool = False, raw: bool = False) -> None:
        """begun: the text goes on from one that is there already."""
        self._newline, self._begun, self._raw, self._held = newline, begun, raw, ""

    def put(self, piece: str) -> str:
        """What is certain to be shown after one more piece; space at the end may be the last of all, and waits."""
        if self._raw:
            return piece
        text = (self._held + piece).replace(self._newline, "\n")
        text = text if self._begun else text.lstrip()
        sure = text[: len(text) - open_end(text, [self._newline])].rstrip()
        self._begun = self._begun or bool(sure)
        self._held = text[len(sure) :]
        return sure

    def end(self, finish_reason: str | None) -> str:
        """What was held back: after a "stop", no space."""
        held, self._held = self._held, ""
        return held.rstrip() if finish_reason == "stop" else held
