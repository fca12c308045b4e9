"""Every command writes what its schema says, and nothing else; each field has a description."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from lfm2kit.building.rank_rates import ExchangeKey, ExchangeRates
from lfm2kit.cli import app, matrix
from lfm2kit.cli.console import write_document
from lfm2kit.records.schemas import common, schemas
from lfm2kit.testing import CHECKS
from lfm2kit.testing import matrix as testing_matrix
from tests.checkpoint.typed import Cli
from tests.generating.folders import model_folder
from tests.records.validating import faults
from tests.simulating.rates import FAST, calibration

ON = ("-b", "reference")
FEW = ("-n", 2, "--batch-size", 1)
FEW_CHECKS = "norm,marks-measure-time"  # one passes, and one is skipped
GENERATE = ("generate", "-m", "small", *ON, "--max-tokens", 3)
# The commands that write each kind, in a folder with the files that `folder` makes.
COMMANDS: dict[str, list[tuple[object, ...]]] = {
    "lfm2kit run": [("run", *ON, *FEW, "-v"), ("run", *ON, *FEW, "--answers", "few.bin", "-v")],
    "lfm2kit generate": [
        (*GENERATE, "It is", "--logprobs", 2, "--prompt-logprobs", 1),
        (*GENERATE, "It is", "-n", 2, "--chat"),
    ],
    "lfm2kit generate --file": [
        (*GENERATE, "--file", "prompts.jsonl", "--output", "answers.jsonl"),
        (*GENERATE, "--file", "none.jsonl", "--output", "answers.jsonl"),
    ],
    "lfm2kit warmup": [("warmup", *ON)],
    "lfm2kit tokenize": [("tokenize", "-m", "small", "--special", "<|im_start|>é")],
    "lfm2kit bench": [
        ("bench", *ON, "-b", "cpu_simd", "-n", 1, "-r", 1, "--threads", 1, "--block", "norm"),
        ("bench", *ON, "-n", 1, "-r", 1, "--seq-len", 2, "--decode"),
    ],
    "lfm2kit plan": [
        ("plan", *ON),
        ("plan", *ON, "--ranks", 2, "--rank", 1, "--load", "load.json", "--context", 9),
        ("plan", "-b", "cpu_simd,attn=reference", "--trim"),
    ],
    "lfm2kit plan --simulate": [
        ("plan", "-m", "random", "--rates", "rates.json", "--simulate", "ranks=1..2,n=4,per-node=2")
    ],
    "lfm2kit backends list": [("backends",), ("backends", "list")],
    "lfm2kit backends check": [
        ("backends", "check", "reference", "--only", "norm,marks-measure-time")
    ],
    "lfm2kit backends check --list": [("backends", "check", "--list")],
    "lfm2kit backends check --explain": [("backends", "check", "--explain", "norm")],
    "lfm2kit backends matrix": [("backends", "matrix", "reference")],
    "lfm2kit env": [("env",)],
    "lfm2kit plugins": [("plugins",)],
    "lfm2kit verify --write-trace": [
        ("verify", *ON, "-m", "random", "--random-inputs", 2, "-n", 1, "--write-trace", "t.npz")
    ],
    "lfm2kit compare": [("compare", "a.json", "b.json")],
}


ELSEWHERE = {
    "lfm2kit rates": "cli/test_calibrate.py",
    "lfm2kit grade": "grading/test_grade.py",
    "lfm2kit profile": "profiling/test_command.py",
    "lfm2kit verify": "verifying/test_command.py",
    "lfm2kit bench --ranks": "mpi/test_jobs.py",
    "lfm2kit transports check": "mpi/test_jobs.py",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, random_folder: Path) -> Path:
    """Return a folder with models, prompts, rates, and some records."""
    folder = tmp_path_factory.mktemp("records")
    model_folder(folder / "small")
    (folder / "random").symlink_to(random_folder)
    (folder / "few.bin").write_bytes(bytes(4 * 4096))
    (folder / "prompts.jsonl").write_text('{"prompt": "It is"}\n')
    (folder / "none.jsonl").write_text('{"prompt": "It is"}\n')
    near = (ExchangeRates(ExchangeKey(2, 1), FAST),)
    write_document(folder / "rates.json", calibration(exchanges=near).document())
    for name in "ab":
        with_load = ("--record-load", folder / "load.json")
        words = ("run", *ON, *FEW, *with_load, "--json", folder / f"{name}.json")
        app(list(map(str, words)), standalone_mode=False)
    return folder


@pytest.fixture
def record_of(
    folder: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Any]:
    """Run a command in the folder, which looks at little, and return its record."""
    monkeypatch.chdir(folder)
    for module in (matrix, testing_matrix):
        monkeypatch.setattr(module, "CHECKS", {"mlp": CHECKS["mlp"]})

    def run(*words: object) -> Any:
        path = tmp_path / "record.json"
        done = cli(*words, "--json", path)
        assert path.exists(), done
        return json.loads(path.read_text())

    return run


@pytest.mark.parametrize(
    ("kind", "words"),
    [(kind, words) for kind, commands in COMMANDS.items() for words in commands],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_command_writes_what_its_schema_says(
    record_of: Callable[..., Any], kind: str, words: tuple[object, ...]
) -> None:
    record = record_of(*words)
    assert record["kind"] == kind
    assert faults(record) == []


def test_every_kind_is_written_and_validated_somewhere() -> None:
    assert COMMANDS.keys() | ELSEWHERE.keys() == schemas().keys()
    for file in ELSEWHERE.values():
        assert "assert faults(" in (Path(__file__).parents[1] / file).read_text()


@pytest.mark.parametrize("where", [(), ("overlap",), ("figures", 0), ("validation",)])
def test_a_field_without_a_line_in_the_schema_is_refused(
    record_of: Callable[..., Any], where: tuple[str | int, ...]
) -> None:
    record = record_of("run", *ON, *FEW, "-v")
    part = record
    for step in where:
        part = part[step]
    part["colour"] = "red"
    (fault,) = faults(record)
    assert "'colour' was unexpected" in fault


@pytest.mark.parametrize("kind", [None, *schemas()])
def test_every_field_has_a_description(kind: str | None) -> None:
    schema = common() if kind is None else schemas()[kind]
    Draft202012Validator.check_schema(schema)
    fields = list(_fields(schema))
    assert fields
    assert [name for name, field in fields if not field.get("description", "").endswith(".")] == []
    assert [name for name, field in fields if not {"type", "enum", "const"} & set(field)] == []


def _fields(schema: dict[str, Any], name: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the fields of a schema, and those of objects in them."""
    for key, field in schema.get("properties", {}).items():
        yield f"{name}.{key}", field
        yield from _fields(field, f"{name}.{key}")
    for inner in ("items", "additionalProperties"):
        if isinstance(schema.get(inner), dict):
            yield from _fields(schema[inner], name)
