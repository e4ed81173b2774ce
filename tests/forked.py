"""Runs in processes of their own, forked from one that has imported everything: a SIGKILL is real, and costs no second import."""

import multiprocessing
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "lba_exp.running",
        "lba_exp.commands.train",
        "lba_exp.sweeping.local",
        "lba_exp.data.images",
        "lba_exp.models.classifier",
        "sklearn.datasets",
    ]
)


def _run(folder: str, overrides: list[str], kill: tuple[str, int] | None, environment: dict[str, str], number: int, console) -> None:
    os.chdir(folder)
    os.environ.update(environment)
    import lightning.pytorch as pl
    from lightning.pytorch.utilities import rank_zero_only

    from lba_exp import build, composing, running
    from lba_exp.errors import UserError

    rank_zero_only.rank = int(environment.get("RANK", 0))  # read at import otherwise

    class Killer(pl.Callback):
        """Sends its process a signal, SIGKILL as a power cut would, in a given hook at a given optimizer step."""

    if kill is not None:
        hook, step = kill

        def strike(self, trainer, *arguments):
            if trainer.global_step == step:
                os.kill(os.getpid(), number)

        setattr(Killer, hook, strike)
        before = build.Parts.callbacks
        build.Parts.callbacks = lambda parts: [Killer(), *before(parts)] if number != signal.SIGKILL else [*before(parts), Killer()]
    try:
        record = running.train(composing.compose(overrides), quiet=True)
        console.send(("record", record))
    except UserError as error:
        console.send(("error", f"{type(error).__name__}: {error}"))


def start(folder: Path, overrides: list[str], kill=None, environment=None, number=signal.SIGKILL):
    """A run begun in ``folder``: its process, and where its answer comes from."""
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_run, args=(str(folder), overrides, kill, environment or {}, number, sender))
    process.start()
    sender.close()
    return process, receiver


def answer_of(process, receiver) -> tuple[int, object]:
    # the end of the process too: those that load its data hold the pipe for seconds after a SIGKILL
    wait([receiver, process.sentinel])
    try:
        answer = receiver.recv() if receiver.poll() else None
    except EOFError:
        answer = None
    process.join()
    return process.exitcode, answer


def run(folder: Path, overrides: list[str], kill: tuple[str, int] | None = None, **settings) -> tuple[int, object]:
    """One run in ``folder``; returns (exit code, ("record", record) or ("error", sentence) or None where it was killed)."""
    return answer_of(*start(folder, overrides, kill, **settings))


def run_on_many(
    folder: Path, overrides: list[str], ranks: int = 2, kill: tuple[int, tuple[str, int]] | None = None, **settings
) -> list[tuple[int, object]]:
    """One run in as many processes, started as torchrun does; where one dies, the others are killed, as torchrun does too.

    Args:
        kill: the rank that is struck, and when.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(ranks):
        environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": str(ranks)}
        environment |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment |= {"TORCHELASTIC_RUN_ID": "test", "GLOO_SOCKET_IFNAME": "lo"}
        struck = kill[1] if kill is not None and kill[0] == rank else None
        processes.append(start(folder, [*overrides, f"trainer.devices={ranks}"], struck, environment, **settings))
    while any(process.is_alive() for process, _ in processes):
        time.sleep(0.05)
        if any(process.exitcode not in (None, 0) for process, _ in processes):
            time.sleep(1.0)  # for a record that is being written
            for process, _ in processes:
                with suppress(ProcessLookupError):
                    process.kill()
    return [answer_of(*each) for each in processes]


class _Forked:
    """A job as a fork of the sweep's process; what ``lba_exp.sweeping.local`` needs of a started process."""

    def __init__(self, pid: int):
        self.pid, self._code = pid, None

    def poll(self) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code


def _fork_job(arguments, log, environment) -> _Forked:
    sys.stdout.flush()
    if pid := os.fork():
        return _Forked(pid)
    code = 1
    try:
        os.setsid()
        with open(log, "ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ.update(environment)
        from lba_exp.commands import job

        job.main(list(arguments))
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _sweep(folder: str, arguments: list[str]) -> None:
    os.chdir(folder)
    with open("screen", "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it starts in the background ignore it
    from lba_exp.commands import train
    from lba_exp.sweeping import local

    local.start = _fork_job
    train.main(arguments)


def start_sweep(folder: Path, arguments: list[str]):
    """``lba-train ARGUMENTS`` in ``folder``, in a process of its own that forks its jobs; its screen is the file ``screen`` there."""
    (folder / "screen").unlink(missing_ok=True)
    process = CONTEXT.Process(target=_sweep, args=(str(folder), arguments))
    process.start()
    return process


def sweep(folder: Path, arguments: list[str]) -> tuple[int, str]:
    """The same to its end: (exit code, screen)."""
    process = start_sweep(folder, arguments)
    process.join()
    return process.exitcode, (folder / "screen").read_text()
