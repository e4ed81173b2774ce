"""Direct summation in float64, written from the definition alone: no code shared with the forms."""

import torch


def products(x, batch, length, heads):
    """``(B, H, L, L, X)``: entry (i, j) is the product of x over j < t <= i for i >= j (1 on the diagonal), 0 above it; row by row."""
    row = x.new_ones(batch, heads, 1, x.shape[-1])
    rows = []
    for i in range(length):
        if i > 0:
            row = torch.cat([row * x[:, i][:, :, None], x.new_ones(batch, heads, 1, x.shape[-1])], dim=2)
        rows.append(torch.cat([row, x.new_zeros(batch, heads, length - i - 1, x.shape[-1])], dim=2))
    return torch.stack(rows, dim=2)


def gates(log_decay, batch, length, heads, device):
    """A decay of any accepted shape as ``(B, L, H, 1 or Dk)``, not in log space."""
    if log_decay is None:
        return torch.ones(batch, length, heads, 1, dtype=torch.float64, device=device)
    x = log_decay.double().exp()
    if x.ndim == 1:
        x = x[None, None, :, None]
    elif x.ndim == 2:
        x = x[None, None]
    elif x.ndim == 3:
        x = x[..., None]
    return x.expand(batch, length, heads, x.shape[-1])


def attention_parts(q, k, v, f=None, b=None, diagonal_weight=1.0, direction="both", padding_mask=None):
    """(num, den) in float64."""
    batch, length, heads, _ = q.shape
    q, k, v = q.double(), k.double(), v.double()
    if padding_mask is not None:
        real = padding_mask[:, :, None, None]
        q, k, v = (torch.where(real, x, torch.zeros_like(x)) for x in (q, k, v))
    strict = torch.ones(length, length, device=q.device).tril(-1).bool()[..., None]
    lower = products(gates(f, batch, length, heads, q.device), batch, length, heads)
    # reversed in time, the backward decays read like forward ones
    upper = products(gates(b, batch, length, heads, q.device).flip(1), batch, length, heads).flip(2, 3)
    zero = torch.zeros((), dtype=torch.float64, device=q.device)
    m = torch.where(strict, lower if direction != "backward" else zero, zero)
    m = m + torch.where(strict.transpose(0, 1), upper if direction != "forward" else zero, zero)
    m = m + diagonal_weight * torch.eye(length, dtype=torch.float64, device=q.device)[..., None]
    scores = (q.transpose(1, 2)[:, :, :, None] * k.transpose(1, 2)[:, :, None] * m).sum(-1)
    return torch.einsum("bhij,bjhe->bihe", scores, v), scores.sum(-1).transpose(1, 2)


def attention(q, k, v, f=None, b=None, scaled=True, eps=1e-6, padding_mask=None, hold_den=False, **options):
    """The operator in float64; ``hold_den`` takes the denominator as a constant."""
    num, den = attention_parts(q, k, v, f, b, padding_mask=padding_mask, **options)
    if not scaled:
        return num
    if padding_mask is not None:
        den = den.masked_fill(~padding_mask[:, :, None], 1.0)
    den = den.detach() if hold_den else den
    return num / (den + eps)[..., None]
