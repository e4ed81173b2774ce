"""Kernel: the gradients of decays, from pairs of tokens on both sides of a tile.

A step's decay gets the pairs of tokens that it lies between, each counted where it is known and nothing taken back: pairs inside the
tile (``queries.py``: a triangle of ones times their products), pairs with one end in the tile (``queries.py``, ``keys.py``), and pairs
around it. Of the last kind a tile leaves its own sums, which are handed here to the tiles between.
"""

import triton
import triton.language as tl


@triton.jit
def around_kernel(
    PAIRS, ENDS, AROUND, DF, DG, length, NB, BH,
    CB: tl.constexpr, BT: tl.constexpr, NEED_F: tl.constexpr, NEED_G: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """Adds to DF and DG what lies around each tile. Grid (NB B H,), a block a program, blocks fastest."""
    QT: tl.constexpr = CB // BT
    block = tl.program_id(0) % NB
    bh = (tl.program_id(0) // NB).to(tl.int64)
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
            if NEED_F == 1:
                f += tl.where(own < query, tl.load(ENDS + first + query), 0.0)
                f += tl.where(own > query, tl.load(ENDS + 2 * BH * tiles + first + query), 0.0)
            if NEED_G == 1:
                g += tl.where(own > query, tl.load(ENDS + BH * tiles + first + query), 0.0)
                g += tl.where(own < query, tl.load(ENDS + 3 * BH * tiles + first + query), 0.0)
    if NEED_F == 1:
        if STATES:
            f += tl.load(AROUND + bh * NB + block)
        tl.store(DF + token, tl.load(DF + token, mask=ok, other=0.0) + f, mask=ok)
    if NEED_G == 1:
        if STATES:
            g += tl.load(AROUND + (BH + bh) * NB + block)
        tl.store(DG + token, tl.load(DG + token, mask=ok, other=0.0) + g, mask=ok)
