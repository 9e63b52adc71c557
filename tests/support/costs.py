"""A plan by hand whose costs are known: one region, used twice, of a linear layer that few tokens split in halves."""

from __future__ import annotations

import msgspec

from atomc.artifact.kernels import KernelFacts
from atomc.artifact.manifest import Serving
from atomc.artifact.plan import Bucket, CallPlan, Launch, ProgramPlan, RegionPlan, Slot, SlotInfo, Step
from atomc.costs.predict import Costs
from atomc.targets import get_target

SERVING = Serving(
    model_name="m", vocab_size=8, bos_id=0, eos_ids=[], window=128, window_page=32, block_tokens=256, csa_ratio=4,
    hca_ratio=128, max_context=8192, max_batch_tokens=512, max_requests=32, max_logit_rows=32, window_table_width=1,
    block_table_width=1,
)  # fmt: skip
FACTS = KernelFacts(
    name="k", target="h100", signature=[], warps=4, wavefront=32, stages=3, shared=0, registers=32, spills=0,
    scalar_spills=0, matrix={"wgmma.mma_async.m64n64k16.f32.bf16.bf16": 4}, loads=0, wide_loads=0, constants={},
)  # fmt: skip
SUM = msgspec.structs.replace(FACTS, matrix={})
N, K = 4096, 8192


def slot(name: str, dtype: str, *shape: int | str) -> SlotInfo:
    return SlotInfo(name, "temporary", list(shape), dtype, None, 0, 0, None)


def costs(target: str = "h100") -> Costs:
    """One region, used twice: a linear layer, for few tokens in two halves that a second kernel adds."""
    slots = [
        slot("x", "bfloat16", "T", K), slot("w", "bfloat16", N, K), slot("y", "bfloat16", "T", N),
        slot("part", "float32", 2, "T", N),
    ]  # fmt: skip
    split = [Launch("gemm", [1], [Slot(0), Slot(1), Slot(3)]), Launch("sum", [1], [Slot(3), Slot(2)])]
    buckets = [Bucket(16, split, [3]), Bucket(512, [Launch("gemm", [1], [Slot(0), Slot(1), Slot(2)])], [])]
    step = Step("aten.linear.default", [Slot(0), Slot(1)], {}, [2], [], "m.py:1", buckets)
    region = RegionPlan("layer", [], {}, slots, [], [step], 0)
    program = ProgramPlan([CallPlan("layer", "a.", {}), CallPlan("layer", "b.", {})], {"T": 512}, {}, 0, 0)
    return Costs(program, {"layer": region}, {"gemm": FACTS, "sum": SUM}, get_target(target), SERVING)
