"""neox-lite: run GPT-NeoX-20B, and every other checkpoint of its architecture, on hardware people own."""

from typing import Any

from .config import GPTNeoXConfig
from .errors import NeoxLiteError
from .generation.mixin import Event
from .generation.options import GenerationConfig
from .generation.speculative import Speculation
from .modeling.auto import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GPTNeoXTokenizer,
    pipeline,
)
from .modeling.causal_lm import GPTNeoXForCausalLM
from .modeling.heads import GPTNeoXForQuestionAnswering, GPTNeoXForSequenceClassification, GPTNeoXForTokenClassification
from .modeling.pretrained import GPTNeoXModel, GPTNeoXPreTrainedModel
from .tokenizer import AutoTokenizer, GPTNeoXTokenizerFast
from .version import __version__

__all__ = [
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForQuestionAnswering",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoTokenizer",
    "Event",
    "GPTNeoXConfig",
    "GPTNeoXForCausalLM",
    "GPTNeoXForQuestionAnswering",
    "GPTNeoXForSequenceClassification",
    "GPTNeoXForTokenClassification",
    "GPTNeoXModel",
    "GPTNeoXPreTrainedModel",
    "GPTNeoXTokenizer",
    "GPTNeoXTokenizerFast",
    "GenerationConfig",
    "NeoxLiteError",
    "Speculation",
    "__version__",
    "pipeline",
]

# transformers' own that work with the classes here, so that one import line can name all that a script needs.
FROM_TRANSFORMERS = (
    "BitsAndBytesConfig",
    "LogitsProcessor",
    "LogitsProcessorList",
    "StoppingCriteria",
    "StoppingCriteriaList",
    "TextIteratorStreamer",
    "TextStreamer",
    "set_seed",
)


def __getattr__(name: str) -> Any:
    """Those, imported when they are asked for."""
    if name not in FROM_TRANSFORMERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import transformers

    return getattr(transformers, name)
