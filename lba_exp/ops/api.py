"""The operator: bidirectional linear attention with decay, in one of several forms that give the same outputs and gradients."""

import torch
from torch import Tensor

from lba_exp.ops import checks
from lba_exp.ops.blockwise import blockwise
from lba_exp.ops.chunkwise import chunkwise
from lba_exp.ops.decays import to_steps
from lba_exp.ops.fused import fused, obstacle
from lba_exp.ops.inside import is_vector
from lba_exp.ops.order import inverse_of, reorder
from lba_exp.ops.parallel import parallel
from lba_exp.ops.precision import no_autocast
from lba_exp.ops.ranks import check_group
from lba_exp.ops.recurrent import recurrent
from lba_exp.ops.sequence_parallel import add_other_ranks

FORMS = ("parallel", "recurrent", "chunkwise", "blockwise", "fused", "auto")
MODEL_FORMS = ("parallel", "recurrent", "chunkwise")  # the forms that a parity check compares, "fused" beside them where it can run
DIRECTIONS = {"both": ("forward", "backward"), "forward": ("forward",), "backward": ("backward",)}

# looked up at each call: a test can put a faulty form in place of one
_IMPLEMENTATIONS = {"parallel": parallel, "recurrent": recurrent, "chunkwise": chunkwise, "blockwise": blockwise}

# measured, see choose_form
PARALLEL_UP_TO = 192
PARALLEL_UP_TO_VECTOR = 128


def can_run_fused(
    device: torch.device | str, dtype: torch.dtype = torch.float32, *, vector: bool = False, key_width: int = 64, value_width: int = 64
) -> bool:
    """Whether ``form="fused"`` runs on a GPU with these inputs: Triton, a decay per head, float32 or half precision, widths up to 128.

    dtype: the widest of q, k and v; vector: whether a decay has one value per channel. False for Triton's interpreter on a CPU, in which
    the form does run, for tests.
    """
    device = torch.device(device)
    return device.type == "cuda" and obstacle(device, dtype, vector, key_width, value_width) is None


def choose_form(
    length: int,
    vector: bool = False,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    key_width: int = 64,
    value_width: int = 64,
) -> str:
    """The form that ``form="auto"`` stands for.

    On CUDA ``fused``, at every length, wherever it can run (``can_run_fused``). Elsewhere ``parallel`` up to 192 tokens, or 128 with a
    decay per channel (``vector``), and ``chunkwise`` above. It looks at no derivatives: higher ones need ``form="parallel"`` by name.

    The rule without ``fused`` was measured on a CPU (AVX2, float32, chunk 64), forward alone and with backward. The lengths from which
    chunkwise is the faster:

    =======================  ================  =================
    decay                    B=1, H=4, D=64    B=16, H=4, D=32
    =======================  ================  =================
    none                     400 to 450        about 220
    fixed                    270 to 300        190 to 250
    selective                300 to 330        130 to 180
    selective, per channel   64 to 250         64 to 190
    =======================  ================  =================

    ``recurrent`` and ``blockwise`` are never the fastest. What ``fused`` leaves to others on a GPU (float64, a decay per channel, wider
    heads) follows the same rule, not measured there.
    """
    if can_run_fused(device, dtype, vector=vector, key_width=key_width, value_width=value_width):
        return "fused"
    return "parallel" if length <= (PARALLEL_UP_TO_VECTOR if vector else PARALLEL_UP_TO) else "chunkwise"


class Divide(torch.autograd.Function):
    """num / (den + eps), which keeps the quotient for its backward pass instead of the numerator."""

    generate_vmap_rule = True  # for torch.func

    @staticmethod
    def forward(num, den, eps):
        return num / (den + eps)[..., None]

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, den, ctx.eps = inputs
        ctx.save_for_backward(output, den)

    @staticmethod
    def backward(ctx, grad):
        # plain operations on what was saved: derivatives of any order
        y, den = ctx.saved_tensors
        with no_autocast(grad.device):
            grad_num = grad / (den + ctx.eps)[..., None]
            return grad_num, -torch.linalg.vecdot(grad_num, y), None


def hide_padding(q: Tensor, k: Tensor, v: Tensor, padding_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v with zeros at padded tokens: they add nothing, read nothing and get no gradient."""
    padded = ~padding_mask[:, :, None, None]
    return q.masked_fill(padded, 0), k.masked_fill(padded, 0), v.masked_fill(padded, 0)


def check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    forward_log_decay: Tensor | None,
    backward_log_decay: Tensor | None,
    diagonal_weight: float,
    direction: str,
    padding_mask: Tensor | None,
    form: str,
    chunk_size: int,
    token_order: Tensor | None,
) -> None:
    """Raise ValueError, naming the argument, unless all of a call fit together."""
    checks.check_tensors(q, k, v)
    double = torch.float64 in (q.dtype, k.dtype, v.dtype)
    checks.check_decay("forward_log_decay", forward_log_decay, q, double=double)
    checks.check_decay("backward_log_decay", backward_log_decay, q, double=double)
    checks.number("diagonal_weight", diagonal_weight)
    checks.choice("direction", direction, tuple(DIRECTIONS))
    checks.check_padding(padding_mask, q)
    checks.check_order(token_order, q)
    checks.choice("form", form, FORMS)
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size: expected an integer >= 1, got {chunk_size!r}")


def form_for(form: str, q: Tensor, k: Tensor, v: Tensor, vector: bool) -> str:
    """``form``, or what "auto" stands for with these inputs."""
    if form != "auto":
        return form
    widest = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    return choose_form(q.shape[1], vector, device=q.device, dtype=widest, key_width=q.shape[3], value_width=v.shape[3])


def run_form(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    forward_log_decay: Tensor | None,
    backward_log_decay: Tensor | None,
    *,
    diagonal_weight: float,
    direction: str,
    padding_mask: Tensor | None,
    form: str,
    chunk_size: int,
    with_den: bool,
    eps: float | None,
    token_order: Tensor | None,
    sequence_group: "torch.distributed.ProcessGroup | None",
) -> tuple[Tensor, Tensor | None]:
    """Check the arguments, bring them to one shape and dtype, and run the form: (num, den or None), float32 for half-precision inputs.

    Given ``eps``, the fused form divides by itself: (num / (den + eps), None) then, in the widest dtype of q, k, v.
    """
    check_arguments(
        q, k, v, forward_log_decay, backward_log_decay, diagonal_weight, direction, padding_mask, form, chunk_size, token_order
    )
    if sequence_group is not None:
        check_group(sequence_group)
        if token_order is not None:
            raise ValueError("token_order: expected None beside a sequence_group, whose blocks are read as they are stored")
    directions = DIRECTIONS[direction]
    # a direction that is left out has no decay, in any form
    forward = to_steps(forward_log_decay) if "forward" in directions else None
    backward = to_steps(backward_log_decay) if "backward" in directions else None
    form = form_for(form, q, k, v, is_vector(forward, backward))
    with no_autocast(q.device):
        # the kernels read the mask: no copies
        if padding_mask is not None and (form != "fused" or sequence_group is not None):
            q, k, v = hide_padding(q, k, v, padding_mask)
        inverse = None if token_order is None or form == "fused" else inverse_of(token_order)
        if inverse is not None:
            q, k, v = (reorder(x, token_order, inverse) for x in (q, k, v))
        if form == "fused":
            num, den = fused(
                q,
                k,
                v,
                forward_log_decay if "forward" in directions else None,
                backward_log_decay if "backward" in directions else None,
                padding_mask,
                token_order,
                weight=float(diagonal_weight),
                directions=directions,
                scaled=with_den,
                eps=eps if sequence_group is None else None,
            )
        else:
            num, den = _IMPLEMENTATIONS[form](
                q,
                k,
                v,
                forward,
                backward,
                weight=float(diagonal_weight),
                directions=directions,
                with_den=with_den,
                chunk_size=chunk_size,
            )
        if sequence_group is not None:
            num, den = add_other_ranks(num, den, q, k, v, forward, backward, directions=directions, group=sequence_group)
        if inverse is not None:
            num, den = (None if x is None else reorder(x, inverse, token_order) for x in (num, den))
        return num, den


def bidirectional_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    forward_log_decay: Tensor | None = None,
    backward_log_decay: Tensor | None = None,
    *,
    scaled: bool = True,
    diagonal_weight: float = 1.0,
    direction: str = "both",
    padding_mask: Tensor | None = None,
    form: str = "auto",
    chunk_size: int = 64,
    eps: float = 1e-6,
    token_order: Tensor | None = None,
    sequence_group: "torch.distributed.ProcessGroup | None" = None,
) -> Tensor:
    """Bidirectional linear attention, Y = Scale(Q K^T (.) M) V (arXiv 2502.16249; Scale divides each row by its sum).

    With f_i = exp(forward_log_decay_i), b_i = exp(backward_log_decay_i) and w = diagonal_weight::

        M_ij  = f_{j+1} ... f_i for i > j,   w for i = j,   b_i ... b_{j-1} for i < j
        num_i = sum_j M_ij (q_i . k_j) v_j,   den_i = sum_j M_ij (q_i . k_j)
        y_i   = num_i / (den_i + eps) if scaled, else num_i

    A decay per channel weighs the channels inside q_i . k_j. Nothing divides by sqrt(Dk): scale q where that is wanted.

    q, k: ``(B, L, H, Dk)``; v: ``(B, L, H, Dv)``; float64, float32, bfloat16 or float16. Half precision is computed in float32 (by "fused"
        in bfloat16 products, summed in float32), whatever ``torch.autocast`` says; inputs of several dtypes are computed in the widest.
    forward_log_decay, backward_log_decay: None (no decay), fixed ``(H,)`` or ``(H, Dk)``, selective ``(B, L, H)`` or ``(B, L, H, Dk)``;
        values <= 0, float32 (float64 beside float64 inputs). The two may differ in kind. See ``step_log_decays``.
    scaled: divide by the denominator plus ``eps``.
    diagonal_weight: w; 1 counts the diagonal once, 2 is the plain sum of both directions, 0 leaves it out.
    direction: "both", "forward" (only j <= i) or "backward" (only j >= i).
    padding_mask: bool ``(B, L)``, True = real token. Padded tokens give no key and no value, and their output is 0; their decays still
        count, so padding at either end equals cutting it off.
    form: "parallel", "recurrent", "chunkwise", "blockwise", "fused" or "auto" (``choose_form`` tells which); all give the same results.
        "fused" is for GPUs: float32 and half precision, no decay per channel, Dk and Dv up to 128. In half precision its gradient of a
        fixed decay, a sum over all tokens, may be off by a few percent where it nearly cancels (``fused/NOTES.md``).
    chunk_size: tokens a chunk in the chunkwise and blockwise forms; not a part of the result.
    token_order: int64 ``(L,)``, the tokens in the order in which they are read, each once (a scan of an image's patches, say); the decays
        are given in that order, all else, the output too, as the tokens are stored. None: as they are stored.
    sequence_group: the ranks that hold a sequence together, each a block of consecutive tokens, in the order of the ranks; L is this rank's
        own and may differ. The result is this rank's part of the whole sequence's, as on one device; each rank sends one state a
        direction. Every rank calls, with the other sizes and the kinds of decay alike, and takes part in the backward pass; a fixed decay's
        gradient is this rank's share, to be summed. ``step_log_decays`` takes the same group. First derivatives only, whatever the form.

    Returns ``(B, L, H, Dv)`` in the dtype of v. Raises ValueError, naming the argument, for shapes, dtypes, devices and names that do not
    fit, and in eager mode on CPU for positive log decays (no check under ``torch.compile`` or on CUDA, where it would cost a pause).
    """
    if not isinstance(scaled, bool):
        raise ValueError(f"scaled: expected True or False, got {scaled!r}")
    checks.number("eps", eps, least=0.0)
    num, den = run_form(
        q,
        k,
        v,
        forward_log_decay,
        backward_log_decay,
        diagonal_weight=diagonal_weight,
        direction=direction,
        padding_mask=padding_mask,
        form=form,
        chunk_size=chunk_size,
        with_den=scaled,
        eps=float(eps),
        token_order=token_order,
        sequence_group=sequence_group,
    )
    if den is None:
        return num.to(v.dtype)
    if padding_mask is not None:
        den = den.masked_fill(~padding_mask[:, :, None], 1.0)  # 0 / 0 when eps is 0
    if not num.requires_grad and not torch.compiler.is_compiling():
        return num.div_((den + eps)[..., None]).to(v.dtype)  # one tensor less
    return Divide.apply(num, den, float(eps)).to(v.dtype)


def bidirectional_linear_attention_parts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    forward_log_decay: Tensor | None = None,
    backward_log_decay: Tensor | None = None,
    *,
    diagonal_weight: float = 1.0,
    direction: str = "both",
    padding_mask: Tensor | None = None,
    form: str = "auto",
    chunk_size: int = 64,
    token_order: Tensor | None = None,
    sequence_group: "torch.distributed.ProcessGroup | None" = None,
) -> tuple[Tensor, Tensor]:
    """Numerator ``(B, L, H, Dv)`` and denominator ``(B, L, H)`` of ``bidirectional_linear_attention``, apart and without eps.

    For normalisers of one's own: several token orders averaged before the division, max(abs(den), 1), ... Arguments, meaning and errors as
    there. Both are float32, float64 for float64 inputs; both are 0 at padded tokens.
    """
    return run_form(
        q,
        k,
        v,
        forward_log_decay,
        backward_log_decay,
        diagonal_weight=diagonal_weight,
        direction=direction,
        padding_mask=padding_mask,
        form=form,
        chunk_size=chunk_size,
        with_den=True,
        eps=None,
        token_order=token_order,
        sequence_group=sequence_group,
    )
