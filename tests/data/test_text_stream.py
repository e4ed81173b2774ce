"""A stream of texts: every text once over all readers, the same batches after a resume at any place, mistakes."""

import gzip
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lba_exp.data.stream import Lane, Place
from lba_exp.data.text_stream import TextStream
from lba_exp.errors import DataError

SIZE = 16  # bytes of a block


class Files:
    """Texts of some files, as ``TextFiles`` gives them."""

    def __init__(self, texts, step=3):
        self.texts, self.files, self.step, self.where = texts, len(texts), step, "test"

    def rows(self, file, start=0):
        for first in range(start, len(self.texts[file]), self.step):
            yield first, self.texts[file][first : first + self.step]


def encode(texts):
    return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]


def lane(texts, number=0, lanes=1, buffer=4, size=SIZE, seed=0):
    return Lane(Files(texts), encode, 257, size, buffer, seed, number, lanes)


def epoch_of(reader, epoch=0):
    """Blocks of one epoch of a lane, window by window."""
    found = []
    for start, window, _ in reader._windows(Place()):
        if start.epoch > epoch:
            return found
        found += list(window) if start.epoch == epoch else []


@pytest.mark.parametrize(("files", "lanes"), [(1, 1), (1, 4), (3, 4), (4, 4), (9, 4)])
def test_readers_have_every_text_once(files, lanes):
    """A text fills a block: blocks are texts."""
    texts = [[f"file {file:02d} row {row:02d}.".ljust(SIZE - 1) for row in range(11 + file)] for file in range(files)]
    for epoch in (0, 1):
        found = [bytes(block[:-1].astype(np.uint8)).decode() for n in range(lanes) for block in epoch_of(lane(texts, n, lanes), epoch)]
        assert sorted(found) == sorted(text for some in texts for text in some)
    size, reader = len(epoch_of(lane(texts, 0, lanes))), lane(texts, 0, lanes).blocks(Place())
    first, second = ([next(reader)[0].tolist() for _ in range(size)] for _ in range(2))
    assert sorted(first) == sorted(second) and first != second


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.lists(st.text("abcdefgh", max_size=40), min_size=1, max_size=9), min_size=1, max_size=4),
    buffer=st.integers(1, 7),
    size=st.integers(3, 12),
    lanes=st.integers(1, 3),
    stop=st.integers(0, 40),
    seed=st.integers(0, 9),
)
def test_a_stream_goes_on_from_any_place(texts, buffer, size, lanes, stop, seed):
    reader = lane(texts, lanes - 1, lanes, buffer, size, seed)
    stream, places = reader.blocks(Place()), [Place()]
    try:
        whole = []
        for block, place in (next(stream) for _ in range(stop + 15)):
            whole.append((block, reader.rng(place).random()))
            places.append(Place(**json.loads(json.dumps(place.facts()))))
    except DataError as error:
        assert "too few for" in str(error) and not whole
        return
    again = reader.blocks(places[stop])
    for block, drawn in whole[stop:]:
        other, place = next(again)
        assert np.array_equal(block, other) and reader.rng(place).random() == drawn
    assert len({drawn for _, drawn in whole}) == len(whole)


def test_blocks_are_the_texts_one_after_the_other():
    """Without a shuffle, a lane's tokens are its texts in a file's order, cut at any place."""
    texts = [["one", "", "two and a longer one that fills several blocks of tokens", "three"], ["four", "five", "six"]]
    flat = np.concatenate(epoch_of(lane(texts, buffer=1, size=5))).tolist()
    orders = [[token for file in order for text in texts[file] if text for token in [*text.encode(), 257]] for order in ((0, 1), (1, 0))]
    assert flat in [order[: len(flat)] for order in orders] and 0 <= len(orders[0]) - len(flat) < 5


@pytest.fixture
def folder(tmp_path):
    """C4's layout: rows of JSON, compressed, in several files."""
    path = tmp_path / "c4"
    path.mkdir()
    rng = np.random.default_rng(0)
    for name, rows in (*((f"train-{n:05d}-of-00005", 40) for n in range(5)), ("validation", 30)):
        with gzip.open(path / f"{name}.json.gz", "wt") as file:
            for row in range(rows):
                words = " ".join(f"{name[6:11]}.{row}.{word}" for word in range(int(rng.integers(1, 6))))
                file.write(json.dumps({"text": words, "url": "x"}) + "\n")
    return path


def stream(folder, **options):
    options = {"tokens": "bytes", "max_length": 24, "batch_size": 4, "shuffle_blocks": 7, "test_split": "validation"} | options
    module = TextStream(str(folder), **options)
    module.setup()
    return module


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("objective", ["masked", "causal"])
def test_a_loader_goes_on_with_the_batch_that_comes_next(folder, workers, objective):
    module = stream(folder, workers=workers, objective=objective)
    loader, states, batches = module.training_loader(130), [], []
    for batch in loader:
        batches.append(batch)
        states.append(json.loads(json.dumps(loader.state_dict())))
    assert len(batches) == 130 and min(place["epoch"] for place in states[-1]["places"][0]) > 0
    assert all(batch["inputs"].shape == (4, 24) == batch["labels"].shape for batch in batches)
    for stop in (1, 2, 61, 129):
        again = stream(folder, workers=workers, objective=objective).training_loader(130)
        again.load_state_dict(states[stop - 1])
        rest = list(again)
        assert len(rest) == 130 - stop
        for batch, other in zip(batches[stop:], rest, strict=True):
            assert torch.equal(batch["inputs"], other["inputs"]) and torch.equal(batch["labels"], other["labels"])
    with pytest.raises(DataError, match=r"means nothing in this run .*batch_size 4 there, 8 here"):
        stream(folder, workers=workers, batch_size=8, objective=objective).training_loader(130).load_state_dict(states[0])


def test_devices_and_workers_share_nothing(folder):
    """Blocks of an epoch on two devices with two workers each: no text in two of them."""
    module, seen = stream(folder, workers=2, objective="causal", max_length=8, shuffle_blocks=1), []
    for rank in (0, 1):
        for reader in module.training_loader(1, rank, 2).lanes:
            texts = bytes(np.concatenate(epoch_of(reader)).astype(np.uint16).clip(0, 255).astype(np.uint8)).split(b"\xff")
            seen.append({text.split(b" ")[0] for text in texts if text.count(b".") >= 2})
    assert sum(map(len, seen)) == len(set.union(*seen)) > 150


def test_evaluation_reads_the_first_texts_of_its_splits(folder):
    module = stream(folder, eval_texts=20, objective="causal")
    other = stream(folder, eval_texts=30, objective="causal")
    assert module.spec.sizes["validation"] == module.spec.sizes["test"] < other.spec.sizes["validation"]
    assert module.spec.fingerprint != other.spec.fingerprint
    with pytest.raises(DataError, match="training split cannot be evaluated"):
        module.split_loader("train")


def test_mistakes_are_named(folder, tmp_path):
    for options, words in (
        ({"test_split": None}, r"c4 has no test split, and none is cut from a stream: .*data.test_split=NAME \(it has train, validation\)"),
        ({"text_column": "txt"}, "did you mean text"),
        ({"max_length": 4096}, "validation split of c4 is too small for one block of 4096 tokens"),
    ):
        with pytest.raises(DataError, match=words):
            stream(folder, **options)
    with pytest.raises(DataError, match=r"too few for 900 readers \(devices x workers\)"):
        next(iter(stream(folder).training_loader(1, 899, 900)))
    with pytest.raises(DataError, match="digits holds images, and no texts"):
        stream("digits")
    with gzip.open(folder / "train-00000-of-00005.json.gz", "wt") as file:
        file.write('{"text": "fine", "url": "x"}\n{"text": null, "url": "x"}\n')
    for workers in (0, 2):
        with pytest.raises(DataError, match="row 1 of file 0 holds no text in 'text'"):
            list(stream(folder, workers=workers).training_loader(60))
