"""`atomc inspect --kernels`: code objects, costs of operators as formulas, predicted times. Nothing is measured."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import msgspec

from atomc.artifact.kernels import read_kernels
from atomc.artifact.store import ArtifactError
from atomc.cli.failure import OptionError
from atomc.costs.occupancy import occupancy
from atomc.costs.predict import Costs, KernelUse, Operator, Prediction, Timing, bucket_scenario, scenarios
from atomc.costs.tables import kernel_table, operator_table, reckoned, region_table, step_table, use_table
from atomc.targets import get_target

if TYPE_CHECKING:
    from atomc.cli.inspect import Opened


def costs_of(opened: Opened) -> Costs:
    """The costs of an artifact for a GPU.

    Raises:
        OptionError: the target has no kernels.
        ArtifactError: its plan launches a kernel that is not there, or one that has no wavefront.
    """
    target = get_target(opened.manifest.target)
    if not target.is_gpu:
        raise OptionError(f"--kernels: {target.name} runs the references of the operators; it has no kernels.")
    kernels = read_kernels(opened.folder)
    costs = Costs(opened.program, opened.regions, kernels, target, opened.manifest.serving)
    if wrong := sorted(k for k in costs.origins if k not in kernels or kernels[k].warps < 1):
        raise ArtifactError(f"{opened.folder}: the plan launches kernel {wrong[0]}, which is not whole in kernels/.")
    return costs


def steps_of(costs: Costs, requests: int | None, context: int | None) -> list[Prediction]:
    """Predictions of whole steps: decode of `requests` (several numbers by default), and prefill.

    Raises:
        OptionError: the artifact has no such step.
    """
    for flag, value, most, limit in (
        ("--batch", requests, costs.serving.max_requests, "--max-requests"),
        ("--context", context, costs.serving.max_context, "--max-context"),
    ):
        if value is not None and value > most:
            raise OptionError(f"{flag} {value}: only up to the artifact's {limit} {most} is a time predicted.")
    return [costs.predict(scenario) for scenario in scenarios(costs.serving, requests, context)]


def show_kernels(opened: Opened, region: str | None, requests: int | None, context: int | None) -> None:
    """Print the tables: of the artifact, or of one region's operators."""
    from atomc.cli.console import stdout, table

    costs, console = costs_of(opened), stdout()
    steps = steps_of(costs, requests, context)
    console.print(f"{opened.manifest.model} for {costs.target.name}: {reckoned(costs.target)}\n")
    if region is not None:
        tables = [operator_table(costs, region, context)]
    else:
        tables = [kernel_table(costs), use_table(costs, context), region_table(steps), step_table(steps)]
    for made in tables:
        console.print(table(made.title, made.head, made.rows, made.right))
        console.print()


def kernels_json(opened: Opened, requests: int | None, context: int | None) -> dict[str, Any]:
    """All of it, in seconds, bytes and FLOPs."""
    costs = costs_of(opened)
    target, uses = costs.target, costs.kernel_uses()
    return {
        "predicted_with": {
            "memory_rate": target.memory_rate * target.sustained.memory, "vector": target.peaks.vector,
            **{name: target.sustained_matrix(name) for name in ("bf16", "fp8", "fp4")},
            "launch_seconds": target.sustained.launch, "rates": target.sustained.origin,
        },
        "kernels": {
            key: msgspec.structs.asdict(known) | {
                "origin": costs.origins[key], "occupancy": asdict(occupancy(known, target)),
                "buckets": [_use(costs, use, context) for use in uses if use.cost.kernel == key],
            }
            for key, known in costs.kernels.items()
        },
        "operators": [_operator(costs, operator, context) for operator in costs.operators],
        "steps": [_step(prediction) for prediction in steps_of(costs, requests, context)],
    }  # fmt: skip


def _use(costs: Costs, use: KernelUse, context: int | None) -> dict[str, Any]:
    scenario = bucket_scenario(costs.serving, use.tokens, context)
    return {
        "bucket": use.tokens, "launches_in_a_step": use.count, "sources": use.sources,
        "bytes_formula": str(use.cost.bytes), "flops_formula": str(use.cost.count),
        "predicted": asdict(scenario) | _timing(costs.launch(use.cost, scenario.sizes(costs.serving))),
    }  # fmt: skip


def _operator(costs: Costs, operator: Operator, context: int | None) -> dict[str, Any]:
    found = [bucket_scenario(costs.serving, tokens, context) for tokens in operator.buckets]
    return {
        "region": operator.region, "step": operator.number, "op": operator.step.op, "source": operator.step.source,
        "bytes_formula": str(operator.work.bytes), "flops_formula": str(operator.work.count()),
        "predicted": [asdict(scenario) | _timing(costs.operator(operator, scenario)) for scenario in found],
    }  # fmt: skip


def _step(prediction: Prediction) -> dict[str, Any]:
    regions = {n: _timing(t) | {"uses": prediction.uses[n]} for n, t in prediction.regions.items()}
    return {**asdict(prediction.scenario), **_timing(prediction.total), "regions": regions}


def _timing(time: Timing) -> dict[str, Any]:
    return {"seconds": time.seconds, "bound": time.bound, "seconds_by_bound": time.seconds_by, "bytes": time.bytes,
            "flops": time.flops, "launches": time.launches}  # fmt: skip
