"""What ranks say of each other when they do not run the same: one line that names both."""

from __future__ import annotations

import json

import pytest

from lfm2kit.ranks.agreement import Fact, Facts, Refusal, _packed, _unpacked, compared


def facts(**values: str) -> Facts:
    return {name: Fact(value) for name, value in values.items()}


def sentence(*reports: Facts | Refusal) -> str:
    refusal = compared(reports)
    assert refusal is not None
    assert "\n" not in refusal.sentence
    return refusal.sentence


def test_ranks_with_the_same_facts_agree_whatever_their_notes() -> None:
    assert compared([{"model": Fact("ab12", "/one")}, {"model": Fact("ab12", "/two")}]) is None
    assert compared([facts(a="1", b="2"), facts(b="2", a="1")]) is None


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (["fp32", "bf16"], "--p is fp32 on rank 0 and bf16 on rank 1"),
        (["bf16", "fp32", "fp32"], "--p is bf16 on rank 0 and fp32 on ranks 1, 2"),
        (["a", "b", "a", "b"], "--p is a on ranks 0, 2 and b on ranks 1, 3"),
        (["a", *"bbbbbbb"], "--p is a on rank 0 and b on ranks 1-7"),
        (["a", "b", "c"], "--p is a on rank 0, b on rank 1 and c on rank 2"),
    ],
)
def test_a_difference_is_named_with_its_values_and_ranks(values: list[str], says: str) -> None:
    refusal = compared([{"--p": Fact(value)} for value in values])
    assert refusal == (f"the ranks do not agree: {says}; start all of them alike", 2)


def test_a_note_is_shown_beside_the_value_that_differs() -> None:
    said = sentence({"lfm2kit": Fact("1.0", "/one")}, {"lfm2kit": Fact("2.0", "/two")})
    assert "lfm2kit is 1.0 (/one) on rank 0 and 2.0 (/two) on rank 1" in said


def test_what_one_rank_lacks_is_not_there() -> None:
    assert "trace is missing on rank 0 and 1.0 on rank 1" in sentence({}, facts(trace="1.0"))


def test_of_many_differences_three_are_shown_and_the_rest_counted() -> None:
    said = sentence(facts(**dict.fromkeys("abcde", "1")), facts(**dict.fromkeys("abcde", "2")))
    assert all(f"{name} is 1" in said for name in "abc")
    assert "d is" not in said
    assert "and 2 more" in said


def test_what_one_rank_has_alone_keeps_its_place_among_the_differences() -> None:
    said = sentence(facts(a="1", z="1"), facts(a="1", b="2", z="2"))
    assert said.index("b is missing") < said.index("z is")


def test_an_error_on_some_ranks_is_told_with_them_and_before_any_difference() -> None:
    broken = Refusal("no such file")
    said = sentence(facts(a="1"), broken, facts(a="2"), broken)
    assert said == "ranks 1, 3: no such file"


def test_an_error_on_all_ranks_is_told_once_and_without_them() -> None:
    assert sentence(Refusal("no such file"), Refusal("no such file")) == "no such file"


def test_different_errors_are_told_apart() -> None:
    assert (
        sentence(Refusal("no file"), Refusal("no memory")) == "rank 0: no file; rank 1: no memory"
    )


def test_a_bug_on_one_rank_makes_the_exit_code_that_of_a_bug() -> None:
    refusal = compared([Refusal("no such file"), Refusal("this is a bug", 3)])
    assert refusal is not None
    assert refusal.exit_code == 3


def own(**values: str) -> Facts:
    return {name: Fact(value, is_own=True) for name, value in values.items()}


def test_ranks_that_have_each_their_own_agree_whatever_they_call_it() -> None:
    assert compared([own(gpu="a"), own(gpu="b")]) is None
    assert compared([own(gpu="a"), own(other="b"), {}, own(gpu="c", other="d")]) is None


def test_what_two_ranks_would_share_is_named_with_them() -> None:
    reports = [own(gpu="GPU a"), own(gpu="GPU b"), own(another="GPU a"), own(gpu="GPU a")]
    assert sentence(*reports) == (
        "ranks 0, 2, 3 would share GPU a; give each rank one of its own, or start fewer ranks"
    )


def test_a_difference_comes_before_what_is_shared() -> None:
    said = sentence(facts(p="1") | own(gpu="a"), facts(p="2") | own(gpu="a"))
    assert "p is 1 on rank 0" in said
    assert "share" not in said


def test_an_own_fact_stays_one_on_its_way_to_rank_0() -> None:
    report = own(gpu="a") | facts(p="1")
    assert _unpacked(json.dumps(_packed(report))) == report
