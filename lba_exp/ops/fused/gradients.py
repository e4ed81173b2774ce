"""Kernels: the gradients of a block of tokens, from the block itself, the states that enter it and their adjoints.

A step's decay gets the pairs of tokens that it lies between: pairs inside the block (a triangle of ones times their products, nothing is
taken back), pairs with one end in it, and pairs around it (the state times its adjoint).
"""

import triton
import triton.language as tl

from lba_exp.ops.fused.states import factor, whole_factor


@triton.jit
def _entering(
    S, Z, T, SEG, SEG_Z, state, at, cell, in_cell, d,
    D: tl.constexpr, DV: tl.constexpr, SCALED: tl.constexpr, JOINED: tl.constexpr,
):  # fmt: skip
    """What enters a block from one side, (BD, BDV) and (BD,), float32: of its segment, plus of those beyond where JOINED."""
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
def _decays(
    high_f, low_f, high_g, low_g, weight,
    WEIGHTED: tl.constexpr, FORWARD: tl.constexpr, BACKWARD: tl.constexpr, EXACT: tl.constexpr, CB: tl.constexpr, KEYS_FIRST: tl.constexpr,
):  # fmt: skip
    """The decays between the tokens of a block, (CB, CB), with queries as rows, or keys where KEYS_FIRST."""
    n = tl.arange(0, CB)
    a = tl.load(high_f + n)
    c = tl.load(high_g + n)
    below = n[:, None] > n[None, :]
    above = n[:, None] < n[None, :]
    if KEYS_FIRST:
        below, above = above, below
        e = tl.where(below, a[None, :] - a[:, None], c[:, None] - c[None, :])
    else:
        e = tl.where(below, a[:, None] - a[None, :], c[None, :] - c[:, None])
    if EXACT:
        a = tl.load(low_f + n)
        c = tl.load(low_g + n)
        if KEYS_FIRST:
            e += tl.where(below, a[None, :] - a[:, None], c[:, None] - c[None, :])
        else:
            e += tl.where(below, a[:, None] - a[None, :], c[None, :] - c[:, None])
    m = tl.exp2(e)  # on the diagonal e is 0
    if WEIGHTED:
        m = tl.where(below | above, m, weight)
    if not FORWARD:
        m = tl.where(below, 0.0, m)
    if not BACKWARD:
        m = tl.where(above, 0.0, m)
    return m


@triton.jit
def queries_gradient_kernel(
    Q, K, V, GRAD, DEN, OUT, DOT, MASK, HIGH, LOW, TOTALS, S, Z, T, SEG, SEG_Z, A, AZ, AT, ASEG, ASEG_Z, DQ, DF, DG,
    sqb, sql, sqh, skb, skl, skh, svb, svl, svh, sgb, sgl, sgh, sob, sol, soh, smb,
    length, H, NB, NSEG, blocks_per_segment, weight, eps,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, CB: tl.constexpr,
    SCALED: tl.constexpr, DIVIDED: tl.constexpr, MASKED: tl.constexpr, WEIGHTED: tl.constexpr,
    FORWARD: tl.constexpr, BACKWARD: tl.constexpr,
    NEED_F: tl.constexpr, NEED_G: tl.constexpr,
    STATES: tl.constexpr, JOINED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """DQ, (B, L, H, D) contiguous, and DF, DG, (B, H, L) float32, but for the pairs with the key in the block and the query beyond it.

    GRAD: the gradient of the output (B, L, H, DV) by strides; with DIVIDED its numerator's is GRAD / (den + eps), and DOT, the
    denominator's, is read where STATES made it, else made from OUT and kept in DOT. S, Z, T, SEG, SEG_Z: of ``states_kernel`` with two
    walks; A, ...: of the adjoints. Grid (H NB B,), heads fastest.
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
    n = tl.arange(0, CB)
    ok = n < (length - start).to(tl.int32)
    real = ok
    if MASKED:
        real = ok & (tl.load(MASK + b * smb + start + n, mask=ok, other=0) != 0)
    in_d = real[:, None] & (d < D)[None, :]
    in_dv = real[:, None] & (dv < DV)[None, :]
    q = tl.load(Q + b * sqb + h * sqh + start * sql + (n[:, None] * sql + d[None, :]), mask=in_d, other=0.0).to(COMPUTE)
    k = tl.load(K + b * skb + h * skh + start * skl + (n[:, None] * skl + d[None, :]), mask=in_d, other=0.0).to(COMPUTE)
    v = tl.load(V + b * svb + h * svh + start * svl + (n[:, None] * svl + dv[None, :]), mask=in_dv, other=0.0).to(COMPUTE)
    grad = tl.load(GRAD + b * sgb + h * sgh + start * sgl + (n[:, None] * sgl + dv[None, :]), mask=in_dv, other=0.0)
    at_row = bh * length + start + n
    dot = tl.zeros((CB,), tl.float32)
    if DIVIDED:
        grad = grad.to(tl.float32) * (1.0 / (tl.load(DEN + at_row, mask=real, other=1.0) + eps))[:, None]
    grad = grad.to(COMPUTE)
    if SCALED:
        if DIVIDED and not STATES:
            out = tl.load(OUT + b * sob + h * soh + start * sol + (n[:, None] * sol + dv[None, :]), mask=in_dv, other=0.0)
            dot = -tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
            tl.store(DOT + at_row, dot, mask=ok)
        else:
            dot = tl.load(DOT + at_row, mask=real, other=0.0)
    high_f = HIGH + bh * (NB * CB) + start
    low_f = LOW + bh * (NB * CB) + start
    high_g = high_f + BH * (NB * CB)
    low_g = low_f + BH * (NB * CB)
    m = _decays(high_f, low_f, high_g, low_g, weight, WEIGHTED, FORWARD, BACKWARD, EXACT, CB, False)
    t = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
    if SCALED:
        t += dot[:, None]
    t *= m
    dq = tl.dot(t.to(COMPUTE), k, input_precision=PRECISION)
    df = tl.zeros((CB,), tl.float32)
    dg = tl.zeros((CB,), tl.float32)
    if NEED_F or NEED_G:
        t *= tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if NEED_F:
            below = n[:, None] > n[None, :]
            x = tl.dot((n[None, :] >= n[:, None]).to(COMPUTE), tl.where(below, t, 0.0).to(COMPUTE), input_precision=PRECISION)
            df += tl.sum(tl.where(below, x, 0.0), 1)
        if NEED_G:
            above = n[:, None] < n[None, :]
            x = tl.dot((n[None, :] <= n[:, None]).to(COMPUTE), tl.where(above, t, 0.0).to(COMPUTE), input_precision=PRECISION)
            dg += tl.sum(tl.where(above, x, 0.0), 1)
    if STATES:
        cell = d[:, None] * DV + dv[None, :]
        in_cell = (d < D)[:, None] & (dv < DV)[None, :]
        segment = block // blocks_per_segment
        right = bh * NB + block  # what came from the right, then what came from the left
        left = (BH + bh) * NB + block
        at_left = bh * NSEG + segment
        at_right = (BH + bh) * NSEG + segment
        if FORWARD:
            whole = tl.load(TOTALS + bh * NB + block)
            whole_low = tl.load(TOTALS + (2 * BH + bh) * NB + block)
            s, z = _entering(S, Z, T, SEG, SEG_Z, left, at_left, cell, in_cell, d, D, DV, SCALED, JOINED)
            part = tl.dot(grad, tl.trans(s.to(COMPUTE)), input_precision=PRECISION)
            if SCALED:
                part += dot[:, None] * z[None, :]
            part *= factor(tl.load(high_f + n), tl.load(low_f + n) if EXACT else 0.0, 0.0, 0.0, EXACT)[:, None]
            dq += part
            if NEED_F:
                o, oz = _entering(A, AZ, AT, ASEG, ASEG_Z, right, at_right, cell, in_cell, d, D, DV, SCALED, JOINED)
                around = tl.sum(tl.sum(s * o, 1), 0) + tl.sum(z * oz, 0)
                df += around * whole_factor(whole, whole_low, EXACT) + tl.cumsum(tl.sum(q.to(tl.float32) * part, 1), 0, reverse=True)
        if BACKWARD:
            whole = tl.load(TOTALS + (BH + bh) * NB + block)
            whole_low = tl.load(TOTALS + (3 * BH + bh) * NB + block)
            s, z = _entering(S, Z, T, SEG, SEG_Z, right, at_right, cell, in_cell, d, D, DV, SCALED, JOINED)
            part = tl.dot(grad, tl.trans(s.to(COMPUTE)), input_precision=PRECISION)
            if SCALED:
                part += dot[:, None] * z[None, :]
            part *= factor(whole, whole_low, tl.load(high_g + n), tl.load(low_g + n) if EXACT else 0.0, EXACT)[:, None]
            dq += part
            if NEED_G:
                o, oz = _entering(A, AZ, AT, ASEG, ASEG_Z, left, at_left, cell, in_cell, d, D, DV, SCALED, JOINED)
                around = tl.sum(tl.sum(s * o, 1), 0) + tl.sum(z * oz, 0)
                dg += around * whole_factor(whole, whole_low, EXACT) + tl.cumsum(tl.sum(q.to(tl.float32) * part, 1), 0)
    at = ((b * length + start) * H + h) * D + (n[:, None] * (H * D) + d[None, :])
    tl.store(DQ + at, dq.to(DQ.dtype.element_ty), mask=ok[:, None] & (d < D)[None, :])
    if NEED_F:
        tl.store(DF + at_row, df, mask=ok)
    if NEED_G:
        tl.store(DG + at_row, dg, mask=ok)


@triton.jit
def keys_gradient_kernel(
    Q, K, V, GRAD, DEN, DOT, MASK, HIGH, LOW, TOTALS, A, AZ, AT, ASEG, ASEG_Z, DK, DV_, DF, DG,
    sqb, sql, sqh, skb, skl, skh, svb, svl, svh, sgb, sgl, sgh, smb,
    length, H, NB, NSEG, blocks_per_segment, weight, eps,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, CB: tl.constexpr,
    SCALED: tl.constexpr, DIVIDED: tl.constexpr, MASKED: tl.constexpr, WEIGHTED: tl.constexpr,
    FORWARD: tl.constexpr, BACKWARD: tl.constexpr,
    NEED_F: tl.constexpr, NEED_G: tl.constexpr,
    STATES: tl.constexpr, JOINED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """DK and DV_, contiguous; what is missing in DF and DG is added. After ``queries_gradient_kernel``, arguments and grid as there."""
    pid = tl.program_id(0)
    h = pid % H
    block = (pid // H) % NB
    b = (pid // H // NB).to(tl.int64)
    bh = b * H + h
    BH = tl.num_programs(0) // NB
    start = block.to(tl.int64) * CB
    d = tl.arange(0, BD)
    dv = tl.arange(0, BDV)
    n = tl.arange(0, CB)
    ok = n < (length - start).to(tl.int32)
    real = ok
    if MASKED:
        real = ok & (tl.load(MASK + b * smb + start + n, mask=ok, other=0) != 0)
    in_d = real[:, None] & (d < D)[None, :]
    in_dv = real[:, None] & (dv < DV)[None, :]
    q = tl.load(Q + b * sqb + h * sqh + start * sql + (n[:, None] * sql + d[None, :]), mask=in_d, other=0.0).to(COMPUTE)
    k = tl.load(K + b * skb + h * skh + start * skl + (n[:, None] * skl + d[None, :]), mask=in_d, other=0.0).to(COMPUTE)
    v = tl.load(V + b * svb + h * svh + start * svl + (n[:, None] * svl + dv[None, :]), mask=in_dv, other=0.0).to(COMPUTE)
    grad = tl.load(GRAD + b * sgb + h * sgh + start * sgl + (n[:, None] * sgl + dv[None, :]), mask=in_dv, other=0.0)
    at_row = bh * length + start + n
    if DIVIDED:
        grad = grad.to(tl.float32) * (1.0 / (tl.load(DEN + at_row, mask=real, other=1.0) + eps))[:, None]
    grad = grad.to(COMPUTE)
    high_f = HIGH + bh * (NB * CB) + start
    low_f = LOW + bh * (NB * CB) + start
    high_g = high_f + BH * (NB * CB)
    low_g = low_f + BH * (NB * CB)
    m = _decays(high_f, low_f, high_g, low_g, weight, WEIGHTED, FORWARD, BACKWARD, EXACT, CB, True)
    p = tl.dot(k, tl.trans(q), input_precision=PRECISION) * m
    dv_ = tl.dot(p.to(COMPUTE), grad, input_precision=PRECISION)
    t = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
    if SCALED:
        t += tl.load(DOT + at_row, mask=real, other=0.0)[None, :]
    dk = tl.dot((t * m).to(COMPUTE), q, input_precision=PRECISION)
    if STATES:
        cell = d[:, None] * DV + dv[None, :]
        in_cell = (d < D)[:, None] & (dv < DV)[None, :]
        segment = block // blocks_per_segment
        if FORWARD:  # the keys of this block were read by all that comes after it
            s, z = _entering(A, AZ, AT, ASEG, ASEG_Z, bh * NB + block, (BH + bh) * NSEG + segment, cell, in_cell, d, D, DV, SCALED, JOINED)
            s = s.to(COMPUTE)
            whole = tl.load(TOTALS + bh * NB + block)
            whole_low = tl.load(TOTALS + (2 * BH + bh) * NB + block)
            onto = factor(whole, whole_low, tl.load(high_f + n), tl.load(low_f + n) if EXACT else 0.0, EXACT)
            part = tl.dot(v, tl.trans(s), input_precision=PRECISION)
            if SCALED:
                part += z[None, :]
            part *= onto[:, None]
            dk += part
            dv_ += tl.dot(k, s, input_precision=PRECISION) * onto[:, None]
            if NEED_F:
                column = tl.sum(k.to(tl.float32) * part, 1)
                tl.store(DF + at_row, tl.load(DF + at_row, mask=ok, other=0.0) + (tl.cumsum(column, 0) - column), mask=ok)
        if BACKWARD:  # and by all that comes before it
            s, z = _entering(A, AZ, AT, ASEG, ASEG_Z, (BH + bh) * NB + block, bh * NSEG + segment, cell, in_cell, d, D, DV, SCALED, JOINED)
            s = s.to(COMPUTE)
            onto = factor(tl.load(high_g + n), tl.load(low_g + n) if EXACT else 0.0, 0.0, 0.0, EXACT)
            part = tl.dot(v, tl.trans(s), input_precision=PRECISION)
            if SCALED:
                part += z[None, :]
            part *= onto[:, None]
            dk += part
            dv_ += tl.dot(k, s, input_precision=PRECISION) * onto[:, None]
            if NEED_G:
                column = tl.sum(k.to(tl.float32) * part, 1)
                later = tl.cumsum(column, 0, reverse=True) - column
                tl.store(DG + at_row, tl.load(DG + at_row, mask=ok, other=0.0) + later, mask=ok)
    if MASKED:
        dk = tl.where(real[:, None], dk, 0.0)
    at = (b * length + start) * H + h
    tl.store(DK + at * D + (n[:, None] * (H * D) + d[None, :]), dk.to(DK.dtype.element_ty), mask=ok[:, None] & (d < D)[None, :])
    tl.store(DV_ + at * DV + (n[:, None] * (H * DV) + dv[None, :]), dv_.to(DV_.dtype.element_ty), mask=ok[:, None] & (dv < DV)[None, :])
