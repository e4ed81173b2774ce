"""Kernel: the outputs, from the block of each query and the states that enter it from both sides."""

import triton
import triton.language as tl

from lba_exp.ops.fused.tiles import decays, factor, load_rows, load_sums, places_of, real_tokens, start_rows


@triton.jit
def outputs_kernel(
    Q, K, V, MASK, ORDER, HIGH, LOW, TOTALS, S, Z, NUM_BEFORE, DEN_BEFORE, OUT, DEN,
    sqb, sql, sqh, skb, skl, skh, svb, svl, svh, smb, sob, sol, soh, length, H, NB, weight, eps,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, CB: tl.constexpr, BQ: tl.constexpr, BT: tl.constexpr,
    SCALED: tl.constexpr, DIVIDED: tl.constexpr, MASKED: tl.constexpr, ORDERED: tl.constexpr, WEIGHTED: tl.constexpr,
    FORWARD: tl.constexpr, BACKWARD: tl.constexpr, STATES: tl.constexpr, ADD: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """OUT (B, L, H, DV) by strides, num / (den + eps) where DIVIDED, else num; DEN (B, H, L) where SCALED. BQ queries a program.

    ADD (where SCALED): to num and den come NUM_BEFORE, (B, L, H, DV) contiguous, and DEN_BEFORE, (B, H, L), those of other scans.
    A query reads the keys of its block, BT at a time, and, where there is more than one block, S and Z: (2, B H, NB, D, DV) and
    (2, B H, NB, D), what enters each block, first from the right, then from the left. Grid (H NB CB/BQ B,), heads fastest.
    """
    tiles = NB * (CB // BQ)
    pid = tl.program_id(0)
    h = pid % H
    tile = (pid // H) % tiles
    b = (pid // H // tiles).to(tl.int64)
    block = tile // (CB // BQ)
    bh = b * H + h
    BH = tl.num_programs(0) // tiles
    d = tl.arange(0, BD)
    dv = tl.arange(0, BDV)
    row = tile.to(tl.int64) * BQ + tl.arange(0, BQ)
    ok = row < length
    place = places_of(ORDER, row, ok, ORDERED)
    real = real_tokens(MASK, b, smb, place, ok, MASKED)
    q = load_rows(Q, b, h, place, sqb, sql, sqh, d, real, D).to(COMPUTE)
    a = bh * (NB * CB)
    c = (BH + bh) * (NB * CB)
    a_row, a_row_low = load_sums(HIGH, LOW, a + row, EXACT)
    c_row, c_row_low = load_sums(HIGH, LOW, c + row, EXACT)
    num = start_rows(NUM_BEFORE, (b * length + place) * H + h, dv, ok, BQ, BDV, DV, ADD)
    if ADD:
        den = tl.load(DEN_BEFORE + bh * length + place, mask=ok, other=0.0)
    else:
        den = tl.zeros((BQ,), tl.float32)
    if STATES:
        cell = d[:, None] * DV + dv[None, :]
        in_cell = (d < D)[:, None] & (dv < DV)[None, :]
        from_right = bh * NB + block
        from_left = (BH + bh) * NB + block
        if FORWARD:
            onto = factor(a_row, a_row_low, 0.0, 0.0, EXACT)
            s = tl.load(S + from_left * (D * DV) + cell, mask=in_cell, other=0.0)
            num += tl.dot(q, s, input_precision=PRECISION) * onto[:, None]
            if SCALED:
                z = tl.load(Z + from_left * D + d, mask=d < D, other=0.0)
                den += tl.sum(q.to(tl.float32) * z[None, :], 1) * onto
        if BACKWARD:
            whole = tl.load(TOTALS + from_left)  # of the backward decays
            whole_low = tl.load(TOTALS + 2 * BH * NB + from_left)
            onto = factor(whole, whole_low, c_row, c_row_low, EXACT)
            s = tl.load(S + from_right * (D * DV) + cell, mask=in_cell, other=0.0)
            num += tl.dot(q, s, input_precision=PRECISION) * onto[:, None]
            if SCALED:
                z = tl.load(Z + from_right * D + d, mask=d < D, other=0.0)
                den += tl.sum(q.to(tl.float32) * z[None, :], 1) * onto
    for i in range(0, CB if STATES else tl.minimum(CB, length), BT):
        col = block.to(tl.int64) * CB + i + tl.arange(0, BT)
        place_k = places_of(ORDER, col, col < length, ORDERED)
        ok_k = real_tokens(MASK, b, smb, place_k, col < length, MASKED)
        k = load_rows(K, b, h, place_k, skb, skl, skh, d, ok_k, D).to(COMPUTE)
        v = load_rows(V, b, h, place_k, svb, svl, svh, dv, ok_k, DV).to(COMPUTE)
        a_col, a_col_low = load_sums(HIGH, LOW, a + col, EXACT)
        c_col, c_col_low = load_sums(HIGH, LOW, c + col, EXACT)
        p = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        p *= decays(
            a_row[:, None], a_row_low[:, None], c_row[:, None], c_row_low[:, None],
            a_col[None, :], a_col_low[None, :], c_col[None, :], c_col_low[None, :],
            row[:, None], col[None, :], weight, WEIGHTED, FORWARD, BACKWARD, EXACT,
        )  # fmt: skip
        if SCALED:
            den += tl.sum(p, 1)
        num = tl.dot(p.to(COMPUTE), v, num, input_precision=PRECISION)
    if SCALED:
        if MASKED:
            den = tl.where(real, den, 0.0)
        tl.store(DEN + bh * length + place, den, mask=ok)
        if DIVIDED:
            if MASKED:
                den = tl.where(real, den, 1.0)
            num = num * (1.0 / (den + eps))[:, None]
    out = OUT + b * sob + h * soh + (place[:, None] * sol + dv[None, :])
    tl.store(out, num.to(OUT.dtype.element_ty), mask=ok[:, None] & (dv < DV)[None, :])
