"""Attention over packed rows that are read ahead of their products (spec 2.4, 4.2): what Hopper runs.

A program has a block of heads of one token and a share of its rows, or of several tokens one after the other and all
rows. While the products of BN rows run, the next BN are on their way into registers as they are stored; they are
widened to the query's type when they are due. What leads to a row (its number, then its page) is read one block further
ahead each, so that no load is waited for. A thread has few rows and many channels of each: addresses are the larger
part of a gather's instructions.
Illegal: rows whose channels are not a power of two of whole groups, or whose scales are not 8 E8M0 bytes (`group_of`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from atomc.codegen.kernels.attention_parts import finish, leave, reach
from atomc.codegen.kernels.cache import stored_scale
from atomc.codegen.kernels.common import e8m0_value, inverse_power
from atomc.codegen.kernels.quantize import block_scale, largest_magnitude
from atomc.formats import RowLayout

# -- in a kernel -------------------------------------------------------------------------------------------------------


@triton.jit
def _beside(parts, LOG: tl.constexpr):
    """2^LOG tensors [R, N] -> one [R, 2^LOG N]; where a thread has all of them, a matter of names."""
    for step in tl.static_range(LOG):
        pairs = ()
        for i in tl.static_range(2 ** (LOG - 1 - step)):
            a, b = parts[2 * i], parts[2 * i + 1]
            both = tl.permute(tl.join(a, b), (0, 2, 1))
            pairs = pairs + (tl.reshape(both, [a.shape[0], 2 * a.shape[1]]),)  # noqa: RUF005
        parts = pairs
    return parts[0]


@triton.jit
def _numbers(
    block, end, topk, first, position, near_blocks, far, visible, BN: tl.constexpr, LANES: tl.constexpr,
    TOPK: tl.constexpr,
):  # fmt: skip
    """Numbers of a block's rows [BN, LANES]: of the window's, or of compressed rows; -1 where there is none.

    Each thread that reads a part of a row has its own copy, so that none has to be passed on.
    """
    is_near = block < near_blocks
    row = tl.where(is_near, first + block * BN, (block - near_blocks) * BN) + tl.arange(0, BN)
    row = row[:, None] + tl.zeros((1, LANES), tl.int32)
    ok = (block < end) & (row < tl.where(is_near, position + 1, far))
    if TOPK > 0:
        # With the choice, neighbours do not look as such: else rows, not lanes, would be spread over a warp's threads.
        chosen = tl.load(topk + tl.where(ok, row, 0), mask=ok & (is_near == 0), other=-1)
        ok = ok & (is_near | (chosen < visible))
        row = tl.where(is_near, row, chosen)
    return tl.where(ok, row, -1)


@triton.constexpr_function
def _code(window_page, page):
    """How many numbers a page has in the numbers of rows."""
    return triton.next_power_of_2(max(window_page, page))


@triton.jit
def _places(
    block, row, near_table, far_table, turn, columns, near_blocks, CACHED: tl.constexpr,
    WINDOW_PAGE: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Numbers page x CODE + row in it of a block's rows, -1 where there is none."""
    is_near = block < near_blocks
    column = row // WINDOW_PAGE
    entry, within = near_table + tl.where(column >= turn, column - columns, column), row % WINDOW_PAGE
    if CACHED:
        entry = tl.where(is_near, entry, far_table + row // PAGE)
        within = tl.where(is_near, within, row % PAGE)
    page = tl.load(entry, mask=row >= 0, other=0)
    return tl.where(row >= 0, page * _code(WINDOW_PAGE, PAGE) + within, -1)


@triton.jit
def _fetch(
    block, flat, window, cache, near_blocks, CACHED: tl.constexpr, WINDOW_PAGE: tl.constexpr,
    WINDOW_SIZE: tl.constexpr, PAGE: tl.constexpr, PAGE_SIZE: tl.constexpr, NARROW: tl.constexpr,
    GROUP: tl.constexpr, BODY: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Rows [BN, LANES] as they are stored, in words [BN, LANES, 4]: 16 codes a lane of each group; 16 bf16 channels a
    lane of each group, in two halves; then the scales of a row, 8 bytes a lane [BN, LANES].
    """
    near = block < near_blocks
    pages = tl.multiple_of(tl.where(near, window, cache), 16) if CACHED else window
    size = tl.where(near, WINDOW_SIZE, PAGE_SIZE) if CACHED else WINDOW_SIZE
    rows = tl.where(near, WINDOW_PAGE, PAGE) if CACHED else WINDOW_PAGE
    ok = flat >= 0
    code: tl.constexpr = _code(WINDOW_PAGE, PAGE)
    page, row = (flat // code).to(tl.int64), flat % code
    begin = (page * (size // 16) + row * (BODY // 16)) * 4
    lane, i = tl.arange(0, flat.shape[1])[None, :, None], tl.arange(0, 4)[None, None, :]
    words = pages.to(tl.pointer_type(tl.int32)) + begin[:, :, None]
    has = ok[:, :, None]
    out = ()
    for g in tl.static_range(NARROW // GROUP):
        out = out + (tl.load(words + (lane * 4 + i) + g * (GROUP // 4), mask=has, other=0),)  # noqa: RUF005
    for g in tl.static_range((D - NARROW) // GROUP):
        for half in tl.static_range(2):
            at = (BODY - 2 * (D - NARROW - g * GROUP)) // 4 + half * 4
            out = out + (tl.load(words + (lane * 8 + i) + at, mask=has, other=0),)  # noqa: RUF005
    scale_at = (page * size + rows * BODY) // 8 + row
    scales = tl.load(pages.to(tl.pointer_type(tl.int64)) + scale_at, mask=ok, other=0x7F7F7F7F7F7F7F7F)
    return out + (scales,)  # noqa: RUF005


@triton.jit
def _halves(words):
    """The 16-bit halves [R, L, 2 N] of words [R, L, N]; in this form the compiler sees that nothing moves."""
    pair = tl.join(words.to(tl.uint16), (words >> 16).to(tl.uint16))
    return tl.reshape(pair, [words.shape[0], words.shape[1], 2 * words.shape[2]])


@triton.jit
def _bytes(words):
    """The bytes [R, L, 4 N] of words [R, L, N]."""
    half = _halves(words)
    pair = tl.join(half.to(tl.uint8), (half >> 8).to(tl.uint8))
    return tl.reshape(pair, [half.shape[0], half.shape[1], 2 * half.shape[2]])


@triton.jit
def _values(
    stored, KIND: tl.constexpr, NARROW: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, ELEMENT: tl.constexpr,
    LOG: tl.constexpr,
):  # fmt: skip
    """The values [BN, D], of type KIND, of what `_fetch` read; exact."""
    fp8: tl.constexpr = tl.float8e4b8 if ELEMENT == "e4m3fnuz" else tl.float8e4nv
    narrow: tl.constexpr = NARROW // GROUP
    scales = stored[narrow + 2 * ((D - NARROW) // GROUP)]
    parts = ()
    for g in tl.static_range(narrow):
        scale = e8m0_value(((scales if g < 4 else scales >> 32).to(tl.int32) >> (8 * (g % 4))) & 0xFF).to(KIND)
        # Through float32: there are instructions for two numbers at a time that way.
        x = _bytes(stored[g]).to(fp8, bitcast=True).to(tl.float32).to(KIND) * scale[:, :, None]
        parts = parts + (tl.reshape(x, [x.shape[0], GROUP]),)  # noqa: RUF005
    for g in tl.static_range((D - NARROW) // GROUP):
        low, high = stored[narrow + 2 * g], stored[narrow + 2 * g + 1]
        both = tl.permute(tl.join(low, high), (0, 1, 3, 2))
        words = tl.reshape(both, [low.shape[0], low.shape[1], 2 * low.shape[2]])
        x = _halves(words).to(tl.bfloat16, bitcast=True).to(KIND)
        parts = parts + (tl.reshape(x, [x.shape[0], GROUP]),)  # noqa: RUF005
    return _beside(parts, LOG)


@triton.jit
def _turned(x, t, cos, sin, RD: tl.constexpr, KIND: tl.constexpr):
    """Channels hi x 4 RD + 3 RD + lo of heads, x [BH, 2, RD]: those of the upper half are turned back and rounded."""
    even, odd = tl.split(tl.reshape(x.to(tl.float32), [x.shape[0], 2, RD // 2, 2]))
    high, pair = tl.arange(0, 2)[:, None], tl.arange(0, RD // 2)[None, :]
    at, turning = t.to(tl.int64) * (RD // 2) + pair + high * 0, (high == 1) & (pair >= 0)
    c = tl.load(cos + at, mask=turning, other=1.0)[None, :, :]
    s = tl.load(sin + at, mask=turning, other=0.0)[None, :, :]
    return tl.reshape(tl.join(even * c + odd * s, odd * c - even * s), [x.shape[0], 2, RD]).to(KIND)


@triton.jit
def _finish_pieces(
    acc, factor, t, h, cos, sin, out, scales, H: tl.constexpr, D: tl.constexpr, RD: tl.constexpr, KIND: tl.constexpr,
    FLOOR: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """`finish` of D = 8 RD channels in groups of 2 RD with E8M0 scales, where a thread has channels a quarter apart.

    Then only a quarter of the channels goes through the rotation, and nothing moves between threads but codes.
    """
    o = (acc * factor[:, None]).to(KIND)
    o = tl.reshape(tl.permute(tl.reshape(o, [o.shape[0], 2, 4, RD]), (0, 1, 3, 2)), [o.shape[0], 2, RD, 2, 2])
    even, odd = tl.split(o)
    p0, p2 = tl.split(even)
    p1, p3 = tl.split(odd)
    p3 = _turned(p3, t, cos, sin, RD, KIND)
    head = t.to(tl.int64) * H + h
    has = (h < H)[:, None]
    high = tl.arange(0, 2)[None, :]
    for g in tl.static_range(2):
        a, b = (p0, p1) if g == 0 else (p2, p3)
        most = tl.maximum(largest_magnitude(a.to(tl.float32), 2), largest_magnitude(b.to(tl.float32), 2))
        scale = block_scale(most, FLOOR, TOP, "e8m0")
        inverse = inverse_power(scale).to(KIND)[:, :, None]
        for j in tl.static_range(2):
            x = (a if j == 0 else b) * inverse
            c = high[:, :, None] * (4 * RD) + (2 * g + j) * RD + tl.arange(0, RD)[None, None, :]
            tl.store(out + head[:, None, None] * D + c, x.to(tl.float32).to(out.dtype.element_ty), mask=has[:, :, None])
        tl.store(scales + head[:, None] * 4 + high * 2 + g, stored_scale(scale, "e8m0"), mask=has)


@triton.jit
def _begin(
    t, split, window_table, block_table, topk, requests, positions, window_columns, block_columns,
    WINDOW: tl.constexpr, RATIO: tl.constexpr, CACHED: tl.constexpr, TOPK: tl.constexpr, BN: tl.constexpr,
    SPLITS: tl.constexpr, WINDOW_PAGE: tl.constexpr, PAGE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """What leads to the rows of a share of token t: its first and last block; what `_numbers` and `_places` must know;
    the places of its first block and the numbers of the second.
    """
    request, position = tl.load(requests + t), tl.load(positions + t)
    chosen = topk + t.to(tl.int64) * TOPK if TOPK > 0 else topk
    first, far, visible = reach(position, chosen, WINDOW, RATIO, CACHED, TOPK)
    near = tl.cdiv(position + 1 - first, BN)  # blocks of the window
    total = near + tl.cdiv(far, BN)
    share = tl.cdiv(total, SPLITS)
    begin, end = split * share, tl.minimum(split * share + share, total)
    lap = (first // WINDOW_PAGE) // window_columns * window_columns  # a window laps its ring at most once
    near_table, turn = window_table + (request * window_columns - lap), lap + window_columns
    far_table = block_table + request * block_columns
    LANES: tl.constexpr = GROUP // 16
    row = _numbers(begin, end, chosen, first, position, near, far, visible, BN, LANES, TOPK)
    flat = _places(begin, row, near_table, far_table, turn, window_columns, near, CACHED, WINDOW_PAGE, PAGE)
    row = _numbers(begin + 1, end, chosen, first, position, near, far, visible, BN, LANES, TOPK)
    return begin, end, position, first, far, visible, near, near_table, far_table, turn, flat, row


@triton.jit
def _further(
    t, row, begin, end, position, first, far, visible, near, near_table, far_table, turn, topk, window_columns,
    CACHED: tl.constexpr, TOPK: tl.constexpr, BN: tl.constexpr, WINDOW_PAGE: tl.constexpr, PAGE: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """The places of a share's second block, of numbers `row`, and the numbers of the third."""
    chosen = topk + t.to(tl.int64) * TOPK if TOPK > 0 else topk
    flat = _places(begin + 1, row, near_table, far_table, turn, window_columns, near, CACHED, WINDOW_PAGE, PAGE)
    return flat, _numbers(begin + 2, end, chosen, first, position, near, far, visible, BN, GROUP // 16, TOPK)


@triton.jit
def _sum(
    query, m, stored, used, begin, end, position, first, far, visible, near, near_table, far_table, turn, flat, row,
    chosen, window, cache, window_columns, KIND: tl.constexpr, SCALE2: tl.constexpr, CACHED: tl.constexpr,
    TOPK: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr, WINDOW_PAGE: tl.constexpr, WINDOW_SIZE: tl.constexpr,
    PAGE: tl.constexpr, PAGE_SIZE: tl.constexpr, D: tl.constexpr, NARROW: tl.constexpr, GROUP: tl.constexpr,
    BODY: tl.constexpr, ELEMENT: tl.constexpr, LOG: tl.constexpr,
):  # fmt: skip
    """(weighted rows [BH, D], maximum [BH], sum [BH]) of blocks begin .. end, the first of which is `stored`."""
    acc, z = tl.zeros((BH, D), tl.float32), tl.zeros((BH, BN), tl.float32)  # z: the sum, not yet over the columns
    for block in tl.range(begin, end, disable_licm=True):
        x, valid = _values(stored, KIND, NARROW, GROUP, D, ELEMENT, LOG), used
        stored = _fetch(block + 1, flat, window, cache, near, CACHED, WINDOW_PAGE, WINDOW_SIZE, PAGE, PAGE_SIZE,
                        NARROW, GROUP, BODY, D)  # fmt: skip
        used = tl.max(flat, 1) >= 0  # a maximum, lest every thread follow the rows of all its scores itself
        flat = _places(block + 2, row, near_table, far_table, turn, window_columns, near, CACHED, WINDOW_PAGE, PAGE)
        row = _numbers(block + 3, end, chosen, first, position, near, far, visible, BN, GROUP // 16, TOPK)
        s = tl.where(valid[None, :], tl.dot(query, tl.trans(x)), float("-inf"))
        p, shrink = tl.zeros(s.shape, KIND), tl.zeros_like(m)
        if position >= 0:  # always; but two products in a row would have each warp group compute all scores
            top = tl.maximum(m, tl.max(s, 1) * SCALE2)
            weights, shrink, m = tl.exp2(s * SCALE2 - top[:, None]), tl.exp2(m - top), top
            p, z = weights.to(KIND), z * shrink[:, None] + weights
        acc = tl.dot(p, x, acc * shrink[:, None])
    return acc, m, tl.sum(z, 1)


# -- kernels -----------------------------------------------------------------------------------------------------------


@triton.jit
def attend_shares(
    q, window, window_table, cache, block_table, topk, sink, requests, positions, part, stats, window_columns,
    block_columns,
    H: tl.constexpr, SCALE2: tl.constexpr, WINDOW: tl.constexpr, RATIO: tl.constexpr, CACHED: tl.constexpr,
    TOPK: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr, WINDOW_PAGE: tl.constexpr,
    WINDOW_SIZE: tl.constexpr, PAGE: tl.constexpr, PAGE_SIZE: tl.constexpr, D: tl.constexpr, NARROW: tl.constexpr,
    GROUP: tl.constexpr, BODY: tl.constexpr, ELEMENT: tl.constexpr, LOG: tl.constexpr,
):  # fmt: skip
    """One of SPLITS shares of the rows for a block of heads of one token, q [T, H, D], left for `attention.join`."""
    blocks: tl.constexpr = (H + BH - 1) // BH
    split, h = tl.program_id(0) % SPLITS, (tl.program_id(0) // SPLITS) % blocks * BH + tl.arange(0, BH)
    t = tl.program_id(0) // (SPLITS * blocks)
    heads = q + t.to(tl.int64) * (H * D) + h[:, None] * D + tl.arange(0, D)[None, :]
    if BH >= 64:  # the longest load, first; fewer heads stay in registers, and there they are in the way
        query = tl.load(heads, mask=(h < H)[:, None], other=0.0)
    begin, end, position, first, far, visible, near, near_table, far_table, turn, flat, row = _begin(
        t, split, window_table, block_table, topk, requests, positions, window_columns, block_columns, WINDOW, RATIO,
        CACHED, TOPK, BN, SPLITS, WINDOW_PAGE, PAGE, GROUP)  # fmt: skip
    stored = _fetch(begin, flat, window, cache, near, CACHED, WINDOW_PAGE, WINDOW_SIZE, PAGE, PAGE_SIZE, NARROW, GROUP,
                    BODY, D)  # fmt: skip
    after, row = _further(t, row, begin, end, position, first, far, visible, near, near_table, far_table, turn, topk,
                          window_columns, CACHED, TOPK, BN, WINDOW_PAGE, PAGE, GROUP)  # fmt: skip
    if BH < 64:
        query = tl.load(heads, mask=(h < H)[:, None], other=0.0)
    # The sink is the first maximum, which keeps every share's finite; the first share adds it in the end.
    logit = tl.load(sink + h, mask=h < H, other=0.0) * 1.4426950408889634
    chosen = topk + t.to(tl.int64) * TOPK if TOPK > 0 else topk
    acc, m, z = _sum(
        query, tl.maximum(logit, -1e30), stored, tl.max(flat, 1) >= 0, begin, end, position, first, far, visible, near,
        near_table, far_table, turn, after, row, chosen, window, cache, window_columns, q.dtype.element_ty, SCALE2,
        CACHED, TOPK, BH, BN, WINDOW_PAGE, WINDOW_SIZE, PAGE, PAGE_SIZE, D, NARROW, GROUP, BODY, ELEMENT, LOG,
    )  # fmt: skip
    z += tl.where(split == 0, tl.exp2(logit - m), 0.0)
    leave((acc,), m, z, part, stats, (t.to(tl.int64) * SPLITS + split) * H + h, h < H, begin < end, D, D, 1)


@triton.jit
def attend_tokens(
    q, window, window_table, cache, block_table, topk, sink, requests, positions, cos, sin, out, scales,
    window_columns, block_columns, items,
    H: tl.constexpr, RD: tl.constexpr, SCALE2: tl.constexpr, WINDOW: tl.constexpr, RATIO: tl.constexpr,
    CACHED: tl.constexpr, TOPK: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr, PROGRAMS: tl.constexpr,
    WINDOW_PAGE: tl.constexpr, WINDOW_SIZE: tl.constexpr, PAGE: tl.constexpr, PAGE_SIZE: tl.constexpr,
    QUANT: tl.constexpr, FLOOR: tl.constexpr, TOP: tl.constexpr, QSCALE: tl.constexpr, D: tl.constexpr,
    NARROW: tl.constexpr, GROUP: tl.constexpr, BODY: tl.constexpr, ELEMENT: tl.constexpr, LOG: tl.constexpr,
    PIECES: tl.constexpr,
):  # fmt: skip
    """All rows for every PROGRAMS-th of `items` blocks of heads of a token, q [T, H, D].

    The way to the next item's rows is looked up before this one's products, and its first rows are on their way while
    this one is finished: a multiprocessor has registers for one program only, and nobody else would fill these times.
    """
    blocks: tl.constexpr = (H + BH - 1) // BH
    kind: tl.constexpr = q.dtype.element_ty
    pid = tl.program_id(0)
    if pid >= items:
        return
    _, end, position, first, far, visible, near, near_table, far_table, turn, flat, row = _begin(
        pid // blocks, 0, window_table, block_table, topk, requests, positions, window_columns,
        block_columns, WINDOW, RATIO, CACHED, TOPK, BN, 1, WINDOW_PAGE, PAGE, GROUP)  # fmt: skip
    stored = _fetch(0, flat, window, cache, near, CACHED, WINDOW_PAGE, WINDOW_SIZE, PAGE, PAGE_SIZE, NARROW, GROUP,
                    BODY, D)  # fmt: skip
    used = tl.max(flat, 1) >= 0
    after, row = _further(pid // blocks, row, 0, end, position, first, far, visible, near, near_table, far_table, turn,
                          topk, window_columns, CACHED, TOPK, BN, WINDOW_PAGE, PAGE, GROUP)  # fmt: skip
    for i in tl.range(0, tl.cdiv(items - pid, PROGRAMS), disable_licm=True):
        item = pid + i * PROGRAMS
        t, h = item // blocks, item % blocks * BH + tl.arange(0, BH)
        heads = q + t.to(tl.int64) * (H * D) + h[:, None] * D + tl.arange(0, D)[None, :]
        query = tl.load(heads, mask=(h < H)[:, None], other=0.0)
        logit = tl.load(sink + h, mask=h < H, other=0.0) * 1.4426950408889634
        t2 = tl.minimum(item + PROGRAMS, items - 1) // blocks
        _, end2, position2, first2, far2, visible2, near2, near_table2, far_table2, turn2, flat2, row2 = _begin(
            t2, 0, window_table, block_table, topk, requests, positions,
            window_columns, block_columns, WINDOW, RATIO, CACHED, TOPK, BN, 1, WINDOW_PAGE, PAGE, GROUP)  # fmt: skip
        after2, row2 = _further(t2, row2, 0, end2, position2, first2, far2, visible2, near2, near_table2, far_table2,
                                turn2, topk, window_columns, CACHED, TOPK, BN, WINDOW_PAGE, PAGE, GROUP)  # fmt: skip
        chosen = topk + t.to(tl.int64) * TOPK if TOPK > 0 else topk
        acc, m, z = _sum(
            query, tl.maximum(logit, -1e30), stored, used, 0, end, position, first, far, visible, near, near_table,
            far_table, turn, after, row, chosen, window, cache, window_columns, kind, SCALE2, CACHED, TOPK, BH, BN,
            WINDOW_PAGE, WINDOW_SIZE, PAGE, PAGE_SIZE, D, NARROW, GROUP, BODY, ELEMENT, LOG,
        )  # fmt: skip
        stored = _fetch(0, flat2, window, cache, near2, CACHED, WINDOW_PAGE, WINDOW_SIZE, PAGE, PAGE_SIZE, NARROW,
                        GROUP, BODY, D)  # fmt: skip
        used = tl.max(flat2, 1) >= 0
        end, position, first, far, visible, near = end2, position2, first2, far2, visible2, near2
        near_table, far_table, turn, after, row = near_table2, far_table2, turn2, after2, row2
        factor = 1.0 / (z + tl.exp2(logit - m))
        if PIECES:
            _finish_pieces(acc, factor, t, h, cos, sin, out, scales, H, D, RD, kind, FLOOR, TOP)
        else:
            finish((acc,), factor, t, h, cos, sin, out, scales, H, D, D, 1, RD, kind, QUANT, FLOOR, TOP, QSCALE)


def group_of(rows: str, dtype: torch.dtype, page_sizes: tuple[int, int]) -> int:
    """The channels of a group of rows that the kernels here can read, in pages of these bytes; 0: it cannot."""
    if not rows or dtype == torch.float32:
        return 0
    known = RowLayout.parse(rows)
    layout, d = known.layout, known.narrow + known.wide
    if layout is None or layout.scale != "e8m0" or layout.element.name not in ("e4m3", "e4m3fnuz"):
        return 0
    group = layout.columns
    if group < 16 or group & (group - 1) or d & (d - 1) or d <= group or known.narrow % group:
        return 0
    return group if known.scale_bytes == 8 and not any(n % 16 for n in (known.body_bytes, *page_sizes)) else 0
