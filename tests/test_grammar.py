"""Text that must be JSON of a schema or match a regex does, whatever is drawn; what cannot be used is refused in time."""

import json
import re

import pytest
import torch
from support.often import times

pytest.importorskip("llguidance", reason="needs pip install '.[page]'")

from neox_lite import GPTNeoXForCausalLM
from neox_lite_app.paths import DEMO
from neox_lite_app.serving.grammar import Grammar, Vocabulary
from neox_lite_app.serving.schema import Constraint, RequestError

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "role": {"enum": ["king", "queen", "fool"]},
        "friends": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "role", "friends"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model():
    return GPTNeoXForCausalLM.from_pretrained(DEMO, device_map="cpu")


@pytest.fixture(scope="module")
def vocabulary(model):
    return Vocabulary(model.tokenizer, model.config.vocab_size, [model.tokenizer.eos_token_id])


def grammar_of(vocabulary, kind, value):
    return Grammar(vocabulary, Constraint(kind, value if isinstance(value, str) else json.dumps(value), kind))


def sample(model, processor, seed, most=200, **options):
    """What is drawn under a grammar, and why it ended."""
    given = {"max_new_tokens": most, "do_sample": True, "temperature": 1.5, "top_k": 0, "seed": seed, **options}
    events = list(model.stream("KING:\n", logits_processor=[processor], **given))
    return "".join(event.text for event in events), events[-1].finish_reason


@pytest.mark.parametrize("seed", range(times(20)))
def test_whatever_is_drawn_is_json_of_the_schema(model, vocabulary, seed):
    text, reason = sample(model, grammar_of(vocabulary, "json", PERSON), seed, most=400)
    value = json.loads(text)
    assert reason == "stop" and list(value) == ["name", "age", "role", "friends"]
    assert 1 <= len(value["name"]) <= 12 and type(value["age"]) is int and 0 <= value["age"] <= 120
    assert value["role"] in ("king", "queen", "fool")
    assert 1 <= len(value["friends"]) <= 3 and all(type(friend) is bool for friend in value["friends"])


@pytest.mark.parametrize(
    "regex", ["[0-9]{4}-(0[1-9]|1[0-2])", "(yes|no)", "é漢😀+x", "[A-Z][a-z]{2,9}( [A-Z][a-z]{2,9})?\\.", "(a|b)*c"]
)
def test_whatever_is_drawn_matches_the_regex(model, vocabulary, regex):
    for seed in range(5):
        text, reason = sample(model, grammar_of(vocabulary, "regex", regex), seed)
        assert reason == "length" or re.fullmatch(regex, text)
        assert reason == "stop" or "*" in regex or "+" in regex


@pytest.fixture
def allowed(model):
    """The letters (or ends) that a grammar allows after a prompt and letters."""
    ids = {letter: model.tokenizer(letter).input_ids[0] for letter in "abc"} | {"end": model.tokenizer.eos_token_id}

    def allowed_by(grammar, letters, prompt=(5,)):
        logits = torch.zeros(1, model.config.vocab_size)
        found = grammar(torch.tensor([[*prompt, *(ids[letter] for letter in letters)]]), logits)[0].isfinite()
        names = {id: letter for letter, id in ids.items()}
        return {names.get(id, id) for id in found.nonzero().flatten().tolist()}

    return allowed_by


def test_the_text_ends_exactly_where_it_is_complete(vocabulary, allowed):
    grammar = grammar_of(vocabulary, "regex", "ab?")
    first = allowed(grammar, "", prompt=(5, 6))
    assert "a" in first and not {"b", "end"} & first
    assert allowed(grammar, "a", prompt=(5, 6)) == {"b", "end"}
    assert allowed(grammar, "ab", prompt=(5, 6)) == {"end"}


def test_it_follows_a_sequence_that_is_taken_back_and_a_copy_goes_its_own_way(vocabulary, allowed):
    grammar = grammar_of(vocabulary, "regex", "abc")
    twin, first = grammar.copy(), allowed(grammar, "")
    assert "c" in allowed(grammar, "ab") and allowed(grammar, "abc") == {"end"} and "c" in allowed(grammar, "ab")
    assert allowed(grammar, "") == first == allowed(twin, "", prompt=(5, 6))


def test_a_greedy_answer_is_bound_too(model, vocabulary):
    processor = grammar_of(vocabulary, "json", PERSON)
    text = "".join(event.text for event in model.stream("KING:\n", logits_processor=[processor], max_new_tokens=200))
    assert json.loads(text)["role"] in ("king", "queen", "fool")


def deep(levels):
    schema = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


NO_SCHEMAS = ("{", "5", "[]", "null", '"x"', "", {"type": "banana"}, {"enum": []}, "false", {"$ref": "#"})
MANY = [{"anyOf": [{"properties": {f"a{i}{j}": {"type": "string"}}} for j in range(4)]} for i in range(12)]
UNUSABLE = [
    *[("json", schema) for schema in NO_SCHEMAS],
    *[("json", {"$ref": ref}) for ref in ("http://127.0.0.1:1/x", "file:///etc/passwd", "#/nowhere", "../x", 5)],
    *[("json", {"type": "array", "uniqueItems": True}), ("json", {"type": "string", "pattern": "("})],
    ("json", {"allOf": MANY}),
    *[("json", {"type": "integer", "multipleOf": step}) for step in (True, 0, "2", [2])],
    *[("json", {"const": "x" * 5000}), ("json", {"type": "string", "pattern": "x?" * 3000})],
    *[("regex", regex) for regex in ("[", "(?=a)b", "\\b", "(?P<n>a)\\1", "a{5,2}", "*", "\\p{Nowhere}")],
]
OBJECT, TEXT = {"type": "object"}, {"type": "string"}
HEAVY = [
    ("json", deep(40)),
    ("json", {"enum": [f"value {i}" for i in range(4000)]}),
    ("json", {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1500)}}),
    ("json", {"anyOf": [{**OBJECT, "properties": {f"p{i}": TEXT}, "required": [f"p{i}"]} for i in range(600)]}),
    ("json", {"type": "array", "items": {"type": "string", "minLength": 1000}, "minItems": 10**5, "maxItems": 10**6}),
    ("json", {"$defs": {"n": {"type": "object", "properties": {"c": {"$ref": "#/$defs/n"}}}}, "$ref": "#/$defs/n"}),
    ("json", {**OBJECT, "properties": {f"p{i}": {**TEXT, "pattern": "^([a-z]+[0-9]*)+x{1,100}$"} for i in range(300)}}),
    *[("regex", text) for text in ("(a{1000}){1000}", "((((a{10}){10}){10}){10}){10}", "(.*a){20}", ".*" * 200)],
    *[("regex", text) for text in ("(x+x+)+y", "(?:a?){500}a{500}", ".{0,2000}b.{0,2000}", "(a|b)*a(a|b){18}")],
    ("regex", "(.{0,50}a.{0,50}){30}"),
]


@pytest.mark.parametrize(("kind", "value"), UNUSABLE, ids=lambda v: repr(v)[:40])
def test_what_cannot_be_used_is_refused_in_one_line(vocabulary, kind, value):
    with pytest.raises(RequestError) as error:
        grammar_of(vocabulary, kind, value)
    assert error.value.status == 400 and error.value.param == kind
    assert str(error.value).startswith(f"{kind}: ") and "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(
    "steps",
    [[10_007], [-10_007], [99_999_989], [7, 11, 13], [0.25, 11], [1e-300, 1], [10**300], [0.001, 3], [999, 1000]],
    ids=str,
)
def test_steps_that_would_take_minutes_are_refused(vocabulary, steps):
    schema = {
        "anyOf": [{"type": "object", "properties": {"multipleOf": {"type": "number", "multipleOf": s}}} for s in steps]
    }
    with pytest.raises(RequestError, match="multipleOf takes too long"):
        grammar_of(vocabulary, "json", schema)


@pytest.mark.parametrize("steps", [[7], [0.01], [0.25], [2, 3, 5], [1000], [5, 10, 100]], ids=str)
def test_usual_steps_are_kept(model, vocabulary, steps):
    schema = {"type": "number", "minimum": 0, "maximum": 999, "allOf": [{"multipleOf": step} for step in steps]}
    text, reason = sample(model, grammar_of(vocabulary, "json", schema), 3)
    assert reason == "length" or all(abs(float(text) / step - round(float(text) / step)) < 1e-6 for step in steps)


@pytest.mark.parametrize(("kind", "value"), HEAVY, ids=lambda v: repr(v)[:40])
def test_a_heavy_grammar_is_refused_or_works_or_is_given_up_but_never_hangs(model, vocabulary, kind, value):
    try:
        processor = grammar_of(vocabulary, kind, value)
    except RequestError:
        return
    assert sample(model, processor, 1, most=40)[1] in ("length", "stop")


def test_a_grammar_that_is_given_up_ends_the_text_and_says_why(model, vocabulary):
    processor = grammar_of(vocabulary, "regex", "(a{1000}){1000}")
    assert sample(model, processor, 1, most=40)[1] == "stop" and "too many" in processor.error


def test_options_that_exclude_all_that_may_come_are_reported(model, vocabulary):
    processor = grammar_of(vocabulary, "regex", "aaaaaaaaaaaaaaaaaaaa")
    text, reason = sample(model, processor, 1, no_repeat_ngram_size=1)
    assert reason == "stop" and "exclude" in processor.error and len(text) < 20


def test_a_model_without_an_end_of_text_is_refused(model):
    with pytest.raises(RequestError, match="no token that ends a text"):
        Vocabulary(model.tokenizer, model.config.vocab_size, [])
