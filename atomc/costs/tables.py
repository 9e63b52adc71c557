"""Costs as tables of text, for the command line and the report."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from atomc.costs.occupancy import occupancy
from atomc.costs.predict import BOUNDS, Costs, Prediction, Scenario, Timing, bucket_scenario
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
        f"predicted, with {target.memory_rate * known.memory / 1e12:.2f} TB/s of memory, {rates} TFLOP/s of products, "
        f"{target.peaks.vector / 1e12:.0f} of float32, {known.launch * 1e6:.0f} µs a launch at the least: rates "
        f"{'measured on this kind of device' if known.origin == 'measured' else 'assumed, nothing was measured on it'}"
    )


def configurations(costs: Costs) -> dict[str, str]:
    """Kernel -> its constants, those that are not the same for all kernels of that name."""
    variants: defaultdict[str, list[dict[str, str]]] = defaultdict(list)
    for known in costs.kernels.values():
        variants[known.name].append(known.constants)
    found = {}
    for key, known in costs.kernels.items():
        others = variants[known.name]
        differing = {n: v for n, v in known.constants.items() if any(o.get(n) != v for o in others)}
        found[key] = " ".join(f"{name}={value}" for name, value in differing.items())
    return found


def kernel_table(costs: Costs) -> Table:
    """A row for each code object."""
    launches = Counter(
        launch.kernel
        for region in costs.regions.values()
        for step in region.steps
        for bucket in step.buckets
        for launch in bucket.launches
    )
    chosen, rows = configurations(costs), []
    for key, known in sorted(costs.kernels.items(), key=lambda item: (item[1].name, item[0])):
        matrix = ", ".join(f"{count} {name}" for name, count in known.matrix.items())
        spills = str(known.spills) + (f" + {known.scalar_spills} scalar" if known.scalar_spills else "")
        rows.append(
            [known.name, key[:8], chosen[key], f"{known.warps} × {known.stages}", str(known.registers), spills,
             f"{known.shared:,}", str(occupancy(known, costs.target)), matrix, str(launches[key])]
        )  # fmt: skip
    return Table(
        f"{len(rows)} kernels for {costs.target.name}; the constants in which those of one name differ",
        ["kernel", "key", "constants", "warps × stages", "registers", "spills", "shared bytes", "occupancy",
         "matrix instructions", "in the plan"], rows, (4, 5, 6, 9),
    )  # fmt: skip


def operator_table(costs: Costs, region: str, chosen: Scenario | None) -> Table:
    """A row for each operator of a region: its formulas, and its times in each bucket or in one scenario."""
    limits = costs.serving
    most = dict.fromkeys(n for op in costs.operators if op.region == region for n in op.buckets)
    columns = [chosen] if chosen else [bucket_scenario(limits, n) for n in most]
    rows = []
    for operator in costs.operators:
        if operator.region == region:
            times = [time_text(costs.operator(operator, scenario)) for scenario in columns]
            name = operator.step.op.removesuffix(".default")
            rows.append(
                [str(operator.number), name, str(operator.work.bytes), str(operator.work.count()), *times,
                 operator.step.source]
            )  # fmt: skip
    head = [f"{s.name}, context {s.context:,}" for s in columns]
    return Table(
        f"operators of {region}: bytes and FLOPs, predicted µs, bound, launches",
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
    return Table("predicted µs of one use of each region", ["step", "context", *head], rows, (1,))


def step_table(predictions: Sequence[Prediction]) -> Table:
    """A row for each scenario: the whole step."""
    return Table(
        "predicted steps of the model",
        ["step", "context", "ms", "bound", *(f"{b} ms" for b in BOUNDS), "GB", "TFLOP", "launches"],
        list(_steps(predictions)), (1, 2, 4, 5, 6, 7, 8, 9),
    )  # fmt: skip


def _steps(predictions: Sequence[Prediction]) -> Iterator[list[str]]:
    for p in predictions:
        by = [f"{p.total.seconds_by.get(bound, 0.0) * 1e3:.2f}" for bound in BOUNDS]
        yield [p.scenario.name, f"{p.scenario.context:,}", f"{p.total.seconds * 1e3:.2f}", p.total.bound, *by,
               f"{p.total.bytes / 1e9:,.2f}", f"{p.total.flops / 1e12:,.3f}", f"{p.total.launches:,}"]  # fmt: skip
