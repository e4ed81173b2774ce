"""Kernels of the selective scan. A program has one sequence and a block of channels; a thread, the whole state of a channel.

Tiles are (N, BLOCK): sums over states stay inside a thread, those over channels cross the warp. Tokens are numbered as they are read;
``_at`` says where token t lies.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _at(t, length, BACKWARD: tl.constexpr):
    return length - 1 - t if BACKWARD else t


@triton.jit
def _decay(delta, a):
    """exp(delta a) as a sum: a factor, and a rest beside 1 where the decay is so slow that its own rounding would add up over the tokens
    (multiplied by exp in float32, 3e-5 after 4,096 tokens of -1e-5 each)."""
    z = delta[None, :] * a
    slow = z > -0.03125
    rest = z * (1.0 + z * (0.5 + z * 0.16666667))  # exp(z) - 1 to 1.3e-6 of itself
    return tl.where(slow, 1.0, tl.exp2(z * LOG2E)), tl.where(slow, rest, 0.0)


@triton.jit
def _step(h, X, DELTA, B, MASK, a, row, channels, d, n, ok, N: tl.constexpr, MASKED: tl.constexpr):
    """The state after the token in ``row``."""
    delta = tl.load(DELTA + row * channels + d, mask=ok, other=0.0)
    x = tl.load(X + row * channels + d, mask=ok, other=0.0).to(tl.float32)
    b = tl.load(B + row * N + n).to(tl.float32)
    if MASKED:
        x = tl.where(tl.load(MASK + row) != 0, x, 0.0)
    factor, rest = _decay(delta, a)
    return h * factor + h * rest + b[:, None] * (delta * x)[None, :]


@triton.jit
def forward_kernel(
    X, DELTA, A, B, C, MASK, Y, BORDERS, length, channels,
    N: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    MASKED: tl.constexpr, BACKWARD: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Y (B, L, D); where KEEP, BORDERS (B, chunks - 1, N, D), the states that enter each chunk but the first."""
    batch = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, N)
    ok = d < channels
    a = tl.load(A + d[None, :] * N + n[:, None], mask=ok[None, :], other=0.0)
    h = tl.zeros((N, BLOCK), tl.float32)
    borders = (length + CHUNK - 1) // CHUNK - 1
    for t in range(0, length):
        row = batch * length + _at(t, length, BACKWARD)
        if KEEP:  # noqa: SIM102 (one is known to the compiler, the other is not)
            if t > 0 and t % CHUNK == 0:
                place = (batch * borders + t // CHUNK - 1) * N
                tl.store(BORDERS + (place + n[:, None]) * channels + d[None, :], h, mask=ok[None, :])
        h = _step(h, X, DELTA, B, MASK, a, row, channels, d, n, ok, N, MASKED)
        c = tl.load(C + row * N + n).to(tl.float32)
        y = tl.sum(h * c[:, None], axis=0)
        if MASKED:
            y = tl.where(tl.load(MASK + row) != 0, y, 0.0)
        tl.store(Y + row * channels + d, y.to(Y.dtype.element_ty), mask=ok)


@triton.jit
def backward_kernel(
    GRAD, X, DELTA, A, B, C, MASK, BORDERS, STATES, DX, DDELTA, DA, DB, DC, length, channels, blocks,
    N: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, MASKED: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """DX, DDELTA (B, L, D); DA (B, D, N); DB, DC (blocks, B, L, N), sums over the block's channels.

    Chunk by chunk from the last: the states before each token are made again from the border's, into STATES (B, blocks, CHUNK, N, BLOCK).
    """
    batch = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    lane = tl.arange(0, BLOCK)
    d = block * BLOCK + lane
    n = tl.arange(0, N)
    ok = d < channels
    a = tl.load(A + d[None, :] * N + n[:, None], mask=ok[None, :], other=0.0)
    chunks = (length + CHUNK - 1) // CHUNK
    tile = n[:, None] * BLOCK + lane[None, :]
    own = STATES + (batch * blocks + block) * CHUNK * N * BLOCK
    part = (block * tl.num_programs(0) + batch) * length
    adjoint = tl.zeros((N, BLOCK), tl.float32)  # of the state after the token, what later tokens make of it
    da = tl.zeros((N, BLOCK), tl.float32)
    for back in range(0, chunks):
        chunk = chunks - 1 - back
        start = chunk * CHUNK
        stop = tl.minimum(start + CHUNK, length)
        h = tl.zeros((N, BLOCK), tl.float32)
        if chunk > 0:
            place = (batch * (chunks - 1) + chunk - 1) * N
            h = tl.load(BORDERS + (place + n[:, None]) * channels + d[None, :], mask=ok[None, :], other=0.0)
        for t in range(start, stop):
            tl.store(own + (t - start) * N * BLOCK + tile, h)
            row = batch * length + _at(t, length, BACKWARD)
            h = _step(h, X, DELTA, B, MASK, a, row, channels, d, n, ok, N, MASKED)
        tl.debug_barrier()
        for back_t in range(0, stop - start):
            t = stop - 1 - back_t
            at = _at(t, length, BACKWARD)
            row = batch * length + at
            before = tl.load(own + (t - start) * N * BLOCK + tile)
            delta = tl.load(DELTA + row * channels + d, mask=ok, other=0.0)
            x = tl.load(X + row * channels + d, mask=ok, other=0.0).to(tl.float32)
            grad = tl.load(GRAD + row * channels + d, mask=ok, other=0.0).to(tl.float32)
            b = tl.load(B + row * N + n).to(tl.float32)
            c = tl.load(C + row * N + n).to(tl.float32)
            real = True
            if MASKED:
                real = tl.load(MASK + row) != 0
                x = tl.where(real, x, 0.0)
                grad = tl.where(real, grad, 0.0)
            factor, rest = _decay(delta, a)
            kept = before * factor + before * rest
            tl.store(DC + (part + at) * N + n, tl.sum((kept + b[:, None] * (delta * x)[None, :]) * grad[None, :], axis=1))
            adjoint += c[:, None] * grad[None, :]
            tl.store(DB + (part + at) * N + n, tl.sum(adjoint * (delta * x)[None, :], axis=1))
            written = tl.sum(adjoint * b[:, None], axis=0)
            slope = adjoint * kept
            dx = delta * written
            if MASKED:
                dx = tl.where(real, dx, 0.0)
            tl.store(DX + row * channels + d, dx.to(DX.dtype.element_ty), mask=ok)
            tl.store(DDELTA + row * channels + d, x * written + tl.sum(slope * a, axis=0), mask=ok)
            da += slope * delta[None, :]
            adjoint = adjoint * factor + adjoint * rest
        tl.debug_barrier()
    tl.store(DA + (batch * channels + d[None, :]) * N + n[:, None], da, mask=ok[None, :])
