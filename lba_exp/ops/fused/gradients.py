"""Kernels: the gradients of a tile of tokens, from its block, the states that enter the block, and their adjoints.

A step's decay gets the pairs of tokens that it lies between, each counted where it is known and nothing taken back: pairs inside the tile
(a triangle of ones times their products), pairs with one end in the tile, and pairs around it. Of the last kind a tile leaves its own sums,
and ``around_kernel`` hands them to the tiles between.
"""

import triton
import triton.language as tl

from lba_exp.ops.fused.tiles import decays, factor, load_rows, load_sums, real_tokens, whole_factor


@triton.jit
def queries_gradient_kernel(
    Q, K, V, GRAD, DEN, OUT, DOT, MASK, HIGH, LOW, TOTALS, S, Z, A, AZ, DQ, DF, DG, PAIRS, ENDS, AROUND,
    sqb, sql, sqh, skb, skl, skh, svb, svl, svh, sgb, sgl, sgh, sob, sol, soh, smb, length, H, NB, weight, eps,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, CB: tl.constexpr, BT: tl.constexpr,
    SCALED: tl.constexpr, DIVIDED: tl.constexpr, MASKED: tl.constexpr, WEIGHTED: tl.constexpr,
    FORWARD: tl.constexpr, BACKWARD: tl.constexpr, NEED_F: tl.constexpr, NEED_G: tl.constexpr, STATES: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """DQ, (B, L, H, D) contiguous; DF, DG, (B, H, L) float32, but for the pairs with the key in the tile alone and those around it.

    GRAD: the gradient of the output (B, L, H, DV) by strides; with DIVIDED its numerator's is GRAD / (den + eps), and DOT, the
    denominator's, is read where STATES made it, else made from OUT and kept in DOT. S, Z and their adjoints A, AZ: as ``states_kernel`` and
    ``scan_kernel`` leave them. For ``around_kernel``: PAIRS (B H, tiles, CB / BT), the sums over each tile of queries and each tile of keys
    of its block; ENDS (4, B H, tiles), first and second, those over the pairs with keys left and right of the block; AROUND (2, B H, NB),
    those of pairs around the block, forward and backward. Grid (H tiles B,) of BT tokens, heads fastest.
    """
    QT: tl.constexpr = CB // BT
    tiles = NB * QT
    pid = tl.program_id(0)
    h = pid % H
    tile = (pid // H) % tiles
    b = (pid // H // tiles).to(tl.int64)
    block = tile // QT
    bh = b * H + h
    BH = tl.num_programs(0) // tiles
    d = tl.arange(0, BD)
    dv = tl.arange(0, BDV)
    n = tl.arange(0, BT)
    row = tile.to(tl.int64) * BT + n
    ok = row < length
    real = real_tokens(MASK, b, smb, row, ok, MASKED)
    q = load_rows(Q, b, h, row, sqb, sql, sqh, d, real, D).to(COMPUTE)
    grad = load_rows(GRAD, b, h, row, sgb, sgl, sgh, dv, real, DV).to(COMPUTE)
    token = bh * length + row
    dot = tl.zeros((BT,), tl.float32)
    scale = dot
    if DIVIDED:
        scale = 1.0 / (tl.load(DEN + token, mask=real, other=1.0) + eps)
    if SCALED:
        if DIVIDED and not STATES:
            out = load_rows(OUT, b, h, row, sob, sol, soh, dv, real, DV)
            dot = -scale * tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
            tl.store(DOT + token, dot, mask=ok)
        else:
            dot = tl.load(DOT + token, mask=real, other=0.0)
    a = bh * (NB * CB)
    c = (BH + bh) * (NB * CB)
    a_row, a_row_low = load_sums(HIGH, LOW, a + row, EXACT)
    c_row, c_row_low = load_sums(HIGH, LOW, c + row, EXACT)
    dq = tl.zeros((BT, BD), tl.float32)
    df = tl.zeros((BT,), tl.float32)
    dg = tl.zeros((BT,), tl.float32)
    if STATES:
        cell = d[:, None] * DV + dv[None, :]
        in_cell = (d < D)[:, None] & (dv < DV)[None, :]
        right = bh * NB + block
        left = (BH + bh) * NB + block
        if FORWARD:
            s = tl.load(S + left * (D * DV) + cell, mask=in_cell, other=0.0)
            part = tl.dot(grad, tl.trans(s), input_precision=PRECISION)
            if DIVIDED:
                part *= scale[:, None]
            if SCALED:
                part += dot[:, None] * tl.load(Z + left * D + d, mask=d < D, other=0.0)[None, :]
            part *= factor(a_row, a_row_low, 0.0, 0.0, EXACT)[:, None]
            dq += part
            if NEED_F:
                df = tl.sum(q.to(tl.float32) * part, 1)
                tl.store(ENDS + bh * tiles + tile, tl.sum(df, 0))
                if tile % QT == 0:
                    o = tl.load(A + right * (D * DV) + cell, mask=in_cell, other=0.0)
                    sum_all = tl.sum(tl.sum(s.to(tl.float32) * o.to(tl.float32), 1), 0)
                    if SCALED:
                        z = tl.load(Z + left * D + d, mask=d < D, other=0.0)
                        sum_all += tl.sum(z * tl.load(AZ + right * D + d, mask=d < D, other=0.0), 0)
                    keep = whole_factor(tl.load(TOTALS + right), tl.load(TOTALS + 2 * BH * NB + right), EXACT)
                    tl.store(AROUND + right, sum_all * keep)
        if BACKWARD:
            whole = tl.load(TOTALS + left)  # of the backward decays
            whole_low = tl.load(TOTALS + 2 * BH * NB + left)
            s = tl.load(S + right * (D * DV) + cell, mask=in_cell, other=0.0)
            part = tl.dot(grad, tl.trans(s), input_precision=PRECISION)
            if DIVIDED:
                part *= scale[:, None]
            if SCALED:
                part += dot[:, None] * tl.load(Z + right * D + d, mask=d < D, other=0.0)[None, :]
            part *= factor(whole, whole_low, c_row, c_row_low, EXACT)[:, None]
            dq += part
            if NEED_G:
                dg = tl.sum(q.to(tl.float32) * part, 1)
                tl.store(ENDS + (BH + bh) * tiles + tile, tl.sum(dg, 0))
                if tile % QT == 0:
                    o = tl.load(A + left * (D * DV) + cell, mask=in_cell, other=0.0)
                    sum_all = tl.sum(tl.sum(s.to(tl.float32) * o.to(tl.float32), 1), 0)
                    if SCALED:
                        z = tl.load(Z + right * D + d, mask=d < D, other=0.0)
                        sum_all += tl.sum(z * tl.load(AZ + left * D + d, mask=d < D, other=0.0), 0)
                    tl.store(AROUND + left, sum_all * whole_factor(whole, whole_low, EXACT))
    live = QT if STATES else tl.minimum(QT, tl.cdiv(length, BT))  # tiles of the block that are there
    for i in range(1, live):  # the other tiles of the block
        other = (tile + i) % live
        col = block.to(tl.int64) * CB + other * BT + n
        ok_k = real_tokens(MASK, b, smb, col, col < length, MASKED)
        k = load_rows(K, b, h, col, skb, skl, skh, d, ok_k, D).to(COMPUTE)
        v = load_rows(V, b, h, col, svb, svl, svh, dv, ok_k, DV).to(COMPUTE)
        a_col, a_col_low = load_sums(HIGH, LOW, a + col, EXACT)
        c_col, c_col_low = load_sums(HIGH, LOW, c + col, EXACT)
        t = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        if DIVIDED:
            t *= scale[:, None]
        if SCALED:
            t += dot[:, None]
        t *= decays(
            a_row[:, None], a_row_low[:, None], c_row[:, None], c_row_low[:, None],
            a_col[None, :], a_col_low[None, :], c_col[None, :], c_col_low[None, :],
            row[:, None], col[None, :], weight, False, FORWARD, BACKWARD, EXACT,
        )  # fmt: skip
        dq = tl.dot(t.to(COMPUTE), k, dq, input_precision=PRECISION)
        if NEED_F or NEED_G:
            sums = tl.sum(t * tl.dot(q, tl.trans(k), input_precision=PRECISION), 1)
            before = other < tile % QT
            df += tl.where(before, sums, 0.0)
            dg += tl.where(before, 0.0, sums)
            tl.store(PAIRS + (bh * tiles + tile) * QT + other, tl.sum(sums, 0))
    if NEED_F:
        df = tl.cumsum(df, 0, reverse=True)
    if NEED_G:
        dg = tl.cumsum(dg, 0)
    k = load_rows(K, b, h, row, skb, skl, skh, d, real, D).to(COMPUTE)
    v = load_rows(V, b, h, row, svb, svl, svh, dv, real, DV).to(COMPUTE)
    a_col, a_col_low = load_sums(HIGH, LOW, a + row, EXACT)
    c_col, c_col_low = load_sums(HIGH, LOW, c + row, EXACT)
    t = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
    if DIVIDED:
        t *= scale[:, None]
    if SCALED:
        t += dot[:, None]
    t *= decays(
        a_row[:, None], a_row_low[:, None], c_row[:, None], c_row_low[:, None],
        a_col[None, :], a_col_low[None, :], c_col[None, :], c_col_low[None, :],
        n[:, None], n[None, :], weight, WEIGHTED, FORWARD, BACKWARD, EXACT,
    )  # fmt: skip
    dq = tl.dot(t.to(COMPUTE), k, dq, input_precision=PRECISION)
    tl.store(
        DQ + ((b * length + row) * H + h)[:, None] * D + d[None, :], dq.to(DQ.dtype.element_ty), mask=ok[:, None] & (d < D)[None, :]
    )
    if NEED_F or NEED_G:
        t *= tl.dot(q, tl.trans(k), input_precision=PRECISION)
        t = t.to(COMPUTE)
        if NEED_F:
            x = tl.dot((n[:, None] <= n[None, :]).to(COMPUTE), t, input_precision=PRECISION)  # queries from the step on
            tl.store(DF + token, df + tl.sum(tl.where(n[:, None] > n[None, :], x, 0.0), 1), mask=ok)  # keys before it
        if NEED_G:
            x = tl.dot((n[:, None] >= n[None, :]).to(COMPUTE), t, input_precision=PRECISION)
            tl.store(DG + token, dg + tl.sum(tl.where(n[:, None] < n[None, :], x, 0.0), 1), mask=ok)


@triton.jit
def keys_gradient_kernel(
    Q, K, V, GRAD, DEN, DOT, MASK, HIGH, LOW, TOTALS, A, AZ, DK, DV_, DF, DG, ENDS,
    sqb, sql, sqh, skb, skl, skh, svb, svl, svh, sgb, sgl, sgh, smb, length, H, NB, weight, eps,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, CB: tl.constexpr, BT: tl.constexpr, BQ: tl.constexpr,
    SCALED: tl.constexpr, DIVIDED: tl.constexpr, MASKED: tl.constexpr, WEIGHTED: tl.constexpr,
    FORWARD: tl.constexpr, BACKWARD: tl.constexpr, NEED_F: tl.constexpr, NEED_G: tl.constexpr, STATES: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """DK and DV_, contiguous, and in DF and DG the pairs with the key in the tile alone; third and fourth of ENDS: queries right and left
    of the block. BQ queries are read at a time, a divisor of BT. After ``queries_gradient_kernel``, arguments and grid as there."""
    QT: tl.constexpr = CB // BT
    tiles = NB * QT
    pid = tl.program_id(0)
    h = pid % H
    tile = (pid // H) % tiles
    b = (pid // H // tiles).to(tl.int64)
    block = tile // QT
    bh = b * H + h
    BH = tl.num_programs(0) // tiles
    d = tl.arange(0, BD)
    dv = tl.arange(0, BDV)
    n = tl.arange(0, BT)
    row = tile.to(tl.int64) * BT + n
    ok = row < length
    real = real_tokens(MASK, b, smb, row, ok, MASKED)
    k = load_rows(K, b, h, row, skb, skl, skh, d, real, D).to(COMPUTE)
    v = load_rows(V, b, h, row, svb, svl, svh, dv, real, DV).to(COMPUTE)
    token = bh * length + row
    a = bh * (NB * CB)
    c = (BH + bh) * (NB * CB)
    a_row, a_row_low = load_sums(HIGH, LOW, a + row, EXACT)
    c_row, c_row_low = load_sums(HIGH, LOW, c + row, EXACT)
    dk = tl.zeros((BT, BD), tl.float32)
    dv_ = tl.zeros((BT, BDV), tl.float32)
    df = tl.zeros((BT,), tl.float32)
    dg = tl.zeros((BT,), tl.float32)
    if STATES:
        cell = d[:, None] * DV + dv[None, :]
        in_cell = (d < D)[:, None] & (dv < DV)[None, :]
        right = bh * NB + block
        left = (BH + bh) * NB + block
        if FORWARD:  # the keys of this block were read by all that comes after it
            s = tl.load(A + right * (D * DV) + cell, mask=in_cell, other=0.0)
            onto = factor(tl.load(TOTALS + right), tl.load(TOTALS + 2 * BH * NB + right), a_row, a_row_low, EXACT)
            part = tl.dot(v, tl.trans(s), input_precision=PRECISION)
            if SCALED:
                part += tl.load(AZ + right * D + d, mask=d < D, other=0.0)[None, :]
            part *= onto[:, None]
            dk += part
            dv_ += tl.dot(k, s, input_precision=PRECISION) * onto[:, None]
            if NEED_F:
                sums = tl.sum(k.to(tl.float32) * part, 1)
                df += sums
                tl.store(ENDS + (2 * BH + bh) * tiles + tile, tl.sum(sums, 0))
        if BACKWARD:  # and by all that comes before it
            s = tl.load(A + left * (D * DV) + cell, mask=in_cell, other=0.0)
            onto = factor(c_row, c_row_low, 0.0, 0.0, EXACT)
            part = tl.dot(v, tl.trans(s), input_precision=PRECISION)
            if SCALED:
                part += tl.load(AZ + left * D + d, mask=d < D, other=0.0)[None, :]
            part *= onto[:, None]
            dk += part
            dv_ += tl.dot(k, s, input_precision=PRECISION) * onto[:, None]
            if NEED_G:
                sums = tl.sum(k.to(tl.float32) * part, 1)
                dg += sums
                tl.store(ENDS + (3 * BH + bh) * tiles + tile, tl.sum(sums, 0))
    own = tile % QT * BT
    for i in range(0, CB if STATES else tl.minimum(CB, length), BQ):
        col = block.to(tl.int64) * CB + i + tl.arange(0, BQ)
        ok_q = real_tokens(MASK, b, smb, col, col < length, MASKED)
        q = load_rows(Q, b, h, col, sqb, sql, sqh, d, ok_q, D).to(COMPUTE)
        grad = load_rows(GRAD, b, h, col, sgb, sgl, sgh, dv, ok_q, DV).to(COMPUTE)
        a_col, a_col_low = load_sums(HIGH, LOW, a + col, EXACT)
        c_col, c_col_low = load_sums(HIGH, LOW, c + col, EXACT)
        m = decays(
            a_col[None, :], a_col_low[None, :], c_col[None, :], c_col_low[None, :],
            a_row[:, None], a_row_low[:, None], c_row[:, None], c_row_low[:, None],
            col[None, :], row[:, None], weight, WEIGHTED, FORWARD, BACKWARD, EXACT,
        )  # fmt: skip
        p = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        t = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        x = p * m
        if DIVIDED:
            scale = 1.0 / (tl.load(DEN + bh * length + col, mask=ok_q, other=1.0) + eps)
            x *= scale[None, :]
            t *= scale[None, :]
        dv_ = tl.dot(x.to(COMPUTE), grad, dv_, input_precision=PRECISION)
        if SCALED:
            t += tl.load(DOT + bh * length + col, mask=ok_q, other=0.0)[None, :]
        t *= m
        dk = tl.dot(t.to(COMPUTE), q, dk, input_precision=PRECISION)
        if QT > 1 and (NEED_F or NEED_G):
            sums = tl.sum(t * p, 1)
            df += tl.where(i >= own + BT, sums, 0.0)
            dg += tl.where(i < own, sums, 0.0)
    if STATES or QT > 1:
        if NEED_F:
            tl.store(DF + token, tl.load(DF + token, mask=ok, other=0.0) + (tl.cumsum(df, 0) - df), mask=ok)
        if NEED_G:
            tl.store(DG + token, tl.load(DG + token, mask=ok, other=0.0) + (tl.cumsum(dg, 0, reverse=True) - dg), mask=ok)
    if MASKED:
        dk = tl.where(real[:, None], dk, 0.0)
    at = (b * length + row) * H + h
    tl.store(DK + at[:, None] * D + d[None, :], dk.to(DK.dtype.element_ty), mask=ok[:, None] & (d < D)[None, :])
    tl.store(DV_ + at[:, None] * DV + dv[None, :], dv_.to(DV_.dtype.element_ty), mask=ok[:, None] & (dv < DV)[None, :])


@triton.jit
def around_kernel(
    PAIRS, ENDS, AROUND, DF, DG, length, NB, BH,
    CB: tl.constexpr, BT: tl.constexpr, NEED_F: tl.constexpr, NEED_G: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """Adds to DF and DG what lies around each tile. Grid (NB, B H): one block."""
    QT: tl.constexpr = CB // BT
    block = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    tiles = NB * QT
    first = bh * tiles + block * QT
    live = tl.cdiv(length - block * CB, BT)  # tiles beyond wrote nothing
    row = block.to(tl.int64) * CB + tl.arange(0, CB)
    own = tl.arange(0, CB) // BT
    ok = row < length
    token = bh * length + row
    f = tl.zeros((CB,), tl.float32)
    g = tl.zeros((CB,), tl.float32)
    for query in tl.static_range(QT):
        for key in tl.static_range(QT):
            if query - key > 1 or key - query > 1:
                x = tl.load(PAIRS + (first + query) * QT + key, mask=(query < live) & (key < live), other=0.0)
                if query > key:
                    f += tl.where((own > key) & (own < query), x, 0.0)
                else:
                    g += tl.where((own < key) & (own > query), x, 0.0)
        if STATES:
            if NEED_F:
                f += tl.where(own < query, tl.load(ENDS + first + query), 0.0)
                f += tl.where(own > query, tl.load(ENDS + 2 * BH * tiles + first + query), 0.0)
            if NEED_G:
                g += tl.where(own > query, tl.load(ENDS + BH * tiles + first + query), 0.0)
                g += tl.where(own < query, tl.load(ENDS + 3 * BH * tiles + first + query), 0.0)
    if NEED_F:
        if STATES:
            f += tl.load(AROUND + bh * NB + block)
        tl.store(DF + token, tl.load(DF + token, mask=ok, other=0.0) + f, mask=ok)
    if NEED_G:
        if STATES:
            g += tl.load(AROUND + (BH + bh) * NB + block)
        tl.store(DG + token, tl.load(DG + token, mask=ok, other=0.0) + g, mask=ok)
