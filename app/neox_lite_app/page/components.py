"""The page's own parts: `gr.HTML` with an empty frame that script/*.js fills. Knows no model and no conversation.

Whatever a model wrote reaches the browser as JSON and is put into the page as text nodes only: no part has a template that
a value could enter.
"""

from __future__ import annotations

import json
from typing import Any

import gradio as gr


def part(kind: str, emits: tuple[str, ...] = (), name: str = "", **props: Any) -> gr.HTML:
    """A part of the page. kind: the function of `neox.parts` that runs it; emits: its events; props: fixed values it reads.

    name: of its element, where several parts are of one kind.
    Traps: a subclass would make Gradio write a stub file beside this one; events named "load" and "unload" come by themselves.
    """
    return gr.HTML(
        html_template="",
        # Gradio listens to an event where its quoted name stands in this text.
        js_on_load=f"neox.mount({json.dumps(kind)}, element, props, trigger, watch, {json.dumps(emits)})",
        apply_default_css=False,
        elem_id=f"nx-{name or kind}",
        elem_classes=["nx", f"nx-{kind}"],
        **props,
    )
