"""Makes the flags of commands from options that are defined as fields of dataclasses."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

import typer

from lfm2kit.building.loading import find_model
from lfm2kit.building.options import About, Options
from lfm2kit.building.plugins import installed_plugins
from lfm2kit.checkpoint import Checkpoint, open_checkpoint
from lfm2kit.cli import rewrite_options
from lfm2kit.cli.bus_error import explain_bus_errors
from lfm2kit.errors import Lfm2kitError

WHOLE = re.compile("[-+]?[0-9]{1,4000}")  # without what else Python takes, such as "1_0"
REWRITES = "rewrites"  # the field that several options fill
# What a command of a process alone leaves out.
OF_RANKS = ("parallel", "ep_size", "replicate_experts", "overlap", "exchange")
SHORT = {
    "model": "-m",
    "backend": "-b",
    "n_cpu_moe": "-ncmoe",
    "validate": "-v",
    "warmup": "-w",
    "repetitions": "-r",
}


class Without(NamedTuple):
    """The fields of a dataclass that a command leaves out: `Annotated[Options, Without(...)]`."""

    names: tuple[str, ...]


def flags(name: str, about: About, *, is_path: bool = False) -> Any:
    """Return Typer's description of the option `name`."""
    is_letter = len(name) == 1
    names = [f"-{name}" if is_letter else f"--{name.replace('_', '-')}"]
    is_number = about.least is not None
    parser = partial(_whole, name, about) if is_number else partial(typed_path, names[0])
    default = "" if about.default is None else f" \\[default: {about.default}]"
    return typer.Option(
        *names,
        *([SHORT[name]] if name in SHORT else []),
        parser=parser if is_number or is_path else None,
        metavar=about.metavar or ("N" if is_number else None),
        envvar=about.variable,
        help=about.help + default,
    )


def _whole(name: str, about: About, given: str | int) -> int:
    """Return the number that is typed, or a default, which typer may pass as well."""
    is_whole = WHOLE.fullmatch(str(given)) is not None
    about.check(name, int(given) if is_whole else given)
    return int(given)


def typed_path(name: str, text: str) -> Path:
    """Return a path that is typed; `Path("")`, which a shell's empty variable gives, is "."."""
    if not text:
        raise Lfm2kitError(f"{name} '': the path is empty; give one")
    return Path(text)


JSON = About("Also write the result as JSON; - means stdout.", metavar="FILE|-")
JsonOption = Annotated[str | None, flags("json", JSON)]
RANKS = About("Number of processes that share samples and experts.", least=1)
RanksOption = Annotated[int | None, flags("ranks", RANKS)]
TRANSPORT = About("How ranks exchange data, as `lfm2kit plugins` lists it.", metavar="NAME")
TransportOption = Annotated[str, flags("transport", TRANSPORT)]
IndependentOption = Annotated[
    bool,
    typer.Option("--independent", help="Run alone, even if a launcher started several copies."),
]


def spread(
    command: Callable[..., None],
    refused: Callable[[Lfm2kitError, Mapping[str, Any]], object] = lambda error, values: None,
) -> Callable[..., None]:
    """Return `command` with an option for each field of its parameters that are dataclasses.

    `refused` is called with the options if they do not go together, before the error is raised.
    """
    given = inspect.signature(command, eval_str=True).parameters.values()
    groups = {p.name: group for p in given if (group := _group(p.annotation)) is not None}

    @wraps(command)
    def spread_command(**values: Any) -> None:
        left = dict(values)
        try:
            made = {name: group.made(left) for name, group in groups.items()}
        except Lfm2kitError as error:
            refused(error, values)
            raise
        command(**made, **left)

    parameters: list[inspect.Parameter] = []
    for one in given:
        parameters += groups[one.name].parameters() if one.name in groups else [one]
    by_keyword = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    spread_command.__signature__ = inspect.Signature(by_keyword)  # type: ignore[attr-defined]
    spread_command.__annotations__ = {p.name: p.annotation for p in parameters}
    return spread_command


class _Group(NamedTuple):
    """A dataclass of options, or of further dataclasses of them, and the fields to leave out."""

    type: Any
    without: tuple[str, ...] = ()

    def parameters(self) -> Iterator[inspect.Parameter]:
        """Yield the parameters that Typer makes options of."""
        for field, annotation in self._taken():
            if (inner := _group(annotation)) is not None:
                yield from inner.parameters()
                continue
            if field.name == REWRITES:
                yield from rewrite_options.parameters()
                continue
            is_path = Path in (annotation, *get_args(annotation))
            given = flags(field.name, field.metadata["about"], is_path=is_path)
            described: Any = Annotated[annotation, given]
            kind = inspect.Parameter.KEYWORD_ONLY
            yield inspect.Parameter(field.name, kind, default=field.default, annotation=described)

    def made(self, values: dict[str, Any]) -> Any:
        """Return the dataclass of the options' values, which it takes out of `values`."""
        made: dict[str, Any] = {}
        for field, annotation in self._taken():
            if (inner := _group(annotation)) is not None:
                made[field.name] = inner.made(values)
            elif field.name == REWRITES:
                made[field.name] = rewrite_options.chosen(values)
            else:
                made[field.name] = values.pop(field.name)
        return self.type(**made)

    def _taken(self) -> Iterator[tuple[dataclasses.Field[Any], Any]]:
        types = get_type_hints(self.type)
        for field in dataclasses.fields(self.type):
            if field.name not in self.without:
                yield field, types[field.name]


def _group(annotation: Any) -> _Group | None:
    """Return the dataclass that a parameter's annotation is, if it is one."""
    others: tuple[Any, ...] = ()
    if get_origin(annotation) is Annotated:
        annotation, *rest = get_args(annotation)
        others = tuple(rest)
    if not dataclasses.is_dataclass(annotation):
        return None
    left_out = [name for other in others if isinstance(other, Without) for name in other.names]
    return _Group(annotation, tuple(left_out))


def open_model(options: Options) -> Checkpoint:
    """Open the model that the options name."""
    readers = installed_plugins().readers.values()
    checkpoint = open_checkpoint(find_model(options.model), readers, seed=options.seed or 0)
    explain_bus_errors(checkpoint.path)
    return checkpoint


def files_of(checkpoint: Checkpoint, options: Options) -> dict[str, list[Path]]:
    """Return the files that these options make a command read, which no output may replace."""
    return {
        "one of the model's": checkpoint.files(),
        "the plan": [] if options.plan is None else [options.plan],
        "the rates": [] if options.rates is None else [options.rates],
        "the load": [] if options.load is None else [options.load],
    }
