"""What the data modules have in common: three splits, their loaders, and a checkpoint that knows which data it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl

from lba_exp.data.buckets import Buckets
from lba_exp.data.labels import SPLITS
from lba_exp.data.loader import ResumableLoader
from lba_exp.data.spec import DataSpec
from lba_exp.errors import DataError
from lba_exp.messages import unknown


class SplitData(pl.LightningDataModule):
    """A data module with the splits train, validation and test.

    A subclass's ``setup`` sets ``self._spec`` and ``self._splits`` (split -> samples, with ``__len__`` and ``__getitem__``) once; it has
    ``_collate``, a picklable function of a list of samples that returns a batch, and may have samples of its own for training.

    Args:
        batch_size, eval_batch_size: samples a batch on one device, in training and otherwise.
        workers: processes that load; 0: the training process itself.
        seed: of the training order and of what is drawn for each sample.
    """

    _collate: Callable[[list], dict[str, Any]]
    repeats = 1  # copies of a training sample in an epoch, see ``EpochOrder``

    def __init__(self, *, batch_size: int, eval_batch_size: int, workers: int, seed: int):
        super().__init__()
        self.batch_size, self.eval_batch_size, self.workers, self.seed = batch_size, eval_batch_size, workers, seed
        self.sequence_parallel_size = 1  # devices that share each batch
        self._splits: dict[str, Sequence] | None = None
        self._spec: DataSpec | None = None

    @property
    def spec(self) -> DataSpec:
        """The data set in numbers and names; RuntimeError before ``setup``."""
        if self._spec is None:
            raise RuntimeError("call setup() before asking for the spec")
        return self._spec

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Called on resume; raises DataError where the data are not those that the checkpoint was made with."""
        if state["fingerprint"] != self.spec.fingerprint:
            raise DataError(
                f"the data of {self.spec.name} have changed since the checkpoint was written: start a new run (name=, or resume=never)."
            )

    def train_dataloader(self) -> ResumableLoader:
        """Batches of the training split, in an order of their own every epoch (in one order under Lightning's ``overfit_batches``)."""
        overfit = self.trainer is not None and self.trainer.overfit_batches > 0
        pieces = 1 if self.trainer is None else self.trainer.accumulate_grad_batches
        buckets = None if overfit else self._buckets("train", self.batch_size * pieces)
        order = {"shuffle": not overfit, "equal_shards": True, "buckets": buckets, "repeats": 1 if overfit else self.repeats}
        return self._loader(self._training_samples(), self.batch_size, **order)

    def val_dataloader(self) -> ResumableLoader:
        return self.split_loader("validation")

    def test_dataloader(self) -> ResumableLoader:
        return self.split_loader("test")

    def split_loader(self, split: str) -> ResumableLoader:
        """Batches for evaluation of "train", "validation" or "test": in one order, not augmented, each sample once; raises DataError."""
        buckets = self._buckets(split, self.eval_batch_size)
        return self._loader(self._split(split), self.eval_batch_size, shuffle=False, equal_shards=False, buckets=buckets)

    def shown(self, inputs: Any) -> list | None:
        """What a person sees in a batch's inputs: for each a uint8 picture (height, width[, 3]) or its tokens; None: nothing to show."""
        return None

    def _buckets(self, split: str, samples: int) -> Buckets | None:
        """How batches are sorted by length, where a device takes so many samples a step; None: not at all."""
        return None

    def _training_samples(self) -> Sequence:
        return self._split("train")

    def _split(self, split: str) -> Sequence:
        self.setup()
        if split not in self._splits:
            raise DataError(unknown(split, SPLITS, f"a split of {self.spec.name}"))
        return self._splits[split]

    def _loader(
        self, samples: Any, batch_size: int, *, shuffle: bool, equal_shards: bool, buckets: Buckets | None = None, repeats: int = 1
    ) -> ResumableLoader:
        rank, ranks = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        shared = self.sequence_parallel_size
        return ResumableLoader(
            samples,
            batch_size,
            seed=self.seed,
            shuffle=shuffle,
            workers=self.workers,
            rank=rank // shared,
            world_size=ranks // shared,
            equal_shards=equal_shards,
            collate=self._collate,
            buckets=buckets,
            repeats=repeats,
        )
