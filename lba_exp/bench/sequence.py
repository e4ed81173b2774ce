"""One long sequence over several devices (the operator's ``sequence_group``) against one device with its share of the tokens."""

from __future__ import annotations

import json
import math
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch import distributed as dist

from lba_exp import ops
from lba_exp.bench.cases import HORIZONS
from lba_exp.bench.measure import release, timed
from lba_exp.callbacks.memory import LiveTensors
from lba_exp.errors import ConfigError
from lba_exp.nn.sequence_ranks import block_bounds

PARTS = ("forward", "both")


@dataclass(frozen=True)
class SequenceSettings:
    """What is measured: B = 1, selective decay, scaled, both directions, convention "key".

    Attributes:
        ranks: devices that share the sequence.
        length: its tokens; one device is given length / ranks of them.
        check_length: tokens of a sequence whose outputs and gradients are held against float64 on one device.
        heads, width: H; Dk and Dv.
        dtype: of q, k, v.
        form, chunk_size: arguments of the operator.
        repeats: calls that are timed, after one that warms up.
        device: "cuda" (NCCL, a GPU a rank) or "cpu" (gloo).
    """

    ranks: int = 2
    length: int = 2_097_152
    check_length: int = 16_384
    heads: int = 4
    width: int = 64
    dtype: str = "bfloat16"
    form: str = "chunkwise"
    chunk_size: int = 64
    repeats: int = 5
    device: str = "cuda"


def run(settings: SequenceSettings) -> dict[str, Any]:
    """Starts a process a rank, and returns what ``measure`` finds; ConfigError for too few devices, tokens or bytes, or no such form."""
    if settings.form not in ops.FORMS:
        raise ConfigError(f"--form {settings.form}: give one of {', '.join(ops.FORMS)}.")
    if settings.device == "cuda" and torch.cuda.device_count() < settings.ranks:
        raise ConfigError(f"--ranks {settings.ranks}: torch finds {torch.cuda.device_count()} GPUs here; give fewer, or --device cpu.")
    if min(settings.length, settings.check_length) < settings.ranks:
        raise ConfigError(f"--length, --check-length: give at least {settings.ranks} tokens, one a rank.")
    with tempfile.TemporaryDirectory() as folder:
        # not spawn, whose processes may abort in gloo's destructors as they end
        try:
            torch.multiprocessing.start_processes(_process, (settings, folder), settings.ranks, start_method="forkserver")
        except torch.multiprocessing.ProcessRaisedException as error:
            kind, _, said = str(error).strip().splitlines()[-1].partition(": ")
            if kind != "ValueError" and not kind.endswith("OutOfMemoryError"):
                raise
            raise ConfigError(f"this sequence cannot be measured here ({said.rstrip('.')}).") from None
        return json.loads((Path(folder) / "found.json").read_text("utf-8"))


def _process(rank: int, settings: SequenceSettings, folder: str) -> None:
    device = torch.device(settings.device, rank) if settings.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = dist.FileStore(f"{folder}/store", settings.ranks)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=settings.ranks)
    try:
        found = measure(settings, device)
        if rank == 0:
            (Path(folder) / "found.json").write_text(json.dumps(found), "utf-8")
    finally:
        dist.destroy_process_group()


def measure(settings: SequenceSettings, device: torch.device) -> dict[str, Any]:
    """Called by every rank of the default group: the same on each.

    Returns:
        ``device``, ``torch``, ``error`` (relative L2 error at ``check_length`` of y and of the gradients of q, k, v and the gate that the
        decays are made from, against float64 on one device), and ``rows``: of one device and of all, ``devices``, ``tokens``,
        ``input_bytes`` a device, and for each pass ``*_ms`` (median over the calls of the slowest rank's time) and ``*_bytes`` (peak
        memory of the device that needs most, inputs and gradients included).
    """
    group = dist.group.WORLD
    rank = dist.get_rank()
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "error": _error(settings, device, group),
    }
    share = settings.length // settings.ranks
    one = _cost(settings, share, device, None) if rank == 0 else {}
    dist.barrier()
    start, stop = block_bounds(settings.length, rank, settings.ranks)
    every = _cost(settings, stop - start, device, group)
    gathered: list[Any] = [None] * settings.ranks
    dist.all_gather_object(gathered, (one, every))
    one, rows = gathered[0][0], [every for _, every in gathered]
    slowest = {f"{part}_ms": [max(times) for times in zip(*(row[f"{part}_ms"] for row in rows), strict=True)] for part in PARTS}
    most = {key: max(row[key] for row in rows) for key in ("input_bytes", *(f"{part}_bytes" for part in PARTS))}
    found["rows"] = [
        {"devices": devices, "tokens": tokens, **row, **{f"{part}_ms": statistics.median(row[f"{part}_ms"]) for part in PARTS}}
        for devices, tokens, row in ((1, share, one), (settings.ranks, settings.length, slowest | most))
    ]
    return found


def _draw(settings: SequenceSettings, length: int, device: torch.device, seed: int) -> list[Tensor]:
    """q, k, v, log gate and the output's gradient: q and k uniform, as after a positive feature map, heads of short to long memory."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, settings.dtype)
    shape = (1, length, settings.heads, settings.width)
    q, k = (torch.rand(shape, generator=generator, device=device, dtype=dtype) for _ in range(2))
    v, grad = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(2))
    gate_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    gate = torch.empty(shape[:3], device=device, dtype=gate_dtype).exponential_(generator=generator)
    first, last = (-math.log(tokens) for tokens in HORIZONS)
    return [q, k, v, -gate * torch.linspace(first, last, settings.heads, device=device, dtype=gate_dtype).exp(), grad]


def _forward(settings: SequenceSettings, form: str, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, group: Any) -> Tensor:
    decays = ops.step_log_decays(gate, sequence_group=group)
    return ops.bidirectional_linear_attention(q, k, v, *decays, form=form, chunk_size=settings.chunk_size, sequence_group=group)


def _with_gradients(settings: SequenceSettings, form: str, tensors: list[Tensor], group: Any) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in tensors[:4]]
    y = _forward(settings, form, *leaves, group)
    return y.detach(), *torch.autograd.grad(y, leaves, tensors[4])


def _error(settings: SequenceSettings, device: torch.device, group: Any) -> dict[str, float]:
    whole = _draw(settings, settings.check_length, torch.device("cpu"), seed=0)  # the same on every rank
    start, stop = block_bounds(settings.check_length, dist.get_rank(), settings.ranks)
    ours = _with_gradients(settings, settings.form, [x[:, start:stop].to(device) for x in whole], group)
    exact = _with_gradients(settings, "chunkwise", [x.to(device).double() for x in whole], None)
    errors = {}
    for name, x, expected in zip(("y", "dq", "dk", "dv", "dgate"), ours, exact, strict=True):
        squares = torch.stack([(x.double() - expected[:, start:stop]).square().sum(), expected[:, start:stop].square().sum()])
        dist.all_reduce(squares, group=group)
        errors[name] = float((squares[0] / squares[1]).sqrt())
    return errors


def _cost(settings: SequenceSettings, length: int, device: torch.device, group: Any) -> dict[str, Any]:
    tensors = _draw(settings, length, device, seed=0 if group is None else dist.get_rank())
    inputs = sum(x.numel() * x.element_size() for x in tensors)

    def forward() -> Tensor:
        with torch.no_grad():
            return _forward(settings, settings.form, *tensors[:4], group)

    def both() -> None:
        _with_gradients(settings, settings.form, tensors, group)

    found: dict[str, Any] = {"input_bytes": inputs}
    for part, call in zip(PARTS, (forward, both), strict=True):
        found[f"{part}_ms"], peak = _measured(call, settings.repeats, device)
        found[f"{part}_bytes"] = inputs + peak
    release(device)
    return found


def _measured(call: Callable[[], Any], repeats: int, device: torch.device) -> tuple[list[float], int]:
    """Milliseconds of each call, and the peak memory of one beside its inputs; the first call warms up."""
    call()
    with LiveTensors(device) as memory:
        call()
    return timed(call, repeats, device), memory.bytes


def show(settings: SequenceSettings, found: dict[str, Any]) -> None:
    """Prints the table, and what it was measured on."""
    table = Table("devices", "tokens", *(f"{part} {unit}" for part in ("forward", "forward + backward") for unit in ("ms", "GiB")))
    table.box = SIMPLE_HEAD
    for row in found["rows"]:
        cells = [f(row[f"{part}_{unit}"]) for part in PARTS for unit, f in (("ms", "{:,.1f}".format), ("bytes", _gib))]
        table.add_row(str(row["devices"]), f"{row['tokens']:,}", *cells)
    console = Console(width=110)
    console.print(table)
    errors = ", ".join(f"{name} {value:.1e}" for name, value in found["error"].items())
    console.print(f"relative error at {settings.check_length:,} tokens over {settings.ranks} devices, against float64 on one: {errors}")
    console.print(
        f"median of {settings.repeats} calls; GiB: peak of the device that needs most, inputs ({_gib(found['rows'][-1]['input_bytes'])}) "
        f"included; B=1, H={settings.heads}, D={settings.width}, {settings.dtype}, selective decay, form {settings.form}, chunk "
        f"{settings.chunk_size}; {found['device']}, torch {found['torch']}"
    )


def _gib(number: int) -> str:
    return f"{number / 2**30:.3g}"
