"""The eager DeepSeek-V4 against transformers: any small model, any way to feed it, the same logits (spec 7).

Every test draws a model, random weights and tokens, feeds them in its way and compares all logits with what
transformers computes for each whole sequence alone.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, reject, settings
from hypothesis import strategies as st

from atomc.models.deepseek_v4.config import DeepseekV4Config
from atomc.models.deepseek_v4.model import DeepseekV4
from atomc.models.deepseek_v4.state import Paging
from tests.support.eager import Step, chunks, make_batch, new_caches, randomise, run
from tests.support.transformers_oracle import TOLERANCE, Oracle, difference
from tests.support.v4_configs import configs, cuts, interleavings, lengths, pagings, random_ids, tiny

SEEDS = st.integers(0, 2**31)
# Explaining a failure takes a minute of further examples; the shrunk one says enough.
PHASES = tuple(phase for phase in Phase if phase is not Phase.explain)


def make(config: DeepseekV4Config, seed: int, dtype: torch.dtype = torch.float32) -> DeepseekV4:
    model = DeepseekV4(config, dtype)
    randomise(model, seed)
    return model


def check(
    config: DeepseekV4Config, seed: int, sizes: list[int], ways: list[list[Step]], paging: Paging | None = None
) -> None:
    """Each way of feeding sequences of these sizes gives the oracle's logits."""
    model = make(config, seed)
    oracle = Oracle(model)
    sequences = [random_ids(config, size, seed + i) for i, size in enumerate(sizes)]
    for steps in ways:
        runs = run(model, sequences, steps, seed=seed, paging=paging)
        for ids, one in zip(sequences, runs, strict=True):
            found = difference(oracle, ids, one)
            # About one random model in a thousand magnifies rounding up to the tolerance; such a one decides nothing.
            if found > TOLERANCE and found <= 4 * oracle.rounding(ids, one.choices):
                reject()
            assert found <= TOLERANCE


@settings(max_examples=50, phases=PHASES)
@given(data=st.data(), config=configs(), seed=SEEDS)
def test_whole_prefill(data: st.DataObject, config: DeepseekV4Config, seed: int) -> None:
    length = data.draw(lengths(config))
    check(config, seed, [length], [chunks(length, length)], data.draw(pagings(config)))


@settings(max_examples=50, phases=PHASES)
@given(data=st.data(), config=configs(), seed=SEEDS)
def test_chunked_prefill(data: st.DataObject, config: DeepseekV4Config, seed: int) -> None:
    length = data.draw(lengths(config))
    steps = [[(0, n)] for n in data.draw(cuts(length))]
    check(config, seed, [length], [steps], data.draw(pagings(config)))


@settings(max_examples=25, phases=PHASES)
@given(data=st.data(), config=configs(), seed=SEEDS)
def test_token_by_token(data: st.DataObject, config: DeepseekV4Config, seed: int) -> None:
    length = data.draw(lengths(config, most=45))
    check(config, seed, [length], [chunks(length, 1)], data.draw(pagings(config)))


@settings(max_examples=50, phases=PHASES)
@given(data=st.data(), config=configs(), seed=SEEDS)
def test_mixed_batch_as_each_alone(data: st.DataObject, config: DeepseekV4Config, seed: int) -> None:
    sizes = data.draw(st.lists(lengths(config, most=40), min_size=2, max_size=4))
    steps = data.draw(interleavings([data.draw(cuts(size)) for size in sizes]))
    check(config, seed, sizes, [steps], data.draw(pagings(config)))


RELEASES = {
    "flash": tiny(compress_ratios=[0, 0, 4, 128, 4, 128, 4], sliding_window=128, num_hash_layers=3),
    "pro": tiny(compress_ratios=[128, 128, 4, 128, 4], sliding_window=128, num_hash_layers=3),
}


@pytest.mark.parametrize("release", RELEASES)
def test_release_geometry(release: str) -> None:
    """Window 128, ratio 128, page and block sizes as served: both sides of each border, whole, cut and in company."""
    config = RELEASES[release]
    sizes = [127, 128, 129, 261]
    decode = [[(3, 1), (0, 1)], *[[(3, 1)]] * 4]
    ways = [
        [[(i, size) for i, size in enumerate(sizes)]],
        [
            [(3, 127), (0, 3)], [(1, 4), (3, 1), (0, 60)], [(3, 1), (2, 129), (0, 63)], [(3, 126), (1, 124)],
            [(3, 1)], *decode,
        ],
    ]  # fmt: skip
    check(config, 0, sizes, ways)


def test_only_the_wanted_logits() -> None:
    config = tiny()
    model = make(config, 0)
    ids = random_ids(config, 20, 0)
    caches = new_caches(config, 1, 20, longest_step=20)
    batch = make_batch(config, [(0, 0, ids)], caches)
    wanted = torch.tensor([19, 3, 3], dtype=torch.int32)
    every = model(batch, caches.states)
    some = model(batch._replace(logit_rows=wanted), new_caches(config, 1, 20, longest_step=20).states)
    torch.testing.assert_close(some, every[wanted], rtol=0, atol=TOLERANCE)


def test_bfloat16_stays_near_float32() -> None:
    """Weights exact in bfloat16; computed in bfloat16, and by the float32 oracle, which takes the same equal choices.

    Each of the 12 sublayers rounds what it reads and what it returns, by at most 2^-9 of the value. If these errors
    only add up they come to 2^-9 * sqrt(24) = 1 % of the logits; 1.4 % was measured, 3 % is allowed. The largest of
    14,400 such errors was 0.1, 0.25 is allowed. Leaving out a formula moves a logit by about 1 (spec 7).
    """
    config = tiny()
    model = make(config, 0, torch.bfloat16)
    exact = DeepseekV4(config)
    exact.load_state_dict(model.state_dict())
    oracle = Oracle(exact)
    ids = random_ids(config, 90, 0)
    for size in (90, 7):
        one = run(model, [ids], chunks(90, size))[0]
        assert one.logits.dtype == torch.float32
        error = one.logits - oracle.logits(ids, one.choices, tie=0.1)
        assert error.square().mean().sqrt() <= 0.03 * one.logits.std()
        assert TOLERANCE < error.abs().max() <= 0.25  # below: it was not bfloat16
