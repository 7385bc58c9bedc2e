"""The page's own parts: `gr.HTML` with an empty frame that script/*.js fills. Knows no model and no conversation.

Whatever a model wrote reaches the browser as JSON and is put into the page as text nodes only: no part has a template that
a value could enter.
"""

from __future__ import annotations

import json
from typing import Any

import gradio as gr

from gradio.events import Dependency

class Part(gr.HTML):
    """A part of the page. kind: the function of `neox.parts` that runs it; emits: the events it sends to Python."""

    def __init__(
        self,
        kind: str,
        value: Any = None,
        emits: tuple[str, ...] = (),
        **props: Any,
    ) -> None:
        """props: fixed values that it reads."""
        super().__init__(
            value=value,
            html_template="",
            # Gradio wires up an event where its quoted name stands in this text.
            js_on_load=f"neox.mount({json.dumps(kind)}, element, props, trigger, watch, {json.dumps(emits)})",
            apply_default_css=False,
            elem_id=f"nx-{kind}",
            elem_classes=["nx"],
            **props,
        )
    from typing import Callable, Literal, Sequence, Any, TYPE_CHECKING
    from gradio.blocks import Block
    if TYPE_CHECKING:
        from gradio.components import Timer
        from gradio.components.base import Component