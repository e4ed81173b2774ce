"""The loader that Lightning trains and evaluates with: after a restart it goes on with the very batch that comes next."""

from __future__ import annotations

import signal
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, default_collate

from lba_exp.data.buckets import Buckets
from lba_exp.errors import DataError

GRACE = 300  # seconds that a worker has left after SIGTERM
_REPEATED = 256  # an epoch of repeated samples is a multiple of it, as in DeiT
# workers are children of this very process: those of a fork server never notice that a run was killed, and stay for ever
FORK = "fork" if sys.platform == "linux" else None


class EpochOrder:
    """Which samples make up the batches of an epoch: a function of (seed, epoch, rank) and of nothing else.

    Global batch t of an epoch, the last one included, holds the same samples for any number of ranks, as long as
    batch_size * world_size is the same.

    Args:
        samples: samples of the data set.
        batch_size: samples of a batch on one rank.
        seed: of the shuffles, >= 0.
        shuffle: a new permutation every epoch; False: the data set's order.
        drop_last: leave out a last batch that is not full.
        rank, world_size: which process of how many.
        equal_shards: True: every rank gets equally many batches (training). The last one may differ in size by one sample from rank to
            rank; a rank that would get none is given the epoch's first sample once more, and its ``weight`` is 0.
            False: every sample falls to exactly one rank (evaluation), the numbers of batches equal where they can be.
        buckets: what sorts the order by length, the same every epoch where it is not shuffled; None: nothing.
        repeats: copies of a sample in an epoch, one after another (repeated augmentation, arXiv 1901.09335), so that they fall to ranks in
            turn. An epoch is as long as without, rounded down to a multiple of 256 as in DeiT: with three copies it has a third of the
            data set. Copy c of sample i is the index i + c * distinct.

    Attributes:
        samples: of an epoch, copies included.
        distinct: samples of the data set.
    """

    def __init__(
        self,
        samples: int,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool,
        drop_last: bool,
        rank: int,
        world_size: int,
        equal_shards: bool,
        buckets: Buckets | None = None,
        repeats: int = 1,
    ):
        self.distinct, self.repeats = samples, repeats
        if repeats > 1:
            samples = samples // _REPEATED * _REPEATED or samples
        self.samples, self.batch_size, self.seed, self.shuffle, self.drop_last = samples, batch_size, seed, shuffle, drop_last
        self.rank, self.world_size, self.equal_shards, self.buckets = rank, world_size, equal_shards, buckets

    def __len__(self) -> int:
        return len(self._batches(np.arange(self.samples)))

    def batches(self, epoch: int) -> list[np.ndarray]:
        """Sample indices, int64 (<= batch_size,), of each batch of this rank in ``epoch``."""
        rng = np.random.default_rng([self.seed, epoch] if self.shuffle else 0)
        order = rng.permutation(self.distinct) if self.shuffle else np.arange(self.distinct)
        if self.repeats > 1:
            order = (order[:, None] + self.distinct * np.arange(self.repeats)).reshape(-1)[: self.samples]
        return self._batches(order if self.buckets is None else self.buckets.sort(order, rng))

    @property
    def global_batch(self) -> int:
        """Samples of a batch over all ranks."""
        return self.batch_size * self.world_size

    def weight(self, number: int, accumulate: int = 1, batches: int | None = None) -> float:
        """What the mean loss of batch ``number`` of this rank is multiplied by in training, equal_shards given.

        The gradient of an optimizer step, which Lightning averages over ranks and over ``accumulate`` batches, is then that of the mean
        over the step's samples, each counted once, whatever the number of ranks and however the last batches fall. 1.0 for full batches.

        Args:
            number: of the batch in its epoch, from 0.
            accumulate: batches of an optimizer step.
            batches: of an epoch, where it is cut short.
        """
        whole = self.global_batch
        first = number // accumulate * accumulate
        last = min(first + accumulate, len(self) if batches is None else batches)
        of_step = min(last * whole, self.samples) - first * whole
        left = min((number + 1) * whole, self.samples) - number * whole
        mine = max(0, -(-(left - self.rank) // self.world_size))
        return mine * self.world_size * accumulate / of_step

    def facts(self) -> dict[str, int | bool]:
        """All that gives a position its meaning: a checkpoint made with other values cannot be continued."""
        names = ("samples", "global_batch", "seed", "shuffle", "drop_last", "equal_shards")
        facts = {name: getattr(self, name) for name in names} | ({"repeats": self.repeats} if self.repeats > 1 else {})
        return facts | (self.buckets.facts() if self.buckets is not None else {})

    def _batches(self, order: np.ndarray) -> list[np.ndarray]:
        ranks, size = self.world_size, self.batch_size
        if self.equal_shards:
            whole = self.global_batch
            count = len(order) // whole if self.drop_last else -(-len(order) // whole)
            batches = [order[start + self.rank : start + whole : ranks] for start in range(0, count * whole, whole)]
            return [batch if len(batch) else order[:1] for batch in batches]
        shard = order[self.rank :: ranks]
        batches = [shard[start : start + size] for start in range(0, len(shard), size)]
        if self.drop_last and batches and len(batches[-1]) < size:
            batches.pop()
        most = -(-len(order) // (ranks * size))
        if not self.drop_last and 0 < len(batches) < most and len(batches[-1]) > 1:
            # one batch fewer than another rank: cut the last in two, for whoever synchronises ranks at every batch
            batches[-1:] = np.array_split(batches[-1], 2)
        return batches


class ResumableLoader:
    """Batches of a data set in a reproducible order, with a position that a checkpoint carries.

    The order is a function of (seed, epoch), random augmentation one of (seed, epoch, sample); torch's global random state is
    neither read nor advanced. Nothing runs, no worker starts, before the first batch is asked for; workers live on from epoch to
    epoch. Lightning saves and restores the position of a training loader by itself and announces epochs through
    ``batch_sampler.sampler.set_epoch``. Without Lightning, call ``set_epoch``, or let every new iteration be the next epoch.

    A checkpoint written while a batch is being trained on (``ModelCheckpoint(save_on_exception=True)``) counts that batch as done.

    Args:
        dataset: has ``__len__`` and ``__getitem__(index)``. One that augments has ``draw(index, rng)`` too, which is called instead;
            rng is a numpy Generator of that sample, or copy of it, in that epoch. One that makes whole batches has ``batch(indices)``
            or ``draw_batch(indices, rngs)`` in place of them, and ``collate`` is not called.
        batch_size: samples of a batch on one rank.
        seed: of order and augmentation, >= 0.
        shuffle: a new permutation every epoch.
        drop_last: leave out a last batch that is not full.
        workers: processes that fetch; 0: in this process.
        rank, world_size: which process of how many.
        equal_shards: every rank gets equally many batches (training; see ``EpochOrder.weight``); False: each sample exactly once over all
            ranks (evaluation). None: as ``shuffle or drop_last``.
        collate: list of samples -> batch.
        buckets, repeats: see ``EpochOrder``.

    Raises:
        DataError: no batch can be made (an empty data set, or fewer samples than one full batch with drop_last).
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool,
        drop_last: bool = False,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        equal_shards: bool | None = None,
        collate: Callable[[list], Any] = default_collate,
        buckets: Buckets | None = None,
        repeats: int = 1,
    ):
        equal_shards = (shuffle or drop_last) if equal_shards is None else equal_shards
        self.dataset, self.batch_size, self.workers = dataset, batch_size, workers
        self.order = EpochOrder(
            len(dataset),
            batch_size,
            seed=seed,
            shuffle=shuffle,
            drop_last=drop_last,
            rank=rank,
            world_size=world_size,
            equal_shards=equal_shards,
            buckets=buckets,
            repeats=repeats,
        )
        self._length = len(self.order)
        if not self._length and (equal_shards or not len(dataset)):
            raise DataError(f"{len(dataset)} samples make no batch of {batch_size} on {world_size} device(s): lower the batch size.")
        self._fetch = _Fetch(dataset, seed, collate)
        self.epoch, self.position = 0, 0
        self._loaded = False
        self._plan: list[tuple[int, np.ndarray]] = []
        self._torch_loader: DataLoader | None = None
        # Lightning's teardown stops the workers of a loader whose `_iterator` is torch's, and sets it to None.
        self._iterator: Any = None

    def __len__(self) -> int:
        """Batches of a whole epoch on this rank, whatever the position."""
        return self._length

    @property
    def batch_sampler(self) -> SimpleNamespace:
        """Where Lightning looks for ``set_epoch``; it has no `sampler` of its own, which Lightning would replace."""
        return SimpleNamespace(sampler=self)

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is this epoch: from its start, or from where a loaded state stands inside this very epoch."""
        if epoch != self.epoch or not self._loaded:
            self.epoch, self.position, self._loaded = epoch, 0, False

    def state_dict(self) -> dict[str, Any]:
        """Epoch, batches of it handed out so far, and what gives them their meaning; plain ints and bools."""
        return {"epoch": self.epoch, "position": self.position, "order": self.order.facts()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the batch that ``state`` counted last.

        Raises:
            DataError: the state was made with another order (samples of a batch over all devices, samples, seed, shuffling).
        """
        mine, theirs = self.order.facts(), state["order"]
        changed = [f"{name} {theirs.get(name)} there, {value} here" for name, value in mine.items() if theirs.get(name) != value]
        if changed:
            raise DataError(
                f"the checkpoint's place in the data means nothing in this run ({'; '.join(changed)}): resume with the same values, "
                "or start a new run from its weights alone."
            )
        self.epoch, self.position, self._loaded = state["epoch"], state["position"], True

    def __iter__(self) -> Iterator[Any]:
        # A generator: Lightning makes iterators before it loads the state, and throws some away.
        if self.position >= len(self) or (self.position and not self._loaded):
            self.epoch, self.position = self.epoch + 1, 0
        self._loaded = False
        epoch = self.epoch
        for batch in self._run([(epoch, indices) for indices in self.order.batches(epoch)[self.position :]]):
            if isinstance(batch, DataError):
                raise batch
            self.position += 1
            yield batch

    def _run(self, plan: list[tuple[int, np.ndarray]]) -> Iterator[Any]:
        if not self.workers:
            return map(self._fetch.__getitem__, plan)
        if self._iterator is None:
            # A generator of its own: without one torch draws the workers' seed from the global state.
            self._torch_loader = DataLoader(
                self._fetch,
                batch_size=None,
                sampler=self._plan,
                num_workers=self.workers,
                persistent_workers=True,
                collate_fn=as_is,
                generator=torch.Generator(),
                worker_init_fn=outlast_sigterm,
                multiprocessing_context=FORK,
            )
        self._plan[:] = plan
        iterator = iter(self._torch_loader)  # the same one every epoch
        if self._iterator is None:
            self._iterator = iterator
            # Kept whole beyond this loader's end: collected in a cycle, torch's iterator loses its queues first and waits 5 s a worker.
            weakref.finalize(self, iterator._shutdown_workers)
        return iterator


class _Fetch:
    """(epoch, indices) -> collated batch, in whichever process."""

    def __init__(self, dataset: Any, seed: int, collate: Callable[[list], Any]):
        self.dataset, self.seed, self.collate = dataset, seed, collate

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, Sequence[int]]) -> Any:
        epoch, indices = key
        try:
            samples = [int(index) % len(self) for index in indices]
            if hasattr(self.dataset, "batch"):
                return self.dataset.batch(samples)
            if not hasattr(self.dataset, "draw") and not hasattr(self.dataset, "draw_batch"):
                return self.collate([self.dataset[sample] for sample in samples])
            rngs = [np.random.default_rng([self.seed, epoch, int(index)]) for index in indices]
            if hasattr(self.dataset, "draw_batch"):
                return self.dataset.draw_batch(samples, rngs)
            return self.collate([self.dataset.draw(sample, rng) for sample, rng in zip(samples, rngs, strict=True)])
        except DataError as error:
            return error  # raised in a worker it would arrive wrapped in the worker's traceback


def as_is(batch: Any) -> Any:
    return batch


def outlast_sigterm(worker: int) -> None:
    """Slurm and torchrun send SIGTERM to every process of a run: one that loads goes on, for the run to save its step, and ends with it."""
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE))
