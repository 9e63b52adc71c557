"""Inner products of an expert's rows with a tile of tokens: weights as the left operand, tokens as the right.

Terms:
    wide    see `moe_sort`: e4m3 activations, and float32 scales [blocks, M] of their blocks of 128 or 32 columns.
    fours   e2m1 weights of a target without FP4 instructions: expanded to e4m3 in registers, exactly. A code s e e m
            becomes the byte s 0 0 e e m 0 0, which is 2^-6 of its value (FNUZ: 2^-7), the subnormal 0.5 too. Each scale
            group of 32 columns is one product whose sum is scaled in fp32, so no spread of scales is too wide.
    sixteens    the same for many tokens, where scaling sums costs more than a wider product: e2m1 times its scale is
            expanded to bf16, exactly for scales 2^-63 .. 2^63, and activations are bf16 too, their scales multiplied in
            (a scale for the whole row is left out, and multiplies the sum).
    eights  e4m3 weights: a product for each block of 128 columns, whose sum is scaled in fp32.
    mx      either, on a target whose matrix instructions multiply the E8M0 scales too.
    plain   weights and activations in bf16 or fp32, as they are stored.

Scales below 2^-126 count as 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from atomc.codegen.kernels.common import e8m0_value


@triton.jit
def low_codes(byte, kind: tl.constexpr, ASM: tl.constexpr):
    """The low nibbles of bytes as e4m3 bytes s 0 0 e e m 0 0. In assembly four at a time: the compiler takes each."""
    if ASM:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 sign, rest;
            shl.b32 sign, $1, 4;
            shl.b32 rest, $1, 2;
            and.b32 sign, sign, 0x80808080;
            lop3.b32 $0, rest, 0x1C1C1C1C, sign, 0xEA;
            }
            """,
            "=r,r", [byte], dtype=tl.float8e4nv, is_pure=True, pack=4,
        )  # fmt: skip
    code = ((byte & 8) << 4) | ((byte & 7) << 2)
    if kind == tl.float8e4b8:
        code = tl.where(code == 0x80, 0, code)  # FNUZ has no -0
    return code.to(tl.uint8).to(kind, bitcast=True)


@triton.jit
def high_codes(byte, kind: tl.constexpr, ASM: tl.constexpr):
    """As `low_codes`, of the high nibbles."""
    if ASM:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 sign, rest;
            and.b32 sign, $1, 0x80808080;
            shr.u32 rest, $1, 2;
            lop3.b32 $0, rest, 0x1C1C1C1C, sign, 0xEA;
            }
            """,
            "=r,r", [byte], dtype=tl.float8e4nv, is_pure=True, pack=4,
        )  # fmt: skip
    code = (byte & 0x80) | ((byte >> 2) & 0x1C)
    if kind == tl.float8e4b8:
        code = tl.where(code == 0x80, 0, code)
    return code.to(tl.uint8).to(kind, bitcast=True)


@triton.jit
def halves(byte, BN: tl.constexpr, W: tl.constexpr):
    """[BN, W] as its left and right half."""
    return tl.split(tl.permute(tl.reshape(byte, (BN, 2, W // 2)), (0, 2, 1)))


@triton.jit
def block_of(codes, block: tl.constexpr, BN: tl.constexpr, BLOCKS: tl.constexpr):
    """[BN, 64] bytes of one of BLOCKS blocks of 128 columns, one or two."""
    if BLOCKS == 2:
        left, right = halves(codes, BN, 128)
        codes = left if block == 0 else right
    return codes


@triton.jit
def fours_group(byte, x, BN: tl.constexpr, ASM: tl.constexpr):
    """[BN, 16] bytes times x [32, BM] in the order of `wide`, without the scale."""
    both = tl.join(low_codes(byte, x.dtype, ASM), high_codes(byte, x.dtype, ASM))
    return tl.dot(tl.reshape(tl.permute(both, (0, 2, 1)), (BN, 32)), x)


@triton.jit
def word_scale(word, g: tl.constexpr):
    """The scale of byte g of a word of four: [BN, 1] float32; 0xFF gives NaN."""
    power = (((word >> (8 * g)) & 0xFF) << 23).to(tl.float32, bitcast=True)
    return tl.fma(power, 0.0, power)[:, None]


@triton.jit
def fours_block(
    byte, x0, x1, x2, x3, word, s0, s1, s2, s3, BN: tl.constexpr, FINE: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """[BN, 64] bytes times 128 columns x0 .. x3 [32, BM], scaled. FINE: each 32 columns of x have a scale."""
    left, right = halves(byte, BN, 64)
    b0, b1 = halves(left, BN, 32)
    b2, b3 = halves(right, BN, 32)
    if FINE:
        part = fours_group(b0, x0, BN, ASM) * (word_scale(word, 0) * s0[None, :])
        part += fours_group(b1, x1, BN, ASM) * (word_scale(word, 1) * s1[None, :])
        part += fours_group(b2, x2, BN, ASM) * (word_scale(word, 2) * s2[None, :])
        return part + fours_group(b3, x3, BN, ASM) * (word_scale(word, 3) * s3[None, :])
    part = fours_group(b0, x0, BN, ASM) * word_scale(word, 0)
    part += fours_group(b1, x1, BN, ASM) * word_scale(word, 1)
    part += fours_group(b2, x2, BN, ASM) * word_scale(word, 2)
    part += fours_group(b3, x3, BN, ASM) * word_scale(word, 3)
    return part * s0[None, :]


@triton.jit
def scale_words(scales, row, last, k, G: tl.constexpr, WORDS: tl.constexpr):
    """The four scale bytes of 128 columns of rows row .. (at most `last`) as int32; rows of G bytes."""
    row = tl.minimum(row, last)
    if WORDS:
        return tl.load(scales + row * (G // 4) + k)
    word = tl.zeros_like(row)
    for g in tl.static_range(4):
        byte = tl.load(scales + row * G + 4 * k + g, mask=4 * k + g < G, other=0)
        word = word | (byte.to(tl.int32) << (8 * g))
    return word


@triton.jit
def words_of(scales, n, last, k, BN: tl.constexpr, CHUNK: tl.constexpr, G: tl.constexpr, WORDS: tl.constexpr):
    """`scale_words` of rows n .. n + BN. In chunks of fewer rows than threads: Triton then loads them where the product
    needs them, without a trip through shared memory."""
    at = n + tl.arange(0, CHUNK)
    word = scale_words(scales, at, last, k, G, WORDS)
    if CHUNK < BN:
        tl.static_assert(BN == 2 * CHUNK)
        below = scale_words(scales, at + CHUNK, last, k, G, WORDS)
        word = tl.reshape(tl.permute(tl.join(word, below), (1, 0)), (BN,))
    return word


@triton.jit
def weight_tile(w, row, last, k, STRIDE: tl.constexpr, W: tl.constexpr):
    """[BN, W] of rows of STRIDE, from column k W on; rows beyond the last repeat it, columns beyond are zero."""
    column = k * W + tl.arange(0, W)
    at = w + tl.minimum(row, last)[:, None] * STRIDE + column[None, :]
    if STRIDE % W == 0:
        return tl.load(at)
    return tl.load(at, mask=(column < STRIDE)[None, :], other=0.0)


@triton.jit
def fours_product(
    x, x_scale, row, keep, M, w, w_scale, n, up, last, first, stop, K: tl.constexpr, KP: tl.constexpr, BN: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, PAIR: tl.constexpr, FINE: tl.constexpr, CHUNK: tl.constexpr,
    WORDS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Rows n .. n + BN of w [rows, K], and with PAIR rows `up` .., times rows `row` of x: two [BN, BM] in fp32.

    Steps of BK columns first .. stop, BK one or two blocks of 128. Scales of the next step are loaded before the
    products of this one.
    """
    G: tl.constexpr = (K + 31) // 32
    BLOCKS: tl.constexpr = BK // 128
    FOLD: tl.constexpr = 4 if FINE else 1  # scales of x for 128 columns
    end = stop * BLOCKS - 1
    acc = tl.zeros((BN, BM), tl.float32)
    other = acc
    x += row[None, :] * KP + tl.arange(0, 32)[:, None]
    rows = tl.arange(0, BN)
    k = first * BLOCKS
    word = words_of(w_scale, n, last, k, BN, CHUNK, G, WORDS)
    second, word_up, second_up = word, word, word
    if PAIR:
        word_up = words_of(w_scale, up, last, k, BN, CHUNK, G, WORDS)
    if BLOCKS == 2:
        second = words_of(w_scale, n, last, k + 1, BN, CHUNK, G, WORDS)
        if PAIR:
            second_up = words_of(w_scale, up, last, k + 1, BN, CHUNK, G, WORDS)
    s0 = tl.load(x_scale + FOLD * M * k + row)
    for step in range(first, stop):
        codes = weight_tile(w, n + rows, last, step, K // 2, BK // 2)
        codes_up = codes
        if PAIR:
            codes_up = weight_tile(w, up + rows, last, step, K // 2, BK // 2)
        for block in tl.static_range(BLOCKS):
            k = step * BLOCKS + block
            x0 = tl.load(x + 128 * k, mask=keep[None, :], other=0.0)
            x1 = tl.load(x + 128 * k + 32, mask=keep[None, :], other=0.0)
            x2 = tl.load(x + 128 * k + 64, mask=keep[None, :], other=0.0)
            x3 = tl.load(x + 128 * k + 96, mask=keep[None, :], other=0.0)
            s1, s2, s3 = s0, s0, s0
            if FINE:
                s1 = tl.load(x_scale + M * (4 * k + 1) + row)
                s2 = tl.load(x_scale + M * (4 * k + 2) + row)
                s3 = tl.load(x_scale + M * (4 * k + 3) + row)
            next_s0 = tl.load(x_scale + FOLD * M * tl.minimum(k + 1, end) + row)
            ahead = tl.minimum(k + BLOCKS, end)
            after = words_of(w_scale, n, last, ahead, BN, CHUNK, G, WORDS)
            if PAIR:
                after_up = words_of(w_scale, up, last, ahead, BN, CHUNK, G, WORDS)
                byte = block_of(codes_up, block, BN, BLOCKS)
                other += fours_block(byte, x0, x1, x2, x3, word_up, s0, s1, s2, s3, BN, FINE, ASM)
                if BLOCKS == 2:
                    word_up, second_up = second_up, after_up
                else:
                    word_up = after_up
            byte = block_of(codes, block, BN, BLOCKS)
            acc += fours_block(byte, x0, x1, x2, x3, word, s0, s1, s2, s3, BN, FINE, ASM)
            if BLOCKS == 2:
                word, second = second, after
            else:
                word = after
            s0 = next_s0
    unit: tl.constexpr = 128.0 if x.dtype.element_ty == tl.float8e4b8 else 64.0
    return acc * unit, other * unit


@triton.jit
def times_bf16x2(a, b, ASM: tl.constexpr):
    """Products of the two bf16 in each of a and b (int32)."""
    if ASM:
        return tl.inline_asm_elementwise(
            "mul.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
        )
    low = (a << 16).to(tl.float32, bitcast=True) * (b << 16).to(tl.float32, bitcast=True)
    high = (a & -65536).to(tl.float32, bitcast=True) * (b & -65536).to(tl.float32, bitcast=True)
    # Exact, so that the upper half of a float32 is the bf16.
    return ((low.to(tl.int32, bitcast=True) >> 16) & 0xFFFF) | (high.to(tl.int32, bitcast=True) & -65536)


@triton.jit
def sixteens_part(word, scale, J: tl.constexpr, ASM: tl.constexpr):
    """Codes J and J + 4 of words of eight, times scale, times 2^-126: bf16 [BN, 16, 2].

    A code's sign goes to bit 15, the rest to bits 8 .. 6: its value times 2^-126, the subnormal 0.5 too.
    """
    sign = (word << (12 - 4 * J)) & -2147450880  # 0x80008000
    rest = (word << (6 - 4 * J)) if J < 2 else (word >> (4 * J - 6))
    both = times_bf16x2(sign | (rest & 0x01C001C0), scale, ASM)
    low = both.to(tl.int16).to(tl.bfloat16, bitcast=True)
    return tl.join(low, (both >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True))


@triton.jit
def sixteens_block(word, scales, ASM: tl.constexpr):
    """[BN, 16] words of eight codes with the four scale bytes of a row as bf16 [BN, 128], 2^-62 of their values."""
    BN: tl.constexpr = word.shape[0]
    # Four vectors as [BN, 4]: joined, not taken from a tensor, they stay in the thread that has the row's codes.
    byte = tl.join(tl.join(scales, scales >> 16), tl.join(scales >> 8, scales >> 24))
    byte = tl.reshape(byte, (BN, 4)) & 0xFF
    power = tl.where(byte == 0xFF, 0x7FC07FC0, tl.minimum(byte + 64, 0xFF) * 0x00800080)
    scale = tl.reshape(tl.broadcast_to(power[:, :, None], (BN, 4, 4)), (BN, 16))
    first = tl.join(sixteens_part(word, scale, 0, ASM), sixteens_part(word, scale, 1, ASM))
    last = tl.join(sixteens_part(word, scale, 2, ASM), sixteens_part(word, scale, 3, ASM))
    both = tl.reshape(tl.join(first, last), (BN, 4, 4, 2, 2, 2))
    return tl.reshape(tl.permute(both, (0, 1, 5, 4, 2, 3)), (BN, 128))


@triton.jit
def sixteens_product(
    x, x_scale, row, keep, w, w_scale, n, up, last, first, stop, K: tl.constexpr, KP: tl.constexpr, BN: tl.constexpr,
    BM: tl.constexpr, PAIR: tl.constexpr, WHOLE: tl.constexpr, CHUNK: tl.constexpr, WORDS: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """As `fours_product`, of bf16 x and w as int32 words; WHOLE: x has a scale for each row."""
    G: tl.constexpr = (K + 31) // 32
    acc = tl.zeros((BN, BM), tl.float32)
    other = acc
    at = x + row[None, :] * KP + tl.arange(0, 128)[:, None]
    rows = tl.arange(0, BN)
    for k in range(first, stop):
        right = tl.load(at + 128 * k, mask=keep[None, :], other=0.0)
        word = words_of(w_scale, n, last, k, BN, CHUNK, G, WORDS)
        left = sixteens_block(weight_tile(w, n + rows, last, k, K // 8, 16), word, ASM)
        acc = tl.dot(left, right, acc)
        if PAIR:
            word = words_of(w_scale, up, last, k, BN, CHUNK, G, WORDS)
            left = sixteens_block(weight_tile(w, up + rows, last, k, K // 8, 16), word, ASM)
            other = tl.dot(left, right, other)
    unit = tl.zeros((BM,), tl.float32) + 4.611686018427387904e18  # 2^62
    if WHOLE:
        unit *= tl.load(x_scale + row)
    return acc * unit[None, :], other * unit[None, :]


@triton.jit
def tile_scale(
    scales, n, last, k, BN: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, ONE: tl.constexpr
):  # fmt: skip
    """float32 scales [BN, 1] of rows n .. and block k of 128 columns, of e4m3 tiles [ROWS, WIDTH].

    WIDTH 0: of whole rows. ONE: the rows are of one tile; [1, 1].
    """
    row = tl.arange(0, 1) if ONE else tl.arange(0, BN)
    column = k if WIDTH else 0
    s = tl.load(scales + tl.minimum(n + row, last) // ROWS * G + column)
    if s.dtype == tl.uint8:
        s = e8m0_value(s)
    return s[:, None]


@triton.jit
def eights_product(
    x, x_scale, row, keep, M, w, w_scale, n, up, last, first, stop, K: tl.constexpr, KP: tl.constexpr, BN: tl.constexpr,
    BM: tl.constexpr, PAIR: tl.constexpr, FINE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    ONE: tl.constexpr,
):  # fmt: skip
    """As `fours_product`, of e4m3 weights. FINE (activations in MXFP4): products of 32 columns."""
    G: tl.constexpr = (K + 127) // 128 if WIDTH else 1
    STEP: tl.constexpr = 32 if FINE else 128
    acc = tl.zeros((BN, BM), tl.float32)
    other = acc
    x += row[None, :] * KP + tl.arange(0, STEP)[:, None]
    rows = tl.arange(0, BN)
    for k in range(first * (128 // STEP), stop * (128 // STEP)):
        right = tl.load(x + STEP * k, mask=keep[None, :], other=0.0)
        s = tl.load(x_scale + M * k + row)[None, :]
        block = k * STEP // 128
        left = weight_tile(w, n + rows, last, k, K, STEP)
        acc += tl.dot(left, right) * (tile_scale(w_scale, n, last, block, BN, G, ROWS, WIDTH, ONE) * s)
        if PAIR:
            left_up = weight_tile(w, up + rows, last, k, K, STEP)
            other += tl.dot(left_up, right) * (tile_scale(w_scale, up, last, block, BN, G, ROWS, WIDTH, ONE) * s)
    return acc, other


@triton.jit
def mx_scales(scales, row, last, step, K: tl.constexpr, BK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """E8M0 bytes [rows, BK / 32] of weights in tiles [ROWS, WIDTH]."""
    G: tl.constexpr = (K + WIDTH - 1) // WIDTH
    group = (step * BK + 32 * tl.arange(0, BK // 32)) // WIDTH
    at = scales + (tl.minimum(row, last) // ROWS)[:, None] * G + group[None, :]
    return tl.load(at) if K % BK == 0 else tl.load(at, mask=(group < G)[None, :], other=0)


@triton.jit
def mx_product(
    x, x_scale, row, keep, w, w_scale, n, up, last, first, stop, K: tl.constexpr, GROUP: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, PAIR: tl.constexpr, FORM: tl.constexpr,
    LEFT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """As `fours_product`, by scaled matrix instructions. x [.., K] is the operator's, in FORM, with an E8M0 scale for
    GROUP columns; w is in LEFT, with one for [ROWS, WIDTH]. e2m1 is packed. Steps of BK columns first .. stop."""
    G: tl.constexpr = (K + GROUP - 1) // GROUP
    PACK: tl.constexpr = 2 if FORM == "e2m1" else 1
    BYTES: tl.constexpr = 2 if LEFT == "e2m1" else 1
    acc = tl.zeros((BN, BM), tl.float32)
    other = acc
    rows = tl.arange(0, BN)
    for step in range(first, stop):
        column = step * (BK // PACK) + tl.arange(0, BK // PACK)[:, None]
        right = tl.load(x + row[None, :] * (K // PACK) + column, mask=keep[None, :] & (column < K // PACK), other=0.0)
        group = (step * BK + tl.arange(0, BK // 32) * 32)[None, :] // GROUP
        s = tl.load(x_scale + row[:, None] * G + group, mask=keep[:, None] & (group < G), other=0)
        left = weight_tile(w, n + rows, last, step, K // BYTES, BK // BYTES)
        left_s = mx_scales(w_scale, n + rows, last, step, K, BK, ROWS, WIDTH)
        acc = tl.dot_scaled(left, left_s, LEFT, right, s, FORM, acc)
        if PAIR:
            left = weight_tile(w, up + rows, last, step, K // BYTES, BK // BYTES)
            left_s = mx_scales(w_scale, up + rows, last, step, K, BK, ROWS, WIDTH)
            other = tl.dot_scaled(left, left_s, LEFT, right, s, FORM, other)
    return acc, other


@triton.jit
def plain_product(
    x, row, keep, w, n, up, last, first, stop, K: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    PAIR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As `fours_product`, of x [.., K] and w without scales. Steps of BK columns first .. stop."""
    acc = tl.zeros((BN, BM), tl.float32)
    other = acc
    rows = tl.arange(0, BN)
    x += row.to(tl.int64)[None, :] * K
    for step in range(first, stop):
        column = step * BK + tl.arange(0, BK)[:, None]
        right = tl.load(x + column, mask=keep[None, :] & (column < K), other=0.0)
        left = weight_tile(w, n + rows, last, step, K, BK)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
        if PAIR:
            left = weight_tile(w, up + rows, last, step, K, BK)
            other = tl.dot(left, right, other, input_precision=PRECISION)
    return acc, other
