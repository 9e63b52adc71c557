"""Costs as tables of text, for the command line and the report."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from atomc.costs.occupancy import occupancy
from atomc.costs.predict import BOUNDS, Costs, Prediction, Timing, bucket_scenario
from atomc.targets import Target


@dataclass(frozen=True)
class Table:
    """A title, the columns' names, rows, and which columns hold numbers."""

    title: str
    head: list[str]
    rows: list[list[str]]
    right: tuple[int, ...] = ()


def reckoned(target: Target) -> str:
    """What the predictions reckon with."""
    known = target.sustained
    rates = ", ".join(f"{name} {target.sustained_matrix(name) / 1e12:,.0f}" for name in ("bf16", "fp8", "fp4"))
    return (
        f"predicted by the static model, not measured: {target.memory_rate * known.memory / 1e12:.2f} TB/s of memory, "
        f"{rates} TFLOP/s of products, "
        f"{target.peaks.vector / 1e12:.0f} of float32, {known.launch * 1e6:.0f} µs a launch at the least: rates "
        f"{'measured on this kind of device' if known.origin == 'measured' else 'assumed, nothing was measured on it'}"
    )


def configurations(costs: Costs) -> dict[str, str]:
    """Kernel -> warps, stages and constants, those that are not the same for all kernels of that name."""
    variants: defaultdict[str, list[dict[str, str]]] = defaultdict(list)
    for known in costs.kernels.values():
        variants[known.name].append(known.constants)
    found = {}
    for key, known in costs.kernels.items():
        others = variants[known.name]
        differing = {n: v for n, v in known.constants.items() if any(o.get(n) != v for o in others)}
        shown = [*(f"{name}={value}" for name, value in differing.items()), f"{known.warps} warps"]
        found[key] = " ".join([*shown, f"{known.stages} stages"] if known.stages > 1 else shown)
    return found


def kernel_table(costs: Costs) -> Table:
    """A row for each code object."""
    chosen, rows = configurations(costs), []
    for key, known in sorted(costs.kernels.items(), key=lambda item: (item[1].name, item[0])):
        matrix = ", ".join(f"{count}×{name}" for name, count in known.matrix.items())
        spills = str(known.spills) + (f" + {known.scalar_spills} scalar" if known.scalar_spills else "")
        rows.append(
            [known.name, key[:8], chosen[key], costs.origins[key], str(known.registers), spills, f"{known.shared:,}",
             str(occupancy(known, costs.target)), matrix]
        )  # fmt: skip
    return Table(
        f"{len(rows)} kernels for {costs.target.name} ({costs.target.arch}). Configuration: the constants in which "
        "kernels of one name differ. Occupancy: wavefronts of a compute unit, of the most it holds, and the limit",
        ["kernel", "key", "configuration", "chosen by", "registers", "spills", "LDS", "occupancy",
         "matrix instructions"], rows, (4, 5, 6),
    )  # fmt: skip


def use_table(costs: Costs, context: int | None = None) -> Table:
    """A row for each kernel and bucket: formulas of one launch, its predicted time in the bucket's largest step."""
    rows = []
    for use in costs.kernel_uses():
        scenario = bucket_scenario(costs.serving, use.tokens, context)
        time, kernel = costs.launch(use.cost, scenario.sizes(costs.serving)), use.cost.kernel
        step = f"{scenario.name}, context {scenario.context:,}"
        rows.append(
            [costs.kernels[kernel].name, kernel[:8], f"{use.tokens:,}", step, str(use.cost.bytes), str(use.cost.count),
             f"{time.seconds * 1e6:.1f}", time.bound, str(use.count)]
        )  # fmt: skip
    return Table(
        "A launch in each bucket, predicted for the bucket's largest step. T: tokens, B: requests, L: rows of logits, "
        "C: context; rows(n, r): rows of ratio r that a token reads; hit(n, k): of n experts those that tokens choose",
        ["kernel", "key", "tokens", "predicted for", "bytes", "FLOPs", "µs", "bound", "in a step"], rows, (2, 6, 8),
    )  # fmt: skip


def operator_table(costs: Costs, region: str, context: int | None = None) -> Table:
    """A row for each operator of a region: its formulas, and its predicted time in each bucket's largest step."""
    operators = [operator for operator in costs.operators if operator.region == region]
    buckets = dict.fromkeys(tokens for operator in operators for tokens in operator.buckets)
    columns = [bucket_scenario(costs.serving, tokens, context) for tokens in buckets]
    rows = [
        [str(o.number), o.step.op.removesuffix(".default"), str(o.work.bytes), str(o.work.count()),
         *(time_text(costs.operator(o, scenario)) for scenario in columns), o.step.source]
        for o in operators
    ]  # fmt: skip
    head = [f"{s.name}, context {s.context:,}" for s in columns]
    return Table(
        f"Operators of {region}: bytes and FLOPs; predicted µs, bound, launches",
        ["step", "operator", "bytes", "FLOPs", *head, "source"], rows, (0,),
    )  # fmt: skip


def time_text(time: Timing) -> str:
    """Microseconds, bound, launches: `11.3 memory (2)`."""
    return f"{time.seconds * 1e6:.1f} {time.bound} ({time.launches})"


def region_table(predictions: Sequence[Prediction]) -> Table:
    """A row for each scenario, a column for each layer kind: one use of it."""
    uses = predictions[0].uses
    rows = [
        [p.scenario.name, f"{p.scenario.context:,}", *(f"{t.seconds * 1e6:,.1f} {t.bound}" for t in p.regions.values())]
        for p in predictions
    ]
    head = [f"{name}, {uses[name]}×" for name in predictions[0].regions]
    return Table("Predicted µs of one use of each layer kind", ["step", "context", *head], rows, (1,))


def step_table(predictions: Sequence[Prediction]) -> Table:
    """A row for each scenario: the whole step."""
    return Table(
        "Predicted steps of the model",
        ["step", "context", "ms", "bound", *(f"{b} ms" for b in BOUNDS), "GB", "TFLOP", "launches"],
        list(_steps(predictions)), (1, 2, 4, 5, 6, 7, 8, 9),
    )  # fmt: skip


def _steps(predictions: Sequence[Prediction]) -> Iterator[list[str]]:
    for p in predictions:
        by = [f"{p.total.seconds_by.get(bound, 0.0) * 1e3:.2f}" for bound in BOUNDS]
        yield [p.scenario.name, f"{p.scenario.context:,}", f"{p.total.seconds * 1e3:.2f}", p.total.bound, *by,
               f"{p.total.bytes / 1e9:,.2f}", f"{p.total.flops / 1e12:,.3f}", f"{p.total.launches:,}"]  # fmt: skip
