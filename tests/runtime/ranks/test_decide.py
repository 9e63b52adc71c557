"""What all ranks do in a step: a pure function of their reports."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from atomc.runtime.batch import idle_batch
from atomc.runtime.ranks.decide import Report, decide
from tests.support.fake_executor import FakeServing

IDLE = Report(step=3, stop=0)
DECODE = Report(step=3, stop=0, tokens=4, requests=4, csa_ends=1, hca_ends=1, logit_rows=4)

sizes = st.integers(0, 100)
reports = st.lists(
    st.builds(
        Report, step=st.just(3), stop=st.integers(0, 1), tokens=sizes, requests=sizes, csa_ends=sizes, hca_ends=sizes,
        logit_rows=sizes,
    ),
    min_size=1, max_size=9,
)  # fmt: skip


def test_sizes_of_a_step() -> None:
    decision = decide([DECODE, IDLE, DECODE._replace(tokens=30)])
    assert (decision.tokens, decision.bucket, decision.prefill, decision.busy) == ((4, 0, 30), 30, True, True)
    assert not decide([IDLE, IDLE]).busy


def test_what_is_no_decode() -> None:
    assert not decide([DECODE, IDLE]).prefill
    assert decide([DECODE._replace(tokens=5), IDLE]).prefill, "two tokens of a request"
    assert decide([DECODE._replace(logit_rows=3), IDLE]).prefill, "a token whose logits nobody wants: more is to come"


def test_a_report_of_a_batch() -> None:
    assert Report.of(3, True, None) == IDLE._replace(stop=1)
    assert Report.of(3, False, idle_batch(FakeServing())) == Report(3, 0, 1, 1, 1, 1, 1)


def test_the_first_of_a_tp_group_speaks_for_it() -> None:
    decision = decide([DECODE, IDLE, IDLE, IDLE], tp=2)
    assert (decision.tokens, decision.prefill) == ((4, 4, 0, 0), False)


def test_ranks_stop_only_together() -> None:
    stopping = IDLE._replace(stop=1)
    assert not decide([stopping, IDLE]).stop
    assert not decide([stopping, IDLE], tp=2).stop
    assert decide([stopping, stopping]).stop


@given(reports)
def test_the_order_of_ranks_changes_only_the_order_of_sizes(each: list[Report]) -> None:
    one, other = decide(each), decide(each[::-1])
    assert one.tokens == other.tokens[::-1]
    assert (one.stop, one.prefill, one.bucket) == (other.stop, other.prefill, other.bucket)
