"""``lba-bench model``, ``times`` and ``figures``: whole models in inference, their training beside the paper's times, pictures of it."""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from typing import Any

from lba_exp.commands.bench_running import begin, fill, make, new_folder
from lba_exp.errors import RunFolderError


def model(args: argparse.Namespace, command: str) -> int:
    """``lba-bench model``: measure, print, write; returns the exit code."""
    from lba_exp.bench import model_settings

    settings = model_settings.read(vars(args))
    configurations = model_settings.configurations(settings)
    folder = new_folder(args.output)
    from lba_exp.bench import drawing, model_report
    from lba_exp.bench import model as bench  # torch: imported once the options are known to be right
    from lba_exp.bench import operator as machine
    from lba_exp.bench.memory_fit import fits

    device = machine.find_device(settings.device)
    with machine.threads(settings.threads):
        contenders = bench.contenders(configurations, settings)
        make(folder)
        record = begin(drawing.MODEL, command, machine, device, asdict(settings) | {"axis": settings.axis})

        def finish() -> dict[str, Any]:
            return {"load_average_after": machine.load_average()[0], "fits": fits(record["cells"])}

        number = len(settings.sizes) * sum(map(len, contenders.values()))
        measure = lambda tell: bench.measure(configurations, contenders, settings, device, tell)  # noqa: E731
        return fill(record, number, measure, finish, model_report, folder, "model")


def times(args: argparse.Namespace, command: str) -> int:
    """``lba-bench times``: measure, print, write; returns the exit code."""
    from lba_exp.bench import time_settings

    settings = time_settings.read(vars(args))
    configurations = time_settings.configurations(settings)
    folder = new_folder(args.output)
    from lba_exp.bench import operator as machine  # torch: imported once the options are known to be right
    from lba_exp.bench import times as bench

    first = next(iter(settings.values()))
    device = machine.find_device(first.device)
    with machine.threads(first.threads):
        make(folder)
        shown = asdict(replace(first, overrides=first.overrides[1:])) | {"sizes": list(settings)}
        record = begin("training times benchmark", command, machine, device, shown)

        def finish() -> dict[str, Any]:
            return {"load_average_after": machine.load_average()[0]}

        measure = lambda tell: bench.measure(configurations, settings, device, tell)  # noqa: E731
        return fill(record, sum(map(len, configurations.values())), measure, finish, bench, folder, "model")


def figures(args: argparse.Namespace, command: str) -> int:
    """``lba-bench figures``: draw a benchmark's figures from its record; returns the exit code."""
    from lba_exp.bench import drawing
    from lba_exp.results.folder import read_record

    record = read_record(args.folder)
    if record is None:
        raise RunFolderError(f"{args.folder} has no result.json: give the folder that a benchmark wrote.")
    try:
        names = drawing.save(record, args.folder)
    except (KeyError, TypeError, AttributeError) as error:
        raise RunFolderError(f"{args.folder / 'result.json'} is not a benchmark's whole record: {error!r}.") from None
    print("\n".join(str(args.folder / name) for name in names) or "the cells are enough for no figure")
    return 0
