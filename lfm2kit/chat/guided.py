"""Constraints on what a model writes, by the library `llguidance`: JSON schema, regex, grammar.

    guide = Guide(tokenizer)
    engine.add(Request(ids, constraint=guide.json_schema({"type": "object"})))

Each is compiled where it is made, in milliseconds, or up to a second for the largest ones, and
other threads run meanwhile.  What it may cost is bounded by its length, by what `constraint_costs`
refuses, and by the library's limits, which count steps: so they are the same on every machine.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from lfm2kit import bounds
from lfm2kit.aside import Begun, InOrder
from lfm2kit.chat.constraint_costs import check_grammar, check_schema
from lfm2kit.chat.optional import library
from lfm2kit.chat.tokenizer import Tokenizer, check_encodable
from lfm2kit.engine.constraints import Allowed
from lfm2kit.errors import Lfm2kitError
from lfm2kit.text import shortened

if TYPE_CHECKING:
    import llguidance

# The library's limits of one mask, which is computed in at most 0.05 s of a core's time.  Usual
# constraints stay far below.
LIMITS = {"initial_lexer_fuel": 100_000, "step_lexer_fuel": 100_000, "verbose_errors": False}

# Bytes, for the thread that compiles: the library's depth is that of the constraint, and on a small
# stack it would end the process.  One of bounds.CONSTRAINT characters needs an eighth of this.
STACK = 2**28

SECONDS = 10.0  # in which a constraint must be compiled

EMPTY, NO_TEXT = "NoExtensionBias", "there is a place where no text matches it"
TOO_LARGE = "too many expressions"

_STARTING = threading.Lock()  # the size of a new thread's stack is a setting of the process


class Guide:
    """A maker of constraints for the texts of one tokenizer.  Several threads may use it.

    Its methods raise `Lfm2kitError` for a constraint that is wrong, or could cost too much, or has
    not been compiled in `seconds`; the thread that does it then ends by itself.
    """

    def __init__(self, tokenizer: Tokenizer, seconds: float = SECONDS) -> None:
        """Read the tokenizer, which takes a second where the vocabulary is large.

        Raise `Lfm2kitError` if `llguidance` is missing or cannot use the tokenizer.
        """
        self._library = library("llguidance")
        end = _end_of(tokenizer)
        try:
            self._tokens: llguidance.LLTokenizer = self._library.LLTokenizer(
                tokenizer.description, eos_token=end
            )
        except Exception as error:
            said = shortened(str(error))
            raise Lfm2kitError(
                f"{tokenizer.path}: the library llguidance cannot use it: {said}"
            ) from None
        self._end = end
        self._seconds = seconds

    def json_schema(self, schema: Mapping[str, Any] | str) -> Guided:
        """Return the constraint that a text is JSON of a schema, which is given as data or in JSON.

        Properties come in the schema's order.
        """
        matcher = self._library.LLMatcher
        return self._guided("JSON schema", matcher.grammar_from_json_schema(schema_in_json(schema)))

    def regex(self, pattern: str) -> Guided:
        """Return the constraint that a regular expression, in Rust's syntax, matches the text."""
        _check("regex", pattern)
        if (len(pattern) - len(pattern.rstrip("\\"))) % 2:  # the library would leave it out
            raise Lfm2kitError("the regex cannot be used: the backslash at its end escapes nothing")
        return self._guided("regex", self._library.LLMatcher.grammar_from_regex(pattern))

    def grammar(self, rules: str) -> Guided:
        """Return the constraint that a text is of a grammar, in `llguidance`'s form of Lark's.

        Its first rule is named `start`.
        """
        _check("grammar", rules)
        check_grammar(rules)
        return self._guided("grammar", self._library.LLMatcher.grammar_from_lark(rules))

    def _guided(self, kind: str, grammar: str) -> Guided:
        matcher = self._library.LLMatcher
        limits = self._library.LLParserLimits(**LIMITS)

        def tried() -> tuple[llguidance.LLMatcher, llguidance.LLMatcher]:
            """Return a matcher, and one of its texts, or itself if it has an error."""
            made = matcher(self._tokens, grammar, log_level=0, limits=limits)
            return made, made if made.is_error() else _begun_text(made)

        making = _begun(tried)
        try:
            made, begun = making.future.result(self._seconds)
        except TimeoutError:
            raise Lfm2kitError(
                f"the {kind} was not compiled in {self._seconds:g} seconds; make it simpler"
            ) from None
        if begun.is_error():
            raise Lfm2kitError(f"the {kind} cannot be used: {_explained(begun)}")
        return Guided(kind, made, self._end)


class Guided:
    """A constraint that `Guide` has made, for any number of texts."""

    def __init__(self, kind: str, matcher: llguidance.LLMatcher, end: int) -> None:
        self._kind = kind
        self._matcher = matcher  # never goes on: texts have copies
        self._end = end

    def begin(self) -> GuidedText:
        """Return a text that has no tokens yet."""
        return GuidedText(self._kind, self._matcher.deep_copy(), self._end)


class GuidedText:
    """A text that obeys a constraint."""

    def __init__(self, kind: str, matcher: llguidance.LLMatcher, end: int) -> None:
        self._kind = kind
        self._matcher = matcher
        self._end = end

    def take(self, token_id: int) -> None:
        """Add a token to the text; raise `Lfm2kitError` if it may not come there."""
        if not self._matcher.consume_token(token_id):
            self._raise()

    def allowed(self) -> Allowed:
        """Return what may come next; raise `Lfm2kitError` if finding out costs too much."""
        words = np.frombuffer(self._matcher.compute_bitmask(), np.uint32).copy()
        if self._matcher.is_error():
            self._raise()
        bit = np.uint32(1 << self._end % 32)
        may_end = bool(words[self._end // 32] & bit)
        words[self._end // 32] &= ~bit
        return Allowed(words, may_end)

    def _raise(self) -> None:
        raise Lfm2kitError(f"the {self._kind} cannot be followed further: {_said(self._matcher)}")


def _end_of(tokenizer: Tokenizer) -> int:
    """Return the special token by which the library says that a text may end."""
    named = tokenizer.config.named.get("eos_token")
    ids = [number for number, token in tokenizer.special.items() if token == named]
    if not (ids or tokenizer.special):
        raise Lfm2kitError(f"{tokenizer.path}: constraints need a tokenizer with a special token")
    return ids[0] if ids else min(tokenizer.special)


def schema_in_json(schema: Mapping[str, Any] | str) -> str:
    """Return a schema as one value of JSON; raise `Lfm2kitError` if it cannot be."""
    try:
        if isinstance(schema, str):
            _check("JSON schema", schema)
            schema = json.loads(schema)
        text = json.dumps(schema, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise Lfm2kitError(f"the JSON schema is not JSON: {shortened(str(error))}") from None
    if not isinstance(schema, dict | bool):
        raise Lfm2kitError(f"the JSON schema is {shortened(text, 60)}; expected an object")
    _check("JSON schema", text)
    check_schema(schema)
    return text


def _check(kind: str, text: str) -> None:
    """Raise `Lfm2kitError` if a constraint is not a string, or is too long."""
    if not isinstance(text, str):
        raise Lfm2kitError(f"the {kind} is of type {type(text).__name__}; expected a string")
    if len(text) > bounds.CONSTRAINT:
        raise Lfm2kitError(
            f"the {kind} has {len(text)} characters; lfm2kit takes up to {bounds.CONSTRAINT}"
        )
    check_encodable(text, kind)


def _begun(call: Callable[[], Any]) -> Begun:
    """Begin a call that may go deep, in a thread of its own."""
    with _STARTING:
        before = threading.stack_size(STACK)
        try:
            return InOrder().begin(call)
        finally:
            threading.stack_size(before)


def _begun_text(made: llguidance.LLMatcher) -> llguidance.LLMatcher:
    """Return a text of a constraint, with the tokens by which all of its texts begin.

    Of a mask that costs too much the library says so only where the text goes on after it.
    """
    begun = made.deep_copy()
    begun.compute_bitmask()
    begun.consume_tokens(begun.compute_ff_tokens())
    if not begun.is_stopped():
        begun.compute_bitmask()
    return begun


def _explained(matcher: llguidance.LLMatcher) -> str:
    """Return why a constraint cannot be used."""
    reason = _said(matcher)
    if EMPTY in reason:
        return NO_TEXT
    return f"it is too large ({reason}); use smaller counts" if TOO_LARGE in reason else reason


def _said(matcher: llguidance.LLMatcher) -> str:
    """Return the library's reason in one line: of the error of a regex, without the picture."""
    first, *others = matcher.get_error().splitlines() or [""]
    reasons = [line.strip() for line in others if line.strip().startswith("error: ")]
    return shortened(reasons[0].removeprefix("error: ") if reasons else first, 300)
