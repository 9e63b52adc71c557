"""Attention of many tokens over packed rows on sm_90: warps look rows up, widen or multiply them (spec 2.4, 4.2).

Contract:
    Rows of 448 e4m3 channels in groups of 64 with E8M0 scales, and 64 bf16 channels; pools below 32 GB (addresses are
    int32). A program has 64 heads of a token and all of its rows, one item after another. Blocks are added in their
    order, whoever comes first: results do not depend on it.

Terms:
    item      a token, 64 of its heads and its rows in blocks of 64: the window's, then compressed ones.
    tile      a block's rows as bf16 in shared memory; there are two. Blocks take them in turn, across items.
    part      what a multiplying warp group has: the scores of every second block (of one of the tiles) and half of the
              channels of the sums.

Pseudo-code:
    look      numbers of rows -> pages -> addresses, several blocks ahead; copies the heads of an item
    widen     rows from memory into registers, ahead of time; from there, as bf16, into a free tile
    consume   scores of an own block, its weights, which the other part gets too; both blocks' weights times its half of
              the tiles, in the order of blocks: a maximum goes from block to block
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from atomc.codegen.kernels.attention_gather import AHEAD, look, value, widen

FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
ROWS = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
SCORES = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16]))
SUMS = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16]))
# 64 heads and 64 channels as they are stored: 4 lanes a head, 16 bytes each; heads where the sums have them.
STORED = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [0, 8], [8, 0]],
        lane_bases=[[0, 16], [0, 32], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 64],
    )
)


# -- who multiplies ----------------------------------------------------------------------------------------------------


@gluon.jit
def rows_of_sums(x):
    """A number of each head where the sums need it."""
    return gl.expand_dims(gl.convert_layout(x, gl.SliceLayout(1, SUMS), assert_trivial=True), 1)


@gluon.jit
def add_block(acc, p, tile):
    """acc + weights p times half of a tile."""
    acc = warpgroup_mma(p, tile, acc, is_async=True)
    return warpgroup_mma_wait(0, [acc])


@gluon.jit
def other_block(acc, m, z, turn, zero, tiles, exchange, PART: gl.constexpr):
    """A block of the other part's added; with the maximum that it is relative to."""
    rows, _biases, _counts, _full, empty = tiles
    weights, tops, given, taken = exchange
    other: gl.constexpr = 1 - PART
    mbarrier.wait(given.index(other), turn)
    top = tops.index(other).load(gl.SliceLayout(1, SCORES))
    shrink = gl.exp2(m - top)
    acc *= rows_of_sums(shrink)
    fence_async_shared()
    acc = add_block(acc, weights.index(other + zero), rows.index(other * 2 + PART + zero))
    mbarrier.arrive(taken.index(other), count=1)
    mbarrier.arrive(empty.index(other), count=1)
    return acc, top, z * shrink


@gluon.jit
def score(turn, zero, last, heads, query_empty, tiles, PART: gl.constexpr):
    """Scores of this part's next block; `last`: the heads are not needed any more."""
    rows, _biases, _counts, full, _empty = tiles
    mbarrier.wait(full.index(PART), turn)
    fence_async_shared()
    s = gl.zeros([64, 64], gl.float32, layout=SCORES)
    s = warpgroup_mma(heads.index(zero), rows.index(PART * 2 + zero).permute((1, 0)), s, use_acc=False, is_async=True)
    s = warpgroup_mma(heads.index(1 + zero), rows.index(PART * 2 + 1 + zero).permute((1, 0)), s, is_async=True)
    s = warpgroup_mma_wait(0, [s])
    mbarrier.arrive(query_empty, count=1, pred=last)
    return s


@gluon.jit
def own_block(
    s, acc, m, z, turn, zero, tiles, exchange, PART: gl.constexpr, SCALE2: gl.constexpr
):  # fmt: skip
    """A block of this part's, of scores s, added."""
    rows, biases, _counts, _full, empty = tiles
    weights, tops, given, taken = exchange
    s = s * SCALE2 + gl.expand_dims(biases.index(PART).load(gl.SliceLayout(0, SCORES)), 0)
    top = gl.maximum(m, gl.max(s, 1))
    p = gl.exp2(s - gl.expand_dims(top, 1))
    shrink = gl.exp2(m - top)
    z = z * shrink + gl.sum(p, 1)
    p = p.to(gl.bfloat16)
    mbarrier.wait(taken.index(PART), turn ^ 1)
    weights.index(PART).store(p)
    tops.index(PART).store(top)
    fence_async_shared()
    mbarrier.arrive(given.index(PART), count=1)
    acc *= rows_of_sums(shrink)
    p = gl.convert_layout(p, gl.DotOperandLayout(0, SUMS, 2), assert_trivial=True)
    acc = add_block(acc, p, rows.index(PART * 2 + PART + zero))
    mbarrier.arrive(empty.index(PART), count=1)
    return acc, top, z


@gluon.jit
def consume(
    known, PART: gl.constexpr, H: gl.constexpr, SCALE2: gl.constexpr, FLOOR: gl.constexpr,
):  # fmt: skip
    """A warp group that multiplies."""
    sink, cos, sin, out, scales, items, heads, query_full, query_empty, tiles, exchange, sums = known
    _rows, _biases, counts, full, _empty = tiles
    zs, summed = sums
    L: gl.constexpr = gl.SliceLayout(1, SCORES)
    blocks: gl.constexpr = (H + 63) // 64
    step, turn, mine, theirs = gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0)
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        h = (item % blocks) * 64 + gl.arange(0, 64, layout=L)
        logit = gl.load(sink + h, mask=h < H, other=0.0) * 1.4426950408889634
        mbarrier.wait(query_full, turn)
        mbarrier.wait(full.index(step & 1), (step >> 1) & 1)
        many = value(counts.index(step & 1))
        # The sink is the first maximum, which keeps every share's finite; it is added in the end.
        m = gl.maximum(logit, -1e30)
        z = gl.zeros([64], gl.float32, layout=L)
        acc = gl.zeros([64, 256], gl.float32, layout=SUMS)
        block = (step & 1) ^ PART
        mbarrier.arrive(query_empty, count=1, pred=block >= many)
        # Warps that are branched to have no uniform registers: an opaque zero keeps descriptors out of the others.
        zero = block >> 30 if PART == 1 else 0
        while block < many:
            if PART == 1:
                zero = block >> 30
            if block > 0:
                acc, m, z = other_block(acc, m, z, theirs, zero, tiles, exchange, PART)
                theirs ^= 1
            s = score(mine, zero, block + 2 >= many, heads, query_empty, tiles, PART)
            acc, m, z = own_block(s, acc, m, z, mine, zero, tiles, exchange, PART, SCALE2)
            mine ^= 1
            block += 2
        if block == many:
            acc, m, z = other_block(acc, m, z, theirs, zero, tiles, exchange, PART)
            theirs ^= 1
        step += many
        slot = (turn & 1) * 2
        zs.index(slot + PART).store(z)
        mbarrier.arrive(summed, count=1)
        mbarrier.wait(summed, turn)
        z = z + zs.index(slot + 1 - PART).load(L)
        factor = 1.0 / (z + gl.exp2(logit - m))
        finish(acc, factor, item // blocks, item % blocks * 64, cos, sin, out, scales, PART, H, FLOOR)
        turn ^= 1


@gluon.jit
def halves(x, N: gl.constexpr):
    """The left and the right N columns of x [64, 2 N]."""
    return gl.split(x.reshape(64, 2, N).permute(0, 2, 1))


@gluon.jit
def turned(x, t, cos, sin):
    """The 64 rotated channels of heads [64, 64], turned back and rounded (spec 2.2)."""
    even, odd = gl.split(x.to(gl.float32).reshape(64, 32, 2))
    L: gl.constexpr = gl.SliceLayout(0, even.type.layout)
    at = t.to(gl.int64) * 32 + gl.arange(0, 32, layout=L)
    c, s = gl.expand_dims(gl.load(cos + at), 0), gl.expand_dims(gl.load(sin + at), 0)
    return gl.join(even * c + odd * s, odd * c - even * s).reshape(64, 64).to(gl.bfloat16)


@gluon.jit
def largest(x):
    """max |x| of each head, as bits."""
    bits = gl.max(x.to(gl.float32).to(gl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    return gl.convert_layout(bits, gl.SliceLayout(1, SUMS), assert_trivial=True)


@gluon.jit
def codes_of(x, inverse):
    """x [64, 64] times a number of each head, as codes where they are stored from."""
    L: gl.constexpr = gl.SliceLayout(1, x.type.layout)
    x = x * gl.expand_dims(gl.convert_layout(inverse, L, assert_trivial=True), 1)
    return gl.convert_layout(x.to(gl.float32).to(gl.float8e4nv), STORED)


@gluon.jit
def finish(
    acc, factor, t, first, cos, sin, out, scales, PART: gl.constexpr, H: gl.constexpr, FLOOR: gl.constexpr
):  # fmt: skip
    """Store half of the channels of heads first .. first + 64: rounded, turned back, quantised in groups of 128."""
    L: gl.constexpr = gl.SliceLayout(1, SUMS)
    o = (acc * rows_of_sums(factor)).to(gl.bfloat16)
    left, right = halves(o, 128)
    p0, p1 = halves(left, 64)
    p2, p3 = halves(right, 64)
    if PART == 1:
        p3 = gl.convert_layout(turned(p3, t, cos, sin), p2.type.layout, assert_trivial=True)
    h = first + gl.arange(0, 64, layout=L)
    head = t.to(gl.int64) * H
    to = first + gl.arange(0, 64, layout=gl.SliceLayout(1, STORED))
    c = gl.arange(0, 64, layout=gl.SliceLayout(0, STORED))
    at = out + head * 512 + (gl.expand_dims(to * 512, 1) + gl.expand_dims(c, 0) + PART * 256)
    has = gl.expand_dims(to < H, 1)
    for g in gl.static_range(2):
        a, b = (p0, p1) if g == 0 else (p2, p3)
        amax = gl.maximum(largest(a), largest(b)).to(gl.float32, bitcast=True)
        # As `block_scale`, without its division: the power of two not below amax / 448, and 448 is 1.75 x 2^8.
        wide = gl.where(amax < FLOOR, FLOOR, amax)
        bits = ((wide.to(gl.int32, bitcast=True) + 0x001FFFFF) & 0x7F800000) - 0x04000000
        scale = gl.where(wide == 0, 1.0, gl.maximum(bits, 0x00800000).to(gl.float32, bitcast=True))
        scale = gl.where(amax < float("inf"), scale, float("inf")).to(gl.int32, bitcast=True)
        inverse = (0x7F000000 - scale).to(gl.float32, bitcast=True).to(gl.bfloat16)
        gl.store(scales + (head * 4 + h * 4 + (PART * 2 + g)), (scale >> 23).to(gl.uint8), mask=h < H)
        for j in gl.static_range(2):
            x = a if j == 0 else b
            gl.store(at + (g * 128 + j * 64), codes_of(x, inverse), mask=has)


# -- the kernel --------------------------------------------------------------------------------------------------------


@gluon.jit
def attend_apart(
    q, window, window_table, cache, block_table, topk, sink, requests, positions, cos, sin, out, scales,
    window_columns, block_columns, items,
    H: gl.constexpr, SCALE2: gl.constexpr, WINDOW: gl.constexpr, RATIO: gl.constexpr, CACHED: gl.constexpr,
    TOPK: gl.constexpr, WINDOW_PAGE: gl.constexpr, WINDOW_SIZE: gl.constexpr,
    PAGE: gl.constexpr, PAGE_SIZE: gl.constexpr, FLOOR: gl.constexpr, NARROW: gl.constexpr, BODY: gl.constexpr,
    MOST: gl.constexpr, SOME: gl.constexpr, FEW: gl.constexpr,
):  # fmt: skip
    """Every num_programs-th of `items` blocks of 64 heads of a token, q [T, H, 512], finished: out and scales as
    `attention_parts.finish` has them, in groups of 128.
    """
    heads = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 256], ROWS)
    tiles = gl.allocate_shared_memory(gl.bfloat16, [4, 64, 256], ROWS)
    weights = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], ROWS)
    biases = gl.allocate_shared_memory(gl.float32, [2, 64], FLAT)
    counts = gl.allocate_shared_memory(gl.int32, [2, 1], FLAT)
    tops = gl.allocate_shared_memory(gl.float32, [2, 64], FLAT)
    zs = gl.allocate_shared_memory(gl.float32, [4, 64], FLAT)
    at = gl.allocate_shared_memory(gl.int32, [AHEAD, 64], FLAT)
    scale_at = gl.allocate_shared_memory(gl.int32, [AHEAD, 64], FLAT)
    told = gl.allocate_shared_memory(gl.int32, [AHEAD, 1], FLAT)
    B: gl.constexpr = mbarrier.MBarrierLayout()
    looked_full = gl.allocate_shared_memory(gl.int64, [AHEAD, 1], B)
    looked_empty = gl.allocate_shared_memory(gl.int64, [AHEAD, 1], B)
    tile_full = gl.allocate_shared_memory(gl.int64, [2, 1], B)
    tile_empty = gl.allocate_shared_memory(gl.int64, [2, 1], B)
    given = gl.allocate_shared_memory(gl.int64, [2, 1], B)
    taken = gl.allocate_shared_memory(gl.int64, [2, 1], B)
    query_full = gl.allocate_shared_memory(gl.int64, [1], B)
    query_empty = gl.allocate_shared_memory(gl.int64, [1], B)
    summed = gl.allocate_shared_memory(gl.int64, [1], B)
    for i in gl.static_range(AHEAD):
        mbarrier.init(looked_full.index(i), count=1)
        mbarrier.init(looked_empty.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(tile_full.index(i), count=1)
        mbarrier.init(tile_empty.index(i), count=2)
        mbarrier.init(given.index(i), count=1)
        mbarrier.init(taken.index(i), count=1)
    mbarrier.init(query_full, count=128)  # each thread that copies, when its copies are there
    mbarrier.init(query_empty, count=2)
    mbarrier.init(summed, count=2)
    looked = (at, scale_at, told, looked_full, looked_empty)
    exchange = (weights, tops, given, taken)
    whole = (tiles, biases, counts, tile_full, tile_empty)
    known = (sink, cos, sin, out, scales, items, heads, query_full, query_empty, whole, exchange,
             (zs, summed))  # fmt: skip
    gl.warp_specialize(
        [
            (consume, (known, 0, H, SCALE2, FLOOR)),
            (consume, (known, 1, H, SCALE2, FLOOR)),
            (widen, (window, cache, looked, whole, CACHED, NARROW, BODY)),
            (look, (q, window_table, block_table, topk, requests, positions, window_columns, block_columns, items,
                    heads, query_full, query_empty, looked, H, WINDOW, RATIO, CACHED, TOPK, WINDOW_PAGE,
                    WINDOW_SIZE, PAGE, PAGE_SIZE, BODY)),
        ],
        [4, 4, 4],
        [MOST, SOME, FEW],
    )  # fmt: skip
