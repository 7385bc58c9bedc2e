"""The local page: a Model tab, a Chat and a Notebook over one engine. Knows Gradio; nothing else of the package imports it."""

from __future__ import annotations

import argparse

import gradio as gr

from ..conversations.conversation import Store
from ..serving.engine import Engine
from . import chat_tab, model_tab, notebook
from .components import part
from .events import Running
from .settings import settings_part
from .style import looks

__all__ = ["build_page", "looks"]


def build_page(engine: Engine, args: argparse.Namespace, store: Store | None = None) -> gr.Blocks:
    """The page over an engine, to be mounted with `looks()`. args: those of `neox-lite serve`."""
    running = Running()
    with gr.Blocks(title="neox-lite", analytics_enabled=False, fill_height=True) as page:
        models = model_tab.Tab(engine, args)
        chats = chat_tab.Tab(engine, store or Store(), running, args.form)
        part("header")
        with gr.Row(elem_id="nx-stage"):
            with gr.Column(elem_id="nx-view-model", elem_classes="nx-view"):
                models.build()
            with gr.Column(elem_id="nx-view-chat", elem_classes="nx-view"):
                chats.build()
            with gr.Column(elem_id="nx-view-notebook", elem_classes="nx-view"):
                book = notebook.build()
            settings_part()
        models.build_status()
        chats.wire()
        notebook.wire(engine, book, running)

        def leave(request: gr.Request) -> None:
            running.leave(request.session_hash or "")

        page.unload(leave)
    page.queue(default_concurrency_limit=None)
    return page
