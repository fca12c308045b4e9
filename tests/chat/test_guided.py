"""Constraints by llguidance: what they allow, and those that are wrong or cost too much."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llguidance", reason="constraints need the package llguidance")

from lfm2kit import bounds
from lfm2kit.backend import Context
from lfm2kit.chat.guided import Guide, Guided
from lfm2kit.chat.tokenizer import load_tokenizer
from lfm2kit.engine.engine import Engine
from lfm2kit.engine.masks import Patience
from lfm2kit.engine.requests import FAILED, LENGTH, STOP, Event, Request
from lfm2kit.engine.sampling import Sampling
from lfm2kit.errors import Lfm2kitError
from lfm2kit.model import LFM2
from lfm2kit.reference.backend import ReferenceBackend
from lfm2kit.state import Room
from lfm2kit.testing import random_weights
from lfm2kit.testing.tiny_model import build_tiny_model
from tests.chat.folders import folder_with, golden_tokenizer
from tests.core.small import small_spec
from tests.engine.harness import BACKENDS, PAGE_TOKENS, PLUGINS, in_mask, run, tokens_of

TOKENIZER = golden_tokenizer()
END = "<|im_end|>"
STOPS = [number for number, token in TOKENIZER.special.items() if token == END]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 18, "maximum": 99},
        "likes": {"type": "array", "items": {"enum": ["tea", "whales"]}, "maxItems": 2},
        "is_here": {"type": "boolean"},
    },
    "required": ["name", "age", "likes", "is_here"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
DATE = r"(19|20)[0-9]{2}-(0[1-9]|1[0-2])-[0-3][0-9]"
SUM = 'start: NUMBER (" + " NUMBER){1,3}\nNUMBER: /[0-9]{1,3}/'
ANY = Patience(step=3600)  # no mask is late


@cache
def guide() -> Guide:
    return Guide(TOKENIZER)


@cache
def model_of(backend: str = "reference") -> LFM2:
    spec = small_spec(
        layer_types=["conv", "full_attention"], num_hidden_layers=2, num_dense_layers=1,
        num_experts=3, vocab_size=TOKENIZER.size,
    )  # fmt: skip
    on_trial = PLUGINS.creator(Context())(backend)
    return build_tiny_model(spec, random_weights(spec, 0), ReferenceBackend(), on_trial)


def engine_of(backend: str = "reference", pages: int = 8) -> Engine:
    return Engine(model_of(backend), Room(pages, PAGE_TOKENS), patience=ANY)


def request(constraint: Guided | None, seed: int = 0, **others: Any) -> Request:
    given = {"max_tokens": 100, "stop_ids": STOPS} | others
    return Request([1, 2, 3], Sampling(seed=seed), constraint=constraint, **given)


def texts_of(*requests: Request, backend: str = "reference", pages: int = 8) -> list[str]:
    """Return the texts that requests give together, each of which has ended by itself."""
    with engine_of(backend, pages) as engine:
        ids = [engine.add(request) for request in requests]
        events = run(engine)
    assert {event.end for event in events if event.end} == {STOP}
    return [TOKENIZER.decode(tokens_of(events, id)) for id in ids]


def follow(constraint: Guided, text: str) -> bool:
    """Return whether a constraint allows a text, token by token, and may end after it."""
    own = constraint.begin()
    for token_id in TOKENIZER.encode(text, bos=False):
        if not in_mask(own.allowed().ids, TOKENIZER.size)[token_id]:
            return False
        own.take(token_id)
    return own.allowed().may_end


def test_an_answer_of_a_schema_is_json_that_the_schema_allows() -> None:
    requests = [request(guide().json_schema(PERSON), seed) for seed in range(4)]
    for text in texts_of(*requests):
        person = json.loads(text)
        assert list(person) == PERSON["required"]
        assert len(person["name"]) <= 6
        assert type(person["age"]) is int
        assert 18 <= person["age"] <= 99
        assert set(person["likes"]) <= {"tea", "whales"}
        assert len(person["likes"]) <= 2
        assert type(person["is_here"]) is bool


def test_an_answer_of_a_regex_matches_it() -> None:
    texts = texts_of(*[request(guide().regex(DATE), seed) for seed in range(5)])
    assert all(re.fullmatch(DATE, text) for text in texts)
    assert len(set(texts)) > 1


def test_an_answer_of_a_grammar_is_of_the_grammar() -> None:
    texts = texts_of(*[request(guide().grammar(SUM), seed) for seed in range(5)])
    assert all(re.fullmatch(r"\d{1,3}( \+ \d{1,3}){1,3}", text) for text in texts)


def test_a_text_may_have_characters_of_several_tokens() -> None:
    constraint = guide().regex("[äé漢😀]{4}")
    (text,) = texts_of(request(constraint))
    assert re.fullmatch("[äé漢😀]{4}", text)


@pytest.mark.parametrize(
    ("make", "good", "bad"),
    [
        (lambda: guide().json_schema({"type": "integer"}), "-12", "1.5"),
        (lambda: guide().json_schema('{"enum": ["a", 2]}'), '"a"', '"b"'),
        (lambda: guide().json_schema({}), "[null, {}]", "[null, {]"),
        (lambda: guide().json_schema("true"), "3", "three"),
        (lambda: guide().regex("a(b|)"), "ab", "abb"),
        (lambda: guide().regex("a(b|)"), "a", "b"),
        (lambda: guide().regex(""), "", "a"),
        (lambda: guide().regex("a/b"), "a/b", "a\\/b"),
        (lambda: guide().regex("a\\\\"), "a\\", "a"),
        (lambda: guide().regex(r"\p{Lu}+"), "ÄB", "ab"),
        (lambda: guide().grammar('start: "a" start | "b"'), "aab", "aa"),
    ],
)
def test_a_constraint_allows_exactly_what_it_says(
    make: Callable[[], Guided], good: str, bad: str
) -> None:
    assert follow(make(), good)
    assert not follow(make(), bad)


def test_special_tokens_are_allowed_only_where_a_grammar_names_them() -> None:
    special = list(TOKENIZER.special)
    ids = guide().regex("(.|\n)*").begin().allowed().ids
    allowed = in_mask(ids, TOKENIZER.size)
    assert not allowed[special].any()
    assert allowed.sum() > 250
    call = guide().grammar('start: <|tool_call_start|> "f()" <|tool_call_end|>')
    text = call.begin()
    (first,) = np.flatnonzero(in_mask(text.allowed().ids, TOKENIZER.size)).tolist()
    assert TOKENIZER.special[first] == "<|tool_call_start|>"
    text.take(first)
    assert not text.allowed().may_end


def test_a_grammar_may_name_the_end() -> None:
    assert texts_of(request(guide().grammar(f'start: "a" {END}'))) == ["a"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_constrained_and_free_requests_have_the_tokens_that_they_have_alone(backend: str) -> None:
    """Also those that were put back, as there are too few pages for all."""
    constraints = [guide().json_schema(PERSON), guide().regex(DATE), guide().grammar(SUM), None]
    requests = [
        Request([5] * 60, Sampling(seed=seed), 30, stop_ids=STOPS, constraint=constraint)
        for seed, constraint in enumerate(constraints * 2)
    ]
    with engine_of(backend, pages=4) as engine:
        alone = []
        for one in requests:
            id = engine.add(one)
            alone.append(tokens_of(run(engine), id))
        ids = [engine.add(one) for one in requests]
        running, events = [], []
        while engine.is_busy:
            events += engine.step()
            running.append(len(engine._scheduler._running))
        assert [tokens_of(events, id) for id in ids] == alone
        assert any(later < earlier for earlier, later in pairwise(running))


def test_forks_and_choices_obey_the_constraint() -> None:
    constraint = guide().regex("[a-z]{20}")
    with engine_of() as engine:
        id = engine.add(request(constraint, n=3))
        events = [event for _ in range(4) for event in engine.step()]
        begun = tokens_of(events, id)
        fork = engine.fork(id)
        events += run(engine)
    texts = [TOKENIZER.decode(tokens_of(events, id, choice)) for choice in range(3)]
    texts.append(TOKENIZER.decode(begun + tokens_of(events, fork)))
    assert all(re.fullmatch("[a-z]{20}", text) for text in texts)
    assert len(set(texts)) == 4


def failures(*requests: Request) -> list[Event]:
    """Return how requests end together with a free one, which gets its tokens."""
    free = request(None, max_tokens=12, stop_ids=())
    with engine_of() as engine:
        id = engine.add(free)
        alone = tokens_of(run(engine), id)
        ids = [engine.add(one) for one in (*requests, free)]
        events = run(engine)
    assert tokens_of(events, ids[-1]) == alone
    ends = {event.id: event for event in events if event.end}
    assert ends[ids[-1]].end == LENGTH
    return [ends[id] for id in ids[:-1]]


def test_a_regex_that_costs_too_much_after_some_tokens_fails_alone() -> None:
    pattern = "[a-z]{10}a{100000}"
    schema = {"type": "string", "pattern": f"^{pattern}$"}
    constraints = guide().regex(pattern), guide().json_schema(schema)
    events = failures(*[request(constraint) for constraint in constraints])
    assert [event.end for event in events] == [FAILED, FAILED]
    said = "cannot be followed further: lexer error: too many expressions constructed"
    assert [str(event.error) for event in events] == [
        f"the regex {said}",
        f"the JSON schema {said}",
    ]


FORCED = {"x-guidance": {"whitespace_flexible": False}, "required": ["long_name"]}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: guide().regex("((a{100}){100}){100}"),
            "the regex cannot be used: it is too large",
        ),
        (lambda: guide().regex("a{100000}"), "it is too large .*; use smaller counts"),
        (lambda: guide().regex("a{1000000000}"), "it is too large"),
        (lambda: guide().regex("x{10}a{100000}"), "it is too large"),
        (lambda: guide().json_schema({"type": "string", "pattern": "^a{100000}$"}), "too large"),
        (
            lambda: guide().json_schema(
                FORCED
                | {"type": "object"}
                | {"properties": {"long_name": {"type": "string", "pattern": "^a{100000}$"}}}
            ),
            "the JSON schema cannot be used: it is too large",
        ),
        (lambda: guide().grammar('start: "a"{100000}'), "the grammar cannot be used: .* Too many"),
        (lambda: guide().grammar(many_ways(2500)), "cannot be used: .*Current row has 2500 items"),
    ],
)
def test_a_constraint_that_is_too_large_is_refused_before_a_token(
    make: Callable[[], Guided], said: str
) -> None:
    with pytest.raises(Lfm2kitError, match=said):
        make()


def many_ways(count: int) -> str:
    """Return a grammar whose texts begin with an "a" of many rules."""
    rules = "".join(f'\nr{n}: "a" "{n}"' for n in range(count))
    return f"start: {' | '.join(f'r{n}' for n in range(count))}{rules}"


def nested(depth: int) -> Any:
    schema: Any = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


MANY = {"properties": {f"key {number}": {"type": "string"} for number in range(30_000)}}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: guide().regex(r"[^\s\S]"), "the regex cannot be used: there is a place where no"),
        (
            lambda: guide().grammar('start: start "a"'),
            "the grammar cannot be used: there is a",
        ),
        (lambda: guide().regex("a("), "the regex cannot be used: unclosed group"),
        (lambda: guide().regex("(?=a)b"), "the regex .* look-around"),
        (lambda: guide().regex(r"a\b"), "the regex .* lookarounds not supported"),
        (lambda: guide().regex(r"(a)\1"), "backreferences are not supported"),
        (lambda: guide().regex("a\\"), "the backslash at its end escapes nothing"),
        (lambda: guide().regex("(" * 30_000 + ")" * 30_000), "exceed the maximum number of nested"),
        (lambda: guide().regex("a" * 70_000), "the regex has 70000 characters; .* up to 65536"),
        (lambda: guide().regex("\ud800"), "the regex's character 0 is half of a surrogate pair"),
        (lambda: guide().regex(3), "the regex is of type int; expected a string"),
        (lambda: guide().grammar(""), "the grammar cannot be used: Empty grammar"),
        (lambda: guide().grammar('begin: "a"'), "no start rule found"),
        (lambda: guide().grammar("start: word"), 'unknown name: "word"'),
        (lambda: guide().grammar('start: "a'), "lexer error"),
        (lambda: guide().grammar("start: <|no_such|>"), "unknown special token"),
        (lambda: guide().grammar("start: " + "(" * 30_000), "too deeply nested"),
        (lambda: guide().json_schema("{"), "the JSON schema is not JSON: Expecting property name"),
        (lambda: guide().json_schema("[1]"), r"the JSON schema is \[1\]; expected an object"),
        (lambda: guide().json_schema({"a": object()}), "not JSON: Object of type object"),
        (lambda: guide().json_schema({"minimum": float("inf")}), "not JSON: Out of range float"),
        (lambda: guide().json_schema({"type": "thing"}), "cannot be used: Invalid type: thing"),
        (lambda: guide().json_schema({"pattern": "("}), "unclosed group"),
        (lambda: guide().json_schema({"not": {}}), "Unimplemented keys"),
        (lambda: guide().json_schema({"$ref": "http://a/b"}), "Resource 'http://a/b'"),
        (lambda: guide().json_schema(False), "Unsatisfiable schema"),
        (lambda: guide().json_schema({"minLength": 3, "maxLength": 2, "type": "string"}), "Unsat"),
        (lambda: guide().json_schema(nested(300)), "recursion limit exceeded"),
        (lambda: guide().json_schema(nested(5000)), "the JSON schema is not JSON"),
        (lambda: guide().json_schema("[" * 60_000), "the JSON schema is not JSON"),
        (lambda: guide().json_schema(MANY), r"the JSON schema has \d+ characters; lfm2kit takes"),
    ],
)
def test_a_wrong_constraint_is_one_line(make: Callable[[], Guided], said: str) -> None:
    with pytest.raises(Lfm2kitError, match=said) as caught:
        make()
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def chain_of_rules() -> str:
    rules = "".join(f"r{n}:r{n + 1}\n" for n in range(5000))
    return f'start: r0\n{rules}r5000: "a"'


def chain_of_references() -> str:
    """Return a schema that needs more of a stack for its length than others do."""
    before, after = '{"anyOf":[' * 40, "]}" * 40
    definitions = {f"{n}": f'{before}{{"$ref":"#/$defs/{n + 1}"}}{after}' for n in range(100)}
    definitions["100"] = "{}"
    listed = ",".join(f'"{name}":{schema}' for name, schema in definitions.items())
    return f'{{"$ref":"#/$defs/0","$defs":{{{listed}}}}}'


def test_a_constraint_of_any_depth_does_not_end_the_process() -> None:
    assert len(chain_of_rules()) < bounds.CONSTRAINT
    assert follow(guide().grammar(chain_of_rules()), "a")
    assert len(chain_of_references()) < bounds.CONSTRAINT
    assert follow(guide().json_schema(chain_of_references()), "[]")


def test_a_constraint_that_is_not_compiled_in_time_is_one_line() -> None:
    done = threading.Event()

    class Library:
        LLMatcher = staticmethod(lambda *_, **__: done.wait())
        LLParserLimits = dict

    late = Guide(TOKENIZER, seconds=0)
    late._library = Library
    with pytest.raises(Lfm2kitError, match="the regex was not compiled in 0 seconds"):
        late._guided("regex", "a")
    done.set()


def test_a_constraint_that_is_still_compiled_does_not_keep_the_process_from_ending() -> None:
    code = """
import threading
from lfm2kit.chat.guided import Guide
from tests.chat.folders import golden_tokenizer

class Library:
    LLMatcher = staticmethod(lambda *_, **__: threading.Event().wait())
    LLParserLimits = dict

late = Guide(golden_tokenizer(), seconds=0)
late._library = Library
late._guided("regex", "a")
"""
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, timeout=300)
    assert b"the regex was not compiled in 0 seconds" in done.stderr
    assert done.returncode == 1


def intersection(count: int) -> str:
    """Return a grammar whose only token matches several regexes."""
    return "start: T\nT: " + " & ".join(f"/[^{n}]*/" for n in range(count))


def patterns(count: int, **others: Any) -> dict[str, Any]:
    listed = [{"type": "string", "pattern": f"^[^{n}]*$"} for n in range(count)]
    return {"items": {"allOf": listed}} | others


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: guide().grammar(intersection(10)), "the grammar has 9 signs &"),
        (lambda: guide().json_schema(patterns(9)), "has 9 patterns and formats; .* up to 8 where"),
        (lambda: guide().grammar(f"start: %json {json.dumps(patterns(9))}"), "has 9 patterns"),
        (lambda: guide().grammar("start: %json {"), "what follows %json in the grammar is not"),
        (lambda: guide().grammar('{"grammars": [{"json_schema": {}}]}'), "the grammar is JSON"),
        (lambda: guide().json_schema({"multipleOf": 100_003}), "common multiple of more than"),
        (lambda: guide().json_schema({"multipleOf": 1e300}), "common multiple of more than"),
        (lambda: guide().json_schema(multiples(9973, 9967)), "common multiple of more than"),
        (lambda: guide().json_schema(multiples(0.0997, 991)), "common multiple of more than"),
    ],
)
def test_a_constraint_without_a_bound_of_its_cost_is_refused(
    make: Callable[[], Guided], said: str
) -> None:
    with pytest.raises(Lfm2kitError, match=said):
        make()


def multiples(*values: float) -> dict[str, Any]:
    return {"allOf": [{"type": "number", "multipleOf": value} for value in values]}


def test_what_is_just_below_such_a_bound_is_compiled() -> None:
    assert follow(guide().grammar(intersection(4)), "abc")
    assert follow(guide().json_schema(patterns(3)), '["abc"]')
    assert follow(guide().json_schema(multiples(0.01, 2.5)), "7.5")
    assert follow(guide().json_schema({"multipleOf": 1_000_000}), "3000000")
    many = {f"k{n}": {"type": "string", "pattern": f"^{n}x$"} for n in range(20)}
    assert follow(guide().json_schema({"properties": many}), '{"k3": "3x"}')


def test_a_schema_of_many_properties_is_followed_or_fails_alone() -> None:
    schema = {"properties": {f"k{n}": {"enum": [n]} for n in range(900)}}
    (event,) = failures(request(guide().json_schema(schema)))
    if event.end == FAILED:
        assert "the JSON schema cannot be followed further: Parser Error" in str(event.error)


def test_a_tokenizer_without_special_tokens_is_refused(tmp_path: Any) -> None:
    folder_with(tmp_path)
    fields = json.loads((tmp_path / "tokenizer.json").read_text())
    fields["added_tokens"] = []
    fields["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(Lfm2kitError, match="constraints need a tokenizer with a special token"):
        Guide(load_tokenizer(tmp_path))


def test_without_the_library_a_line_says_what_to_install() -> None:
    code = """
import sys
sys.modules["llguidance"] = None
import lfm2kit.engine.engine
from lfm2kit.chat.guided import Guide
from lfm2kit.errors import Lfm2kitError
try:
    Guide(None)
except Lfm2kitError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "llguidance" in said.stdout
    assert said.stdout.endswith("type: pip install 'lfm2kit[chat]'\n")
