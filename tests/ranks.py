"""A function on several ranks, in processes forked from one that has imported everything."""

import json
from datetime import timedelta

import torch
from torch import distributed as dist

from tests import forked


def _process(function, rank: int, ranks: int, folder: str, backend: str) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=100))
    found = function(rank)
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(found, file)
    dist.destroy_process_group()


def on_ranks(function, folder, ranks: int = 4, limit: float = 200.0, backend: str = "gloo") -> list:
    """``function(rank)``, of a test's module, in processes that talk through gloo (or nccl, a GPU each): what each returns, as JSON."""
    forked._serve()
    processes = [forked.CONTEXT.Process(target=_process, args=(function, rank, ranks, str(folder), backend)) for rank in range(ranks)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(limit)
        assert [process.exitcode for process in processes] == [0] * ranks
    finally:
        for process in processes:
            process.kill()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]
