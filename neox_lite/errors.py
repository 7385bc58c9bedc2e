"""The exception family, and how names stand in a message. A message says what, where, found, expected and what to try."""

from collections.abc import Sequence


class NeoxLiteError(Exception):
    """Root of every error this package raises on purpose; the command line prints its one line and exits 1."""


class ConfigError(NeoxLiteError, ValueError):
    """config.json or generation_config.json asks for something that does not exist or cannot be honoured."""


class CheckpointError(NeoxLiteError, ValueError):
    """A weight file, index or folder is missing, malformed, inconsistent or unsafe."""


class HubError(NeoxLiteError, OSError):
    """The model hub could not be reached, or does not have what was asked for."""


class TokenizerError(NeoxLiteError, ValueError):
    """tokenizer.json cannot be used, or a text or id cannot be encoded or decoded."""


class FormatError(NeoxLiteError, ValueError):
    """A weight cannot be stored in, or read from, the requested quantized format."""


class ShapeError(NeoxLiteError, ValueError):
    """A tensor does not have the shape or dtype that its place requires."""


class ArgumentError(NeoxLiteError, ValueError):
    """A call was given a value it cannot use; the message names the argument."""


class UnsupportedError(NeoxLiteError, NotImplementedError):
    """A known feature of other libraries that this package refuses by name; the message says what to use instead."""


class ContextLengthError(NeoxLiteError, ValueError):
    """Prompt plus requested tokens exceed the model's context."""

    code = "context_length_exceeded"


class GraphError(NeoxLiteError, RuntimeError):
    """A step could not be captured as a CUDA graph; what asks for one runs it launch by launch instead, and says so."""


class CacheError(NeoxLiteError, RuntimeError):
    """The KV cache has no page left, or a sequence was used after it was freed."""


def shown(name: object) -> str:
    """A name from a file as it may stand in a one-line message: printable and at most 120 characters."""
    text = str(name)
    text = text if text and text.isprintable() else repr(text)
    return text if len(text) <= 120 else text[:117] + "..."


def first_few(items: Sequence[str], count: int = 4) -> str:
    """A list as it may stand in a one-line message."""
    rest = len(items) - count
    return ", ".join(items[:count]) + (f" and {rest} more" if rest > 0 else "")
