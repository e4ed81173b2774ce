"""Kernel: the outputs, block by block from left to right, the state from the left carried along, that from the right read."""

import triton
import triton.language as tl

from lba_exp.ops.fused.states import factor, whole_factor


@triton.jit
def outputs_kernel(
    Q, K, V, MASK, HIGH, LOW, TOTALS, S, Z, T, SEG, SEG_Z, OUT, DEN,
    sqb, sql, sqh, skb, skl, skh, svb, svl, svh, smb, sob, sol, soh,
    length, H, NB, NSEG, blocks_per_segment, weight, eps,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, CB: tl.constexpr, BT: tl.constexpr,
    SCALED: tl.constexpr, DIVIDED: tl.constexpr, MASKED: tl.constexpr, WEIGHTED: tl.constexpr,
    FORWARD: tl.constexpr, BACKWARD: tl.constexpr,
    STATES: tl.constexpr, JOINED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """OUT (B, L, H, DV), num / (den + eps) where DIVIDED, else num; DEN (B, H, L) where SCALED; one program a segment of blocks.

    A row reads the tokens of its block, the state that entered the block from the left, and the one from the right (``states_kernel``).
    Grid (H NSEG B,), heads fastest.
    """
    pid = tl.program_id(0)
    h = pid % H
    segment = (pid // H) % NSEG
    b = (pid // H // NSEG).to(tl.int64)
    bh = b * H + h
    BH = tl.num_programs(0) // NSEG
    d = tl.arange(0, BD)
    dv = tl.arange(0, BDV)
    rows = tl.arange(0, CB)
    r = tl.arange(0, BT)
    in_d = d < D
    in_dv = dv < DV
    cell = d[:, None] * DV + dv[None, :]
    in_cell = in_d[:, None] & in_dv[None, :]
    first = segment * blocks_per_segment
    last = tl.minimum(first + blocks_per_segment, NB)
    zero = tl.zeros((), tl.int64)
    s = tl.zeros((BD, BDV), tl.float32)
    z = tl.zeros((BD,), tl.float32)
    seg_z = z
    if JOINED:
        at = bh * NSEG + segment
        if FORWARD:
            s = tl.load(SEG + at * (D * DV) + cell, mask=in_cell, other=0.0)
            if SCALED:
                z = tl.load(SEG_Z + at * D + d, mask=in_d, other=0.0)
        at += BH * NSEG
        if BACKWARD:
            seg = tl.load(SEG + at * (D * DV) + cell, mask=in_cell, other=0.0).to(COMPUTE)
            if SCALED:
                seg_z = tl.load(SEG_Z + at * D + d, mask=in_d, other=0.0)
    for block in range(first, last):
        start = zero + block * CB
        ok = start + rows < length
        real = ok
        if MASKED:
            real = ok & (tl.load(MASK + b * smb + start + rows, mask=ok, other=0) != 0)
        q = tl.load(Q + b * sqb + h * sqh + start * sql + (rows[:, None] * sql + d[None, :]), mask=real[:, None] & in_d[None, :], other=0.0)
        q = q.to(COMPUTE)
        a = bh * (NB * CB) + start
        c = (BH + bh) * (NB * CB) + start
        a_row = tl.load(HIGH + a + rows)
        c_row = tl.load(HIGH + c + rows)
        a_row_low = tl.load(LOW + a + rows) if EXACT else a_row
        c_row_low = tl.load(LOW + c + rows) if EXACT else c_row
        a_whole = tl.load(TOTALS + bh * NB + block)
        c_whole = tl.load(TOTALS + (BH + bh) * NB + block)
        a_whole_low = tl.load(TOTALS + (2 * BH + bh) * NB + block)
        c_whole_low = tl.load(TOTALS + (3 * BH + bh) * NB + block)
        num = tl.zeros((CB, BDV), tl.float32)
        den = tl.zeros((CB,), tl.float32)
        if STATES:
            from_left = factor(a_row, a_row_low, 0.0, 0.0, EXACT)
            from_right = factor(c_whole, c_whole_low, c_row, c_row_low, EXACT)
            if FORWARD:
                num = tl.dot(q, s.to(COMPUTE), input_precision=PRECISION) * from_left[:, None]
            if BACKWARD:
                state = bh * NB + block
                right = tl.load(S + state * (D * DV) + cell, mask=in_cell, other=0.0)
                num += tl.dot(q, right.to(COMPUTE), input_precision=PRECISION) * from_right[:, None]
                if JOINED:
                    far = tl.exp2(tl.load(T + state))
                    num += tl.dot(q, seg, input_precision=PRECISION) * (from_right * far)[:, None]
            if SCALED:
                if FORWARD:
                    den += tl.sum(q.to(tl.float32) * z[None, :], 1) * from_left
                    z = z * whole_factor(a_whole, a_whole_low, EXACT)
                if BACKWARD:
                    right_z = tl.load(Z + state * D + d, mask=in_d, other=0.0)
                    if JOINED:
                        right_z += seg_z * far
                    den += tl.sum(q.to(tl.float32) * right_z[None, :], 1) * from_right
            if FORWARD:
                s = s * whole_factor(a_whole, a_whole_low, EXACT)
        for i in tl.static_range(0, CB, BT):
            cols = i + r
            ok_k = start + cols < length
            if MASKED:
                ok_k = ok_k & (tl.load(MASK + b * smb + start + cols, mask=ok_k, other=0) != 0)
            in_k = ok_k[:, None] & in_d[None, :]
            k = tl.load(K + b * skb + h * skh + start * skl + (cols[:, None] * skl + d[None, :]), mask=in_k, other=0.0)
            in_v = ok_k[:, None] & in_dv[None, :]
            v = tl.load(V + b * svb + h * svh + start * svl + (cols[:, None] * svl + dv[None, :]), mask=in_v, other=0.0)
            k_t = tl.trans(k.to(COMPUTE))
            a_col = tl.load(HIGH + a + cols)
            c_col = tl.load(HIGH + c + cols)
            p = tl.dot(q, k_t, input_precision=PRECISION)
            below = rows[:, None] > cols[None, :]
            e = tl.where(below, a_row[:, None] - a_col[None, :], c_col[None, :] - c_row[:, None])
            if EXACT:
                a_col_low = tl.load(LOW + a + cols)
                c_col_low = tl.load(LOW + c + cols)
                e += tl.where(below, a_row_low[:, None] - a_col_low[None, :], c_col_low[None, :] - c_row_low[:, None])
            else:
                a_col_low = a_col
            p *= tl.exp2(e)  # on the diagonal e is 0
            if WEIGHTED:
                p = tl.where(rows[:, None] == cols[None, :], p * weight, p)
            if not FORWARD:
                p = tl.where(below, 0.0, p)
            if not BACKWARD:
                p = tl.where(rows[:, None] < cols[None, :], 0.0, p)
            if SCALED:
                den += tl.sum(p, 1)
            num = tl.dot(p.to(COMPUTE), v.to(COMPUTE), num, input_precision=PRECISION)
            if STATES and FORWARD:
                onto = factor(a_whole, a_whole_low, a_col, a_col_low, EXACT)
                s = tl.dot(k_t, (v.to(tl.float32) * onto[:, None]).to(COMPUTE), s, input_precision=PRECISION)
                if SCALED:
                    z += tl.sum(k.to(tl.float32) * onto[:, None], 0)
        if SCALED:
            if MASKED:
                den = tl.where(real, den, 0.0)
            tl.store(DEN + bh * length + start + rows, den, mask=ok)
            if DIVIDED:
                if MASKED:
                    den = tl.where(real, den, 1.0)
                num = num * (1.0 / (den + eps))[:, None]
        out = OUT + b * sob + h * soh + start * sol + (rows[:, None] * sol + dv[None, :])
        tl.store(out, num.to(OUT.dtype.element_ty), mask=ok[:, None] & in_dv[None, :])
