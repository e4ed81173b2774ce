"""``lba-predict``: every kind of input, every kind of output, the forms compared, streams, and mistakes in one sentence."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import lba_exp
from lba_exp.callbacks.checkpoints import BEST
from lba_exp.commands import predict as command
from lba_exp.inference.verifying import Verification
from lba_exp.ops import api
from lba_exp.registry import FEATURE_MAPS


def run(*arguments):
    command.main([str(argument) for argument in arguments])


def refused(capsys, *arguments) -> str:
    """The one sentence on stderr of a command that exits with 1 and leaves nothing behind."""
    before = sorted(Path().iterdir())
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    said = capsys.readouterr().err
    assert stop.value.code == 1 and said.count("\n") == 1 and said.startswith("lba-predict: ") and said.endswith(".\n"), said
    assert sorted(Path().iterdir()) == before
    return said


@pytest.fixture
def pictures(digits) -> Path:
    folder = Path("pictures")
    folder.mkdir()
    for number, digit in enumerate(digits[:9]):
        Image.fromarray(digit).save(folder / f"{number}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


def table(path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_images_to_every_kind_of_file(finished, pictures, digits, capsys):
    expected = lba_exp.load(finished[0]).predict(digits[:9])
    for form in ("auto", "recurrent"):
        run(finished[0], pictures, "--form", form, "--batch", 4, "--output", f"{form}.csv")
        rows = table(f"{form}.csv")
        assert [row["name"] for row in rows] == [f"{n}.png" for n in range(9)] and [row["class"] for row in rows] == expected.labels
        found = np.array([[float(row[f"probability_{n}"]) for n in range(10)] for row in rows])
        assert found == pytest.approx(expected.probabilities.numpy(), abs=1e-6)
    assert "9 inputs in the form recurrent on" in capsys.readouterr().out
    run(finished[0], pictures, "--output", "p.jsonl")
    rows = [json.loads(line) for line in Path("p.jsonl").read_text().splitlines()]
    assert [row["class"] for row in rows] == expected.labels
    assert rows[3]["probabilities"]["4"] == pytest.approx(float(expected.probabilities[3, 4]))
    np.save("digits.npy", digits[:9])
    run(finished[0], "digits.npy", "--output", "p.npz")
    found = np.load("p.npz")
    assert found["names"].tolist() == [str(n) for n in range(9)] and found["class_names"].tolist() == [str(n) for n in range(10)]
    assert found["logits"] == pytest.approx(expected.logits.numpy(), abs=1e-5) and found["logits"].dtype == np.float32
    assert np.array_equal(found["classes"], expected.classes.numpy())
    assert found["probabilities"] == pytest.approx(expected.probabilities.numpy(), abs=1e-6)
    capsys.readouterr()
    run(finished[0], pictures / "3.png")
    assert expected.labels[3] in capsys.readouterr().out
    assert sorted(p.name for p in Path().iterdir()) == ["auto.csv", "digits.npy", "p.jsonl", "p.npz", "pictures", "recurrent.csv"]


def test_a_folder_and_a_table_of_data(finished, places, digits, capsys):
    import datasets

    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=[str(n) for n in range(10)]))
    rows = {"image": [Image.fromarray(digit) for digit in digits], "label": [n % 10 for n in range(40)]}
    Path("data").mkdir()
    for split in ("train", "validation", "test"):
        datasets.Dataset.from_dict(rows, features=features).to_parquet(f"data/{split}.parquet")
    expected = lba_exp.load(finished[0]).predict(digits)
    run(finished[0], "data", "--output", "a.csv", "--batch", 16)
    run(finished[0], "data/train.parquet", "--output", "b.csv")
    for name, first in (("a", "test/0"), ("b", "1")):
        found = table(f"{name}.csv")
        assert [row["class"] for row in found] == expected.labels and found[0]["name"] == first
    run(places.pairs, places.root / "rte", "--split", "validation", "--output", "c.csv")
    run(places.pairs, places.root / "rte" / "validation-00000-of-00001.parquet", "--output", "d.csv")
    folder, file = table("c.csv"), table("d.csv")
    assert [row["class"] for row in folder] == [row["class"] for row in file] and len(file) == 13
    first, second = ([float(row["probability_entailment"]) for row in rows] for rows in (folder, file))
    assert first == pytest.approx(second, abs=1e-6)
    assert "texts are longer than the model's inputs, and cut" in capsys.readouterr().out
    run(places.masked, places.corpus, "--split", "validation", "--output", "e.jsonl")  # its blocks, with tokens hidden
    assert json.loads(Path("e.jsonl").read_text().splitlines()[0])["name"].startswith("validation/")
    run(places.causal, places.corpus, "--split", "validation", "--output", "f.npz", "--batch", 5)
    assert np.load("f.npz")["lengths"].tolist() == [16] * len(np.load("f.npz")["names"])


def test_texts(places, capsys):
    Path("texts.txt").write_text("the [MASK] sleep [MASK]\n\nno hole\n\ufeffa [MASK]\n", encoding="utf-8-sig")
    run(places.masked, "texts.txt", "--output", "m.csv", "--top", 3)
    rows = table("m.csv")
    assert [(row["name"], row["position"]) for row in rows][:2] == [("1", "2"), ("1", "4")] and rows[2]["name"] == "4" and len(rows) == 3
    predictor = lba_exp.load(places.masked)
    (batch,) = predictor.batches(["the [MASK] sleep [MASK]"])
    (best,) = predictor.top_tokens(batch, 3)
    assert [(rows[0][f"token_{n}"], float(rows[0][f"probability_{n}"])) for n in (1, 2, 3)] == [
        (token, pytest.approx(p, rel=1e-5)) for token, p in best[0].tokens
    ]
    run(places.masked, "texts.txt", "--output", "m.jsonl")
    first = json.loads(Path("m.jsonl").read_text().splitlines()[0])
    assert first["position"] == 2 and len(first["tokens"]) == 5 and first["tokens"][0]["token"] == best[0].tokens[0][0]
    run(places.masked, "texts.txt", "--output", "m.npz", "--batch", 2)
    found = np.load("m.npz")
    assert found["lengths"].tolist()[:2] == [6, 4] and found["logits"].shape == (found["lengths"].sum(), 19)
    assert torch.from_numpy(found["logits"][2]).softmax(-1).max() == pytest.approx(best[0].tokens[0][1], rel=1e-4)
    assert found["tokens"][:2].tolist() == [2, 5] and found["class_names"][4] == "[MASK]"
    capsys.readouterr()
    run(places.causal, "texts.txt")
    assert "3 inputs" in capsys.readouterr().out
    Path("pairs.csv").write_text('sentence1,sentence2\n"a cat, red",the dog\ngreen,house\n')
    Path("pairs.jsonl").write_text('{"sentence1": "a cat, red", "sentence2": "the dog"}\n{"sentence1": "green", "sentence2": "house"}\n')
    run(places.numbers, "pairs.csv", "--output", "n.csv")
    run(places.numbers, "pairs.jsonl", "--output", "n.npz")
    expected = lba_exp.load(places.numbers).predict([("a cat, red", "the dog"), ("green", "house")]).logits[:, 0]
    assert [float(row["value"]) for row in table("n.csv")] == pytest.approx(expected.tolist(), abs=1e-5)
    assert np.load("n.npz")["values"] == pytest.approx(expected.numpy(), abs=1e-5)


def test_arrays_with_padding(places):
    tokens = np.array([[2, 5, 4, 3, 0], [2, 6, 4, 8, 3]])
    mask = tokens > 0
    np.savez("tokens.npz", inputs=tokens.astype(np.uint16), padding_mask=mask)
    run(places.masked, "tokens.npz", "--output", "p.npz")
    found = np.load("p.npz")
    assert found["lengths"].tolist() == [4, 5] and found["tokens"].tolist() == tokens[mask].tolist()
    alone = lba_exp.load(places.masked).predict([tokens[0, :4]]).logits[0]
    assert found["logits"][:4] == pytest.approx(alone.numpy(), abs=1e-5)


def test_verify_compares_every_form_and_finds_a_planted_fault(finished, places, digits, capsys, monkeypatch):
    np.save("digits.npy", digits)
    run(finished[0], "digits.npy", "--verify", "--output", "a.csv")
    said = capsys.readouterr().out
    assert all(form in said for form in ("parallel", "recurrent", "chunkwise")) and "0 other predictions" in said
    Path("texts.txt").write_text("the [MASK] sleep [MASK]\na [MASK] cat under the red tree\n")
    run(places.masked, "texts.txt", "--verify", "--form", "chunkwise", "--output", "b.csv")
    Path("pairs.csv").write_text("sentence1,sentence2\na cat,the dog\n")
    run(places.numbers, "pairs.csv", "--verify")
    right = api._IMPLEMENTATIONS["recurrent"]

    def wrong(q, k, v, forward, backward, **options):
        """Forgets all but its neighbours."""
        return right(q, k, v, forward if forward is None else 30 * forward, backward, **options)

    monkeypatch.setitem(api._IMPLEMENTATIONS, "recurrent", wrong)
    for model, inputs in ((places.masked, "texts.txt"), (places.numbers, "pairs.csv")):
        with pytest.raises(SystemExit) as stop:
            run(model, inputs, "--verify", "--output", f"{inputs}.jsonl")
        said = capsys.readouterr().err
        assert stop.value.code == 1 and "differ from those of the form auto beyond near ties (recurrent: " in said and said.count("\n") == 1
        assert Path(f"{inputs}.jsonl").exists()  # the predictions are those of the form that was asked for
    monkeypatch.setitem(api._IMPLEMENTATIONS, "recurrent", lambda *args, **options: (torch.full_like(args[2], torch.nan), None))
    with pytest.raises(SystemExit):
        run(places.masked, "texts.txt", "--verify", "--form", "recurrent", "--output", "nan.jsonl")
    assert json.loads(Path("nan.jsonl").read_text().splitlines()[0])["tokens"][0]["probability"] is None
    assert "nan" in capsys.readouterr().out
    said = refused(capsys, places.softmax, "digits.npy", "--verify")
    assert "nothing to verify" in said


def test_a_form_that_would_not_fit_is_left_out(finished, digits, capsys, monkeypatch):
    np.save("digits.npy", digits[:2])
    monkeypatch.setattr("lba_exp.inference.verifying.BUDGET_GIB", 5e-4)
    run(finished[0], "digits.npy", "--verify", "--form", "recurrent")
    assert "chunkwise was left out where it needs an estimated" in capsys.readouterr().out
    monkeypatch.setattr("lba_exp.inference.verifying.BUDGET_GIB", 0)
    with pytest.raises(SystemExit):
        run(finished[0], "digits.npy", "--verify")
    assert "no form was compared" in capsys.readouterr().err


def test_streams(finished, places, digits, capsys):
    np.save("pixels.npy", digits[5].reshape(-1))
    run(finished[0], "pixels.npy", "--stream", "--chunk", 7, "--verify", "--output", "a.csv")
    run(finished[0], "pixels.npy", "--stream", "--on-disk", "--output", "b.csv")
    expected = lba_exp.load(finished[0]).predict(digits[5])
    for name in "ab":
        (row,) = table(f"{name}.csv")
        assert row["name"] == "pixels.npy" and row["class"] == expected.labels[0]
        assert float(row["probability_3"]) == pytest.approx(float(expected.probabilities[0, 3]), abs=1e-5)
    assert "compared with the form streamed" in capsys.readouterr().out
    for model in (places.masked, places.causal):
        np.save("tokens.npy", np.arange(5, 18))
        name = f"{model.name}.npz"
        run(model, "tokens.npy", "--stream", "--chunk", 4, "--verify", "--output", name)
        expected = lba_exp.load(model).predict(np.arange(5, 18)).logits[0].numpy()
        assert np.load(name)["logits"] == pytest.approx(expected, abs=1e-5) and np.load(name)["lengths"].tolist() == [13]
    assert "--output FILE.npz" in refused(capsys, places.masked, "tokens.npy", "--stream")
    assert "(SoftmaxAttention in layer 0: softmax attention reads" in refused(capsys, places.softmax, "pixels.npy", "--stream")
    assert "scan='multi'" in refused(capsys, places.image, "pixels.npy", "--stream")
    np.save("long.npy", np.zeros(65, np.uint8))
    assert "an embedding of 64 positions" in refused(capsys, finished[0], "long.npy", "--stream")


def test_a_stream_that_is_wrong_is_found(finished, digits, capsys, monkeypatch):
    np.save("pixels.npy", digits[5].reshape(-1))
    monkeypatch.setattr("lba_exp.inference.layers.EPS", 1e3)
    predictor = lba_exp.load(finished[0])
    verification = Verification(predictor, streamed=True)
    (batch,) = predictor.batches(digits[5])
    verification.add(batch, predictor.stream("pixels.npy").answer())
    assert verification.largest_error > 1e-2


def test_mistakes_are_told_in_one_sentence(finished, places, pictures, digits, capsys):
    folder = finished[0]
    Path("there.csv").write_text("mine")
    assert "exists already" in refused(capsys, folder, pictures, "--output", "there.csv")
    assert Path("there.csv").read_text() == "mine"
    assert "there is no folder" in refused(capsys, folder, pictures, "--output", "none/a.csv")
    assert "ends in .csv, .jsonl, .npz" in refused(capsys, folder, pictures, "--output", "a.txt")
    assert "'fast' is not a form of this model" in refused(capsys, folder, pictures, "--form", "fast")
    assert "none does not exist" in refused(capsys, folder, "none") and "none does not exist" in refused(capsys, "none", pictures)
    assert "--batch 0" in refused(capsys, folder, pictures, "--batch", 0)
    assert "--on-disk is for --stream" in refused(capsys, folder, pictures, "--on-disk")
    assert ".npy file" in refused(capsys, folder, pictures, "--stream")
    assert "device=tpu" in refused(capsys, folder, pictures, "--device", "tpu")
    shutil.copy(folder / "checkpoints" / BEST, "cut.ckpt")
    Path("cut.ckpt").write_bytes(Path("cut.ckpt").read_bytes()[:-2000])
    assert "cannot be read" in refused(capsys, "cut.ckpt", pictures)
    np.save("wrong.npy", np.zeros((2, 65), np.float32))
    assert "do not fit" in refused(capsys, folder, "wrong.npy", "--output", "a.npz")
    np.save("words.npy", np.array(["a"]))
    np.save("objects.npy", np.array([None]), allow_pickle=True)
    np.savez("other.npz", pixels=np.zeros(3))
    Path("text.npy").write_text("none")
    assert "of no numbers" in refused(capsys, folder, "words.npy")
    assert "cannot be read" in refused(capsys, folder, "objects.npy") and "cannot be read" in refused(capsys, folder, "text.npy")
    assert "holds pixels: expected inputs" in refused(capsys, folder, "other.npz")
    Path("texts.txt").write_text("a cat\n")
    Path("empty.txt").write_text("\n")
    Path("latin.txt").write_bytes(b"caf\xe9\n")
    Path("no.xyz").write_text("?")
    assert "holds texts, and the model" in refused(capsys, folder, "texts.txt")
    assert "holds images, and the model" in refused(capsys, places.masked, pictures)
    assert "holds no inputs" in refused(capsys, places.masked, "empty.txt") and "UTF-8" in refused(capsys, places.masked, "latin.txt")
    assert "'.xyz' is not a kind of file" in refused(capsys, folder, "no.xyz")
    assert "holds no [MASK]" in refused(capsys, places.masked, "texts.txt", "--output", "a.csv")
    assert "reads pairs of texts" in refused(capsys, places.pairs, "texts.txt")
    Path("pairs.csv").write_text("sentence1,second\na,b\n")
    assert "'sentence2' is not a column" in refused(capsys, places.pairs, "pairs.csv")
    Path("pairs.csv").write_text("sentence1,sentence2\na\n")
    assert "row 1 holds no text" in refused(capsys, places.pairs, "pairs.csv")
    Path("pairs.jsonl").write_text("[1]\n")
    assert "no JSON object" in refused(capsys, places.pairs, "pairs.jsonl")
    Path("pairs.jsonl").write_text("{\n")
    assert "is no JSON" in refused(capsys, places.pairs, "pairs.jsonl")
    Path("pairs.parquet").write_text("no table")
    assert "cannot be read as parquet" in refused(capsys, places.pairs, "pairs.parquet")
    (pictures / "3.png").write_bytes(b"broken")
    assert "cannot be read as an image" in refused(capsys, folder, pictures, "--output", "a.csv")
    assert "'tset' is not a split" in refused(capsys, places.pairs, places.root / "rte", "--split", "tset")
    Path("nothing").mkdir()
    assert "cannot be read (it holds nothing)" in refused(capsys, folder, "nothing")
    with pytest.raises(SystemExit) as stop:
        run(folder, pictures, "--colour")
    assert stop.value.code == 2


def test_a_file_that_appears_meanwhile_is_not_overwritten(finished, pictures, capsys, monkeypatch):
    from lba_exp.inference import predictor

    right = predictor.Predictor.logits

    def slow(self, *args, **options):
        Path("a.csv").write_text("mine")
        return right(self, *args, **options)

    monkeypatch.setattr(predictor.Predictor, "logits", slow)
    with pytest.raises(SystemExit):
        run(finished[0], pictures, "--output", "a.csv")
    assert "exists already" in capsys.readouterr().err and Path("a.csv").read_text() == "mine"
    assert [p.name for p in Path().iterdir() if "part" in p.name] == []


def test_a_plugin_s_part_is_imported(digits, monkeypatch):
    from tests.inference.conftest import save_run

    Path("my_maps.py").write_text(
        "import torch\nfrom lba_exp.registry import FEATURE_MAPS\n@FEATURE_MAPS.register('square')\ndef square(x):\n    return x * x\n"
    )
    monkeypatch.syspath_prepend(str(Path.cwd()))
    tiny = ["model.width=16", "model.depth=1", "model.heads=2", "plugins=[my_maps]", "model.mixer.feature_map=square"]
    folder = save_run(Path("run"), tiny)
    assert "square" in FEATURE_MAPS and len(lba_exp.load(folder).predict(digits[:2])) == 2
    FEATURE_MAPS._entries.pop("square")
