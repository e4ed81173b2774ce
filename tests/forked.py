"""Runs in processes of their own, forked from one that has imported everything: a SIGKILL is real, and costs no second import."""

import multiprocessing
import os
import signal
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["lba_exp.running", "lba_exp.composing", "lba_exp.data.images", "lba_exp.models.classifier", "sklearn.datasets"]
)


def _run(folder: str, overrides: list[str], kill: tuple[str, int] | None, console) -> None:
    os.chdir(folder)
    import lightning.pytorch as pl

    from lba_exp import build, composing, running
    from lba_exp.errors import UserError

    class Killer(pl.Callback):
        """Ends its process as a power cut would, in a given hook at a given optimizer step."""

    if kill is not None:
        hook, step = kill

        def strike(self, trainer, *arguments):
            if trainer.global_step == step:
                os.kill(os.getpid(), signal.SIGKILL)

        setattr(Killer, hook, strike)
        before = build.Parts.callbacks
        build.Parts.callbacks = lambda parts: [*before(parts), Killer()]
    try:
        record = running.train(composing.compose(overrides), quiet=True)
        console.send(("record", record))
    except UserError as error:
        console.send(("error", f"{type(error).__name__}: {error}"))


def run(folder: Path, overrides: list[str], kill: tuple[str, int] | None = None) -> tuple[int, object]:
    """One run in ``folder``; returns (exit code, ("record", record) or ("error", sentence) or None where it was killed)."""
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_run, args=(str(folder), overrides, kill, sender))
    process.start()
    sender.close()
    try:
        answer = receiver.recv()
    except EOFError:
        answer = None
    process.join()
    return process.exitcode, answer
