"""neox-lite: run GPT-NeoX-20B, and every other checkpoint of its architecture, on hardware people own."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
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
    from .modeling.heads import (
        GPTNeoXForQuestionAnswering,
        GPTNeoXForSequenceClassification,
        GPTNeoXForTokenClassification,
    )
    from .modeling.pretrained import GPTNeoXModel, GPTNeoXPreTrainedModel
    from .tokenizer import AutoTokenizer, GPTNeoXTokenizerFast

__all__ = [
    "AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForQuestionAnswering",
    "AutoModelForSequenceClassification", "AutoModelForTokenClassification", "AutoTokenizer", "Event", "GPTNeoXConfig",
    "GPTNeoXForCausalLM", "GPTNeoXForQuestionAnswering", "GPTNeoXForSequenceClassification",
    "GPTNeoXForTokenClassification", "GPTNeoXModel", "GPTNeoXPreTrainedModel", "GPTNeoXTokenizer", "GPTNeoXTokenizerFast",
    "GenerationConfig", "NeoxLiteError", "Speculation", "__version__", "pipeline",
]  # fmt: skip
# Where each of these is.
MODULES = {name: ".modeling.auto" for name in __all__ if name.startswith("Auto")} | {
    "AutoTokenizer": ".tokenizer",
    "Event": ".generation.mixin",
    "GPTNeoXConfig": ".config",
    "GPTNeoXForCausalLM": ".modeling.causal_lm",
    "GPTNeoXForQuestionAnswering": ".modeling.heads",
    "GPTNeoXForSequenceClassification": ".modeling.heads",
    "GPTNeoXForTokenClassification": ".modeling.heads",
    "GPTNeoXModel": ".modeling.pretrained",
    "GPTNeoXPreTrainedModel": ".modeling.pretrained",
    "GPTNeoXTokenizer": ".modeling.auto",
    "GPTNeoXTokenizerFast": ".tokenizer",
    "GenerationConfig": ".generation.options",
    "NeoxLiteError": ".errors",
    "Speculation": ".generation.speculative",
    "pipeline": ".modeling.auto",
}
# transformers' own that work with the classes here, so that one import line can name all that a script needs.
FROM_TRANSFORMERS = (
    "BitsAndBytesConfig", "LogitsProcessor", "LogitsProcessorList", "StoppingCriteria", "StoppingCriteriaList",
    "TextIteratorStreamer", "TextStreamer", "set_seed",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import what is used: the command line has its help without torch, and transformers' names cost nothing else."""
    if name in FROM_TRANSFORMERS:
        return getattr(import_module("transformers"), name)
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(MODULES[name], __name__), name)
    return value
