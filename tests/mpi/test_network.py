"""Jobs over the links of `scripts/network.py`: the bits of one process, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfm2kit.measuring import samples
from tests.mpi import faulty
from tests.mpi.test_faults import A_WHILE, BLOCK, LFM2KIT, MARK, RUN, marked, until_ended
from tests.mpi.test_transport import PROLOGUE

pytest.importorskip("lfm2kit_mpi", reason="the MPI transport is a distribution of its own")

from lfm2kit_mpi.launcher import find_mpiexec

pytestmark = pytest.mark.mpi
SCRIPT = Path(__file__).parents[2] / "scripts" / "network.py"
NETWORK = [sys.executable, str(SCRIPT)]
# What the script asks of the kernel, one by one, so that a fault of the script is not taken for it.
NEEDED = """
mount -t tmpfs names /run/netns && ip netns add node && ip link add switch type bridge &&
ip link add port type veth peer name eth0 netns node &&
tc -n node qdisc add dev eth0 root tbf rate 1gbit burst 128kb latency 100ms &&
ip netns exec node true
"""
PART = 1 << 18  # bytes that each rank sends to each other one


@pytest.fixture(scope="module", autouse=True)
def _needs_namespaces_and_mpich() -> None:
    for tool in ("ip", "tc", "unshare", "nsenter"):
        if shutil.which(tool) is None:
            pytest.skip(f"there is no {tool} here")
    user = [] if os.geteuid() == 0 else ["--map-root-user"]
    apart = ["unshare", *user, "--net", "--mount", "--pid", "--fork"]
    tried = subprocess.run(
        [*apart, "sh", "-c", f"mkdir -p /run/netns && {NEEDED.strip()}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if tried.returncode != 0:
        pytest.skip(f"no network of namespaces here: {tried.stderr.strip()}")
    version = subprocess.run([find_mpiexec(), "--version"], capture_output=True, check=False)
    if b"HYDRA" not in version.stdout:
        pytest.skip("the environment variables that name the nodes are those of MPICH's mpiexec")


def on_network(
    *words: str, given: list[str], variables: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the command `words` on a network with the options `given`."""
    return subprocess.run(
        [*NETWORK, *given, "--", *words],
        capture_output=True, text=True, timeout=A_WHILE, env=os.environ | (variables or {}),
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("alone") / "outputs.bin"
    run = ["run", "-n", "9", "--backend", "reference", "--outputs", str(path)]
    subprocess.run([*LFM2KIT, *run], check=True, capture_output=True)
    return samples.read_answers(path)


@pytest.mark.parametrize(
    ("nodes", "ranks_per_node"),
    [*(pytest.param(n, 1, marks=pytest.mark.long) for n in (2, 4)), (2, 2)],
)
def test_logits_over_links_have_the_bits_of_one_process(
    nodes: int, ranks_per_node: int, alone: Any, tmp_path: Path
) -> None:
    path, ranks = tmp_path / "outputs.bin", nodes * ranks_per_node
    given = ["--nodes", str(nodes), "--rate", "200mbit", "--ranks-per-node", str(ranks_per_node)]
    run = ["run", "-v", "-n", "9", "--backend", "reference", "--batch-size", "4", "--json", "-"]
    done = on_network(
        *LFM2KIT, *run, "--ranks", str(ranks), "--outputs", str(path), given=given
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ranks"] == ranks
    assert "VALID" in done.stderr.splitlines()
    np.testing.assert_array_equal(samples.read_answers(path), alone)


# Each rank prints who shares its node, what its node's link has sent, and how often it was held up.
ALL_TO_ALL = f"""
{PROLOGUE}
import json, subprocess
from pathlib import Path
def sent():
    (line,) = (l for l in Path("/proc/self/net/dev").read_text().splitlines() if "eth0:" in l)
    return int(line.split()[9])
rows = np.zeros((world.size, {PART}), np.uint8)
transport.barrier()
before = sent()
transport.barrier()
transport.all_to_all(rows, [1] * world.size)
transport.barrier()
after = sent()
transport.barrier()
(link,) = json.loads(subprocess.check_output(["tc", "-s", "-j", "qdisc", "show", "dev", "eth0"]))
row = [world.local_size, after - before, link["overlimits"]]
every = transport.gather(np.array([row], np.int64))
if world.rank == 0:
    print(json.dumps(every.tolist()))
transport.finish(0)
"""


@pytest.mark.parametrize(
    ("nodes", "ranks_per_node"), [pytest.param(4, 1, marks=pytest.mark.long), (2, 2)]
)
def test_what_ranks_of_different_nodes_exchange_goes_over_the_links(
    nodes: int, ranks_per_node: int, tmp_path: Path
) -> None:
    script, ranks = tmp_path / "script.py", nodes * ranks_per_node
    script.write_text(ALL_TO_ALL)
    given = ["--nodes", str(nodes), "--rate", "1gbit", "--ranks-per-node", str(ranks_per_node)]
    job = [find_mpiexec(), "-n", str(ranks), sys.executable, "-m", "mpi4py", str(script)]
    done = on_network(*job, given=given)
    assert done.returncode == 0, done.stderr
    payload = ranks_per_node * (ranks - ranks_per_node) * PART
    for local_size, sent, held_up in json.loads(done.stdout):
        assert local_size == ranks_per_node
        assert payload <= sent < 1.25 * payload  # headers, and what the ranks tell their hub
        assert held_up > 0


# On busy cores MPICH's other ranks now and then crash for the lost connection before the launcher
# tells of the one that was killed; the line then names one of those.
@pytest.mark.long
def test_a_rank_that_is_killed_on_a_node_ends_the_job_with_one_line(tmp_path: Path) -> None:
    path = os.pathsep.join(filter(None, [faulty.install(tmp_path), os.environ.get("PYTHONPATH")]))
    done = on_network(
        *LFM2KIT, *RUN, "--ranks", "3", given=["--nodes", "2", "--ranks-per-node", "2"],
        variables={"PYTHONPATH": path, faulty.FAULT: "killed"},  # the second rank of a node
    )  # fmt: skip
    assert done.returncode == 3
    # Of several nodes, mpiexec does not always say which signal ended a rank.
    assert re.fullmatch(
        f"{BLOCK}its process (was ended by signal 9|ended before) .*\n", done.stderr
    )
    assert done.stderr.startswith("lfm2kit: error: rank 1 on node1, ")


@pytest.mark.parametrize("given", [{}, {"UCX_RNDV_SCHEME": "auto"}], ids=["ours", "the user's"])
def test_large_messages_are_sent_both_ways_at_once_unless_the_user_says_how(
    given: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("UCX_RNDV_SCHEME", raising=False)
    done = on_network("printenv", "UCX_RNDV_SCHEME", given=["--nodes", "1"], variables=given)
    assert done.stdout.strip() == given.get("UCX_RNDV_SCHEME", "get_zcopy")


LONG = ["run", "-n", "128", "--batch-size", "1", "--backend", "reference", "--deadline", "2"]


def started(mark: str, *words: str) -> subprocess.Popen[str]:
    """Start a command on two nodes, and return once the ranks are at work."""
    job = subprocess.Popen(
        [*NETWORK, "--nodes", "2", "--rate", "1gbit", "--", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {MARK: mark},
    )  # fmt: skip
    assert job.stdout is not None
    assert job.stdout.readline().startswith("Model:")
    return job


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_the_end_of_the_network_leaves_neither_processes_nor_namespaces(
    number: signal.Signals,
) -> None:
    mark = f"{os.getpid()} network {number}"
    with started(mark, *LFM2KIT, *LONG, "--ranks", "2") as job:
        network = Path("/proc", str(job.pid), "ns", "net").readlink()
        assert len(nodes_of(marked(mark)) - {network}) == 2
        job.send_signal(number)
        _, said = job.communicate(timeout=A_WHILE)
    until_ended(mark)
    assert job.returncode == (-number if number == signal.SIGKILL else 128 + number), said
    assert not {"node1", "node2"} & set(os.listdir("/run/netns"))


def nodes_of(processes: list[int]) -> set[Path]:
    """Return the network namespaces of processes."""
    return {Path("/proc", str(pid), "ns", "net").readlink() for pid in processes}


@pytest.mark.parametrize(
    "is_ours", [True, pytest.param(False, marks=pytest.mark.long)], ids=["--ranks", "mpiexec"]
)
def test_a_link_that_is_cut_ends_the_ranks_on_both_sides(is_ours: bool) -> None:
    mark = f"{os.getpid()} cut {is_ours}"
    launcher, ranks = ([], ["--ranks", "2"]) if is_ours else ([find_mpiexec(), "-n", "2"], [])
    with started(mark, *launcher, *LFM2KIT, *LONG, *ranks) as job:
        user = [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]
        at_the_switch = ["nsenter", "--target", str(job.pid), *user, "--net"]
        subprocess.run([*at_the_switch, "ip", "link", "set", "port2", "down"], check=True)
        _, said = job.communicate(timeout=A_WHILE)
    (line,) = (line for line in said.splitlines() if line.startswith("lfm2kit: error:"))
    assert re.match(r"\S+ error: rank 1 on node2, .*cut off, and has said nothing for", line)
    assert job.returncode != 0
    until_ended(mark)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--nodes", "0", "--", "true"], "--nodes 0: give a number from 1 to 250"),
        (["--ranks-per-node", "0", "--", "true"], "--ranks-per-node 0: give a number from 1 to"),
        (["--ranks-per-node", "9" * 20, "--", "true"], ": give a number from 1 to 1000"),
        (["--nodes", "two", "--", "true"], "argument --nodes: invalid int value: 'two'"),
        (["--rate", "101gbit", "--", "true"], "--rate 101gbit: give a rate such as"),
        (["--rate", "99999999999gbit", "--", "true"], "1gbit, up to 100gbit"),
        (["--rate", "9" * 5000 + "kbit", "--", "true"], "1gbit, up to 100gbit"),
        (["--rate", "fast", "--", "true"], "--rate fast: give a rate such as 200mbit or 1gbit"),
        (["--", "no-such-command"], "there is no no-such-command here"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_network_is_one_line(words: list[str], sentence: str) -> None:
    done = subprocess.run([*NETWORK, *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert sentence in done.stderr
