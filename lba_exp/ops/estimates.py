"""Estimates of memory, before anything is computed."""

from lba_exp.ops import checks
from lba_exp.ops.api import FORMS, choose_form


def estimate_bytes(form: str, batch: int, length: int, heads: int, key_width: int, value_width: int, itemsize: int = 4) -> int:
    """A rough upper estimate of the memory, in bytes, that a form's forward pass takes beside its inputs and its output.

    ``itemsize`` is that of the inputs; the work is done in float32 (8-byte items: float64). Meant to skip a form that would not fit, not to
    plan to the byte. "parallel" counts six L x L matrices per head (scores, decays and their parts); the others the numerator, "chunkwise"
    the states of both directions at every chunk of 64 (as under ``torch.compile``; eager mode keeps
    fewer), and what they work on at a time. "fused" counts states at every 128 tokens, in the dtype of the inputs, sums of decays and
    the denominator; "auto" is counted as on a CPU.
    """
    checks.choice("form", form, FORMS)
    form = choose_form(length) if form == "auto" else form
    item = max(4, itemsize)
    rows, width = batch * heads, key_width + value_width
    numerator, state = rows * length * (value_width + 1), rows * key_width * (value_width + 1)
    if form == "parallel":
        return item * (6 * rows * length * length + 2 * rows * length * width)
    if form == "recurrent":
        return item * (numerator + 4 * state + 12 * rows * min(length, 256) * width)
    if form == "blockwise":
        return item * (2 * numerator + rows * length * width + 8 * rows * 64 * max(64, width))
    chunks = -(-length // 64)
    if form == "fused":
        return 2 * rows * -(-length // 128) * (key_width * (value_width * itemsize + 4) + 64) + rows * length * 20
    return item * (numerator + (2 * state * chunks if chunks > 1 else 0) + 16 * min(2**19, rows * length * max(64, width)))
