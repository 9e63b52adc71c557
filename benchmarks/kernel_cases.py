"""Every kernel at the shapes of V4-Flash and V4-Pro: arguments, FLOPs, bytes, and the plain operation of its peers.

Terms:
    bytes   what the operator must move: each input and each result once, of caches and experts what is touched.
    peak    the matrix rate that bounds it: `fp8`, `bf16`; empty where only bytes count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from grouped import by_expert, grouped_experts
from kernel_inputs import ACT, BF16, F32, I32, INDEX, MAIN, Inputs, Step
from torch import Tensor

from atomc.codegen.device import Device
from atomc.codegen.hosts import HOSTS, host_of
from atomc.codegen.kernels import moe
from atomc.codegen.kernels.moe_config import choose
from atomc.codegen.kernels.moe_sort import sort
from atomc.formats import FP4_ACTIVATION, FP8_ACTIVATION, FP8_TILE, MXFP4
from atomc.models.deepseek_v4.config import DeepseekV4Config
from atomc.ops import OPS
from atomc.targets import Target

DECODE, PREFILL, CONTEXTS = (1, 8, 16, 64, 128), (1024, 4096, 8192), (4096, 131072)
EPS, LIMIT, N = 1e-6, 10.0, 4
Make = Callable[[Inputs], list[Any]]


@dataclass(frozen=True)
class Plain:
    """The same operation for peers where the operator's own reference would be no fair one: products in bf16.

    Attributes:
        call: in plain torch. make: its arguments. name: what the table calls it. bytes: of its arguments, for a refusal
            before memory runs out.
    """

    call: Callable[..., Any]
    make: Make
    name: str
    bytes: float = 0.0


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        name: unique in its family. op: the operator. tokens: of the bucket. make: fresh arguments.
        flops: of a call. peak: see the module. bytes: None: all arguments and results, once.
        plain: what peers run, if not the reference. gemm: M, N, K of a plain FP8 product.
        graph: whether a CUDA graph can hold what peers run: references that ask the device for sizes cannot be.
        rotate: sets of inputs; 0: as many as a cache does not hold. launch: a host function that is no operator's.
    """

    name: str
    op: str
    tokens: int
    make: Make
    flops: float = 0.0
    peak: str = ""
    bytes: float | None = None
    plain: Plain | None = None
    gemm: tuple[int, int, int] | None = None
    graph: bool = True
    rotate: int = 0
    launch: Callable[..., Any] | None = None

    def host(self, target: Target) -> Callable[..., Any]:
        """The host function."""
        if self.launch is not None:
            return self.launch
        name = next(name for name in HOSTS if name.split(".")[1] == self.op)
        found = host_of(name, target)
        assert found is not None, f"{target.name} has no kernel for {self.op}"
        return found

    @property
    def peer(self) -> tuple[str, Callable[..., Any], Make]:
        """What torch runs for it: a name, a function of plain torch, and its arguments."""
        if self.plain is not None:
            return self.plain.name, self.plain.call, self.plain.make
        return "reference", OPS[self.op].reference, self.make


def size_of(value: Any) -> float:
    """Bytes of all tensors in a value."""
    if isinstance(value, Tensor):
        return float(value.numel() * value.element_size())
    return sum(map(size_of, value)) if isinstance(value, (list, tuple)) else 0.0


def linears(c: DeepseekV4Config) -> Iterator[Case]:
    """FP8 linears, and wo_a by groups of heads."""
    d, i, heads, qr, groups = (
        c.hidden_size, c.moe_intermediate_size, c.num_attention_heads, c.q_lora_rank, c.o_groups
    )  # fmt: skip
    shapes = {"wq_a|wkv": (qr + c.head_dim, d), "wq_b": (heads * c.head_dim, qr),
              "index wq_b": (c.index_n_heads * c.index_head_dim, qr), "wo_b": (d, groups * c.o_lora_rank),
              "w1|w3": (2 * i, d), "w2": (d, i)}  # fmt: skip
    for m in (*DECODE, *PREFILL):
        for name, (n, k) in shapes.items():
            yield _scaled(f"{name} {n}x{k}, M={m}", m, n, k)
        yield _grouped(m, groups, groups * c.o_lora_rank, heads * c.head_dim // groups)


def _scaled(name: str, m: int, n: int, k: int) -> Case:
    def make(at: Inputs) -> list[Any]:
        return [*at.codes((m, k), FP8_ACTIVATION), *at.codes((n, k), FP8_TILE), ACT, str(FP8_TILE), BF16]

    plain = Plain(F.linear, lambda at: [at.normal(m, k), at.normal(n, k, size=k**-0.5)], "bf16 linear")
    return Case(name, "scaled_linear", m, make, 2.0 * m * n * k, "fp8", plain=plain, gemm=(m, n, k))


def _grouped(m: int, groups: int, n: int, k: int) -> Case:
    def make(at: Inputs) -> list[Any]:
        return [*at.codes((m, groups, k), FP8_ACTIVATION), *at.codes((n, k), FP8_TILE), ACT, str(FP8_TILE), BF16]

    def plain(x: Tensor, w: Tensor) -> Tensor:
        return torch.bmm(x.transpose(0, 1), w.transpose(1, 2)).transpose(0, 1).flatten(1)

    def plain_make(at: Inputs) -> list[Any]:
        return [at.normal(m, groups, k), at.normal(groups, n // groups, k, size=k**-0.5)]

    return Case(f"wo_a {groups} groups {n}x{k}, M={m}", "scaled_grouped_output", m, make, 2.0 * m * n * k, "fp8",
                plain=Plain(plain, plain_make, "bf16 bmm"))  # fmt: skip


def gemms(c: DeepseekV4Config) -> Iterator[Case]:
    """Linears that stay in bf16, with fp32 results; the head at decode only, for it computes wanted rows alone."""
    d = c.hidden_size
    shapes = {"router": c.n_routed_experts, "CSA compressor": 4 * c.head_dim, "HCA compressor": 2 * c.head_dim,
              "index compressor": 4 * c.index_head_dim, "weights_proj": c.index_n_heads,
              "head": c.vocab_size}  # fmt: skip
    for m in (*DECODE, *PREFILL):
        for name, n in shapes.items():
            if name != "head" or m in DECODE:
                yield _wide(f"{name} {n}x{d}, M={m}", m, n, d)


def _wide(name: str, m: int, n: int, k: int) -> Case:
    def make(at: Inputs) -> list[Any]:
        return [at.normal(m, k), at.normal(n, k, size=k**-0.5)]

    return Case(name, "linear_fp32", m, make, 2.0 * m * n * k, "bf16", plain=Plain(F.linear, make, "bf16 linear"))


def experts(c: DeepseekV4Config) -> Iterator[Case]:
    """Routed experts with FP4 weights: sorting, both products, SwiGLU and the sum of the choices."""
    e, d, i, k = c.n_routed_experts, c.hidden_size, c.moe_intermediate_size, c.num_experts_per_tok
    for m in (*DECODE, *PREFILL):
        hit = e * (1 - (1 - k / e) ** m)  # experts that uniform routing touches

        def make(at: Inputs, m: int = m) -> list[Any]:
            w13 = at.kept("w13", lambda: at.codes((e, 2 * i, d), MXFP4))
            w2 = at.kept("w2", lambda: at.codes((e, d, i), MXFP4))
            return [*at.codes((m, d), FP8_ACTIVATION), *w13, *w2, *_choices(at, m, e, k), LIMIT, ACT, ACT,
                    str(MXFP4), str(MXFP4), BF16]  # fmt: skip

        yield Case(f"experts M={m}, about {hit:.0f} of {e} touched", "scaled_moe_experts", m, make,
                   6.0 * m * k * i * d, "fp8", hit * 3 * i * d * 17 / 32 + 5.0 * m * d, _plain_experts(m, e, d, i, k),
                   rotate=3 if m < 1024 else 1)  # fmt: skip


def _choices(at: Inputs, m: int, e: int, k: int) -> list[Tensor]:
    indices = torch.rand(m, e, device=at.device).topk(k, dim=-1).indices
    return [indices, torch.rand(m, k, device=at.device)]


def _plain_experts(m: int, e: int, d: int, i: int, k: int) -> Plain:
    def make(at: Inputs) -> list[Any]:
        def weight(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=BF16, device=at.device).normal_(std=shape[-1] ** -0.5)

        w13 = at.kept("bf16 w13", lambda: weight(e, 2 * i, d))
        return [at.normal(m, d), w13, at.kept("bf16 w2", lambda: weight(e, d, i)), *_choices(at, m, e, k), LIMIT]

    return Plain(grouped_experts, make, "bf16 grouped_mm", 6.0 * e * i * d)


def sorts(c: DeepseekV4Config) -> Iterator[Case]:
    """Tokens sorted by expert, as the products read them; `experts` has it in it."""
    e, d, k = c.n_routed_experts, c.hidden_size, c.num_experts_per_tok

    def host(device: Device, codes: Tensor, scales: Tensor, indices: Tensor) -> tuple[Tensor, ...]:
        bm = choose(device, k, e, fused=True, eights=False).bm
        kind = moe.kind_of(device, MXFP4, FP8_ACTIVATION, d, bm)
        found = sort(device, codes, scales, FP8_ACTIVATION, indices, e, bm, kind)
        return found.order, found.plan, found.x, found.scales

    def plain(x: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        order, ends = by_expert(indices, e)
        return x[order // k], ends

    for m in (*DECODE, *PREFILL):

        def make(at: Inputs, m: int = m) -> list[Any]:
            return [*at.codes((m, d), FP8_ACTIVATION), _choices(at, m, e, k)[0]]

        def plain_make(at: Inputs, m: int = m) -> list[Any]:
            return [at.normal(m, d), _choices(at, m, e, k)[0]]

        peer = Plain(plain, plain_make, "argsort and gather")
        yield Case(f"sort {m}x{d}", "sort", m, make, plain=peer, launch=host)


SUM = """v0 = aten.to.dtype(a1, float32)
v1 = aten.add.Tensor(a0, v0)
v2 = aten.to.dtype(v1, bfloat16)
return v2,"""


def pointwise(c: DeepseekV4Config) -> Iterator[Case]:
    """A generated kernel: routed experts plus the shared one."""
    d = c.hidden_size
    for m in (*DECODE, *PREFILL):
        plain = Plain(lambda a, b: (a + b.float()).bfloat16(),
                      lambda at, m=m: [at.normal(m, d, dtype=F32), at.normal(m, d)], "the same sum")  # fmt: skip
        yield Case(f"sum {m}x{d}", "pointwise", m,
                   lambda at, m=m: [[at.normal(m, d, dtype=F32), at.normal(m, d)], [], SUM], plain=plain)  # fmt: skip


def swiglus(c: DeepseekV4Config) -> Iterator[Case]:
    """Clamped SwiGLU of the shared expert, with what the next product reads."""
    i = c.moe_intermediate_size
    for m in (*DECODE, *PREFILL):

        def make(at: Inputs, m: int = m) -> list[Any]:
            both = at.normal(m, 2 * i)
            return [both[:, :i], both[:, i:], LIMIT, ACT]

        yield Case(f"SwiGLU and rounding {m}x{i}", "swiglu_quant", m, make)


def hyper_connections(c: DeepseekV4Config) -> Iterator[Case]:
    """mHC: post of one sublayer with pre, norm and rounding of the next; the collapse before the head."""
    d, rows = c.hidden_size, 2 * N + N * N
    for m in (*DECODE, *PREFILL):

        def make(at: Inputs, m: int = m, rows: int = rows) -> list[Any]:
            comb = torch.softmax(at.normal(m, N, N, dtype=F32), -1)
            last = [at.normal(m, N, d), at.normal(m, d), torch.rand(m, N, device=at.device), comb]
            return [*last, *_mixing(at, rows, d), at.normal(d, dtype=F32), EPS, EPS, c.hc_sinkhorn_iters, ACT]

        def head(at: Inputs, m: int = m) -> list[Any]:
            return [at.normal(m, N, d), *_mixing(at, N, d), at.normal(d, dtype=F32), EPS, EPS]

        yield Case(f"post, pre, norm, rounding {m}x{d}", "hc_post_pre_norm_quant", m, make, 2.0 * m * rows * N * d)
        if m in DECODE:
            yield Case(f"head {m}x{d}", "hc_head_norm", m, head, 2.0 * m * N * N * d)


def _mixing(at: Inputs, rows: int, d: int) -> list[Tensor]:
    scales = 3 if rows > N else 1
    return [at.normal(rows, N * d, dtype=F32, size=(N * d) ** -0.5), at.normal(rows, dtype=F32),
            at.normal(scales, dtype=F32)]  # fmt: skip


def norms(c: DeepseekV4Config) -> Iterator[Case]:
    """Norm of q and kv with rounding; rounding alone; the rotated index queries' Hadamard transform."""
    qr, dh, k = c.q_lora_rank, c.head_dim, c.o_groups * c.o_lora_rank
    for m in (*DECODE, *PREFILL):

        def pair(at: Inputs, m: int = m) -> list[Any]:
            both = at.normal(m, qr + dh)
            return [both[:, :qr], at.normal(qr, dtype=F32), both[:, qr:], at.normal(dh, dtype=F32), EPS, ACT]

        yield Case(f"q and kv norm, rounding {m}x{qr}+{dh}", "rms_norm_pair_quant", m, pair)
        yield Case(f"rounding {m}x{k}", "quantize", m, lambda at, m=m: [at.normal(m, k), ACT])
        yield Case(f"Hadamard {m}x64x128", "hadamard", m, lambda at, m=m: [at.normal(m, 64, 128)])


def router(c: DeepseekV4Config) -> Iterator[Case]:
    """Both routers, after the product with the router's matrix."""
    e, k, v = c.n_routed_experts, c.num_experts_per_tok, c.vocab_size
    for m in (*DECODE, *PREFILL):

        def top(at: Inputs, m: int = m) -> list[Any]:
            return [at.normal(m, e, dtype=F32), at.normal(e, dtype=F32), k, c.routed_scaling_factor, 1e-20]

        def table(at: Inputs, m: int = m) -> list[Any]:
            ids = torch.randint(0, v, (m,), dtype=I32, device=at.device)
            chosen = torch.randint(0, e, (v, k), dtype=I32, device=at.device)
            return [at.normal(m, e, dtype=F32), ids, chosen, c.routed_scaling_factor, 1e-20]

        yield Case(f"top {k} of {e}, M={m}", "route_topk", m, top)
        yield Case(f"hash of {e}, M={m}", "route_hash", m, table, bytes=4.0 * m * (e + 1 + k) + 12.0 * m * k)


def steps(most: int = 131072) -> Iterator[Step]:
    """Decode at both contexts; prompts from the start, and a short chunk at the end of a long one."""
    for context in CONTEXTS:
        if context <= most:
            yield from (Step(m, 1, context) for m in DECODE)
    yield from (Step(1, t, t) for t in PREFILL)
    if most == CONTEXTS[-1]:
        yield Step(1, PREFILL[0], most)


def attention(c: DeepseekV4Config) -> Iterator[Case]:
    """Sparse attention of the three kinds of layers, the inverse rotation and rounding for wo_a included."""
    for kind, ratio in (("SWA", 0), ("CSA", 4), ("HCA", 128)):
        for step in steps(CONTEXTS[-1] if ratio else CONTEXTS[0]):
            yield _attention(c, kind, ratio, step)


def _attention(c: DeepseekV4Config, kind: str, ratio: int, step: Step) -> Case:
    heads, dh, window, topk = c.num_attention_heads, c.head_dim, c.sliding_window, c.index_topk
    b, t, page = step.requests, step.tokens, 64

    def make(at: Inputs) -> list[Any]:
        columns = -(-(window + step.length - 1) // page) + 1
        near, far, selected = at.table(b, columns), None, None
        blocks = at.table(b, -(-step.context // 256)) if ratio else torch.zeros(b, 1, dtype=I32, device=at.device)
        if ratio:
            far = at.pages(blocks.numel() + 1, 256 // ratio, MAIN)
        if ratio == 4:
            seen = ((step.positions(at) + 1) // ratio)[:, None]
            chosen = (torch.rand(t, topk, device=at.device) * seen).int()
            selected = torch.where(at.arange(0, topk) < seen, chosen, -1).int()
        return [at.normal(t, heads, dh), at.pages(near.numel() + 1, page, MAIN), near, far, blocks, selected,
                at.normal(heads, dtype=F32), step.owners(at), step.positions(at), dh**-0.5, window, ratio,
                *at.angles(t), MAIN, c.o_groups, ACT]  # fmt: skip

    seen = step.visible(ratio) if ratio else [0]
    used = [min(n, topk) if ratio == 4 else n for n in seen]
    rows = b * (sum(min(p + 1, window) for p in range(step.context - step.length, step.context)) + sum(used))
    # Of a prompt each row is read once; of a decode step each request reads its own.
    touched = b * (min(step.context, window + step.length - 1) + (used[-1] if step.length == 1 else seen[-1]))
    moved = touched * 584.0 + t * heads * dh * (2 + 1 + 1 / 128) + (4.0 * t * topk if ratio == 4 else 0)
    return Case(f"{kind} {step.title}", "sparse_attention_inverse_rope_quant", t, make, 4.0 * rows * heads * dh, "bf16",
                moved, graph=False)  # fmt: skip


def indexer(c: DeepseekV4Config) -> Iterator[Case]:
    """The lightning indexer: rotation and rounding of the queries, scores, top-k."""
    heads, di, topk = c.index_n_heads, c.index_head_dim, c.index_topk
    for step in steps():
        t, b = step.tokens, step.requests

        def make(at: Inputs, step: Step = step) -> list[Any]:
            table = at.table(step.requests, -(-step.context // 256))
            return [at.normal(step.tokens, heads, di), *at.angles(step.tokens),
                    at.normal(step.tokens, heads, dtype=F32, size=di**-0.5), at.pages(table.numel() + 1, 64, INDEX),
                    table, step.owners(at), step.positions(at), step.starts(at), 4, topk, INDEX,
                    str(FP4_ACTIVATION)]  # fmt: skip

        seen = step.visible(4)
        scored = b * sum(n for n in seen if n > topk)  # who sees no more than the top-k takes all of them
        moved = b * seen[-1] * 68.0 + t * heads * (2 * di + 4) + 4.0 * t * topk
        yield Case(f"index {step.title}", "index_rope_topk", t, make, 2.0 * scored * heads * di, "bf16", moved,
                   graph=False)  # fmt: skip


def compressors(c: DeepseekV4Config) -> Iterator[Case]:
    """Pooling of completed windows with norm, rotation and the cache; the ring of open windows."""
    kinds = (("CSA", c.head_dim, 4, MAIN, False), ("index", c.index_head_dim, 4, INDEX, True),
             ("HCA", c.head_dim, 128, MAIN, False))  # fmt: skip
    for kind, d, ratio, rows, rotate in kinds:
        for step in steps(CONTEXTS[0]):
            yield from _compressor(kind, d, ratio, rows, rotate, step)


def _compressor(kind: str, d: int, ratio: int, rows: str, rotate: bool, step: Step) -> Iterator[Case]:
    overlap, t, b = ratio == 4, step.tokens, step.requests
    w, ring = (2 * d, 2 * ratio) if overlap else (d, ratio)
    count = b * sum((p + 1) % ratio == 0 for p in range(step.context - step.length, step.context))

    def where(at: Inputs) -> list[Tensor]:
        return [step.positions(at), step.owners(at), step.starts(at), at.arange(1, b + 1)]

    def parts(at: Inputs) -> tuple[Tensor, Tensor]:
        both = at.normal(t, 2 * w, dtype=F32)
        return both[:, :w], both[:, w:]

    def pool(at: Inputs) -> list[Any]:
        table = at.table(b, -(-step.context // 256))
        ends = step.ends(at, ratio)
        return [*parts(at), at.normal(ratio, w, dtype=F32), at.normal(b + 1, ring, 2, w, dtype=F32),
                at.normal(d, dtype=F32), EPS, *at.angles(len(ends)), at.pages(table.numel() + 1, 256 // ratio, rows),
                table, ends, *where(at), ratio, overlap, BF16, rotate, rows]  # fmt: skip

    def keep(at: Inputs) -> list[Any]:
        return [at.normal(b + 1, ring, 2, w, dtype=F32), *parts(at), *where(at)]

    read = 8.0 * (count * ring * w if step.length == 1 else t * w)
    yield Case(f"{kind} pool and insert, {step.title}", "compressor_pool_norm_rope_insert", t, pool, bytes=read)
    kept = b * min(step.length, ring)
    yield Case(f"{kind} ring, {step.title}", "compressor_update", t, keep, bytes=16.0 * kept * w,
               graph=False)  # fmt: skip


def caches(c: DeepseekV4Config) -> Iterator[Case]:
    """Norm and rotation of q, rotation of kv and its insertion as window rows."""
    heads, dh, qr = c.num_attention_heads, c.head_dim, c.q_lora_rank
    for step in steps(CONTEXTS[0]):
        t = step.tokens

        def make(at: Inputs, step: Step = step) -> list[Any]:
            table = at.table(step.requests, -(-(c.sliding_window + step.length) // 64) + 1)
            kv = at.normal(step.tokens, qr + dh)[:, qr:]
            return [at.normal(step.tokens, heads, dh), kv, *at.angles(step.tokens), EPS,
                    at.pages(table.numel() + 1, 64, MAIN), table, step.owners(at), step.positions(at),
                    MAIN]  # fmt: skip

        moved = t * (4.0 * heads * dh + 2 * dh + 584 + 256)
        yield Case(f"q and kv, {step.title}", "qk_norm_rope_insert", t, make, bytes=moved)


FAMILIES: dict[str, Callable[[DeepseekV4Config], Iterator[Case]]] = {
    "linear": linears, "gemm": gemms, "experts": experts, "attention": attention, "indexer": indexer,
    "compressor": compressors, "hyper_connection": hyper_connections, "norm": norms, "router": router,
    "cache": caches, "swiglu": swiglus, "sort": sorts, "pointwise": pointwise,
}  # fmt: skip
