"""What the kernels share: loads of tiles of tokens, and factors from sums of log decays (powers of two, ``sums.py``)."""

import triton
import triton.language as tl


@triton.jit
def load_rows(X, b, h, row, sxb, sxl, sxh, c, ok, C: tl.constexpr):
    """X[b, row, h, c], zero where not ``ok`` and beyond the C channels; ``row`` int64."""
    return tl.load(X + b * sxb + h * sxh + (row[:, None] * sxl + c[None, :]), mask=ok[:, None] & (c < C)[None, :], other=0.0)


@triton.jit
def start_rows(X, row, c, ok, R: tl.constexpr, BC: tl.constexpr, C: tl.constexpr, ADD: tl.constexpr):
    """What a sum over (R, BC) begins with: with ADD X[row, c], contiguous, C channels a row, else zero."""
    if ADD:  # read with the first tiles: at the end the program would wait for it
        x = tl.load(X + (row[:, None] * C + c[None, :]), mask=ok[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)
    else:
        x = tl.zeros((R, BC), tl.float32)
    return x


@triton.jit
def store_rows(X, row, c, ok, x, C: tl.constexpr):
    """x into X[row, c], contiguous, C channels a row."""
    tl.store(X + (row[:, None] * C + c[None, :]), x.to(X.dtype.element_ty), mask=ok[:, None] & (c < C)[None, :])


@triton.jit
def places_of(ORDER, row, ok, ORDERED: tl.constexpr):
    """Where the tokens that are read at ``row`` are stored, int64."""
    if ORDERED:
        row = tl.load(ORDER + row, mask=ok, other=0)
    return row


@triton.jit
def real_tokens(MASK, b, smb, row, ok, MASKED: tl.constexpr):
    """The tokens that are there and not padded."""
    if MASKED:
        ok = ok & (tl.load(MASK + b * smb + row, mask=ok, other=0) != 0)
    return ok


@triton.jit
def load_sums(HIGH, LOW, at, EXACT: tl.constexpr):
    """Sums of log decays, high and low part; the low one is not read where float32 is not to be exact."""
    high = tl.load(HIGH + at)
    if EXACT:
        low = tl.load(LOW + at)
    else:
        low = high
    return high, low


@triton.jit
def factor(high, low, from_high, from_low, EXACT: tl.constexpr):
    """2 to the power of a difference of sums that is at most 0."""
    e = high - from_high
    if EXACT:
        e += low - from_low
    return tl.exp2(tl.where(e > 0, 0.0, e))


@triton.jit
def whole_factor(high, low, EXACT: tl.constexpr):
    """2 to the power of one sum: the factor over a whole block, which many steps multiply; in float64 where float32 is to be exact."""
    if EXACT:
        return tl.exp2(high.to(tl.float64) + low.to(tl.float64)).to(tl.float32)
    else:
        return tl.exp2(high)


@triton.jit
def decays(
    a_query, a_query_low, c_query, c_query_low, a_key, a_key_low, c_key, c_key_low, query, key, weight,
    WEIGHTED: tl.constexpr, FORWARD: tl.constexpr, BACKWARD: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """The decays between tokens of one block, from the forward (a) and backward (c) sums at queries and keys, all in shapes that broadcast.

    Both differences are made: where the one is meant the other is not below 0.
    """
    e = a_query - a_key
    other = c_key - c_query
    if EXACT:
        e += a_query_low - a_key_low
        other += c_key_low - c_query_low
    m = tl.exp2(tl.minimum(e, other, propagate_nan=tl.PropagateNan.ALL))
    if WEIGHTED:
        m = tl.where(query == key, weight, m)
    if not FORWARD:
        m = tl.where(query > key, 0.0, m)
    if not BACKWARD:
        m = tl.where(query < key, 0.0, m)
    return m
