"""The words of ``lba-bench``'s command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

from lba_exp.bench.model_settings import COMPILES as MODEL_COMPILES
from lba_exp.bench.model_settings import FORMS, LENGTHS
from lba_exp.bench.settings import DECAYS, DEVICES, DIRECTIONS, DTYPES, PASSES
from lba_exp.bench.step_settings import COMPILES
from lba_exp.bench.step_settings import DTYPES as STEP_DTYPES
from lba_exp.bench.time_settings import TABLES

MODELS = (
    "entries of conf/model, each with overrides of its own where they stand in one word with it: softmax lion_s {example}; words that "
    "are overrides alone are of all models: model.depth=6"
)
SIZED = " (size=vit_base)"


def make(command: str, description: str, runs: Mapping[str, Callable]) -> argparse.ArgumentParser:
    """The parser; ``runs``: by name of a benchmark, what its ``run`` is."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(command, description=description, formatter_class=raw, allow_abbrev=False)
    benches = parser.add_subparsers(required=True, metavar="BENCH")
    first = benches.add_parser(
        "operator",
        help="time, memory and error of the operator's forms, beside softmax attention",
        description="Time, peak memory and error of the operator's forms over a grid of cases, in the same run with softmax attention, "
        "flash-linear-attention (chunk_simple_gla: fla is one causal pass, fla-x2 another one over the flipped tokens too) and a copy.",
        allow_abbrev=False,
    )
    first.set_defaults(run=runs["operator"])
    first.add_argument("--forms", help="comma-separated forms of lba_exp.ops, fla, fla-x2 (all that run on the device, but auto)")
    first.add_argument("--lengths", default="256,1024,4096", help="comma-separated sequence lengths, in tokens (%(default)s)")
    first.add_argument("--dtypes", default="float32", help=f"of {', '.join(DTYPES)} (%(default)s)")
    first.add_argument("--decays", default=",".join(DECAYS), help=f"of {', '.join(DECAYS)}: vector is selective per channel (all)")
    first.add_argument("--passes", default=",".join(PASSES), help="forward, both: both is forward and backward (all)")
    first.add_argument("--batch", help="sequences B (1)")
    first.add_argument("--tokens", metavar="N", help="in place of --batch: N // length sequences at every length, at least one")
    first.add_argument("--heads", default="4", help="H (%(default)s)")
    first.add_argument("--key-width", default="64", help="Dk (%(default)s)")
    first.add_argument("--value-width", default="64", help="Dv (%(default)s)")
    first.add_argument("--unscaled", action="store_true", help="without the division by the denominator")
    first.add_argument("--direction", default="both", help=f"{', '.join(DIRECTIONS)} (%(default)s)")
    first.add_argument("--chunk-size", default="64", help="tokens per chunk (%(default)s)")
    first.add_argument("--device", default="auto", help=f"{', '.join(DEVICES)} (%(default)s)")
    first.add_argument("--threads", help="of torch, on the CPU (as torch finds it)")
    first.add_argument("--repeats", default="5", help="turns of each form at each length (%(default)s)")
    first.add_argument("--seconds", default="1", help="time that the turns of one form take together, at least one call each (%(default)s)")
    first.add_argument("--no-softmax", action="store_true", help="without softmax attention")
    first.add_argument("--memory-budget-gib", help="skip a form that needs more (what the device has free; on the CPU half of all)")
    first.add_argument("--output", type=Path, metavar="FOLDER", help="new folder for result.json, table.md, table.csv and figure.png")
    second = benches.add_parser(
        "presets",
        help="parameters, state, forms and their errors, time of a training step of the entries of conf/model",
        description="Entries of conf/model with fresh weights: parameters, state, errors of the forms, time of a training step.",
        allow_abbrev=False,
    )
    second.set_defaults(run=runs["presets"])
    second.add_argument("overrides", nargs="*", help="of the runs' configuration: model.width=192 data.source=...")
    second.add_argument("--presets", help="comma-separated entries of conf/model (all)")
    second.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="(%(default)s)")
    second.add_argument("--threads", type=int, help="of torch, on the CPU (as torch finds it)")
    third = benches.add_parser(
        "steps",
        help="time and memory of a training step of models of images, against the first of them",
        description="Training steps (forward, loss, backward, AdamW) of models of images on synthetic data, in turns, in one run: "
        "time and peak memory, against the first model named.",
        allow_abbrev=False,
    )
    third.set_defaults(run=runs["steps"])
    third.add_argument("models", nargs="+", metavar="MODEL", help=MODELS.format(example='"lion_s model.mixer.form=chunkwise"') + SIZED)
    _training_options(third)
    third.add_argument(
        "--profile", action="store_true", help="then one more step of each under torch's profiler: its kernels (on the CPU operators)"
    )
    third.add_argument(
        "--output", type=Path, metavar="FOLDER", help="new folder for result.json, table.md, table.csv (and kernels.csv: --profile)"
    )
    _model(benches, runs["model"])
    _times(benches, runs["times"])
    _figures(benches, runs["figures"])
    fourth = benches.add_parser(
        "sequence",
        help="one long sequence over several GPUs against one GPU with its share of the tokens",
        description="The operator on one long sequence over several devices (sequence_group): error, time and peak memory a device.",
        allow_abbrev=False,
    )
    fourth.set_defaults(run=runs["sequence"])
    fourth.add_argument("--ranks", default="2", help="devices (%(default)s)")
    fourth.add_argument("--length", default="2097152", help="tokens of the sequence (%(default)s)")
    fourth.add_argument("--check-length", default="16384", help="tokens of the sequence that is held against float64 (%(default)s)")
    fourth.add_argument("--heads", default="4", help="H (%(default)s)")
    fourth.add_argument("--width", default="64", help="Dk and Dv (%(default)s)")
    fourth.add_argument("--dtype", default="bfloat16", help=f"one of {', '.join(DTYPES)} (%(default)s)")
    fourth.add_argument("--form", default="chunkwise", help="of lba_exp.ops (%(default)s)")
    fourth.add_argument("--chunk-size", default="64", help="tokens per chunk (%(default)s)")
    fourth.add_argument("--repeats", default="5", help="calls that are timed (%(default)s)")
    fourth.add_argument("--device", default="cuda", help="cuda, or cpu (%(default)s)")
    fifth = benches.add_parser(
        "tune",
        help="which of the fused form's candidate sizes is the fastest on this GPU; later runs take it",
        description="Times the candidates of lba_exp/ops/fused/candidates.py on this GPU, checks that their results agree, and keeps the "
        "fastest in a file that every later run on such a GPU reads: LBA_EXP_PLANS, else lba_exp/fused_plans.json in the cache folder.",
        allow_abbrev=False,
    )
    fifth.set_defaults(run=runs["tune"])
    fifth.add_argument("--dtypes", default="bfloat16,float32", help="bfloat16 (float16 goes with it), float32 (all)")
    fifth.add_argument("--widths", default="64,128", help="Dk and Dv: 64 and below, 128 and below (all)")
    fifth.add_argument("--tokens", default="131072", help="tokens a call, all sequences together (%(default)s)")
    fifth.add_argument("--heads", default="12", help="(%(default)s)")
    fifth.add_argument("--repeats", default="5", help="turns of each candidate (%(default)s)")
    fifth.add_argument("--seconds", default="0.5", help="time that the turns of one candidate take together (%(default)s)")
    return parser


def _model(benches: argparse._SubParsersAction, run: Callable) -> None:
    parser = benches.add_parser(
        "model",
        help="time, memory and operations of whole models in inference: every form at every length or resolution",
        description="Forward passes of models without gradients on synthetic data: time, peak memory, floating-point operations of every "
        "form at every length (a classifier of sequences of values) or resolution (a vision Transformer), and their figures.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    parser.add_argument("models", nargs="+", metavar="PRESET", help=MODELS.format(example='"lion_s model.mixer.form=recurrent"'))
    parser.add_argument(
        "--forms", default=",".join(FORMS), help="of models that name none; those that a model does not have stay empty (%(default)s)"
    )
    parser.add_argument("--lengths", help=f"comma-separated numbers of tokens of a sequence ({LENGTHS})")
    parser.add_argument("--resolutions", help="in place of --lengths: heights and widths of images in pixels (size=vit_base)")
    parser.add_argument("--batch", help="sequences or images B (1)")
    parser.add_argument("--tokens", metavar="N", help="in place of --batch: N // tokens of one of them at every size, at least one")
    parser.add_argument(
        "--chunk-sizes", help="comma-separated tokens a chunk of the chunkwise form, measured each (model.mixer.chunk_size)"
    )
    parser.add_argument("--classes", default="1000", help="(%(default)s)")
    parser.add_argument("--dtype", default="float32", help=f"of weights and activations: {', '.join(DTYPES)} (%(default)s)")
    parser.add_argument("--compile", default="off", help=f"{', '.join(MODEL_COMPILES)} (%(default)s)")
    parser.add_argument("--memory-budget-gib", help="skip a form whose operator is estimated to need more (CPU: half of all; CUDA: none)")
    parser.add_argument(
        "--cell-seconds",
        metavar="S",
        help="a form that would take longer at a size, all its passes together, is left after two blocks: an estimate of its time (none)",
    )
    _timing_options(parser, "1")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="new folder for result.json, table.md, table.csv and figures")


def _times(benches: argparse._SubParsersAction, run: Callable) -> None:
    parser = benches.add_parser(
        "times",
        help="time of a training step over softmax attention's at the paper's sizes, beside the paper's",
        description="lba-bench steps at each of some sizes, softmax attention first, and beside each ratio the paper's.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    help_text = MODELS.format(example='"hydra model.mlp_ratio=3"')
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"{help_text}; softmax first (all whose times the paper tells)")
    parser.add_argument("--sizes", default=",".join(TABLES), help="comma-separated entries of conf/size (%(default)s)")
    _training_options(parser)
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="new folder for result.json, table.md and table.csv")


def _figures(benches: argparse._SubParsersAction, run: Callable) -> None:
    parser = benches.add_parser(
        "figures",
        help="draw the figures of lba-bench model or operator again, from the record in their folder",
        description="Draws the figures of a folder that lba-bench model or operator wrote, from its result.json, in place of those there: "
        "for a benchmark that ran where matplotlib is not installed.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="with a result.json")


def _training_options(parser: argparse.ArgumentParser) -> None:
    """What training steps are measured with."""
    parser.add_argument("--form", default="auto", help="form of the linear mixers (%(default)s)")
    parser.add_argument("--resolution", default="224", help="height and width of the images in pixels (%(default)s)")
    parser.add_argument("--batch", default="128", help="images a step (%(default)s)")
    parser.add_argument("--classes", default="1000", help="(%(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help=f"{', '.join(STEP_DTYPES)}: bfloat16 is autocast (%(default)s)")
    parser.add_argument(
        "--compile",
        default="model",
        help=f"{', '.join(COMPILES)}: blocks is what compile=true of a run does, graphs what compile=graphs does (%(default)s)",
    )
    _timing_options(parser, "10")


def _timing_options(parser: argparse.ArgumentParser, seconds: str) -> None:
    parser.add_argument("--device", default="auto", help=f"{', '.join(DEVICES)} (%(default)s)")
    parser.add_argument("--threads", help="of torch, on the CPU (as torch finds it)")
    parser.add_argument("--repeats", default="5", help="turns of each (%(default)s)")
    parser.add_argument("--seconds", default=seconds, help="time that the turns of one take together, at least one call each (%(default)s)")
