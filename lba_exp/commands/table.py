"""``lba-table RUNS``: tables of runs, from their records alone.

lba-table runs/digits                                             # models x data sets, test accuracy
lba-table runs --rows model,optim.lr --metric validation/accuracy --where sweep=digits_search
lba-table runs --baseline softmax --compare --paper lra --output table.tex
lba-table --diff runs/digits/lion_s/seed0 runs/digits/lion_d/seed0
lba-table --from wandb ENTITY/PROJECT
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from lba_exp.commands.common import fail
from lba_exp.errors import UserError

COMMAND = "lba-table"
SUFFIXES = {".md": "md", ".csv": "csv", ".tex": "tex"}


def main(arguments: list[str] | None = None) -> None:
    """Entry point; exits with 0, or with 1 after a mistake."""
    parser = argparse.ArgumentParser(COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help="run folders, or folders that hold some at any depth")
    parser.add_argument("--diff", nargs=2, metavar=("RUN", "RUN"), help="the keys in which the configurations of two runs differ")
    parser.add_argument("--from", dest="source", choices=("folders", "wandb"), default="folders", help="wandb: RUNS are ENTITY/PROJECT")
    parser.add_argument("--format", choices=("md", "csv", "tex"), help="default: by the suffix of --output, else md")
    add_table_options(parser)
    parser.add_argument("--output", type=Path, help="a new file, instead of the screen: .md, .csv or .tex")
    args = parser.parse_args(arguments)
    try:
        form = _format(args)
        text = _difference(args, form) if args.diff else _table(args, form)
        if args.output is None:
            print(text, end="", flush=True)
        else:
            write_new(args.output, text)
    except UserError as error:
        fail(COMMAND, str(error))
        sys.exit(1)
    except BrokenPipeError:  # `lba-table ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def add_table_options(parser: argparse.ArgumentParser) -> None:
    """The options that say what a table shows: shared with lba-report."""
    keys = "model, data, task, seed, row, experiment, sweep, ... or any key of config.yaml; several with commas"
    parser.add_argument("--rows", default="model", help=f"what makes a row (default: model): {keys}")
    parser.add_argument("--cols", default="data", help="what makes a column (default: data); the same keys")
    parser.add_argument("--metric", default="test/accuracy", help="test/accuracy (default), validation/loss, parity/recurrent/rel, ...")
    parser.add_argument("--where", action="append", default=[], metavar="KEY=VALUE[,VALUE]", help="only these runs; may be repeated")
    parser.add_argument("--spread", choices=("std", "ci95", "none"), default="std", help="beside the mean over seeds (default: std)")
    parser.add_argument("--better", choices=("lower", "higher", "none"), help="which values are marked (default: by the metric's name)")
    parser.add_argument("--baseline", metavar="ROW", help="add training time and memory relative to this row")
    parser.add_argument("--compare", action="store_true", help="test the difference from the baseline, paired by seed")
    parser.add_argument("--paper", metavar="TABLE[:COLUMN]", help="add the paper's numbers: lra, imagenet_small, cifar100_parts, ...")


def table_options(args: argparse.Namespace):
    """The ``TableOptions`` that the command line says."""
    from lba_exp.results.paper import read_paper
    from lba_exp.results.tables import TableOptions

    lists = {}
    for option in ("rows", "cols", "metric"):
        lists[option] = tuple(part.strip() for part in getattr(args, option).split(",") if part.strip())
        if not lists[option]:
            raise UserError(f"--{option} is empty: give a name, or several with commas.")
    return TableOptions(
        lists["rows"],
        lists["cols"],
        lists["metric"],
        args.spread,
        args.better,
        args.baseline,
        args.compare,
        read_paper(args.paper) if args.paper else None,
    )


def _format(args: argparse.Namespace) -> str:
    if args.output is None:
        return args.format or "md"
    check_new(args.output)
    known = SUFFIXES.get(args.output.suffix)
    if known is None and args.format is None:
        raise UserError(f"--output {args.output}: its suffix must be one of {', '.join(SUFFIXES)}, or give --format.")
    return args.format or known


def _table(args: argparse.Namespace, form: str) -> str:
    from lba_exp.results.collect import collect, select
    from lba_exp.results.rendering import FORMATS
    from lba_exp.results.tables import pivot

    if not args.runs:
        raise UserError(f"name the runs: {COMMAND} runs, or {COMMAND} --from wandb ENTITY/PROJECT.")
    if args.source == "wandb":
        from lba_exp.results.wandb_runs import wandb_runs

        runs, remarks = wandb_runs(args.runs), []
    else:
        runs, remarks = collect(args.runs)
    grid = pivot(select(runs, args.where), table_options(args))
    grid.remarks += remarks
    return FORMATS[form](grid)


def _difference(args: argparse.Namespace, form: str) -> str:
    from lba_exp.results import rendering
    from lba_exp.results.difference import difference_table

    if args.runs or args.source == "wandb":
        raise UserError("--diff compares two run folders and nothing else: give no further RUNS.")
    table = difference_table(*args.diff)
    return {"md": rendering.markdown, "tex": rendering.latex, "csv": rendering.table_csv}[form](table)


def check_new(path: Path) -> None:
    """Raises UserError where an output cannot be written, before any work is done."""
    if path.exists():
        raise UserError(f"{path} exists already: give another --output.")
    if not path.parent.is_dir():
        raise UserError(f"--output {path}: the folder {path.parent} does not exist.")


def write_new(path: Path, text: str) -> None:
    """Writes a new file, never over an old one; raises UserError."""
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}).") from None
    print(path)


if __name__ == "__main__":
    main()
