"""Kernels: what enters each block of tokens from the left and from the right."""

import triton
import triton.language as tl

from lba_exp.ops.fused.tiles import load_rows, load_sums, places_of, real_tokens, whole_factor


@triton.jit
def states_kernel(
    X, Y, DEN, OUT, DOT, MASK, ORDER, HIGH, LOW, TOTALS, S, Z, SEG, SEG_Z, SEG_T,
    sxb, sxl, sxh, syb, syl, syh, sob, sol, soh, smb, length, H, NB, NSEG, blocks_per_segment, first, eps,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, CB: tl.constexpr, BT: tl.constexpr, WALKS: tl.constexpr,
    ADJOINT: tl.constexpr, SCALED: tl.constexpr, DIVIDED: tl.constexpr, MASKED: tl.constexpr, ORDERED: tl.constexpr,
    ENTER: tl.constexpr, STORE: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Sums of x y^T over all tokens on one side of a block, decayed to its border, for each block of a segment.

    States (ADJOINT = False): x, y = k, v; to the left by the backward decays, to the right by the forward ones. Their adjoints: x, y = q
    and the numerator's gradient, dy / (den + eps) where DIVIDED; to the left by the forward decays, to the right by the backward ones;
    the denominator's gradient, -dy . y / (den + eps) or the one given, is DOT, (B, H, L), written where DIVIDED.

    A program walks over one segment of blocks in one direction: 0 to the left, 1 to the right, from ``first`` on. STORE: what enters each
    block is kept in S (2, B H, NB, D, DV), in the dtype of the products, and Z (2, B H, NB, D) float32, the same of x alone (times DOT for
    adjoints). ENTER: the walk begins with what ``scan_kernel`` left in SEG, SEG_Z; without STORE it leaves there what its segment adds, and
    in SEG_T the segment's log decay, (2, B H, NSEG, ...) float32. Grid (WALKS H NSEG B,), directions fastest, then heads.
    """
    pid = tl.program_id(0)
    direction = first + pid % WALKS
    pid = pid // WALKS
    h = pid % H
    segment = (pid // H) % NSEG
    b = (pid // H // NSEG).to(tl.int64)
    bh = b * H + h
    BH = tl.num_programs(0) // (NSEG * WALKS)
    d = tl.arange(0, BD)
    dv = tl.arange(0, BDV)
    cell = d[:, None] * DV + dv[None, :]
    in_cell = (d < D)[:, None] & (dv < DV)[None, :]
    own = direction if ADJOINT else 1 - direction  # whose decays: 0 forward, 1 backward
    sums = (own * BH + bh) * (NB * CB)
    totals = (own * BH + bh) * NB
    at = (direction * BH + bh) * NSEG + segment
    acc = tl.zeros((BD, BDV), tl.float32)
    z = tl.zeros((BD,), tl.float32)
    if ENTER:
        acc = tl.load(SEG + at * (D * DV) + cell, mask=in_cell, other=0.0)
        if SCALED:
            z = tl.load(SEG_Z + at * D + d, mask=d < D, other=0.0)
    log_decay = tl.zeros((), tl.float32)
    begin = segment * blocks_per_segment
    end = tl.minimum(begin + blocks_per_segment, NB)
    for n in range(begin, end):
        block = tl.where(direction == 0, begin + end - 1 - n, n)
        whole = tl.load(TOTALS + totals + block)
        whole_low = tl.load(TOTALS + 2 * BH * NB + totals + block)
        if STORE:
            state = (direction * BH + bh) * NB + block
            tl.store(S + state * (D * DV) + cell, acc.to(S.dtype.element_ty), mask=in_cell)
            if SCALED:
                tl.store(Z + state * D + d, z, mask=d < D)
        keep = whole_factor(whole, whole_low, EXACT)
        acc = acc * keep
        z = z * keep
        for i in tl.static_range(0, CB, BT):
            row = block.to(tl.int64) * CB + i + tl.arange(0, BT)
            ok = row < length
            place = places_of(ORDER, row, ok, ORDERED)
            real = real_tokens(MASK, b, smb, place, ok, MASKED)
            x = load_rows(X, b, h, place, sxb, sxl, sxh, d, real, D).to(COMPUTE)
            y = load_rows(Y, b, h, place, syb, syl, syh, dv, real, DV).to(tl.float32)
            high, low = load_sums(HIGH, LOW, sums + row, EXACT)
            e = tl.where(direction == 0, high, whole - high)
            if EXACT:
                e += tl.where(direction == 0, low, whole_low - low)
            e = tl.exp2(tl.where(e > 0, 0.0, e))
            scale = e
            if ADJOINT and SCALED:
                token = bh * length + place
                if DIVIDED:
                    inverse = 1.0 / (tl.load(DEN + token, mask=real, other=1.0) + eps)
                    o = load_rows(OUT, b, h, place, sob, sol, soh, dv, real, DV)
                    dot = -inverse * tl.sum(y * o.to(tl.float32), 1)
                    tl.store(DOT + token, dot, mask=ok & (direction == first))
                    scale = e * inverse
                else:
                    dot = tl.load(DOT + token, mask=real, other=0.0)
                z += tl.sum(x.to(tl.float32) * (e * dot)[:, None], 0)
            elif SCALED:
                z += tl.sum(x.to(tl.float32) * e[:, None], 0)
            acc = tl.dot(tl.trans(x), (y * scale[:, None]).to(COMPUTE), acc, input_precision=PRECISION)
        log_decay += whole
    if not STORE:
        tl.store(SEG + at * (D * DV) + cell, acc, mask=in_cell)
        if SCALED:
            tl.store(SEG_Z + at * D + d, z, mask=d < D)
        tl.store(SEG_T + at, log_decay)


@triton.jit
def scan_kernel(
    SEG, SEG_Z, SEG_T, BH, NSEG, first, SIZE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Turns what the segments add into what enters each of them, in place: BE of the SIZE = D DV numbers of a state a program.

    Grid (SIZE / BE, B H, directions), directions from ``first`` on.
    """
    direction = first + tl.program_id(2)
    bh = tl.program_id(1).to(tl.int64)
    e = tl.program_id(0) * BE + tl.arange(0, BE)
    inside = e < SIZE
    d = tl.arange(0, BD)
    in_z = (d < D) & (tl.program_id(0) == 0)
    acc = tl.zeros((BE,), tl.float32)
    z = tl.zeros((BD,), tl.float32)
    for n in range(0, NSEG):
        at = (direction * BH + bh) * NSEG + tl.where(direction == 0, NSEG - 1 - n, n)
        keep = tl.exp2(tl.load(SEG_T + at))
        own = tl.load(SEG + at * SIZE + e, mask=inside, other=0.0)
        tl.store(SEG + at * SIZE + e, acc, mask=inside)
        acc = acc * keep + own
        if SCALED:
            own_z = tl.load(SEG_Z + at * D + d, mask=in_z, other=0.0)
            tl.store(SEG_Z + at * D + d, z, mask=in_z)
            z = z * keep + own_z
