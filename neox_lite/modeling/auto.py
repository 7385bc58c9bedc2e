"""transformers' Auto names and `pipeline` for the one architecture there is here; any other is refused by name."""

from __future__ import annotations

import os
from typing import Any

from ..config import GPTNeoXConfig
from ..errors import ArgumentError
from ..tokenizer import GPTNeoXTokenizerFast
from .causal_lm import GPTNeoXForCausalLM
from .heads import (
    GPTNeoXForQuestionAnswering,
    GPTNeoXForSequenceClassification,
    GPTNeoXForTokenClassification,
    class_of,
)
from .pretrained import GPTNeoXModel, GPTNeoXPreTrainedModel

GPTNeoXTokenizer = GPTNeoXTokenizerFast  # its name in transformers 5
AutoConfig = GPTNeoXConfig  # which refuses another model_type
AutoModel = GPTNeoXModel
AutoModelForCausalLM = GPTNeoXForCausalLM
AutoModelForSequenceClassification = GPTNeoXForSequenceClassification
AutoModelForTokenClassification = GPTNeoXForTokenClassification
AutoModelForQuestionAnswering = GPTNeoXForQuestionAnswering

TASKS: dict[str, type[GPTNeoXPreTrainedModel]] = {
    "text-generation": GPTNeoXForCausalLM,
    "text-classification": GPTNeoXForSequenceClassification,
    "sentiment-analysis": GPTNeoXForSequenceClassification,
    "token-classification": GPTNeoXForTokenClassification,
    "ner": GPTNeoXForTokenClassification,
}


def pipeline(
    task: str | None = None,
    model: str | os.PathLike[str] | GPTNeoXPreTrainedModel | None = None,
    tokenizer: str | os.PathLike[str] | GPTNeoXTokenizerFast | None = None,
    **options: Any,
) -> Any:
    """transformers' own pipeline around a model and a tokenizer of this package.

    model: one that is loaded, or a folder or hub id, loaded with revision, dtype (or torch_dtype), device_map and
    model_kwargs. task: one of `TASKS`; None: that of the class which config.json names. Other options are transformers'.
    Raises ArgumentError where transformers is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise ArgumentError(
            "pipeline: is transformers' own; pip install transformers, or call model.generate"
        ) from None
    if task is not None and task not in TASKS:
        raise ArgumentError(f"task is {task!r}, expected one of {', '.join(TASKS)}; for another, call the model itself")
    loading = {name: options.pop(name) for name in ("revision", "token", "trust_remote_code") if name in options}
    own = {name: options.pop(name) for name in ("dtype", "torch_dtype", "device_map") if name in options}
    own |= options.pop("model_kwargs", None) or {}
    if isinstance(model, str | os.PathLike):
        tokenizer = model if tokenizer is None else tokenizer
        where = {name: value for name, value in loading.items() if name != "trust_remote_code"}
        model_class = class_of(GPTNeoXConfig.from_pretrained(model, **where)) if task is None else TASKS[task]
        model = model_class.from_pretrained(model, **loading, **own)
    elif not isinstance(model, GPTNeoXPreTrainedModel):
        raise ArgumentError(f"model is a {type(model).__name__}, expected a model of neox_lite, a folder or a hub id")
    if isinstance(tokenizer, str | os.PathLike):
        tokenizer = GPTNeoXTokenizerFast.from_pretrained(tokenizer, **loading)
    task = task or next((name for name, cls in TASKS.items() if isinstance(model, cls)), None)
    if task is None:
        raise ArgumentError(f"pipeline: transformers has none for {type(model).__name__}; call the model itself")
    build: Any = transformers.pipeline  # whose type knows only models of its own
    return build(task, model=model, tokenizer=tokenizer, **options)
