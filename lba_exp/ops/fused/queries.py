"""Kernel: the gradients of a tile of queries, and with them those of the decays but for what only its keys know (``keys.py``)."""

import triton
import triton.language as tl

from lba_exp.ops.fused.tiles import decays, factor, load_rows, load_sums, places_of, real_tokens, start_rows, store_rows, whole_factor


@triton.jit
def _onto_rows(grad, x, scale, DIVIDED: tl.constexpr, PRECISION: tl.constexpr):
    """The numerator's gradient times the transpose of values, or of a state."""
    t = tl.dot(grad, tl.trans(x), input_precision=PRECISION)
    if DIVIDED:
        t *= scale[:, None]
    return t


@triton.jit
def _around(s, Z, A, AZ, side, other_side, cell, in_cell, d, D: tl.constexpr, DV: tl.constexpr, SCALED: tl.constexpr):
    """What enters the block from one side times the adjoint that enters from the other one: the sum over the pairs around it."""
    o = tl.load(A + other_side * (D * DV) + cell, mask=in_cell, other=0.0)
    x = tl.sum(tl.sum(s.to(tl.float32) * o.to(tl.float32), 1), 0)
    if SCALED:
        z = tl.load(Z + side * D + d, mask=d < D, other=0.0)
        x += tl.sum(z * tl.load(AZ + other_side * D + d, mask=d < D, other=0.0), 0)
    return x


@triton.jit
def queries_gradient_kernel(
    Q, K, V, GRAD, DEN, OUT, DOT, MASK, ORDER, HIGH, LOW, TOTALS, S, Z, A, AZ, DQ, DF, DG, PAIRS, ENDS, AROUND,
    sqb, sql, sqh, skb, skl, skh, svb, svl, svh, sgb, sgl, sgh, sob, sol, soh, smb, length, H, NB, weight, eps,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, CB: tl.constexpr, BT: tl.constexpr,
    SCALED: tl.constexpr, DIVIDED: tl.constexpr, MASKED: tl.constexpr, ORDERED: tl.constexpr, WEIGHTED: tl.constexpr,
    FORWARD: tl.constexpr, BACKWARD: tl.constexpr, NEED_F: tl.constexpr, NEED_G: tl.constexpr, STATES: tl.constexpr, ADD: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """DQ, (B, L, H, D) contiguous; DF, DG float32, but for the pairs with the key in the tile alone and those around it.

    ADD: to what DQ holds, the gradient from other scans.
    NEED_F, NEED_G: 0, nothing; 1, the gradient of each step's decay, (B, H, L); 2, what a tile adds to the sum over all steps, for a decay
    that is the same at each, (B, H, tiles): a pair then counts as often as there are steps between its tokens.

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
    place = places_of(ORDER, row, ok, ORDERED)
    real = real_tokens(MASK, b, smb, place, ok, MASKED)
    q = load_rows(Q, b, h, place, sqb, sql, sqh, d, real, D).to(COMPUTE)
    grad = load_rows(GRAD, b, h, place, sgb, sgl, sgh, dv, real, DV).to(COMPUTE)
    token = bh * length + place
    step = bh * length + row
    dot = tl.zeros((BT,), tl.float32)
    scale = dot
    if DIVIDED:
        scale = 1.0 / (tl.load(DEN + token, mask=real, other=1.0) + eps)
    if SCALED:
        if DIVIDED and not STATES:
            out = load_rows(OUT, b, h, place, sob, sol, soh, dv, real, DV)
            dot = -scale * tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
            tl.store(DOT + token, dot, mask=ok)
        else:
            dot = tl.load(DOT + token, mask=real, other=0.0)
    a = bh * (NB * CB)
    c = (BH + bh) * (NB * CB)
    a_row, a_row_low = load_sums(HIGH, LOW, a + row, EXACT)
    c_row, c_row_low = load_sums(HIGH, LOW, c + row, EXACT)
    dq = start_rows(DQ, (b * length + place) * H + h, d, ok, BT, BD, D, ADD)
    df = tl.zeros((BT,), tl.float32)
    dg = tl.zeros((BT,), tl.float32)
    all_f = tl.zeros((), tl.float32)
    all_g = tl.zeros((), tl.float32)
    spot = tile % QT * BT + n  # in the block
    if STATES:
        cell = d[:, None] * DV + dv[None, :]
        in_cell = (d < D)[:, None] & (dv < DV)[None, :]
        right = bh * NB + block
        left = (BH + bh) * NB + block
        if FORWARD:
            s = tl.load(S + left * (D * DV) + cell, mask=in_cell, other=0.0)
            part = _onto_rows(grad, s, scale, DIVIDED, PRECISION)
            if SCALED:
                part += dot[:, None] * tl.load(Z + left * D + d, mask=d < D, other=0.0)[None, :]
            part *= factor(a_row, a_row_low, 0.0, 0.0, EXACT)[:, None]
            dq += part
            if NEED_F > 0:
                df = tl.sum(q.to(tl.float32) * part, 1)
                if NEED_F == 1:
                    tl.store(ENDS + bh * tiles + tile, tl.sum(df, 0))
                else:
                    all_f = tl.sum(df * (spot + 1).to(tl.float32), 0)
                if tile % QT == 0:
                    sum_all = _around(s, Z, A, AZ, left, right, cell, in_cell, d, D, DV, SCALED)
                    keep = whole_factor(tl.load(TOTALS + right), tl.load(TOTALS + 2 * BH * NB + right), EXACT)
                    if NEED_F == 1:
                        tl.store(AROUND + right, sum_all * keep)
                    else:
                        all_f += sum_all * keep * CB
        if BACKWARD:
            whole = tl.load(TOTALS + left)  # of the backward decays
            whole_low = tl.load(TOTALS + 2 * BH * NB + left)
            s = tl.load(S + right * (D * DV) + cell, mask=in_cell, other=0.0)
            part = _onto_rows(grad, s, scale, DIVIDED, PRECISION)
            if SCALED:
                part += dot[:, None] * tl.load(Z + right * D + d, mask=d < D, other=0.0)[None, :]
            part *= factor(whole, whole_low, c_row, c_row_low, EXACT)[:, None]
            dq += part
            if NEED_G > 0:
                dg = tl.sum(q.to(tl.float32) * part, 1)
                if NEED_G == 1:
                    tl.store(ENDS + (BH + bh) * tiles + tile, tl.sum(dg, 0))
                else:
                    all_g = tl.sum(dg * (CB - spot).to(tl.float32), 0)
                if tile % QT == 0:
                    sum_all = _around(s, Z, A, AZ, right, left, cell, in_cell, d, D, DV, SCALED)
                    keep = whole_factor(whole, whole_low, EXACT)
                    if NEED_G == 1:
                        tl.store(AROUND + left, sum_all * keep)
                    else:
                        all_g += sum_all * keep * CB
    live = QT if STATES else tl.minimum(QT, tl.cdiv(length, BT))  # tiles of the block that are there
    for i in range(1, live):  # the other tiles of the block
        other = (tile + i) % live
        col = block.to(tl.int64) * CB + other * BT + n
        place_k = places_of(ORDER, col, col < length, ORDERED)
        ok_k = real_tokens(MASK, b, smb, place_k, col < length, MASKED)
        k = load_rows(K, b, h, place_k, skb, skl, skh, d, ok_k, D).to(COMPUTE)
        v = load_rows(V, b, h, place_k, svb, svl, svh, dv, ok_k, DV).to(COMPUTE)
        a_col, a_col_low = load_sums(HIGH, LOW, a + col, EXACT)
        c_col, c_col_low = load_sums(HIGH, LOW, c + col, EXACT)
        t = _onto_rows(grad, v, scale, DIVIDED, PRECISION)
        if SCALED:
            t += dot[:, None]
        t *= decays(
            a_row[:, None], a_row_low[:, None], c_row[:, None], c_row_low[:, None],
            a_col[None, :], a_col_low[None, :], c_col[None, :], c_col_low[None, :],
            row[:, None], col[None, :], weight, False, FORWARD, BACKWARD, EXACT,
        )  # fmt: skip
        dq = tl.dot(t.to(COMPUTE), k, dq, input_precision=PRECISION)
        if NEED_F > 0 or NEED_G > 0:
            t *= tl.dot(q, tl.trans(k), input_precision=PRECISION)
            before = other < tile % QT
            if NEED_F == 1 or NEED_G == 1:
                sums = tl.sum(t, 1)
                df += tl.where(before, sums, 0.0)
                dg += tl.where(before, 0.0, sums)
                tl.store(PAIRS + (bh * tiles + tile) * QT + other, tl.sum(sums, 0))
            if NEED_F == 2 or NEED_G == 2:
                steps = (spot[:, None] - other * BT - n[None, :]).to(tl.float32)
                sums = tl.sum(tl.sum(t * steps, 1), 0)
                all_f += tl.where(before, sums, 0.0)
                all_g -= tl.where(before, 0.0, sums)
    if NEED_F == 1:
        df = tl.cumsum(df, 0, reverse=True)
    if NEED_G == 1:
        dg = tl.cumsum(dg, 0)
    k = load_rows(K, b, h, place, skb, skl, skh, d, real, D).to(COMPUTE)
    v = load_rows(V, b, h, place, svb, svl, svh, dv, real, DV).to(COMPUTE)
    a_col, a_col_low = load_sums(HIGH, LOW, a + row, EXACT)
    c_col, c_col_low = load_sums(HIGH, LOW, c + row, EXACT)
    t = _onto_rows(grad, v, scale, DIVIDED, PRECISION)
    if SCALED:
        t += dot[:, None]
    t *= decays(
        a_row[:, None], a_row_low[:, None], c_row[:, None], c_row_low[:, None],
        a_col[None, :], a_col_low[None, :], c_col[None, :], c_col_low[None, :],
        n[:, None], n[None, :], weight, WEIGHTED, FORWARD, BACKWARD, EXACT,
    )  # fmt: skip
    dq = tl.dot(t.to(COMPUTE), k, dq, input_precision=PRECISION)
    store_rows(DQ, (b * length + place) * H + h, d, ok, dq, D)
    if NEED_F > 0 or NEED_G > 0:
        t *= tl.dot(q, tl.trans(k), input_precision=PRECISION)
        steps = (n[:, None] - n[None, :]).to(tl.float32)
        if NEED_F == 2:
            tl.store(DF + bh * tiles + tile, all_f + tl.sum(tl.sum(tl.where(steps > 0, t * steps, 0.0), 1), 0))
        if NEED_G == 2:
            tl.store(DG + bh * tiles + tile, all_g - tl.sum(tl.sum(tl.where(steps < 0, t * steps, 0.0), 1), 0))
        t = t.to(COMPUTE)
        if NEED_F == 1:
            x = tl.dot((n[:, None] <= n[None, :]).to(COMPUTE), t, input_precision=PRECISION)  # queries from the step on
            tl.store(DF + step, df + tl.sum(tl.where(n[:, None] > n[None, :], x, 0.0), 1), mask=ok)  # keys before it
        if NEED_G == 1:
            x = tl.dot((n[:, None] >= n[None, :]).to(COMPUTE), t, input_precision=PRECISION)
            tl.store(DG + step, dg + tl.sum(tl.where(n[:, None] < n[None, :], x, 0.0), 1), mask=ok)
