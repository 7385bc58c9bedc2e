"""The table of sampling parameters: a row is a check, a flag, a field of the API, a control and a line of the docs."""

import json
import shutil
import warnings

import generated
import pytest
import torch
import transformers

from neox_lite import GenerationConfig, GPTNeoXConfig
from neox_lite.generation.mixin import GenerationMixin
from neox_lite.generation.parameters import BY_NAME, NUMBERS, PARAMETERS
from neox_lite.generation.sampling import FILTERS, PROCESSORS, Sampling
from neox_lite_app.cli import build_parser, main
from neox_lite_app.paths import DEMO
from neox_lite_app.serving import schema
from neox_lite_app.serving.engine import Job, LoadedModel

pytest.importorskip("gradio")
from neox_lite_app.page.settings import DEFAULT, FIELDS, options_of

CONFIG = GPTNeoXConfig.from_pretrained(DEMO)


def sampling(options, **generation_config) -> Sampling:
    """How the engine samples for a job with these options, with a model of this generation_config.json."""
    config = GenerationConfig(**generation_config)
    loaded = LoadedModel("demo", lambda: None, CONFIG, config, None, torch.empty(0, dtype=torch.long), 512, {})
    return loaded.sequence(Job([5], options)).options.sampling


def test_every_number_is_a_flag_a_field_a_control_and_a_line_of_the_docs():
    names = [parameter.name for parameter in NUMBERS]
    args = build_parser().parse_args(["generate", "M", "--prompt", "x"])
    assert [name for name in names if name not in vars(args)] == []
    assert [name for name in names if name not in schema.COMPLETION or name not in schema.CHAT] == []
    assert [name for name in names if name not in {field.name for field in FIELDS} | {"seed"}] == []
    documented = "\n".join(generated.parameters())
    assert [parameter.name for parameter in PARAMETERS if f"`{parameter.name}`" not in documented] == []


def test_every_parameter_has_what_applies_it():
    """temperature and seed belong to the draw itself, and do_sample decides whether there is one."""
    applied = {*FILTERS, *(name for names in PROCESSORS for name in names), "do_sample", "temperature", "seed"}
    assert applied == BY_NAME.keys()


def test_neutral_values_leave_nothing_to_apply():
    neutral = Sampling(do_sample=True, **{p.name: p.neutral for p in PARAMETERS if p.name != "do_sample"})
    assert neutral.processors() == [] == neutral.filters


@pytest.mark.parametrize(("config", "expected"), [({}, 0), ({"top_k": 7}, 7)])
def test_a_missing_top_k_means_the_same_in_the_terminal_and_in_the_api(config, expected, monkeypatch, tmp_path, capsys):
    assert sampling({"do_sample": True}, **config).top_k == expected  # chat and whatever else submits jobs
    assert sampling(schema.completion({"prompt": "x"}).options, **config).top_k == expected
    assert sampling(schema.chat({"messages": [{"role": "user", "content": "x"}]}).options, **config).top_k == expected
    folder, seen, sequences = tmp_path / "model", [], GenerationMixin._sequences
    shutil.copytree(DEMO, folder)
    (folder / "generation_config.json").write_text(json.dumps(config))
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # which main replaces
    monkeypatch.setattr(GenerationMixin, "_sequences", lambda *given: seen.append(given[2]) or sequences(*given))
    words = ["--prompt", "KING", "--temperature", "1", "--max-new-tokens", "1"]
    assert main(["generate", str(folder), *words]) == 0, capsys.readouterr().err
    assert [options.sampling.top_k for options in seen] == [expected]


def test_the_page_samples_as_its_controls_show():
    """Also where generation_config.json has something else."""
    found = sampling(options_of(DEFAULT), top_k=7, repetition_penalty=2.0)
    assert (found.top_k, found.repetition_penalty) == (DEFAULT["top_k"], DEFAULT["repetition_penalty"])


def test_generate_itself_has_transformers_defaults():
    peer = transformers.GenerationConfig._get_default_generation_params()
    named = [parameter for parameter in NUMBERS if parameter.name in peer]
    assert len(named) == 6 and [p.name for p in named if p.default != peer[p.name]] == []
    assert Sampling().do_sample is peer["do_sample"]
