"""`atomc inspect --kernels`: code objects, costs of operators as formulas, predicted times. Nothing is measured."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import msgspec

from atomc.artifact.kernels import read_kernels
from atomc.artifact.store import ArtifactError
from atomc.cli.failure import OptionError
from atomc.costs.occupancy import occupancy
from atomc.costs.predict import Costs, Operator, Prediction, Scenario, Timing, bucket_scenario, scenarios
from atomc.costs.tables import kernel_table, operator_table, reckoned, region_table, step_table
from atomc.targets import get_target

if TYPE_CHECKING:
    from atomc.artifact.manifest import Manifest
    from atomc.cli.inspect import Opened


def costs_of(opened: Opened) -> Costs:
    """The costs of an artifact for a GPU.

    Raises:
        ArtifactError: its plan launches a kernel that is not there, or one that has no wavefront.
    """
    kernels, target = read_kernels(opened.folder), get_target(opened.manifest.target)
    launched = {
        launch.kernel
        for region in opened.regions.values()
        for step in region.steps
        for bucket in step.buckets
        for launch in bucket.launches
    }
    if wrong := sorted(k for k in launched if k not in kernels or kernels[k].warps < 1):
        raise ArtifactError(f"{opened.folder}: the plan launches kernel {wrong[0]}, which is not whole in kernels/.")
    return Costs(opened.program, opened.regions, kernels, target, opened.manifest.serving)


def chosen(manifest: Manifest, tokens: int | None, requests: int | None, context: int | None) -> Scenario | None:
    """The step that the flags of `--kernels` describe; None without one.

    Raises:
        OptionError: there is no such step of this artifact, or no kernel.
    """
    limits = manifest.limits
    if not get_target(manifest.target).is_gpu:
        raise OptionError(f"--kernels: {manifest.target} runs the references of the operators; it has no kernels.")
    if tokens is None and requests is None and context is None:
        return None
    count = tokens if tokens is not None else requests if requests is not None else 1
    batch = requests if requests is not None else count if count <= limits.max_requests else 1
    longest = context if context is not None else max(-(-count // batch), min(4096, limits.max_context))
    for flag, value, most, name in (
        ("--tokens", count, limits.max_batch_tokens, "--max-batch-tokens"),
        ("--requests", batch, limits.max_requests, "--max-requests"),
        ("--context", longest, limits.max_context, "--max-context"),
    ):
        if value > most:
            raise OptionError(f"{flag} {value} exceeds the artifact's {most}; compile it with a larger {name}.")
    if batch > count:
        raise OptionError(f"--requests {batch} exceeds --tokens {count}: a request has a token at the least.")
    if batch * longest < count:
        raise OptionError(f"--tokens {count} are more than --requests {batch} of --context {longest} tokens have.")
    return Scenario(count, batch, longest)


def show_kernels(opened: Opened, scenario: Scenario | None) -> None:
    """Print the tables."""
    from atomc.cli.console import stdout, table

    costs, console = costs_of(opened), stdout()
    predictions = [costs.predict(s) for s in ([scenario] if scenario else scenarios(costs.serving))]
    names = dict.fromkeys(operator.region for operator in costs.operators)
    operators = [operator_table(costs, name, scenario) for name in names]
    console.print(f"{opened.manifest.model} for {costs.target.name}: {reckoned(costs.target)}\n")
    for made in (kernel_table(costs), *operators, region_table(predictions), step_table(predictions)):
        console.print(table(made.title, made.head, made.rows, made.right))
        console.print()


def kernels_json(opened: Opened, scenario: Scenario | None) -> dict[str, Any]:
    """All of it, in seconds, bytes and FLOPs."""
    costs = costs_of(opened)
    target = costs.target
    return {
        "predicted_with": {
            "memory_rate": target.memory_rate * target.sustained.memory, "vector": target.peaks.vector,
            **{name: target.sustained_matrix(name) for name in ("bf16", "fp8", "fp4")},
            "launch_seconds": target.sustained.launch, "rates": target.sustained.origin,
        },
        "kernels": {
            key: msgspec.structs.asdict(known) | {"occupancy": asdict(occupancy(known, target))}
            for key, known in costs.kernels.items()
        },
        "operators": [_operator(costs, operator, scenario) for operator in costs.operators],
        "steps": [_step(costs.predict(s)) for s in ([scenario] if scenario else scenarios(costs.serving))],
    }  # fmt: skip


def _operator(costs: Costs, operator: Operator, scenario: Scenario | None) -> dict[str, Any]:
    at = [scenario] if scenario else [bucket_scenario(costs.serving, tokens) for tokens in operator.buckets]
    return {
        "region": operator.region, "step": operator.number, "op": operator.step.op, "source": operator.step.source,
        "bytes": str(operator.work.bytes), "flops": str(operator.work.count()),
        "predicted": [_launches(costs, operator, s) for s in at],
    }  # fmt: skip


def _launches(costs: Costs, operator: Operator, scenario: Scenario) -> dict[str, Any]:
    sizes = scenario.sizes(costs.serving)
    launches = [
        {"kernel": cost.kernel, **_timing(costs.launch(cost, sizes))} for cost in operator.launches(scenario.tokens)
    ]
    return {**asdict(scenario), **_timing(costs.operator(operator, scenario)), "each": launches}


def _step(prediction: Prediction) -> dict[str, Any]:
    regions = {n: _timing(t) | {"uses": prediction.uses[n]} for n, t in prediction.regions.items()}
    return {**asdict(prediction.scenario), **_timing(prediction.total), "regions": regions}


def _timing(time: Timing) -> dict[str, Any]:
    return {"seconds": time.seconds, "bound": time.bound, "seconds_by_bound": time.seconds_by, "bytes": time.bytes,
            "flops": time.flops, "launches": time.launches}  # fmt: skip
