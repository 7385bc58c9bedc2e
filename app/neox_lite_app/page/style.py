"""How the page looks: Gradio's theme in our colours, page.css over it, and the scripts for its head. Nothing is fetched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

HERE = Path(__file__).parent
SCRIPTS = ("base", "prose", "frame", "settings", "model", "chat", "notebook")  # in this order
SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif")
MONO = ("ui-monospace", "SF Mono", "Cascadia Mono", "Menlo", "DejaVu Sans Mono", "monospace")

# name: (light, dark); page.css uses them by Gradio's names
COLOURS = {
    "body_background_fill": ("#f7f7f4", "#131618"),
    "background_fill_primary": ("#ffffff", "#1a1e21"),
    "background_fill_secondary": ("#efefea", "#22272b"),
    "body_text_color": ("#1d2124", "#e4e7e9"),
    "body_text_color_subdued": ("#5a636b", "#9ca7b0"),
    "border_color_primary": ("#dcdcd5", "#30373c"),
    "border_color_accent": ("#1f6b58", "#79c9b2"),
    "color_accent_soft": ("#dcece6", "#1d3b34"),
    "link_text_color": ("#1f6b58", "#79c9b2"),
    "error_background_fill": ("#fdeceb", "#3a1d1d"),
    "error_border_color": ("#e3a9a4", "#7a3a38"),
    "error_text_color": ("#93231b", "#ffb4ad"),
    "block_background_fill": ("transparent", "transparent"),
    "input_background_fill": ("#ffffff", "#1a1e21"),
    "input_border_color": ("#c9c9c1", "#3c454b"),
    "input_border_color_focus": ("#1f6b58", "#79c9b2"),
    "block_label_text_color": ("#5a636b", "#9ca7b0"),
    "block_title_text_color": ("#1d2124", "#e4e7e9"),
    "block_info_text_color": ("#5a636b", "#9ca7b0"),
}


def looks() -> dict[str, Any]:
    """What `gradio.mount_gradio_app` is to be given beside the page."""
    scripts = "\n".join((HERE / "script" / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS)
    css = (HERE / "page.css").read_text(encoding="utf-8")
    # Not as Gradio's own css: that would be given to it twice, with other weights, and within @media only once.
    return {"theme": theme(), "head": f"<style>{css}</style><script>(() => {{\n{scripts}\n}})();</script>"}


def theme() -> gr.themes.Base:
    found = gr.themes.Base(font=list(SANS), font_mono=list(MONO), radius_size="md", text_size="md")
    pairs = {name: light for name, (light, _) in COLOURS.items()}
    pairs |= {f"{name}_dark": dark for name, (_, dark) in COLOURS.items()}
    return found.set(**pairs, block_border_width="0px", block_shadow="none", block_padding="0px")
