"""Kernel: the gradients of a tile of keys and values, and the rest of those of the decays (``around.py``)."""

import triton
import triton.language as tl

from lba_exp.ops.fused.tiles import decays, factor, load_rows, load_sums, places_of, real_tokens, start_rows, store_rows


@triton.jit
def keys_gradient_kernel(
    Q, K, V, GRAD, DEN, DOT, MASK, ORDER, HIGH, LOW, TOTALS, A, AZ, DK, DV_, DF, DG, ENDS,
    sqb, sql, sqh, skb, skl, skh, svb, svl, svh, sgb, sgl, sgh, smb, length, H, NB, weight, eps,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, CB: tl.constexpr, BT: tl.constexpr, BQ: tl.constexpr,
    SCALED: tl.constexpr, DIVIDED: tl.constexpr, MASKED: tl.constexpr, ORDERED: tl.constexpr, WEIGHTED: tl.constexpr,
    FORWARD: tl.constexpr, BACKWARD: tl.constexpr, NEED_F: tl.constexpr, NEED_G: tl.constexpr, STATES: tl.constexpr, ADD: tl.constexpr,
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
    place = places_of(ORDER, row, ok, ORDERED)
    real = real_tokens(MASK, b, smb, place, ok, MASKED)
    k = load_rows(K, b, h, place, skb, skl, skh, d, real, D).to(COMPUTE)
    v = load_rows(V, b, h, place, svb, svl, svh, dv, real, DV).to(COMPUTE)
    step = bh * length + row
    a = bh * (NB * CB)
    c = (BH + bh) * (NB * CB)
    a_row, a_row_low = load_sums(HIGH, LOW, a + row, EXACT)
    c_row, c_row_low = load_sums(HIGH, LOW, c + row, EXACT)
    dk = start_rows(DK, (b * length + place) * H + h, d, ok, BT, BD, D, ADD)
    dv_ = start_rows(DV_, (b * length + place) * H + h, dv, ok, BT, BDV, DV, ADD)
    df = tl.zeros((BT,), tl.float32)
    dg = tl.zeros((BT,), tl.float32)
    own = tile % QT * BT
    spot = own + n  # in the block
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
            if NEED_F > 0:
                df = tl.sum(k.to(tl.float32) * part, 1)
                if NEED_F == 1:
                    tl.store(ENDS + (2 * BH + bh) * tiles + tile, tl.sum(df, 0))
        if BACKWARD:  # and by all that comes before it
            s = tl.load(A + left * (D * DV) + cell, mask=in_cell, other=0.0)
            onto = factor(c_row, c_row_low, 0.0, 0.0, EXACT)
            part = tl.dot(v, tl.trans(s), input_precision=PRECISION)
            if SCALED:
                part += tl.load(AZ + left * D + d, mask=d < D, other=0.0)[None, :]
            part *= onto[:, None]
            dk += part
            dv_ += tl.dot(k, s, input_precision=PRECISION) * onto[:, None]
            if NEED_G > 0:
                dg = tl.sum(k.to(tl.float32) * part, 1)
                if NEED_G == 1:
                    tl.store(ENDS + (3 * BH + bh) * tiles + tile, tl.sum(dg, 0))
        if NEED_F == 2:
            at = DF + bh * tiles + tile
            tl.store(at, tl.load(at) + tl.sum(df * (CB - 1 - spot).to(tl.float32), 0))
        if NEED_G == 2:
            at = DG + bh * tiles + tile
            tl.store(at, tl.load(at) + tl.sum(dg * spot.to(tl.float32), 0))
    for i in range(0, CB if STATES else tl.minimum(CB, length), BQ):
        col = block.to(tl.int64) * CB + i + tl.arange(0, BQ)
        place_q = places_of(ORDER, col, col < length, ORDERED)
        ok_q = real_tokens(MASK, b, smb, place_q, col < length, MASKED)
        q = load_rows(Q, b, h, place_q, sqb, sql, sqh, d, ok_q, D).to(COMPUTE)
        grad = load_rows(GRAD, b, h, place_q, sgb, sgl, sgh, dv, ok_q, DV).to(COMPUTE)
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
            scale = 1.0 / (tl.load(DEN + bh * length + place_q, mask=ok_q, other=1.0) + eps)
            x *= scale[None, :]
            t *= scale[None, :]
        dv_ = tl.dot(x.to(COMPUTE), grad, dv_, input_precision=PRECISION)
        if SCALED:
            t += tl.load(DOT + bh * length + place_q, mask=ok_q, other=0.0)[None, :]
        t *= m
        dk = tl.dot(t.to(COMPUTE), q, dk, input_precision=PRECISION)
        if QT > 1 and (NEED_F == 1 or NEED_G == 1):
            sums = tl.sum(t * p, 1)
            df += tl.where(i >= own + BT, sums, 0.0)
            dg += tl.where(i < own, sums, 0.0)
    if STATES or QT > 1:
        if NEED_F == 1:
            tl.store(DF + step, tl.load(DF + step, mask=ok, other=0.0) + (tl.cumsum(df, 0) - df), mask=ok)
        if NEED_G == 1:
            tl.store(DG + step, tl.load(DG + step, mask=ok, other=0.0) + (tl.cumsum(dg, 0, reverse=True) - dg), mask=ok)
    if MASKED:
        dk = tl.where(real[:, None], dk, 0.0)
    at = (b * length + place) * H + h
    store_rows(DK, at, d, ok, dk, D)
    store_rows(DV_, at, dv, ok, dv_, DV)
