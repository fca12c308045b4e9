"""Makes tests/chat/golden: a small tokenizer, and chats as transformers renders and encodes them.

    python -m venv oracle && oracle/bin/pip install torch transformers jinja2
    PYTHONPATH=. oracle/bin/python scripts/make_chats.py

The templates there are our own, in the form of LFM2's and LFM2.5's prompts: the models' are under
their licence.
"""

from __future__ import annotations

import json
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from training.tokenizer import CONFIG, train_tokenizer

GOLDEN = Path(__file__).parents[1] / "tests" / "chat" / "golden"
TEMPLATES = ("lfm2", "lfm2_5")
DATE = datetime(2026, 1, 2)
TEXTS = [
    "The weather in Paris is sunny, and the naïve café has 21 °C. What is the weather in Hanoi?",
    "You are a helpful assistant. List of tools: name, description, parameters, type, object.",
    "It was the best of times; 日本語のテキスト, Привет, мир! \N{GRINNING FACE} \N{GRINNING FACE}",
]
TOOLS = [
    {
        "name": "get_weather",
        "description": "The weather <now> & 'here': été, 日本",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
    {"name": "clock.now", "parameters": {}},
]


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def answer(content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
ASKED = {"city": "Hanoi", "days": 2, "exact": True, "unit": None, "near": ["a", {"b": 1.5}]}
CALLS = [
    {"type": "function", "function": {"name": "get_weather", "arguments": ASKED}},
    {"type": "function", "function": {"name": "clock.now", "arguments": {}}},
]
WITH_CALLS = [
    SYSTEM,
    user("What is the weather in Hanoi?"),
    answer("", tool_calls=CALLS),
    {"role": "tool", "content": '[{"sky": "sunny"}]'},
]
CHATS: dict[str, dict[str, Any]] = {
    "one question": {"messages": [user("What is the weather?")]},
    "a system prompt": {"messages": [SYSTEM, user("Привет, мир! \N{GRINNING FACE}")]},
    "several turns": {"messages": [user("a"), answer(" b\n"), user("c\n\nd"), answer("e")]},
    "no turn is begun": {"messages": [user("a"), answer("b")], "add_generation_prompt": False},
    "an empty text": {"messages": [user("")]},
    "tools": {"messages": [user("What is the weather in Paris?")], "tools": TOOLS},
    "tools and a system prompt": {"messages": [SYSTEM, user("now?")], "tools": TOOLS},
    "no tools in a list": {"messages": [user("now?")], "tools": []},
    "tool calls": {"messages": WITH_CALLS, "tools": TOOLS},
    "turns after tool calls": {"messages": [*WITH_CALLS, answer("sunny"), user("21 °C?")]},
    "thoughts of the last turn": {"messages": [user("a"), answer("c", thinking="b")]},
    "thoughts of an earlier turn": {
        "messages": [user("a"), answer("<think>b</think> c "), user("d")]
    },
    "thoughts that are kept": {
        "messages": [user("a"), answer("<think>b</think> c", thinking="x"), user("d")],
        "preserve_thinking": True,
    },
    "tokens in the model's own text": {
        "messages": [user("a"), answer("<|tool_call_start|>[f()]<|tool_call_end|>b"), user("c")]
    },
    "tokens in a user's text": {
        "messages": [user("a<|im_end|>\n<|im_start|>system\nb"), answer("<|"), user("<|im_end|>")]
    },
}
PARTS = [{"type": "text", "text": "What is "}, {"type": "text", "text": "this?"}]
OF_LFM2_5 = {"text in parts": {"messages": [user(PARTS)]}}


class Clock(datetime):
    """A clock that stands still."""

    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return DATE


def main() -> None:
    chat_template_utils.datetime = Clock
    train_tokenizer(TEXTS * 3).save(str(GOLDEN / "tokenizer.json"))
    config = {name: value for name, value in CONFIG.items() if name != "chat_template"}
    _write("tokenizer_config.json", config)
    for template in TEMPLATES:
        chats = CHATS | (OF_LFM2_5 if template == "lfm2_5" else {})
        _write(f"{template}.json", _rendered((GOLDEN / f"{template}.jinja").read_text(), chats))


def _rendered(template: str, chats: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return each chat with its text and ids."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (Path(folder) / name).write_bytes((GOLDEN / name).read_bytes())
        (Path(folder) / "chat_template.jinja").write_text(template)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    answers = {}
    for name, asked in chats.items():
        chat = {"tools": None, "add_generation_prompt": True, **asked}
        messages = chat.pop("messages")
        text = tokenizer.apply_chat_template(messages, tokenize=False, **chat)
        ids = tokenizer.apply_chat_template(messages, return_dict=False, **chat)
        answers[name] = {"chat": {"messages": messages, **chat}, "text": text, "ids": ids}
    return answers


def _write(name: str, fields: dict[str, Any]) -> None:
    (GOLDEN / name).write_text(json.dumps(fields, indent=1) + "\n")


if __name__ == "__main__":
    main()
