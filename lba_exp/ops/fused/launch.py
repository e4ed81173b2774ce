"""Forward and backward pass as kernel launches on plain tensors, without autograd."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lba_exp.ops.fused import plan as plans
from lba_exp.ops.fused.gradients import keys_gradient_kernel, queries_gradient_kernel
from lba_exp.ops.fused.linear import linear_gradients_kernel, linear_outputs_kernel, linear_states_kernel
from lba_exp.ops.fused.outputs import outputs_kernel
from lba_exp.ops.fused.states import join_kernel, states_kernel
from lba_exp.ops.fused.sums import sums_kernel


@dataclass(frozen=True)
class Call:
    """What one call of the operator asks for.

    Attributes:
        weight, forward, backward: the diagonal's weight, and which directions are read.
        scaled: the denominator is made; divided: the output is num / (den + eps), else num.
    """

    weight: float
    forward: bool
    backward: bool
    scaled: bool
    divided: bool
    eps: float

    def is_linear(self, f: Tensor | None, g: Tensor | None) -> bool:
        """Whether every pair of tokens has the weight 1."""
        return f is None and g is None and self.weight == 1.0 and self.forward and self.backward


class _Sizes:
    def __init__(self, q: Tensor, v: Tensor):
        self.B, self.L, self.H, self.D = q.shape
        self.DV = v.shape[3]
        self.BH = self.B * self.H
        self.BD, self.BDV = (max(16, triton.next_power_of_2(x)) for x in (self.D, self.DV))
        self.width = max(self.BD, self.BDV)
        full = q.dtype == torch.float32
        self.dtype = torch.float32 if full else torch.bfloat16  # float16 has too few exponents for sums and gradients
        self.compute = tl.float32 if full else tl.bfloat16
        tf32 = full and torch.get_float32_matmul_precision() != "highest"
        self.precision = "tf32" if tf32 else "ieee"
        self.device = q.device

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)


def rows_last(x: Tensor) -> Tensor:
    """x with channels next to each other, as the kernels read them; any strides otherwise."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _steps(x: Tensor | None, size: _Sizes) -> Tensor:
    """A log decay as (B, L, H) by strides; a fixed or missing one takes no memory."""
    if x is None:
        x = size.empty(1).zero_()
    return x if x.ndim == 3 else x.expand(size.B, size.L, size.H)


def _sums(f: Tensor | None, g: Tensor | None, size: _Sizes, block: int) -> tuple[Tensor, Tensor, Tensor, int]:
    blocks = triton.cdiv(size.L, block)
    high, low = (size.empty(2, size.BH, blocks * block) for _ in range(2))
    totals = size.empty(2, 2, size.BH, blocks)
    f, g = _steps(f, size), _steps(g, size)
    heads = min(4, triton.next_power_of_2(size.H))
    sums_kernel[(blocks, size.B, triton.cdiv(size.H, heads))](
        f, g, high, low, totals, *f.stride(), *g.stride(), size.L, size.H, blocks, CB=block, BH=heads
    )
    return high, low, totals, blocks


def _mask(mask: Tensor | None, other: Tensor) -> tuple[Tensor, int]:
    return (other, 0) if mask is None else (mask.contiguous().view(torch.uint8), mask.shape[1])


class _States:
    """What enters the blocks from the right, or from both sides with two walks, and the segments from both; states or their adjoints."""

    def __init__(
        self, size: _Sizes, call: Call, plan: plans.Plan, sums, cut, x, y, mask, *,
        walks=1, den=None, out=None, dot=None, adjoint=False,
    ):  # fmt: skip
        high, low, totals, blocks = sums
        count, per_segment = cut
        # states go to the left by the backward decays, adjoints by the forward ones
        leftward, rightward = (call.forward, call.backward) if adjoint else (call.backward, call.forward)
        if walks == 2:
            leftward, rightward = True, False  # each walk its own
        rightward = rightward and count > 1
        places = blocks * walks if leftward else 0
        s = size.empty(size.BH, places, size.D, size.DV, dtype=size.dtype)
        z = size.empty(size.BH, places if call.scaled else 0, size.D)
        t = size.empty(size.BH, places)
        seg = size.empty(2, size.BH, count, size.D, size.DV)
        seg_z = size.empty(2, size.BH, count if call.scaled else 0, size.D)
        seg_t = size.empty(2, size.BH, count)
        self.tensors = s, z, t, seg, seg_z
        if not (leftward or rightward or (adjoint and call.divided)):
            return
        divided = call.divided and adjoint
        out = y if out is None else out
        mask, mask_stride = _mask(mask, totals)
        states_kernel[(walks * size.H * count * size.B,)](
            x, y, den if divided else totals, out, totals if dot is None else dot, mask, high, low, totals, s, z, t, seg, seg_z, seg_t,
            *x.stride()[:3], *y.stride()[:3], *out.stride()[:3], mask_stride, size.L, size.H, blocks, count, per_segment, call.eps,
            D=size.D, DV=size.DV, BD=size.BD, BDV=size.BDV, CB=plan.block, BT=plan.state_columns,
            ADJOINT=adjoint, SCALED=call.scaled, DIVIDED=divided, MASKED=mask_stride > 0, EXACT=size.compute == tl.float32,
            LEFTWARD=leftward, RIGHTWARD=rightward, WALKS=walks, PRECISION=size.precision, COMPUTE=size.compute,
            num_warps=plan.state_warps, num_stages=plan.state_stages, maxnreg=plan.state_registers,
        )  # fmt: skip
        if count > 1 and (leftward or rightward):
            both = rightward or walks == 2
            join_kernel[(size.BH, triton.cdiv(size.BD, 16), both + leftward)](
                seg, seg_z, seg_t, size.BH, count, 0 if both else 1, D=size.D, DV=size.DV, BR=16, BDV=size.BDV, SCALED=call.scaled
            )


def forward(q: Tensor, k: Tensor, v: Tensor, f: Tensor | None, g: Tensor | None, mask: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
    """Output (B, L, H, Dv), in the dtype of v where divided or unscaled, else float32; denominator (B, H, L) float32, empty if unscaled."""
    size = _Sizes(q, v)
    q, k, v = (rows_last(x) for x in (q, k, v))
    parts = call.scaled and not call.divided
    out = size.empty(size.B, size.L, size.H, size.DV, dtype=torch.float32 if parts else v.dtype)
    den = size.empty(size.B, size.H, size.L) if call.scaled else size.empty(0)
    if call.is_linear(f, g):
        _linear_forward(q, k, v, mask, call, size, out, den)
        return out, den
    plan = plans.clipped(plans.choose("forward", size.dtype, size.width), size.L)
    sums = high, low, totals, blocks = _sums(f, g, size, plan.block)
    cut = count, per_segment = plans.segments(blocks, size.BH, size.device, plan.programs)
    tensors = (totals,) * 5
    if blocks > 1:
        tensors = _States(size, call, plan, sums, cut, k, v, mask).tensors
    mask, mask_stride = _mask(mask, totals)
    outputs_kernel[(size.H * count * size.B,)](
        q, k, v, mask, high, low, totals, *tensors, out, den,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], mask_stride, *out.stride()[:3],
        size.L, size.H, blocks, count, per_segment, call.weight, call.eps,
        D=size.D, DV=size.DV, BD=size.BD, BDV=size.BDV, CB=plan.block, BT=plan.columns,
        SCALED=call.scaled, DIVIDED=call.divided, MASKED=mask_stride > 0, WEIGHTED=call.weight != 1.0,
        FORWARD=call.forward, BACKWARD=call.backward, STATES=blocks > 1, JOINED=count > 1,
        EXACT=size.compute == tl.float32, PRECISION=size.precision, COMPUTE=size.compute,
        num_warps=plan.warps, num_stages=plan.stages, maxnreg=plan.registers,
    )  # fmt: skip
    return out, den


def backward(
    q: Tensor, k: Tensor, v: Tensor, f: Tensor | None, g: Tensor | None, mask: Tensor | None, call: Call,
    out: Tensor, den: Tensor, grad: Tensor, grad_den: Tensor | None, needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of q, k, v and of the log decays (None where not needed), the latter (B, H, L) float32, one a step.

    grad: of the output; grad_den: of the denominator (B, H, L), where scaled and not divided.
    """
    size = _Sizes(q, v)
    q, k, v, grad = (rows_last(x) for x in (q, k, v, grad))
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if call.scaled:
        dot = size.empty(size.B, size.H, size.L) if call.divided else grad_den.contiguous()
    else:
        dot = dq
    if call.is_linear(f, g):
        _linear_backward(q, k, v, mask, call, size, out, den, grad, dot, dq, dk, dv)
        return dq, dk, dv, None, None
    plan = plans.clipped(plans.choose("backward", size.dtype, size.width), size.L)
    sums = high, low, totals, blocks = _sums(f, g, size, plan.block)
    need_f, need_g = needs[0] and call.forward, needs[1] and call.backward
    df, dg = (size.empty(size.B, size.H, size.L) if need else None for need in (need_f, need_g))
    cut = count, per_segment = plans.segments(blocks, size.BH, size.device, plan.programs)
    tensors, adjoints = (totals,) * 5, (totals,) * 5
    if blocks > 1:
        tensors = _States(size, call, plan, sums, cut, k, v, mask, walks=2).tensors
        adjoints = _States(size, call, plan, sums, cut, q, grad, mask, walks=2, den=den, out=out, dot=dot, adjoint=True).tensors
    mask, mask_stride = _mask(mask, totals)
    grads = (totals if df is None else df, totals if dg is None else dg)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3])
    numbers = (size.L, size.H, blocks, count, per_segment, call.weight, call.eps)
    options = dict(  # noqa: C408
        D=size.D, DV=size.DV, BD=size.BD, BDV=size.BDV, CB=plan.block,
        SCALED=call.scaled, DIVIDED=call.divided, MASKED=mask_stride > 0, WEIGHTED=call.weight != 1.0,
        FORWARD=call.forward, BACKWARD=call.backward, NEED_F=need_f, NEED_G=need_g, STATES=blocks > 1, JOINED=count > 1,
        EXACT=size.compute == tl.float32, PRECISION=size.precision, COMPUTE=size.compute,
        num_warps=plan.warps, num_stages=plan.stages, maxnreg=plan.registers,
    )  # fmt: skip
    queries_gradient_kernel[(size.H * blocks * size.B,)](
        q, k, v, grad, den, out, dot, mask, high, low, totals, *tensors, *adjoints, dq, *grads,
        *strides, *out.stride()[:3], mask_stride, *numbers, **options,
    )  # fmt: skip
    keys_gradient_kernel[(size.H * blocks * size.B,)](
        q, k, v, grad, den, dot, mask, high, low, totals, *adjoints, dk, dv, *grads, *strides, mask_stride, *numbers, **options
    )
    return dq, dk, dv, df, dg


def _linear_sum(size: _Sizes, call: Call, plan: plans.Plan, x, y, mask, *, den=None, out=None, dot=None, adjoint=False):
    """The sum of x y^T over all tokens: (B H, D, DV) and (B H, D), float32."""
    tiles = triton.cdiv(size.L, plan.state_columns)
    count, per_segment = plans.segments(tiles, size.BH, size.device, plan.programs)
    s = size.empty(size.BH, count, size.D, size.DV)
    z = size.empty(size.BH, count, size.D) if call.scaled else s
    divided = call.divided and adjoint
    out = y if out is None else out
    mask, mask_stride = _mask(mask, s)
    linear_states_kernel[(size.H * count * size.B,)](
        x, y, den if divided else s, out, s if dot is None else dot, mask, s, z,
        *x.stride()[:3], *y.stride()[:3], *out.stride()[:3], mask_stride, size.L, size.H, count, per_segment * plan.state_columns, call.eps,
        D=size.D, DV=size.DV, BD=size.BD, BDV=size.BDV, BT=plan.state_columns,
        ADJOINT=adjoint, SCALED=call.scaled, DIVIDED=divided, MASKED=mask_stride > 0, PRECISION=size.precision, COMPUTE=size.compute,
        num_warps=plan.state_warps, num_stages=plan.state_stages, maxnreg=plan.state_registers,
    )  # fmt: skip
    return (s, z) if count == 1 else (s.sum(1), z.sum(1) if call.scaled else s)


def _tiles(size: _Sizes, plan: plans.Plan) -> tuple[int, int]:
    """Tiles of rows that one program takes, and programs a sequence: few tiles where the GPU would not be full otherwise."""
    tiles = triton.cdiv(size.L, plan.block)
    repeat = 4 if tiles * size.BH >= 4 * 4 * plans.processors(size.device) else 1
    return repeat, triton.cdiv(tiles, repeat)


def _linear_forward(q, k, v, mask, call: Call, size: _Sizes, out: Tensor, den: Tensor) -> None:
    plan = plans.choose("linear", size.dtype, size.width)
    s, z = _linear_sum(size, call, plan, k, v, mask)
    repeat, tiles = _tiles(size, plan)
    mask, mask_stride = _mask(mask, s)
    linear_outputs_kernel[(size.H * tiles * size.B,)](
        q, mask, s, z, out, den, *q.stride()[:3], mask_stride, *out.stride()[:3], size.L, size.H, tiles, call.eps,
        D=size.D, DV=size.DV, BD=size.BD, BDV=size.BDV, BQ=plan.block, REPEAT=repeat,
        SCALED=call.scaled, DIVIDED=call.divided, MASKED=mask_stride > 0, PRECISION=size.precision, COMPUTE=size.compute,
        num_warps=plan.warps, num_stages=plan.stages, maxnreg=plan.registers,
    )  # fmt: skip


def _linear_backward(q, k, v, mask, call: Call, size: _Sizes, out, den, grad, dot, dq, dk, dv) -> None:
    plan = plans.choose("linear", size.dtype, size.width)
    s, z = _linear_sum(size, call, plan, k, v, mask)
    a, az = _linear_sum(size, call, plan, q, grad, mask, den=den, out=out, dot=dot, adjoint=True)
    repeat, tiles = _tiles(size, plan)
    mask, mask_stride = _mask(mask, s)
    linear_gradients_kernel[(size.H * tiles * size.B,)](
        k, v, grad, den if call.divided else s, dot, mask, s, z, a, az, dq, dk, dv,
        *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3], mask_stride, size.L, size.H, tiles, call.eps,
        D=size.D, DV=size.DV, BD=size.BD, BDV=size.BDV, BQ=plan.block, REPEAT=repeat,
        SCALED=call.scaled, DIVIDED=call.divided, MASKED=mask_stride > 0, PRECISION=size.precision, COMPUTE=size.compute,
        num_warps=plan.warps, num_stages=plan.stages, maxnreg=plan.registers,
    )  # fmt: skip
