"""What all ranks do in a step: a pure function of their reports."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from atomc.runtime.ranks.decide import HoldPolicy, Report, decide

HOLD = HoldPolicy(bound_ms=50, fill=0.5, max_batch_tokens=100)
IDLE = Report(step=3, stop=0, tokens=0, requests=0, prefill=0, running=0, pending=0, waited_ms=0)
DECODE = IDLE._replace(tokens=4, requests=4, running=4)

reports = st.lists(
    st.builds(
        Report, step=st.just(3), stop=st.integers(0, 1), tokens=st.integers(0, 100), requests=st.integers(0, 8),
        prefill=st.integers(0, 1), running=st.integers(0, 8), pending=st.integers(0, 100),
        waited_ms=st.integers(0, 200),
    ),
    min_size=1, max_size=9,
)  # fmt: skip


def test_sizes_of_a_step() -> None:
    decision = decide([DECODE, IDLE, DECODE._replace(tokens=30, prefill=1)], HoldPolicy())
    assert (decision.tokens, decision.bucket, decision.prefill, decision.busy) == ((4, 0, 30), 30, True, True)
    assert not decide([IDLE, IDLE], HoldPolicy()).busy


def test_ranks_stop_only_together() -> None:
    stopping = IDLE._replace(stop=1)
    assert not decide([stopping, IDLE], HoldPolicy()).stop
    assert decide([stopping, stopping], HoldPolicy()).stop


def test_a_prompt_is_held_while_others_decode() -> None:
    waiting = DECODE._replace(pending=10, waited_ms=5)
    assert not decide([waiting, DECODE], HOLD).admit
    assert not decide([DECODE, DECODE], HOLD).admit  # one that comes in the meantime waits for the next decision


def test_what_ends_a_hold() -> None:
    waiting = DECODE._replace(pending=10, waited_ms=5)
    assert decide([waiting._replace(running=0, tokens=0, requests=0), IDLE], HOLD).admit, "nothing runs"
    assert decide([waiting, DECODE._replace(prefill=1)], HOLD).admit, "a prefill step anyway"
    assert decide([waiting._replace(waited_ms=50), DECODE], HOLD).admit, "it has waited long enough"
    assert decide([waiting._replace(pending=100), DECODE], HOLD).admit, "enough tokens for a step"
    assert decide([waiting, DECODE], HoldPolicy()).admit, "no holding at all"


@given(reports, st.integers(0, 100))
def test_no_prompt_waits_beyond_the_bound(each: list[Report], bound: int) -> None:
    decision = decide(each, HoldPolicy(bound_ms=bound, fill=0.9, max_batch_tokens=100))
    if not decision.admit:
        assert bound > 0
        assert max(report.waited_ms for report in each) < bound
        assert any(report.running for report in each)


@given(reports)
def test_the_order_of_ranks_changes_only_the_order_of_sizes(each: list[Report]) -> None:
    one, other = decide(each, HOLD), decide(each[::-1], HOLD)
    assert one.tokens == other.tokens[::-1]
    assert (one.stop, one.admit, one.prefill, one.bucket) == (other.stop, other.admit, other.prefill, other.bucket)
