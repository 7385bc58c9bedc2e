"""Bodies of OpenAI-compatible requests -> checked values under the engine's names. Knows no HTTP, no engine and no model.

Every field has a type and bounds, and an error names the field. What other programs send beside the
fields of the API stands in the tables of foreign_fields.py; anything else is refused by name.
"""

from __future__ import annotations

import difflib
import json
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from neox_lite.errors import NeoxLiteError
from neox_lite.files import parse_json
from neox_lite.generation.parameters import BY_NAME, NUMBERS, SAMPLED, Parameter

from .foreign_fields import HARMLESS, OFF_ONLY, REPEATED

MAX_DEPTH = 100  # of arrays and objects in a body
MAX_STOPS = 64
MAX_ANSWERS = 128  # prompts times n
MAX_MESSAGES = 4096
MAX_BIASES = 1024
MAX_SCHEMA = 1 << 16  # characters of a JSON schema
MAX_REGEX = 1 << 12
MAX_TOP = 20  # likeliest tokens beside each token
DEFAULT_MAX_TOKENS = 16  # of /v1/completions, as OpenAI's
INVALID = "invalid_request_error"

Check = Callable[[str, Any], Any]


class RequestError(NeoxLiteError):
    """A request that cannot be answered, in OpenAI's terms: HTTP status, the field at fault, and a code for programs."""

    def __init__(
        self, message: str, param: str | None = None, code: str | None = None, status: int = 400, type: str = INVALID
    ) -> None:
        super().__init__(message)
        self.param, self.code, self.status, self.type = param, code, status, type


@dataclass(frozen=True)
class Constraint:
    """What the text of an answer must be. kind: "json" (text is a JSON schema) or "regex"; param: the field that asked."""

    kind: str
    text: str
    param: str


@dataclass(frozen=True)
class GenerationRequest:
    """A request's fields, checked. options: those of the engine's Job that come from the request alone."""

    model: str | None
    options: Mapping[str, Any]
    max_tokens: int | None
    n: int
    seed: int | None
    stream: bool
    include_usage: bool
    top: int | None  # None, or how many likeliest tokens to report beside each
    user: str
    constraint: Constraint | None
    prompts: Sequence[str | list[int]] = ()  # of /v1/completions
    echo: bool = False
    messages: Sequence[Mapping[str, str]] = ()  # of /v1/chat/completions: role and content
    continue_final_message: bool = False  # the last message is the beginning of the answer


# Checks ---------------------------------------------------------------------------------------------------------------


def _wrong(name: str, value: Any, expected: str) -> NoReturn:
    raise RequestError(f"{name} is {reprlib.repr(value)}, expected {expected}", name)


def _check_size(name: str, value: str | list[Any], unit: str, most: int, least: int = 0) -> None:
    if not least <= len(value) <= most:
        raise RequestError(f"{name} has {len(value)} {unit}, expected {least} to {most}", name)


def integer(low: int, high: int) -> Check:
    def check(name: str, value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            _wrong(name, value, f"an integer from {low} to {high}")
        return value

    return check


def number(low: float, high: float) -> Check:
    def check(name: str, value: Any) -> float:
        if type(value) not in (int, float) or not low <= value <= high:  # NaN is not
            _wrong(name, value, f"a number from {low:g} to {high:g}")
        return float(value)

    return check


def text(longest: int, empty: bool = True) -> Check:
    def check(name: str, value: Any) -> str:
        if not isinstance(value, str):
            _wrong(name, value, "a string")
        _check_size(name, value, "characters", longest, 0 if empty else 1)
        return value

    return check


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        _wrong(name, value, "true or false")
    return value


def array(each: Check, most: int, least: int = 0) -> Check:
    def check(name: str, value: Any) -> list[Any]:
        if not isinstance(value, list):
            _wrong(name, value, "an array")
        _check_size(name, value, "entries", most, least)
        return [each(f"{name}[{index}]", entry) for index, entry in enumerate(value)]

    return check


def one_or_more(each: Check, most: int) -> Check:
    several = array(each, most)
    return lambda name, value: several(name, value) if isinstance(value, list) else [each(name, value)]


def fields(known: Mapping[str, Check]) -> Check:
    """An object with these fields only."""

    def check(name: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            _wrong(name, value, "an object")
        found = {}
        for key, entry in value.items():
            if key not in known:
                raise RequestError(f"{name}.{reprlib.repr(key)[1:-1]} is unknown{_nearest(key, known)}", name)
            if entry is not None:
                found[key] = known[key](f"{name}.{key}", entry)
        return found

    return check


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name[:64], known, 1)
    return f"; did you mean {near[0]}?" if near else ""


def _token_ids(name: str, value: Any) -> list[int]:
    if not isinstance(value, list) or not all(type(i) is int and 0 <= i < 2**31 for i in value):
        _wrong(name, value, "a string or an array of token ids")
    return value


def _prompts(name: str, value: Any) -> list[str | list[int]]:
    """A string, ids, or an array of either."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        _wrong(name, value, "a string, an array of strings, token ids, or an array of arrays of them")
    if all(type(entry) is int for entry in value):
        return [_token_ids(name, value)]
    _check_size(name, value, "entries", MAX_ANSWERS, 1)
    return [e if isinstance(e, str) else _token_ids(f"{name}[{i}]", e) for i, e in enumerate(value)]


def _biases(name: str, value: Any) -> dict[int, float]:
    # Some clients send an empty array for none.
    if value == []:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_BIASES:
        _wrong(name, value, f"an object of at most {MAX_BIASES} token ids and numbers")
    amount, found = number(-100, 100), {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise RequestError(f"{name} has the key {reprlib.repr(key)}, expected a token id", name)
        found[int(key)] = amount(f"{name}.{key}", bias)
    return found


def _schema(name: str, value: Any) -> str:
    """A schema as JSON text; the request may hold it as an object or as a string."""
    if not isinstance(value, dict | bool | str):
        _wrong(name, value, "a JSON schema")
    if isinstance(value, str) and len(value) <= MAX_SCHEMA:
        value = read_json(value, name, name)
    written = value if isinstance(value, str) else json.dumps(value)
    _check_size(name, written, "characters", MAX_SCHEMA)
    return written


_JSON_SCHEMA = fields({"name": text(256), "description": text(8192), "schema": _schema, "strict": flag})


def _response_format(name: str, value: Any) -> Constraint | None:
    known = {"type": text(64), "json_schema": _JSON_SCHEMA}
    given = fields(known)(name, value)
    match given.get("type"):
        case "text":
            return None
        case "json_object":
            return Constraint("json", '{"type":"object"}', name)
        case "json_schema":
            if "schema" not in given.get("json_schema", {}):
                raise RequestError(f"{name}.json_schema.schema is missing", f"{name}.json_schema.schema")
            return Constraint("json", given["json_schema"]["schema"], f"{name}.json_schema.schema")
    _wrong(f"{name}.type", given.get("type"), '"text", "json_object" or "json_schema"')


def _content(name: str, value: Any) -> str:
    """A message's text: a string, or parts of type text."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or len(value) > MAX_MESSAGES:
        _wrong(name, value, "a string or an array of parts of type text")
    texts = []
    for index, part in enumerate(value):
        where = f"{name}[{index}]"
        kind = part.get("type") if isinstance(part, dict) else part
        if kind not in ("text", "input_text"):
            raise RequestError(f"{where}.type is {reprlib.repr(kind)}; these models read text only", f"{where}.type")
        texts.append(text(1 << 20)(f"{where}.text", part.get("text")))
    return "".join(texts)


_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# Beside role and content. OpenAI's own client sends back what it got: refusal, annotations, empty calls; reasoning: Open WebUI;
# type: older lm-evaluation-harness, "text" always.
_BESIDE = {
    "type",
    "name",
    "refusal",
    "annotations",
    "audio",
    "tool_calls",
    "function_call",
    "reasoning",
    "reasoning_content",
}


def _message(name: str, value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        _wrong(name, value, "an object with role and content")
    role = value.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        hint = "; tools are not supported" if role in ("tool", "function") else ""
        raise RequestError(
            f"{name}.role is {reprlib.repr(role)}, expected system, developer, user or assistant{hint}", f"{name}.role"
        )
    for key in value.keys() - {"role", "content"}:
        if key not in _BESIDE:
            raise RequestError(f"{name}.{reprlib.repr(key)[1:-1]} is unknown{_nearest(key, _BESIDE)}", name)
        if key == "type" and value[key] not in ("text", "message"):
            _wrong(f"{name}.type", value[key], '"text" or "message"')
        if key in ("tool_calls", "function_call", "audio") and value[key]:
            raise RequestError(f"{name}.{key}: tools and audio are not supported; leave it out", f"{name}.{key}")
    content = value.get("content")
    if content is None and role != "assistant":
        raise RequestError(f"{name}.content is missing", f"{name}.content")
    return {"role": _ROLES[role], "content": "" if content is None else _content(f"{name}.content", content)}


# The fields -----------------------------------------------------------------------------------------------------------


def _of_parameter(parameter: Parameter) -> Check:
    """The check of a sampling parameter."""
    low = OTHER_NEUTRAL.get(parameter.name, parameter.low)
    return integer(int(low), int(parameter.high)) if parameter.kind is int else number(low, parameter.high)


# vLLM's other value for "all".
OTHER_NEUTRAL = {"top_k": -1}
# Sampling: fields that pass to the engine under their own names. A seed goes beside the options.
SAMPLING: dict[str, Check] = {
    **{parameter.name: _of_parameter(parameter) for parameter in NUMBERS if parameter.name != "seed"},
    "logit_bias": _biases,
}

COMMON: dict[str, Check] = {
    **SAMPLING,
    "model": text(1024),
    "max_tokens": integer(-1, 10**9),
    "n": integer(1, MAX_ANSWERS),
    "stop": one_or_more(text(256, empty=False), MAX_STOPS),
    "seed": integer(-(2**63), 2**64 - 1),
    "min_tokens": integer(0, 10**9),
    "stream": flag,
    "stream_options": fields({"include_usage": flag, "include_obfuscation": flag}),
    "user": text(1024),
    "ignore_eos": flag,
    "response_format": _response_format,
    "regex": text(MAX_REGEX),
    "guided_regex": text(MAX_REGEX),
    "guided_json": _schema,
}
COMPLETION: dict[str, Check] = {
    **COMMON,
    "prompt": _prompts,
    "echo": flag,
    "logprobs": integer(0, MAX_TOP),
    "best_of": integer(1, MAX_ANSWERS),
    "suffix": text(1 << 20),
}
CHAT: dict[str, Check] = {
    **COMMON,
    "messages": array(_message, MAX_MESSAGES, least=1),
    "max_completion_tokens": integer(-1, 10**9),
    "logprobs": flag,
    "top_logprobs": integer(0, MAX_TOP),
    "continue_final_message": flag,  # vLLM's names
    "add_generation_prompt": flag,
}

# From bytes to requests -----------------------------------------------------------------------------------------------


def read_json(raw: bytes | str, name: str = "the body", param: str | None = None) -> dict[str, Any]:
    """A JSON object of bounded depth. name and param: of what is read, for errors."""
    try:
        value = parse_json(raw, name, RequestError)
        _check_depth(value, name)
    except RequestError as error:
        error.param = param
        raise
    return value


def _check_depth(value: Any, name: str, levels: int = MAX_DEPTH) -> None:
    if isinstance(value, dict | list):
        if not levels:
            raise RequestError(f"{name}: not valid JSON: nested deeper than {MAX_DEPTH} levels")
        for inner in value.values() if isinstance(value, dict) else value:
            _check_depth(inner, name, levels - 1)


def _check(body: Mapping[str, Any], known: Mapping[str, Check]) -> dict[str, Any]:
    found = {}
    for name, value in body.items():
        if value is None or name in HARMLESS:
            continue
        if name in known:
            found[name] = known[name](name, value)
        elif name in OFF_ONLY:
            if value not in OFF_ONLY[name]:
                off = json.dumps(OFF_ONLY[name][0])
                raise RequestError(f"{name} is not supported; leave it out, or send {off}", name)
        elif name in REPEATED:
            if value != body.get(REPEATED[name]):
                raise RequestError(f"{name} is read only where it repeats {REPEATED[name]}; send that", name)
        else:
            shown = reprlib.repr(name)[1:-1]
            raise RequestError(f"{shown} is unknown{_nearest(name, known)}", shown, "unknown_parameter")
    return found


def completion(body: Mapping[str, Any]) -> GenerationRequest:
    """What a body of POST /v1/completions asks for; max_tokens None: to the end of the context."""
    given = _check(body, COMPLETION)
    if "prompt" not in given:
        raise RequestError("prompt is missing", "prompt")
    if given.get("suffix"):
        raise RequestError(
            "suffix: these models were not trained to fill in; send the text before it as prompt", "suffix"
        )
    n, prompts = given.get("n", 1), given["prompt"]
    if given.get("best_of", n) != n:
        raise RequestError("best_of is not supported; ask for n with logprobs, and choose", "best_of")
    if (answers := n * len(prompts)) > MAX_ANSWERS:
        raise RequestError(f"{len(prompts)} prompts and n {n} are {answers} answers, at most {MAX_ANSWERS}", "prompt")
    max_tokens, top, echo = (
        _limit(given.get("max_tokens", DEFAULT_MAX_TOKENS)),
        given.get("logprobs"),
        given.get("echo", False),
    )
    return GenerationRequest(**_common(given), max_tokens=max_tokens, top=top, prompts=prompts, echo=echo)


def chat(body: Mapping[str, Any]) -> GenerationRequest:
    """What a body of POST /v1/chat/completions asks for; max_tokens None: to the end of the context."""
    given = _check(body, CHAT)
    if "messages" not in given:
        raise RequestError("messages is missing", "messages")
    if "top_logprobs" in given and not given.get("logprobs"):
        raise RequestError("top_logprobs needs logprobs: true", "top_logprobs")
    if given.get("max_tokens", limit := given.get("max_completion_tokens")) != limit is not None:
        raise RequestError("max_tokens and max_completion_tokens differ; send one of them", "max_completion_tokens")
    continues = given.get("continue_final_message", False)
    if continues and given["messages"][-1]["role"] != "assistant":
        raise RequestError("continue_final_message needs a last message of the assistant", "continue_final_message")
    if given.get("add_generation_prompt", not continues) == continues:
        raise RequestError(
            "add_generation_prompt and continue_final_message are opposites here", "add_generation_prompt"
        )
    top = given.get("top_logprobs", 0) if given.get("logprobs") else None
    max_tokens = _limit(given.get("max_tokens", limit))
    own = {"messages": given["messages"], "continue_final_message": continues}
    return GenerationRequest(**_common(given), max_tokens=max_tokens, top=top, **own)


def _limit(max_tokens: int | None) -> int | None:
    """None for -1, with which other servers' clients ask for no limit."""
    return None if max_tokens == -1 else max_tokens


def _common(given: Mapping[str, Any]) -> dict[str, Any]:
    stream_options = given.get("stream_options", {})
    if stream_options and not given.get("stream"):
        raise RequestError("stream_options needs stream: true", "stream_options")
    return {
        "model": given.get("model"),
        "options": _options(given),
        "n": given.get("n", 1),
        # Elsewhere, -1 asks for another text each time.
        "seed": None if given.get("seed") == -1 else given.get("seed"),
        "stream": given.get("stream", False),
        "include_usage": stream_options.get("include_usage", False),
        "user": given.get("user", ""),
        "constraint": _constraint(given),
    }


def _options(given: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI's defaults (temperature and top_p 1) and the request's values, under the engine's names."""
    values = {"temperature": 1.0, "top_p": 1.0, **given}
    sampled = values["temperature"] > 0
    options = {name: values[name] for name in SAMPLING if name in values and (sampled or name not in SAMPLED)}
    options |= {"do_sample": sampled, "stop_strings": given.get("stop", [])}
    for name, neutral in OTHER_NEUTRAL.items():
        if options.get(name) == neutral:
            options[name] = BY_NAME[name].neutral
    if "min_tokens" in given:
        options["min_new_tokens"] = given["min_tokens"]
    if given.get("ignore_eos"):
        options["eos_token_id"] = []
    return options


def _constraint(given: Mapping[str, Any]) -> Constraint | None:
    found = [given["response_format"]] if given.get("response_format") else []
    found += [Constraint("regex", given[name], name) for name in ("regex", "guided_regex") if name in given]
    found += [Constraint("json", given["guided_json"], "guided_json")] if "guided_json" in given else []
    if len(found) > 1:
        raise RequestError(
            f"{found[0].param} and {found[1].param} exclude each other; send one of them", found[1].param
        )
    if found and given.get("ignore_eos"):
        raise RequestError(f"ignore_eos and {found[0].param} exclude each other; send one of them", "ignore_eos")
    return found[0] if found else None
