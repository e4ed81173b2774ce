"""Kernel: the gradients of a block of tokens, from the block itself, the states that enter it and their adjoints."""

import triton
import triton.language as tl

from lba_exp.ops.fused.outputs import factor
from lba_exp.ops.fused.states import entering


@triton.jit
def gradients_kernel(
    Q, K, V, GRAD, DEN, OUT, DOT, MASK, HIGH, LOW, TOTALS, S, Z, T, A, AZ, AT, DQ, DK, DV_, DF, DG,
    sqb, sql, sqh, skb, skl, skh, svb, svl, svh, sgb, sgl, sgh, sob, sol, soh, smb,
    length, H, NB, NSEG, blocks_per_segment, weight, eps,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, CB: tl.constexpr, BT: tl.constexpr,
    SCALED: tl.constexpr, DIVIDED: tl.constexpr, MASKED: tl.constexpr, WEIGHTED: tl.constexpr, FORWARD: tl.constexpr, BACKWARD: tl.constexpr,
    NEED_F: tl.constexpr, NEED_G: tl.constexpr,
    STATES: tl.constexpr, JOINED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Gradients of q, k, v, (B, L, H, D or DV) contiguous, and of the steps' log decays DF, DG, (B, H, L) float32, for one block.

    GRAD: the gradient of the output (B, L, H, DV) by strides; with DIVIDED its numerator's is GRAD / (den + eps), and DOT, the
    denominator's, is read where STATES made it, else made from OUT. A step's decay gets the pairs of tokens that it lies between: pairs
    inside the block (a triangle of ones times their products, nothing is taken back), pairs with one end in it, and pairs around it
    (the state times its adjoint). Grid (H NB B,), heads fastest.
    """
    pid = tl.program_id(0)
    h = pid % H
    block = (pid // H) % NB
    b = (pid // H // NB).to(tl.int64)
    bh = b * H + h
    BH = tl.num_programs(0) // NB
    start = block.to(tl.int64) * CB
    d = tl.arange(0, BD)
    dv = tl.arange(0, BDV)
    rows = tl.arange(0, CB)
    r = tl.arange(0, BT)
    in_d = d < D
    in_dv = dv < DV
    left = (length - start).to(tl.int32)
    ok = rows < left
    real = ok
    if MASKED:
        real = ok & (tl.load(MASK + b * smb + start + rows, mask=ok, other=0) != 0)
    q = tl.load(Q + b * sqb + h * sqh + start * sql + (rows[:, None] * sql + d[None, :]), mask=real[:, None] & in_d[None, :], other=0.0)
    q = q.to(COMPUTE)
    grad = tl.load(
        GRAD + b * sgb + h * sgh + start * sgl + (rows[:, None] * sgl + dv[None, :]), mask=real[:, None] & in_dv[None, :], other=0.0
    )
    at_row = bh * length + start + rows
    dot = tl.zeros((CB,), tl.float32)
    if SCALED:
        if DIVIDED:
            grad = grad.to(tl.float32) * (1.0 / (tl.load(DEN + at_row, mask=real, other=1.0) + eps))[:, None]
        if DIVIDED and not STATES:
            out = tl.load(
                OUT + b * sob + h * soh + start * sol + (rows[:, None] * sol + dv[None, :]), mask=real[:, None] & in_dv[None, :], other=0.0
            )
            dot = -tl.sum(grad * out.to(tl.float32), 1)
        else:
            dot = tl.load(DOT + at_row, mask=real, other=0.0)
    grad = grad.to(COMPUTE)
    a_high = HIGH + bh * (NB * CB) + start
    a_low = LOW + bh * (NB * CB) + start
    c_high = HIGH + (BH + bh) * (NB * CB) + start
    c_low = LOW + (BH + bh) * (NB * CB) + start
    a_row = tl.load(a_high + rows)
    c_row = tl.load(c_high + rows)
    a_row_low = tl.zeros((CB,), tl.float32)
    c_row_low = tl.zeros((CB,), tl.float32)
    if EXACT:
        a_row_low = tl.load(a_low + rows)
        c_row_low = tl.load(c_low + rows)
    a_whole = tl.load(TOTALS + bh * NB + block)
    c_whole = tl.load(TOTALS + (BH + bh) * NB + block)
    a_whole_low = tl.load(TOTALS + (2 * BH + bh) * NB + block)
    c_whole_low = tl.load(TOTALS + (3 * BH + bh) * NB + block)
    dq = tl.zeros((CB, BD), tl.float32)
    df = tl.zeros((CB,), tl.float32)
    dg = tl.zeros((CB,), tl.float32)
    cell = d[:, None] * DV + dv[None, :]
    in_cell = in_d[:, None] & in_dv[None, :]
    segment = block // blocks_per_segment
    row_f = bh * (NB + NSEG)
    row_g = (BH + bh) * (NB + NSEG)

    if STATES:
        # the rows of this block read what entered it; and the pairs around it
        if FORWARD:
            s, z = entering(S, Z, T, row_f + block, row_f + NB + segment, cell, in_cell, d, D, DV, SCALED, JOINED)
            part = tl.dot(grad, tl.trans(s.to(COMPUTE)), input_precision=PRECISION)
            if SCALED:
                part += dot[:, None] * z[None, :]
            part *= factor(a_row, a_row_low, 0.0, 0.0, EXACT)[:, None]
            dq += part
            if NEED_F:
                adjoint, adjoint_z = entering(A, AZ, AT, row_g + block, row_g + NB + segment, cell, in_cell, d, D, DV, SCALED, JOINED)
                around = tl.sum(tl.sum(s * adjoint, 1), 0)
                if SCALED:
                    around += tl.sum(z * adjoint_z, 0)
                df += around * factor(a_whole, a_whole_low, 0.0, 0.0, EXACT)
                df += tl.cumsum(tl.sum(q.to(tl.float32) * part, 1), 0, reverse=True)
        if BACKWARD:
            s, z = entering(S, Z, T, row_g + block, row_g + NB + segment, cell, in_cell, d, D, DV, SCALED, JOINED)
            part = tl.dot(grad, tl.trans(s.to(COMPUTE)), input_precision=PRECISION)
            if SCALED:
                part += dot[:, None] * z[None, :]
            part *= factor(c_whole, c_whole_low, c_row, c_row_low, EXACT)[:, None]
            dq += part
            if NEED_G:
                adjoint, adjoint_z = entering(A, AZ, AT, row_f + block, row_f + NB + segment, cell, in_cell, d, D, DV, SCALED, JOINED)
                around = tl.sum(tl.sum(s * adjoint, 1), 0)
                if SCALED:
                    around += tl.sum(z * adjoint_z, 0)
                dg += around * factor(c_whole, c_whole_low, 0.0, 0.0, EXACT)
                dg += tl.cumsum(tl.sum(q.to(tl.float32) * part, 1), 0)

    if NEED_F:
        after = (rows[None, :] >= rows[:, None]).to(COMPUTE)
    if NEED_G:
        before = (rows[None, :] <= rows[:, None]).to(COMPUTE)
    for i in tl.static_range(0, CB, BT):
        cols = i + r
        ok_k = cols < left
        if MASKED:
            ok_k = ok_k & (tl.load(MASK + b * smb + start + cols, mask=ok_k, other=0) != 0)
        k = tl.load(
            K + b * skb + h * skh + start * skl + (cols[:, None] * skl + d[None, :]), mask=ok_k[:, None] & in_d[None, :], other=0.0
        ).to(COMPUTE)
        v = tl.load(
            V + b * svb + h * svh + start * svl + (cols[:, None] * svl + dv[None, :]), mask=ok_k[:, None] & in_dv[None, :], other=0.0
        ).to(COMPUTE)
        k_t = tl.trans(k)
        v_t = tl.trans(v)
        a_col = tl.load(a_high + cols)
        c_col = tl.load(c_high + cols)
        below = rows[:, None] > cols[None, :]
        above = rows[:, None] < cols[None, :]
        e = tl.where(below, a_row[:, None] - a_col[None, :], c_col[None, :] - c_row[:, None])
        a_col_low = tl.zeros((BT,), tl.float32)
        c_col_low = tl.zeros((BT,), tl.float32)
        if EXACT:
            a_col_low = tl.load(a_low + cols)
            c_col_low = tl.load(c_low + cols)
            e += tl.where(below, a_row_low[:, None] - a_col_low[None, :], c_col_low[None, :] - c_row_low[:, None])
        m = tl.exp2(e)
        if WEIGHTED:
            m = tl.where(below | above, m, weight)
        if not FORWARD:
            m = tl.where(below, 0.0, m)
        if not BACKWARD:
            m = tl.where(above, 0.0, m)
        scores = tl.dot(q, k_t, input_precision=PRECISION)
        t = tl.dot(grad, v_t, input_precision=PRECISION)
        if SCALED:
            t += dot[:, None]
        t *= m
        pairs = scores * t
        p = (scores * m).to(COMPUTE)
        t = t.to(COMPUTE)
        dq = tl.dot(t, k, dq, input_precision=PRECISION)
        dk_t = tl.dot(tl.trans(q), t, input_precision=PRECISION)
        dv_t = tl.dot(tl.trans(grad), p, input_precision=PRECISION)
        column_f = tl.zeros((BT,), tl.float32)
        column_g = tl.zeros((BT,), tl.float32)
        if STATES:
            # the columns of this block were read by all that comes after it, and all that comes before
            if FORWARD:
                s, z = entering(A, AZ, AT, row_g + block, row_g + NB + segment, cell, in_cell, d, D, DV, SCALED, JOINED)
                s = s.to(COMPUTE)
                o = factor(a_whole, a_whole_low, a_col, a_col_low, EXACT)
                part_t = tl.dot(s, v_t, input_precision=PRECISION)
                if SCALED:
                    part_t += z[:, None]
                part_t *= o[None, :]
                dk_t += part_t
                dv_t += tl.dot(tl.trans(s), k_t, input_precision=PRECISION) * o[None, :]
                if NEED_F:
                    column_f = tl.sum(k_t.to(tl.float32) * part_t, 0)
            if BACKWARD:
                s, z = entering(A, AZ, AT, row_f + block, row_f + NB + segment, cell, in_cell, d, D, DV, SCALED, JOINED)
                s = s.to(COMPUTE)
                o = factor(c_col, c_col_low, 0.0, 0.0, EXACT)
                part_t = tl.dot(s, v_t, input_precision=PRECISION)
                if SCALED:
                    part_t += z[:, None]
                part_t *= o[None, :]
                dk_t += part_t
                dv_t += tl.dot(tl.trans(s), k_t, input_precision=PRECISION) * o[None, :]
                if NEED_G:
                    column_g = tl.sum(k_t.to(tl.float32) * part_t, 0)
        if NEED_F:
            x = tl.dot(after, tl.where(below, pairs, 0.0).to(COMPUTE), input_precision=PRECISION) + column_f[None, :]
            df += tl.sum(tl.where(below, x, 0.0), 1)
        if NEED_G:
            x = tl.dot(before, tl.where(above, pairs, 0.0).to(COMPUTE), input_precision=PRECISION) + column_g[None, :]
            dg += tl.sum(tl.where(above, x, 0.0), 1)
        in_k = cols < left
        if MASKED:
            dk_t = tl.where(ok_k[None, :], dk_t, 0.0)
        at = (b * length + start) * H + h
        tl.store(DK + at * D + (cols[None, :] * (H * D) + d[:, None]), dk_t.to(DK.dtype.element_ty), mask=in_k[None, :] & in_d[:, None])
        tl.store(
            DV_ + at * DV + (cols[None, :] * (H * DV) + dv[:, None]), dv_t.to(DV_.dtype.element_ty), mask=in_k[None, :] & in_dv[:, None]
        )
    at = (b * length + start) * H + h
    tl.store(DQ + at * D + (rows[:, None] * (H * D) + d[None, :]), dq.to(DQ.dtype.element_ty), mask=ok[:, None] & in_d[None, :])
    if NEED_F:
        tl.store(DF + at_row, df, mask=ok)
    if NEED_G:
        tl.store(DG + at_row, dg, mask=ok)
