"""`lfm2kit generate --file`: order, resuming, broken lines, and files that are not lost."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfm2kit.engine.drawing import NumPySampler
from lfm2kit.engine.engine import Engine
from lfm2kit.errors import Lfm2kitError
from lfm2kit.generating.answer_file import AnswerFile
from lfm2kit.generating.writer import Writer
from lfm2kit.records import values
from tests.checkpoint.typed import Cli, Typed
from tests.generating.folders import loaded, model_folder

PROMPTS = [{"prompt": text, "max_tokens": n} for text, n in [("It is", 9), ("a", 1), ("hello", 4)]]
Many = Callable[..., Typed]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write(tmp_path / "prompts.jsonl", PROMPTS)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "answers.jsonl"


@pytest.fixture
def many(cli: Cli, folder: Path, prompts: Path, output: Path) -> Many:
    def typed(*words: object) -> Typed:
        files = ["--file", prompts, "--output", output]
        room = ["--context", 64, "--sequences", 4]
        return cli("generate", *files, "-m", folder, "-b", "reference", *room, "--seed", 1, *words)

    return typed


def write(path: Path, lines: list[Any]) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts))
    return path


def answers_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def texts_in(path: Path) -> list[str]:
    return [line["answers"][0]["text"] for line in answers_in(path)]


def texts_alone(folder: Path) -> list[str]:
    model = loaded(folder)
    given = [dict(line) for line in PROMPTS]
    return ["".join(model.generate(line.pop("prompt"), seed=1, **line)) for line in given]


def count_requests(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    begun: list[object] = []
    begin = Writer.begin

    def noted(self: Writer, *words: Any, **options: Any) -> Any:
        begun.append(words[0])
        return begin(self, *words, **options)

    monkeypatch.setattr(Writer, "begin", noted)
    return begun


def test_answers_are_in_the_order_of_the_prompts(
    many: Many, output: Path, folder: Path, tmp_path: Path
) -> None:
    done = many("--json", tmp_path / "report.json")
    assert (done.code, done.out) == (0, "")
    lines = answers_in(output)
    assert [line["line"] for line in lines] == [1, 2, 3]
    assert texts_in(output) == texts_alone(folder)
    assert [line["answers"][0]["tokens"] for line in lines] == [9, 1, 4]
    assert {line["seed"] for line in lines} == {1}
    fields = json.loads((tmp_path / "report.json").read_text())
    assert (fields["prompts"], fields["kept"], fields["failed"]) == (3, 0, 0)
    assert values(fields, "tokens") == [14]
    assert "3 prompts, 14 tokens" in done.err


@pytest.mark.parametrize("kept", [0, 1, 2, 3])
def test_answers_that_are_there_are_kept(
    kept: int, many: Many, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many()
    whole = output.read_bytes()
    lines = whole.splitlines(keepends=True)
    output.write_bytes(b"".join(lines[::-1][:kept]) + lines[0][:20])  # in any order, one cut off
    begun = count_requests(monkeypatch)
    assert many().code == 0
    assert len(begun) == 3 - kept
    assert output.read_bytes() == whole


def test_an_interrupted_run_keeps_what_it_has(
    many: Many, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, step = iter(range(4)), Engine.step

    def interrupted(self: Engine) -> object:
        if next(steps) == 3:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Engine, "step", interrupted)
    assert many().code == 130
    monkeypatch.undo()
    assert [line["line"] for line in answers_in(output)] == [2]
    begun = count_requests(monkeypatch)
    done = many()
    assert f"{output} has 1 of 3 answers already" in done.err
    assert (done.code, len(begun)) == (0, 2)
    assert [line["line"] for line in answers_in(output)] == [1, 2, 3]


BROKEN = [PROMPTS[0], '{"prompt": ', {"prompt": "a", "top_p": 7}, PROMPTS[2]]


def test_a_broken_line_is_named_before_work_begins(
    many: Many, prompts: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(prompts, BROKEN)
    begun = count_requests(monkeypatch)
    many().assert_fails(f"{prompts}, line 2: not readable JSON", "--keep-going")
    assert not begun
    assert not output.exists()


def test_a_broken_option_of_the_command_is_told_before_work_begins(
    many: Many, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Writer, "__init__", lambda *_, **__: pytest.fail("the model was built"))
    many("--keep-going", "--context", 257).assert_fails("--context 257: the model's context has")
    many("--keep-going", "--regex", "(").assert_fails("the regex cannot be used: unclosed group")
    many("--keep-going", "--logit-bias", "423=1").assert_fails("--logit-bias: token id 423 is")
    assert not output.exists()


def test_the_others_run_with_keep_going(
    many: Many, prompts: Path, output: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(prompts, BROKEN)
    done = many("--keep-going")
    assert done.code == 2
    assert "2 of 4 prompts have no answer" in done.err
    first, second, third, fourth = answers_in(output)
    assert [one["answers"][0]["text"] for one in (first, fourth)] == texts_alone(folder)[::2]
    assert second["error"].startswith("not readable JSON")
    assert third == {"line": 3, "error": third["error"]}
    assert "top_p=7: expected" in third["error"]
    write(prompts, [PROMPTS[0], PROMPTS[1], PROMPTS[1], PROMPTS[2]])
    begun = count_requests(monkeypatch)
    assert many().code == 0
    assert len(begun) == 2
    assert [line["line"] for line in answers_in(output)] == [1, 2, 3, 4]


def test_a_prompt_that_fails_meanwhile_is_named(
    many: Many, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Engine._run

    def failing(self: Engine, chunks: Any) -> None:
        if len(chunks) < 3:
            raise Lfm2kitError("no luck")
        run(self, chunks)

    monkeypatch.setattr(Engine, "_run", failing)
    done = many()
    assert done.code == 2
    assert "line 1: no luck; with --keep-going" in done.err
    done = many("--keep-going")
    assert "2 of 3 prompts have no answer" in done.err
    assert [line.get("error") for line in answers_in(output)] == ["no luck", None, "no luck"]


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: ["--max-tokens", 7],
        lambda folder: ["--temperature", 0.5],
        lambda folder: ["--seed", 2],
        lambda folder: ["-m", model_folder(folder / "other")],
    ],
)
def test_answers_to_something_else_are_not_replaced(
    change: Callable[[Path], list[object]],
    many: Many,
    prompts: Path,
    output: Path,
    tmp_path: Path,
) -> None:
    write(prompts, [{"prompt": "a"}])
    many("--max-tokens", 2)
    before = output.read_bytes()
    done = many("--max-tokens", 2, *change(tmp_path))
    done.assert_fails(f"{output}: it has an answer to line 1 that is of another prompt")
    assert output.read_bytes() == before


def test_a_model_is_its_folder_also_where_it_is_called_by_a_dot(
    many: Many, folder: Path, prompts: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(prompts, [{"prompt": "a"}])
    many("--max-tokens", 2)
    before = output.read_bytes()
    monkeypatch.chdir(folder)
    assert many("--max-tokens", 2, "-m", ".").code == 0
    assert output.read_bytes() == before
    monkeypatch.chdir(model_folder(output.parent / "other"))
    done = many("--max-tokens", 2, "-m", ".")
    done.assert_fails(f"{output}: it has an answer to line 1 that is of another prompt")


def test_two_runs_with_one_output_lose_no_answer(output: Path) -> None:
    """The one that finds the other's answers stops, and leaves them there."""
    first, second = (AnswerFile(output, [], lambda said: None) for _ in range(2))
    first.add(1, {"error": "of the first"})
    for change in (lambda: second.add(1, {"error": "of the second"}), second.put_in_order):
        with pytest.raises(Lfm2kitError, match="another process has changed this file"):
            change()
    first.add(2, {"error": "of the first"})
    first.put_in_order()
    assert [line["error"] for line in answers_in(output)] == ["of the first"] * 2


def test_a_file_of_answers_may_have_any_size_but_a_line_may_not(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = AnswerFile(output, [], lambda said: None)
    for number in range(9):
        answers.add(number, {"error": "x" * 50})
    line = len(output.read_bytes()) // 9
    monkeypatch.setattr("lfm2kit.bounds.PROMPTS", line)
    monkeypatch.setattr("lfm2kit.bounds.ANSWER", line)
    AnswerFile(output, [], lambda said: None)
    assert output.read_bytes() == b""  # errors are asked again
    answers = AnswerFile(output, [], lambda said: None)
    answers.add(1, {"error": "x" * 60})
    with pytest.raises(Lfm2kitError, match="it has other lines than answers to prompts"):
        AnswerFile(output, [], lambda said: None)


def test_a_whole_answer_whose_line_has_no_end_is_kept(
    many: Many, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many()
    before = output.read_bytes()
    output.write_bytes(before[:-1])
    begun = count_requests(monkeypatch)
    assert many().code == 0
    assert begun == []
    assert output.read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [
        "a text of mine",
        "a text of mine\n",
        '{"prompt": "a"}\n',
        '{"line": "x"}\n',
        '{"line": 1, "key": "k"}\n',
        "\n",
        '{"line": 7, "key": "k", "answers": []}\n',
        '{"line": 1, "prompt": "a prompt of mine, whose line has no end"}',
    ],
)
def test_a_file_of_something_else_is_not_replaced(content: str, many: Many, output: Path) -> None:
    output.write_text(content)
    many().assert_fails(str(output), "give another file")
    assert output.read_text() == content


def test_no_output_takes_the_place_of_what_is_read(
    many: Many, cli: Cli, prompts: Path, output: Path, folder: Path, tmp_path: Path
) -> None:
    many("--output", prompts).assert_fails("--output", "this file is the prompts")
    many("--output", folder / "config.json").assert_fails("--output")
    many("--json", output).assert_fails("--json", "is --output's as well")
    many("--json", prompts).assert_fails("--json", "this file is the prompts")
    many("--output", tmp_path).assert_fails("this is a folder")
    os.mkfifo(tmp_path / "pipe")
    many("--output", tmp_path / "pipe").assert_fails("pipe")
    assert not output.exists()


def test_a_file_of_prompts_needs_one_for_answers(cli: Cli, prompts: Path, output: Path) -> None:
    cli("generate", "--file", prompts).assert_fails("needs --output")
    both = cli("generate", "a", "--file", prompts, "--output", output)
    both.assert_fails("a prompt and --file: give only one of them")


def test_answers_are_added_as_they_end(
    many: Many, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    added: list[int] = []
    add = AnswerFile.add

    def noted(self: AnswerFile, number: int, fields: dict[str, Any]) -> None:
        add(self, number, fields)
        added.append(number)
        assert [line["line"] for line in answers_in(output)] == added

    monkeypatch.setattr(AnswerFile, "add", noted)
    assert many().code == 0
    assert added == [2, 3, 1]


def test_nan_ends_one_prompt_alone(
    many: Many, output: Path, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    draw = NumPySampler.draw

    def poisoned(self: NumPySampler, logits: Any, rows: Any) -> Any:
        logits = np.array(logits)
        for place, row in enumerate(rows):
            if len(row.prompt) == 2:  # "a" and BOS
                logits[place] = np.nan
        return draw(self, logits, rows)

    monkeypatch.setattr(NumPySampler, "draw", poisoned)
    assert many("--keep-going").code == 2
    first, second, third = answers_in(output)
    monkeypatch.undo()
    assert second["error"].startswith("no token can be drawn at position 2")
    assert [one["answers"][0]["text"] for one in (first, third)] == texts_alone(folder)[::2]


def test_answers_have_the_logprobs_that_a_line_asks_for(
    many: Many, prompts: Path, output: Path, folder: Path
) -> None:
    write(prompts, [PROMPTS[0], PROMPTS[0] | {"logprobs": 1, "prompt_logprobs": 0}])
    assert many().code == 0
    plain, scored = answers_in(output)
    assert "logprobs" not in plain["answers"][0]
    (answer,) = loaded(folder).answers("It is", seed=1, max_tokens=9, logprobs=1)
    (said,) = scored["answers"]
    assert (said["text"], plain["answers"][0]["text"]) == (answer.text, answer.text)
    assert [one["logprob"] for one in said["logprobs"]] == [one.logprob for one in answer.logprobs]
    assert [len(one["best"]) for one in said["logprobs"]] == [1] * 9
    none, *others = scored["prompt_logprobs"]
    assert (none, 1 + len(others)) == (None, scored["prompt_tokens"])
    assert {len(one["best"]) for one in others} == {0}
