"""The measurements behind the parity callback: exact float32, the operator's own error, latency, memory."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from lba_exp import ops
from lba_exp.callbacks.memory import LiveTensors
from lba_exp.nn.mixer import OperatorMixer
from lba_exp.results.compare import run_form

OPERATOR_SCORES = 2**25  # at most so many scores per layer in float64 (256 MiB), which decides on how many samples the operator is judged

SPLIT = "no device has a whole sequence (sequence_parallel_size): lba-eval compares the forms of the trained weights on one"

LayerShape = tuple[int, int, int, int]  # length, heads, key width, value width


def float32_is_exact() -> bool:
    """True where torch multiplies float32 matrices in float32: no TF32 and no bfloat16 passes."""
    return all(get() == exact for get, _, exact in _precision_switches())


@contextmanager
def exact_float32() -> Iterator[None]:
    """Float32 products in float32 inside (no TF32), and autocast off; torch's settings as before afterwards."""
    switches = [(get(), put, exact) for get, put, exact in _precision_switches()]
    try:
        for before, put, exact in switches:
            if before != exact:
                put(exact)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        for before, put, exact in switches:
            if before != exact:
                put(before)


def _precision_switches() -> list[tuple[Callable[[], Any], Callable[[Any], None], Any]]:
    """(read, write, exact value) of each setting. torch refuses old and new settings mixed: the one that can be read is in use."""

    def attribute(owner, name):
        return (lambda: getattr(owner, name)), (lambda value: setattr(owner, name, value))

    switches = []
    try:
        torch.get_float32_matmul_precision()
        switches.append((torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"))
    except RuntimeError:
        for backend in (torch.backends.cuda, torch.backends.mkldnn):
            switches.append((*attribute(backend.matmul, "fp32_precision"), "ieee"))
    if torch.cuda.is_available():
        try:
            switches.append((*attribute(torch.backends.cudnn, "allow_tf32"), False))
            switches[-1][0]()
        except RuntimeError:
            switches[-1] = (*attribute(torch.backends.cudnn.conv, "fp32_precision"), "ieee")
    return switches


def is_split(model: nn.Module) -> bool:
    """True where the tokens of a sequence lie on several devices."""
    return getattr(model, "sequence_ranks", None) is not None


def is_float32(model: nn.Module) -> bool:
    """True where every weight and buffer with a floating dtype is float32."""
    return all(x.dtype == torch.float32 for x in (*model.parameters(), *model.buffers()) if x.is_floating_point())


def as_float32(model: nn.Module) -> nn.Module:
    """The model itself where it is float32, or else a float32 copy."""
    return model if is_float32(model) else copy.deepcopy(model).float()


def cast_batch(batch: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The batch with its floating tensors in ``dtype``."""
    return {key: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value for key, value in batch.items()}


def head_of(batch: Mapping[str, Any], samples: int) -> dict[str, Any]:
    """The first ``samples`` samples of every tensor in the batch."""
    return {key: value[:samples] if isinstance(value, Tensor) else value for key, value in batch.items()}


def linear_layers(model: nn.Module) -> list[nn.Module]:
    """The modules that call the operator: those with ``operands(x, padding_mask)``."""
    return [module for module in model.modules() if callable(getattr(module, "operands", None))]


def operator_calls(layer: nn.Module, x: Tensor, padding_mask: Tensor | None) -> list[dict]:
    """The operands of each call of the operator that a linear layer makes: one, or one for each scan of its tokens."""
    operands = layer.operands(x, padding_mask)
    return [operands] if isinstance(operands, Mapping) else list(operands)


@contextmanager
def _watched(model: nn.Module, see: Callable[[nn.Module, dict], None]) -> Iterator[None]:
    """Every linear layer hands itself and the operands of each of its calls to ``see`` before it runs."""

    def hook(layer, args, kwargs):
        for operands in operator_calls(layer, args[0], args[1] if len(args) > 1 else kwargs.get("padding_mask")):
            see(layer, operands)

    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in linear_layers(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def layer_shapes(model: nn.Module, batch: Mapping[str, Any]) -> list[LayerShape]:
    """(length, heads, key width, value width) of every call of the operator, seen on one sample of ``batch``.

    Where a sample is several sequences (two towers), the heads of all are counted.
    """
    shapes = []

    def see(layer, operands):
        call_shape = getattr(layer, "call_shape", OperatorMixer.call_shape)
        rows, length, heads, key_width, value_width = call_shape(operands)
        shapes.append((length, rows * heads, key_width, value_width))

    with _watched(model, see):
        run_form(model, model.form, head_of(batch, 1))
    return shapes


def over_budget(form: str, batch_size: int, shapes: Sequence[LayerShape], budget_gib: float, itemsize: int = 4) -> str | None:
    """Why ``form`` would not fit the budget (its largest layer's estimate), or None where it fits."""
    needed = max((ops.estimate_bytes(form, batch_size, *shape, itemsize=itemsize) for shape in shapes), default=0) / 2**30
    if needed <= budget_gib:
        return None
    return f"needs an estimated {needed:.3g} GiB for a batch of {batch_size}, more than the budget of {budget_gib:g} GiB"


def operator_errors(
    model: nn.Module, batch: Mapping[str, Any], forms: Sequence[str], shapes: Sequence[LayerShape], budget_gib: float
) -> tuple[dict[str, float], str]:
    """The operator's error in float32, form by form, on the operands that the model's layers get from ``batch``.

    Args:
        model: a float32 model; run in the form it is in, on as many samples as ``OPERATOR_SCORES`` allows, at least one.
        forms: the forms to judge.
        shapes: from ``layer_shapes``.
        budget_gib: where even one sample's scores in float64 exceed this, the float64 recurrent form is the judge.

    Returns:
        form -> the largest relative L2 error over all layers (NaN where an output is not finite), and the form of the float64 judge.
    """
    scores = max((heads * length**2 for length, heads, *_ in shapes), default=1)
    samples = max(1, OPERATOR_SCORES // scores)
    judge = "parallel" if over_budget("parallel", 1, shapes, budget_gib, itemsize=8) is None else "recurrent"
    errors = dict.fromkeys(forms, 0.0)

    def see(layer, operands):
        operator = getattr(layer, "operator", ops.bidirectional_linear_attention)
        expected = _outputs(operator, _as_float64(operands), judge)
        for form in forms:
            for y, y_expected in zip(_outputs(operator, operands, form), expected, strict=True):
                error = float((y - y_expected).norm() / y_expected.norm().clamp_min(torch.finfo(torch.float64).tiny))
                errors[form] = error if math.isnan(error) or error > errors[form] else errors[form]

    with exact_float32(), _watched(model, see):
        run_form(model, model.form, cast_batch(head_of(batch, samples), torch.float32))
    return errors, judge


def _outputs(operator: Callable[..., Tensor], operands: Mapping[str, Any], form: str) -> tuple[Tensor, ...]:
    """The operator's output in float64; numerator and denominator apart where scores of both signs could cancel in the denominator."""
    divides = operator is ops.bidirectional_linear_attention and operands.get("scaled", True)
    if divides and min(float(operands["q"].min()), float(operands["k"].min())) < 0:
        kept = {name: value for name, value in operands.items() if name not in ("scaled", "eps")}
        outputs = ops.bidirectional_linear_attention_parts(**kept, form=form)
    else:
        outputs = (operator(**operands, form=form),)
    return tuple(y.cpu().double() for y in outputs)


def _as_float64(operands: Mapping[str, Any]) -> dict[str, Any]:
    def cast(value):
        if not isinstance(value, Tensor):
            return value
        value = value.cpu() if value.device.type == "mps" else value  # no float64 there
        return value.double() if value.is_floating_point() else value

    return {name: cast(value) for name, value in operands.items()}


def timed_form(
    model: nn.Module,
    form: str | None,
    batch: Mapping[str, Any],
    context: Callable[[], AbstractContextManager],
    *,
    repeats: int = 4,
    seconds: float = 0.3,
) -> tuple[Tensor, float]:
    """Logits in one form, and the median milliseconds of a forward pass; the first pass warms up and counts only if it is the only one.

    Args:
        form: None for a model that has no forms.
        context: makes the context of the run's precision.
        repeats: passes at most.
        seconds: no further pass is started after so long.
    """
    device = batch["inputs"].device
    times: list[float] = []
    while len(times) < repeats and sum(times) < seconds:
        _synchronise(device)
        start = time.perf_counter()
        with context():
            logits = run_form(model, form, batch)
        _synchronise(device)
        times.append(time.perf_counter() - start)
    return logits, 1000 * statistics.median(times[1:] or times)


def forward_bytes(
    model: nn.Module, form: str | None, batch: Mapping[str, Any], context: Callable[[], AbstractContextManager]
) -> int | None:
    """Peak memory of a forward pass in one form, in bytes; None where it cannot be had. Arguments as in ``timed_form``."""
    with suppress(Exception), LiveTensors(batch["inputs"].device) as memory, context():
        run_form(model, form, batch)
    return memory.bytes


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
