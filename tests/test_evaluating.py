"""A finished run, evaluated: any form, split or data; its folder is only read."""

import json
import shutil
from pathlib import Path

import pytest
import sklearn.datasets
import torch

import lba_exp
from lba_exp import build, evaluating
from lba_exp.callbacks.checkpoints import load_checkpoint
from lba_exp.commands import evaluate as eval_command
from lba_exp.errors import DataError
from tests.conftest import SMALL


def contents(folder: Path) -> dict:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def dim_digits(folder: Path, names: list[str], factor: int = 7) -> Path:
    """100 digits at about half their brightness, as a folder."""
    import datasets
    from PIL import Image

    table = sklearn.datasets.load_digits()
    images = [Image.fromarray((image * factor).astype("uint8")) for image in table.images[:100]]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names))
    folder.mkdir()
    data = datasets.Dataset.from_dict({"image": images, "label": table.target[:100].tolist()}, features=features)
    data.to_parquet(str(folder / "train.parquet"))
    data.to_parquet(str(folder / "test.parquet"))
    return folder


def test_eval_reads_a_run_in_any_form_and_split_and_leaves_it_alone(finished, capsys):
    folder, _ = finished
    before = contents(folder)
    eval_command.main([str(folder), "form=recurrent", "split=validation", "--output", "figures.json"])
    figures = json.loads(Path("figures.json").read_text())
    assert figures["forms"]["recurrent"]["different"] == 0 and figures["forms"]["recurrent"]["count"] == 180
    assert contents(folder) == before
    wrong = (["form=fast"], ["split=tset"], ["model.width=3"], ["modle=3"], ["--output", "figures.json"], ["--output", "no/such/f.json"])
    wrong += (["form=fused"], ["model.mixer.form=fused"])
    for arguments in wrong:
        with pytest.raises(SystemExit) as stop:
            eval_command.main([str(folder), *arguments])
        said = capsys.readouterr().err
        assert stop.value.code == 1 and said.count("\n") == 1, said
    with pytest.raises(SystemExit):
        eval_command.main(["nowhere"])
    assert "no run folder" in capsys.readouterr().err


def test_eval_on_other_data_normalises_as_the_run_did_and_knows_other_classes(finished, tmp_path):
    folder, _ = finished
    data = dim_digits(tmp_path / "dim", [str(n) for n in range(10)])
    accuracy = lba_exp.evaluate(folder, [f"data.source={data}"], quiet=True)["forms"]["parallel"]["accuracy"]
    model = evaluating.load_model(
        folder, evaluating.configuration(folder), build.data_module(lba_exp.compose([])), load_checkpoint(folder / "checkpoints/best.ckpt")
    )
    table, digits = sklearn.datasets.load_digits(), lba_exp.compose([])
    own = build.data_module(digits).split_loader("train").dataset
    pixels = torch.tensor(own.images[own.rows], dtype=torch.float64) / 255
    inputs = (torch.tensor(table.images[:100] * 7) / 255 - pixels.mean()) / pixels.std(correction=0)
    with torch.no_grad():
        expected = model(inputs.float().reshape(100, 64, 1)).argmax(-1).numpy() == table.target[:100]
    assert accuracy == pytest.approx(expected.mean(), abs=1e-9)
    with pytest.raises(DataError, match="classes zero"):
        other = dim_digits(tmp_path / "other", ["zero", "one", *"abcdefgh"])
        named = dim_digits(tmp_path / "named", ["one", "zero", *"abcdefgh"])
        record = lba_exp.train(lba_exp.compose([*SMALL, "data=images", f"data.source={named}", "trainer.max_epochs=1"]), quiet=True)
        lba_exp.evaluate(record["folder"], [f"data.source={other}"], quiet=True)


def test_eval_says_that_a_run_is_unfinished(finished, tmp_path, capsys):
    shutil.copytree(finished[0], tmp_path / "half")
    (tmp_path / "half" / "result.json").unlink()
    assert lba_exp.evaluate(tmp_path / "half")["status"] == "unfinished"
    assert "This run is unfinished: the weights are its best so far" in capsys.readouterr().out


def test_a_run_does_not_go_on_with_other_data(small, tmp_path):
    data = tmp_path / "data"
    dim_digits(data, [*"abcdefghij"])
    run = [*small, "data=images", f"data.source={data}", "folder=run", "data.batch_size=32"]
    lba_exp.train(lba_exp.compose(run), quiet=True)
    Path("run/result.json").unlink()  # as if it had been killed
    shutil.rmtree(data)
    dim_digits(data, [*"abcdefghij"], factor=8)
    with pytest.raises(DataError, match="have changed since the checkpoint"):
        lba_exp.train(lba_exp.compose(run), quiet=True)
