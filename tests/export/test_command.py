"""``lba-export``: a run becomes a file that says where it is from; mistakes are one sentence, and nothing is written."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lba_exp import build
from lba_exp.commands import export as command
from lba_exp.convert import read_model
from lba_exp.errors import UserError
from lba_exp.export import export, read_metadata
from lba_exp.export.program import run_onnx

from . import models


def lba_export(*arguments, code=0):
    try:
        command.main([str(a) for a in arguments])
    except SystemExit as error:
        assert error.code == code
    else:
        assert code == 0


def contents(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_run_without_its_data_becomes_a_file_that_says_where_it_is_from(finished, monkeypatch, capsys):
    folder, record = finished
    monkeypatch.delattr(build, "data_module")
    before = contents(folder)
    lba_export(folder, "--to", "onnx", "--output", "model.onnx", "--form", "parallel", "--verify")
    said = capsys.readouterr().out
    assert said.startswith("model.onnx: SequenceClassifier, onnx, opset 20, parallel form, inputs (batch, length, 1) float32\n")
    errors = re.findall(r"^relative error against the model, length (\d+): ([\d.e-]+)$", said, re.MULTILINE)
    assert [length for length, _ in errors] == ["21", "32", "64"] and all(float(error) < 1e-5 for _, error in errors)
    assert contents(folder) == before
    about = read_metadata("model.onnx")
    assert about["run"] == str(folder) and about["commit"] == record["git"]["commit"] and about["form"] == "parallel"
    assert about["class_names"] == [str(n) for n in range(10)] and about["step"] > 0 and about["data"] == "digits"
    assert 0 < about["normalisation"]["mean"] < about["normalisation"]["deviation"] < 1
    assert about["lengths"] == {"longest": 64, "fixed": None, "trained": 64}
    x = torch.randn(3, 64, 1)
    with torch.no_grad():
        expected = read_model(folder)(x)
    torch.testing.assert_close(run_onnx("model.onnx")(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_checkpoint_of_a_run_becomes_steps(finished):
    folder = finished[0]
    lba_export(folder / "checkpoints" / "best.ckpt", "--output", "steps", "--to", "step", "--verify")
    assert read_metadata("steps")["run"] == str(folder) and Path("steps/forward.pt2").is_file()


def test_mistakes_are_one_sentence_and_write_nothing(finished, tmp_path, capsys):
    folder = finished[0]
    models.sequences("softmax").save_pretrained(tmp_path / "softmax")
    (tmp_path / "taken.pt2").write_text("mine")
    (tmp_path / "text.pt").write_text("read me")  # to torch, an index into an empty list
    before = contents(tmp_path)
    out = ("--output", tmp_path / "out.pt2")
    for arguments, words in (
        (("nowhere", *out), "nowhere does not exist"),
        ((tmp_path, *out), "holds no weights"),
        ((tmp_path / "taken.pt2", *out), "taken.pt2"),
        ((tmp_path / "text.pt", *out), "text.pt holds more than tensors and plain values, or is no file of torch's"),
        ((folder, "--output", tmp_path / "taken.pt2"), "taken.pt2 exists already"),
        ((folder, "--output", tmp_path / "no" / "x.pt2"), "there is no folder"),
        ((folder, "--output", tmp_path / "x.onnx"), "with torch-export give a name that ends in .pt2"),
        ((folder, *out, "--to", "onnx"), "with onnx give a name that ends in .onnx"),
        ((folder, *out, "--to", "onxx"), "'onxx' is not a format; did you mean onnx?"),
        ((folder, *out, "--form", "chunkwize"), "did you mean chunkwise?"),
        ((folder, *out, "--form", "recurrent"), "'recurrent' is not a form that can be exported"),
        ((folder, *out, "--batch", "0"), "batch: expected an integer from 1 up"),
        ((folder, *out, "--block", "3"), "block=3 means nothing to torch-export"),
        ((folder, *out, "--to", "step", "--padding-mask"), "a step has one form"),
        ((folder, *out, "--to", "step"), "give an output without .pt2, a folder"),
        ((tmp_path / "softmax", *out, "--to", "step"), "SoftmaxAttention, which has no step"),
    ):
        lba_export(*arguments, code=1)
        said = capsys.readouterr().err
        assert said.startswith("lba-export: ") and said.count("\n") == 1 and words in said, said
    lba_export(folder, *out, "--fast", code=2)
    assert contents(tmp_path) == before
    with pytest.raises(UserError, match=r"taken.pt2 is no file that lba-export wrote"):
        read_metadata(tmp_path / "taken.pt2")


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named(package, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    models.sequences("d").save_pretrained(tmp_path / "model")
    lba_export(tmp_path / "model", "--to", "onnx", "--output", "model.onnx", "--verify", code=1)
    assert f"needs the package {package}, which is not installed: pip install 'lba-exp[onnx]'" in capsys.readouterr().err


def test_a_mistake_is_answered_before_torch_is_imported():
    code = "import sys; from lba_exp.commands.export import main; main(['nowhere', '--output', 'x.pt2'])"
    code = f"try:\n    {code}\nexcept SystemExit:\n    assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL)


def test_an_error_inside_torch_is_one_sentence(tmp_path):
    class Fickle(type(models.sequences("d"))):
        def forward(self, inputs, padding_mask=None):
            return float(inputs.sum()) * super().forward(inputs)

    model = models.sequences("d")
    model.__class__ = Fickle
    with pytest.raises(UserError, match=r"^Fickle in the parallel form cannot be exported: [^\n]*\.$"):
        export(model, "model.pt2", form="parallel")
    assert list(tmp_path.iterdir()) == []
