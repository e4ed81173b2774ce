"""Kernels: the states that enter each block of tokens, and the sums of whole segments, from which the states at their edges are joined."""

import triton
import triton.language as tl


@triton.jit
def factor(high, low, from_high, from_low, EXACT: tl.constexpr):
    """2 to the power of a difference of sums that is at most 0."""
    e = high - from_high
    if EXACT:
        e += low - from_low
    return tl.exp2(tl.where(e > 0, 0.0, e))


@triton.jit
def whole_factor(high, low, EXACT: tl.constexpr):
    """2 to the power of one sum: the factor over a whole block, which many steps multiply; in float64 where float32 is to be exact."""
    if EXACT:
        return tl.exp2(high.to(tl.float64) + low.to(tl.float64)).to(tl.float32)
    else:
        return tl.exp2(high)


@triton.jit
def states_kernel(
    X, Y, GRAD_SCALE, OUT, DOT, MASK, HIGH, LOW, TOTALS, S, Z, T, SEG, SEG_Z, SEG_T,
    sxb, sxl, sxh, syb, syl, syh, sob, sol, soh, smb, length, H, NB, NSEG, blocks_per_segment, eps,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, CB: tl.constexpr, BT: tl.constexpr,
    ADJOINT: tl.constexpr, SCALED: tl.constexpr, DIVIDED: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr,
    LEFTWARD: tl.constexpr, RIGHTWARD: tl.constexpr, WALKS: tl.constexpr, PRECISION: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Sums of x y^T that enter each block from the right, decayed to the block's border, and over each whole segment in both directions.

    States (ADJOINT = False): x, y = k, v; from the right by the backward decays, from the left by the forward ones. Their adjoints:
    x, y = q and the numerator's gradient, dy / (den + eps) where DIVIDED; from the right by the forward decays, from the left by the
    backward ones; the denominator's gradient, -dy . y / (den + eps) or the one given, is DOT, (B, H, L), written where DIVIDED.

    A program walks over one segment of blocks from right to left, and where WALKS = 2 another one from left to right.
    S: (B H, NB, D, DV), what enters each block as the segment alone makes it (LEFTWARD), and beside it what enters from the left where
    WALKS = 2; Z: (B H, NB, D) the same of x alone (times DOT for adjoints); T: (B H, NB), the log decay from the segment's edge to the
    block's. SEG, SEG_Z: (2, B H, NSEG, D, DV) and (2, B H, NSEG, D), the segments' sums, first those that leave to the right (RIGHTWARD),
    then to the left; SEG_T: (2, B H, NSEG), their log decays. Grid (WALKS H NSEG B,), walks fastest, then heads.
    """
    walk = tl.program_id(0) % WALKS  # 0: from right to left
    pid = tl.program_id(0) // WALKS
    h = pid % H
    segment = (pid // H) % NSEG
    b = (pid // H // NSEG).to(tl.int64)
    bh = b * H + h
    BH = tl.num_programs(0) // (NSEG * WALKS)
    d = tl.arange(0, BD)
    dv = tl.arange(0, BDV)
    r = tl.arange(0, BT)
    acc = tl.zeros((BD, BDV), tl.float32)
    seg = tl.zeros((BD, BDV), tl.float32)
    z = tl.zeros((BD,), tl.float32)
    seg_z = tl.zeros((BD,), tl.float32)
    log_left = tl.zeros((), tl.float32)
    log_right = tl.zeros((), tl.float32)
    zero = tl.zeros((), tl.int64)
    first = segment * blocks_per_segment
    last = tl.minimum(first + blocks_per_segment, NB)
    left: tl.constexpr = 0 if ADJOINT else 1  # whose sums: 0 forward, 1 backward
    right: tl.constexpr = 1 - left
    cell = d[:, None] * DV + dv[None, :]
    in_cell = (d[:, None] < D) & (dv[None, :] < DV)
    own = tl.where(walk == 0, left, right)
    sums_own = (own * BH + bh) * (NB * CB)
    sums_right = (right * BH + bh) * (NB * CB)
    total_own = TOTALS + (own * BH + bh) * NB
    total_right = TOTALS + (right * BH + bh) * NB
    LOW_PART = 2 * BH * NB
    for n in range(first, last):
        block = tl.where(walk == 0, first + last - 1 - n, n)
        whole = tl.load(total_own + block)
        whole_low = tl.load(total_own + LOW_PART + block) if EXACT else 0.0
        if LEFTWARD:
            state = (walk * BH + bh) * NB + block
            tl.store(S + state * (D * DV) + cell, acc.to(S.dtype.element_ty), mask=in_cell)
            if SCALED:
                tl.store(Z + state * D + d, z, mask=d < D)
            tl.store(T + state, log_left)
        keep = whole_factor(whole, whole_low, EXACT)
        acc = acc * keep
        z = z * keep
        if RIGHTWARD:
            whole_right = tl.load(total_right + block)
            whole_right_low = tl.load(total_right + LOW_PART + block) if EXACT else 0.0
        for i in tl.static_range(0, CB, BT):
            start = zero + (block * CB + i)
            ok = start + r < length
            if MASKED:
                ok = ok & (tl.load(MASK + b * smb + start + r, mask=ok, other=0) != 0)
            in_y = ok[:, None] & (dv[None, :] < DV)
            in_x = ok[:, None] & (d[None, :] < D)
            x = tl.load(X + b * sxb + h * sxh + start * sxl + (r[:, None] * sxl + d[None, :]), mask=in_x, other=0.0)
            y = tl.load(Y + b * syb + h * syh + start * syl + (r[:, None] * syl + dv[None, :]), mask=in_y, other=0.0)
            x = x.to(COMPUTE)
            x_t = tl.trans(x)
            y = y.to(tl.float32)
            dot = tl.full((BT,), 1.0, tl.float32)
            if ADJOINT and SCALED:
                token = bh * length + start + r
                if DIVIDED:
                    y = y * (1.0 / (tl.load(GRAD_SCALE + token, mask=ok, other=1.0) + eps))[:, None]
                    y = y.to(COMPUTE).to(tl.float32)  # as it enters products: the two parts of a gradient cancel with the same rounding
                    o = tl.load(OUT + b * sob + h * soh + start * sol + (r[:, None] * sol + dv[None, :]), mask=in_y, other=0.0)
                    dot = -tl.sum(y * o.to(tl.float32), 1)
                    tl.store(DOT + token, dot, mask=start + r < length)
                else:
                    dot = tl.load(DOT + token, mask=ok, other=0.0)
            if LEFTWARD:
                e = tl.load(HIGH + sums_own + start + r)
                e = tl.where(walk == 0, e, whole - e)
                if EXACT:
                    e_low = tl.load(LOW + sums_own + start + r)
                    e += tl.where(walk == 0, e_low, whole_low - e_low)
                e = tl.exp2(tl.where(e > 0, 0.0, e))
                if SCALED:
                    z += tl.sum(x.to(tl.float32) * (e * dot)[:, None], 0)
                acc = tl.dot(x_t, (y * e[:, None]).to(COMPUTE), acc, input_precision=PRECISION)
            if RIGHTWARD:
                e = whole_right - tl.load(HIGH + sums_right + start + r) + log_right
                if EXACT:
                    e += whole_right_low - tl.load(LOW + sums_right + start + r)
                e = tl.exp2(tl.where(e > 0, 0.0, e))
                if SCALED:
                    seg_z += tl.sum(x.to(tl.float32) * (e * dot)[:, None], 0)
                seg = tl.dot(x_t, (y * e[:, None]).to(COMPUTE), seg, input_precision=PRECISION)
        log_left += whole
        if RIGHTWARD:
            log_right += whole_right
    state = bh * NSEG + segment
    if RIGHTWARD:
        tl.store(SEG + state * (D * DV) + cell, seg, mask=in_cell)
        if SCALED:
            tl.store(SEG_Z + state * D + d, seg_z, mask=d < D)
        tl.store(SEG_T + state, log_right)
    if LEFTWARD:
        state += tl.where(walk == 0, BH * NSEG, 0)
        tl.store(SEG + state * (D * DV) + cell, acc, mask=in_cell)
        if SCALED:
            tl.store(SEG_Z + state * D + d, z, mask=d < D)
        tl.store(SEG_T + state, log_left)


@triton.jit
def join_kernel(
    SEG, SEG_Z, SEG_T, BH, NSEG, first, D: tl.constexpr, DV: tl.constexpr, BR: tl.constexpr, BDV: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Turns the segments' sums into what enters each segment, in place.

    Grid (B H, rows / BR, directions), directions from ``first`` on: 0 what goes to the right, 1 to the left.
    """
    direction = first + tl.program_id(2)
    bh = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * BR + tl.arange(0, BR)
    dv = tl.arange(0, BDV)
    ok = (rows[:, None] < D) & (dv[None, :] < DV)
    acc = tl.zeros((BR, BDV), tl.float32)
    z = tl.zeros((BR,), tl.float32)
    row = (direction * BH + bh) * NSEG
    for n in range(0, NSEG):
        at = row + tl.where(direction == 0, n, NSEG - 1 - n)
        keep = tl.exp2(tl.load(SEG_T + at))
        cell = SEG + at * (D * DV) + rows[:, None] * DV + dv[None, :]
        own = tl.load(cell, mask=ok, other=0.0)
        tl.store(cell, acc, mask=ok)
        acc = acc * keep + own
        if SCALED:
            own_z = tl.load(SEG_Z + at * D + rows, mask=rows < D, other=0.0)
            tl.store(SEG_Z + at * D + rows, z, mask=rows < D)
            z = z * keep + own_z
