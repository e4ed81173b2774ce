"""The chunkwise form and a step of the recurrence for ``torch.export``: outputs alone, no loop over chunks or tokens in the graph.

A loop would be as long in the graph as it was for the example's length, and a branch on the length a promise about it. So here the number
of chunks is a symbol: it decides sizes of tensors and nothing else, and the graph is right for every length.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from lba_exp.ops.channels import decayed
from lba_exp.ops.decays import LOWEST, sums_inside
from lba_exp.ops.inside import inside_scores, is_vector
from lba_exp.ops.precision import compute_dtype
from lba_exp.ops.scan import border_decays

GROUP = 8  # chunks are joined in groups, and the groups all by all: quadratic, but small beside the rest up to a million tokens


def power_of_two(size: int) -> int:
    """The next one, from ``size`` up."""
    return 2 ** (size - 1).bit_length()


def pieces(length: int | torch.SymInt, size: int) -> int | torch.SymInt:
    """How many pieces of ``size`` hold ``length``; for a symbol one more, as a number that may be 1 is a branch (does it broadcast?)."""
    count = (length + size - 1) // size
    return count if isinstance(count, int) else count + 1


def first(x: Tensor, count: int | torch.SymInt, dim: int) -> Tensor:
    """The first ones, copied: whether a slice of them still lies in one piece would be a branch."""
    return x.index_select(dim, torch.arange(count, device=x.device))


def exported_chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    forward: Tensor | None,
    backward: Tensor | None,
    *,
    weight: float,
    directions: tuple[str, ...],
    with_den: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor | None]:
    """``lba_exp.ops.chunkwise.chunkwise`` without gradients; all chunks at once, and even one token takes a whole chunk's work."""
    batch, length, heads, _ = q.shape
    size = min(chunk_size, length) if isinstance(length, int) else chunk_size
    if is_vector(forward, backward):
        size = power_of_two(size)
    count = pieces(length, size)
    dtype, missing = compute_dtype(q, k, v), count * size - length

    def cut(x: Tensor) -> Tensor:
        """``(B, L, H, D)`` as ``(B, H, n, C, D)``, zeros after the end."""
        x = pad(x.to(dtype), (0, 0, 0, 0, 0, missing))
        return x.reshape(x.shape[0], count, size, *x.shape[2:]).permute(0, 3, 1, 2, 4)

    def cut_steps(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        x = x.clamp_min(LOWEST)
        return x.to(dtype).expand(-1, size, -1, -1).transpose(1, 2)[:, :, None] if x.shape[1] == 1 else cut(x)

    steps = {"forward": cut_steps(forward), "backward": cut_steps(backward)}
    q, k, v = cut(q), cut(k), cut(v)
    if with_den:
        v = pad(v, (0, 1), value=1.0)
    out = inside_scores(q, k, *steps.values(), weight, directions) @ v
    sums = {name: (None,) * 3 if steps[name] is None else sums_inside(steps[name], name == "backward") for name in directions}
    own = {name: (decayed(k, onto).mT @ v, total) for name, (_, onto, total) in sums.items()}
    for name, states in entering(own).items():
        out = out + decayed(q, sums[name][0]) @ states
    out = first(out.permute(0, 2, 3, 1, 4).reshape(batch, count * size, heads, v.shape[-1]), length, 1)
    return (out[..., :-1], out[..., -1]) if with_den else (out, None)


def entering(own: dict[str, tuple[Tensor, Tensor | None]]) -> dict[str, Tensor]:
    """The states that enter each chunk, ``(B, H, n, Dk, Dv)`` for each direction, from what each chunk adds and its log decay
    ``(B or 1, H, n or 1, 1, X)``: what ``lba_exp.ops.scan.scan_states`` gives, all at once and for a symbolic number of chunks."""
    parts, totals = [], []
    batch, heads, count, *sizes = next(iter(own.values()))[0].shape
    for name, (x, total) in own.items():
        total = x.new_zeros(1, 1, 1, 1) if total is None else total[..., 0, :]
        total = total.expand(batch, heads, count, -1)
        parts.append(x.flip(2) if name == "backward" else x)
        totals.append(total.flip(2) if name == "backward" else total)
    if vector := is_vector(*totals):
        totals = [x.expand(-1, -1, -1, sizes[0]) for x in totals]
    # directions side by side, as if they were heads: (B, H, X, n) and (B, H, X, n, E)
    x, total = torch.cat(parts, dim=1), torch.cat(totals, dim=1).mT
    x = x.transpose(2, 3) if vector else x.flatten(3)[:, :, None]
    groups = pieces(count, GROUP)
    missing = groups * GROUP - count
    x, total = pad(x, (0, 0, 0, missing)), pad(total, (0, missing))
    x = x.reshape(*x.shape[:3], groups, GROUP, x.shape[-1])
    total = total.reshape(*total.shape[:3], groups, GROUP)
    inner, whole, carry = border_decays(total, GROUP, False, x.dtype)
    between_groups, _, _ = border_decays(total.sum(-1).clamp_min(LOWEST), groups, False, x.dtype)
    joined = between_groups @ (whole @ x)[..., 0, :]
    states = first((inner @ x + carry * joined[..., None, :]).flatten(3, 4), count, 3)
    states = states.transpose(2, 3) if vector else states[:, :, 0].unflatten(-1, sizes)
    parts = zip(own, states.split(heads, dim=1), strict=True)
    return {name: part.flip(2) if name == "backward" else part for name, part in parts}


def exported_step(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, step: Tensor | None, reverse: bool, weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``lba_exp.ops.stream`` of checked arguments: the whole block at once, O(n^2) work for its n tokens, no loop over them."""
    batch, length, heads, _ = q.shape
    size = power_of_two(length) if is_vector(step) else length

    def rows(x: Tensor) -> Tensor:
        """``(B, n, H, D)`` as ``(B, H, size, D)``."""
        x = x.to(state.dtype).transpose(1, 2)
        return x if size == length else pad(x, (0, 0, 0, size - length))

    q, k, v = rows(q), rows(k), rows(pad(v, (0, 1), value=1.0))
    if step is not None:
        step = rows(step.clamp_min(LOWEST).expand(batch, length, heads, -1))
    directions, steps = (("backward",), (None, step)) if reverse else (("forward",), (step, None))
    into, onto, total = (None, None, None) if step is None else sums_inside(step, reverse)
    out = inside_scores(q, k, *steps, weight, directions) @ v + decayed(q, into) @ state
    out = out.transpose(1, 2)[:, :length]
    following = (state if total is None else state * total.exp().mT) + decayed(k, onto).mT @ v
    return out[..., :-1], out[..., -1], following
