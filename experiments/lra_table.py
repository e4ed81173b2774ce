"""Trains tasks of Long Range Arena for some hundred steps each, and prints a table of what came of it.

python experiments/lra_table.py OUTPUT TASK=FOLDER ... [--steps 300] [--minutes 8] [-- OVERRIDES]

TASK is one of listops, text, retrieval, image, image_fashion_mnist, pathfinder, pathx: the experiment lra_TASK runs on the data in FOLDER
(of lba-data, or of the benchmark's own download; text takes that of `lba-data prepare imdb`). OVERRIDES go to every run:

on one GPU:   python experiments/lra_table.py runs/lra listops=DIR pathfinder=DIR -- trainer=bf16 trainer.accelerator=gpu
on a CPU:     ... --steps 100 -- trainer=cpu model.width=32 model.depth=2 data.batch_size=8

Each run is a process of its own with its record in OUTPUT/TASK; one that fails is a row of the table, and the others go on. Started again,
it trains what is missing. The table is printed last and written to OUTPUT/table.md. Losses are means of the first and the last three that
were logged, one every 10 steps; speed leaves validation out. So short a run says that a task trains, not how good a model is.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

TASKS = ("listops", "text", "retrieval", "image", "image_fashion_mnist", "pathfinder", "pathx")
COLUMNS = ("task", "source", "samples", "length", "size, batch", "steps", "steps/s", "loss, start", "end", "validation accuracy", "parity")
# a look at some batches is enough here: whole test splits of 25,000 reviews would take longer than the training
SHORT = ("trainer.limit_val_batches=10", "trainer.limit_test_batches=10", "trainer.check_val_every_n_epoch=null", "parity.full_test=false")


def main() -> None:
    arguments, overrides = sys.argv[1:], []
    if "--" in arguments:
        at = arguments.index("--")
        arguments, overrides = arguments[:at], arguments[at + 1 :]
    parser = argparse.ArgumentParser("lra_table.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder of the runs and the table")
    parser.add_argument("tasks", nargs="+", metavar="TASK=FOLDER")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of each task (default: 300)")
    parser.add_argument("--minutes", type=float, default=8, help="of training of each task at most (default: 8)")
    args = parser.parse_args(arguments)
    chosen = [text.partition("=")[::2] for text in args.tasks]
    for task, folder in chosen:
        if task not in TASKS or not folder:
            parser.error(f"{task}={folder}: give TASK=FOLDER with one of {', '.join(TASKS)}")
    rows = []
    for task, folder in chosen:
        print(f"\n{task}: {folder}", flush=True)
        code = train(task, folder, args, overrides)
        rows.append(row(task, folder, args.output / task, code))
    lines = [list(COLUMNS), ["---"] * len(COLUMNS), *rows]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "table.md").write_text(table, "utf-8")
    print(f"\n{table}", end="")
    sys.exit(any(line[5].startswith("failed") for line in rows))


def train(task: str, folder: str, args: argparse.Namespace, overrides: list[str]) -> int:
    """Exit code of the task's run, which has its time and some minutes for data, compiling, validation and parity."""
    seconds = round(60 * args.minutes)
    hours, rest = divmod(seconds, 3_600)
    limit = f"trainer.max_time='00:{hours:02d}:{rest // 60:02d}:{rest % 60:02d}'"
    steps = (f"trainer.max_steps={args.steps}", "trainer.max_epochs=-1", f"trainer.val_check_interval={args.steps}")
    run = [
        f"experiments=lra_{task}",
        f"data.source={folder}",
        f"folder={args.output / task}",
        *steps,
        limit,
        *SHORT,
        "logger=csv",
        *overrides,
    ]
    try:
        return subprocess.run([sys.executable, "-m", "lba_exp.commands.train", *run], timeout=seconds + 600).returncode
    except subprocess.TimeoutExpired:
        print(f"{task}: ended after {seconds + 600} s", file=sys.stderr)
        return 124


def row(task: str, folder: str, run: Path, code: int) -> list[str]:
    """The table's row of a run, from its record; where there is none, what is known."""
    try:
        record: dict[str, Any] = json.loads((run / "result.json").read_text("utf-8"))
    except (OSError, ValueError):
        return [task, folder, *[""] * 3, f"failed (exit code {code}), see above", *[""] * 5]
    with open(run / "metrics.csv", newline="") as file:
        logged = [line for line in csv.DictReader(file) if line.get("train/step_loss")]
    losses = [float(line["train/step_loss"]) for line in logged]
    steps = str(record.get("best", {}).get("step", logged[-1]["step"] if logged else 0))
    if record["status"] != "finished":
        steps = f"{record['status']} at {steps}: {record.get('error')}"
    speed = record["efficiency"]["step_ms"]
    accuracy = record.get("metrics", {}).get("validation", {}).get("accuracy")
    return [
        task,
        f"{record['data']} ({folder})",
        " / ".join(f"{count:,}" for count in record["samples"].values()),
        f"{record['length']:,}",
        f"{record['parameters']:,} parameters, {record['batch']['global']}",
        steps,
        "" if not speed else f"{1_000 / speed:.2f}",
        *(("", "") if not losses else (f"{sum(part) / len(part):.3f}" for part in (losses[:3], losses[-3:]))),
        "" if accuracy is None else f"{accuracy:.3f}",
        (record.get("parity") or {}).get("verdict", ""),
    ]


if __name__ == "__main__":
    main()
