"""Trained models as files that run without this package: ``torch.export`` programs, ONNX, and a step of the recurrence.

report = lba_exp.export.export("runs/digits/lion_s/seed0", "model.pt2", verify=True)
program = torch.export.load("model.pt2").module()
logits = program(inputs)                              # any batch, any length
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

TARGETS = ("torch-export", "step", "onnx")
FORMS = ("chunkwise", "parallel")


def export(
    model_or_run: Any,
    output: str | Path,
    *,
    to: str = "torch-export",
    form: str | None = None,
    batch: int | None = None,
    block: int = 1,
    padding_mask: bool = False,
    token_types: bool = False,
    verify: bool = False,
) -> dict[str, Any]:
    """Writes a model to a new file that runs without this package, on the CPU and in the dtype of its weights, for inference.

    Args:
        model_or_run: a model of this package, or the path of a run folder, of a checkpoint in one, or of a model folder.
        output: the file that is made: ``NAME.pt2``, with ``to="onnx"`` ``NAME.onnx``; a folder for the steps of a model that does not
            read forward alone.
        to: ``"torch-export"`` or ``"onnx"``: the whole model, for inputs of any length and any number of sequences (images of one size);
            ``"step"``: see ``lba_exp.export.steps``.
        form: of the linear layers in the file: ``"chunkwise"`` (default; linear in the length) or ``"parallel"`` (quadratic; not with
            decays per channel where lengths differ). Not for softmax attention alone, nor for a step.
        batch: the file takes so many sequences and no other number.
        block: tokens that a step takes.
        padding_mask: the file takes a mask (B, L) of bool, True at real tokens, as its second input.
        token_types: the file takes token types (B, L) as its last input.
        verify: run the file at three lengths that the export did not see (three batches where the length is fixed), and write it only
            where each output differs from the model's by at most 1e-4, relative, in the 2-norm.

    Returns:
        ``{"file", "metadata", "errors"}``: what the file says about itself (``lba_exp.export.read_metadata``), and the relative error at
        each length (empty without ``verify``).

    Raises:
        lba_exp.errors.UserError: a source that holds no model, a model or an option that cannot be exported, an output that exists
            already, a missing package, or an output that differs.
    """
    from lba_exp.export.api import export as implementation

    options = {"form": form, "batch": batch, "block": block, "padding_mask": padding_mask, "token_types": token_types, "verify": verify}
    return implementation(model_or_run, output, to=to, **options)


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What an exported file, or folder of steps, says about itself; UserError where it is none.

    Keys: ``to``, ``form``, ``model`` (class), ``config``, ``inputs`` and ``outputs`` (name, dtype, shape), ``lengths`` (``longest``: tokens
    at most, null: no limit; ``fixed``: the only number of tokens; ``trained``: that of the data), ``run``, ``name``, ``step``, ``commit``,
    ``data``, ``class_names``, ``normalisation`` (``mean``, ``deviation``: inputs are (pixel / 255 - mean) / deviation), ``vocabulary`` (its
    identity), ``versions``; a step has ``state`` and ``block``, ONNX has ``opset``.
    """
    from lba_exp.export.files import read_metadata as implementation

    return implementation(Path(path))
