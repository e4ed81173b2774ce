"""``lba-report RUNS``: one self-contained HTML page of a set of runs: tables, learning curves, cost, parity, decays.

lba-report runs/digits
lba-report runs --where sweep=digits_search --rows model,optim.lr --output search.html
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lba_exp.commands.common import fail
from lba_exp.commands.table import add_table_options, check_new, table_options, write_new
from lba_exp.errors import UserError

COMMAND = "lba-report"


def main(arguments: list[str] | None = None) -> None:
    """Entry point; exits with 0, or with 1 after a mistake."""
    parser = argparse.ArgumentParser(COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run folders, or folders that hold some at any depth")
    add_table_options(parser)
    parser.add_argument("--title", help="heading of the page; default: the runs' folders")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="a new file (default: report.html)")
    args = parser.parse_args(arguments)
    try:
        check_new(args.output)
        from lba_exp.results.collect import collect, select
        from lba_exp.results.report.page import report_page

        runs, remarks = collect(args.runs)
        title = args.title or f"Runs in {', '.join(args.runs)}"
        write_new(args.output, report_page(select(runs, args.where), table_options(args), args.output, title, remarks))
    except UserError as error:
        fail(COMMAND, str(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
