"""``lba-bench``: what the parts cost on the device at hand.

lba-bench operator --lengths 1024,4096,16384 --decays selective --output bench/operator
lba-bench steps softmax lion_lit lion_d lion_s --resolution 224 --batch 128 --output bench/steps
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lba_exp.bench.settings import DECAYS, DEVICES, DIRECTIONS, DTYPES, PASSES, Settings, one, positive, read, whole
from lba_exp.bench.step_settings import COMPILES
from lba_exp.bench.step_settings import DTYPES as STEP_DTYPES
from lba_exp.commands.common import fail
from lba_exp.errors import RunFolderError, UserError
from lba_exp.stopping import number_of, stopped_by_signals, stopper

COMMAND = "lba-bench"


def main(arguments: list[str] | None = None) -> None:
    """Entry point; exits with 0, with 1 after a mistake or a form that failed, with 2 for an unknown flag, with 130 after Ctrl-C,
    143 after SIGTERM."""
    arguments = sys.argv[1:] if arguments is None else arguments
    args = _parser().parse_args(arguments)
    try:
        code = args.run(args, shlex.join([COMMAND, *arguments]))
    except UserError as error:
        fail(COMMAND, str(error))
        code = 1
    sys.exit(code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    benches = parser.add_subparsers(required=True, metavar="BENCH")
    first = benches.add_parser(
        "operator",
        help="time, memory and error of the operator's forms, beside softmax attention",
        description="Time, peak memory and error of the operator's forms over a grid of cases, in the same run with softmax attention, "
        "flash-linear-attention (chunk_simple_gla: fla is one causal pass, fla-x2 another one over the flipped tokens too) and a copy.",
        allow_abbrev=False,
    )
    first.set_defaults(run=operator)
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
    second.set_defaults(run=presets)
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
    third.set_defaults(run=steps)
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
    third.add_argument("--compile", default="model", help=f"{', '.join(COMPILES)}: blocks is what compile=true of a run does (%(default)s)")
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
    fourth.set_defaults(run=sequence)
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
    fifth.set_defaults(run=tune)
    fifth.add_argument("--dtypes", default="bfloat16,float32", help="bfloat16 (float16 goes with it), float32 (all)")
    fifth.add_argument("--widths", default="64,128", help="Dk and Dv: 64 and below, 128 and below (all)")
    fifth.add_argument("--tokens", default="131072", help="tokens a call, all sequences together (%(default)s)")
    fifth.add_argument("--heads", default="12", help="(%(default)s)")
    fifth.add_argument("--repeats", default="5", help="turns of each candidate (%(default)s)")
    fifth.add_argument("--seconds", default="0.5", help="time that the turns of one candidate take together (%(default)s)")
    return parser


def operator(args: argparse.Namespace, command: str) -> int:
    """``lba-bench operator``: measure, print, write; returns the exit code."""
    settings = read(vars(args))
    folder = _new_folder(args.output)
    from lba_exp.bench import operator as bench  # torch: imported once the options are known to be right

    device = bench.find_device(settings.device)
    with bench.threads(settings.threads):
        forms = bench.find_forms(settings, device)
        _make(folder)
        return _run(bench, settings, forms, device, folder, command)


def _new_folder(folder: Path | None) -> Path | None:
    """``--output``; raises RunFolderError where it exists."""
    if folder is not None and folder.exists():
        raise RunFolderError(f"--output {folder} exists already: give a new folder.")
    return folder


def _make(folder: Path | None) -> None:
    if folder is not None:
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise RunFolderError(f"--output {folder} cannot be made ({error.strerror}): give another folder.") from None


def presets(args: argparse.Namespace, command: str) -> int:
    """``lba-bench presets``: measure and print; returns the exit code."""
    from lba_exp.bench import presets as bench

    bench.run(args.presets.split(",") if args.presets else None, args.overrides, device=args.device, threads=args.threads)
    return 0


def sequence(args: argparse.Namespace, command: str) -> int:
    """``lba-bench sequence``: measure and print; returns the exit code."""
    numbers = ("ranks", "length", "check_length", "heads", "width", "chunk_size", "repeats")
    options: dict[str, Any] = {name: whole(name, getattr(args, name)) for name in numbers}
    options |= {"dtype": one("dtype", args.dtype, DTYPES, "a dtype"), "device": one("device", args.device, ("cuda", "cpu"), "a device")}
    from lba_exp.bench import sequence as bench

    settings = bench.SequenceSettings(**options, form=args.form)
    bench.show(settings, bench.run(settings))
    return 0


def tune(args: argparse.Namespace, command: str) -> int:
    """``lba-bench tune``: measure, print and write; returns the exit code."""
    numbers = {name: whole(name, getattr(args, name)) for name in ("tokens", "heads", "repeats")}
    dtypes = tuple(one("dtypes", text, ("bfloat16", "float32"), "a dtype") for text in args.dtypes.split(","))
    widths = tuple(int(one("widths", text, ("64", "128"), "a width")) for text in args.widths.split(","))
    from lba_exp.bench import tune as bench

    path = bench.run(bench.TuneSettings(dtypes, widths, seconds=positive("seconds", args.seconds), **numbers))
    print(f"written to {path}")
    return 0


def steps(args: argparse.Namespace, command: str) -> int:
    """``lba-bench steps``: measure, print, write; returns the exit code."""
    from lba_exp.bench import step_settings

    settings = step_settings.read(vars(args))
    configurations = step_settings.configurations(settings)
    folder = _new_folder(args.output)
    if settings.profile:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own lines on stderr; read when torch is imported
    from lba_exp.bench import operator as machine  # torch: imported once the options are known to be right
    from lba_exp.bench import profile, steps_report
    from lba_exp.bench import steps as bench

    device = machine.find_device(settings.device)
    with machine.threads(settings.threads):
        _make(folder)
        record = _begin("training step benchmark", command, machine, device, asdict(settings))
        stopped = None

        def timed(cells: list[dict[str, Any]], models: dict[str, Any]) -> None:
            record.update(cells=cells, load_average_after=machine.load_average()[0])
            if not settings.profile:
                return
            record["profiles"] = []
            if folder is not None:  # whatever the profiler does, the times are there
                steps_report.write(record, folder)
            medians = {cell["model"]: cell["median_ms"] for cell in cells}
            for found in profile.profiles(models, medians, device, tell):
                record["profiles"].append(found)

        try:
            with _progress(len(configurations) * (1 + settings.profile)) as tell, stopped_by_signals():
                bench.measure(configurations, settings, device, tell, timed)
            record["status"] = "finished"
        except KeyboardInterrupt as stop:
            record["status"], stopped = "interrupted", number_of(stop)
    if not record["cells"]:
        if folder is not None:
            folder.rmdir()  # there is nothing to write before the last turn
        fail(COMMAND, f"stopped by {stopper(stopped)}; nothing was written.")
        return 128 + stopped
    if folder is not None:
        steps_report.write(record, folder)
    steps_report.show(record)
    if folder is not None:
        print(f"written to {folder}")
    if stopped is not None:
        fail(COMMAND, f"stopped by {stopper(stopped)} after {len(record.get('profiles', ()))} of {len(configurations)} profiles.")
        return 128 + stopped
    return _tell_failures(record["cells"], "model", len(configurations))


def _begin(kind: str, command: str, machine: Any, device: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """A record without cells."""
    from lba_exp.results.git import git_state

    return {
        "kind": kind,
        "status": "running",
        "command": command,
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": git_state(),
        "environment": machine.environment(device),
        "settings": settings,
        "cells": [],
    }


def _tell_failures(cells: list[dict[str, Any]], key: str, number: int) -> int:
    """Says on stderr which cells failed, where some did; returns the exit code."""
    broken = [cell for cell in cells if cell["status"] == "failed"]
    if broken:
        fail(COMMAND, f"{len(broken)} of {number} cells failed, the first one ({broken[0][key]}) with: {broken[0]['reason']}")
    return 1 if broken else 0


def _run(bench: Any, settings: Settings, forms: tuple[str, ...], device: Any, folder: Path | None, command: str) -> int:
    from lba_exp.bench import report
    from lba_exp.bench.exact import ROWS
    from lba_exp.bench.growth import crossovers, growth

    record = _begin("operator benchmark", command, bench, device, asdict(settings) | {"forms": list(forms)}) | {"judged_rows": ROWS}
    cells = record["cells"]
    number = sum(map(len, bench.grid(settings))) * len(settings.passes) * len(bench.contenders_of(settings, forms))
    stopped = None

    def finish() -> None:
        record.update(load_average_after=bench.load_average()[0], crossovers=crossovers(cells), growth=growth(cells))

    try:
        with _progress(number) as tell, stopped_by_signals():
            for found in bench.measure(settings, forms, device, tell):
                cells += found
                if folder is not None:  # a process that is killed leaves what it had
                    finish()
                    report.write_tables(record, folder)
        record["status"] = "finished"
    except KeyboardInterrupt as stop:
        record["status"], stopped = "interrupted", number_of(stop)
    except BaseException:
        record["status"] = "failed"
        raise
    finally:
        finish()
        if folder is not None:  # before the screen, which may be a pipe that is closed
            report.write(record, folder)
        report.show(record)
        if folder is not None:
            print(f"written to {folder}")
    if stopped is not None:
        fail(COMMAND, f"stopped by {stopper(stopped)} after {len(cells)} of {number} cells.")
        return 128 + stopped
    return _tell_failures(cells, "form", number)


def _progress(total: int) -> Any:
    """A line of progress on stderr where that is a terminal: a context that gives ``tell(what is done, cells done since)``."""
    from contextlib import contextmanager

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    @contextmanager
    def showing():
        console = Console(stderr=True)
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        # redrawn by tell alone: a thread of its own would take time from what is measured
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal, auto_refresh=False) as bar:
            task = bar.add_task("", total=total)

            def tell(text: str, done: int) -> None:
                bar.update(task, advance=done, **({"description": text} if text else {}), refresh=True)

            yield tell

    return showing()


if __name__ == "__main__":
    main()
