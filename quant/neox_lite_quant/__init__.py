"""The offline quantizer: a checkpoint becomes a quantized folder in bounded memory, and a model becomes a GGUF file."""

from .convert import Report, convert
from .gguf import export_gguf

__all__ = ["Report", "convert", "export_gguf"]
