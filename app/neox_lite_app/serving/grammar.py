"""Text that must be JSON of a schema or match a regular expression: a logits processor over llguidance. Knows no engine.

llguidance builds in bounded time and memory and fetches nothing that a schema refers to; its limits are set tighter here,
because every mask is computed between two tokens of all sequences.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from decimal import Decimal
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from neox_lite import GPTNeoXTokenizerFast

from .schema import MAX_REGEX, Constraint, RequestError

if TYPE_CHECKING:
    import numpy as np
    from llguidance import LLTokenizer
    from torch import Tensor

# Between JSON's tokens, what formatters write: a space, or a new line and its indent. Without a limit, small models go on with
# new lines to the end of the context.
WHITESPACE = r"( |\n( {0,16}|\t{0,8}))"
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 20_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
MAX_REMAINDERS = 1000  # that the multipleOf of a schema make together; nothing else bounds what they cost


class Vocabulary:
    """A model's tokens as llguidance needs them; built once for each model (a large vocabulary takes a second)."""

    def __init__(self, tokenizer: GPTNeoXTokenizerFast, size: int, ends: Sequence[int]) -> None:
        """size: of the logits. ends: ids that end a text."""
        if find_spec("llguidance") is None:
            raise RequestError("this server has no llguidance for schemas and regexes: pip install 'neox-lite[page]'")
        from llguidance import LLTokenizer

        if not ends:
            raise RequestError(
                "this model names no token that ends a text, so no grammar can end; leave the grammar out"
            )
        self.size, self.ends = size, list(ends)
        try:
            self.tokens: LLTokenizer = LLTokenizer(
                tokenizer.backend_tokenizer.to_str(), n_vocab=size, eos_token=self.ends
            )
        except Exception as error:  # whatever a tokenizer.json may hold that it does not know
            raise RequestError(f"this model's tokenizer does not work with grammars: {_line(error)}") from None


class Grammar:
    """A logits processor that admits what may come next, and the end of text exactly where the text is complete.

    One for each sequence: it follows what was generated. error: why it gave up, where it did; the text then ends.
    """

    def __init__(self, vocabulary: Vocabulary, constraint: Constraint) -> None:
        """Raises RequestError for a schema or regex that cannot be used."""
        from llguidance import LLMatcher, LLParserLimits

        self._vocabulary = vocabulary
        self._start: int | None = None  # tokens of the prompt
        self._taken = 0  # new tokens
        self.error: str | None = None
        try:
            if constraint.kind == "regex":
                grammar = LLMatcher.grammar_from_regex(constraint.text)
            else:
                _check_schema(constraint)
                grammar = LLMatcher.grammar_from_json_schema(
                    constraint.text, overrides={"whitespace_pattern": WHITESPACE}
                )
        except ValueError as error:
            raise RequestError(f"{constraint.param}: {_line(error)}", constraint.param) from None
        self._matcher = LLMatcher(vocabulary.tokens, grammar, log_level=0, limits=LLParserLimits(**LIMITS))
        self._matcher.compute_bitmask()  # also the first step is tried here, not between other sequences' tokens
        if self._matcher.is_error():
            raise RequestError(f"{constraint.param}: {_line(self._matcher.get_error())}", constraint.param)

    def copy(self) -> Grammar:
        """Another one at the start, for another sequence."""
        twin = object.__new__(Grammar)
        twin.__dict__ = {**self.__dict__, "_matcher": self._matcher.deep_copy()}
        return twin

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        """ids (1, tokens so far), logits (1, vocabulary) -> logits in which what may not come is -inf."""
        import torch

        allowed = None if self.error else self._allowed(ids[0].tolist())
        if allowed is not None:
            masked = logits.masked_fill(~torch.from_numpy(allowed[: logits.shape[1]]), -torch.inf)
            if bool(masked.isfinite().any()):
                return masked
            self.error = "other options exclude every token that may come next"
        ended = torch.full_like(logits, -torch.inf)
        ended[:, self._vocabulary.ends] = 0.0
        return ended

    def _allowed(self, ids: list[int]) -> np.ndarray | None:
        """Which ids may come (vocabulary,) bool, after the tokens that came since the last call; None: it gave up."""
        import numpy as np

        self._start = len(ids) if self._start is None else self._start
        new = len(ids) - self._start
        if new < self._taken:
            self._matcher.rollback(self._taken - new)
        elif new > self._taken:
            self._matcher.consume_tokens(ids[self._start + self._taken :])
        self._taken = new
        bits = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            self.error = _line(self._matcher.get_error())
            return None
        return np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little").astype(bool)


def _check_schema(constraint: Constraint) -> None:
    """Raises RequestError for what llguidance's own limits do not bound: long texts, and multipleOf values that are large
    alone or by their least common multiple."""
    values, steps = [json.loads(constraint.text)], list[Decimal]()
    while values:
        value = values.pop()
        if isinstance(value, str) and len(value) > MAX_REGEX:
            raise RequestError(
                f"{constraint.param}: one of its texts has {len(value)} characters, expected at most {MAX_REGEX}",
                constraint.param,
            )
        if isinstance(value, dict):
            step = value.get("multipleOf")
            if isinstance(step, int | float) and not isinstance(step, bool):
                steps.append(abs(Decimal(str(step))))
        values += value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    digits = [step.as_tuple().exponent for step in steps]
    decimals = -min([0, *(digit for digit in digits if isinstance(digit, int))])
    if math.lcm(*(int(step.scaleb(decimals)) for step in steps)) > MAX_REMAINDERS:
        raise RequestError(
            f"{constraint.param}: multipleOf takes too long; all values of it, without their decimal points, may have a least "
            f"common multiple of at most {MAX_REMAINDERS}",
            constraint.param,
        )


def _line(error: object) -> str:
    """A message of theirs as one line, shortened."""
    return " ".join(str(error).removesuffix("<non-verbose/>").split())[:300] or "unusable"
