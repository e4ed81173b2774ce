"""``lba-bench``: what the parts cost on the device at hand.

lba-bench operator --lengths 1024,4096,16384 --decays selective --output bench/operator
lba-bench steps softmax lion_lit lion_d lion_s --resolution 224 --batch 128 --output bench/steps
lba-bench model softmax lion_s --resolutions 224,448,896 --tokens 50000 --output bench/model
lba-bench times --output bench/times
lba-bench figures bench/model
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lba_exp.bench.drawing import OPERATOR
from lba_exp.bench.settings import DTYPES, Settings, one, positive, read, whole
from lba_exp.commands import bench_options
from lba_exp.commands.bench_models import figures, model, times
from lba_exp.commands.bench_running import COMMAND, begin, fill, make, new_folder, progress, tell_failures
from lba_exp.commands.common import fail
from lba_exp.errors import UserError
from lba_exp.stopping import number_of, stopped_by_signals, stopper


def main(arguments: list[str] | None = None) -> None:
    """Entry point; exits with 0, with 1 after a mistake or a form that failed, with 2 for an unknown flag, with 130 after Ctrl-C,
    143 after SIGTERM."""
    arguments = sys.argv[1:] if arguments is None else arguments
    args = bench_options.make(COMMAND, __doc__, RUNS).parse_args(arguments)
    try:
        code = args.run(args, shlex.join([COMMAND, *arguments]))
    except UserError as error:
        fail(COMMAND, str(error))
        code = 1
    sys.exit(code)


def operator(args: argparse.Namespace, command: str) -> int:
    """``lba-bench operator``: measure, print, write; returns the exit code."""
    settings = read(vars(args))
    folder = new_folder(args.output)
    from lba_exp.bench import operator as bench  # torch: imported once the options are known to be right

    device = bench.find_device(settings.device)
    with bench.threads(settings.threads):
        forms = bench.find_forms(settings, device)
        make(folder)
        return _run(bench, settings, forms, device, folder, command)


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
    folder = new_folder(args.output)
    if settings.profile:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own lines on stderr; read when torch is imported
    from lba_exp.bench import operator as machine  # torch: imported once the options are known to be right
    from lba_exp.bench import profile, steps_report
    from lba_exp.bench import steps as bench

    device = machine.find_device(settings.device)
    with machine.threads(settings.threads):
        make(folder)
        record = begin("training step benchmark", command, machine, device, asdict(settings))
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
            with progress(len(configurations) * (1 + settings.profile)) as tell, stopped_by_signals():
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
    return tell_failures(record["cells"], "model", len(configurations))


def _run(bench: Any, settings: Settings, forms: tuple[str, ...], device: Any, folder: Path | None, command: str) -> int:
    from lba_exp.bench import report
    from lba_exp.bench.exact import ROWS
    from lba_exp.bench.growth import crossovers, growth

    record = begin(OPERATOR, command, bench, device, asdict(settings) | {"forms": list(forms)}) | {"judged_rows": ROWS}
    cells = record["cells"]
    number = sum(map(len, bench.grid(settings))) * len(settings.passes) * len(bench.contenders_of(settings, forms))

    def finish() -> dict[str, Any]:
        return {"load_average_after": bench.load_average()[0], "crossovers": crossovers(cells), "growth": growth(cells)}

    return fill(record, number, lambda tell: bench.measure(settings, forms, device, tell), finish, report, folder, "form")


RUNS = {
    "operator": operator,
    "presets": presets,
    "steps": steps,
    "model": model,
    "times": times,
    "figures": figures,
    "sequence": sequence,
    "tune": tune,
}

if __name__ == "__main__":
    main()
