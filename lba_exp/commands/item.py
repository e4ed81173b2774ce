"""``lba-item``: the paper's tables and figures, one by one: their tables out of committed records, and the runs that make them anew.

lba-item list                                              # all items, how many records each has
lba-item table cifar100_decay                              # its table, from experiments/results
lba-item collect fashion_mnist_decay runs                  # puts finished runs of its sweep there, stripped to what tables need
lba-item reproduce digits_small                            # prepares the data, runs the sweep from scratch, and prints the table
lba-item reproduce fashion_mnist_decay --jobs 8 trainer=gpu    # eight runs side by side; any overrides
lba-item index                                             # rewrites the table of experiments/PAPER_INDEX.md
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lba_exp.commands.common import fail
from lba_exp.errors import UserError

COMMAND = "lba-item"
BEGIN, END = "<!-- made by lba-item index -->", "<!-- end -->"
HEAD = (
    "what of the paper",
    "full scale",
    "data",
    "cost at full scale",
    "should show",
    "paper, %",
    "ours at full scale",
    "twin, its cost",
    "ours, of the twin",
    "verdict",
)


def main(arguments: list[str] | None = None) -> None:
    """Entry point; exits with 0, with 1 after a mistake or a failed run, with 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("list", help="all items, and how many records each has")
    table = actions.add_parser("table", help="an item's table, from the committed records")
    collect = actions.add_parser("collect", help="put finished runs among the records")
    reproduce = actions.add_parser("reproduce", help="run an item from scratch, and print its table")
    index = actions.add_parser("index", help="rewrite the table of experiments/PAPER_INDEX.md")
    for action in (table, collect, reproduce):
        action.add_argument("item", help="as `lba-item list` has it")
    collect.add_argument("runs", nargs="+", type=Path, help="run folders, or folders that hold some at any depth")
    collect.add_argument("--with", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="with which the sweep was run")
    collect.add_argument("--replace", action="store_true", help="records that are there and differ are replaced")
    reproduce.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="further overrides of every run")
    reproduce.add_argument("--root", type=Path, default=Path("runs/reproduced"), help="folder of the runs (default: runs/reproduced)")
    reproduce.add_argument("--data", type=Path, default=Path("data"), help="folder of prepared data (default: data)")
    reproduce.add_argument("--jobs", type=int, default=1, help="runs side by side")
    index.add_argument("--file", type=Path, help="default: experiments/PAPER_INDEX.md")
    args, rest = parser.parse_known_args(arguments)
    if rest and (args.action != "reproduce" or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # overrides behind an option, which argparse does not join to those before it
        args.overrides += rest
    try:
        code = {"list": _list, "table": _table, "collect": _collect, "reproduce": _reproduce, "index": _index}[args.action](args)
    except UserError as error:
        fail(COMMAND, str(error))
        code = 1
    except KeyboardInterrupt:
        fail(COMMAND, "stopped by the user; the same command goes on where it was.")
        code = 130
    except BrokenPipeError:  # `lba-item list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)


def results_folder() -> Path:
    """``experiments/results`` of the working folder, else of the checkout or the package."""
    from lba_exp.composing import config_roots
    from lba_exp.results.items import FILE

    folders = [root / "experiments" / "results" for root in config_roots()]
    return next((folder for folder in folders if (folder / FILE).is_file()), folders[-1])


def _list(args: argparse.Namespace) -> int:
    from lba_exp.results.items import NOT_RUN, read_items, read_records

    folder = results_folder()
    items = read_items(folder)
    width = max(map(len, items))
    for item in items.values():
        count = len(read_records(item, folder))
        state = "no table of runs" if item.sweep is None else f"{count} records" if count else NOT_RUN
        print(f"{item.name:<{width}}  {state:<16}  {item.paper}{', its twin' if item.like else ''}")
    return 0


def _table(args: argparse.Namespace) -> int:
    from lba_exp.results.items import find, item_table, read_items, read_records

    folder = results_folder()
    item = find(read_items(folder), args.item)
    print(item_table(item, read_records(item, folder)), end="", flush=True)
    return 0


def _collect(args: argparse.Namespace) -> int:
    from lba_exp.commands.item_records import collected
    from lba_exp.results.items import find, read_items

    folder = results_folder()
    item = find(read_items(folder), args.item)
    files, remarks = collected(item, args.runs, args.overrides)
    place = folder / str(item.sweep)
    new = {name: text for name, text in files.items() if not (place / name).is_file() or (place / name).read_text("utf-8") != text}
    if not args.replace and (there := [name for name in new if (place / name).is_file()]):
        raise UserError(f"{place / there[0]} is there already and differs ({len(there)} such records): give --replace to replace them.")
    place.mkdir(parents=True, exist_ok=True)
    for name, text in new.items():
        (place / name).write_text(text, "utf-8")
    for remark in remarks:
        print(remark)
    print(f"{place}: {len(new)} records written, {len(files) - len(new)} were there already")
    return 0


def _reproduce(args: argparse.Namespace) -> int:
    """The sweep as it stands, then the search; then what the chosen values lack; then the table."""
    from lba_exp.commands.item_records import as_runs
    from lba_exp.results.items import choose, find, item_table, read_items

    folder = results_folder()
    item = find(read_items(folder), args.item)
    if item.sweep is None:
        raise UserError(f"{item.name} is no table of runs: {item.command or item.verdict}")
    given = {override.partition("=")[0] for override in args.overrides}
    if lacking := [key for key in item.needs if key not in given]:
        raise UserError(f"{item.name} needs {lacking[0]}: {COMMAND} reproduce {item.name} {lacking[0]}=...")
    calls = [[_prepared(override, args.data) for override in overrides] for overrides in item.runs]
    rows = [f"sweep.only={json.dumps(list(item.rows))}"] if item.row_key == "row" else []
    failed = 0
    for call in calls:
        fixed = [f"sweeps={item.sweep}", *rows, *call, f"root={args.root}", f"hydra.launcher.jobs={args.jobs}", *args.overrides]
        failed |= _train(fixed)
        for key, values in item.search.items():
            failed |= _train([*fixed, "seed=0", f"{key}={','.join(map(str, values))}"])
    place = args.root / str(item.sweep)
    if item.search:
        for run in [run for run in choose(item, as_runs(item, [place], args.overrides)[0]) if run.label("seed") == "0"]:
            key, value = item.search_key, run.label(item.search_key)
            if value in map(str, item.search[key]):
                for call in calls:
                    row = [f"sweep.only={json.dumps([run.label('row')])}"]
                    more = ["seed=1,2", f"{key}={value}", f"root={args.root}", f"hydra.launcher.jobs={args.jobs}"]
                    failed |= _train([f"sweeps={item.sweep}", *row, *call, *more, *args.overrides])
    runs, remarks = as_runs(item, [place], args.overrides)
    print("".join(f"{remark}\n" for remark in remarks) + item_table(item, runs), end="", flush=True)
    return failed


def _prepared(override: str, data: Path) -> str:
    """An override with the folder of ``lba-data prepare NAME`` in the place of ``@NAME``; the folder is there afterwards."""
    key, _, value = override.partition("=")
    if not value.startswith("@"):
        return override
    folder = data / value[1:]
    _run("lba_exp.commands.data", ["prepare", value[1:], str(folder)], may_fail=False)
    return f"{key}={folder.absolute()}"


def _train(overrides: Sequence[str]) -> int:
    return _run("lba_exp.commands.train", ["-m", *overrides])


def _run(module: str, arguments: Sequence[str], may_fail: bool = True) -> int:
    name = {"lba_exp.commands.data": "lba-data", "lba_exp.commands.train": "lba-train"}[module]
    print(f"$ {name} {' '.join(arguments)}", flush=True)
    code = subprocess.run([sys.executable, "-m", module, *arguments]).returncode
    if code == 130:
        raise KeyboardInterrupt
    if code and not may_fail:
        raise UserError(f"{name} {' '.join(arguments)} ended with exit code {code}.")
    return int(code != 0)


def _index(args: argparse.Namespace) -> int:
    folder = results_folder()
    path = args.file or folder.parent / "PAPER_INDEX.md"
    try:
        text = path.read_text("utf-8")
    except OSError:
        raise UserError(f"{path} cannot be read.") from None
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{path} does not hold the lines {BEGIN} and {END}, between which the table stands.")
    path.write_text(f"{before}{BEGIN}\n\n{index_table(folder)}\n{END}{after}", "utf-8")
    print(path)
    return 0


def index_table(folder: Path) -> str:
    """The index as Markdown: a row for each table and figure of the paper, its twin beside it; then the items that are nobody's twin."""
    from lba_exp.results.items import NOT_RUN, Item, in_short, judged, read_items, read_records

    items = read_items(folder)

    def command(item: Item) -> str:
        if item.sweep is None:
            return f"`{item.command}`" if item.command else "—"
        return f"[{item.sweep}](../sweeps/{item.sweep}.yaml), `make reproduce ITEM={item.name}`"

    def published(item: Item) -> str:
        shown = []
        for row, number in item.rows.items():
            numbers = list(number.values()) if isinstance(number, dict) else [number]
            if any(value is not None for value in numbers):
                shown.append(f"{row} {' / '.join('—' if value is None else f'{value:g}' for value in numbers)}")
        return ", ".join(shown) or "no number"

    lines = []
    for item in items.values():
        if item.like:
            continue
        twin = items.get(item.twin)
        twin_words = f"{command(twin)}; {twin.cost}" if twin else "—"
        twin_numbers = in_short(twin, read_records(twin, folder)) if twin else "—"
        own = item.result or in_short(item, read_records(item, folder))
        told = [i for i in (item, twin) if i and (i.verdict != NOT_RUN or read_records(i, folder))]
        verdict = "; ".join(f"{'the twin: ' if i is twin else ''}{judged(i)}" for i in told) or NOT_RUN
        cells = (item.paper, command(item), item.data, item.cost, item.expect, published(item), own, twin_words, twin_numbers, verdict)
        lines.append(" | ".join(cell.replace("|", "\\|") or "—" for cell in cells))
    rule = " | ".join(["---"] * len(HEAD))
    return "\n".join(f"| {line} |" for line in (" | ".join(HEAD), rule, *lines)) + "\n"


if __name__ == "__main__":
    main()
