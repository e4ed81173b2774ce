"""Long Range Arena's own folders, and pairs of texts for two towers: what comes out of them, and what is not as described."""

import csv

import numpy as np
import pytest
import torch

from lba_exp.commands import train as command
from lba_exp.data.generate.listops import TOKENS
from lba_exp.data.images import PixelSequences
from lba_exp.data.labelled import TextClassification
from lba_exp.data.sequences import TokenSequences
from lba_exp.errors import DataError
from tests import lra

CLS, SEP = 256, 257


def aan(folder, **settings):
    settings = {"tokens": "bytes", "max_length": 40, "pad_multiple": 1, "apart": True, **settings}
    module = TextClassification(str(folder), text_column="text1", second_text_column="text2", **settings)
    module.setup()
    return module


def test_listops_without_its_parentheses(tmp_path):
    module = TokenSequences(str(lra.write_listops(tmp_path / "listops-1000")), eval_batch_size=3)
    module.setup()
    assert module.spec.sizes == {"train": 8, "validation": 8, "test": 8}
    assert (module.spec.length, module.spec.vocabulary, module.spec.classes) == (1_999, len(TOKENS), 10)
    batch = next(iter(module.val_dataloader()))
    words = [
        [word for word, real in zip(row, mask, strict=True) if real]
        for row, mask in zip(module.shown(batch["inputs"]), batch["padding_mask"], strict=True)
    ]
    assert words == [source.replace("(", "").replace(")", "").split() for source, _ in lra.LISTOPS]
    assert batch["labels"].tolist() == [value for _, value in lra.LISTOPS]
    path = tmp_path / "listops-1000" / "basic_test.tsv"
    path.write_text(path.read_text().replace("[SM", "[MAX"))
    other = TokenSequences(str(path.parent))
    other.setup()
    assert other.spec.fingerprint != module.spec.fingerprint


def test_retrieval_gives_two_sequences_a_pair(tmp_path):
    module = aan(lra.write_aan(tmp_path / "tsv_data"), eval_batch_size=8, bucket_steps=0, max_length=24)
    assert module.spec.sizes == {"train": 8, "validation": 8, "test": 8} and module.spec.class_names == ["unrelated", "related"]
    assert module.spec.length == 24 and module.spec.vocabulary == 259
    [batch] = module.test_dataloader()
    texts = [[f'"{first}', f"{second} é"] for _, first, second in lra.pairs(8, 2)]
    expected = [[[CLS, *text.encode()[:22], SEP] for text in pair] for pair in texts]
    longest = max(len(text) for pair in expected for text in pair)
    assert batch["inputs"].shape == batch["padding_mask"].shape == (8, 2, longest) and "token_types" not in batch
    got = [
        [row[mask].tolist() for row, mask in zip(*pair, strict=True)] for pair in zip(batch["inputs"], batch["padding_mask"], strict=True)
    ]
    assert got == expected and batch["labels"].tolist() == [label for label, *_ in lra.pairs(8, 2)]
    assert (batch["inputs"][~batch["padding_mask"]] == 0).all()
    cut = [sum(len(pair[tower].encode()) > 22 for pair in texts) for tower in range(2)]
    assert min(cut) > 0 and max(cut) < 8
    assert f"tsv_data, test split: {sum(cut)} of 16 texts are longer than data.max_length=24 tokens and are cut." in module.notes


def test_pairs_are_sorted_by_the_longer_text(tmp_path):
    module = aan(lra.write_aan(tmp_path / "tsv_data", 64), batch_size=4, max_length=100)
    lengths = [batch["inputs"].shape[-1] for batch in module.train_dataloader()]
    unsorted = [
        batch["inputs"].shape[-1] for batch in aan(tmp_path / "tsv_data", batch_size=4, max_length=100, bucket_steps=0).train_dataloader()
    ]
    best = sorted((max(len(a) + 3, len(b) + 5) for _, a, b in lra.pairs(64)), reverse=True)[::4]
    assert sorted(lengths, reverse=True) == best and sum(lengths) < sum(unsorted)


def test_any_table_of_pairs_is_read_apart(tmp_path):
    for split in ("train", "test"):
        with open(tmp_path / f"{split}.csv", "w", newline="") as file:
            csv.writer(file).writerows([("text1", "text2", "label"), *((a, b, ["no", "yes"][y]) for y, a, b in lra.pairs(20))])
    module = aan(tmp_path, batch_size=4)
    assert module.spec.sizes == {"train": 18, "validation": 2, "test": 20} and module.spec.class_names == ["no", "yes"]
    assert next(iter(module.train_dataloader()))["inputs"].shape[:2] == (4, 2)
    with pytest.raises(DataError, match="second_text_column is not given"):
        TextClassification(str(tmp_path), apart=True, tokens="bytes")


def test_lines_of_retrieval_that_are_broken_are_counted(tmp_path):
    path = lra.write_aan(tmp_path / "tsv_data", 200) / "new_aan_pairs.train.tsv"
    path.write_text(path.read_text("utf-8") + "1.0\tP\tQ\tone text\n", "utf-8")
    module = aan(path.parent)
    assert module.spec.sizes["train"] == 200 and "new_aan_pairs.train.tsv: 1 lines without five fields are left out." in module.notes


@pytest.mark.parametrize("inner", ["", "curv_contour_length_14"])
def test_pathfinder_is_cut_into_the_published_shares(tmp_path, inner):
    folder = lra.write_pathfinder(tmp_path / "pathfinder32")
    module = PixelSequences(str(folder / inner), validation_fraction=0.1, test_fraction=0.1, pixel_mean=0.5, pixel_deviation=0.5)
    module.setup()
    assert module.spec.sizes == {"train": 32, "validation": 4, "test": 4} and module.spec.length == 1_024
    assert module.spec.class_names == ["apart", "connected"]
    assert module.notes == ["curv_contour_length_14: 1 empty files are left out."]
    seen = []
    for split in module.spec.sizes:
        for batch in module.split_loader(split):
            numbers = ((batch["inputs"][:, 0, 0] + 1) * 127.5).round().int()
            assert torch.equal(numbers % 2, batch["labels"].int())
            seen += numbers.tolist()
    assert sorted(seen) == list(range(40))
    assert isinstance(module._splits["train"].images, np.ndarray)  # decoded once


def edit(path, old, new):
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), "utf-8")


MISTAKES = [
    ("listops", lambda f: (f / "basic_val.tsv").unlink(), "basic_val.tsv is missing: .* lacks a split of the download"),
    (
        "listops",
        lambda f: edit(f / "basic_test.tsv", "Target", "Value"),
        "has the columns Source, Value in its first line: expected Source and Target",
    ),
    ("listops", lambda f: (f / "basic_test.tsv").write_text("Source\tTarget\n"), "basic_test.tsv holds no samples: every split needs some"),
    ("listops", lambda f: edit(f / "basic_train.tsv", "\t7", "\t10"), "line 3: the value '10' is out of range: expected 0 to 9"),
    ("listops", lambda f: edit(f / "basic_train.tsv", "[SM", "[SUM"), r"line 3: '\[SUM' is no token of ListOps: 0 1 2"),
    ("listops", lambda f: edit(f / "basic_train.tsv", "\t7", ""), "line 3: 1 columns where the first line has 2"),
    ("aan", lambda f: (f / "new_aan_pairs.eval.tsv").unlink(), "new_aan_pairs.eval.tsv is missing"),
    ("aan", lambda f: edit(f / "new_aan_pairs.eval.tsv", "\tQ0\t", "\t"), r"1 of 8 lines have not the five columns .* \(line 1 has 4\)"),
    ("aan", lambda f: (f / "new_aan_pairs.test.tsv").write_text(""), "new_aan_pairs.test.tsv holds no samples"),
    (
        "aan",
        lambda f: edit(f / "new_aan_pairs.train.tsv", "0.0\tP1", "2.0\tP1"),
        "line 2: the label '2.0' is out of range: expected 0 or 1",
    ),
    ("aan", lambda f: (f / "new_aan_pairs.test.tsv").write_bytes(b"\xff\xfe"), "cannot be read as UTF-8 text"),
    ("pathfinder", lambda f: [p.unlink() for p in f.glob("*/metadata/*")], "metadata holds no .npy files"),
    (
        "pathfinder",
        lambda f: edit(f / "curv_contour_length_14/metadata/1.npy", "sample_1.png 1 1", "sample_1.png 1 7"),
        r"1.npy, line 2: the label '7' is out of range",
    ),
    (
        "pathfinder",
        lambda f: edit(f / "curv_contour_length_14/metadata/0.npy", "sample_0.png 0 0 1 2 3.5", "sample_0.png"),
        "line 1: 2 fields",
    ),
    ("pathfinder", lambda f: (f / "curv_contour_length_14/imgs/0/sample_3.png").unlink(), "line 4: the image .*sample_3.png is missing"),
    ("pathfinder", lambda f: [p.write_text("") for p in f.glob("*/metadata/*")], "lists no images"),
]


@pytest.mark.parametrize(("data", "spoil", "sentence"), MISTAKES)
def test_what_is_not_as_described_is_one_sentence(tmp_path, data, spoil, sentence):
    folder = getattr(lra, f"write_{data}")(tmp_path / data)
    spoil(folder)
    make = {
        "listops": lambda: TokenSequences(str(folder)).setup(),
        "aan": lambda: aan(folder),
        "pathfinder": lambda: PixelSequences(str(folder)).setup(),
    }
    with pytest.raises(DataError, match=sentence) as said:
        make[data]()
    assert "\n" not in str(said.value)


@pytest.mark.parametrize("data", ["listops", "aan", "pathfinder"])
def test_the_command_ends_with_that_sentence(tmp_path, data, capsys):
    folder = getattr(lra, f"write_{data}")(tmp_path / data)
    next(iter(sorted(folder.rglob("*train.tsv" if data != "pathfinder" else "sample_3.png")))).unlink()
    for source, sentence in ((folder, "is missing"), (tmp_path / "nowhere" / "at" / data, "does not exist")):
        with pytest.raises(SystemExit) as stop:
            command.main([f"data={data}", f"data.source={source}", "logger=csv", "trainer.accelerator=cpu", "folder=run"])
        said = capsys.readouterr().err.strip()
        assert stop.value.code == 1 and sentence in said and len(said.splitlines()) == 1 and not (tmp_path / "run").exists()
