"""neox-lite: run GPT-NeoX-20B, and every other checkpoint of its architecture, on hardware people own."""

from .config import GPTNeoXConfig
from .errors import NeoxLiteError
from .generation import Event
from .model import (
    GPTNeoXForCausalLM,
    GPTNeoXForQuestionAnswering,
    GPTNeoXForSequenceClassification,
    GPTNeoXForTokenClassification,
    GPTNeoXModel,
    GPTNeoXPreTrainedModel,
)
from .options import GenerationConfig
from .speculative import Speculation
from .tokenizer import GPTNeoXTokenizerFast
from .version import __version__

__all__ = [
    "Event",
    "GPTNeoXConfig",
    "GPTNeoXForCausalLM",
    "GPTNeoXForQuestionAnswering",
    "GPTNeoXForSequenceClassification",
    "GPTNeoXForTokenClassification",
    "GPTNeoXModel",
    "GPTNeoXPreTrainedModel",
    "GPTNeoXTokenizerFast",
    "GenerationConfig",
    "NeoxLiteError",
    "Speculation",
    "__version__",
]
