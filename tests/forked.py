"""Runs in processes of their own, forked from one that has imported everything: a SIGKILL is real, and costs no second import."""

import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path

import pytest

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # once a process has asked CUDA itself, its forks cannot use a GPU
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "lba_exp.running",
        "lba_exp.commands.train",
        "lba_exp.sweeping.local",
        "lba_exp.data.image_classification",
        "lba_exp.data.images",
        "lba_exp.models.classifier",
        "sklearn.datasets",
    ]
)


def _run(folder: str, overrides: list[str], kill: tuple[str, int] | None, environment: dict[str, str], number: int, console) -> None:
    os.chdir(folder)
    os.environ.update(environment)
    import lightning.pytorch as pl
    from lightning.fabric.utilities.rank_zero import _get_rank
    from lightning.pytorch.utilities import rank_zero_only

    from lba_exp import build, composing, running
    from lba_exp.errors import UserError

    rank_zero_only.rank = _get_rank() or 0  # read at import otherwise

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


def _serve() -> None:
    """Starts the server, once, with this process's path: it imports before it is told of it, a relative PYTHONPATH from wherever it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[1]), *filter(os.path.isabs, sys.path)]))
        forkserver.ensure_running()


def start(folder: Path, overrides: list[str], kill=None, environment=None, number=signal.SIGKILL):
    """A run begun in ``folder``: its process, and where its answer comes from."""
    _serve()
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


def torchrun(rank: int, ranks: int, nodes: int, port: int) -> dict[str, str]:
    """What torchrun tells a process."""
    local = ranks // nodes
    numbers = {"RANK": rank, "LOCAL_RANK": rank % local, "GROUP_RANK": rank // local, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": local}
    return {k: str(v) for k, v in numbers.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}


def srun(rank: int, ranks: int, nodes: int, port: int) -> dict[str, str]:
    """What Slurm tells a task; Lightning takes the port from the job's number."""
    local = ranks // nodes
    numbers = {"PROCID": rank, "LOCALID": rank % local, "NODEID": rank // local, "NTASKS": ranks, "NTASKS_PER_NODE": local}
    numbers |= {"NNODES": nodes, "JOB_ID": 12340000 + port - 15000}
    return {f"SLURM_{k}": str(v) for k, v in numbers.items()} | {"SLURM_JOB_NAME": "train", "SLURM_NODELIST": "127.0.0.1"}


def run_on_many(
    folder: Path,
    overrides: list[str],
    ranks: int = 2,
    kill: tuple[int, tuple[str, int]] | None = None,
    nodes: int = 1,
    launcher=torchrun,
    limit: float = 280.0,
    environment: dict[str, str] | None = None,
    overrule: list[str] | None = None,
    **settings,
) -> list[tuple[int, object]]:
    """One run in as many processes, started as torchrun does; where one dies, the others are killed, as torchrun does too.

    Args:
        kill: the rank that is struck, and when; rank None: all of them.
        nodes: on so many machines, as far as they can tell.
        launcher: ``torchrun`` or ``srun``.
        limit: seconds after which they are killed.
        overrule: overrides that follow those of the numbers of devices and machines.
    """
    port = next(p for p in map(_free, range(15000 + random.randrange(8000), 25000)) if p)
    overrides = [*overrides, f"trainer.devices={ranks // nodes}", f"trainer.num_nodes={nodes}", *(overrule or [])]
    processes, deadline = [], time.monotonic() + limit
    for rank in range(ranks):
        told = launcher(rank, ranks, nodes, port) | {"GLOO_SOCKET_IFNAME": "lo"} | (environment or {})
        struck = kill[1] if kill is not None and kill[0] in (rank, None) else None
        processes.append(start(folder, overrides, struck, told, **settings))
    while any(process.is_alive() for process, _ in processes):
        time.sleep(0.05)
        late = time.monotonic() > deadline
        if late or any(process.exitcode not in (None, 0) for process, _ in processes):
            time.sleep(0.0 if late else 1.0)  # for a record that is being written
            for process, _ in processes:
                with suppress(ProcessLookupError):
                    process.kill()
    return [answer_of(*each) for each in processes]


def _free(port: int) -> int | None:
    with socket.socket() as free, suppress(OSError):
        free.bind(("127.0.0.1", port))
        return port
    return None


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
    _serve()
    process = CONTEXT.Process(target=_sweep, args=(str(folder), arguments))
    process.start()
    return process


def sweep(folder: Path, arguments: list[str]) -> tuple[int, str]:
    """The same to its end: (exit code, screen)."""
    process = start_sweep(folder, arguments)
    process.join()
    return process.exitcode, (folder / "screen").read_text()
