"""Texts with labels: tokens, pairs, limits, padding, buckets, formats of files, and mistakes."""

import csv
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lba_exp.data.buckets import Buckets
from lba_exp.data.glue import LAYOUTS
from lba_exp.data.labelled import TextClassification
from lba_exp.data.loader import EpochOrder, ResumableLoader
from lba_exp.data.tokens import Bytes
from lba_exp.errors import DataError
from tests import glue
from tests.corpus import SPECIAL, WORDS

CLS, SEP, UNK = (SPECIAL.index(token) for token in ("[CLS]", "[SEP]", "[UNK]"))
TEXTS = ["The cat sleep.", "a dog", "Cats run under the red house over the green tree", "null", 'she said "run"', "NA\u00e9"]


def numbers(text):
    return [(SPECIAL + WORDS).index(word) for word in text.split()]


@pytest.fixture
def vocabulary(tmp_path):
    return str(glue.write_vocabulary(tmp_path / "vocabulary"))


def write(folder, suffix, table, split="train"):
    """A table (column -> values) as a file of one format."""
    import datasets

    folder.mkdir(exist_ok=True)
    path = folder / f"{split}.{suffix}"
    if suffix in ("csv", "tsv"):
        with open(path, "w", newline="") as file:
            if suffix == "csv":
                writer = csv.writer(file)
                writer.writerow(table)
                writer.writerows(zip(*table.values(), strict=True))
            else:
                file.write("\n".join("\t".join(map(str, row)) for row in [list(table), *zip(*table.values(), strict=True)]) + "\n")
    elif suffix == "jsonl":
        path.write_text("".join(json.dumps(dict(zip(table, row, strict=True))) + "\n" for row in zip(*table.values(), strict=True)))
    elif suffix == "parquet":
        datasets.Dataset.from_dict(table).to_parquet(str(path))
    else:
        from datasets.arrow_writer import ArrowWriter

        with ArrowWriter(path=str(path)) as writer:
            for row in zip(*table.values(), strict=True):
                writer.write(dict(zip(table, row, strict=True)))
            writer.finalize()
    return folder


def made(folder, vocabulary, **options):
    options = {"validation_split": "train", "test_split": "train", "max_length": 16, "batch_size": 4, "bucket_steps": 0, **options}
    module = TextClassification(str(folder), vocabulary=None if options.get("tokens") == "bytes" else vocabulary, **options)
    module.setup()
    return module


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet", "arrow"])
def test_every_format_gives_the_same_samples(tmp_path, vocabulary, suffix):
    texts = [*TEXTS, '"run, a cat', "under"]  # a quote that is not closed, and a row behind it
    table = {"text": texts, "label": ["yes", "no"] * 4}
    module = made(write(tmp_path / suffix, suffix, table), vocabulary, tokens="bytes", max_length=64)
    assert module.spec.class_names == ["no", "yes"] and module.spec.sizes == dict.fromkeys(("train", "validation", "test"), 8)
    for sample, text, label in zip(module._split("validation"), texts, table["label"], strict=True):
        assert sample[0].tolist() == [256, *text.encode(), 257] and sample[2] == (label == "yes")
    assert module.tokenizer.words([256, 97, 257]) == ["[CLS]", "a", "[SEP]"]


def test_a_batch_of_single_texts(tmp_path, vocabulary):
    module = made(write(tmp_path / "set", "csv", {"text": TEXTS, "label": [0, 1, 2, 0, 1, 2]}), vocabulary, pad_multiple=4)
    batch = next(iter(module.val_dataloader()))
    expected = [
        [CLS, *numbers("the cat sleep ."), SEP],
        [CLS, *numbers("a dog"), SEP],
        [CLS, *numbers("cat ##s run under the red house over the green tree"), SEP],
        [CLS, UNK, SEP],
        [CLS, UNK, UNK, UNK, *numbers("run"), UNK, SEP],
        [CLS, UNK, SEP],
    ]
    assert batch.keys() == {"inputs", "padding_mask", "labels"} and batch["labels"].tolist() == [0, 1, 2, 0, 1, 2]
    assert batch["inputs"].shape == (6, 16) and batch["inputs"].dtype == batch["labels"].dtype == torch.int64
    for row, mask, tokens in zip(batch["inputs"], batch["padding_mask"], expected, strict=True):
        assert row[mask].tolist() == tokens and mask.tolist() == [i < len(tokens) for i in range(16)]
    assert module.spec.length == 16 and module.spec.vocabulary == len(SPECIAL + WORDS) and not module.notes
    assert module.shown(batch["inputs"])[1][:4] == ["[CLS]", "a", "dog", "[SEP]"]


def test_pairs_have_segments_and_the_longer_text_is_cut_first(tmp_path, vocabulary):
    table = {
        "a": ["the cat", "a dog", ". ".join(["run"] * 9)],
        "b": ["under the tree", " ".join(["red"] * 30), "a cat"],
        "label": [0, 1, 1],
    }
    folder = write(tmp_path / "pairs", "jsonl", table)
    module = made(folder, vocabulary, text_column="a", second_text_column="b", pad_multiple=1)
    batch = next(iter(module.val_dataloader()))
    first = [CLS, *numbers("the cat"), SEP, *numbers("under the tree"), SEP]
    second = [CLS, *numbers("a dog"), SEP, *numbers(" ".join(["red"] * 11)), SEP]
    third = [CLS, *numbers("run . run . run . run . run . run"), SEP, *numbers("a cat"), SEP]
    assert [row[mask].tolist() for row, mask in zip(batch["inputs"], batch["padding_mask"], strict=True)] == [first, second, third]
    assert batch["token_types"].tolist() == [[0] * 4 + [1] * 4 + [0] * 8, [0] * 4 + [1] * 12, [0] * 13 + [1] * 3]
    assert module.notes == ["pairs, train split: 2 of 3 texts are longer than data.max_length=16 tokens and are cut."]
    assert "token_types" not in next(
        iter(made(folder, vocabulary, text_column="a", second_text_column="b", token_types=False).val_dataloader())
    )


@given(st.integers(0, 40), st.integers(0, 40), st.integers(8, 40))
def test_bytes_are_cut_as_wordpieces_are(first, second, length):
    tokens = Bytes(length).encode(["a" * first], ["b" * second])
    kept = tokens.flat.tolist()
    assert len(kept) == min(first + second + 3, length) and tokens.cut == (first + second + 3 > length)
    a, b = kept.count(97), kept.count(98)
    assert kept == [256, *[97] * a, 257, *[98] * b, 257] and tokens.second[0] == a + 2
    if tokens.cut:  # the longer text is not left shorter than the other by more than the half token of an odd limit
        assert (a == first or a >= b - 1) and (b == second or b >= a - 1)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 90), st.integers(1, 4), st.sampled_from([(1, 1), (2, 1), (1, 2), (3, 2)]), st.integers(1, 5), st.integers(0, 5))
def test_buckets_hold_every_sample_once_and_the_same_steps_on_any_devices(samples, size, split, window, epoch):
    ranks, pieces = split
    lengths = np.random.default_rng(samples).integers(1, 100, samples)
    step = size * 6
    buckets = Buckets(lengths, step, window)

    def steps(ranks, pieces):
        orders = [
            EpochOrder(
                samples,
                step // ranks // pieces,
                seed=3,
                shuffle=True,
                drop_last=False,
                rank=rank,
                world_size=ranks,
                equal_shards=True,
                buckets=buckets,
            )
            for rank in range(ranks)
        ]
        batches = [order.batches(epoch) for order in orders]
        found = []
        for number in range(len(batches[0])):
            weights = [order.weight(number) for order in orders]
            found.append([i for mine, weight in zip(batches, weights, strict=True) if weight for i in mine[number].tolist()])
        return [sorted(i for part in found[start : start + pieces] for i in part) for start in range(0, len(found), pieces)]

    alone = steps(1, 1)
    assert sorted(i for found in alone for i in found) == list(range(samples))
    assert steps(ranks, pieces) == alone
    assert all(len(found) == step for found in alone[: samples // step])


def test_buckets_spare_padding_and_change_from_epoch_to_epoch():
    lengths = np.random.default_rng(0).integers(1, 1000, 2005)

    def order(buckets, seed=0):
        return EpochOrder(2005, 16, seed=seed, shuffle=True, drop_last=False, rank=0, world_size=1, equal_shards=True, buckets=buckets)

    def padded(order):
        return sum(len(batch) * lengths[batch].max() for batch in order.batches(1)) / lengths.sum()

    bucketed = order(Buckets(lengths, 16, 50))
    assert padded(order(None)) > 1.7 and padded(bucketed) < 1.1
    same, epoch, seed = (found for found in (bucketed.batches(1), bucketed.batches(2), order(Buckets(lengths, 16, 50), 1).batches(1)))
    again = order(Buckets(lengths, 16, 50)).batches(1)
    assert all(np.array_equal(a, b) for a, b in zip(same, again, strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(same, epoch, strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(same, seed, strict=True))
    first = [int(lengths[batch].mean()) for batch in same[:20]]
    assert first != sorted(first)  # batches do not come in order of their length


def test_evaluation_is_sorted_too_the_same_every_time():
    lengths = np.random.default_rng(1).integers(1, 1000, 401)
    given = {"seed": 0, "shuffle": False, "drop_last": False, "world_size": 2, "equal_shards": False}
    orders = [EpochOrder(401, 16, rank=rank, buckets=Buckets(lengths, 32, 50), **given) for rank in (0, 1)]
    batches = [order.batches(0) for order in orders]
    assert sorted(i for mine in batches for batch in mine for i in batch.tolist()) == list(range(401))
    assert all(
        np.array_equal(a, b) for order, mine in zip(orders, batches, strict=True) for a, b in zip(order.batches(3), mine, strict=True)
    )
    assert sum(len(batch) * lengths[batch].max() for mine in batches for batch in mine) / lengths.sum() < 1.2


def test_buckets_are_part_of_a_place_in_the_data():
    loader = ResumableLoader(list(range(9)), 2, seed=0, shuffle=True, buckets=Buckets(np.arange(9), 2, 2))
    next(iter(loader))
    ResumableLoader(list(range(9)), 2, seed=0, shuffle=True, buckets=Buckets(np.arange(9), 2, 2)).load_state_dict(loader.state_dict())
    for buckets in (None, Buckets(np.arange(9), 2, 3)):
        other = ResumableLoader(list(range(9)), 2, seed=0, shuffle=True, buckets=buckets)
        with pytest.raises(DataError, match="means nothing in this run"):
            (other if buckets else loader).load_state_dict((loader if buckets else other).state_dict())


@pytest.mark.parametrize("task", glue.TASKS)
def test_both_layouts_of_glue_give_the_same_samples(tmp_path, vocabulary, task):
    columns, classes = glue.TASKS[task]
    assert tuple(LAYOUTS[task].columns) == columns
    named = {"validation_split": glue.splits(task)[1], "test_split": glue.splits(task)[-1]}
    texts = dict(zip(("text_column", "second_text_column"), columns[:-1], strict=False))
    options = {**named, **texts, "glue_task": task, "target": "classes" if classes else "number", "max_length": 32}
    modules = [
        made(write(tmp_path / name, task), vocabulary, **options) for name, write in (("h", glue.write_hub), ("o", glue.write_original))
    ]
    assert modules[0].spec.fingerprint == modules[1].spec.fingerprint
    assert modules[0].spec.class_names == modules[1].spec.class_names == (classes or ["label"])
    assert modules[0].spec.sizes == {"train": 24, "validation": 13, "test": 13}
    left_out = [f"{name}.tsv: 1 rows lack a field and are left out." for name in ("train", "dev")]
    assert [m.notes for m in modules] == [[], left_out if task == "qqp" else []]
    for split, of in (("train", "train"), ("test", named["test_split"])):
        assert [label for *_, label in modules[0]._split(split)] == pytest.approx([row[-1] for row in glue.rows(task, of)], abs=1e-6)


def test_mistakes_are_named(tmp_path, vocabulary):
    table = {"text": TEXTS, "label": [0, 1, 0, 1, 0, 1]}
    folder = write(tmp_path / "set", "csv", table)
    other = write(tmp_path / "other", "csv", table)
    write(other, "csv", {"text": ["a"], "label": [7]}, "test")
    gaps = write(tmp_path / "gaps", "csv", table | {"label": [0, 1, 3, 0, 1, 3]})
    partial = write(tmp_path / "partial", "csv", table | {"label": ["x", "y", "", "x", "y", ""]})
    empty = write(tmp_path / "empty", "csv", {"text": [], "label": []})
    (tmp_path / "nothing").mkdir(), (tmp_path / "nothing" / "train.csv").write_text("")
    twice = write(write(tmp_path / "twice", "csv", table), "tsv", table)
    broken = write(tmp_path / "broken", "csv", table)
    (broken / "train.csv").write_text("text,label\na,0\nb,1,2,3\n")
    numeric = write(tmp_path / "numeric", "csv", {"text": [1, 2, 3], "label": [0, 1, 0]})
    untold = write(tmp_path / "untold", "jsonl", {"text": ["a", None, "b"], "label": [0, 1, 0]})
    for where, options, words in (
        (tmp_path / "nowhere", {}, "nowhere does not exist"),
        (folder, {"text_column": "txt"}, r"'txt' is not a column \(data.text_column\); did you mean text\? Valid: text, label"),
        (folder, {"second_text_column": "other"}, r"data.second_text_column.* Valid: text, label"),
        (folder, {"label_column": "lable"}, "did you mean label"),
        (folder, {"test_split": "dev"}, r"'dev' is not a split of set \(data.test_split\).* Valid: train"),
        (folder, {"tokens": "words"}, "a kind of tokens"),
        (folder, {"target": "number", "label_column": "text"}, "6 of 6 samples have no number in column 'text'"),
        (other, {"test_split": None}, "other, test split: 7 in column 'label' is no class; the classes are 0, 1"),
        (gaps, {}, "without gaps, and these are 0, 1, 3"),
        (partial, {}, r"2 of 6 samples have no 'label' \(the first is number 2\)"),
        (empty, {}, "train.csv holds no samples"),
        (tmp_path / "nothing", {}, "train.csv is empty"),
        (twice, {}, "the split train .* is there twice"),
        (broken, {}, "train.csv cannot be read as csv: .*Expected 2 fields in line 3, saw 4"),
        (numeric, {}, "3 of 3 rows hold no text in 'text' .the first is number 0: int."),
        (untold, {}, "1 of 3 rows hold no text in 'text' .the first is number 1: nothing."),
        (folder, {"validation_split": None, "validation_fraction": 0.1}, "no validation split of 1 samples"),
    ):
        with pytest.raises(DataError, match=words):
            made(where, vocabulary, **options)
    with pytest.raises(DataError, match=r"vocab\.txt is no file"):
        made(folder, str(folder))


def test_another_vocabulary_or_other_classes_are_not_adopted(tmp_path, vocabulary):
    module = made(write(tmp_path / "set", "csv", {"text": TEXTS, "label": list("abcabc")}), vocabulary)
    kept = module.state_dict()
    module.adopt(kept), module.load_state_dict(kept)
    with pytest.raises(DataError, match="another vocabulary"):
        module.adopt(kept | {"vocabulary": "0"})
    with pytest.raises(DataError, match="trained on the classes b, a, and set has a, b, c"):
        module.adopt(kept | {"classes": ["b", "a"]})
    with pytest.raises(DataError, match="have changed"):
        module.load_state_dict(kept | {"fingerprint": "0"})
