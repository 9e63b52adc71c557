"""Packed rows of a cache as bf16 tiles in shared memory, on sm_90: who finds rows, who widens them (spec 2.4, 4.2).

Warps of `attention_apart`, which says what an item, a block and a tile are. `look` goes from numbers of rows to pages
to addresses, several blocks ahead, and copies the heads of an item; `widen` reads rows into registers, half a block
ahead, and writes them as bf16 into a free tile.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

WORDS = gl.constexpr(gl.NVMMASharedLayout(128, 32, 2))
ONE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
MANY = gl.constexpr(gl.BlockedLayout([4], [32], [4], [0]))
# 32 rows of a group of 64 channels, 4 lanes a row with 16 channels each: words of 4 codes, words of 2 bf16 channels.
CODES = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2]],
        lane_bases=[[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[8, 0], [16, 0]],
        block_bases=[],
        shape=[32, 16],
    )
)
PAIRS = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4]],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[8, 0], [16, 0]],
        block_bases=[],
        shape=[32, 32],
    )
)
HEADS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
AHEAD = gl.constexpr(4)  # blocks that may be looked up ahead


# -- who looks up ------------------------------------------------------------------------------------------------------


@gluon.jit
def reach(position, chosen, WINDOW: gl.constexpr, RATIO: gl.constexpr, CACHED: gl.constexpr, TOPK: gl.constexpr):
    """See `attention_parts.reach`."""
    visible = (position + 1) // RATIO
    far = visible if CACHED else 0
    if TOPK > 0:
        k = gl.arange(0, 1 << (TOPK - 1).bit_length(), layout=MANY)
        row = gl.load(chosen + k, mask=k < TOPK, other=-1)
        far = gl.max(gl.where((row >= 0) & (row < visible), k + 1, 0), 0)
    return gl.maximum(position - (WINDOW - 1), 0), far, visible


@gluon.jit
def numbers(block, total, chosen, first, position, near, far, visible, TOPK: gl.constexpr):
    """Numbers of a block's rows [64], of the window's or of compressed rows; -1 where there is none."""
    is_near = block < near
    row = gl.where(is_near, first + block * 64, (block - near) * 64) + gl.arange(0, 64, layout=ONE)
    ok = (block < total) & (row < gl.where(is_near, position + 1, far))
    if TOPK > 0:
        selected = gl.load(chosen + row, mask=ok & (is_near == 0), other=-1)
        ok = ok & (is_near | (selected < visible))
        row = gl.where(is_near, row, selected)
    return gl.where(ok, row, -1)


@gluon.jit
def places(
    row, is_near, near_table, far_table, turn, columns, CACHED: gl.constexpr, WINDOW_PAGE: gl.constexpr,
    WINDOW_SIZE: gl.constexpr, PAGE: gl.constexpr, PAGE_SIZE: gl.constexpr, BODY: gl.constexpr,
):  # fmt: skip
    """Where rows [64] begin in their pool, in 16 bytes (-1: nowhere), and where their scales do, in 8 bytes."""
    column = row // WINDOW_PAGE
    entry, within = near_table + gl.where(column >= turn, column - columns, column), row % WINDOW_PAGE
    size, rows = WINDOW_SIZE, WINDOW_PAGE
    if CACHED:
        entry = gl.where(is_near, entry, far_table + row // PAGE)
        within = gl.where(is_near, within, row % PAGE)
        size, rows = gl.where(is_near, WINDOW_SIZE, PAGE_SIZE), gl.where(is_near, WINDOW_PAGE, PAGE)
    page = gl.load(entry, mask=row >= 0, other=0)
    at = page * (size // 16) + within * (BODY // 16)
    scale_at = page * (size // 8) + rows * (BODY // 8) + within
    return gl.where(row >= 0, at, -1), scale_at


@gluon.jit
def fetch_heads(q, item, heads, full, H: gl.constexpr):
    """The heads of an item on their way to shared memory."""
    blocks: gl.constexpr = (H + 63) // 64
    h = (item % blocks) * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, HEADS))
    c = gl.arange(0, 64, layout=gl.SliceLayout(0, HEADS))
    at = q + (item // blocks).to(gl.int64) * (H * 512)
    at = at + (gl.expand_dims(gl.minimum(h, H - 1) * 512, 1) + gl.expand_dims(c, 0))
    for i in gl.static_range(8):
        to = heads.index(i // 4).slice((i % 4) * 64, 64, dim=1)
        async_copy.async_copy_global_to_shared(to, at + i * 64)
    async_copy.mbarrier_arrive(full, increment_count=False)


@gluon.jit
def prefetch_heads(q, item, H: gl.constexpr):
    """The heads of an item into the cache."""
    blocks: gl.constexpr = (H + 63) // 64
    at = q + (item // blocks).to(gl.int64) * (H * 512) + (item % blocks) * (64 * 512)
    line = gl.arange(0, 512, layout=ONE)
    line = gl.where((item % blocks) * 64 + line // 8 < H, line, 0)
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [(at + line * 64).to(gl.int64)], dtype=gl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def look(
    q, window_table, block_table, topk, requests, positions, window_columns, block_columns, items, heads, query_full,
    query_empty, looked, H: gl.constexpr, WINDOW: gl.constexpr, RATIO: gl.constexpr, CACHED: gl.constexpr,
    TOPK: gl.constexpr, WINDOW_PAGE: gl.constexpr, WINDOW_SIZE: gl.constexpr,
    PAGE: gl.constexpr, PAGE_SIZE: gl.constexpr, BODY: gl.constexpr,
):  # fmt: skip
    """The warps that look up."""
    at, scale_at, told, full, empty = looked
    each: gl.constexpr = (H + 63) // 64
    step, turn_of_heads = gl.to_tensor(0), gl.to_tensor(1)
    pid = gl.program_id(0)
    request, position = gl.load(requests + pid // each), gl.load(positions + pid // each)
    prefetch_heads(q, pid, H)
    for item in range(pid, items, gl.num_programs(0)):
        after = gl.minimum(item + gl.num_programs(0), items - 1)
        request2, position2 = gl.load(requests + after // each), gl.load(positions + after // each)
        chosen = topk
        if TOPK > 0:
            chosen = topk + (item // each).to(gl.int64) * TOPK
        first, far, visible = reach(position, chosen, WINDOW, RATIO, CACHED, TOPK)
        near = (position + 1 - first + 63) // 64
        total = near + (far + 63) // 64
        many = gl.maximum(total, 1)  # one that has no rows, where there is none
        lap = (first // WINDOW_PAGE) // window_columns * window_columns  # a window laps its ring at most once
        near_table, turn = window_table + (request * window_columns - lap), lap + window_columns
        far_table = block_table + request * block_columns
        row = numbers(0, total, chosen, first, position, near, far, visible, TOPK)
        for block in range(many):
            row2 = numbers(block + 1, total, chosen, first, position, near, far, visible, TOPK)
            is_near = block < near
            a, s = places(row, is_near, near_table, far_table, turn, window_columns, CACHED, WINDOW_PAGE, WINDOW_SIZE,
                          PAGE, PAGE_SIZE, BODY)  # fmt: skip
            row = row2
            slot = step % AHEAD
            mbarrier.wait(empty.index(slot), ((step // AHEAD) & 1) ^ 1)
            at.index(slot).store(a)
            scale_at.index(slot).store(s)
            told.index(slot).store(gl.full([1], many * 2 + is_near.to(gl.int32), gl.int32, layout=ONE))
            mbarrier.arrive(full.index(slot), count=1)
            step += 1
            if block == gl.minimum(many - 1, 1):  # two blocks ahead: there are two tiles
                mbarrier.wait(query_empty, turn_of_heads)
                turn_of_heads ^= 1
                fetch_heads(q, item, heads, query_full, H)
                prefetch_heads(q, after, H)
        request, position = request2, position2
    slot = step % AHEAD
    mbarrier.wait(empty.index(slot), ((step // AHEAD) & 1) ^ 1)
    at.index(slot).store(gl.full([64], -1, gl.int32, layout=ONE))
    scale_at.index(slot).store(gl.full([64], 0, gl.int32, layout=ONE))
    told.index(slot).store(gl.full([1], -1, gl.int32, layout=ONE))
    mbarrier.arrive(full.index(slot), count=1)


# -- who widens --------------------------------------------------------------------------------------------------------


@gluon.jit
def value(told):
    """A number in shared memory [1]."""
    return gl.max(told.load(ONE), 0)


@gluon.jit
def load_group(base, at, G: gl.constexpr, NARROW: gl.constexpr, BODY: gl.constexpr):
    """Group G of rows [32] at `at`, as it is stored, in words: codes [32, 16], or bf16 channels [32, 32]."""
    words = base.to(gl.pointer_type(gl.int32))
    if G * 64 < NARROW:
        L: gl.constexpr = CODES
        first: gl.constexpr = G * 16
        N: gl.constexpr = 16
    else:
        L: gl.constexpr = PAIRS
        first: gl.constexpr = BODY // 4 - 256 + G * 32
        N: gl.constexpr = 32
    at = gl.convert_layout(at, gl.SliceLayout(1, L), assert_trivial=True)
    c = gl.expand_dims(first + gl.arange(0, N, layout=gl.SliceLayout(0, L)), 0)
    return gl.load(words + (gl.expand_dims(at.to(gl.int64) * 4, 1) + c), mask=gl.expand_dims(at >= 0, 1), other=0)


@gluon.jit
def load_scales(base, at, scale_at):
    """The scales of rows [32], 8 bytes."""
    return gl.load(base.to(gl.pointer_type(gl.int64)) + scale_at, mask=at >= 0, other=0x7F7F7F7F7F7F7F7F)


@gluon.jit
def twice(scales, G: gl.constexpr):
    """The scale of group G as bf16, twice in a word."""
    byte = ((scales if G < 4 else scales >> 32).to(gl.int32) >> (8 * (G % 4))) & 0xFF
    bits = gl.where(byte == 0, 0x0040, byte << 7)
    bits = gl.where(byte == 255, 0x7FC0, bits)
    return bits * 0x10001


@gluon.jit
def widened(codes, scale):
    """Codes e4m3 [32, 16], four a word, times scales -> bf16 [32, 32], two a word; exact."""
    scale, _ = gl.broadcast(gl.expand_dims(scale, 1), codes)
    low, high = gl.inline_asm_elementwise(
        """
        {
        .reg .b16 lo, hi, a, b;
        .reg .b32 x, y;
        .reg .f32 f, g;
        mov.b32 {lo, hi}, $2;
        cvt.rn.f16x2.e4m3x2 x, lo;
        cvt.rn.f16x2.e4m3x2 y, hi;
        mov.b32 {a, b}, x;
        cvt.f32.f16 f, a;
        cvt.f32.f16 g, b;
        cvt.rn.bf16x2.f32 x, g, f;
        mul.rn.bf16x2 $0, x, $3;
        mov.b32 {a, b}, y;
        cvt.f32.f16 f, a;
        cvt.f32.f16 g, b;
        cvt.rn.bf16x2.f32 y, g, f;
        mul.rn.bf16x2 $1, y, $3;
        }
        """,
        "=r,=r,r,r", [codes, scale], dtype=(gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip
    return gl.convert_layout(gl.join(low, high).reshape(32, 32), PAIRS, assert_trivial=True)


@gluon.jit
def half_of(
    stored, scales, base, at, scale_at, tile, tiles, HALF: gl.constexpr, NARROW: gl.constexpr, BODY: gl.constexpr,
):  # fmt: skip
    """32 rows `stored` into half a tile, each group followed by a load of what is next; which comes back."""
    scales2 = load_scales(base, at, scale_at)
    out = ()
    for g in gl.static_range(8):
        x = stored[g]
        if g * 64 < NARROW:
            x = widened(x, twice(scales, g))
        to = tiles.index(tile * 2 + g // 4)._reinterpret(gl.int32, [64, 128], WORDS)
        to = to.slice(HALF * 32, 32, dim=0).slice((g % 4) * 32, 32, dim=1)
        to.store(x)
        out = out + (load_group(base, at, g, NARROW, BODY),)  # noqa: RUF005
    return out, scales2


@gluon.jit
def widen(window, cache, looked, whole, CACHED: gl.constexpr, NARROW: gl.constexpr, BODY: gl.constexpr):
    """The warps that fill tiles."""
    tiles, biases, counts, tile_full, tile_empty = whole
    at, scale_at, told, full, empty = looked
    L: gl.constexpr = gl.SliceLayout(1, CODES)
    step = gl.to_tensor(0)
    mbarrier.wait(full.index(0), 0)
    known = value(told.index(0))
    base = window
    if CACHED:
        base = gl.where((known & 1) == 1, window, cache)
    a, s = at.index(0).slice(0, 32).load(L), scale_at.index(0).slice(0, 32).load(L)
    scales = load_scales(base, a, s)
    stored = ()
    for g in gl.static_range(8):
        stored = stored + (load_group(base, a, g, NARROW, BODY),)  # noqa: RUF005
    while known >= 0:
        slot, tile = step % AHEAD, step & 1
        a, s = at.index(slot).slice(32, 32).load(L), scale_at.index(slot).slice(32, 32).load(L)
        mbarrier.wait(tile_empty.index(tile), ((step >> 1) & 1) ^ 1)
        used = at.index(slot).load(ONE) >= 0
        biases.index(tile).store(gl.where(used, 0.0, float("-inf")))
        counts.index(tile).store(gl.full([1], known >> 1, gl.int32, layout=ONE))
        stored, scales = half_of(stored, scales, base, a, s, tile, tiles, 0, NARROW, BODY)
        mbarrier.arrive(empty.index(slot), count=1)
        step += 1
        slot = step % AHEAD
        mbarrier.wait(full.index(slot), (step // AHEAD) & 1)
        known = value(told.index(slot))
        if CACHED:
            base = gl.where((known & 1) == 1, window, cache)
        a, s = at.index(slot).slice(0, 32).load(L), scale_at.index(slot).slice(0, 32).load(L)
        stored, scales = half_of(stored, scales, base, a, s, tile, tiles, 1, NARROW, BODY)
        fence_async_shared()
        mbarrier.arrive(tile_full.index(tile), count=1)
