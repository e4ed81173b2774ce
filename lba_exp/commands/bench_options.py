"""The words of ``lba-bench``'s command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

from lba_exp.bench.settings import DECAYS, DEVICES, DIRECTIONS, DTYPES, PASSES
from lba_exp.bench.step_settings import COMPILES
from lba_exp.bench.step_settings import DTYPES as STEP_DTYPES


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
    third.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="entries of conf/model, each with overrides of its own where they stand in one word with it: softmax lion_s "
        '"lion_s model.mixer.form=chunkwise"; words that are overrides alone are of all models: model.depth=6 (size=vit_base)',
    )
    third.add_argument("--form", default="auto", help="form of the linear mixers (%(default)s)")
    third.add_argument("--resolution", default="224", help="height and width of the images in pixels (%(default)s)")
    third.add_argument("--batch", default="128", help="images a step (%(default)s)")
    third.add_argument("--classes", default="1000", help="(%(default)s)")
    third.add_argument("--dtype", default="bfloat16", help=f"{', '.join(STEP_DTYPES)}: bfloat16 is autocast (%(default)s)")
    third.add_argument(
        "--compile",
        default="model",
        help=f"{', '.join(COMPILES)}: blocks is what compile=true of a run does, graphs what compile=graphs does (%(default)s)",
    )
    third.add_argument("--device", default="auto", help=f"{', '.join(DEVICES)} (%(default)s)")
    third.add_argument("--threads", help="of torch, on the CPU (as torch finds it)")
    third.add_argument("--repeats", default="5", help="turns of each model (%(default)s)")
    third.add_argument(
        "--seconds", default="10", help="time that the turns of one model take together, at least one step each (%(default)s)"
    )
    third.add_argument(
        "--profile", action="store_true", help="then one more step of each under torch's profiler: its kernels (on the CPU operators)"
    )
    third.add_argument(
        "--output", type=Path, metavar="FOLDER", help="new folder for result.json, table.md, table.csv (and kernels.csv: --profile)"
    )
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
