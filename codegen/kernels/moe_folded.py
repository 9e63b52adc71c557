"""Routed experts of many tokens on sm_90: e4m3 activations times e2m1 weights, in FP8 instructions (spec 2.8, 6.1 K21).

Contract:
    Weights e2m1 1x32 with E8M0 scales, activations e4m3 1x128; K a multiple of 512, rows of a matrix of 256. Sums of
    128 columns are the matrix unit's, with fp32 sums of these: as accurate as FP8 products are.

Terms:
    folded    an e2m1 code with its group's scale inside, as e4m3: code x 2^t, exact for t = 0 .. 11, t relative to the
              row's largest scale; by a table of 8 bytes for a group, looked up by byte permutations. The largest scale
              multiplies the finished sum. Scale byte 0 counts as zero, 0xFF makes the row NaN.
    level     a row whose scales spread further is multiplied once for each 12 powers of two, from the lowest: groups
              outside of a level are zero in it, and sums are scaled between levels.
    piece     64 rows of a weight: a program's 256 are 4 pieces; of w13 gate and up of 64 inner columns, and gate and
              up of the 64 others of a group of 128.
    order     a lane's 32 codes are one group: columns of a block of 128 lie in the order "folded" (see `moe_sort`).

Pseudo-code:
    produce   warps of few registers copy what a step of 128 columns needs into a ring in shared memory
    consume   two warp groups, each with 2 pieces and its own pace: expand a piece while another one is multiplied
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
ONE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
# Bytes [rows, groups, 16] as lanes hold the left operand: 4 lanes a row, a group each.
CODES = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 0, 8], [8, 0, 0]],
        lane_bases=[[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        warp_bases=[[16, 0, 0], [32, 0, 0]],
        block_bases=[],
        shape=[64, 4, 16],
    )
)


@gluon.constexpr_function
def mma_of(n: Any) -> Any:
    """The layout of a product of 64 rows and n tokens."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, n, 32])


@gluon.constexpr_function
def offset_of(piece: Any, pair: Any, rows: Any) -> Any:
    """Rows from a piece's first to that of piece 0."""
    return (piece % 2) * (rows // 2) + (piece // 2) * 16 if pair else 64 * piece


@triton.jit
def piece_row(m, tile, PAIR: tl.constexpr):
    """The weight's row (of `experts_in`: the gate's) that row m of a piece 0 is.

    Of gate and up a warp group has the columns whose codes lie side by side in the order of what w2 multiplies.
    """
    if PAIR:
        return tile * 128 + (m // 4 % 4) * 32 + m // 16 * 4 + m % 4
    return tile * 256 + m


# -- the product -------------------------------------------------------------------------------------------------------


@gluon.jit
def expand(byte, t, mma: gl.constexpr):
    """Codes [64, 4, 16], two a byte, times 2^t, t [64, 4, 1] -> e4m3 [64, 128], a left operand; zeros for other t."""
    inside = (t >= 0) & (t < 12)
    # e4m3 bytes of 0, 0.5, 1, 1.5 and of 2, 3, 4, 6, times 2^(t - 5): an exponent is 8; 0 stays.
    low = gl.where(inside, t * 0x08080800 + 0x14100800, 0)
    high = gl.where(inside, t * 0x08080808 + 0x24201C18, 0)
    low, _ = gl.broadcast(low, byte)
    high, _ = gl.broadcast(high, byte)
    a, b = gl.inline_asm_elementwise(
        """
        {
        .reg .b32 sel, sgn, mag;
        and.b32 sel, $2, 0x77777777;
        prmt.b32 mag, $3, $7, sel;
        shl.b32 sgn, $2, 4;
        prmt.b32 sgn, sgn, $2, 0x5140;
        lop3.b32 $0, mag, sgn, 0x80808080, 0xF8;
        shr.u32 sel, sel, 16;
        prmt.b32 mag, $3, $7, sel;
        shl.b32 sgn, $2, 4;
        prmt.b32 sgn, sgn, $2, 0x7362;
        lop3.b32 $1, mag, sgn, 0x80808080, 0xF8;
        }
        """,
        "=r,=r,r,r,r,r,r,r,r,r,r", [byte, low, high], dtype=(gl.float8e4nv, gl.float8e4nv), is_pure=True, pack=4,
    )  # fmt: skip
    both = gl.join(a, b).reshape(64, 4, 4, 4, 2).permute(0, 2, 4, 1, 3).reshape(64, 128)
    return gl.convert_layout(both, gl.DotOperandLayout(0, mma, 4), assert_trivial=True)


@gluon.jit
def left(codes, scales, base, stage, at, piece, mma: gl.constexpr):
    """A piece of a step as a left operand; `at`: of its scales in their ring."""
    byte = codes.index(stage * 4 + piece).reshape([64, 4, 16]).load(CODES)
    word = scales.index(at + piece * 4).load(gl.SliceLayout(1, gl.SliceLayout(2, CODES)))
    lane = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(2, CODES)))
    e = (gl.expand_dims(word, 1) >> (8 * gl.expand_dims(lane, 0))) & 0xFF
    return expand(byte, gl.expand_dims(e - gl.expand_dims(base, 1), 2), mma)


@gluon.jit
def added(acc, a, ring, stage, FIRST: gl.constexpr, N: gl.constexpr):
    """acc + a times tokens FIRST .. FIRST + N of a stage."""
    mma: gl.constexpr = mma_of(N)
    _codes, x, _scales, s, _full, _empty = ring
    zero = gl.zeros([64, N], gl.float32, layout=mma)
    a = gl.convert_layout(a, gl.DotOperandLayout(0, mma, 4), assert_trivial=True)
    right = x.index(stage).slice(FIRST, N).permute((1, 0))
    p = warpgroup_mma(a, right, zero, use_acc=False, is_async=True)
    p = warpgroup_mma_wait(0, [p])
    return acc + p * gl.expand_dims(s.index(stage).slice(FIRST, N).load(gl.SliceLayout(0, mma)), 0)


@gluon.jit
def multiply(
    ring, step, stage, phase, top0, top1, levels, PART: gl.constexpr, MORE: gl.constexpr, STEPS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Sums of two pieces, for 64 tokens and MORE (0: none) after them; and where the ring stands."""
    codes, x, scales, s, full, empty = ring
    scales = scales._reinterpret(gl.int32, [32, 64], FLAT)
    N: gl.constexpr = MORE if MORE > 0 else 32
    first: gl.constexpr = mma_of(64)
    zero = gl.zeros([64, 64], gl.float32, layout=first)
    acc0, acc1 = zero, zero
    more0 = gl.zeros([64, N], gl.float32, layout=mma_of(N))
    more1 = more0
    for level in range(levels):
        down = 11 + 12 * (levels - 1 - level)
        for _ in range(STEPS):
            at = (step & 4) * 4 + (step & 3)
            mbarrier.wait(full.index(stage), phase)
            # The copies are ordered before what reads them as operands.
            fence_async_shared()
            a = left(codes, scales, top0 - down, stage, at, 2 * PART, first)
            right = x.index(stage).slice(0, 64).permute((1, 0))
            p = warpgroup_mma(a, right, zero, use_acc=False, is_async=True)
            b = left(codes, scales, top1 - down, stage, at, 2 * PART + 1, first)
            p = warpgroup_mma_wait(0, [p])
            acc0 += p * gl.expand_dims(s.index(stage).slice(0, 64).load(gl.SliceLayout(0, first)), 0)
            if MORE > 0:
                more0 = added(more0, a, ring, stage, 64, N)
            acc1 = added(acc1, b, ring, stage, 0, 64)
            if MORE > 0:
                more1 = added(more1, b, ring, stage, 64, N)
            mbarrier.arrive(empty.index(stage), count=1)
            step += 1
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        factor = gl.where(level + 1 == levels, 1.0, 0.000244140625)  # 2^-12
        acc0 *= factor
        acc1 *= factor
        more0 *= factor
        more1 *= factor
    return acc0, acc1, more0, more1, step, stage, phase


# -- what becomes of the sums ------------------------------------------------------------------------------------------


@gluon.jit
def scaled(acc, top, N: gl.constexpr):
    """Sums of a piece times the rows' largest scales, NaN where a row has NaN; `expand` leaves 2^(5 - 11)."""
    top = gl.convert_layout(top, gl.SliceLayout(1, mma_of(N)))
    scale = (top << 23).to(gl.float32, bitcast=True) * 0.015625
    return acc * gl.expand_dims(gl.where(top == 255, float("nan"), scale), 1)


@gluon.jit
def rounded(x, DTYPE: gl.constexpr):
    """x rounded to DTYPE, as float32; two at once."""
    if gl.bfloat16 == DTYPE:
        x = gl.inline_asm_elementwise(
            "{.reg .b32 t; cvt.rn.bf16x2.f32 t, $3, $2; shl.b32 $0, t, 16; and.b32 $1, t, 0xFFFF0000;}",
            "=r,=r,r,r", [x], dtype=gl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    return x


@gluon.jit
def store_in(
    gate, up, top0, top1, weights, out, scales, first, count, tile, PAIRS, exchange, turn, FIRST: gl.constexpr,
    N: gl.constexpr, PART: gl.constexpr, INNER: gl.constexpr, LIMIT: gl.constexpr, DTYPE: gl.constexpr,
    FLOOR: gl.constexpr,
):  # fmt: skip
    """The weighted SwiGLU of N tokens, quantised -> codes, scales; the largest of a group is of both warp groups."""
    mma: gl.constexpr = mma_of(N)
    largest, swap = exchange
    token = FIRST + gl.arange(0, N, layout=gl.SliceLayout(0, mma))
    weight = weights.slice(FIRST, N).load(gl.SliceLayout(0, mma)).to(gl.float32, bitcast=True)
    gate = gl.minimum(rounded(scaled(gate, top0, N), DTYPE), LIMIT, propagate_nan=tl.PropagateNan.ALL)
    up = gl.minimum(rounded(scaled(up, top1, N), DTYPE), LIMIT, propagate_nan=tl.PropagateNan.ALL)
    up = gl.maximum(up, -LIMIT, propagate_nan=tl.PropagateNan.ALL)
    share = gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + gl.exp(-gate)], dtype=gl.float32, is_pure=True, pack=1
    )
    a = rounded(gate * share * up * gl.expand_dims(weight, 0), DTYPE)
    amax = gl.max(a.to(gl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    slot = (turn & 1) * 2
    largest.index(slot + PART).slice(0, N).store(amax)
    mbarrier.arrive(swap, count=1)
    mbarrier.wait(swap, turn & 1)
    amax = gl.maximum(amax, largest.index(slot + 1 - PART).slice(0, N).load(gl.SliceLayout(0, mma)))
    amax = amax.to(gl.float32, bitcast=True)
    # As `block_scale`, without its division: the power of two not below amax / 448, and 448 is 1.75 x 2^8.
    wide = gl.where(amax < FLOOR, FLOOR, amax)
    bits = ((wide.to(gl.int32, bitcast=True) + 0x001FFFFF) & 0x7F800000) - 0x04000000
    scale = gl.where(wide == 0, 1.0, gl.maximum(bits, 0x00800000).to(gl.float32, bitcast=True))
    inverse = (0x7F000000 - scale.to(gl.int32, bitcast=True)).to(gl.float32, bitcast=True)
    code = gl.minimum(gl.maximum(a * gl.expand_dims(inverse, 0), -448.0), 448.0).to(gl.float8e4nv)
    L: gl.constexpr = gl.BlockedLayout([1, 16], [8, 4], [4, 1], [1, 0])
    code = gl.convert_layout(code.permute((1, 0)), L)
    row = FIRST + gl.arange(0, N, layout=gl.SliceLayout(1, L))
    column = tile * 128 + 64 * PART + gl.arange(0, 64, layout=gl.SliceLayout(0, L))
    at = out + gl.expand_dims((first + row).to(gl.int64) * INNER, 1) + gl.expand_dims(column, 0)
    gl.store(at, code, mask=gl.expand_dims(row < count, 1))
    if PART == 0:
        scale = gl.where(amax < float("inf"), scale, float("nan"))
        gl.store(scales + tile * PAIRS + first + token, scale, mask=token < count)


@gluon.jit
def store_out(y, top, pairs, out, count, column, FIRST: gl.constexpr, N: gl.constexpr, WIDTH: gl.constexpr):
    """Sums of a piece and N tokens -> columns column .. column + 64 of the tokens' pairs in out [.., WIDTH]."""
    L: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    y = scaled(y, top, N)
    if out.dtype.element_ty == gl.bfloat16:
        y = gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [y], dtype=gl.bfloat16, is_pure=True, pack=2
        )
    y = gl.convert_layout(y.permute((1, 0)), L)
    row = FIRST + gl.arange(0, N, layout=gl.SliceLayout(1, L))
    pair = pairs.slice(FIRST, N).load(gl.SliceLayout(1, L))
    column += gl.arange(0, 64, layout=gl.SliceLayout(0, L))
    at = out + gl.expand_dims(pair.to(gl.int64) * WIDTH, 1) + gl.expand_dims(column, 0)
    gl.store(at, y, mask=gl.expand_dims(row < count, 1))


# -- the warp groups ---------------------------------------------------------------------------------------------------


@gluon.jit
def value(told):
    """A number that the producer left in shared memory [1]."""
    return gl.max(told.load(ONE), 0)


@gluon.jit
def tile_of(
    given, ring, step, stage, phase, turn, slot, tile, PART: gl.constexpr, MORE: gl.constexpr, PAIR: gl.constexpr,
    K: gl.constexpr, N: gl.constexpr, LIMIT: gl.constexpr, DTYPE: gl.constexpr, FLOOR: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """A tile of an expert's tokens, at most 64 + MORE, times two pieces; where the ring stands then."""
    out, scales, PAIRS, tops, carried, told, exchange = given
    L: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, CODES))
    top0, top1 = tops.index(slot * 4 + 2 * PART), tops.index(slot * 4 + 2 * PART + 1)
    a, b, more_a, more_b, step, stage, phase = multiply(
        ring, step, stage, phase, top0.load(L), top1.load(L), value(told.index(slot * 4)), PART, MORE, K // 128, STAGES
    )
    # Loaded again: over the loop they would take registers.
    top0, top1 = top0.load(L), top1.load(L)
    first, count = value(told.index(slot * 4 + 1)), value(told.index(slot * 4 + 2))
    carried = carried.index(slot)
    if PAIR:
        store_in(a, b, top0, top1, carried, out, scales, first, count, tile, PAIRS, exchange, turn, 0, 64, PART, N // 2,
                 LIMIT, DTYPE, FLOOR)  # fmt: skip
        if MORE > 0:
            store_in(more_a, more_b, top0, top1, carried, out, scales, first, count, tile, PAIRS, exchange, turn + 1,
                     64, MORE, PART, N // 2, LIMIT, DTYPE, FLOOR)  # fmt: skip
    else:
        column = tile * 256 + 128 * PART
        store_out(a, top0, carried, out, count, column, 0, 64, N)
        store_out(b, top1, carried, out, count, column + 64, 0, 64, N)
        if MORE > 0:
            store_out(more_a, top0, carried, out, count, column, 64, MORE, N)
            store_out(more_b, top1, carried, out, count, column + 64, 64, MORE, N)
    return step, stage, phase


@gluon.jit
def consume(
    given, PART: gl.constexpr, PAIR: gl.constexpr, K: gl.constexpr, N: gl.constexpr, LIMIT: gl.constexpr,
    DTYPE: gl.constexpr, FLOOR: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A warp group that multiplies: pieces 2 PART and 2 PART + 1 of every tile of the program."""
    plan, out, scales, PAIRS, ring, tops, carried, told, exchange, ready, read = given
    TILES: gl.constexpr = N // 256
    step, stage, phase = gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0)
    turn, item = gl.to_tensor(0), gl.to_tensor(0)
    known = (out, scales, PAIRS, tops, carried, told, exchange)
    for work in range(gl.program_id(0), gl.load(plan) * TILES, gl.num_programs(0)):
        slot = item & 1
        tile = work % TILES
        mbarrier.wait(ready.index(slot), (item >> 1) & 1)
        count = value(told.index(slot * 4 + 2))
        # Products of what no token is are left out, by 32.
        if count > 96:
            step, stage, phase = tile_of(known, ring, step, stage, phase, turn, slot, tile, PART, 64, PAIR, K, N, LIMIT,
                                         DTYPE, FLOOR, STAGES)  # fmt: skip
            turn += 2
        elif count > 64:
            step, stage, phase = tile_of(known, ring, step, stage, phase, turn, slot, tile, PART, 32, PAIR, K, N, LIMIT,
                                         DTYPE, FLOOR, STAGES)  # fmt: skip
            turn += 2
        else:
            step, stage, phase = tile_of(known, ring, step, stage, phase, turn, slot, tile, PART, 0, PAIR, K, N, LIMIT,
                                         DTYPE, FLOOR, STAGES)  # fmt: skip
            turn += 1
        mbarrier.arrive(read.index(slot), count=1)
        item += 1


@gluon.jit
def copy_step(
    ring, stage, step, k, more, x, x_scale, w, w_scale, PAIRS, offsets, PAIR: gl.constexpr, K: gl.constexpr,
    N: gl.constexpr,
):  # fmt: skip
    """What step k needs into the ring; the scales of the weights for 4 steps at once."""
    codes, xs, scales, s, full, _empty = ring
    to_w, to_scale, to_x0, to_x1, to_s = offsets
    for piece in gl.static_range(4):
        row = offset_of(piece, PAIR, N)
        async_copy.async_copy_global_to_shared(codes.index(stage * 4 + piece), (w + k * 64 + row * (K // 2)) + to_w)
    async_copy.async_copy_global_to_shared(xs.index(stage).slice(0, 64), (x + k * 128) + to_x0)
    if more:
        async_copy.async_copy_global_to_shared(xs.index(stage).slice(64, 64), (x + k * 128) + to_x1)
    async_copy.async_copy_global_to_shared(s.index(stage), (x_scale + k * PAIRS) + to_s)
    if step & 3 == 0:
        for piece in gl.static_range(4):
            row = offset_of(piece, PAIR, N)
            to = scales.index((step & 4) + piece)._reinterpret(gl.int32, [4, 64], PLAIN)
            async_copy.async_copy_global_to_shared(to, (w_scale + k + row * (K // 128)) + to_scale)
    async_copy.mbarrier_arrive(full.index(stage), increment_count=False)


@gluon.jit
def offsets_of(order, first, count, tile, CHOICES: gl.constexpr, PAIR: gl.constexpr, K: gl.constexpr):
    """Where a thread's copies begin, relative to the expert's matrix, x, and its scales; past `count` the last row."""
    LW: gl.constexpr = gl.BlockedLayout([1, 16], [8, 4], [4, 1], [1, 0])
    LX: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    LE: gl.constexpr = gl.BlockedLayout([1, 1], [4, 8], [1, 4], [0, 1])
    row = piece_row(gl.arange(0, 64, layout=gl.SliceLayout(1, LW)), tile, PAIR)
    to_w = gl.expand_dims(row * (K // 2), 1) + gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(0, LW)), 0)
    row = piece_row(gl.arange(0, 64, layout=gl.SliceLayout(0, LE)), tile, PAIR)
    to_scale = gl.expand_dims(row * (K // 128), 0) + gl.expand_dims(gl.arange(0, 4, layout=gl.SliceLayout(1, LE)), 1)
    token = gl.arange(0, 64, layout=gl.SliceLayout(1, LX))
    x0, x1 = first + gl.minimum(token, count - 1), first + gl.minimum(token + 64, count - 1)
    to_s = first + gl.minimum(gl.arange(0, 128, layout=ONE), count - 1)
    if PAIR:
        x0, x1 = gl.load(order + x0) // CHOICES, gl.load(order + x1) // CHOICES
    column = gl.expand_dims(gl.arange(0, 128, layout=gl.SliceLayout(0, LX)), 0)
    return to_w, to_scale, gl.expand_dims(x0 * K, 1) + column, gl.expand_dims(x1 * K, 1) + column, to_s


@gluon.jit
def produce(
    x, x_scale, w, w_scale, tops, levels, order, plan, weights, PAIRS, ring, its_tops, carried, told, ready, read,
    CHOICES: gl.constexpr, PAIR: gl.constexpr, K: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The warp group that copies, and that tells of each tile what its sums need."""
    TILES: gl.constexpr = N // 256
    _codes, _xs, _scales, _s, _full, empty = ring
    step, stage, phase, item = gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(1), gl.to_tensor(0)
    piece_row_ = gl.arange(0, 64, layout=ONE)
    token = gl.arange(0, 128, layout=ONE)
    for work in range(gl.program_id(0), gl.load(plan) * TILES, gl.num_programs(0)):
        at = plan + 1 + 3 * (work // TILES)
        expert, first, count = gl.load(at), gl.load(at + 1), gl.load(at + 2)
        tile = work % TILES
        its = expert * TILES + tile
        many = gl.load(levels + its)
        slot = item & 1
        mbarrier.wait(read.index(slot), ((item >> 1) & 1) ^ 1)
        for piece in gl.static_range(4):
            its_tops.index(slot * 4 + piece).store(gl.load(tops + its * 256 + piece * 64 + piece_row_))
        pair = gl.load(order + first + gl.minimum(token, count - 1))
        if PAIR:
            carried.index(slot).store(gl.load(weights + pair).to(gl.int32, bitcast=True))
        else:
            carried.index(slot).store(pair)
        told.index(slot * 4).store(gl.full([1], many, gl.int32, layout=ONE))
        told.index(slot * 4 + 1).store(gl.full([1], first, gl.int32, layout=ONE))
        told.index(slot * 4 + 2).store(gl.full([1], count, gl.int32, layout=ONE))
        mbarrier.arrive(ready.index(slot), count=1)
        item += 1
        offsets = offsets_of(order, first, count, tile, CHOICES, PAIR, K)
        wide = expert.to(gl.int64) * N
        its_w, its_scale = w + wide * (K // 2), w_scale + wide * (K // 128)
        for _ in range(many):
            for k in range(K // 128):
                mbarrier.wait(empty.index(stage), phase)
                copy_step(ring, stage, step, k, count > 64, x, x_scale, its_w, its_scale, PAIRS, offsets, PAIR, K, N)
                step += 1
                stage += 1
                if stage == STAGES:
                    stage = 0
                    phase ^= 1


@gluon.jit
def experts_folded(
    x, x_scale, w, w_scale, tops, levels, order, plan, weights, out, scales, PAIRS,
    CHOICES: gl.constexpr, PAIR: gl.constexpr, K: gl.constexpr, N: gl.constexpr, LIMIT: gl.constexpr,
    DTYPE: gl.constexpr, FLOOR: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr, FEW: gl.constexpr,
):  # fmt: skip
    """Rows of an expert's matrix [E, N, K] times its tokens; programs take tiles of the plan in turn.

    x_scale [K / 128, PAIRS] is in sorted order. PAIR: w13 times rows order / CHOICES of x [T, K], weighted SwiGLU,
    quantised -> out [PAIRS, N / 2], scales [N / 256, PAIRS] in sorted order. Else w2 times x [PAIRS, K] in sorted order
    -> out [PAIRS, N] in order of pairs.
    """
    codes = gl.allocate_shared_memory(gl.uint8, [STAGES * 4, 64, 64], PLAIN)
    xs = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, 128, 128], gl.NVMMASharedLayout(128, 8, 2))
    word = gl.allocate_shared_memory(gl.int32, [8, 256], FLAT)
    s = gl.allocate_shared_memory(gl.float32, [STAGES, 128], FLAT)
    its_tops = gl.allocate_shared_memory(gl.int32, [8, 64], FLAT)
    carried = gl.allocate_shared_memory(gl.int32, [2, 128], FLAT)
    told = gl.allocate_shared_memory(gl.int32, [8, 1], FLAT)
    largest = gl.allocate_shared_memory(gl.int32, [4, 64], FLAT)
    L: gl.constexpr = mbarrier.MBarrierLayout()
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], L)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], L)
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], L)
    read = gl.allocate_shared_memory(gl.int64, [2, 1], L)
    swap = gl.allocate_shared_memory(gl.int64, [1], L)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=128)  # each thread of the producer, when its copies are there
        mbarrier.init(empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(read.index(i), count=2)
    mbarrier.init(swap, count=2)
    ring = (codes, xs, word, s, full, empty)
    one = (plan, out, scales, PAIRS, ring, its_tops, carried, told, (largest, swap), ready, read)
    gl.warp_specialize(
        [
            (consume, (one, 0, PAIR, K, N, LIMIT, DTYPE, FLOOR, STAGES)),
            (consume, (one, 1, PAIR, K, N, LIMIT, DTYPE, FLOOR, STAGES)),
            (produce, (x, x_scale, w, w_scale, tops, levels, order, plan, weights, PAIRS, ring, its_tops, carried, told,
                       ready, read, CHOICES, PAIR, K, N, STAGES)),
        ],
        [4, 4],
        [REGISTERS, FEW],
    )  # fmt: skip
