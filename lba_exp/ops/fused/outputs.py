"""Kernel: the outputs of a tile of tokens, from the tokens of its block and the states that enter the block from both sides."""

import triton
import triton.language as tl

from lba_exp.ops.fused.states import entering


@triton.jit
def factor(high, low, from_high, from_low, EXACT: tl.constexpr):
    """2 to the power of a difference of sums that is at most 0."""
    e = high - from_high
    if EXACT:
        e += low - from_low
    return tl.exp2(tl.where(e > 0, 0.0, e))


@triton.jit
def outputs_kernel(
    Q, K, V, MASK, HIGH, LOW, TOTALS, S, Z, T, OUT, DEN,
    sqb, sql, sqh, skb, skl, skh, svb, svl, svh, smb, sob, sol, soh,
    length, H, NB, NSEG, blocks_per_segment, weight, eps,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, CB: tl.constexpr, BQ: tl.constexpr, BT: tl.constexpr,
    SCALED: tl.constexpr, DIVIDED: tl.constexpr, MASKED: tl.constexpr, WEIGHTED: tl.constexpr, FORWARD: tl.constexpr, BACKWARD: tl.constexpr,
    STATES: tl.constexpr, JOINED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """BQ rows of a block of CB tokens: OUT (B, L, H, DV), num / (den + eps) where DIVIDED, else num; DEN (B, H, L) where SCALED.

    Keys before the tile and after it enter through a factor for the row, taken into q, and one for the column, each at most 1: their product
    is the decay between the two. Only pairs inside the tile need an exponential each. Grid: CB / BQ tiles, heads, blocks, batch, fastest first.
    """
    TILES: tl.constexpr = CB // BQ
    pid = tl.program_id(0)
    tile = (pid % TILES) * BQ
    h = (pid // TILES) % H
    block = (pid // (TILES * H)) % NB
    b = (pid // (TILES * H) // NB).to(tl.int64)
    bh = b * H + h
    BH = tl.num_programs(0) // (TILES * NB)
    start = block.to(tl.int64) * CB
    if start + tile < length:
        d = tl.arange(0, BD)
        dv = tl.arange(0, BDV)
        rows = tile + tl.arange(0, BQ)
        r = tl.arange(0, BT)
        in_d = d < D
        in_dv = dv < DV
        ok = start + rows < length
        real = ok
        if MASKED:
            real = ok & (tl.load(MASK + b * smb + start + rows, mask=ok, other=0) != 0)
        q = tl.load(Q + b * sqb + h * sqh + start * sql + (rows[:, None] * sql + d[None, :]), mask=real[:, None] & in_d[None, :], other=0.0)
        q = q.to(COMPUTE)
        k_base = K + b * skb + h * skh + start * skl
        v_base = V + b * svb + h * svh + start * svl
        mask_base = MASK + b * smb + start
        a_high = HIGH + bh * (NB * CB) + start
        a_low = LOW + bh * (NB * CB) + start
        c_high = HIGH + (BH + bh) * (NB * CB) + start
        c_low = LOW + (BH + bh) * (NB * CB) + start
        left = (length - start).to(tl.int32)  # tokens from the block's start on
        end = tl.minimum(left, CB)
        a_row = tl.load(a_high + rows)
        c_row = tl.load(c_high + rows)
        a_row_low = tl.zeros((BQ,), tl.float32)
        c_row_low = tl.zeros((BQ,), tl.float32)
        if EXACT:
            a_row_low = tl.load(a_low + rows)
            c_row_low = tl.load(c_low + rows)
        cell = d[:, None] * DV + dv[None, :]
        in_cell = in_d[:, None] & in_dv[None, :]
        segment = block // blocks_per_segment
        num = tl.zeros((BQ, BDV), tl.float32)
        den = tl.zeros((BQ,), tl.float32)

        if FORWARD and (STATES or CB > BQ):
            edge = tl.load(a_high + tile - 1, mask=tile > 0, other=0.0)
            edge_low = tl.load(a_low + tile - 1, mask=tile > 0, other=0.0) if EXACT else 0.0
            near = q.to(tl.float32) * factor(a_row, a_row_low, edge, edge_low, EXACT)[:, None]
            if STATES:
                row = bh * (NB + NSEG)
                s, z = entering(S, Z, T, row + block, row + NB + segment, cell, in_cell, d, D, DV, SCALED, JOINED)
                through = factor(edge, edge_low, 0.0, 0.0, EXACT)
                num = tl.dot(near.to(COMPUTE), s.to(COMPUTE), input_precision=PRECISION) * through
                if SCALED:
                    den = tl.sum(near * z[None, :], 1) * through
            near = near.to(COMPUTE)
            for i in range(0, tile, BT):
                ok_k = i + r < left
                if MASKED:
                    ok_k = ok_k & (tl.load(mask_base + i + r, mask=ok_k, other=0) != 0)
                k = tl.load(k_base + ((i + r)[None, :] * skl + d[:, None]), mask=ok_k[None, :] & in_d[:, None], other=0.0).to(COMPUTE)
                v = tl.load(v_base + ((i + r)[:, None] * svl + dv[None, :]), mask=ok_k[:, None] & in_dv[None, :], other=0.0).to(COMPUTE)
                a_low_col = tl.load(a_low + i + r) if EXACT else 0.0
                p = tl.dot(near, k, input_precision=PRECISION) * factor(edge, edge_low, tl.load(a_high + i + r), a_low_col, EXACT)[None, :]
                if SCALED:
                    den += tl.sum(p, 1)
                num = tl.dot(p.to(COMPUTE), v, num, input_precision=PRECISION)

        for i in tl.static_range(0, BQ, BT):
            cols = tile + i + r
            ok_k = cols < left
            if MASKED:
                ok_k = ok_k & (tl.load(mask_base + cols, mask=ok_k, other=0) != 0)
            k = tl.load(k_base + (cols[None, :] * skl + d[:, None]), mask=ok_k[None, :] & in_d[:, None], other=0.0).to(COMPUTE)
            v = tl.load(v_base + (cols[:, None] * svl + dv[None, :]), mask=ok_k[:, None] & in_dv[None, :], other=0.0).to(COMPUTE)
            p = tl.dot(q, k, input_precision=PRECISION)
            below = rows[:, None] > cols[None, :]
            diagonal = rows[:, None] == cols[None, :]
            e = tl.where(below, a_row[:, None] - tl.load(a_high + cols)[None, :], tl.load(c_high + cols)[None, :] - c_row[:, None])
            if EXACT:
                e += tl.where(
                    below, a_row_low[:, None] - tl.load(a_low + cols)[None, :], tl.load(c_low + cols)[None, :] - c_row_low[:, None]
                )
            p *= tl.exp2(e)  # on the diagonal 0
            if WEIGHTED:
                p = tl.where(diagonal, p * weight, p)
            if not FORWARD:
                p = tl.where(below, 0.0, p)
            if not BACKWARD:
                p = tl.where(below | diagonal, p, 0.0)
            if SCALED:
                den += tl.sum(p, 1)
            num = tl.dot(p.to(COMPUTE), v, num, input_precision=PRECISION)

        if BACKWARD and (STATES or CB > BQ):
            after = tile + BQ
            edge = tl.load(c_high + after, mask=after < CB, other=0.0)
            edge_low = tl.load(c_low + after, mask=after < CB, other=0.0) if EXACT else 0.0
            whole = tl.load(TOTALS + (BH + bh) * NB + block)
            whole_low = tl.load(TOTALS + (2 * BH + BH + bh) * NB + block)
            edge = tl.where(after < CB, edge, whole)
            edge_low = tl.where(after < CB, edge_low, whole_low)
            near = q.to(tl.float32) * factor(edge, edge_low, c_row, c_row_low, EXACT)[:, None]
            if STATES:
                row = (BH + bh) * (NB + NSEG)
                s, z = entering(S, Z, T, row + block, row + NB + segment, cell, in_cell, d, D, DV, SCALED, JOINED)
                through = factor(whole, whole_low, edge, edge_low, EXACT)
                num += tl.dot(near.to(COMPUTE), s.to(COMPUTE), input_precision=PRECISION) * through
                if SCALED:
                    den += tl.sum(near * z[None, :], 1) * through
            near = near.to(COMPUTE)
            for i in range(after, end, BT):
                ok_k = i + r < left
                if MASKED:
                    ok_k = ok_k & (tl.load(mask_base + i + r, mask=ok_k, other=0) != 0)
                k = tl.load(k_base + ((i + r)[None, :] * skl + d[:, None]), mask=ok_k[None, :] & in_d[:, None], other=0.0).to(COMPUTE)
                v = tl.load(v_base + ((i + r)[:, None] * svl + dv[None, :]), mask=ok_k[:, None] & in_dv[None, :], other=0.0).to(COMPUTE)
                c_low_col = tl.load(c_low + i + r) if EXACT else 0.0
                p = tl.dot(near, k, input_precision=PRECISION) * factor(tl.load(c_high + i + r), c_low_col, edge, edge_low, EXACT)[None, :]
                if SCALED:
                    den += tl.sum(p, 1)
                num = tl.dot(p.to(COMPUTE), v, num, input_precision=PRECISION)

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
