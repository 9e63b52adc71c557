"""The roofline of an artifact as SVG: the target's ceilings, and each kernel in each bucket. Predicted, not measured.

Terms:
    intensity    FLOPs of a byte that a kernel moves, to the right; upwards FLOP/s; both by powers of ten
    ceiling      what the target sustains: a slope of the memory's rate, a line for each kind of arithmetic
    dot          all launches of one kernel in the largest step of a bucket; its area is its share of the step's time
"""

from __future__ import annotations

import html
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from atomc.costs.predict import Costs, Scenario, Timing, bucket_scenario
from atomc.costs.tables import configurations
from atomc.targets import Target

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 1120, 620, 96, 40, 46
HUES = (210, 30, 130, 340, 270, 60, 180, 0)  # of the buckets, in order
LABELLED = 4  # dots of each bucket that bear their names: those that most of its time goes to
LETTER, LINE = 6.2, 13  # pixels of text

Span = tuple[float, float, float]  # text that is drawn: its left end, base line, width


@dataclass(frozen=True)
class Dot:
    """A kernel in a bucket: what its launches do together, and their share of the bucket's time."""

    kernel: str
    scenario: Scenario
    time: Timing
    share: float

    @property
    def intensity(self) -> float:
        """FLOPs of a byte."""
        return self.time.flops / self.time.bytes

    @property
    def rate(self) -> float:
        """FLOP/s."""
        return self.time.flops / self.time.seconds


def dots(costs: Costs, context: int | None = None) -> dict[int, list[Dot]]:
    """Bucket -> its kernels, the longest first."""
    times: defaultdict[int, dict[str, Timing]] = defaultdict(dict)
    scenarios = {}
    for use in costs.kernel_uses():
        scenario = scenarios[use.tokens] = bucket_scenario(costs.serving, use.tokens, context)
        time = costs.launch(use.cost, scenario.sizes(costs.serving)) * use.count
        times[use.tokens][use.cost.kernel] = times[use.tokens].get(use.cost.kernel, Timing()) + time
    found = {}
    for tokens, kernels in sorted(times.items()):
        whole = sum(time.seconds for time in kernels.values())
        order = sorted(kernels.items(), key=lambda item: -item[1].seconds)
        found[tokens] = [Dot(kernel, scenarios[tokens], time, time.seconds / whole) for kernel, time in order]
    return found


def ceilings(target: Target) -> dict[str, float]:
    """FLOP/s that each kind of arithmetic sustains; kinds of one rate together."""
    rates: defaultdict[float, list[str]] = defaultdict(list)
    rates[target.peaks.vector].append("float32")
    for name in ("bf16", "fp8", "fp4"):
        rates[target.sustained_matrix(name)].append(name)
    return {", ".join(names): rate for rate, names in rates.items()}


class Axes:
    """Powers of ten of both axes around all dots and ceilings."""

    def __init__(self, drawn: Sequence[Dot], roof: dict[str, float], memory: float) -> None:
        across = [dot.intensity for dot in drawn] + [rate / memory for rate in roof.values()]
        up = [dot.rate for dot in drawn] + list(roof.values())
        self.first, self.last = math.floor(math.log10(min(across))), math.ceil(math.log10(max(across)))
        self.low, self.high = math.floor(math.log10(min(up))), math.log10(max(up)) + 0.15

    def x(self, intensity: float) -> float:
        return LEFT + (math.log10(intensity) - self.first) / (self.last - self.first) * (WIDTH - LEFT - 12)

    def y(self, rate: float) -> float:
        return TOP + (self.high - math.log10(rate)) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM)


def roofline(costs: Costs, context: int | None = None) -> str:
    """A figure; it loads nothing and needs no script."""
    found, roof = dots(costs, context), ceilings(costs.target)
    buckets = {tokens: [dot for dot in bucket if dot.time.flops] for tokens, bucket in found.items()}
    drawn = [dot for bucket in buckets.values() for dot in bucket]
    memory = costs.target.memory_rate * costs.target.sustained.memory
    axes, taken = Axes(drawn, roof, memory), list[Span]()
    label = html.escape(f"roofline of the kernels for {costs.target.name}")
    parts = [f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">', *_grid(axes)]
    parts += _ceilings(axes, roof, memory, taken)
    for tokens, bucket in buckets.items():  # below the dots: a name may hide none
        for dot in bucket[:LABELLED]:
            parts += _name(axes, dot, f"{costs.kernels[dot.kernel].name}, {tokens:,}", taken)
    names = configurations(costs)
    for i, bucket in enumerate(buckets.values()):
        for dot in reversed(bucket):  # the smallest on top
            name = f"{costs.kernels[dot.kernel].name} {dot.kernel[:8]}\n{names[dot.kernel]}"
            parts.append(_circle(axes, dot, _colour(i), name))
    parts += _legend(found)
    still = sum(len(bucket) for bucket in found.values()) - len(drawn)
    caption = (
        "Predicted by the static model, not measured. A dot is a kernel in the largest step of a bucket, as large as "
        f"its share of the step; point at it to read what it is. {still} that compute nothing have no place here. A "
        "dot below the ceilings waits for launches, or multiplies float32 as several products."
    )
    return "\n".join([*parts, f"</svg><figcaption>{caption}</figcaption></figure>"])


def _colour(bucket: int) -> str:
    return f"hsl({HUES[bucket % len(HUES)]} 65% 50%)"


def _legend(found: dict[int, list[Dot]]) -> Iterator[str]:
    for i, (tokens, bucket) in enumerate(found.items()):
        step, x = bucket[0].scenario, LEFT + i * (WIDTH - LEFT) / len(found)
        text = f"up to {tokens:,} tokens: {step.name}, context {step.context:,}"
        yield f'<circle cx="{x + 6:.1f}" cy="16" r="5" fill="{_colour(i)}"/>'
        yield f'<text x="{x + 16:.1f}" y="16" dy="4">{text}</text>'


def _grid(axes: Axes) -> Iterator[str]:
    floor = HEIGHT - BOTTOM
    for power in range(axes.first, axes.last + 1):
        x = f"{axes.x(10.0**power):.1f}"
        yield f'<line class="grid" x1="{x}" x2="{x}" y1="{TOP}" y2="{floor}"/>'
        anchor = "end" if power == axes.last else "middle"
        yield f'<text x="{x}" y="{floor + 16}" text-anchor="{anchor}">{10.0**power:,.6g}</text>'
    for power in range(axes.low, math.floor(axes.high) + 1):
        y = f"{axes.y(10.0**power):.1f}"
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 12}" y1="{y}" y2="{y}"/>'
        yield f'<text x="{LEFT - 8}" y="{y}" dy="4" text-anchor="end">{rate_text(10.0**power)}</text>'
    yield f'<text x="{WIDTH - 12}" y="{floor + 34}" text-anchor="end">FLOPs of a byte</text>'


def _ceilings(axes: Axes, roof: dict[str, float], memory: float, taken: list[Span]) -> Iterator[str]:
    top = max(roof.values())
    left = max(10.0**axes.first, 10.0**axes.low / memory)
    ends = f'x1="{axes.x(left):.1f}" y1="{axes.y(left * memory):.1f}" x2="{axes.x(top / memory):.1f}"'
    yield f'<line class="roof" {ends} y2="{axes.y(top):.1f}"/>'
    x, y = axes.x(left) + 14, axes.y(left * memory) - 16
    turn = math.degrees(math.atan2(axes.y(top) - axes.y(left * memory), axes.x(top / memory) - axes.x(left)))
    turned = f"rotate({turn:.1f} {x:.1f} {y:.1f})"
    yield f'<text x="{x:.1f}" y="{y:.1f}" transform="{turned}">{memory / 1e12:.2f} TB/s</text>'
    for name, rate in roof.items():
        height = axes.y(rate)
        yield (
            f'<line class="roof" x1="{axes.x(rate / memory):.1f}" x2="{WIDTH - 12}" '
            f'y1="{height:.1f}" y2="{height:.1f}"/>'
        )
        text, base = f"{name} {rate_text(rate)}", height + (-5 if rate == top else LINE)
        yield f'<text class="name" x="{WIDTH - 16}" y="{base:.1f}" text-anchor="end">{text}</text>'
        taken.append((WIDTH - 16 - len(text) * LETTER, base, len(text) * LETTER))


def _circle(axes: Axes, dot: Dot, colour: str, name: str) -> str:
    time = dot.time
    tip = (
        f"{name}\n{dot.scenario.name}, context {dot.scenario.context:,}: {time.launches} launches\n"
        f"{time.bytes:,.0f} bytes, {time.flops:,.0f} FLOPs, {dot.intensity:.3g} FLOPs of a byte\n"
        f"predicted {time.seconds * 1e6:,.1f} µs ({dot.share:.1%} of the step), {rate_text(dot.rate)}, "
        f"bound: {time.bound}"
    )
    return (
        f'<circle class="kernel" cx="{axes.x(dot.intensity):.1f}" cy="{axes.y(dot.rate):.1f}" r="{_radius(dot):.1f}" '
        f'fill="{colour}"><title>{html.escape(tip)}</title></circle>'
    )


def _radius(dot: Dot) -> float:
    return 3 + 16 * math.sqrt(dot.share)


def _name(axes: Axes, dot: Dot, text: str, taken: list[Span]) -> Iterator[str]:
    """The dot's name beside it, where no other stands; else only its title tells it."""
    width, away = len(text) * LETTER, _radius(dot) + 4
    x, y = axes.x(dot.intensity), axes.y(dot.rate)
    for left, base in (
        (x + away, y + 4), (x - away - width, y + 4), (x - width / 2, y - away), (x - width / 2, y + away + 8),
    ):  # fmt: skip
        inside = left >= LEFT and left + width <= WIDTH - 12 and TOP + LINE <= base <= HEIGHT - BOTTOM
        if inside and all(
            abs(base - other) >= LINE or left + width < start or start + wide < left for start, other, wide in taken
        ):
            taken.append((left, base, width))
            yield f'<text class="name" x="{left:.1f}" y="{base:.1f}">{html.escape(text)}</text>'
            return


def rate_text(rate: float) -> str:
    """`762 TFLOP/s`."""
    power = min(max(int(math.log10(rate)) // 3, 0), 5)
    return f"{rate / 1000**power:.3g} {' kMGTP'[power].strip()}FLOP/s"
