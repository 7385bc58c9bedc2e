"""docs/api.md against the code: fields and limits. Its blocks are run by test_docs.py."""

import re
from pathlib import Path

from neox_lite_app.serving import schema

TEXT = (Path(__file__).parents[1] / "docs" / "api.md").read_text(encoding="utf-8")


def test_the_harness_is_pointed_at_an_endpoint_that_exists():
    (code,) = re.findall(r"^lm_eval .*?(?=^```)", TEXT, re.MULTILINE | re.DOTALL)
    assert "base_url=http://127.0.0.1:7860/v1/completions" in code and "local-completions" in code


def test_the_limits_that_it_names_are_those_of_the_code():
    assert f"{schema.MAX_SCHEMA:,} characters" in TEXT and f"regexes {schema.MAX_REGEX:,}" in TEXT
    assert f"up to {schema.MAX_STOPS} texts" in TEXT and f"1 to {schema.MAX_ANSWERS}" in TEXT
    assert f"up to {schema.MAX_BIASES} ids" in TEXT and f"1 to {schema.MAX_MESSAGES}" in TEXT


def test_every_field_stands_in_it():
    known = schema.COMPLETION.keys() | schema.CHAT.keys() | {"include_usage"}
    assert [
        name for name in sorted(known - {"add_generation_prompt", "model"}) if not re.search(f"[`.]{name}[`.]", TEXT)
    ] == []
