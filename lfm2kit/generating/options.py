"""The options of generated text, each defined once: default, bounds, and what it means.

`LFM2.generate` takes them as keyword arguments, a file of prompts as fields, and the command line
makes its flags from them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from secrets import randbelow
from typing import Any

from lfm2kit import bounds
from lfm2kit.building.options import option
from lfm2kit.engine.guesses import SPECULATIONS
from lfm2kit.engine.requests import MOST_CHOICES
from lfm2kit.engine.sampling import MOST_LOGPROBS, RANGES, Sampling
from lfm2kit.errors import Lfm2kitError, Option, choices
from lfm2kit.text import is_encodable

SHOW, HIDE = THINK = "show", "hide"
CHECKPOINTS = "what generation_config.json says"
MOST_TOKENS = 256  # of a text that is continued: a base model rarely ends it
MOST_CONTEXT = bounds.LARGEST["max_position_embeddings"]
# What is of an engine or of a command, and not of one prompt.
OF_ALL = ("chat", "context", "sequences")
SAMPLED = (*RANGES, "logit_bias")
CONSTRAINTS = ("json_schema", "regex", "grammar")


def _number(help: str, words: str = CHECKPOINTS) -> Any:
    return option(None, help, words=words, metavar="X")


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """How text is generated.  Raise `Lfm2kitError` for a value out of bounds, and name it."""

    max_tokens: int | None = option(
        None,
        "The most tokens of an answer.",
        words=f"{MOST_TOKENS}, or in a chat as many as the context leaves",
        least=1,
        most=MOST_CONTEXT,
    )
    min_tokens: int = option(
        0,
        "Do not let the model end an answer before N tokens; a text to stop at still does.",
        least=0,
        most=MOST_CONTEXT,
    )
    temperature: float | None = _number("Divides the logits; 0 always takes the best token.")
    top_k: int | None = option(
        None,
        "Draw from the N best tokens; 0 is all.",
        words=CHECKPOINTS,
        least=0,
        most=bounds.DIMENSION,
    )
    top_p: float | None = _number("Draw from the best tokens whose probabilities reach X together.")
    min_p: float | None = _number("Draw from tokens with at least X times the best probability.")
    repetition_penalty: float | None = _number(
        "Divide the logits of tokens that are there already; above 1 repeats less."
    )
    presence_penalty: float | None = _number(
        "Subtract X from the logits of tokens of the answer.", "0"
    )
    frequency_penalty: float | None = _number(
        "Subtract X from a token's logit for each time that it is in the answer.", "0"
    )
    logit_bias: Mapping[int, float] | None = option(
        None, "What is added to the logits of tokens.", words="none"
    )
    json_schema: Any = option(None, "The answer is JSON of this schema.", words="any text")
    regex: str | None = option(None, "This regular expression matches the answer.")
    grammar: str | None = option(None, "The answer is of this grammar.")
    seed: int | None = option(
        None,
        "The same seed gives the same text.",
        words="drawn at random, and reported",
        least=0,
        most=bounds.SEED,
    )
    stop: list[str] | None = option(
        None,
        "End before this text; repeat the option for several.",
        words="the model alone ends an answer",
        metavar="TEXT",
    )
    logprobs: int | None = option(
        None,
        "Also give the logarithm of each token's probability, and the N best tokens there.",
        words="none",
        least=0,
        most=MOST_LOGPROBS,
    )
    prompt_logprobs: int | None = option(
        None, "The same for the tokens of the prompt.", words="none", least=0, most=MOST_LOGPROBS
    )
    speculate: str | None = option(
        None,
        "ngram: compute several tokens at once where a text may repeat itself; they stay the same.",
        words="one after the other",
        metavar="|".join(SPECULATIONS),
    )
    n: int = option(1, "Number of answers.", least=1, most=MOST_CHOICES)
    chat: bool = option(False, "The prompt is what a user says in a chat.")
    system: str | None = option(None, "The system message of a chat.", words="none", metavar="TEXT")
    special: bool = option(False, "Take special tokens in the prompt for tokens.")
    think: str = option(
        SHOW, "Whether to show thoughts, which are between `<think>` tags.", metavar="|".join(THINK)
    )
    context: int | None = option(
        None,
        "Make room for sequences of up to N tokens.",
        words="the model's context, or what fits into memory",
        least=1,
        most=MOST_CONTEXT,
    )
    sequences: int | None = option(
        None, "Make room for N sequences.", words="16, or what fits into memory", least=1
    )

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if value is not None or one.default is not None:
                one.metadata["about"].check(one.name, value)
        _check_text(self)
        if self.json_schema is not None:
            from lfm2kit.chat.guided import schema_in_json  # here: commands without text do not

            object.__setattr__(self, "json_schema", schema_in_json(self.json_schema))
        self.sampling(Sampling())
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            asked = Option("min_tokens", self.min_tokens)
            raise Lfm2kitError(asked, ": more than ", Option("max_tokens", self.max_tokens))

    def sampling(self, defaults: Sampling, seed: int = 0) -> Sampling:
        """Return the sampling: what is asked for, else the defaults, and `seed` if none is set."""
        values = {name: getattr(defaults, name) for name in SAMPLED} | {"seed": seed}
        given = {name: value for name in SAMPLED if (value := getattr(self, name)) is not None}
        return Sampling(**values | given)

    @property
    def constraint(self) -> tuple[str, str] | None:
        """Return the kind of the constraint that answers obey, and its text, if there is one."""
        for name in CONSTRAINTS:
            if (text := getattr(self, name)) is not None:
                return name, text
        return None

    @property
    def scores(self) -> Option | None:
        """Return the option that asks for logprobs, if one does."""
        for name in ("logprobs", "prompt_logprobs"):
            if (most := getattr(self, name)) is not None:
                return Option(name, most)
        return None


def _check_text(options: Generation) -> None:
    """Raise `Lfm2kitError` for an option that is not the kind of text or flag it should be."""
    for name in ("chat", "special"):
        if not isinstance(value := getattr(options, name), bool):
            raise Lfm2kitError(Option(name, value), ": expected true or false")
    if options.system is not None and not isinstance(options.system, str):
        raise Lfm2kitError(Option("system", options.system), ": expected a text")
    if options.think not in THINK:
        raise Lfm2kitError(Option("think", options.think), f": expected {SHOW} or {HIDE}")
    if options.speculate not in (None, *SPECULATIONS):
        there = ", ".join(SPECULATIONS)
        raise Lfm2kitError(Option("speculate", options.speculate), f": expected {there}")
    for name in ("regex", "grammar"):
        if not isinstance(value := getattr(options, name), str | None):
            raise Lfm2kitError(Option(name, value), ": expected a text")
        if value == "":  # such a regex would leave no answer
            raise Lfm2kitError(Option(name, value), ": expected a text that is not empty")
    if len(given := [name for name in CONSTRAINTS if getattr(options, name) is not None]) > 1:
        first, second = map(Option, given[:2])
        raise Lfm2kitError(first, " and ", second, ": give only one of them")
    if options.stop is not None and not _are_texts(options.stop):
        raise Lfm2kitError(Option("stop", options.stop), ": expected a list of texts")
    if "" in (options.stop or ()):
        raise Lfm2kitError(Option("stop", options.stop), ": no text to stop at may be empty")
    for text in (*(options.stop or ()), options.system or ""):
        if not is_encodable(text):
            asked = Option("system" if text == options.system else "stop", text)
            raise Lfm2kitError(asked, ": not UTF-8, which all text is; convert it")


def _are_texts(value: object) -> bool:
    is_list = isinstance(value, (list, tuple))
    return is_list and all(isinstance(one, str) for one in value)  # type: ignore[attr-defined]


def check_names(given: Iterable[str], without: Iterable[str] = ()) -> None:
    """Raise `Lfm2kitError` for a name that no option has, or one of `without`."""
    there = [one.name for one in fields(Generation) if one.name not in without]
    for name in given:
        if name not in there:
            raise Lfm2kitError(f"unknown option '{name:.80}'; {choices(name, there)}")


def generation(given: Mapping[str, Any]) -> Generation:
    """Return the options of these names; raise `Lfm2kitError` if one is unknown or wrong."""
    check_names(given)
    return Generation(**given)


def drawn_seed() -> int:
    """Return a seed that nobody can foresee."""
    return randbelow(bounds.SEED + 1)
