"""What can be asked of a simulation, and one line for everything else."""

from __future__ import annotations

import pytest

from lfm2kit.errors import Lfm2kitError
from lfm2kit.simulating.request import EXAMPLE, Request, parsed


def test_a_range_is_the_powers_of_two_in_it_and_a_list_is_what_it_says() -> None:
    request = parsed(EXAMPLE)
    assert request.ranks == (1, 2, 4, 8, 16, 32, 64, 128, 256)
    assert request.n == (16, 32, 64, 128, 256, 512, 1024)
    assert (request.per_node, request.link) == (4, 25e9 / 8)
    assert parsed("ranks=6/1/3..9/4,n=5").ranks == (1, 4, 6, 8)
    assert parsed("ranks=1, n = 16").n == (16,)


def test_everything_else_has_a_default() -> None:
    assert parsed("ranks=1,n=1") == Request((1,), (1,), 1, None, None, 16, 0.0, None, "load")


@pytest.mark.parametrize(
    ("text", "request_"),
    [
        ("link=200Mbit", {"link": 25e6}),
        ("link=1.5gbit", {"link": 1.5e9 / 8}),
        ("link=1Gbit,latency=20us", {"link": 1.25e8, "latency": pytest.approx(2e-5)}),
        ("link=1Gbit,latency=0.5ms", {"link": 1.25e8, "latency": 5e-4}),
        ("tokens=128", {"tokens": 128}),
        ("overlap=0.8", {"overlap": 0.8}),
        ("memory=24GB", {"memory": 24_000_000_000}),
        ("per-node=4", {"per_node": 4}),
        ("placement=order", {"placement": "order"}),
    ],
)
def test_units_are_those_that_people_write(text: str, request_: dict[str, object]) -> None:
    got = parsed(f"ranks=2,n=4,{text}")
    assert {name: getattr(got, name) for name in request_} == request_


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "'': expected KEY=VALUE"),
        ("ranks", "'ranks': expected KEY=VALUE"),
        ("ranks=1,n=1,", "'': expected KEY=VALUE"),
        ("rank=4,n=1", "'rank=4': expected KEY=VALUE; available: latency"),
        ("ranks=4", "n is missing"),
        ("n=4", "ranks is missing, such as in ranks=1..256"),
        ("ranks=4,n=1,n=2", "n is given twice"),
        ("ranks=0,n=1", "'ranks=0': expected numbers from 1 to 1024"),
        ("ranks=2048,n=1", "'ranks=2048': expected numbers from 1 to 1024"),
        ("ranks=8..4,n=1", "the smaller one first"),
        ("ranks=5..7,n=1", "there is no power of two from 5 to 7; give 5/7"),
        ("ranks=3..3,n=1", "there is no power of two from 3 to 3; give 3"),
        ("ranks=4..,n=1", "expected numbers such as"),
        ("ranks=-4,n=1", "expected numbers such as"),
        ("ranks=2,n=1e3", "expected numbers such as"),
        ("ranks=2,n=1,per-node=0", "expected a whole number from 1 to 1024"),
        ("ranks=2,n=1,per-node=1/2", "expected a whole number from 1 to 1024"),
        ("ranks=2,n=1,link=25", "expected bits per second"),
        ("ranks=2,n=1,link=25GB", "expected bits per second"),
        ("ranks=2,n=1,link=0Gbit", "expected bits per second"),
        ("ranks=2,n=1,link=nanGbit", "expected bits per second"),
        ("ranks=2,n=1,link=1Gbit,latency=20", "expected a time, such as 20us"),
        ("ranks=2,n=1,link=1Gbit,latency=0us", "expected a time, such as 20us"),
        ("ranks=2,n=1,latency=20us", "latency needs a link"),
        ("ranks=2,n=1,tokens=0", "expected a whole number from 1"),
        ("ranks=2,n=1024,tokens=1024", "262144: n=256"),
        ("ranks=2,n=1,overlap=1.5", "expected a share from 0 to 1"),
        ("ranks=2,n=1,overlap=-1", "expected a share from 0 to 1"),
        ("ranks=2,n=1,placement=best", "'placement=best': expected load, or order"),
        ("ranks=2,n=1,memory=24", "expected a size, such as 24GB"),
    ],
)
def test_what_is_wrong_is_one_line_with_the_item(text: str, said: str) -> None:
    with pytest.raises(Lfm2kitError) as refused:
        parsed(text)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_more_jobs_than_anyone_waits_for_are_refused() -> None:
    many = "/".join(map(str, range(1, 101)))
    with pytest.raises(Lfm2kitError, match="10000 jobs; lfm2kit simulates up to 4096 at once"):
        parsed(f"ranks={many},n={many}")
