"""The offline quantizer: a checkpoint becomes a quantized folder in bounded memory, and a model becomes a GGUF file."""

from .convert import Report, convert
from .gguf_export import export_gguf
from .gguf_import import import_gguf

__all__ = ["Report", "convert", "export_gguf", "import_gguf"]
