"""Tables of these pages that follow from the code: docs/family.md and docs/python-api.md.

    python docs/generated.py [--write]

Without --write it only says which pages are not what the code gives, and exits 1 if any is not. A part stands between
`<!-- name -->` and `<!-- end -->`; everything else on a page is written by hand.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import math
import re
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import neox_lite
from neox_lite import errors
from neox_lite.generation.options import Options
from neox_lite.generation.parameters import BY_NAME, NUMBERS, PARAMETERS, Parameter
from neox_lite.loading.options import LoadOptions
from neox_lite_app.conversations.prompt_forms import FORMS
from neox_lite_app.models.family import FAMILY, Member
from neox_lite_app.models.plan import Model
from neox_lite_app.serving import schema
from neox_lite_app.terminal import amount

DOCS = Path(__file__).resolve().parent
CLASSES = (
    neox_lite.GPTNeoXForCausalLM,
    neox_lite.GPTNeoXModel,
    neox_lite.GPTNeoXForSequenceClassification,
    neox_lite.GPTNeoXForTokenClassification,
    neox_lite.GPTNeoXForQuestionAnswering,
    neox_lite.GPTNeoXPreTrainedModel,
    neox_lite.Event,
    neox_lite.Speculation,
    neox_lite.GenerationConfig,
    neox_lite.GPTNeoXTokenizerFast,
    neox_lite.GPTNeoXConfig,
)
# What a model has for those who run it step by step or place it themselves; its users need none of it.
INTERNAL = {"acquire_prefix_cache", "base_model", "blocks", "compute_dtype", "first_pages", "launch", "padding_ids"}
INTERNAL |= {"new_pool", "ops", "rebind", "run_layers", "runner", "step", "tie_weights", "train", "activation"}
INTERNAL |= {"backend_tokenizer", "final_norm", "heads", "initialize", "refresh"}


# The family -----------------------------------------------------------------------------------------------------------


def family() -> Iterator[str]:
    """A line for each checkpoint; sizes as it is loaded."""
    yield "| checkpoint | layers, hidden, heads | context | block | prompt form | int4 | int8 | KV cache | licence |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for member in FAMILY:
        shape = f"{member.layers}, {member.hidden}, {member.heads}"
        sizes = [amount(Model.quantized(member.config(), format).sizes.total, "B") for format in ("int4", "int8")]
        cache = amount(2 * 2 * member.layers * member.hidden * member.context, "B")
        block = f"{'parallel' if member.parallel else 'sequential'}, rotary {member.rotary:.0%}"
        figures = [text.replace(" ", "&nbsp;") for text in (*sizes, cache)]
        cells = [f"`{member.id}`", shape, str(member.context), block, form(member), *figures, member.license]
        yield f"| {' | '.join(cells)} |"


def form(member: Member) -> str:
    """The prompt form that its name asks for; a base model has none of its own."""
    found = next((form.name for form in FORMS.values() if re.search(form.ids, member.name.lower())), None)
    return f"`{found}`" if found else "base"


# The Python API -------------------------------------------------------------------------------------------------------


def options(cls: type) -> Iterator[str]:
    """The fields of a dataclass of options: name, default, and what its docstring says of it."""
    texts = dict(re.findall(r"^(\w+): (.*(?:\n {4}.*)*)", inspect.getdoc(cls) or "", re.MULTILINE))
    yield "| option | default | |"
    yield "|---|---|---|"
    for field in dataclasses.fields(cls):
        if field.name != "sampling":
            default = field.default if field.default is not dataclasses.MISSING else field.default_factory()  # type: ignore[misc]
            plain = isinstance(default, bool | int | float | str | None)
            yield (
                f"| `{field.name}` | `{default!r}` | {cell(texts[field.name])} |"
                if plain and default is not None
                else (f"| `{field.name}` | | {cell(texts[field.name])} |")
            )


def parameters() -> Iterator[str]:
    """The table of sampling parameters, with the defaults of `generate`."""
    yield "| option | default | range | |"
    yield "|---|---|---|---|"
    for p in PARAMETERS:
        default = "" if p.kind is dict else f"`{p.default!r}`"
        yield f"| `{p.name}` | {default} | {bounds(p)} | {cell(p.help)} |"


def api_parameters() -> Iterator[str]:
    """The sampling parameters that a request may have."""
    yield "| field | range | |"
    yield "|---|---|---|"
    for name in schema.SAMPLING:
        yield f"| `{name}` | {bounds(BY_NAME[name])} | {cell(BY_NAME[name].help)} |"


def bounds(parameter: Parameter) -> str:
    """What a number may be; "" for what is none."""
    if parameter not in NUMBERS:
        return ""
    exponent = round(math.log2(parameter.high)) if parameter.kind is int else 0
    return f"{parameter.low:g} to {f'2^{exponent} - 1' if exponent else f'{parameter.high:g}'}"


def classes() -> Iterator[str]:
    for cls in CLASSES:
        yield from ("", f"### {cls.__name__}", "", prose(inspect.getdoc(cls) or ""))
        found = list(members(cls))
        yield from ["", *found] if found else []


def members(cls: type) -> Iterator[str]:
    """Public methods and properties that a class brings, with those of bases that have no section of their own."""
    elsewhere = {base for section in CLASSES if section in cls.__mro__[1:] for base in section.__mro__}
    bases = [base for base in cls.__mro__ if base not in elsewhere and base.__module__.startswith("neox_lite.")]
    seen = set(INTERNAL)
    for base in bases:
        for name, value in vars(base).items():
            if name in seen or (name.startswith("_") and name != "__call__") or not documented(value):
                continue
            seen.add(name)
            if not (text := inspect.cleandoc(unwrapped(value).__doc__ or "")):
                continue
            title = name if isinstance(value, property | cached_property) else f"{name}{signature(value)}"
            yield f"- `{title}`<br>{prose(text, '<br>')}"


def documented(value: object) -> bool:
    return isinstance(value, property | cached_property | classmethod | staticmethod) or inspect.isfunction(value)


def unwrapped(value: Any) -> Any:
    if isinstance(value, property):
        return value.fget
    if isinstance(value, cached_property):
        return value.func
    return value.__func__ if isinstance(value, classmethod | staticmethod) else value


def signature(value: object) -> str:
    """Names and defaults; the text says what they are."""
    found = inspect.signature(inspect.unwrap(unwrapped(value)))
    plain = [p.replace(annotation=p.empty) for name, p in found.parameters.items() if name not in ("self", "cls")]
    return str(found.replace(parameters=plain, return_annotation=found.empty))


def raised() -> Iterator[str]:
    """The exception family, in the order in which it is defined."""
    yield "| error | also a | raised when |"
    yield "|---|---|---|"
    for name, error in vars(errors).items():
        if isinstance(error, type) and error.__module__ == errors.__name__:
            others = ", ".join(base.__name__ for base in error.__bases__ if base is not errors.NeoxLiteError)
            yield f"| `{name}` | `{others}` | {cell(inspect.getdoc(error) or '')} |"


def prose(text: str, between: str = "\n\n") -> str:
    """A docstring as Markdown: paragraphs of one line each."""
    return between.join(escape(" ".join(part.split())) for part in text.split("\n\n"))


def cell(text: str) -> str:
    return escape(" ".join(text.split())).replace("|", "\\|")


def escape(text: str) -> str:
    """Marks that mean something in Markdown, but for those of code."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([<*])", r"\\\1", part) for part in parts)


# Pages ----------------------------------------------------------------------------------------------------------------

PARTS: dict[str, dict[str, Callable[[], Iterator[str]]]] = {
    "api.md": {"sampling": api_parameters},
    "family.md": {"family": family},
    "python-api.md": {
        "load": lambda: options(LoadOptions),
        "generate": lambda: options(Options),
        "sampling": parameters,
        "classes": classes,
        "errors": raised,
    },
}


def render(page: str) -> str:
    """The page as it should be."""
    text = (DOCS / page).read_text(encoding="utf-8")
    for name, make in PARTS[page].items():
        mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        body = "\n".join(make()).strip("\n") + "\n"
        text, count = mark.subn(lambda match, body=body: f"{match[1]}{body}{match[2]}", text)  # type: ignore[misc]
        if count != 1:
            raise SystemExit(f"{page} has {count} places marked <!-- {name} -->, expected one")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the pages")
    write, stale = parser.parse_args().write, []
    for page in PARTS:
        text = render(page)
        if text != (DOCS / page).read_text(encoding="utf-8"):
            stale.append(page)
            if write:
                (DOCS / page).write_text(text, encoding="utf-8")
    print("\n".join(f"{page}: {'written' if write else 'is not what the code gives; add --write'}" for page in stale))
    if stale and not write:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
