"""Kernels: the states that enter each block of tokens, in both directions from one reading, and their join over long sequences."""

import triton
import triton.language as tl


@triton.jit
def states_kernel(
    X, Y, GRAD_SCALE, OUT, DOT, MASK, HIGH, LOW, TOTALS, S, Z, T,
    sxb, sxl, sxh, syb, syl, syh, sob, sol, soh, smb,
    length, H, NB, NSEG, blocks_per_segment, eps,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, CB: tl.constexpr, BT: tl.constexpr,
    ADJOINT: tl.constexpr, SCALED: tl.constexpr, DIVIDED: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr,
    RIGHTWARD: tl.constexpr, LEFTWARD: tl.constexpr, PRECISION: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Sums of x y^T that enter each block from the left and from the right, each decayed to the block's border.

    States (ADJOINT = False): x, y = k, v; from the left by the forward decays, from the right by the backward ones. Their adjoints: x, y =
    q and the numerator's gradient, dy / (den + eps) where DIVIDED; from the left by the backward decays, from the right by the forward ones;
    the denominator's gradient, -dy . y / (den + eps) or the one given, is DOT, (B, H, L), written where DIVIDED.

    A program walks over one segment of blocks. S: (2, B H, NB + NSEG, D, DV), first the entering states as the segment alone makes them,
    then each segment's sum; Z: (2, B H, NB + NSEG, D), the same of x alone (times DOT for adjoints); T: (2, B H, NB + NSEG), the log decay
    from the segment's border to each block's, and of the segment. Grid (H NSEG B,), heads fastest.
    """
    pid = tl.program_id(0)
    h = pid % H
    segment = (pid // H) % NSEG
    b = (pid // H // NSEG).to(tl.int64)
    bh = b * H + h
    BH = tl.num_programs(0) // NSEG
    d = tl.arange(0, BD)
    dv = tl.arange(0, BDV)
    r = tl.arange(0, BT)
    ones = tl.full((BT, 16), 1.0, COMPUTE)
    acc = tl.zeros((BD, BDV), tl.float32)
    z = tl.zeros((BD, 16), tl.float32)
    log = tl.zeros((), tl.float32)
    zero = tl.zeros((), tl.int64)
    first = segment * blocks_per_segment
    last = tl.minimum(first + blocks_per_segment, NB)
    # rightward: states by the forward sums, adjoints by the backward ones
    right: tl.constexpr = 1 if ADJOINT else 0
    left: tl.constexpr = 1 - right
    row_right = bh * (NB + NSEG)
    row_left = (BH + bh) * (NB + NSEG)
    cell = d[:, None] * DV + dv[None, :]
    in_cell = (d[:, None] < D) & (dv[None, :] < DV)
    column = tl.arange(0, 16)
    z_cell = tl.broadcast_to(d[:, None], (BD, 16))
    in_z = (d[:, None] < D) & (column[None, :] == 0)
    sums_right = HIGH + (right * BH + bh) * (NB * CB)
    sums_left = HIGH + (left * BH + bh) * (NB * CB)
    low_right = LOW + (right * BH + bh) * (NB * CB)
    low_left = LOW + (left * BH + bh) * (NB * CB)
    total_right = TOTALS + (right * BH + bh) * NB
    total_left = TOTALS + (left * BH + bh) * NB
    LOW_PART = 2 * BH * NB
    for block in range(first, last):
        if RIGHTWARD:
            at = row_right + block
            tl.store(S + at * (D * DV) + cell, acc.to(S.dtype.element_ty), mask=in_cell)
            if SCALED:
                tl.store(Z + at * D + z_cell, z, mask=in_z)
            tl.store(T + at, log)
            whole = tl.load(total_right + block)
            if EXACT:
                whole_low = tl.load(total_right + LOW_PART + block)
                keep = tl.exp2((whole.to(tl.float64) + whole_low.to(tl.float64))).to(tl.float32)
            else:
                keep = tl.exp2(whole)
            acc = acc * keep
            z = z * keep
            log += whole
        own = tl.zeros((BD, BDV), tl.float32)
        own_z = tl.zeros((BD, 16), tl.float32)
        for i in tl.static_range(0, CB, BT):
            start = zero + (block * CB + i)
            ok = start + r < length
            if MASKED:
                ok = ok & (tl.load(MASK + b * smb + start + r, mask=ok, other=0) != 0)
            x = tl.load(
                X + b * sxb + h * sxh + start * sxl + (r[:, None] * sxl + d[None, :]), mask=ok[:, None] & (d[None, :] < D), other=0.0
            )
            y = tl.load(
                Y + b * syb + h * syh + start * syl + (r[:, None] * syl + dv[None, :]), mask=ok[:, None] & (dv[None, :] < DV), other=0.0
            )
            x = x.to(tl.float32)
            if ADJOINT and SCALED:
                at = bh * length + start + r
                if DIVIDED:
                    scale = tl.load(GRAD_SCALE + at, mask=ok, other=1.0)
                    y = y.to(tl.float32) * (1.0 / (scale + eps))[:, None]
                    o = tl.load(
                        OUT + b * sob + h * soh + start * sol + (r[:, None] * sol + dv[None, :]),
                        mask=ok[:, None] & (dv[None, :] < DV),
                        other=0.0,
                    )
                    dot = -tl.sum(y * o.to(tl.float32), 1)
                    tl.store(DOT + at, dot, mask=start + r < length)
                else:
                    dot = tl.load(DOT + at, mask=ok, other=0.0)
            y = y.to(COMPUTE)
            if RIGHTWARD:
                e = tl.load(total_right + block) - tl.load(sums_right + start + r)
                if EXACT:
                    e += tl.load(total_right + LOW_PART + block) - tl.load(low_right + start + r)
                e = tl.exp2(tl.where(e > 0, 0.0, e))
                scaled_x = (x * e[:, None]).to(COMPUTE)
                acc = tl.dot(tl.trans(scaled_x), y, acc, input_precision=PRECISION)
                if SCALED:
                    if ADJOINT:
                        z = tl.dot(tl.trans((x * (e * dot)[:, None]).to(COMPUTE)), ones, z, input_precision=PRECISION)
                    else:
                        z = tl.dot(tl.trans(scaled_x), ones, z, input_precision=PRECISION)
            if LEFTWARD:
                e = tl.load(sums_left + start + r)
                if EXACT:
                    e += tl.load(low_left + start + r)
                e = tl.exp2(tl.where(e > 0, 0.0, e))
                scaled_x = (x * e[:, None]).to(COMPUTE)
                own = tl.dot(tl.trans(scaled_x), y, own, input_precision=PRECISION)
                if SCALED:
                    if ADJOINT:
                        own_z = tl.dot(tl.trans((x * (e * dot)[:, None]).to(COMPUTE)), ones, own_z, input_precision=PRECISION)
                    else:
                        own_z = tl.dot(tl.trans(scaled_x), ones, own_z, input_precision=PRECISION)
        if LEFTWARD:
            at = row_left + block
            tl.store(S + at * (D * DV) + cell, own.to(S.dtype.element_ty), mask=in_cell)
            if SCALED:
                tl.store(Z + at * D + z_cell, own_z, mask=in_z)
    if RIGHTWARD:
        at = row_right + NB + segment
        tl.store(S + at * (D * DV) + cell, acc.to(S.dtype.element_ty), mask=in_cell)
        if SCALED:
            tl.store(Z + at * D + z_cell, z, mask=in_z)
        tl.store(T + at, log)
    if LEFTWARD:
        # what each block adds is there; now from right to left
        tl.debug_barrier()
        acc = tl.zeros((BD, BDV), tl.float32)
        zz = tl.zeros((BD,), tl.float32)
        log = tl.zeros((), tl.float32)
        for n in range(first, last):
            block = first + last - 1 - n
            at = row_left + block
            own = tl.load(S + at * (D * DV) + cell, mask=in_cell, other=0.0).to(tl.float32)
            tl.store(S + at * (D * DV) + cell, acc.to(S.dtype.element_ty), mask=in_cell)
            whole = tl.load(total_left + block)
            if EXACT:
                whole_low = tl.load(total_left + LOW_PART + block)
                keep = tl.exp2((whole.to(tl.float64) + whole_low.to(tl.float64))).to(tl.float32)
            else:
                keep = tl.exp2(whole)
            acc = acc * keep + own
            if SCALED:
                own_zz = tl.load(Z + at * D + d, mask=d < D, other=0.0)
                tl.store(Z + at * D + d, zz, mask=d < D)
                zz = zz * keep + own_zz
            tl.store(T + at, log)
            log += whole
        at = row_left + NB + segment
        tl.store(S + at * (D * DV) + cell, acc.to(S.dtype.element_ty), mask=in_cell)
        if SCALED:
            tl.store(Z + at * D + d, zz, mask=d < D)
        tl.store(T + at, log)


@triton.jit
def join_kernel(
    S, Z, T, BH, NB, NSEG, first, D: tl.constexpr, DV: tl.constexpr, BR: tl.constexpr, BDV: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Turns the segments' sums into what enters each segment, in place. Grid (B H, rows / BR, directions), from ``first`` on:
    0 from the left, 1 from the right."""
    direction = first + tl.program_id(2)
    bh = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * BR + tl.arange(0, BR)
    dv = tl.arange(0, BDV)
    ok = (rows[:, None] < D) & (dv[None, :] < DV)
    acc = tl.zeros((BR, BDV), tl.float32)
    z = tl.zeros((BR,), tl.float32)
    row = (direction * BH + bh) * (NB + NSEG) + NB
    for n in range(0, NSEG):
        at = row + (n if direction == 0 else NSEG - 1 - n)
        keep = tl.exp2(tl.load(T + at))
        cell = S + at * (D * DV) + rows[:, None] * DV + dv[None, :]
        own = tl.load(cell, mask=ok, other=0.0).to(tl.float32)
        tl.store(cell, acc.to(S.dtype.element_ty), mask=ok)
        acc = acc * keep + own
        if SCALED:
            own_z = tl.load(Z + at * D + rows, mask=rows < D, other=0.0)
            tl.store(Z + at * D + rows, z, mask=rows < D)
            z = z * keep + own_z


@triton.jit
def entering(
    S, Z, T, at, segment_at, cell, in_cell, d,
    D: tl.constexpr, DV: tl.constexpr, SCALED: tl.constexpr, JOINED: tl.constexpr,
):  # fmt: skip
    """The state (BD, BDV) and (BD,), float32, that enters a block: of its segment, plus of the segments before that one where JOINED."""
    s = tl.load(S + at * (D * DV) + cell, mask=in_cell, other=0.0).to(tl.float32)
    z = tl.zeros((cell.shape[0],), tl.float32)
    if SCALED:
        z = tl.load(Z + at * D + d, mask=d < D, other=0.0)
    if JOINED:
        far = tl.exp2(tl.load(T + at))
        s += far * tl.load(S + segment_at * (D * DV) + cell, mask=in_cell, other=0.0).to(tl.float32)
        if SCALED:
            z += far * tl.load(Z + segment_at * D + d, mask=d < D, other=0.0)
    return s, z
