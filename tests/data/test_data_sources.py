"""What a source names, what is read from it, and what is said where it cannot be."""

import subprocess
import sys

import datasets
import numpy as np
import pytest
from PIL import Image

from lba_exp.data.labels import cut_splits, read_labels
from lba_exp.data.reading import read_splits
from lba_exp.data.sources import check_source, resolve_source
from lba_exp.errors import DataError


def table(labels, **columns):
    return datasets.Dataset.from_dict({"label": labels, **columns})


def test_names_and_paths(tmp_path):
    (tmp_path / "pictures" / "flowers").mkdir(parents=True)
    assert resolve_source("digits").kind == "embedded"
    assert resolve_source("pictures").path == tmp_path / "pictures"
    assert resolve_source("./pictures/flowers").path == tmp_path / "pictures" / "flowers"
    assert resolve_source("mnist").kind == resolve_source("ylecun/mnist").kind == "hub"
    source = resolve_source("org/name:config")
    assert (source.repository, source.config, source.name) == ("org/name", "config", "name")


@pytest.mark.parametrize(
    "source, said",
    [
        ("./pictures/flower", r"data folder \./pictures/flower does not exist; did you mean pictures/flowers\?"),
        ("pictures/FLOWERS", r"did you mean pictures/flowers\?"),  # a folder `pictures` is here: not a hub name
        ("./pictres/flowers/x", r"did you mean pictures\?"),
        ("~/no-such-folder-at-all", "there is no no-such-folder-at-all in"),
        ("/nowhere/at/all", "there is no nowhere in /"),
        ("a/b/c", "data folder a/b/c does not exist"),
        ("note.txt", "is a file: give the folder that holds it"),
        ("my data", "'my data' names no data: give digits, a local folder, or a hub name"),
        ("", "names no data"),
    ],
)
def test_a_source_that_is_not_there(tmp_path, source, said):
    (tmp_path / "pictures" / "flowers").mkdir(parents=True)
    (tmp_path / "note.txt").touch()
    with pytest.raises(DataError, match=said) as caught:
        check_source(source)
    assert "\n" not in str(caught.value)


def test_checking_a_source_imports_neither_torch_nor_datasets():
    code = "import sys, lba_exp.data.sources as s; s.check_source('digits'); print({'torch', 'datasets', 'lightning'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"


def test_no_answer_from_the_hub():
    with pytest.raises(DataError, match=r"no answer from the hub for the data set 'org/name' .*a folder on this machine works"):
        read_splits(resolve_source("org/name:config"))
    with pytest.raises(DataError, match=r"Did you mean digits\?"):
        read_splits(resolve_source("digit"))


@pytest.mark.parametrize(
    "error, said",
    [
        (datasets.exceptions.DatasetNotFoundError("no"), "the hub has no open data set 'org/name'"),
        (ValueError("Config 'x' not found. Available: ['a']\nmore"), r"read from the hub: Config 'x' not found\. Available: \['a'\]\.$"),
    ],
)
def test_other_answers_from_the_hub(monkeypatch, error, said):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=said):
        read_splits(resolve_source("org/name"))


def test_folders_of_every_kind(tmp_path):
    data = {"train": table([0, 1, 1], text=["a", "b", "c"]), "test": table([1], text=["d"])}
    (tmp_path / "parquet").mkdir()
    for split, found in data.items():
        found.to_parquet(tmp_path / "parquet" / f"{split}.parquet")
    datasets.DatasetDict({**data, "valid": data["test"]}).save_to_disk(tmp_path / "saved")
    data["train"].save_to_disk(tmp_path / "one")
    for name, splits in {"parquet": ["train", "test"], "saved": ["train", "validation", "test"], "one": ["train"]}.items():
        found = read_splits(resolve_source(f"./{name}"))
        assert sorted(found) == sorted(splits)
        assert found["train"][:]["text"] == ["a", "b", "c"]
    assert {entry.name for entry in tmp_path.iterdir()} == {"parquet", "saved", "one", "cache"}


def test_folders_that_hold_nothing_usable(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty cannot be read \(it holds nothing\): expected train.parquet"):
        read_splits(resolve_source("./empty"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.parquet").write_text("not parquet")
    with pytest.raises(DataError, match=r"broken cannot be read \(it holds train.parquet\)") as caught:
        read_splits(resolve_source("./broken"))
    assert "\n" not in str(caught.value)
    datasets.DatasetDict({"test": table([1])}).save_to_disk(tmp_path / "untrained")
    with pytest.raises(DataError, match="untrained has no split named train: it has test"):
        read_splits(resolve_source("./untrained"))
    datasets.DatasetDict({"train": table([1]), "test": table([])}).save_to_disk(tmp_path / "half")
    with pytest.raises(DataError, match="the test split of half is empty"):
        read_splits(resolve_source("./half"))
    (tmp_path / "rows").mkdir()
    table([0, 1]).to_parquet(tmp_path / "rows" / "train.parquet")
    table([0, 1]).select([]).to_parquet(tmp_path / "rows" / "test.parquet")
    with pytest.raises(DataError, match="the test split of rows is empty"):
        read_splits(resolve_source("./rows"))
    datasets.DatasetDict({"train": table([1]), "test": table([0]).select([])}).save_to_disk(tmp_path / "none")
    with pytest.raises(DataError, match="the test split of none is empty"):
        read_splits(resolve_source("./none"))


def test_labels_become_numbers():
    named = datasets.Features(label=datasets.ClassLabel(names=["no", "yes", "never"]))
    labels, names = read_labels({"train": datasets.Dataset.from_dict({"label": [1, 0, 1]}, features=named)}, "label", "set")
    assert (labels["train"].tolist(), names) == ([1, 0, 1], ["no", "yes", "never"])
    labels, names = read_labels({"train": table([2, 0, 1]), "test": table([1])}, "label", "set")
    assert (labels["train"].tolist(), labels["test"].tolist(), names) == ([2, 0, 1], [1], ["0", "1", "2"])
    labels, names = read_labels({"train": table(["cat", "ape", "cat"])}, "label", "set")
    assert (labels["train"].tolist(), names) == ([1, 0, 1], ["ape", "cat"])
    labels, names = read_labels({"train": table([True, False])}, "label", "set")
    assert (labels["train"].tolist(), names) == ([1, 0], ["0", "1"])
    assert labels["train"].dtype == np.int64
    rows = table([0, 1, 1, 0]).select([3, 2])
    assert read_labels({"train": rows}, "label", "set")[0]["train"].tolist() == [0, 1]


@pytest.mark.parametrize(
    "train, test, said",
    [
        ([0, 2], [0], r"set, train split: integer labels must be 0\.\.n-1 without gaps, and these are 0, 2\."),
        ([-1, 0, 1], [0], "without gaps, and these are -1, 0, 1"),
        ([0, 1], [2, 0], r"set, test split: 2 in column 'label' is no class; the classes are 0, 1\."),
        (["a", "b"], ["c"], "test split: c in column 'label' is no class"),
        ([0, 1], ["a"], "test split: a in column 'label' is no class"),
        ([0, None, 1], [0], r"train split: 1 of 3 samples have no 'label' \(the first is number 1\)"),
        ([0.5, 1.0], [0.5], r"holds float64, not class labels, integers or strings"),
        ([[0], [1]], [[0]], "holds List, not class labels"),
        ([0, 0], [0], "has the one class 0: expected two or more"),
        (list(range(0, 60, 2)), [0], r"these are 0, 2, 4, 6, 8, 10, 12, 14, 16, \.\.\., 58\."),
    ],
)
def test_labels_that_cannot_be_used(train, test, said):
    with pytest.raises(DataError, match=said):
        read_labels({"train": table(train), "test": table(test)}, "label", "set")


def test_unlabelled_test_split_and_missing_column():
    named = datasets.Features(label=datasets.ClassLabel(names=["no", "yes"]))
    hidden = {"train": datasets.Dataset.from_dict({"label": [0, 1]}, features=named), "test": table([-1, -1])}
    with pytest.raises(DataError, match="test split: -1 in column 'label' is no class; the classes are 0, 1"):
        read_labels(hidden, "label", "set")
    with pytest.raises(DataError, match=r"'labels' is not a column \(data.label_column\); did you mean label\? Valid: label, text"):
        read_labels({"train": table([0, 1], text=["", ""])}, "labels", "set")


def test_missing_splits_are_cut_by_label():
    labels = {"train": np.repeat([0, 1, 2], [60, 30, 10])}
    cut = cut_splits(labels, validation_fraction=0.1, test_fraction=0.2, seed=0)
    assert {split: len(rows) for split, (_, rows) in cut.items()} == {"train": 70, "validation": 10, "test": 20}
    assert sorted(np.concatenate([rows for _, rows in cut.values()])) == list(range(100))
    assert {split: np.bincount(labels["train"][rows]).tolist() for split, (_, rows) in cut.items()} == {
        "train": [42, 21, 7],
        "validation": [6, 3, 1],
        "test": [12, 6, 2],
    }
    again = cut_splits(labels, validation_fraction=0.1, test_fraction=0.2, seed=0)
    other = cut_splits(labels, validation_fraction=0.1, test_fraction=0.2, seed=1)
    assert again["test"][1].tolist() == cut["test"][1].tolist() != other["test"][1].tolist()


def test_splits_that_are_there_stay():
    labels = {"train": np.repeat([0, 1], 50), "test": np.array([1, 0])}
    cut = cut_splits(labels, validation_fraction=0.1, test_fraction=0.2, seed=0)
    assert cut["test"][0] == "test" and cut["test"][1].tolist() == [0, 1]
    assert cut["validation"][0] == cut["train"][0] == "train"
    assert (len(cut["validation"][1]), len(cut["train"][1])) == (10, 90)


def test_a_split_too_small_to_cut():
    with pytest.raises(DataError, match=r"no test split of 2 samples can be cut from the 10 .*change data.test_fraction"):
        cut_splits({"train": np.arange(10)}, validation_fraction=0.1, test_fraction=0.2, seed=0)
    with pytest.raises(DataError, match=r"no validation split of 0 samples"):
        cut_splits({"train": np.array([0, 1, 0, 1]), "test": np.array([0])}, validation_fraction=0.1, test_fraction=0.2, seed=0)


def test_image_folder(tmp_path):
    for name in ("ape", "cat"):
        (tmp_path / "zoo" / "train" / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / "zoo" / "train" / name / f"{number}.png")
    found = read_splits(resolve_source("zoo"))
    assert read_labels(found, "label", "zoo")[1] == ["ape", "cat"]
    assert len(found["train"]) == 6
