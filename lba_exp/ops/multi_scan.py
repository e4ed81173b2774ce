"""Several scans of the same tokens, normalised together: the multi-scan attention of images."""

from collections.abc import Sequence

from torch import Tensor

from lba_exp.ops import checks
from lba_exp.ops.api import DIRECTIONS, bidirectional_linear_attention_parts, check_arguments, form_for
from lba_exp.ops.fused.multi_scan import fused_scans
from lba_exp.ops.precision import no_autocast


def bidirectional_linear_attention_scans(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    forward_log_decay: Tensor | None = None,
    backward_log_decay: Tensor | None = None,
    *,
    token_order: Tensor,
    diagonal_weight: float = 1.0,
    direction: str = "both",
    padding_mask: Tensor | None = None,
    form: str = "auto",
    chunk_size: int = 64,
    eps: float = 1e-6,
) -> Tensor:
    """Bidirectional linear attention over S scans: y_i = mean_s num_i^s / (mean_s den_i^s + eps) (arXiv 2502.16249, LION-S with scans).

    num^s and den^s: those of ``bidirectional_linear_attention_parts`` with the decays and the order of scan s.

    forward_log_decay, backward_log_decay: None, or those of the scans, stacked: fixed ``(S, H)`` or ``(S, H, Dk)``, selective
        ``(S, B, L, H)`` or ``(S, B, L, H, Dk)``.
    token_order: int64 ``(S, L)``, the order of each scan.

    All else, and the errors raised, as of ``bidirectional_linear_attention``. Returns ``(B, L, H, Dv)`` in the dtype of v. The fused form
    joins the scans in its kernels, and no numerator reaches autograd.
    """
    checks.number("eps", eps, least=0.0)
    if not isinstance(token_order, Tensor) or token_order.ndim != 2 or not len(token_order):
        got = tuple(token_order.shape) if isinstance(token_order, Tensor) else type(token_order).__name__
        raise ValueError(f"token_order: expected an int64 tensor (S, L), the order of each scan, got {got}")
    scans = len(token_order)
    decays = {"forward_log_decay": forward_log_decay, "backward_log_decay": backward_log_decay}
    for name, x in decays.items():
        if x is not None and (not isinstance(x, Tensor) or x.ndim < 2 or len(x) != scans):
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name}: expected None or the decays of {scans} scans, stacked, got {got}")
    each = [{name: None if x is None else x[n] for name, x in decays.items()} | {"token_order": token_order[n]} for n in range(scans)]
    settings = {"diagonal_weight": diagonal_weight, "direction": direction, "padding_mask": padding_mask, "chunk_size": chunk_size}
    checks.check_tensors(q, k, v)
    checks.choice("direction", direction, tuple(DIRECTIONS))
    # a direction that is not read has no decay
    read = [x if name.split("_")[0] in DIRECTIONS[direction] else None for name, x in decays.items()]
    form = form_for(form, q, k, v, any(x is not None and x.ndim in (3, 5) for x in read))
    if form == "fused":
        for one in each:
            check_arguments(q, k, v, **one, **settings, form=form)
        with no_autocast(q.device):
            y = fused_scans(
                q, k, v, *read, padding_mask, token_order,
                weight=float(diagonal_weight), directions=DIRECTIONS[direction], eps=float(eps),
            )  # fmt: skip
        return y.to(v.dtype)
    parts = [bidirectional_linear_attention_parts(q, k, v, **one, **settings, form=form) for one in each]
    return divided_means(parts, padding_mask, eps).to(v.dtype)


def divided_means(parts: Sequence[tuple[Tensor, Tensor]], padding_mask: Tensor | None, eps: float) -> Tensor:
    """The mean numerator over the mean denominator plus ``eps``: pairs ``(B, L, H, Dv)``, ``(B, L, H)`` -> ``(B, L, H, Dv)``.

    parts: what ``bidirectional_linear_attention_parts`` gives for each scan; padding_mask: as there.
    """
    num, den = (sum(part / len(parts) for part in each) for each in zip(*parts, strict=True))
    if padding_mask is not None:
        den = den.masked_fill(~padding_mask[:, :, None], 1.0)  # 0 / 0 when eps is 0
    return num / (den + eps)[..., None]
