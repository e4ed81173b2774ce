"""Kernel: the gradients, block by block from left to right, what goes from left to right carried along, what goes the other way read."""

import triton
import triton.language as tl

from lba_exp.ops.fused.states import factor, whole_factor


@triton.jit
def _from_right(S, Z, T, SEG, SEG_Z, state, at, cell, in_cell, d, D: tl.constexpr, DV: tl.constexpr, SCALED: tl.constexpr, JOINED: tl.constexpr):
    """What enters a block from the right, (BD, BDV) and (BD,), float32: of its segment, plus of those after it where JOINED."""
    s = tl.load(S + state * (D * DV) + cell, mask=in_cell, other=0.0).to(tl.float32)
    z = tl.zeros((cell.shape[0],), tl.float32)
    if SCALED:
        z = tl.load(Z + state * D + d, mask=d < D, other=0.0)
    if JOINED:
        far = tl.exp2(tl.load(T + state))
        s += far * tl.load(SEG + at * (D * DV) + cell, mask=in_cell, other=0.0)
        if SCALED:
            z += far * tl.load(SEG_Z + at * D + d, mask=d < D, other=0.0)
    return s, z


@triton.jit
def gradients_kernel(
    Q, K, V, GRAD, DEN, OUT, DOT, MASK, HIGH, LOW, TOTALS, S, Z, T, SEG, SEG_Z, A, AZ, AT, ASEG, ASEG_Z, DQ, DK, DV_, DF, DG,
    sqb, sql, sqh, skb, skl, skh, svb, svl, svh, sgb, sgl, sgh, sob, sol, soh, smb,
    length, H, NB, NSEG, blocks_per_segment, weight, eps,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, CB: tl.constexpr, BT: tl.constexpr,
    SCALED: tl.constexpr, DIVIDED: tl.constexpr, MASKED: tl.constexpr, WEIGHTED: tl.constexpr, FORWARD: tl.constexpr, BACKWARD: tl.constexpr,
    NEED_F: tl.constexpr, NEED_G: tl.constexpr,
    STATES: tl.constexpr, JOINED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Gradients of q, k, v, (B, L, H, D or DV) contiguous, and of the steps' log decays DF, DG, (B, H, L) float32; a program a segment.

    GRAD: the gradient of the output (B, L, H, DV) by strides; with DIVIDED its numerator's is GRAD / (den + eps), and DOT, the
    denominator's, is read where STATES made it, else made from OUT. S, Z, T, SEG, SEG_Z: of ``states_kernel``; A, ...: of the adjoints.
    A step's decay gets the pairs of tokens that it lies between: pairs inside the block (a triangle of ones times their products, nothing
    is taken back), pairs with one end in it, and pairs around it (the state times its adjoint). Grid (H NSEG B,), heads fastest.
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
    at_left = bh * NSEG + segment
    at_right = (BH + bh) * NSEG + segment
    # from the left: the state of the forward decays, and the adjoint of the backward ones
    s = tl.zeros((BD, BDV), tl.float32)
    z = tl.zeros((BD,), tl.float32)
    adjoint = tl.zeros((BD, BDV), tl.float32)
    adjoint_z = tl.zeros((BD,), tl.float32)
    if JOINED:
        if FORWARD:
            s = tl.load(SEG + at_left * (D * DV) + cell, mask=in_cell, other=0.0)
        if BACKWARD:
            adjoint = tl.load(ASEG + at_left * (D * DV) + cell, mask=in_cell, other=0.0)
        if SCALED and FORWARD:
            z = tl.load(SEG_Z + at_left * D + d, mask=in_d, other=0.0)
        if SCALED and BACKWARD:
            adjoint_z = tl.load(ASEG_Z + at_left * D + d, mask=in_d, other=0.0)
    for block in range(first, last):
        start = zero + block * CB
        state = bh * NB + block
        ok = start + rows < length
        real = ok
        if MASKED:
            real = ok & (tl.load(MASK + b * smb + start + rows, mask=ok, other=0) != 0)
        in_q = real[:, None] & in_d[None, :]
        in_grad = real[:, None] & in_dv[None, :]
        q = tl.load(Q + b * sqb + h * sqh + start * sql + (rows[:, None] * sql + d[None, :]), mask=in_q, other=0.0).to(COMPUTE)
        grad = tl.load(GRAD + b * sgb + h * sgh + start * sgl + (rows[:, None] * sgl + dv[None, :]), mask=in_grad, other=0.0)
        at_row = bh * length + start + rows
        dot = tl.zeros((CB,), tl.float32)
        if SCALED:
            if DIVIDED:
                grad = grad.to(tl.float32) * (1.0 / (tl.load(DEN + at_row, mask=real, other=1.0) + eps))[:, None]
            if DIVIDED and not STATES:
                out = tl.load(OUT + b * sob + h * soh + start * sol + (rows[:, None] * sol + dv[None, :]), mask=in_grad, other=0.0)
                dot = -tl.sum(grad * out.to(tl.float32), 1)
            else:
                dot = tl.load(DOT + at_row, mask=real, other=0.0)
        grad = grad.to(COMPUTE)
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
        dq = tl.zeros((CB, BD), tl.float32)
        df = tl.zeros((CB,), tl.float32)
        dg = tl.zeros((CB,), tl.float32)
        if STATES:
            # the rows of this block read what entered it; and the pairs around it
            if FORWARD:
                right, right_z = _from_right(A, AZ, AT, ASEG, ASEG_Z, state, at_right, cell, in_cell, d, D, DV, SCALED, JOINED)
                part = tl.dot(grad, tl.trans(s.to(COMPUTE)), input_precision=PRECISION)
                if SCALED:
                    part += dot[:, None] * z[None, :]
                part *= factor(a_row, a_row_low, 0.0, 0.0, EXACT)[:, None]
                dq += part
                keep = whole_factor(a_whole, a_whole_low, EXACT)
                if NEED_F:
                    df += tl.sum(tl.sum(s * right, 1), 0) * keep
                    if SCALED:
                        df += tl.sum(z * right_z, 0) * keep
                    df += tl.cumsum(tl.sum(q.to(tl.float32) * part, 1), 0, reverse=True)
                right = right.to(COMPUTE)
                s = s * keep
                z = z * keep
            if BACKWARD:
                left, left_z = _from_right(S, Z, T, SEG, SEG_Z, state, at_right, cell, in_cell, d, D, DV, SCALED, JOINED)
                part = tl.dot(grad, tl.trans(left.to(COMPUTE)), input_precision=PRECISION)
                if SCALED:
                    part += dot[:, None] * left_z[None, :]
                into = factor(c_whole, c_whole_low, c_row, c_row_low, EXACT)
                part *= into[:, None]
                dq += part
                keep = whole_factor(c_whole, c_whole_low, EXACT)
                if NEED_G:
                    dg += tl.sum(tl.sum(left * adjoint, 1), 0) * keep
                    if SCALED:
                        dg += tl.sum(left_z * adjoint_z, 0) * keep
                    dg += tl.cumsum(tl.sum(q.to(tl.float32) * part, 1), 0)
                came, came_z = adjoint.to(COMPUTE), adjoint_z
                adjoint = adjoint * keep
                adjoint = tl.dot(tl.trans(q), (grad.to(tl.float32) * into[:, None]).to(COMPUTE), adjoint, input_precision=PRECISION)
                if SCALED:
                    adjoint_z = adjoint_z * keep + tl.sum(q.to(tl.float32) * (into * dot)[:, None], 0)
        if NEED_F:
            after = (rows[None, :] >= rows[:, None]).to(COMPUTE)
        if NEED_G:
            before = (rows[None, :] <= rows[:, None]).to(COMPUTE)
        for i in tl.static_range(0, CB, BT):
            cols = i + r
            in_k = start + cols < length
            ok_k = in_k
            if MASKED:
                ok_k = ok_k & (tl.load(MASK + b * smb + start + cols, mask=ok_k, other=0) != 0)
            k = tl.load(K + b * skb + h * skh + start * skl + (cols[:, None] * skl + d[None, :]), mask=ok_k[:, None] & in_d[None, :], other=0.0)
            v = tl.load(V + b * svb + h * svh + start * svl + (cols[:, None] * svl + dv[None, :]), mask=ok_k[:, None] & in_dv[None, :], other=0.0)
            k = k.to(COMPUTE)
            v = v.to(COMPUTE)
            a_col = tl.load(HIGH + a + cols)
            c_col = tl.load(HIGH + c + cols)
            a_col_low = tl.load(LOW + a + cols) if EXACT else a_col
            c_col_low = tl.load(LOW + c + cols) if EXACT else c_col
            below = rows[:, None] > cols[None, :]
            above = rows[:, None] < cols[None, :]
            e = tl.where(below, a_row[:, None] - a_col[None, :], c_col[None, :] - c_row[:, None])
            if EXACT:
                e += tl.where(below, a_row_low[:, None] - a_col_low[None, :], c_col_low[None, :] - c_row_low[:, None])
            m = tl.exp2(e)
            if WEIGHTED:
                m = tl.where(below | above, m, weight)
            if not FORWARD:
                m = tl.where(below, 0.0, m)
            if not BACKWARD:
                m = tl.where(above, 0.0, m)
            p = tl.dot(q, tl.trans(k), input_precision=PRECISION) * m
            t = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
            if SCALED:
                t += dot[:, None]
            pairs = p * t
            t = (t * m).to(COMPUTE)
            dq = tl.dot(t, k, dq, input_precision=PRECISION)
            dk_t = tl.dot(tl.trans(q), t, input_precision=PRECISION)
            dv_t = tl.dot(tl.trans(grad), p.to(COMPUTE), input_precision=PRECISION)
            column_f = tl.zeros((BT,), tl.float32)
            column_g = tl.zeros((BT,), tl.float32)
            if STATES:
                # the columns of this block were read by all that comes after it, and all that comes before
                if FORWARD:
                    onto = factor(a_whole, a_whole_low, a_col, a_col_low, EXACT)
                    part_t = tl.dot(right, tl.trans(v), input_precision=PRECISION)
                    if SCALED:
                        part_t += right_z[:, None]
                    part_t *= onto[None, :]
                    dk_t += part_t
                    dv_t += tl.dot(tl.trans(right), tl.trans(k), input_precision=PRECISION) * onto[None, :]
                    if NEED_F:
                        column_f = tl.sum(tl.trans(k).to(tl.float32) * part_t, 0)
                    s = tl.dot(tl.trans(k), (v.to(tl.float32) * onto[:, None]).to(COMPUTE), s, input_precision=PRECISION)
                    if SCALED:
                        z += tl.sum(k.to(tl.float32) * onto[:, None], 0)
                if BACKWARD:
                    onto = factor(c_col, c_col_low, 0.0, 0.0, EXACT)
                    part_t = tl.dot(came, tl.trans(v), input_precision=PRECISION)
                    if SCALED:
                        part_t += came_z[:, None]
                    part_t *= onto[None, :]
                    dk_t += part_t
                    dv_t += tl.dot(tl.trans(came), tl.trans(k), input_precision=PRECISION) * onto[None, :]
                    if NEED_G:
                        column_g = tl.sum(tl.trans(k).to(tl.float32) * part_t, 0)
            if NEED_F:
                x = tl.dot(after, tl.where(below, pairs, 0.0).to(COMPUTE), input_precision=PRECISION) + column_f[None, :]
                df += tl.sum(tl.where(below, x, 0.0), 1)
            if NEED_G:
                x = tl.dot(before, tl.where(above, pairs, 0.0).to(COMPUTE), input_precision=PRECISION) + column_g[None, :]
                dg += tl.sum(tl.where(above, x, 0.0), 1)
            if MASKED:
                dk_t = tl.where(ok_k[None, :], dk_t, 0.0)
            at = (b * length + start) * H + h
            tl.store(DK + at * D + (cols[None, :] * (H * D) + d[:, None]), dk_t.to(DK.dtype.element_ty), mask=in_k[None, :] & in_d[:, None])
            tl.store(DV_ + at * DV + (cols[None, :] * (H * DV) + dv[:, None]), dv_t.to(DV_.dtype.element_ty), mask=in_k[None, :] & in_dv[:, None])
        at = (b * length + start) * H + h
        tl.store(DQ + at * D + (rows[:, None] * (H * D) + d[None, :]), dq.to(DQ.dtype.element_ty), mask=ok[:, None] & in_d[None, :])
        if NEED_F:
            tl.store(DF + at_row, df, mask=ok)
        if NEED_G:
            tl.store(DG + at_row, dg, mask=ok)
