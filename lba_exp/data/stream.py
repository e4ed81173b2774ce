"""A stream of texts as blocks of tokens: read piece by piece, dealt out to devices and workers, shuffled, and resumed at any block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from lba_exp.data.reading import first_line
from lba_exp.errors import DataError

_BATCH = 256  # texts that are tokenised at a time


@dataclass(frozen=True)
class Place:
    """Where a lane stands: before a text's token, and how far in the window of shuffled blocks that begins there.

    Attributes:
        epoch: times that the lane has been read to its end.
        file: in the epoch's order of the lane's files.
        row: of the file.
        token: of the text in that row.
        window: windows before this one, over all epochs.
        emitted: blocks of this window that were handed out.
        serial: blocks that were handed out before this window.
    """

    epoch: int = 0
    file: int = 0
    row: int = 0
    token: int = 0
    window: int = 0
    emitted: int = 0
    serial: int = 0

    def facts(self) -> dict[str, int]:
        return asdict(self)


class TextFiles:
    """The texts of a streamed data set, file by file.

    Args:
        dataset: a ``datasets.IterableDataset``.
        column: the column of the texts.
        where: the data set's name and split, for messages.
    """

    def __init__(self, dataset: Any, column: str, where: str):
        self.dataset, self.column, self.where = dataset, column, where
        self.files: int = dataset.num_shards

    def rows(self, file: int, start: int = 0) -> Iterator[tuple[int, list[str]]]:
        """(number of the first row, texts of some rows) of a file from row ``start`` on; DataError for a row without a text."""
        try:
            part = self.dataset.shard(num_shards=self.files, index=file, contiguous=False)
            # batches, not single rows: those of `datasets` deal files out to workers once more
            for batch in (part.skip(start) if start else part).iter(_BATCH):
                texts = batch[self.column]
                for row, text in enumerate(texts, start):
                    if not isinstance(text, str):
                        raise DataError(f"{self.where}: row {row} of file {file} holds no text in {self.column!r}.")
                yield start, texts
                start += len(texts)
        except DataError:
            raise
        except Exception as error:  # whatever `datasets`, a file's format or the hub's client raise
            raise DataError(f"{self.where}: file {file} cannot be read on from row {start} ({first_line(error)}).") from error


@dataclass(frozen=True)
class Lane:
    """The part of a stream that one of ``lanes`` readers has: some of the files, or, of fewer files than lanes, every so-and-so-many-th row
    of all of them. Lanes share no text, and have all of them together.

    Blocks are cut from the lane's tokens, which come one text after the other with ``end`` behind each; what is left at an epoch's end
    makes no block. Every ``buffer`` blocks are shuffled among themselves. All of it is a function of (seed, lane, lanes) and of the place.

    Attributes:
        files: the stream.
        encode: texts -> integers (n,) for each.
        end: the token behind a text.
        size: tokens of a block.
        buffer: blocks of a window.
        seed, number, lanes: which order, and which lane of how many.
    """

    files: TextFiles
    encode: Callable[[list[str]], list[np.ndarray]]
    end: int
    size: int
    buffer: int
    seed: int
    number: int
    lanes: int

    def blocks(self, place: Place) -> Iterator[tuple[np.ndarray, Place]]:
        """(block (size,), the place behind it) from a place on, without end; DataError for a lane without a single block."""
        for start, window, after in self._windows(replace(place, emitted=0)):
            order = np.random.default_rng([self.seed, self.number, start.window, 1]).permutation(len(window))
            first = place.emitted if start.window == place.window else 0
            for emitted in range(first, len(order)):
                whole = emitted + 1 == len(order)
                yield window[order[emitted]], after if whole else replace(start, emitted=emitted + 1)

    def rng(self, place: Place) -> np.random.Generator:
        """What is drawn for the block behind which a place is."""
        return np.random.default_rng([self.seed, self.number, place.serial + place.emitted])

    def _windows(self, place: Place) -> Iterator[tuple[Place, np.ndarray, Place]]:
        """(place, blocks (n, size), place behind them)."""
        full = self.buffer * self.size
        while True:
            pieces: list[np.ndarray] = []
            held, found = 0, place.token > 0 or place.row > 0 or place.file > 0
            for file, row, tokens in self._texts(place):
                pieces.append(tokens[place.token :] if (file, row) == (place.file, place.row) else tokens)
                held += len(pieces[-1])
                while held >= full:
                    flat = np.concatenate(pieces)
                    held -= full
                    pieces = [flat[full:]]
                    after = replace(self._behind(place, self.buffer), file=file, row=row, token=len(tokens) - held)
                    yield place, flat[:full].reshape(-1, self.size), after
                    place, found = after, True
            count = held // self.size
            after = replace(self._behind(place, count), epoch=place.epoch + 1, file=0, row=0, token=0)
            if count:
                yield place, np.concatenate(pieces)[: count * self.size].reshape(-1, self.size), after
            elif not found:
                raise DataError(
                    f"{self.files.where}: the texts are too few for {self.lanes} readers (devices x workers), each of which needs a block "
                    f"of {self.size} tokens: give fewer data.workers, or shorter blocks."
                )
            place = after

    def _behind(self, place: Place, blocks: int) -> Place:
        return replace(place, window=place.window + 1, serial=place.serial + blocks)

    def _texts(self, place: Place) -> Iterator[tuple[int, int, np.ndarray]]:
        """(file in the epoch's order, row, tokens with the end) of the lane's texts, from that of a place to the end of its epoch."""
        by_file = self.files.files >= self.lanes
        mine = np.random.default_rng([self.seed, 0]).permutation(self.files.files)
        if by_file:
            mine = mine[self.number :: self.lanes]
        mine = np.random.default_rng([self.seed, place.epoch + 1, self.number if by_file else 0, 2]).permutation(mine)
        for file in range(place.file, len(mine)):
            for first, texts in self.files.rows(int(mine[file]), place.row if file == place.file else 0):
                rows = [at for at, text in enumerate(texts) if text and (by_file or (first + at) % self.lanes == self.number)]
                for at, tokens in zip(rows, self.encode([texts[at] for at in rows]), strict=True):
                    yield file, first + at, np.append(tokens, np.int32(self.end))
