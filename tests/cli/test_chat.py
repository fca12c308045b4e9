"""`lfm2kit chat`: turns, commands, Ctrl-C, and bad input in one line."""

from __future__ import annotations

import builtins
import io
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from lfm2kit.engine.engine import Engine
from lfm2kit.generating.from_python import language_of
from lfm2kit.generating.language import Language
from lfm2kit.generating.options import Generation
from lfm2kit.generating.writer import Writer
from lfm2kit.process.interrupts import PROCESS, Interrupted
from lfm2kit.state import Room
from tests.checkpoint.typed import Cli, Typed
from tests.generating.folders import TEMPLATE, loaded, model_folder

HELLO = [{"role": "user", "content": "hello"}]
Chat = Callable[..., Typed]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture
def chat(cli: Cli, folder: Path) -> Chat:
    words = ["chat", "-m", folder, "-b", "reference", "--max-tokens", 8, "--seed", 1]
    return lambda *more: cli(*words, *more)


def pipe(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    stdin = SimpleNamespace(buffer=io.BytesIO(data), isatty=lambda: False)
    monkeypatch.setattr(sys, "stdin", stdin)


def type_lines(monkeypatch: pytest.MonkeyPatch, *lines: str | BaseException) -> None:
    """Let these be typed into a terminal, or come instead of a line."""
    left: Iterator[str | BaseException] = iter([*lines, EOFError()])

    def typed(prompt: str) -> str:
        line = next(left)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr(builtins, "input", typed)


def prompts(monkeypatch: pytest.MonkeyPatch) -> list[list[dict[str, str]]]:
    """Return a list that gets the messages of each turn."""
    asked: list[list[dict[str, str]]] = []
    monkeypatch.setattr(Language, "check_chat", lambda *_: None)  # it asks for a turn of its own
    request = Language.request

    def noted(self: Language, prompt: object, options: object, seed: int) -> object:
        system = getattr(options, "system", None)
        asked.append([*([{"system": system}] if system else []), *prompt])  # type: ignore
        return request(self, prompt, options, seed)  # type: ignore[arg-type]

    monkeypatch.setattr(Language, "request", noted)
    return asked


def test_each_line_is_answered(chat: Chat, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (expected,) = loaded(folder).generate([HELLO], seed=1, max_tokens=8)
    asked = prompts(monkeypatch)
    pipe(monkeypatch, b"hello\n\n/system  Be brief. \nagain\r\n/reset\n/system\nhello\n/exit\nno\n")
    done = chat()
    assert done.code == 0
    assert done.out.startswith(f"{expected}\n")
    assert done.out.endswith(f"\n{expected}\n")
    system, answer = {"system": "Be brief."}, {"role": "assistant", "content": expected}
    again = {"role": "user", "content": "again"}
    assert asked == [HELLO, [system, *HELLO, answer, again], HELLO]


def test_ctrl_c_ends_the_answer_and_not_the_program(
    chat: Chat, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (whole,) = loaded(folder).generate([HELLO], seed=1, max_tokens=8)
    asked = prompts(monkeypatch)
    steps, step = iter(range(1000)), Engine.step

    def interrupted(self: Engine) -> object:
        if next(steps) == 3:
            PROCESS._handle(signal.SIGINT, None)
        return step(self)

    monkeypatch.setattr(Engine, "step", interrupted)
    type_lines(monkeypatch, "hello", KeyboardInterrupt(), "again", "/nosuch", "/reset", "hello")
    done = chat()
    assert done.code == 0
    said = asked[1][1]["content"]
    assert said
    assert whole.startswith(said)
    assert len(said) < len(whole)
    assert [len(messages) for messages in asked] == [1, 3, 1]
    assert "(/exit or Ctrl-D ends the chat)" in done.out
    assert whole in done.out
    assert "there is no /nosuch; /reset forgets" in done.err
    assert PROCESS._heard is None


def test_another_signal_ends_the_program(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    type_lines(monkeypatch, Interrupted(signal.SIGTERM), "hello")
    assert chat().code == 128 + signal.SIGTERM
    step = Engine.step

    def ended(self: Engine) -> object:
        raise Interrupted(signal.SIGHUP)

    monkeypatch.setattr(Engine, "step", ended)
    type_lines(monkeypatch, "hello", "again")
    assert chat().code == 128 + signal.SIGHUP
    monkeypatch.setattr(Engine, "step", step)


def test_a_chat_that_grows_too_long_can_be_reset(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    type_lines(monkeypatch, "a " * 300, "hello", "/exit", "never")
    done = chat()
    assert done.code == 0
    assert "a prompt may have up to 255" in done.err
    assert len(done.out.splitlines()) >= 1


def test_bad_input_is_one_line(
    chat: Chat, cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = model_folder(tmp_path / "m", template=None)
    cli("chat", "-m", folder).assert_fails("has no chat template")
    chat("--temperature", -1).assert_fails("--temperature -1.0: expected")
    chat("-n", 2).assert_fails("No such option: -n")
    for data, words in [
        (b"a\xff\n", "stdin is not UTF-8"),
        (b"/nosuch\n", "there is no /nosuch"),
        (b"/RESET\n", "there is no /RESET"),
        (b"/reset now\n", "/reset stands alone, without 'now'"),
        (b"/exit now\n", "/exit stands alone, without 'now'"),
        (b"a " * 300, "a prompt may have up to 255"),
    ]:
        pipe(monkeypatch, data)
        done = chat()
        assert (done.code, done.out) == (2, "")
        assert words in done.err.splitlines()[-1]
    monkeypatch.setattr(sys, "stdin", None)
    assert "stdin is closed" in chat().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--regex", "("], "the regex cannot be used: unclosed group"),
        (["--json-schema", '{"type": 5}'], "the JSON schema cannot be used: type must be"),
        (["--grammar", "bad.lark"], "the grammar cannot be used: "),
        (["--logit-bias", "423=1"], "--logit-bias: token id 423 is outside the vocabulary of 423"),
        (["--context", 9], "9 tokens that a sequence may have (--context 9)"),
        (["--max-tokens", 256], "256 more do not fit into the 256 tokens that a sequence may have"),
        (["--system", "no"], "the chat template refuses these messages: no system"),
    ],
)
def test_what_no_message_can_have_is_refused_before_the_first_one(
    words: list[object], said: str, chat: Chat, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    if "--system" in words:
        words = [*words, "-m", model_folder(tmp_path / "m", template=f"{refusing}{TEMPLATE}")]
    (tmp_path / "bad.lark").write_text("start: word")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Writer, "__init__", lambda *_, **__: pytest.fail("the model was built"))
    type_lines(monkeypatch)
    chat(*words).assert_fails(said)


LONG = "hello " * 20


def test_a_chat_that_is_full_says_how_to_go_on(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first message that is too long for itself gets no such advice."""
    reset = "/reset forgets what was said before"
    type_lines(monkeypatch, "a " * 300)
    assert reset not in chat().err
    asked = prompts(monkeypatch)
    type_lines(monkeypatch, *[LONG] * 9, "/reset", "hello")
    done = chat()
    lines = [line for line in done.err.splitlines() if reset in line and "error" in line]
    assert len(lines) == 9 - len(done.out.splitlines()) + 2  # after /reset, and for Ctrl-D
    assert all("that a sequence may have (the model's context); " in line for line in lines)
    assert asked[-1] == HELLO


def test_a_full_chat_of_a_pipe_goes_on_and_fails_in_the_end(
    chat: Chat, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (hello,) = loaded(folder).generate([HELLO], seed=1, max_tokens=8)
    pipe(monkeypatch, f"{LONG}\n{LONG * 3}\n/reset\nhello\n".encode())
    done = chat()
    assert done.code == 2
    assert done.err.count("do not fit into the 256 tokens") == 1
    assert done.out.endswith(f"\n{hello}\n")


def test_an_answer_that_the_context_has_cut_off_is_followed_by_a_line(
    chat: Chat, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = len(language_of(loaded(folder)).request(HELLO, Generation(), 0).ids)
    for context, is_full in ((prompt + 8, True), (prompt + 9, False)):
        pipe(monkeypatch, b"hello\n")
        done = chat("--context", context, "--min-tokens", 8)
        said = f"lfm2kit: the context of {context} tokens is full; /reset forgets what was said"
        assert (f"{said} before" in done.err.splitlines()) == is_full
        assert done.code == 0


def test_a_chat_that_the_room_is_too_small_for_says_how_to_go_on(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine says so, when the answer is to begin."""
    monkeypatch.setattr("lfm2kit.engine.engine.room_for", lambda *_: Room(1))
    pipe(monkeypatch, f"hello\n{LONG}\n{LONG}\n{LONG}\n/reset\nhello\n".encode())
    done = chat()
    assert "(the engine's 1 page of " in done.err
    assert "; /reset forgets what was said before" in done.err
    assert done.code == 2
    assert done.out.splitlines()[0] == done.out.splitlines()[-1]
    assert "" not in done.out.splitlines()
