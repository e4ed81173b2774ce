"""Kernel: sums of log decays inside blocks of tokens, which every other kernel takes its factors from."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # decays are kept as powers of two: one instruction makes the factor
LOWEST = tl.constexpr(-150.0)  # 2**-150 is 0 in float32; no lower, so that the sums stay small


@triton.jit
def sums_kernel(
    F, G, HIGH, LOW, TOTALS,
    sfb, sfl, sfh, sgb, sgl, sgh, length, H, NB,
    CB: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Per block of CB tokens: forward decays summed up to and with each token, backward ones without it, and the whole block's.

    F, G: log decays (B, L, H) by strides. HIGH, LOW: (2, B H, NB CB) float32, whose sum is the sum in powers of two;
    TOTALS: (2, 2, B H, NB), high and low parts of both directions. Sums are made in float64. Grid (NB B, H / BH), blocks fastest.
    """
    block = tl.program_id(0) % NB
    b = (tl.program_id(0) // NB).to(tl.int64)
    batches = tl.num_programs(0) // NB
    rows = block * CB + tl.arange(0, CB)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    ok = (rows[:, None] < length) & (h[None, :] < H)
    for direction in tl.static_range(2):
        if direction == 0:
            x = tl.load(F + b * sfb + rows[:, None].to(tl.int64) * sfl + h[None, :] * sfh, mask=ok, other=0.0)
        else:
            x = tl.load(G + b * sgb + rows[:, None].to(tl.int64) * sgl + h[None, :] * sgh, mask=ok, other=0.0)
        x = x.to(tl.float64) * LOG2E
        x = tl.where(x < LOWEST, LOWEST, x)  # NaN stays
        s = tl.cumsum(x, 0)
        total = tl.sum(x, 0)
        if direction == 1:
            s = s - x
        high = s.to(tl.float32)
        at = ((direction * batches + b) * H + h[None, :]) * (NB * CB) + rows[:, None]
        tl.store(HIGH + at, high, mask=h[None, :] < H)
        tl.store(LOW + at, (s - high.to(tl.float64)).to(tl.float32), mask=h[None, :] < H)
        high = total.to(tl.float32)
        at = ((direction * batches + b) * H + h) * NB + block
        tl.store(TOTALS + at, high, mask=h < H)
        tl.store(TOTALS + 2 * batches * H * NB + at, (total - high.to(tl.float64)).to(tl.float32), mask=h < H)
