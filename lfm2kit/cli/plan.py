"""`lfm2kit plan`: what would be built, block by block, before a weight is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any

from rich.box import SIMPLE_HEAD
from rich.table import Column

from lfm2kit.backend import KeepsFormats
from lfm2kit.building.byte_counts import size
from lfm2kit.building.capacity import Needed, answers_of, memories
from lfm2kit.building.copies import copies_of
from lfm2kit.building.loading import Setup
from lfm2kit.building.options import About, Options
from lfm2kit.building.placement import Placed
from lfm2kit.building.sharing import Sharing
from lfm2kit.cli import rank_loads, rank_shares
from lfm2kit.cli.console import show_table
from lfm2kit.cli.flags import told
from lfm2kit.cli.options import JsonOption, Without, files_of, flags, open_model, spread
from lfm2kit.cli.preparing import MOST_BY_DEFAULT
from lfm2kit.cli.ranks import refuse_copies
from lfm2kit.cli.report import Report
from lfm2kit.cli.rewrite_options import check_state
from lfm2kit.cli.simulating import simulate as simulated
from lfm2kit.errors import Lfm2kitError
from lfm2kit.formats import fate
from lfm2kit.measuring.gathering import gathered_bytes
from lfm2kit.memory import HOST
from lfm2kit.overlapped import OFF
from lfm2kit.process.machine import memory_limits
from lfm2kit.ranks.shares import distinct, shares
from lfm2kit.records.machine import machine_of
from lfm2kit.simulating.request import EXAMPLE
from lfm2kit.state import Room

PAGE = Room(0).page_tokens
TOKENS = 2048
SIMULATE = (
    "Predict jobs of many ranks instead, from what lfm2kit calibrate measured, such as "
    f"{EXAMPLE}: 1..256 are powers of two, 1/2/6 is a list. Also latency=20us, tokens=16 of a "
    "sample, memory=24GB of a rank, overlap=0.8, the share of an exchange that is hidden, and "
    "placement=order, for a load by which tokens choose experts, but no expert is placed."
)


@spread
def plan(
    options: Annotated[Options, Without(("seed", "check"))],
    ranks: Annotated[
        int,
        flags("ranks", About("Show what each of N ranks holds, without starting any.", least=1)),
    ] = 1,
    ranks_per_node: Annotated[
        int | None,
        flags("ranks_per_node", About("Ranks on a machine like this one.", "all of them", least=1)),
    ] = None,
    rank: Annotated[int, flags("rank", About("The rank whose blocks are shown.", least=0))] = 0,
    tokens: Annotated[
        int,
        flags("tokens", About("Tokens in a forward, which scratch memory depends on.", least=1)),
    ] = TOKENS,
    samples: Annotated[
        int,
        flags(
            "samples",
            About("Samples of a job of several ranks, whose logits rank 0 gathers.", least=1),
        ),
    ] = MOST_BY_DEFAULT,
    context: Annotated[
        int,
        flags(
            "context",
            About(f"Tokens that the state keeps of each sequence, in pages of {PAGE}.", least=0),
        ),
    ] = 0,
    sequences: Annotated[
        int,
        flags("sequences", About("Sequences in the state, with --context tokens each.", least=1)),
    ] = 1,
    simulate: Annotated[
        str | None,
        flags("simulate", About(SIMULATE, metavar="KEY=VALUE,...")),
    ] = None,
    json: JsonOption = None,
) -> None:
    """Show each block's backend, memory, bytes and copies, without loading any weights."""
    refuse_copies()
    if simulate is not None:
        if ranks > 1 or ranks_per_node is not None:
            raise Lfm2kitError("--simulate has ranks of its own; leave out --ranks")
        _check_simulated(
            rank=rank, tokens=tokens, samples=samples, context=context, sequences=sequences
        )
        simulated(simulate, options, json)
        return
    report = Report(json, "lfm2kit plan")
    checkpoint = open_model(options)
    report.check_apart(files_of(checkpoint, options))
    if rank >= ranks:
        there = f"ranks are 0 to {ranks - 1}" if ranks > 1 else "there is only rank 0"
        raise Lfm2kitError(f"--rank {rank}: {there}; give --ranks {rank + 1}")
    nodes = _nodes(ranks, ranks_per_node)
    of_ranks = shares(checkpoint, options, nodes, tokens)
    setup = of_ranks[rank]
    if context:
        check_state(f"--context {context}", setup.rewrites)
    room = _room(sequences, context)
    rows = [_row(leaf, setup, tokens, room) for leaf in setup.placed.leaves()]
    known = {id(one): _totals(one, tokens, room) for one in distinct(of_ranks)}
    totals = [known[id(one)] for one in of_ranks]
    if ranks > 1:
        vocab_size = checkpoint.spec.lm_head.vocab_size
        totals[0] = _with_logits(totals[0], gathered_bytes(samples, vocab_size))
    report.machine = machine_of(setup)
    report.fields = {
        "model": str(checkpoint.path),
        "plan": str(setup.plan),
        "precision": setup.precision_of(setup.placed),
        "blocks": rows,
        "totals": totals[rank],
        "copied": copies_of(setup.placed)._asdict(),
        "waits": dict(_waits(setup.placed)),
        "rank": rank,
        "ranks": ranks,
        "groups": setup.grouping.groups,
        "overlap": setup.options.overlap if has_exchanges(setup) else OFF,
        "shares": rank_shares.fields_of(of_ranks, nodes, totals),
        "expected": rank_loads.fields_of(setup),
        "rewrites": [rewrite.name for rewrite in setup.rewrites],
        "block_notes": dict(_block_notes(setup)),
        "predicted": None if setup.sharing is None else _predicted(setup.sharing),
        "free_bytes": setup.sizes.free(setup.placed),
        "host_limits": {bound.name: bound._asdict() for bound in memory_limits()},
        "room": asdict(room),
        "shortage": _shortage(of_ranks, tokens, room),
        "notes": [*setup.notes(), *_without_state(sequences, room)],
    }
    _add_figures(report, setup)
    if json != "-":
        _show(report, setup, tokens, room)
    report.write()


def _add_figures(report: Report, setup: Setup) -> None:
    """Add the bytes in each memory of the rank that is shown, the copies, and what is predicted."""
    for memory, total in report.fields["totals"].items():
        for kind in ("weight", *Needed._fields, "logits"):
            report.figure(f"{memory}: {kind}", "B", [total[f"{kind}_bytes"]])
    report.figure("copied arrays", "arrays", [copies_of(setup.placed).total])
    if setup.sharing is not None:
        report.figure("predicted time", "s", [setup.sharing.seconds])


def _check_simulated(**given: int) -> None:
    """Raise `Lfm2kitError` for an option of a single plan that `--simulate` knows nothing of."""
    defaults = {
        "rank": 0,
        "tokens": TOKENS,
        "samples": MOST_BY_DEFAULT,
        "context": 0,
        "sequences": 1,
    }
    for name, value in given.items():
        if value != defaults[name]:
            instead = "; its KEY=VALUE tokens= is of a sample" if name == "tokens" else ""
            raise Lfm2kitError(
                f"--{name} {value}: not together with --simulate; leave it out{instead}"
            )


def has_exchanges(setup: Setup) -> bool:
    """Return whether tokens travel between ranks."""
    return any(len(group) > 1 for group in setup.grouping.groups)


def _shortage(of_ranks: Sequence[Setup], tokens: int, room: Room) -> str | None:
    """Say which memory of which rank is too small, the first of them; None if all shares fit."""
    for setup in distinct(of_ranks):
        if (shortage := setup.shortage(tokens, room)) is not None:
            which = f"rank {setup.world.rank}: " if len(of_ranks) > 1 else ""
            return f"{which}{told(shortage)}"
    return None


def _nodes(ranks: int, ranks_per_node: int | None) -> list[int]:
    """Return the machine of each rank; the last one may have fewer ranks than the others."""
    if ranks_per_node is not None and ranks_per_node > ranks:
        enough = f"give --ranks {ranks_per_node} or more"
        there = "there is only one rank" if ranks == 1 else f"there are {ranks} ranks"
        raise Lfm2kitError(f"--ranks-per-node {ranks_per_node}: {there}; {enough}")
    return [rank // (ranks_per_node or ranks) for rank in range(ranks)]


def _predicted(sharing: Sharing) -> dict[str, Any]:
    """Return what is predicted for the layers whose experts are split."""
    return {
        "seconds": sharing.seconds,
        "limit": str(sharing.limit),
        "layers": [{"seconds": one.seconds, "limit": str(one.limit)} for one in sharing.layers],
    }


def _room(sequences: int, context: int) -> Room:
    try:
        return Room.of_sequences(sequences, context)
    except ValueError as error:
        raise Lfm2kitError(f"--sequences {sequences} --context {context}: {error}") from None


def _row(leaf: Placed, setup: Setup, tokens: int, room: Room) -> dict[str, Any]:
    return {
        "block": leaf.name,
        "spec": type(leaf.spec).__name__,
        "backend": leaf.backend,
        "memory": leaf.memory.name,
        "formats": _formats(leaf, setup),
        "weight_bytes": setup.stored_bytes(leaf),
        "kept_bytes": setup.sizes.kept(leaf),
        "scratch_bytes": setup.sizes.scratch(leaf, tokens),
        "pinned_bytes": setup.sizes.pinned(leaf),
        "state_bytes": setup.sizes.state(leaf, room),
        "copy": _copy(leaf),
        "crosser": leaf.crosser,
    }


def _formats(leaf: Placed, setup: Setup) -> list[str] | None:
    """Say in which formats a block keeps its matrices, or its vectors if it has no matrix.

    None if its backend does not say.
    """
    assert leaf.backend is not None  # a leaf's always is
    if not isinstance(setup.create(leaf.backend), KeepsFormats):
        return None
    weights = setup.checkpoint.weights.scope(leaf.scope)
    kept = answers_of(setup.create, leaf).kept_formats(leaf.spec, weights)
    matrices = [name for name in kept if len(weights[name].shape) == 2]
    fates = (fate(weights[name].format, kept[name]) for name in matrices or kept)
    return list(dict.fromkeys(fates))


def _block_notes(setup: Setup) -> Iterator[tuple[str, str]]:
    """Yield what blocks have to say beside the table: their specs' notes, copies around joins."""
    for placed in setup.placed.tree():
        note = placed.spec.note()
        copy = _copy(placed) if placed.backend is None else None
        if note or copy:
            yield placed.name, "; ".join(filter(None, (note, copy)))


def _waits(placed: Placed) -> Iterator[tuple[str, str]]:
    """Yield the blocks around which copies are waited for, and why they are not crossed."""
    for one in placed.tree():
        if one.why_not_crossed is not None:
            yield one.name, one.why_not_crossed


def _copied(model: Placed) -> str:
    """Say how many arrays a forward copies, and what they are."""
    copies = copies_of(model)
    said = f"arrays copied between memories in a forward: {copies.total}"
    of_blocks = f"{copies.around} around {model.copies()} blocks"
    parts = f" ({of_blocks}, {copies.batch} of the batch, {copies.logits} of the logits)"
    return said + parts if copies.total else said


def _copy(placed: Placed) -> str | None:
    return f"{placed.outer.name} <-> {placed.memory.name}" if placed.is_copied else None


def _totals(setup: Setup, tokens: int, room: Room) -> dict[str, dict[str, int]]:
    """Return bytes per memory; a tied head's weights count again, because it may repack them."""
    leaves: dict[str, list[Placed]] = {name: [] for name in memories(setup.placed)}
    for leaf in setup.placed.leaves():
        leaves[leaf.memory.name].append(leaf)
    return {
        memory: {
            "weight_bytes": sum(setup.stored_bytes(leaf) for leaf in here),
            **_named(setup.sizes.needed(setup.placed, memory, tokens, room)),
            "logits_bytes": 0,
            "blocks": len(here),
            "unknown_blocks": setup.sizes.unknown(here),
        }
        for memory, here in leaves.items()
    }


def _with_logits(
    totals: Mapping[str, dict[str, int]], logits_bytes: int
) -> dict[str, dict[str, int]]:
    """Return the bytes of rank 0, which gathers logits in the host's memory."""
    none = dict.fromkeys(next(iter(totals.values())), 0)  # if no block works there
    return {**totals, HOST.name: {**totals.get(HOST.name, none), "logits_bytes": logits_bytes}}


def _named(needed: Needed) -> dict[str, int]:
    return {f"{kind}_bytes": count for kind, count in needed._asdict().items()}


def _show(report: Report, setup: Setup, tokens: int, room: Room) -> None:
    fields = report.fields
    has_ranks = fields["ranks"] > 1
    of_ranks = f", rank {fields['rank']} of {fields['ranks']}" if has_ranks else ""
    report.line(f"{setup.checkpoint.path}: {setup.plan}{of_ranks}")
    headings = ("block", "spec", "backend", "memory", "formats", "copy")
    sizes = ("weights", "kept", f"scratch at {tokens} tokens", "state")
    show_table(
        [_texts(row) for row in report.fields["blocks"]],
        *(Column(heading, overflow="fold") for heading in headings),
        *(Column(heading, justify="right", no_wrap=True) for heading in sizes),
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    free = setup.sizes.free(setup.placed)
    for memory, total in report.fields["totals"].items():
        left = (
            f"; {_size(free[memory])} are free{_for_whom(memory, setup)}" if memory in free else ""
        )
        weights = size(total["weight_bytes"])
        report.line(
            f"{memory}: {weights} of weights as stored, {_taken(total, tokens, room)}{left}"
        )
    if has_ranks:
        report.line(
            f"{fields['ranks']} ranks, {setup.grouping}, with {tokens} tokens at once each:"
        )
        rank_shares.show(fields["shares"])
        report.line(f"overlap of exchange and computation: {fields['overlap']}")
    if fields["expected"] is not None:
        rank_loads.show(report, fields["expected"])
    if pinned := sum(row["pinned_bytes"] for row in fields["blocks"]):
        report.line(f"{HOST.name}: {size(pinned)} of weights pinned, to be copied to a device")
    for bound in memory_limits():
        report.line(f"{bound.name}: {size(bound.free)} free of {size(bound.limit)}")
    if (shortage := report.fields["shortage"]) is not None:
        report.line(shortage)
    report.line(_copied(setup.placed))
    waits = {name: f"waits for its copies: {why}" for name, why in fields["waits"].items()}
    for line in _grouped(waits):
        report.line(line)
    if setup.sharing is not None:
        milliseconds = f"{1e3 * setup.sharing.seconds:.3g} ms with {tokens} tokens at once"
        report.line(f"predicted: {milliseconds}; most of it waits for the {setup.sharing.limit}")
    for line in _grouped(report.fields["block_notes"]):
        report.line(line)
    for note in fields["notes"]:
        report.line(note)


def _without_state(sequences: int, room: Room) -> Iterator[str]:
    """Yield a remark on sequences that take no memory, because they have no tokens."""
    if sequences > 1 and not room.pages:
        yield f"--sequences {sequences} needs --context TOKENS to show a state"


def _for_whom(memory: str, setup: Setup) -> str:
    """Say that the ranks of a machine share its memory evenly."""
    ranks = setup.world.local_size
    return f" for each of {ranks} ranks" if ranks > 1 and memory == HOST.name else ""


def _taken(total: Mapping[str, int], tokens: int, room: Room) -> str:
    """Say what the blocks in one memory take, and for how many of them that is not known."""
    unknown, blocks = total["unknown_blocks"], total["blocks"]
    kept, scratch, exchange, state = (size(total[f"{kind}_bytes"]) for kind in Needed._fields)
    if unknown == blocks:
        taken = f"kept and scratch bytes unknown for all {blocks} blocks"
    else:
        least = "at least " if unknown else ""
        taken = f"{least}{kept} kept, {least}{scratch} of scratch with {tokens} tokens at once"
        taken += f" (unknown for {unknown} of {blocks} blocks)" if unknown else ""
    if total["exchange_bytes"]:
        taken += f", {exchange} for the exchange with other ranks"
    if total["logits_bytes"]:
        taken += f", {size(total['logits_bytes'])} for the logits that all ranks send"
    if room.pages:
        taken += f", {state} of state in {room.pages} pages of {room.page_tokens} tokens"
    return taken


def _grouped(notes: dict[str, str]) -> Iterator[str]:
    """Yield a line for each note, with the blocks that it is about."""
    blocks: dict[str, list[str]] = {}
    for name, note in notes.items():
        blocks.setdefault(note, []).append(name)
    for note, names in blocks.items():
        many = f" to {names[-1]} ({len(names)} blocks)" if len(names) > 1 else ""
        yield f"{names[0]}{many}: {note}"


def _texts(row: dict[str, Any]) -> list[str]:
    formats = "?" if row["formats"] is None else ", ".join(row["formats"])
    texts = [*(row[key] for key in ("block", "spec", "backend", "memory")), formats]
    crosser = f", by {row['crosser']}" if row["crosser"] else ""
    texts.append(f"{row['copy'] or ''}{crosser}")
    kinds = ("weight_bytes", "kept_bytes", "scratch_bytes", "state_bytes")
    return [*texts, *(_size(row[kind]) for kind in kinds)]


def _size(count: int | None) -> str:
    return "?" if count is None else size(count)
