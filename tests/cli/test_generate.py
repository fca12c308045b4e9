"""`lfm2kit generate`: text and figures, JSON, how it ends, and bad input in one line."""

from __future__ import annotations

import importlib
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from lfm2kit.chat.thinking import Part
from lfm2kit.cli.speaking import Voice
from lfm2kit.engine.engine import Engine
from lfm2kit.process.streams import READER_GONE, ReaderGone
from lfm2kit.ranks.agreement import Facts, compared
from lfm2kit.records import values
from tests.chat.folders import folder_with
from tests.checkpoint.folders import change_json, copied
from tests.checkpoint.typed import Cli, Typed
from tests.generating.folders import loaded, model_folder

PROMPT = "It is a truth"
READY = r"ready after \S+ s \(imports \S+ s, kernels \S+ s, weights \S+ s\)\n"
FIGURES = r"12 tokens, \S+ tokens/s, the first after \S+ s; peak memory \S+ [MG]B, seed 1\n$"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture
def generate(cli: Cli, folder: Path) -> Callable[..., Typed]:
    def typed(*words: object) -> Typed:
        options = ["-m", folder, "-b", "reference", "--max-tokens", 12, "--seed", 1]
        return cli("generate", *options, *words)

    return typed


def text_of(folder: Path, prompt: str, **options: object) -> str:
    given = {"max_tokens": 12, "seed": 1} | options
    return "".join(loaded(folder).generate(prompt, **given))


def test_the_text_goes_to_stdout_and_the_figures_to_stderr(
    generate: Callable[..., Typed], folder: Path
) -> None:
    done = generate(PROMPT)
    assert (done.code, done.out) == (0, text_of(folder, PROMPT) + "\n")
    assert "on reference, fp32; room for 1 page of" in done.err
    assert re.search(READY + "(.*\n)*.*" + FIGURES, done.err)


def test_a_backend_that_promises_no_bits_is_named_where_a_guess_may_change_a_token(
    cli: Cli, folder: Path
) -> None:
    words = ("generate", PROMPT, "-m", folder, "-b", "reference,mlp=blas", "--max-tokens", 2)
    done = cli(*words, "--speculate", "ngram")
    said = "blas does not promise that a row has the same bits whatever other rows are in the call"
    assert (done.code, f"{said}: BLAS picks its kernel" in done.err) == (0, True)
    because = "--speculate ngram: tokens may differ from those of plain decoding, because blas does"
    assert because in done.err
    plain = cli(*words)
    assert ("--speculate" in plain.err, said in plain.err) == (False, True)


def test_options_reach_the_engine(generate: Callable[..., Typed], folder: Path) -> None:
    done = generate(PROMPT, "--temperature", "0", "--chat", "--system", "Be brief.")
    expected = text_of(folder, PROMPT, temperature=0, chat=True, system="Be brief.")
    assert done.out == expected + "\n"
    stop = expected[3:6]
    stopped = generate(
        PROMPT, "--temperature", "0", "--chat", "--system", "Be brief.", "--stop", stop
    )
    assert stopped.out == expected[: expected.index(stop)] + "\n"


def test_json_has_answers_and_figures(
    generate: Callable[..., Typed], folder: Path, tmp_path: Path
) -> None:
    done = generate(PROMPT, "-n", 2, "--json", tmp_path / "report.json")
    fields = json.loads((tmp_path / "report.json").read_text())
    texts = [answer["text"] for answer in fields["answers"]]
    assert texts == loaded(folder).generate([PROMPT], n=2, seed=1, max_tokens=12)
    assert done.out == "\n---\n".join(texts) + "\n"
    assert [answer["end"] for answer in fields["answers"]] == ["length", "length"]
    assert values(fields, "tokens") == [24]
    assert (fields["seed"], fields["backend"]) == (1, "reference")
    assert fields["prompt_tokens"] > 3
    assert values(fields, "first token") <= values(fields, "time")
    for part in ("imports", "kernels", "weights"):
        assert min(values(fields, f"ready: {part}")) >= 0
    alone = generate(PROMPT, "--json", "-")
    assert json.loads(alone.out)["answers"][0]["text"] == texts[0]
    assert texts[0] in alone.err


def test_json_has_logprobs_with_the_texts_of_tokens(
    generate: Callable[..., Typed], folder: Path
) -> None:
    done = generate(PROMPT, "-n", 2, "--logprobs", 2, "--prompt-logprobs", 1, "--json", "-")
    record = json.loads(done.out)
    answers = loaded(folder).answers(
        PROMPT, n=2, seed=1, max_tokens=12, logprobs=2, prompt_logprobs=1
    )
    none, *of_prompt = record["prompt_logprobs"]
    assert (none, 1 + len(of_prompt)) == (None, record["prompt_tokens"])
    assert "".join(one["text"] for one in of_prompt) == PROMPT
    assert [one["logprob"] for one in of_prompt] == [
        one.logprob for one in answers[0].prompt_logprobs
    ]
    for fields, answer in zip(record["answers"], answers, strict=True):
        said = [
            (one["id"], one["logprob"], [(best["id"], best["logprob"]) for best in one["best"]])
            for one in fields["logprobs"]
        ]
        expected = [(one.token_id, one.logprob, [*one.best]) for one in answer.logprobs]
        assert said == expected
        assert len(said) == 12


def test_a_seed_is_drawn_and_reported(cli: Cli, folder: Path) -> None:
    words = ["generate", PROMPT, "-m", folder, "-b", "reference", "--max-tokens", 4, "--json", "-"]
    seed = json.loads(cli(*words).out)["seed"]
    again = json.loads(cli(*words, "--seed", seed).out)
    assert (again["seed"], isinstance(seed, int)) == (seed, True)


def test_an_interrupt_ends_with_130_and_keeps_what_was_written(
    generate: Callable[..., Typed], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, step = iter(range(7)), Engine.step

    def interrupted(self: Engine) -> object:
        if next(steps) == 6:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Engine, "step", interrupted)
    done = generate(PROMPT)
    monkeypatch.undo()
    assert done.code == 130
    assert len(done.out) > 2
    assert text_of(folder, PROMPT).startswith(done.out)


def test_a_reader_that_has_left_ends_it_silently(
    generate: Callable[..., Typed], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(self: Voice, parts: list[Part]) -> None:
        raise ReaderGone

    monkeypatch.setattr(Voice, "say", gone)
    done = generate(PROMPT)
    assert (done.code, done.out) == (READER_GONE, "")
    assert "error" not in done.err


def test_a_terminal_shows_thoughts_dim_and_no_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.delenv("NO_COLOR", raising=False)
    parts = [Part("so", True), Part("\x1b[2Jé\N{RIGHT-TO-LEFT OVERRIDE}\t\n", False)]
    Voice(None).say(parts)
    assert terminal.getvalue() == "\x1b[2mso\x1b[0m\\x1b[2Jé\\u202e\t\n"
    monkeypatch.setattr(sys, "stdout", pipe := io.StringIO())
    Voice(None).say(parts[1:])
    assert pipe.getvalue() == parts[1].text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "there is no prompt: give one, - to read stdin, or --file JSONL"),
        ([""], "the prompt is empty; give some text"),
        (["", "--chat"], "the prompt is empty"),
        (["a" * 300], "a prompt may have up to 255"),
        (["a", "--max-tokens", 255], "--max-tokens may be up to 254"),
        (["a", "--context", 500], "--context 500"),
        (["a", "--temperature", -1], "--temperature -1.0: expected"),
        (["a", "--temperature", "hot"], "Invalid value for '--temperature'"),
        (["a", "--top-p", 0], "--top-p 0.0: expected a number above 0, up to 1"),
        (["a", "--top-p", 1.5], "--top-p 1.5: expected"),
        (["a", "--min-p", -0.5], "--min-p -0.5: expected a number from 0 to 1"),
        (["a", "--min-p", 2], "--min-p 2.0: expected"),
        (["a", "--top-k", -1], "--top-k -1: expected a whole number of 0 or more"),
        (["a", "--repetition-penalty", 0], "--repetition-penalty 0.0: expected"),
        (["a", "--max-tokens", 0], "--max-tokens 0: expected"),
        (["a", "--stop", "x", "--stop", ""], "--stop x --stop '': no text to stop at may be"),
        (["a", "--logprobs", 21, "--json", "-"], "--logprobs 21: lfm2kit takes up to 20"),
        (["a", "--logprobs", 3], "--logprobs 3: needs --json FILE, where they go"),
        (["a", "--prompt-logprobs", 0], "--prompt-logprobs 0: needs --json FILE"),
        (["a", "--think", "x"], "--think x: expected show or hide"),
        (["a", "--system", "x"], "--system x: is of a chat; add --chat"),
        (["a", "--trim"], "generate needs a state; --trim"),
        (["a", "--output", "x"], "--output x: is of --file, which is not given"),
        (["a", "--keep-going"], "--keep-going: is of --file"),
        (["a", "--ranks", 2, "--trim"], "generate needs a state; --trim"),
        (["a", "--ranks", 2, "--independent"], "--ranks 2 starts a job, and --independent runs"),
        (["--ranks", 2, "--file", "/dev/fd/0", "--output", "x"], "each rank has another file"),
        (["a", "--json", "/nosuch/x"], "--json /nosuch/x"),
    ],
)
def test_bad_input_is_one_line(
    words: list[object], said: str, generate: Callable[..., Typed]
) -> None:
    generate(*words).assert_fails(said)


def test_ranks_that_are_asked_for_something_else_are_told_so(
    generate: Callable[..., Typed], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the first of them reads the prompts, and no rank that others wait for may differ."""
    reported: list[Facts] = []

    def agreed(job: object, prepare: Callable[[], Any], facts: Callable[[Any], Facts]) -> None:
        reported.append(facts(prepare()))
        raise typer.Exit(0)

    monkeypatch.setattr(importlib.import_module("lfm2kit.cli.generate"), "agreed", agreed)

    def refusal(*words: object) -> str:
        reported.clear()
        generate("a")
        generate(*words)
        found = compared(reported)
        return "" if found is None else found.sentence

    assert refusal("a") == ""
    assert "the prompt is a on rank 0 and b on rank 1" in refusal("b")
    assert "--temperature is None on rank 0 and 0.0 on rank 1" in refusal("a", "--temperature", 0)
    assert "--precision is fp32 on rank 0" in refusal("a", "--precision", "bf16", "-b", "auto")


def test_a_model_that_cannot_do_it_is_one_line(cli: Cli, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m", template=None)
    cli("generate", "a", "--chat", "-m", folder).assert_fails("has no chat template")
    change_json(folder / "generation_config.json", top_p=2)
    cli("generate", "a", "-m", folder).assert_fails("generation_config.json: top_p=2")
    (folder / "tokenizer.json").unlink()
    cli("generate", "a", "-m", folder).assert_fails("has no tokenizer.json")


def test_another_models_tokenizer_is_one_line(cli: Cli, tmp_path: Path) -> None:
    folder = folder_with(copied("experts_5_top_1", tmp_path / "m"))
    cli("generate", "a", "-m", folder).assert_fails("this is another model's tokenizer")


def test_stdin_is_read_and_must_be_utf_8(
    generate: Callable[..., Typed], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"It is\n")))
    assert generate("-").out == text_of(folder, "It is\n") + "\n"
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"ab\xff")))
    generate("-").assert_fails("stdin is not UTF-8: byte 0xff at 2")
