"""The offline quantizer: a checkpoint becomes a quantized folder in bounded memory."""

from .convert import Report, convert

__all__ = ["Report", "convert"]
