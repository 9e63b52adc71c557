"""Each formula of the model matters, and the comparison with transformers notices when it is wrong (spec 7).

A mutation is an edit of the model's own source, or of the configuration it is built from. The comparison passes without
it and must fail with it: an edit that changes no logit would mean a check that cannot fail. `pytest -s` prints a table.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from atomc.models.deepseek_v4.config import DeepseekV4Config
from atomc.models.deepseek_v4.model import DeepseekV4
from tests.support.eager import Step, chunks, randomise, run
from tests.support.transformers_oracle import TOLERANCE, Oracle, difference
from tests.support.v4_configs import random_ids, tiny
from tests.support.v4_mutations import BATCH, CUT, EPS, MUTATIONS, TIGHT, WHOLE, Mutation, apply

LENGTH = 90


@dataclass(frozen=True)
class Scenario:
    """A model and a way of feeding it; unchanged it stays within `tolerance`, changed it exceeds `noticed`."""

    config: DeepseekV4Config
    lengths: list[int]
    steps: list[Step]
    tolerance: float = TOLERANCE
    noticed: float = 10 * TOLERANCE


SCENARIOS = {
    WHOLE: Scenario(tiny(), [LENGTH], chunks(LENGTH, LENGTH)),
    # Cuts inside windows of both ratios, and single tokens.
    CUT: Scenario(tiny(), [LENGTH], [[(0, n)] for n in (21, 2, 30, 1, 1, 1, 9, 1, 23, 1)]),
    BATCH: Scenario(
        tiny(),
        [60, 33, 17],
        [[(2, 5), (0, 18)], [(0, 3), (1, 7), (2, 2)], [(1, 1), (0, 39)], [(2, 10), (1, 25)]],
    ),
    # Each place of an epsilon; at the official 1e-6 hardly any can be told from rounding.
    EPS: Scenario(tiny(hc_eps=1e-2, rms_norm_eps=1e-2), [LENGTH], chunks(LENGTH, LENGTH)),
    TIGHT: Scenario(tiny(), [LENGTH], chunks(LENGTH, LENGTH), tolerance=1.2e-5, noticed=1.6e-5),
}


class Judge:
    """One scenario with its weights, tokens and oracle; measures models against it."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.ids = [random_ids(scenario.config, n, i) for i, n in enumerate(scenario.lengths)]
        self.oracle = Oracle(self.model())

    def model(self, **changes: Any) -> DeepseekV4:
        """The scenario's model, or one with the same weights under another configuration."""
        ours = DeepseekV4(self.scenario.config)
        randomise(ours, 0)
        if not changes:
            return ours
        config = DeepseekV4Config.from_dict({**self.scenario.config.to_dict(), **changes})
        other = DeepseekV4(config)
        randomise(other, 0)
        weights = ours.state_dict()
        names = [name for name, value in other.state_dict().items() if "rope_" not in name and name in weights]
        fitting = {n: weights[n] if "tid2eid" not in n else weights[n][:, : config.num_experts_per_tok] for n in names}
        other.load_state_dict(fitting, strict=False)
        return other

    def difference(self, model: DeepseekV4) -> float:
        runs = run(model, self.ids, self.scenario.steps)
        return max(difference(self.oracle, ids, one) for ids, one in zip(self.ids, runs, strict=True))


@pytest.fixture(scope="module")
def judges() -> dict[str, Judge]:
    return {name: Judge(scenario) for name, scenario in SCENARIOS.items()}


@pytest.fixture(scope="module")
def report() -> Iterator[Callable[[str, str, float], None]]:
    rows: list[str] = []
    yield lambda name, scenario, found: rows.append(f"{found:10.2e}  {scenario:6} {name}")
    sys.stdout.write("\n\nlargest logit difference from transformers\n" + "\n".join(rows) + "\n")


@pytest.mark.parametrize("name", SCENARIOS)
def test_unchanged_passes(name: str, judges: dict[str, Judge], report: Callable[[str, str, float], None]) -> None:
    found = judges[name].difference(judges[name].model())
    report("(unchanged)", name, found)
    assert found <= SCENARIOS[name].tolerance


@pytest.mark.parametrize("place", sorted({m.place for m in MUTATIONS if m.place}))
def test_recompiled_without_edits_passes(place: str, judges: dict[str, Judge], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a mutation's failure is due to is its edit, not the way it is put in place."""
    apply(Mutation("nothing", place), monkeypatch)
    assert judges[WHOLE].difference(judges[WHOLE].model()) <= TOLERANCE


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_mutation_is_noticed(
    mutation: Mutation,
    judges: dict[str, Judge],
    report: Callable[[str, str, float], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judge = judges[mutation.scenario]
    if mutation.place:
        apply(mutation, monkeypatch)
    found = judge.difference(judge.model(**mutation.config))
    report(mutation.name, mutation.scenario, found)
    assert found > judge.scenario.noticed
