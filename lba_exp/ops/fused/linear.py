"""Kernels of the case without decay: one state for all tokens, and no work on pairs of tokens."""

import triton
import triton.language as tl

from lba_exp.ops.fused.tiles import real_tokens


@triton.jit
def _rows(X, b, h, start, sxb, sxl, sxh, r, c, ok, C: tl.constexpr, COMPUTE: tl.constexpr):
    # not load_rows of tiles.py: with the loop's start in the pointer a thread of the first kernel takes fewer registers
    x = tl.load(X + b * sxb + h * sxh + start * sxl + (r[:, None] * sxl + c[None, :]), mask=ok[:, None] & (c < C)[None, :], other=0.0)
    return x.to(COMPUTE)


@triton.jit
def _real(MASK, b, smb, start, r, length, MASKED: tl.constexpr):
    return real_tokens(MASK, b, smb, start + r, start + r < length, MASKED)


@triton.jit
def linear_states_kernel(
    X, Y, GRAD_SCALE, OUT, DOT, MASK, S, Z,
    sxb, sxl, sxh, syb, syl, syh, sob, sol, soh, smb,
    length, H, NSEG, tokens, eps,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BT: tl.constexpr,
    ADJOINT: tl.constexpr, SCALED: tl.constexpr, DIVIDED: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Sums of x y^T over segments of ``tokens`` tokens: S (B H, NSEG, D, DV), Z (B H, NSEG, D) float32; else as ``states_kernel``."""
    pid = tl.program_id(0)
    h = pid % H
    segment = (pid // H) % NSEG
    b = (pid // H // NSEG).to(tl.int64)
    bh = b * H + h
    d = tl.arange(0, BD)
    dv = tl.arange(0, BDV)
    r = tl.arange(0, BT)
    acc = tl.zeros((BD, BDV), tl.float32)
    z = tl.zeros((BD,), tl.float32)
    first = segment.to(tl.int64) * tokens
    last = tl.minimum(first + tokens, length)
    for start in range(first, last, BT):
        ok = _real(MASK, b, smb, start, r, length, MASKED)
        x = _rows(X, b, h, start, sxb, sxl, sxh, r, d, ok, D, COMPUTE)
        if ADJOINT and DIVIDED:
            at = bh * length + start + r
            y = _rows(Y, b, h, start, syb, syl, syh, r, dv, ok, DV, tl.float32)
            y = y * (1.0 / (tl.load(GRAD_SCALE + at, mask=ok, other=1.0) + eps))[:, None]
            dot = -tl.sum(y * _rows(OUT, b, h, start, sob, sol, soh, r, dv, ok, DV, tl.float32), 1)
            tl.store(DOT + at, dot, mask=start + r < length)
            y = y.to(COMPUTE)
        else:
            y = _rows(Y, b, h, start, syb, syl, syh, r, dv, ok, DV, COMPUTE)
            if ADJOINT and SCALED:
                dot = tl.load(DOT + bh * length + start + r, mask=ok, other=0.0)
        x_t = tl.trans(x)
        acc = tl.dot(x_t, y, acc, input_precision=PRECISION)
        if SCALED:
            if ADJOINT:
                z += tl.sum(x.to(tl.float32) * dot[:, None], 0)
            else:
                z += tl.sum(x.to(tl.float32), 0)
    at = bh * NSEG + segment
    tl.store(S + at * (D * DV) + d[:, None] * DV + dv[None, :], acc, mask=(d < D)[:, None] & (dv < DV)[None, :])
    if SCALED:
        tl.store(Z + at * D + d, z, mask=d < D)


@triton.jit
def linear_outputs_kernel(
    Q, MASK, S, Z, OUT, DEN, sqb, sql, sqh, smb, sob, sol, soh, length, H, TILES, eps,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BQ: tl.constexpr, REPEAT: tl.constexpr,
    SCALED: tl.constexpr, DIVIDED: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """OUT (B, L, H, DV) and DEN (B, H, L) of REPEAT tiles of BQ rows, from the state of all tokens. Grid (H TILES B,), heads fastest."""
    pid = tl.program_id(0)
    h = pid % H
    tile = (pid // H) % TILES
    b = (pid // H // TILES).to(tl.int64)
    bh = b * H + h
    d = tl.arange(0, BD)
    dv = tl.arange(0, BDV)
    r = tl.arange(0, BQ)
    s = tl.load(S + bh * (D * DV) + d[:, None] * DV + dv[None, :], mask=(d < D)[:, None] & (dv < DV)[None, :], other=0.0).to(COMPUTE)
    z = tl.load(Z + bh * D + d, mask=d < D, other=0.0) if SCALED else 0.0
    first = (tile * REPEAT).to(tl.int64) * BQ
    for i in range(0, REPEAT):
        start = first + i * BQ
        ok = start + r < length
        real = _real(MASK, b, smb, start, r, length, MASKED)
        q = _rows(Q, b, h, start, sqb, sql, sqh, r, d, real, D, COMPUTE)
        num = tl.dot(q, s, input_precision=PRECISION)
        if SCALED:
            den = tl.sum(q.to(tl.float32) * z[None, :], 1)
            tl.store(DEN + bh * length + start + r, den, mask=ok)
            if DIVIDED:
                if MASKED:
                    den = tl.where(real, den, 1.0)
                num = num * (1.0 / (den + eps))[:, None]
        out = OUT + b * sob + h * soh + start * sol + (r[:, None] * sol + dv[None, :])
        tl.store(out, num.to(OUT.dtype.element_ty), mask=ok[:, None] & (dv < DV)[None, :])


@triton.jit
def linear_gradients_kernel(
    K, V, GRAD, DEN, DOT, MASK, S, Z, A, AZ, DQ, DK, DV_,
    skb, skl, skh, svb, svl, svh, sgb, sgl, sgh, smb, length, H, TILES, eps,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BQ: tl.constexpr, REPEAT: tl.constexpr,
    SCALED: tl.constexpr, DIVIDED: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Gradients of q, k, v of REPEAT tiles of BQ tokens, from the state and its adjoint. Grid (H TILES B,), heads fastest."""
    pid = tl.program_id(0)
    h = pid % H
    tile = (pid // H) % TILES
    b = (pid // H // TILES).to(tl.int64)
    bh = b * H + h
    d = tl.arange(0, BD)
    dv = tl.arange(0, BDV)
    r = tl.arange(0, BQ)
    cell = d[:, None] * DV + dv[None, :]
    in_cell = (d < D)[:, None] & (dv < DV)[None, :]
    s_t = tl.trans(tl.load(S + bh * (D * DV) + cell, mask=in_cell, other=0.0).to(COMPUTE))
    a = tl.load(A + bh * (D * DV) + cell, mask=in_cell, other=0.0).to(COMPUTE)
    z = tl.load(Z + bh * D + d, mask=d < D, other=0.0) if SCALED else 0.0
    az = tl.load(AZ + bh * D + d, mask=d < D, other=0.0) if SCALED else 0.0
    first = (tile * REPEAT).to(tl.int64) * BQ
    for i in range(0, REPEAT):
        start = first + i * BQ
        ok = start + r < length
        real = _real(MASK, b, smb, start, r, length, MASKED)
        at = (b * length + start) * H + h
        k = _rows(K, b, h, start, skb, skl, skh, r, d, real, D, COMPUTE)
        v = _rows(V, b, h, start, svb, svl, svh, r, dv, real, DV, COMPUTE)
        grad = _rows(GRAD, b, h, start, sgb, sgl, sgh, r, dv, real, DV, tl.float32)
        if DIVIDED:
            grad = grad * (1.0 / (tl.load(DEN + bh * length + start + r, mask=real, other=1.0) + eps))[:, None]
        dq = tl.dot(grad.to(COMPUTE), s_t, input_precision=PRECISION)
        dk = tl.dot(v, tl.trans(a), input_precision=PRECISION)
        if SCALED:
            dq += tl.load(DOT + bh * length + start + r, mask=real, other=0.0)[:, None] * z[None, :]
            dk += az[None, :]
        if MASKED:
            dk = tl.where(real[:, None], dk, 0.0)
        out = at * D + (r[:, None] * (H * D) + d[None, :])
        ok_d = ok[:, None] & (d < D)[None, :]
        tl.store(DQ + out, dq.to(DQ.dtype.element_ty), mask=ok_d)
        tl.store(DK + out, dk.to(DK.dtype.element_ty), mask=ok_d)
        dv_ = tl.dot(k, a, input_precision=PRECISION)
        tl.store(DV_ + at * DV + (r[:, None] * (H * DV) + dv[None, :]), dv_.to(DV_.dtype.element_ty), mask=ok[:, None] & (dv < DV)[None, :])
