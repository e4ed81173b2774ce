"""``lba-predict CHECKPOINT INPUT``: what a trained model says of new inputs, in any of its forms.

lba-predict runs/digits/lion_s/seed0 IMAGE_OR_FOLDER --output predictions.csv              # name, class, probability of each class
lba-predict runs/imdb_bytes/lion_s/seed0 texts.txt --form recurrent --verify               # and every other form: do they say the same?
lba-predict runs/corpus/lion_s_mlm/seed0 texts.txt                                         # what stands at each [MASK]
lba-predict RUN/checkpoints/best.ckpt values.npy --stream --on-disk                        # one sequence, longer than memory
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lba_exp.commands.common import check_output, fail
from lba_exp.errors import UserError

COMMAND = "lba-predict"
FORMATS = (".csv", ".jsonl", ".npz")
SHOWN = 20  # rows on the screen where no file is written


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("checkpoint", type=Path, help="run folder, checkpoint (.ckpt), or model folder")
    made.add_argument(
        "input",
        type=Path,
        help="image or folder of images; text file, a text a line; .csv, .jsonl or .parquet with the run's columns; .npy or .npz of token "
        "numbers or values (inputs, padding_mask); or a folder that data.source takes",
    )
    made.add_argument("--form", default="auto", help="auto (the default: the fastest), or a form of the model: parallel, recurrent, ...")
    made.add_argument("--output", type=Path, help=f"a new file, {', '.join(FORMATS)}; default: the first {SHOWN} rows on the screen")
    made.add_argument("--batch", type=int, default=64, help="inputs at a time (default: 64)")
    made.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    made.add_argument("--verify", action="store_true", help="run every other form too; exit code 1 where one predicts something else")
    made.add_argument("--stream", action="store_true", help="INPUT is one sequence (.npy), read in chunks")
    made.add_argument("--chunk", type=int, default=1024, help="tokens of a chunk (default: 1024)")
    made.add_argument("--on-disk", action="store_true", help="with --stream: activations in temporary files, memory for one chunk")
    made.add_argument("--split", default="test", help="of a folder that data.source takes: train, validation or test (the default)")
    made.add_argument("--vocabulary", type=Path, help="the vocabulary's file, where it is not where the run had it")
    made.add_argument("--top", type=int, default=5, help="tokens told for a [MASK], or for the next token (default: 5)")
    return made


def main(arguments: list[str] | None = None) -> None:
    """Entry point; exits with 0, with 1 after a mistake or where forms differ, with 2 for an unknown flag."""
    args = parser().parse_args(arguments)
    try:
        check(args)
        differing = predict(args)
    except UserError as error:
        fail(COMMAND, str(error))
        sys.exit(1)
    if differing:
        fail(COMMAND, differing)
        sys.exit(1)


def check(args: argparse.Namespace) -> None:
    """Raises UserError for what can be seen before torch is imported."""
    for path, what in ((args.checkpoint, "a run folder, a checkpoint or a model folder"), (args.input, "a file or folder of inputs")):
        if not path.exists():
            raise UserError(f"{path} does not exist: give {what}.")
    for name in ("batch", "chunk", "top"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: give 1 or more.")
    if args.on_disk and not args.stream:
        raise UserError("--on-disk is for --stream: give both, or neither.")
    if args.stream and args.input.suffix != ".npy":
        raise UserError(f"{args.input}: with --stream give one sequence as a .npy file.")
    if args.output is not None:
        if args.output.suffix not in FORMATS:
            raise UserError(f"--output {args.output}: give a name that ends in {', '.join(FORMATS)}.")
        check_output(args.output)


def predict(args: argparse.Namespace) -> str | None:
    """Does what the command line says; a sentence where forms differ, else None. Raises UserError."""
    from lba_exp.inference import load
    from lba_exp.inference.verifying import Verification

    predictor = load(args.checkpoint, device=args.device, form=args.form, vocabulary=args.vocabulary)
    verification = Verification(predictor, streamed=args.stream) if args.verify else None
    writer = _writer(args, predictor)
    try:
        count = (_streamed if args.stream else _batches)(args, predictor, writer, verification)
        writer.close()
    except BaseException:
        writer.abandon()
        raise
    name = "the streamed form" if args.stream else f"the form {predictor.form}" if predictor.form else "the model's only form"
    where = f"; written to {args.output}" if args.output else ""
    print(f"{count:,} {'input' if count == 1 else 'inputs'} in {name} on {predictor.device}{where}")
    if predictor.cut:
        print(f"{predictor.cut:,} {'text is' if predictor.cut == 1 else 'texts are'} longer than the model's inputs, and cut")
    return _told(verification) if verification else None


def _batches(args: argparse.Namespace, predictor: Any, writer: Any, verification: Any) -> int:
    """Predicts the inputs batch by batch; how many there were."""
    from lba_exp.errors import DataError
    from lba_exp.inference.predictor import Prediction
    from lba_exp.inference.reading import read_inputs
    from lba_exp.inference.writing import Arrays

    inputs = read_inputs(predictor, args.input, args.batch, args.split)
    count = guessed = 0
    with _progress(inputs.total, "inputs") as done:
        for names, batch in inputs.batches:
            if predictor.per_token and not isinstance(writer, Arrays):
                guesses = predictor.top_tokens(batch, args.top)
                guessed += sum(map(len, guesses))
                writer.add_guesses(names, guesses)
            elif predictor.per_token:
                found = predictor.predict(batch, batch_size=len(names))
                writer.add(names, found, batch["inputs"])
            else:
                writer.add(names, Prediction(predictor.logits(batch), predictor.class_names, predictor.number))
            if verification is not None:
                verification.add(batch)
            count += len(names)
            done(len(names))
    if predictor.per_token and not isinstance(writer, Arrays) and not guessed:
        raise DataError(f"{args.input} holds no [MASK]: put it where a token is to be predicted, or give --output FILE.npz for all logits.")
    return count


def _streamed(args: argparse.Namespace, predictor: Any, writer: Any, verification: Any) -> int:
    """Streams the one sequence; 1."""
    from contextlib import nullcontext

    import numpy as np
    import torch

    from lba_exp.callbacks.parity_measure import exact_float32
    from lba_exp.errors import DataError
    from lba_exp.inference.predictor import Prediction
    from lba_exp.inference.writing import Arrays

    tell: list[Callable[[int], None]] = [lambda number: None]
    stream = predictor.stream(args.input, chunk=args.chunk, on_disk=args.on_disk, done=lambda: tell[0](1))
    if stream.per_token and not isinstance(writer, Arrays):
        raise DataError("a language model's stream has logits for each token: give --output FILE.npz for them.")
    name, kept = args.input.name, []
    with _progress(stream.steps, "chunks") as done, exact_float32() if verification is not None else nullcontext():
        tell[0] = done
        if stream.per_token:
            for logits in stream.logits():
                writer.append("logits", logits.float().cpu())
                if verification is not None:
                    kept.append(logits.float().cpu())
            writer.add_name(name)
            writer.append("lengths", np.array([stream.length]))
        else:
            kept = [stream.answer().float().cpu()]
            writer.add([name], Prediction(kept[0], predictor.class_names, predictor.number))
    if verification is not None:
        array = np.load(args.input)
        pixels = array.dtype.kind in "iu" and getattr(predictor.model, "channels", None) is not None
        (batch,) = predictor.batches(predictor.preparation.values(array) if pixels else array)
        reference = torch.cat(kept)
        verification.add(batch, reference[None] if stream.per_token else reference)
    return 1


def _told(verification: Any) -> str | None:
    """Prints what was found; a sentence where predictions differ."""
    from rich.console import Console
    from rich.table import Table

    figures = verification.figures()
    table = Table(title=f"compared with the form {verification.reference}, in float32")
    for column in ("form", "predictions", "others", "near ties", "relative error"):
        table.add_column(column, justify="left" if column == "form" else "right")
    for form, f in figures.items():
        table.add_row(form, f"{f['count']:,}", f"{f['different']:,}", f"{f['near_ties']:,}", f"{f['rel']:.1e}")
    Console(width=None if sys.stdout.isatty() else 110).print(table)
    for form, reason in verification.skipped.items():
        print(f"{form} was left out where it {reason}")
    if not figures:
        return "no form was compared: all were left out."
    differing = verification.differing()
    number = sum(differing.values())
    print(f"{number:,} other {'prediction' if number == 1 else 'predictions'}; largest relative error {verification.largest_error:.1e}")
    if not differing:
        return None
    each = ", ".join(f"{form}: {different:,}" for form, different in differing.items())
    return f"predictions differ from those of the form {verification.reference} beyond near ties ({each})."


def _writer(args: argparse.Namespace, predictor: Any) -> Any:
    """What rows go to: the file, or the screen."""
    from lba_exp.inference.writing import Arrays, Rows

    if args.output is None:
        return _Screen(predictor)
    if args.output.suffix == ".npz":
        return Arrays(args.output, predictor.class_names)
    options = {"number": predictor.number, "per_token": predictor.per_token, "top": min(args.top, len(predictor.class_names))}
    return Rows(args.output, predictor.class_names, **options)


class _Screen:
    """Shows the first rows."""

    def __init__(self, predictor: Any):
        self.number, self.rows, self.left = predictor.number, [], 0
        self.head = ("name", "position", "tokens") if predictor.per_token else ("name", "value") if self.number else ("name", "class", "p")

    def add(self, names: list[str], prediction: Any) -> None:
        if self.number:
            rows = [(name, f"{value:.5g}") for name, value in zip(names, prediction.logits[:, 0].tolist(), strict=True)]
        else:
            best = prediction.probabilities.amax(-1).tolist()
            rows = [(name, label, f"{p:.4f}") for name, label, p in zip(names, prediction.labels, best, strict=True)]
        self._keep(rows)

    def add_guesses(self, names: list[str], guesses: Any) -> None:
        for name, found in zip(names, guesses, strict=True):
            self._keep([(name, str(guess.position), ", ".join(f"{token} {p:.3f}" for token, p in guess.tokens)) for guess in found])

    def _keep(self, rows: list[tuple[str, ...]]) -> None:
        room = max(0, SHOWN - len(self.rows))
        self.rows += rows[:room]
        self.left += max(0, len(rows) - room)

    def close(self) -> None:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(*self.head)
        for row in self.rows:
            table.add_row(*map(Text, row))
        Console(width=None if sys.stdout.isatty() else 110).print(table)
        if self.left:
            print(f"and {self.left:,} more: --output FILE writes all")

    def abandon(self) -> None:
        """Nothing to do."""


@contextmanager
def _progress(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """A bar on stderr where that is a terminal; gives what is told how many more are done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        yield lambda number: progress.update(task, advance=number)


if __name__ == "__main__":
    main()
