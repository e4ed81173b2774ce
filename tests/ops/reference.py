"""Direct summation in float64, written from the definition alone: no code shared with the forms."""

import torch


def weights(f, b, batch, length, heads, width, diagonal_weight, direction):
    """M as (B, H, L, L, Dk), by multiplying decays step by step along each row."""

    def full(x):
        if x is None:
            return torch.ones(batch, length, heads, width, dtype=torch.float64)
        x = x.double().exp()
        if x.ndim == 1:
            x = x[None, None, :, None]
        elif x.ndim == 2:
            x = x[None, None]
        elif x.ndim == 3:
            x = x[..., None]
        return x.expand(batch, length, heads, width)

    f, b = full(f), full(b)
    rows = []
    for i in range(length):
        row = [None] * length
        row[i] = torch.full((batch, heads, width), float(diagonal_weight), dtype=torch.float64)
        product = torch.ones(batch, heads, width, dtype=torch.float64)
        for j in range(i - 1, -1, -1):
            product = product * f[:, j + 1]
            row[j] = product if direction != "backward" else torch.zeros_like(product)
        product = torch.ones(batch, heads, width, dtype=torch.float64)
        for j in range(i + 1, length):
            product = product * b[:, j - 1]
            row[j] = product if direction != "forward" else torch.zeros_like(product)
        rows.append(torch.stack(row, dim=2))
    return torch.stack(rows, dim=2)


def attention_parts(q, k, v, f=None, b=None, diagonal_weight=1.0, direction="both", padding_mask=None):
    """(num, den) in float64."""
    batch, length, heads, width = q.shape
    q, k, v = q.double(), k.double(), v.double()
    if padding_mask is not None:
        real = padding_mask[:, :, None, None].double()
        q, k, v = q * real, k * real, v * real
    m = weights(f, b, batch, length, heads, width, diagonal_weight, direction)
    scores = torch.einsum("bihd,bjhd,bhijd->bhij", q, k, m)
    return torch.einsum("bhij,bjhe->bihe", scores, v), scores.sum(-1).transpose(1, 2)


def attention(q, k, v, f=None, b=None, scaled=True, eps=1e-6, padding_mask=None, **options):
    """The operator in float64."""
    num, den = attention_parts(q, k, v, f, b, padding_mask=padding_mask, **options)
    if not scaled:
        return num
    if padding_mask is not None:
        den = den.masked_fill(~padding_mask[:, :, None], 1.0)
    return num / (den + eps)[..., None]
