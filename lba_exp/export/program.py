"""A module as a ``torch.export`` program whose free sizes stay free, and as an ONNX file made from that."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from lba_exp.errors import UserError
from lba_exp.export.files import METADATA, PROPERTY, needs
from lba_exp.export.inputs import LENGTH

OPSET = 20
MANY = 2**31  # a size that has a bound below this is not free


def trace(module: nn.Module, arguments: tuple, free: Any, what: str, *, longest: int | None = None, advice: str = "") -> ExportedProgram:
    """The program of a module.

    Args:
        module: in evaluation mode, its parameters without gradients.
        arguments: examples; every free size at least 2.
        free: like ``arguments``, with {axis: name of the size} in place of each tensor.
        what: the module, for messages.
        longest: the sizes named "length" need not exceed this.
        advice: ends the sentence where a size would be bound.

    Raises:
        UserError: it cannot be exported, or a free size would be bound to some range.
    """
    tensor_axes = _leaves(free)
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(module, arguments, dynamic_shapes=_dynamic(free), strict=False)
    except Exception as error:  # of many kinds: any layer may do what cannot be traced
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{what} cannot be exported: {reason[0].rstrip('.')}.") from error
    examples = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"][-len(tensor_axes) :]
    for example, axes in zip(examples, tensor_axes, strict=True):
        for axis, name in axes.items():
            enough = longest if name == LENGTH and longest is not None else MANY
            bounds = program.range_constraints.get(getattr(getattr(example.shape[axis], "node", None), "expr", None))
            if bounds is None or bounds.lower > 2 or bounds.upper < enough:
                bound = "one number" if bounds is None else f"{bounds.lower} to {bounds.upper}"
                raise UserError(f"{what} cannot be exported for every {name}: its operations depend on it (here {bound}){advice}.")
    return program


def _leaves(free: Any) -> list[dict[int, str]]:
    return [leaf for part in free for leaf in _leaves(part)] if isinstance(free, tuple) else [free]


def _dynamic(free: Any) -> Any:
    return tuple(map(_dynamic, free)) if isinstance(free, tuple) else dict.fromkeys(free, Dim.DYNAMIC)


def save_program(program: ExportedProgram, path: Path, metadata: dict[str, Any]) -> None:
    with quiet():
        torch.export.save(program, path, extra_files={METADATA: json.dumps(metadata, indent=2)})


def save_onnx(program: ExportedProgram, path: Path, metadata: dict[str, Any], free: Sequence[dict[int, str]]) -> None:
    """Writes an ONNX file, opset 20, with named inputs, output and free sizes; UserError for what ONNX cannot hold."""
    needs("onnx", "onnxscript")
    names = {
        "input_names": [x["name"] for x in metadata["inputs"]],
        "output_names": [x["name"] for x in metadata["outputs"]],
        "dynamic_shapes": tuple(free),
    }
    try:
        with quiet(), redirect_stdout(io.StringIO()):  # onnxscript 0.6 prints
            made = torch.onnx.export(program, dynamo=True, opset_version=OPSET, verbose=False, **names)
            made.model.metadata_props[PROPERTY] = json.dumps(metadata)
            made.save(path, external_data=False)
    except Exception as error:  # of many kinds: an operation that ONNX does not have, a file above 2 GiB
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{metadata['model']} cannot be written as ONNX: {reason[0].rstrip('.')}.") from error


def run_program(path: Path) -> Any:
    """A written program as a function of its inputs."""
    with quiet():
        return torch.export.load(path).module()


def run_onnx(path: Path) -> Any:
    """A written ONNX file as a function of its inputs, tensors in and out, in onnxruntime on the CPU."""
    needs("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(*inputs: Tensor) -> Tensor:
        found = session.run(None, {given.name: x.numpy() for given, x in zip(session.get_inputs(), inputs, strict=True)})
        return torch.from_numpy(found[0])

    return run


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, torch's exporters do not remark on themselves."""
    logs = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    before = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(logs, before, strict=True):
            log.setLevel(level)
