"""Text as a stream of blocks, for corpora that fit neither memory nor disk: read, tokenised and shuffled while a model trains on it."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lba_exp.data.blocks import stack, successors
from lba_exp.data.loader import FORK, as_is, outlast_sigterm
from lba_exp.data.reading import stream_splits
from lba_exp.data.sources import resolve_source
from lba_exp.data.stream import Lane, Place, TextFiles
from lba_exp.data.text import TextBlocks
from lba_exp.errors import DataError
from lba_exp.messages import unknown


class TextStream(TextBlocks):
    """The blocks of ``TextBlocks`` from texts that are read while they are used, such as C4 from the hub (arXiv 1910.10683).

    Training: every device and every worker reads a part of its own, see ``lba_exp.data.stream.Lane``, over and over again; a run ends after
    ``trainer.max_steps`` steps. Which batches it gets is a function of seed, devices and workers, and a run that goes on gets those that
    follow. Validation and test: the first ``eval_texts`` texts of their splits, as of ``TextBlocks``.

    Args:
        shuffle_blocks: so many consecutive blocks of a part are shuffled among themselves.
        eval_texts: texts of validation and test each.
        train_split, validation_split, test_split: the source's names of the splits; None: the usual ones.
        others: as of ``TextBlocks``.

    Raises:
        DataError: as ``TextBlocks``; in ``setup``: a source without one of the splits.
    """

    def __init__(
        self,
        source: str,
        *,
        name: str | None = None,
        text_column: str = "text",
        tokens: str = "wordpiece",
        vocabulary: str | None = None,
        lowercase: bool = True,
        max_length: int = 128,
        objective: str = "masked",
        mask_fraction: float = 0.3,
        eval_mask_fraction: float = 0.15,
        shuffle_blocks: int = 10_000,
        eval_texts: int = 10_000,
        train_split: str | None = None,
        validation_split: str | None = None,
        test_split: str | None = None,
        cache: str | None = None,
        batch_size: int = 64,
        eval_batch_size: int = 256,
        workers: int = 0,
        seed: int = 0,
    ):
        super().__init__(
            source,
            name=name,
            text_column=text_column,
            tokens=tokens,
            vocabulary=vocabulary,
            lowercase=lowercase,
            max_length=max_length,
            objective=objective,
            mask_fraction=mask_fraction,
            eval_mask_fraction=eval_mask_fraction,
            cache=cache,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            workers=workers,
            seed=seed,
        )
        self.shuffle_blocks, self.eval_texts = shuffle_blocks, eval_texts
        self.named = {"train": train_split, "validation": validation_split, "test": test_split}
        self._files: TextFiles | None = None

    def prepare_data(self) -> None:
        """Nothing: a stream is read by every process."""

    def setup(self, stage: str | None = None) -> None:
        """Opens the training split, and reads the others; raises DataError."""
        if self._splits is not None:
            return
        source = resolve_source(self.source)
        found, blocks = stream_splits(source, self.named), {}
        for split in ("validation", "test"):
            if split not in found:
                raise DataError(
                    f"{source.name} has no {split} split, and none is cut from a stream: name another one with data.{split}_split=NAME "
                    f"(it has {', '.join(found)})."
                )
        files = {split: self._open(dataset, f"{source.name}, {split} split") for split, dataset in found.items()}
        for split in ("validation", "test"):
            rows = (text for file in range(files[split].files) for _, texts in files[split].rows(file) for text in texts)
            blocks[split] = self._blocks([text for text in islice(rows, self.eval_texts) if text])
        self._files = files["train"]
        self._describe(self.name or source.name, blocks, files=self._files.files)

    def train_dataloader(self) -> StreamLoader:
        """As many batches as the run has yet to make of its steps."""
        trainer = self.trainer
        batches = trainer.max_steps * trainer.accumulate_grad_batches
        shared = self.sequence_parallel_size
        return self.training_loader(batches, trainer.global_rank // shared, trainer.world_size // shared)

    def training_loader(self, batches: int, rank: int = 0, world_size: int = 1) -> StreamLoader:
        """The first ``batches`` batches of one of ``world_size`` parts of the stream."""
        self.setup()
        own = max(1, self.workers)
        lanes = [
            Lane(
                self._files,
                self.vocabulary.encode,
                self.vocabulary.ids["[SEP]"],
                self.block_size,
                self.shuffle_blocks,
                self.seed,
                rank * own + worker,
                world_size * own,
            )
            for worker in range(own)
        ]
        sample = successors if self.objective == "causal" else self._masking("train")
        return StreamLoader(lanes, sample, self.batch_size, batches=batches, workers=self.workers, rank=rank, world_size=world_size)

    def _split(self, split: str) -> Sequence:
        if split == "train":
            raise DataError(f"{self.spec.name} is read as a stream, whose training split cannot be evaluated: give validation or test.")
        return super()._split(split)

    def _open(self, dataset: Any, where: str) -> TextFiles:
        columns = dataset.column_names
        if columns is None:  # known from the first row alone
            columns = list(next(iter(dataset.take(1)), {}))
        if self.text_column not in columns:
            raise DataError(f"{where}: {unknown(self.text_column, columns, 'a column (data.text_column)')}")
        return TextFiles(dataset.select_columns([self.text_column]), self.text_column, where)


class StreamLoader:
    """Batches of blocks of a stream, with a place that a checkpoint carries.

    Workers make whole batches, each from a lane of its own, and take turns. Iterations go on where the last one ended. Nothing is read,
    no worker starts, before the first batch is asked for. It has a length, or Lightning would read a batch ahead of the one that it trains
    on, and a checkpoint would lose one.

    Args:
        lanes: of this device, one for each worker, or one.
        sample: (block, generator) -> (inputs, labels).
        batch_size: blocks of a batch on one device.
        batches: of the whole run.
        workers: processes that load; 0: this one.
        rank, world_size: which device of how many.
    """

    def __init__(
        self,
        lanes: list[Lane],
        sample: Callable[[np.ndarray, np.random.Generator], tuple[np.ndarray, np.ndarray]],
        batch_size: int,
        *,
        batches: int,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.lanes, self.sample, self.batch_size, self.batches, self.workers = lanes, sample, batch_size, batches, workers
        self.rank, self.world_size = rank, world_size
        self.position = 0
        self.places = [Place() for _ in lanes]
        self._iterator: Any = None

    def __len__(self) -> int:
        """Batches of the whole run, whatever the position."""
        return self.batches

    def facts(self) -> dict[str, int]:
        """All that gives a place its meaning: a checkpoint made with other values cannot be continued."""
        first = self.lanes[0]
        return {
            "files": first.files.files,
            "seed": first.seed,
            "devices": self.world_size,
            "workers": self.workers,
            "batch_size": self.batch_size,
            "shuffle_blocks": first.buffer,
            "block_size": first.size,
        }

    def state_dict(self) -> dict[str, Any]:
        """Batches handed out so far, and the places of all devices' lanes; plain ints. Every device calls."""
        mine = [place.facts() for place in self.places]
        places = [mine]
        if self.world_size > 1:
            everyone: list = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(everyone, mine)
            places = everyone[:: len(everyone) // self.world_size]  # devices that share sequences have the same
        return {"position": self.position, "places": places, "stream": self.facts()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the batch that ``state`` counted last; DataError where it was made with another stream, devices or workers."""
        mine, theirs = self.facts(), state.get("stream", {})
        if changed := [f"{name} {theirs.get(name)} there, {value} here" for name, value in mine.items() if theirs.get(name) != value]:
            raise DataError(
                f"the checkpoint's place in the stream means nothing in this run ({'; '.join(changed)}): resume with the same values, "
                "or start a new run from its weights alone."
            )
        self.position, self.places = state["position"], [Place(**place) for place in state["places"][self.rank]]

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        # A generator: Lightning makes iterators before it loads the state, and throws some away.
        if self.position >= self.batches:
            return
        found = self._with_workers() if self.workers else _batches(self, 0)
        try:
            for lane, batch, place in found:
                if isinstance(batch, DataError):  # raised in a worker it would arrive wrapped in the worker's traceback
                    raise batch
                self.position, self.places[lane] = self.position + 1, place
                yield batch
                if self.position >= self.batches:
                    return
        finally:
            if self._iterator is not None:
                self._iterator._shutdown_workers()
                self._iterator = None

    def _with_workers(self) -> Iterator[tuple[int, Any, Place]]:
        reader = DataLoader(
            _Reader(self),
            batch_size=None,
            num_workers=self.workers,
            collate_fn=as_is,
            generator=torch.Generator(),  # without one torch draws the workers' seed from the global state
            worker_init_fn=outlast_sigterm,
            multiprocessing_context=FORK,
        )
        self._iterator = iter(reader)
        weakref.finalize(self, self._iterator._shutdown_workers)
        return self._iterator


class _Reader(IterableDataset):
    """A worker's batches; torch asks its workers in turn, beginning with the first."""

    def __init__(self, loader: StreamLoader):
        self.lanes, self.places, self.position = loader.lanes, loader.places, loader.position
        self.sample, self.batch_size = loader.sample, loader.batch_size

    def __iter__(self) -> Iterator[tuple[int, Any, Place]]:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not outlive the fork
        return _batches(self, (get_worker_info().id + self.position) % len(self.lanes))


def _batches(of: StreamLoader | _Reader, lane: int) -> Iterator[tuple[int, Any, Place]]:
    """(lane, batch or a DataError, place behind it) of a lane, without end."""
    reader, samples = of.lanes[lane], []
    try:
        for block, place in reader.blocks(of.places[lane]):
            samples.append(of.sample(block, reader.rng(place)))
            if len(samples) == of.batch_size:
                yield lane, stack(samples), place
                samples = []
    except DataError as error:
        yield lane, error, of.places[lane]
