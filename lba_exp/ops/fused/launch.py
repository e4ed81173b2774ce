"""Forward and backward pass as kernel launches on plain tensors, without autograd."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from lba_exp.ops.fused import plan as plans
from lba_exp.ops.fused.around import around_kernel
from lba_exp.ops.fused.keys import keys_gradient_kernel
from lba_exp.ops.fused.linear import linear_gradients_kernel, linear_outputs_kernel, linear_states_kernel
from lba_exp.ops.fused.outputs import outputs_kernel
from lba_exp.ops.fused.queries import queries_gradient_kernel
from lba_exp.ops.fused.sizes import Call, Sizes, rows_last
from lba_exp.ops.fused.states import scan_kernel, states_kernel
from lba_exp.ops.fused.sums import sums_kernel

SCAN = 512  # numbers of a state that one program of scan_kernel goes through


def _steps(x: Tensor | None, size: Sizes) -> Tensor:
    """A log decay as (B, L, H) by strides; a fixed or missing one takes no memory."""
    if x is None:
        x = size.empty(1).zero_()
    return x if x.ndim == 3 else x.expand(size.B, size.L, size.H)


def _sums(f: Tensor | None, g: Tensor | None, size: Sizes, block: int) -> tuple[Tensor, Tensor, Tensor, int]:
    blocks = triton.cdiv(size.L, block)
    high, low = (size.empty(2, size.BH, blocks * block) for _ in range(2))
    totals = size.empty(2, 2, size.BH, blocks)
    f, g = _steps(f, size), _steps(g, size)
    heads = min(4, triton.next_power_of_2(size.H))
    sums_kernel[(blocks * size.B, triton.cdiv(size.H, heads))](
        f, g, high, low, totals, *f.stride(), *g.stride(), size.L, size.H, blocks, CB=block, BH=heads
    )
    return high, low, totals, blocks


def _mask(mask: Tensor | None, other: Tensor) -> tuple[Tensor, int]:
    return (other, 0) if mask is None else (mask.contiguous().view(torch.uint8), mask.shape[1])


def _in_a_row(order: Tensor | None) -> Tensor | None:
    """The order, (L,), as the kernels read it: a view may have gaps."""
    return None if order is None else order.contiguous()


def _states(size: Sizes, call: Call, plan: plans.Plan, sums, x, y, mask, order, *, den=None, out=None, dot=None, adjoint=False):
    """What enters the blocks from the right and from the left, states or their adjoints: (2, B H, blocks, D, Dv), (2, B H, blocks, D)."""
    high, low, totals, blocks = sums
    # states go to the left by the backward decays, adjoints by the forward ones
    leftward, rightward = (call.forward, call.backward) if adjoint else (call.backward, call.forward)
    first, walks = 0 if leftward else 1, leftward + rightward
    s = size.empty(2, size.BH, blocks, size.D, size.DV, dtype=size.dtype)
    z = size.empty(2, size.BH, blocks if call.scaled else 0, size.D)
    count, per_segment = plans.segments(blocks, walks * size.BH, size.device, plans.WALKS)
    seg, seg_z, seg_t = size.empty(2, size.BH, count, size.D, size.DV), size.empty(2, size.BH, count, size.D), size.empty(2, size.BH, count)
    divided = call.divided and adjoint
    out = y if out is None else out
    mask, mask_stride = _mask(mask, totals)

    def walk(enter: bool, store: bool) -> None:
        states_kernel[(walks * size.H * count * size.B,)](
            x, y, den if divided else totals, out, totals if dot is None else dot, mask, totals if order is None else order,
            high, low, totals, s, z, seg, seg_z, seg_t,
            *x.stride()[:3], *y.stride()[:3], *out.stride()[:3], mask_stride, size.L, size.H, blocks, count, per_segment, first, call.eps,
            D=size.D, DV=size.DV, BD=size.BD, BDV=size.BDV, CB=plan.block, BT=plan.state_columns, WALKS=walks,
            ADJOINT=adjoint, SCALED=call.scaled, DIVIDED=divided, MASKED=mask_stride > 0, ORDERED=order is not None,
            ENTER=enter, STORE=store,
            EXACT=size.compute == tl.float32, PRECISION=size.precision, COMPUTE=size.compute,
            num_warps=plan.state_warps, num_stages=plan.state_stages,
        )  # fmt: skip

    if count > 1:  # few sequences: segments of them side by side, whose states are known after a first walk
        walk(enter=False, store=False)
        numbers = size.D * size.DV
        scan_kernel[(triton.cdiv(numbers, SCAN), size.BH, walks)](
            seg, seg_z, seg_t, size.BH, count, first, SIZE=numbers, D=size.D, BD=size.BD, BE=SCAN, SCALED=call.scaled
        )
    walk(enter=count > 1, store=True)
    return s, z


def forward(
    q: Tensor, k: Tensor, v: Tensor, f: Tensor | None, g: Tensor | None, mask: Tensor | None, order: Tensor | None, call: Call,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output (B, L, H, Dv), in the dtype of v where divided or unscaled, else float32; denominator (B, H, L) float32, empty if unscaled."""
    size = Sizes(q, v)
    q, k, v = (rows_last(x) for x in (q, k, v))
    order = _in_a_row(order)
    if call.is_linear(f, g):
        return _planned("linear", size, lambda plan: _linear_forward(q, k, v, mask, call, size, plan))
    return _planned("forward", size, lambda plan: _forward(q, k, v, f, g, mask, order, call, size, plan))


def _planned(kind: str, size: Sizes, run):
    return plans.with_plan(kind, size.dtype, size.width, size.L, size.device, run)


def _outputs(v: Tensor, call: Call, size: Sizes, parts: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    out = size.empty(size.B, size.L, size.H, size.DV, dtype=parts if call.scaled and not call.divided else v.dtype)
    return out, size.empty(size.B, size.H, size.L) if call.scaled else size.empty(0)


def _forward(
    q, k, v, f, g, mask, order, call: Call, size: Sizes, plan: plans.Plan, before=None, parts: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, den = _outputs(v, call, size, parts)
    sums = high, low, totals, blocks = _sums(f, g, size, plan.block)
    s, z = _states(size, call, plan, sums, k, v, mask, order) if blocks > 1 else (totals, totals)
    mask, mask_stride = _mask(mask, totals)
    outputs_kernel[(size.H * blocks * (plan.block // plan.rows) * size.B,)](
        q, k, v, mask, totals if order is None else order, high, low, totals, s, z, *(before or (totals, totals)), out, den,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], mask_stride, *out.stride()[:3], size.L, size.H, blocks, call.weight, call.eps,
        D=size.D, DV=size.DV, BD=size.BD, BDV=size.BDV, CB=plan.block, BQ=plan.rows, BT=plan.columns,
        SCALED=call.scaled, DIVIDED=call.divided, MASKED=mask_stride > 0, ORDERED=order is not None, WEIGHTED=call.weight != 1.0,
        FORWARD=call.forward, BACKWARD=call.backward, STATES=blocks > 1, ADD=before is not None,
        EXACT=size.compute == tl.float32, PRECISION=size.precision, COMPUTE=size.compute,
        num_warps=plan.warps, num_stages=plan.stages, maxnreg=plan.registers,
    )  # fmt: skip
    return out, den


def backward(
    q: Tensor, k: Tensor, v: Tensor, f: Tensor | None, g: Tensor | None, mask: Tensor | None, order: Tensor | None, call: Call,
    out: Tensor, den: Tensor, grad: Tensor, grad_den: Tensor | None, needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of q, k, v and of the log decays (None where not needed): float32 (B, H, L), one a step, or float64 (H,), of a fixed one.

    grad: of the output; grad_den: of the denominator (B, H, L), where scaled and not divided.
    """
    size = Sizes(q, v)
    q, k, v, grad = (rows_last(x) for x in (q, k, v, grad))
    order = _in_a_row(order)
    if call.is_linear(f, g):
        given = (q, k, v, mask, call, size, out, den, grad, grad_den)
        return *_planned("linear", size, lambda plan: _linear_backward(*given, plan)), None, None
    room = _gradients(q, k, v, call, size, grad_den)
    given = (q, k, v, mask, call, size, out, den, grad, room, f, g, order, needs)
    return *room[:3], *_planned("backward", size, lambda plan: _backward(*given, plan))


def _gradients(q: Tensor, k: Tensor, v: Tensor, call: Call, size: Sizes, grad_den: Tensor | None) -> tuple[Tensor, ...]:
    """Room for dq, dk, dv; and the denominator's gradient, or room for it."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if call.scaled:
        dot = size.empty(size.B, size.H, size.L) if call.divided else grad_den.contiguous()
    else:
        dot = dq
    return dq, dk, dv, dot


def _backward(q, k, v, mask, call: Call, size: Sizes, out, den, grad, room, f, g, order, needs, plan: plans.Plan, add: bool = False):
    dq, dk, dv, dot = room
    sums = high, low, totals, blocks = _sums(f, g, size, plan.block)
    per_block = plan.block // plan.columns
    tiles = blocks * per_block
    # 1: of each step, 2: of all steps together
    need_f, need_g = ((1 if x.ndim == 3 else 2) if need else 0 for x, need in zip((f, g), needs, strict=True))
    df, dg = (size.empty(size.B, size.H, size.L if need == 1 else tiles) if need else None for need in (need_f, need_g))
    s, z, a, az = (totals,) * 4
    if blocks > 1:
        s, z = _states(size, call, plan, sums, k, v, mask, order)
        a, az = _states(size, call, plan, sums, q, grad, mask, order, den=den, out=out, dot=dot, adjoint=True)
    pairs, ends, around = size.empty(size.BH, tiles, per_block), size.empty(4, size.BH, tiles), size.empty(2, size.BH, blocks)
    mask, mask_stride = _mask(mask, totals)
    order_given, order = order is not None, totals if order is None else order
    grads = (totals if df is None else df, totals if dg is None else dg)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3])
    numbers = (size.L, size.H, blocks, call.weight, call.eps)
    cut = {"CB": plan.block, "BT": plan.columns, "NEED_F": need_f, "NEED_G": need_g, "STATES": blocks > 1}
    options = cut | {
        "ADD": add,
        "D": size.D, "DV": size.DV, "BD": size.BD, "BDV": size.BDV,
        "SCALED": call.scaled, "DIVIDED": call.divided, "MASKED": mask_stride > 0, "ORDERED": order_given, "WEIGHTED": call.weight != 1.0,
        "FORWARD": call.forward, "BACKWARD": call.backward,
        "EXACT": size.compute == tl.float32, "PRECISION": size.precision, "COMPUTE": size.compute,
        "num_warps": plan.warps, "num_stages": plan.stages, "maxnreg": plan.registers,
    }  # fmt: skip
    grid = (size.H * tiles * size.B,)
    queries_gradient_kernel[grid](
        q, k, v, grad, den, out, dot, mask, order, high, low, totals, s, z, a, az, dq, *grads, pairs, ends, around,
        *strides, *out.stride()[:3], mask_stride, *numbers, **options,
    )  # fmt: skip
    keys_gradient_kernel[grid](
        q, k, v, grad, den, dot, mask, order, high, low, totals, a, az, dk, dv, *grads, ends,
        *strides, mask_stride, *numbers, BQ=plan.rows, **options,
    )  # fmt: skip
    if 1 in (need_f, need_g) and (blocks > 1 or per_block > 2):
        around_kernel[(blocks * size.BH,)](pairs, ends, around, *grads, size.L, blocks, size.BH, **cut)
    return tuple(x.sum((0, 2), dtype=torch.float64) if need == 2 else x for x, need in ((df, need_f), (dg, need_g)))


def forward_scans(q: Tensor, k: Tensor, v: Tensor, f: Tensor | None, g: Tensor | None, mask: Tensor | None, orders: Tensor, call: Call):
    """Sum of the scans' numerators over the sum of their denominators plus eps each: (B, L, H, Dv), and that of the denominators (B, H, L).

    f, g: None, (S, H) or (S, B, L, H); orders: (S, L). ``call`` is divided. Half precision keeps numerators between scans in bfloat16.
    """
    size = Sizes(q, v)
    q, k, v = (rows_last(x) for x in (q, k, v))
    if call.is_linear(f, g):  # the same in any order
        return _planned("linear", size, lambda plan: _linear_forward(q, k, v, mask, call, size, plan))
    last = _of_scans(call, orders)

    def run(plan: plans.Plan) -> tuple[Tensor, Tensor]:
        found = None
        for n, order in enumerate(orders.contiguous()):
            one = last if n + 1 == len(orders) else replace(last, divided=False)
            found = _forward(q, k, v, _scan(f, n), _scan(g, n), mask, order, one, size, plan, found, size.dtype)
        return found

    return _planned("forward", size, run)


def backward_scans(
    q: Tensor, k: Tensor, v: Tensor, f: Tensor | None, g: Tensor | None, mask: Tensor | None, orders: Tensor, call: Call,
    out: Tensor, den: Tensor, grad: Tensor, needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients as ``backward`` gives them, from what ``forward_scans`` gave; those of the log decays one a scan, stacked."""
    size = Sizes(q, v)
    q, k, v, grad = (rows_last(x) for x in (q, k, v, grad))
    if call.is_linear(f, g):
        return *_planned("linear", size, lambda plan: _linear_backward(q, k, v, mask, call, size, out, den, grad, None, plan)), None, None
    call = _of_scans(call, orders)
    room = _gradients(q, k, v, call, size, None)

    def run(plan: plans.Plan) -> list[tuple[Tensor | None, Tensor | None]]:
        found = []
        for n, order in enumerate(orders.contiguous()):
            given = (q, k, v, mask, call, size, out, den, grad, room, _scan(f, n), _scan(g, n), order, needs)
            found.append(_backward(*given, plan, add=n > 0))
        return found

    steps = zip(*_planned("backward", size, run), strict=True)
    return *room[:3], *(torch.stack(x) if need else None for x, need in zip(steps, needs, strict=True))


def _of_scans(call: Call, orders: Tensor) -> Call:
    """Sums in the place of means: an eps for each."""
    return replace(call, eps=call.eps * len(orders))


def _scan(x: Tensor | None, n: int) -> Tensor | None:
    return None if x is None else x[n]


def _linear_sum(size: Sizes, call: Call, plan: plans.Plan, x, y, mask, *, den=None, out=None, dot=None, adjoint=False):
    """The sum of x y^T over all tokens: (B H, D, DV) and (B H, D), float32."""
    tiles = triton.cdiv(size.L, plan.state_columns)
    count, per_segment = plans.segments(tiles, size.BH, size.device, plans.PROGRAMS)
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
        num_warps=plan.state_warps, num_stages=plan.state_stages,
    )  # fmt: skip
    return (s, z) if count == 1 else (s.sum(1), z.sum(1) if call.scaled else s)


def _tiles(size: Sizes, plan: plans.Plan) -> tuple[int, int]:
    """Tiles of rows that one program takes, and programs a sequence: few tiles where the GPU would not be full otherwise."""
    tiles = triton.cdiv(size.L, plan.rows)
    repeat = 4 if tiles * size.BH >= 4 * 4 * plans.processors(size.device) else 1
    return repeat, triton.cdiv(tiles, repeat)


def _linear_forward(q, k, v, mask, call: Call, size: Sizes, plan: plans.Plan) -> tuple[Tensor, Tensor]:
    out, den = _outputs(v, call, size)
    s, z = _linear_sum(size, call, plan, k, v, mask)
    repeat, tiles = _tiles(size, plan)
    mask, mask_stride = _mask(mask, s)
    linear_outputs_kernel[(size.H * tiles * size.B,)](
        q, mask, s, z, out, den, *q.stride()[:3], mask_stride, *out.stride()[:3], size.L, size.H, tiles, call.eps,
        D=size.D, DV=size.DV, BD=size.BD, BDV=size.BDV, BQ=plan.rows, REPEAT=repeat,
        SCALED=call.scaled, DIVIDED=call.divided, MASKED=mask_stride > 0, PRECISION=size.precision, COMPUTE=size.compute,
        num_warps=plan.warps, num_stages=plan.stages, maxnreg=plan.registers,
    )  # fmt: skip
    return out, den


def _linear_backward(q, k, v, mask, call: Call, size: Sizes, out, den, grad, grad_den, plan: plans.Plan) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv, dot = _gradients(q, k, v, call, size, grad_den)
    s, z = _linear_sum(size, call, plan, k, v, mask)
    a, az = _linear_sum(size, call, plan, q, grad, mask, den=den, out=out, dot=dot, adjoint=True)
    repeat, tiles = _tiles(size, plan)
    mask, mask_stride = _mask(mask, s)
    linear_gradients_kernel[(size.H * tiles * size.B,)](
        k, v, grad, den if call.divided else s, dot, mask, s, z, a, az, dq, dk, dv,
        *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3], mask_stride, size.L, size.H, tiles, call.eps,
        D=size.D, DV=size.DV, BD=size.BD, BDV=size.BDV, BQ=plan.rows, REPEAT=repeat,
        SCALED=call.scaled, DIVIDED=call.divided, MASKED=mask_stride > 0, PRECISION=size.precision, COMPUTE=size.compute,
        num_warps=plan.warps, num_stages=plan.stages, maxnreg=plan.registers,
    )  # fmt: skip
    return dq, dk, dv
