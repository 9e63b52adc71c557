"""What a layer does on one rank of a layout: operators with bytes and FLOPs, and collectives, from a model's sizes.

Contract:
    The operators of the compiled layer in its order, with the sizes of one rank: attention cut by heads along `tp`
    (spec 3.7), routed experts over all ranks, everything else whole. Tokens choose experts alike, and ranks have equal
    work. Formats are the released ones: FP8 products with codes of a byte, FP4 experts, bf16 compressors and router.
    Every operator stands for one fused kernel, or as many as `launches` says.

Terms:
    part    tokens, requests and context of one rank of `dp` in a step, or of one half of it
    agreed  tokens that `dp` ranks gather: equal parts, so `dp` times a part's
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

from atomc.costs.formula import hit, mean_rows
from atomc.models.deepseek_v4.config import DeepseekV4Config
from atomc.parallel.kinds import Kind
from atomc.parallel.layout import Layout
from atomc.parallel.links import collective_seconds
from atomc.parallel.tasks import Cost
from atomc.targets import Format, Target

if TYPE_CHECKING:
    from atomc.passes.shard import Form

Group = Literal["attention", "caches", "streams", "experts", "head", "communication"]
FP4: Final = 0.5 + 1 / 32  # bytes of a weight of an expert, its scale included
FP8: Final = 1 + 1 / 128**2
CODES: Final = 1 + 1 / 128  # of an activation
ROW, INDEX_ROW = 584, 132  # bytes of a cache row (spec 4.2), and of an index row
INDEX_SCORE = 4
TILE: Final = 128  # rows and columns of a product's output that a workgroup makes
EXPERT_TILE: Final = 64  # rows of an expert that a workgroup does; assumed
PARTIAL: Final = 4  # bytes of a partial sum: sums over ranks are in float32, as the reference does them


@dataclass(frozen=True)
class Part:
    """What a rank of `dp` has in a step: tokens, of so many requests, each with `context` tokens when the step ends.

    `live`: tokens of all `dp` ranks together; None: as many on each of them. Messages are as long on all.
    """

    tokens: float
    requests: float
    context: float
    live: float | None = None

    def rows(self, most: int | None, ratio: int) -> float:
        """Cache rows that a token reads, on average (`atomc.costs.formula`)."""
        return mean_rows(most, ratio, self.tokens / self.requests, self.context)

    @property
    def cached(self) -> float:
        """Tokens of context of all requests."""
        return self.requests * self.context

    def everyone(self, layout: Layout) -> float:
        """Tokens of all ranks of `dp`."""
        return self.tokens * layout.dp if self.live is None else self.live


@dataclass(frozen=True)
class Operator:
    """One operator, or one collective where `collective` says which.

    Attributes:
        reads: buffers and state. writes: buffer -> bytes; state has none.
        bytes: between it and memory; of a collective, the size that `collective_seconds` takes. flops: by format.
        ranks: of a collective. product: which of the target's rates its matrix products have (`Product.kind`).
        tiles: of its products, together; 0 where it has none, or they are cut along K too.
        waste: what its products do over what they need: parts of tiles. host: whether the host waits for its result.
    """

    name: str
    group: Group
    reads: tuple[str, ...]
    writes: Mapping[str, float | None]
    bytes: float
    flops: Mapping[Format | Literal["vector"], float] = field(default_factory=dict)
    launches: int = 1
    collective: Kind | None = None
    ranks: int = 1
    product: str = ""
    tiles: float = 0.0
    waste: float = 1.0
    host: bool = False

    def cost(self, target: Target) -> Cost:
        """By the roofline; of a collective by the links."""
        if self.collective is not None:
            return sending(target, self.collective, self.bytes, self.ranks)
        found = roofline(target, self.bytes, self.flops, self.product, self.tiles, self.waste, self.launches)
        return found._replace(seconds=found.seconds + self.host * target.sustained.host)


def sending(target: Target, kind: Kind, size: float, ranks: int) -> Cost:
    """A collective; `size` as in `links.sent_bytes`."""
    seconds = collective_seconds(kind, size, ranks, target.link)
    return Cost(seconds, target.link.kept, seconds * target.link.power)


def roofline(
    target: Target,
    size: float,
    flops: Mapping[Any, float],
    product: str,
    tiles: float = 0.0,
    waste: float = 1.0,
    launches: int = 1,
) -> Cost:
    """An operator by the roofline (`atomc.costs.predict`), its products as fast as they are when power is no limit.

    Products come in whole rounds of tiles over all compute units; fewer tiles than units are cut along K. A collective
    leaves what it does not take of the units and of the memory's rate. Of the power, products take as many seconds as
    they take in a long run of them.
    """
    units, link, sustained = target.compute_units, target.link, target.sustained
    waste *= max(1.0, math.ceil(tiles / units) * units / tiles) if tiles >= units else 1.0
    rate = {k: target.peaks.vector if k == "vector" else target.product_rate(product, k) for k in flops}
    compute = sum((1.0 if k == "vector" else waste) * count / rate[k] for k, count in flops.items())
    memory = size / (target.memory_rate * sustained.memory)
    fast = compute / sustained.burst
    seconds = max(memory, fast, sustained.launch * launches)
    taken = min(0.9, link.copies * link.rate * link.share * link.kept / (target.memory_rate * sustained.memory))
    crowded = max(memory / (1 - taken), fast / (1 - link.units), seconds)
    return Cost(seconds, seconds / crowded if crowded else 1.0, max(compute, sustained.memory_power * memory))


class LayerOperators:
    """The operators of one layer for one part, in order; `form`: how experts on other ranks are reached."""

    def __init__(self, config: DeepseekV4Config, layer: int, layout: Layout, part: Part, form: Form = "gather") -> None:
        self.config, self.layout, self.part, self.form = config, layout, part, form
        self.ratio = config.compress_ratios[layer]
        self.d, self.dh = config.hidden_size, config.head_dim
        self.heads, self.groups = config.num_attention_heads / layout.tp, config.o_groups / layout.tp
        self.operators: list[Operator] = []
        self._streams("attention", "h", "h_mid")
        self._projections()
        if self.ratio:
            self._compressor("", self.dh)
        if self.ratio == 4:
            self._indexer()
        self._attention()
        self._streams("experts", "h_mid", "h_out")
        self._router()
        self._shared()
        self._experts()

    def _add(
        self, name: str, group: Group, reads: tuple[str, ...], writes: Mapping[str, float | None], size: float,
        flops: Mapping[Format | Literal["vector"], float] | None = None, launches: int = 1, product: str = "",
        tiles: float = 0.0,
    ) -> None:  # fmt: skip
        made = Operator(name, group, reads, dict(writes), size, flops or {}, launches, product=product, tiles=tiles)
        self.operators.append(made)

    def _collective(
        self, name: str, kind: Kind, reads: str, writes: str, sizes: tuple[float, float], axis: int
    ) -> None:
        """A collective over an axis of so many ranks; `sizes`: its own part, its result."""
        if axis > 1:
            made = Operator(name, "communication", (reads,), {writes: sizes[1]}, sizes[0], {}, 1, kind, axis)
            self.operators.append(made)

    def _linear(
        self, name: str, group: Group, reads: tuple[str, ...], writes: str, k: float, n: float, weight: float = FP8,
        out: float = 2, operands: Format = "fp8",
    ) -> None:  # fmt: skip
        t = self.part.tokens
        read = CODES if operands == "fp8" else 2
        self._add(
            name,
            group,
            reads,
            {writes: t * n * out},
            t * k * read + k * n * weight + t * n * out,
            {operands: 2 * t * k * n},
            product="linear" if operands == "fp8" else "",
            tiles=tiles(t, n),
        )

    def _streams(self, to: str, h: str, h_out: str) -> None:
        """Mix the last sublayer's output into the streams, and collapse them: spec 2.1, in float32 (bf16 in parts)."""
        t, d, n = self.part.tokens, self.d, self.config.hc_mult
        y = "y_in" if h == "h" else "y_attention"
        rows = 2 * n + n * n
        size = t * d * 2 * (2 * n + 2) + rows * n * d * 4
        flops: Mapping[Format | Literal["vector"], float] = {"bf16": 3 * 2 * t * n * d * rows, "vector": t * d * n * 14}
        self._add(f"streams_{to}", "streams", (h, y), {h_out: t * n * d * 2, f"x_{to}": t * d * 3}, size, flops)

    def _projections(self) -> None:
        t, qr, width = self.part.tokens, self.config.q_lora_rank, self.heads * self.dh
        self._linear("wq_a_wkv", "attention", ("x_attention",), "qa_kv", self.d, qr + self.dh)
        self._add("norms", "attention", ("qa_kv",), {"qn": t * qr * 3, "kv": t * self.dh * 2}, t * (qr + self.dh) * 5)
        self._linear("wq_b", "attention", ("qn",), "q_raw", qr, width)
        size = t * (width * 4 + self.dh * 2 + ROW)
        self._add("q_rope_insert", "caches", ("q_raw", "kv"), {"q": t * width * 2, "window": None}, size)

    def _compressor(self, prefix: str, dim: int) -> None:
        """Two projections, and the pooling of completed windows into rows; the rest stays in a ring (spec 2.5, 2.6)."""
        t, overlap = self.part.tokens, 2 if self.ratio == 4 else 1
        wide = 2 * overlap * dim
        self._linear(
            f"{prefix}compressor", "attention", ("x_attention",), f"{prefix}kv_gate", self.d, wide, 2, 4, "bf16"
        )
        ring = self.ratio * overlap
        entries = min(t / self.ratio, self.part.requests) * ring * wide * 4
        kept = min(t, self.part.requests * ring) * wide * 4 * 2
        size = t * wide * 4 + entries + kept + t / self.ratio * (INDEX_ROW if prefix else ROW)
        state: dict[str, float | None] = {f"{prefix}rows": None, f"{prefix}partial": None}
        self._add(f"{prefix}pool", "caches", (f"{prefix}kv_gate", f"{prefix}partial"), state, size, launches=2)

    def _indexer(self) -> None:
        """Scores of all visible rows by this rank's index heads, summed over `tp`, and the best K (spec 2.7, 3.7)."""
        config, part = self.config, self.part
        t, di = part.tokens, config.index_head_dim
        heads = config.index_n_heads / self.layout.tp
        self._compressor("index_", di)
        self._linear("index_wq_b", "attention", ("qn",), "index_q", config.q_lora_rank, heads * di)
        self._linear("index_weights", "attention", ("x_attention",), "index_w", self.d, heads, 2, 4, "bf16")
        scored = t * part.rows(None, 4)
        size = part.cached / 4 * INDEX_ROW + t * heads * di * 2
        flops: Mapping[Format | Literal["vector"], float] = {
            "bf16": 2 * scored * heads * di,
            "vector": 3 * scored * heads,
        }
        if self.layout.tp == 1:  # the scores of a tile of tokens stay near; what is selected comes out
            out: dict[str, float | None] = {"topk": t * config.index_topk * 4}
            self._add("index_topk", "attention", ("index_q", "index_w", "index_rows"), out, size + scored * 8, flops, 2)
            return
        made = {"index_scores": scored * INDEX_SCORE}
        self._add("index_scores", "attention", ("index_q", "index_w", "index_rows"), made, size + scored * 4, flops)
        sizes = scored * INDEX_SCORE, scored * INDEX_SCORE
        self._collective("index_sum", "all_reduce", "index_scores", "index_summed", sizes, self.layout.tp)
        self._add("index_select", "attention", ("index_summed",), {"topk": t * config.index_topk * 4}, scored * 4)

    def _attention(self) -> None:
        config, part, t = self.config, self.part, self.part.tokens
        seen = part.rows(config.sliding_window, 1)
        read = min(part.cached, t + part.requests * (config.sliding_window - 1)) * ROW
        reads = ["q", "window"]
        if self.ratio:
            most = config.index_topk if self.ratio == 4 else None
            chosen, every = part.rows(most, self.ratio), part.cached / self.ratio
            seen += chosen
            read += min(t * chosen, every) * ROW
            reads += ["rows", "topk"] if self.ratio == 4 else ["rows"]
        width = self.heads * self.dh
        self._add(
            "attention",
            "attention",
            tuple(reads),
            {"o": t * width},
            read + t * width * 3,
            {"bf16": 4 * t * seen * width},
            product="attention",
        )
        into = self.heads * self.dh / self.groups  # columns of a group
        rank = config.o_lora_rank
        flops: Mapping[Format | Literal["vector"], float] = {"fp8": 2 * t * width * rank}
        size = t * width * CODES + self.groups * into * rank * FP8 + t * self.groups * rank * 2
        z = t * self.groups * rank
        made = {"z_raw": z * 2}
        many = self.groups * tiles(t, rank)
        self._add("wo_a", "attention", ("o",), made, size, flops, product="grouped", tiles=many)
        self._add("quantize_z", "attention", ("z_raw",), {"z": z * CODES}, z * (2 + CODES))
        whole = self.layout.tp == 1
        out = "y_attention" if whole else "y_partial"
        self._linear("wo_b", "attention", ("z",), out, self.groups * rank, self.d, FP8, 2 if whole else PARTIAL)
        sizes = t * self.d * PARTIAL, t * self.d * PARTIAL
        self._collective("wo_b_sum", "all_reduce", "y_partial", "y_attention", sizes, self.layout.tp)

    def _router(self) -> None:
        t, experts = self.part.tokens, self.config.n_routed_experts
        self._linear("router", "experts", ("x_experts",), "logits", self.d, experts, 2, 4, "bf16")
        chosen = t * self.config.num_experts_per_tok * 8
        self._add("route", "experts", ("logits",), {"chosen": chosen}, t * experts * 4 + chosen)

    def _shared(self) -> None:
        """The shared expert, whole on every rank: it needs no other rank's tokens."""
        inner = self.config.moe_intermediate_size
        self._linear("shared_w13", "experts", ("x_experts",), "shared_a", self.d, 2 * inner)
        t = self.part.tokens
        codes = {"shared_codes": t * inner * CODES}
        self._add("swiglu", "experts", ("shared_a",), codes, t * inner * (4 + CODES))
        self._linear("shared_w2", "experts", ("shared_codes",), "shared", inner, self.d)

    def _experts(self) -> None:
        from atomc.planning.exchange import exchange

        for operator in exchange(self.config, self.layout, self.part, self.form):
            self.operators.append(operator)


def tiles(rows: float, columns: float) -> float:
    """Output tiles of a product."""
    return math.ceil(rows / TILE) * math.ceil(columns / TILE)


def padded(rows: float) -> float:
    """Rows of an expert with what its last tile has too much, on average, over its rows; few have small tiles."""
    return 1 + min(EXPERT_TILE, rows) / 2 / rows


def expert_bytes(config: DeepseekV4Config) -> float:
    """Bytes of one routed expert."""
    return 3 * config.hidden_size * config.moe_intermediate_size * FP4


def experts_read(config: DeepseekV4Config, tokens: float) -> float:
    """Experts that some of the tokens choose."""
    return hit(config.n_routed_experts, config.num_experts_per_tok).at({"T": tokens})
