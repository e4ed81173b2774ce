"""Floating-point operations of a model, and how many a device could do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lba_exp.callbacks.parity_measure import float32_is_exact
from lba_exp.results.compare import run_form, undisturbed

COUNTED_AS_THEY_ARE = (None, "parallel", "chunkwise", "blockwise")
LINEAR = "chunkwise"  # what stands in for forms without matrix products that torch sees: one step at a time, or a kernel

# Dense TFLOP/s of NVIDIA's data sheets (H100 and H200: "Tensor Core GPU" data sheets, half of the figures with sparsity; A100: data sheet
# of 2021). The first name that the device's name holds is taken; without an addition the SXM module is meant.
PEAKS = {
    "H100 PCIe": {"16": 756, "tf32": 378, "32": 51, "64": 51},
    "H100 NVL": {"16": 835, "tf32": 417.5, "32": 60, "64": 60},
    "H100": {"16": 989.4, "tf32": 494.7, "32": 66.9, "64": 66.9},
    "H200 NVL": {"16": 835, "tf32": 417.5, "32": 60, "64": 60},
    "H200": {"16": 989.4, "tf32": 494.7, "32": 66.9, "64": 66.9},
    "A100": {"16": 312, "tf32": 156, "32": 19.5, "64": 19.5},
}


def training_flops(model: nn.Module, batch: Mapping[str, Any]) -> tuple[int | None, str]:
    """Floating-point operations of forward and backward pass over one sequence, and how they were counted; None where they cannot be.

    Three times the matrix products of a forward pass: a backward pass has two for each (arXiv 2204.02311, appendix B); what is computed
    twice to save memory is not counted. One sequence is run in evaluation mode; the model and torch's generators are as before.

    Args:
        model: called as ``run_form`` does. A sharded one has to be counted on all devices at once.
        batch: its first sequence is run, padding included, which is computed in training too.
    """
    form = getattr(model, "form", None)
    counted = form if form in COUNTED_AS_THEY_ARE else LINEAR
    first = {key: value[:1] for key, value in batch.items() if isinstance(value, Tensor) and key != "padding_mask"}
    # softmax attention as matrix products: torch's counter does not know every kernel of it
    with undisturbed(model), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run_form(model, counted, first)
    how = "3 x the matrix products of a forward pass"
    return 3 * counter.get_total_flops() or None, how if counted is None else f"{how} in the form {counted}"


def peak_flops(name: str, precision: str) -> tuple[float | None, str]:
    """What a device could do at most, in FLOP/s, and at which precision; or None and why.

    Args:
        name: of the device, as torch gives it; "cpu".
        precision: Lightning's name of it, such as "bf16-mixed".
    """
    kind = precision.partition("-")[0].removeprefix("bf")
    if kind == "32" and not float32_is_exact():
        kind = "tf32"
    for known, peaks in PEAKS.items():
        if known in name:
            return (1e12 * peaks[kind], f"{known}, {kind} dense") if kind in peaks else (None, f"no peak known for {precision}")
    return None, f"no peak known for {name}"
