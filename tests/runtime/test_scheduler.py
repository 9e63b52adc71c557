"""The scheduler: who runs next, how much of it, and who has to give way."""

from __future__ import annotations

from atomc.runtime.caches import Caches
from atomc.runtime.request import Request, SamplingParams
from atomc.runtime.scheduler import Scheduler
from tests.support.fake_executor import FakeServing


def scheduler(*, tokens: int = 16, requests: int = 4, blocks: int = 64, pages: int = 64) -> Scheduler:
    serving = FakeServing(max_batch_tokens=tokens, max_requests=requests)
    return Scheduler(Caches(serving, blocks, pages, requests), max_batch_tokens=tokens, max_requests=requests)


def request(name: str, tokens: int, limit: int = 200) -> Request:
    return Request(name, [3] * tokens, tokens, SamplingParams(), limit, frozenset(), 0.0)


def step(scheduler: Scheduler) -> list[tuple[str, int]]:
    """One step: every request that completes gets one more token."""
    chunks = scheduler.schedule()
    report = [(chunk.request.id, chunk.length) for chunk in chunks]
    done = [chunk.request for chunk in chunks if chunk.completes]
    scheduler.advance(chunks)
    for each in done:
        each.tokens.append(3)
    return report


def test_prompts_are_cut_to_the_budget_and_mix_with_decodes() -> None:
    queue = scheduler(tokens=16)
    queue.add(request("a", 5))
    queue.add(request("b", 30))
    assert step(queue) == [("a", 5), ("b", 11)]
    assert step(queue) == [("a", 1), ("b", 15)]
    queue.add(request("c", 3))
    assert step(queue) == [("a", 1), ("b", 4), ("c", 3)]
    assert step(queue) == [("a", 1), ("b", 1), ("c", 1)]


def test_a_long_prompt_does_not_starve_decodes_nor_they_it() -> None:
    queue = scheduler(tokens=4, requests=4)
    for name in "abc":
        queue.add(request(name, 1))
    queue.add(request("long", 9))
    assert step(queue) == [("a", 1), ("b", 1), ("c", 1), ("long", 1)]
    for _ in range(7):
        assert step(queue) == [("a", 1), ("b", 1), ("c", 1), ("long", 1)]
    assert step(queue) == [("a", 1), ("b", 1), ("c", 1), ("long", 1)]


def test_never_more_requests_than_tokens_in_a_step() -> None:
    queue = scheduler(tokens=2, requests=4)
    for name in "abc":
        queue.add(request(name, 1))
    assert step(queue) == [("a", 1), ("b", 1)]
    assert [each.id for each in queue.waiting] == ["c"]


def test_the_youngest_gives_way_and_comes_back_first() -> None:
    queue = scheduler(blocks=1 + 5)  # five blocks of 8 tokens
    older, younger, late = request("older", 15), request("younger", 7), request("late", 1)
    for each in (older, younger, late):
        queue.add(each)
    # 2 + 1 blocks, and the newcomer's spare ones: late must wait for a block to be left over for each running request.
    assert step(queue) == [("older", 15), ("younger", 1)]
    while not queue.preemptions:
        step(queue)
    assert younger.preemptions >= 1
    assert younger.slot == -1
    assert younger.computed == 0
    assert not younger.blocks
    assert [each.id for each in queue.waiting] == ["younger", "late"]
    queue.remove(older)
    assert step(queue)[0][0] == "younger"


def test_a_request_alone_is_never_preempted() -> None:
    queue = scheduler(blocks=1 + 4)
    queue.add(request("only", 3, limit=32))
    while len(queue.running) == 0 or len(queue.running[0].tokens) < 32:
        assert step(queue)
    assert queue.preemptions == 0


def test_few_pages_make_chunks_smaller_not_stuck() -> None:
    queue = scheduler(tokens=16, pages=1 + 3)
    queue.add(request("a", 40))
    lengths: list[int] = []
    while not lengths or sum(lengths) < 40:
        lengths += [length for _, length in step(queue)]
    assert max(lengths) <= 12
    assert min(lengths) >= 1


def test_removing_the_last_request_checks_for_leaks() -> None:
    queue = scheduler()
    one, two = request("a", 5), request("b", 5)
    queue.add(one)
    queue.add(two)
    step(queue)
    queue.remove(one)
    queue.remove(two)
    assert not queue.has_work
    waiting = request("c", 5)
    queue.add(waiting)
    queue.remove(waiting)
    assert not queue.has_work
