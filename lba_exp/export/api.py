"""From a model to a checked file: see ``lba_exp.export.export``."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lba_exp
from lba_exp import messages
from lba_exp.errors import UserError
from lba_exp.export import checking, source, steps
from lba_exp.export.files import METADATA, needs, new
from lba_exp.export.inputs import BATCH, Inputs, inputs_of
from lba_exp.export.options import check_options
from lba_exp.export.program import OPSET, run_onnx, run_program, save_onnx, save_program, trace

STEPS = (5, 2, 9)  # of a step's check


def export(model_or_run: Any, output: str | Path, **options: Any) -> dict[str, Any]:
    """See ``lba_exp.export.export``, which gives all options."""
    output = Path(output).expanduser()
    check_options(model_or_run, output, **options)
    to, batch, verify = options["to"], options["batch"], options["verify"]
    if to == "onnx":
        needs("onnx", "onnxscript", *(("onnxruntime",) if verify else ()))
    model, about = source.read(model_or_run)
    # the caller's model keeps its form, its device and its gradients
    model = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    pairs = about.pop("second_text")
    metadata = {"to": to, "form": None, "model": type(model).__name__, "config": getattr(model, "config", None)}
    metadata |= about | {"versions": {"lba_exp": lba_exp.__version__, "torch": torch.__version__}}
    with new(output) as part:
        if to == "step":
            inputs = inputs_of(model, batch=batch)
            write = _write_model_step if steps.steps_as_one(model) else _write_operator_steps
            errors = write(model, inputs, part, metadata, batch, options["block"], verify)
        else:
            inputs = inputs_of(model, batch=batch, padding_mask=options["padding_mask"], token_types=options["token_types"] or pairs)
            errors = _write_whole(model, inputs, part, metadata, options["form"], batch, verify)
    return {"file": str(output), "metadata": metadata, "errors": errors}


def _lengths(inputs: Inputs, model: nn.Module) -> dict[str, Any]:
    return {"longest": inputs.longest, "fixed": inputs.fixed, "trained": (getattr(model, "config", None) or {}).get("length")}


def _write_whole(
    model: nn.Module, inputs: Inputs, path: Path, metadata: dict[str, Any], form: str | None, batch: int | None, verify: bool
) -> dict[str, float]:
    name = type(model).__name__
    if form is not None and not model.forms:
        raise UserError(f"form={form} means nothing to this {name}: softmax attention is one form.")
    trained = model.form
    form = (form or "chunkwise") if model.forms else None
    try:
        model.set_form(form)
    except ValueError:
        raise UserError(f"form={form}: {messages.unknown(form, model.forms, f'a form of this {name}')}") from None
    chunk = max(getattr(mixer, "chunk_size", 16) for mixer in model.mixers)
    seen, others = inputs.lengths(chunk)
    free = [x.free for x in inputs.tensors]
    example = inputs.example(3, seen)
    what = name if form is None else f"{name} in the {form} form"
    advice = "; give form=chunkwise" if form == "parallel" and "chunkwise" in model.forms else ""
    program = trace(model, example, tuple(free), what, longest=inputs.longest, advice=advice)
    shape = ["batch" if batch is None else batch, *(size if isinstance(size, int) else "length" for size in _output(program).shape[1:])]
    outputs = [{"name": "logits", "dtype": str(_output(program).dtype).removeprefix("torch."), "shape": shape}]
    metadata |= {"form": form, "inputs": [x.described() for x in inputs.tensors], "outputs": outputs, "lengths": _lengths(inputs, model)}
    onnx = metadata["to"] == "onnx"
    if onnx:
        metadata["opset"] = OPSET
        save_onnx(program, path, metadata, free)
    else:
        save_program(program, path, metadata)
    if not verify:
        return {}
    model.set_form(trained if trained in model.forms else form)
    errors = checking.whole_errors((run_onnx if onnx else run_program)(path), model, inputs, others, batch)
    checking.check_errors(errors, f"the {metadata['to']} file")
    return errors


def _output(program: torch.export.ExportedProgram) -> torch.Tensor:
    (output,) = (node for node in program.graph.nodes if node.op == "output")
    return output.args[0][0].meta["val"]


def _write_model_step(
    model: nn.Module, inputs: Inputs, path: Path, metadata: dict[str, Any], batch: int | None, block: int, verify: bool
) -> dict[str, float]:
    if not path.suffix:
        raise UserError(f"the step of this {type(model).__name__} is one graph: give an output that ends in .pt2.")
    if inputs.longest is not None and block > inputs.longest:
        raise UserError(f"block={block} is more than the {inputs.longest} tokens that this model has positions for.")
    steps.check_steps(model)
    step = steps.StepModel(copy.deepcopy(model)).eval()
    states = _with_batch(step.states, batch)
    tokens = {"name": "tokens", "dtype": "int64", "shape": [batch or BATCH, block]}
    vocabulary = model.encoder.embedding.num_embeddings
    example = torch.zeros(batch or 3, block, dtype=torch.int64), checking.start_state(states, batch or 3)
    free = tuple(_free([tokens])), tuple(_free(states))
    program = trace(step, example, (free[0][0], free[1]), f"the step of {type(model).__name__}")
    outputs = [{"name": "logits", "dtype": str(model.encoder.embedding.weight.dtype).removeprefix("torch.")}]
    outputs[0]["shape"] = [*tokens["shape"], vocabulary]
    metadata |= {"inputs": [tokens], "outputs": outputs, "state": states, "block": block, "lengths": _lengths(inputs, model)}
    save_program(program, path, metadata)
    if not verify:
        return {}
    most = None if inputs.longest is None else inputs.longest // block
    blocks = sorted({n if most is None else min(n, most) for n in STEPS})
    errors = checking.model_step_errors(run_program(path), model, inputs_of(model), states, block, blocks, batch)
    checking.check_errors(errors, "the step")
    return errors


def _write_operator_steps(
    model: nn.Module, inputs: Inputs, path: Path, metadata: dict[str, Any], batch: int | None, block: int, verify: bool
) -> dict[str, float]:
    steps.check_steps(model)
    if path.suffix:
        raise UserError(
            f"this {type(model).__name__} has no step of the whole model, which only a language model that reads forward alone has: give "
            "an output without .pt2, a folder for the steps of its layers' operators."
        )
    path.mkdir()
    graphs: dict[str, str] = {}  # what a graph is made from -> its file
    runs, layers, errors = {}, [], {}
    for number, layer in enumerate(model.blocks):
        calls = steps.operators(layer, block)
        for call in calls:
            call["inputs"] = _with_batch(call["inputs"], batch)
            made_from = json.dumps({key: call[key] for key in ("direction", "diagonal_weight", "inputs")})
            if made_from not in graphs:
                same = sum(file.startswith(call["direction"]) for file in graphs.values())
                graphs[made_from] = f"{call['direction']}{f'_{same + 1}' if same else ''}.pt2"
                example = checking.start_state(call["inputs"], batch or 3)
                what = f"the step of layer {number}, {type(layer.mixer).__name__},"
                program = trace(steps.StepOperator(call["direction"], call["diagonal_weight"]), example, tuple(_free(call["inputs"])), what)
                save_program(program, path / graphs[made_from], metadata | {"block": block} | call)
                runs[graphs[made_from]] = run_program(path / graphs[made_from]) if verify else None
            call["file"] = graphs[made_from]
        layers.append({"layer": number, "mixer": type(layer.mixer).__name__, "calls": calls})
        for which in sorted({call["call"] for call in calls}) if verify else ():
            own = {call["direction"]: call for call in calls if call["call"] == which}
            run = {direction: runs[call["file"]] for direction, call in own.items()}
            key = f"layer {number}" if len(own) == len(calls) else f"call {which} of layer {number}"
            found = checking.operator_step_errors(run, own, block, list(STEPS), batch)
            errors |= {f"{name} of {key}": error for name, error in found.items()}
    metadata |= {"block": block, "layers": layers, "lengths": _lengths(inputs, model)}
    (path / METADATA).write_text(json.dumps(metadata, indent=2) + "\n", "utf-8")
    if errors:
        checking.check_errors(errors, "a step")
    return errors


def _with_batch(described: list[dict[str, Any]], batch: int | None) -> list[dict[str, Any]]:
    return [x | {"shape": [batch if batch and size == BATCH else size for size in x["shape"]]} for x in described]


def _free(described: list[dict[str, Any]]) -> list[dict[int, str]]:
    return [{axis: size for axis, size in enumerate(x["shape"]) if isinstance(size, str)} for x in described]
