"""Folders, files and the command: what is written is read back, what does not fit is one sentence, nothing is run or overwritten."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lba_exp import starting
from lba_exp.commands import convert as command
from lba_exp.convert import (
    create,
    from_pretrained,
    load_lion_mlm,
    load_lion_vision,
    read_model,
    read_weights,
    save_pretrained,
    to_published,
)
from lba_exp.errors import ConfigError, WeightsError
from lba_exp.models.classifier import SequenceClassifier
from lba_exp.models.language import MaskedLM
from lba_exp.models.vision import VisionTransformer

from . import published

IDS = torch.arange(9)[None]


def lba_convert(*arguments, code=0):
    try:
        command.main([str(a) for a in arguments])
    except SystemExit as error:
        assert error.code == code
    else:
        assert code == 0


@pytest.fixture
def mlm_file(tmp_path):
    """A masked language model as Hugging Face keeps it: the decoder's weight once, a config.json beside it."""
    path = tmp_path / "hub" / "model.safetensors"
    path.parent.mkdir()
    weights = {name: x.float() if x.is_floating_point() else x for name, x in published.masked_lm("S").items()}
    save_file({name: x for name, x in weights.items() if ".decoder." not in name}, path)
    (path.parent / "config.json").write_text(json.dumps({"num_attention_heads": 2, "model_type": "bert"}))
    return path


@pytest.mark.parametrize("kind", ["LIT", "D", "S", "softmax"])
def test_a_model_folder_gives_the_same_model_again(tmp_path, kind):
    model = load_lion_mlm(published.masked_lm(kind), num_heads=2)
    model.save_pretrained(tmp_path / "a" / "b")
    again = MaskedLM.from_pretrained(tmp_path / "a" / "b")
    assert torch.equal(again(IDS), model(IDS)) and again.config == model.config and not again.training
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == ["config.json", "model.safetensors"]
    with pytest.raises(WeightsError, match="holds a MaskedLM, not a VisionTransformer"):
        VisionTransformer.from_pretrained(tmp_path / "a" / "b")
    with pytest.raises(WeightsError, match="holds a model already"):
        save_pretrained(model, tmp_path / "a" / "b")


def test_a_model_folder_of_two_scans_gives_the_same_model_again(tmp_path):
    model = load_lion_vision(published.vision("S", scans=2), num_heads=2, image_size=(4, 6), pool="mean")
    model.save_pretrained(tmp_path / "x")
    images = torch.randn(1, 3, 4, 6, dtype=torch.float64)
    assert torch.equal(from_pretrained(tmp_path / "x")(images), model(images))


def test_a_broken_folder_is_named(tmp_path):
    with pytest.raises(WeightsError, match=r"holds no config.json"):
        from_pretrained(tmp_path)
    load_lion_mlm(published.masked_lm("S"), num_heads=2).save_pretrained(tmp_path / "x")
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    for change, error, words in (
        ({"width": 24}, WeightsError, r"has the shape \(.*\), expected \("),
        ({"depth": 1}, WeightsError, "holds encoder.blocks.1.* and 1[0-9] more, which this model has not"),
        ({"colour": 3}, WeightsError, "colour"),
        ({"mixer": [{"kind": "softmax"}]}, WeightsError, "config.json lacks a mixer for each layer"),
        ({"mixer": {}}, WeightsError, "config.json lacks 'kind'"),
        ({"heads": 5}, WeightsError, "cannot be read: heads: expected"),
        ({"kind": "masked_ml"}, ConfigError, "unknown model 'masked_ml'"),
    ):
        (tmp_path / "x" / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(error, match=words):
            from_pretrained(tmp_path / "x")
    (tmp_path / "x" / "config.json").write_text("{")
    with pytest.raises(WeightsError, match="cannot be read"):
        from_pretrained(tmp_path / "x")
    (tmp_path / "x" / "config.json").write_text(json.dumps(config))
    (tmp_path / "x" / "model.safetensors").write_bytes(b"12345678")
    with pytest.raises(WeightsError, match="cannot be read"):
        from_pretrained(tmp_path / "x")


def test_the_command_converts_there_and_back(tmp_path, mlm_file, capsys):
    lba_convert(mlm_file, tmp_path / "ours")
    assert "MaskedLM" in capsys.readouterr().out
    model = from_pretrained(tmp_path / "ours")
    assert torch.equal(model(IDS), load_lion_mlm(read_weights(mlm_file), num_heads=2)(IDS))
    lba_convert(tmp_path / "ours", tmp_path / "back.safetensors", "--to", "published")
    back, before = load_file(tmp_path / "back.safetensors"), load_file(mlm_file)
    assert back.keys() == before.keys() - {"bert.embeddings.position_ids"}
    assert all(torch.equal(back[name], before[name]) for name in back)


def test_the_command_reads_torchs_files_and_vision_models(tmp_path):
    weights = published.vision("D", scans=2)
    torch.save({"model": weights, "epoch": 3}, tmp_path / "vit.pth")
    lba_convert(tmp_path / "vit.pth", tmp_path / "x", "--num-heads", 2, "--image-size", "4x6", "--pool", "cls")
    images = torch.randn(1, 3, 4, 6, dtype=torch.float64)
    expected = load_lion_vision(weights, num_heads=2, image_size=(4, 6), pool="cls")(images)
    assert torch.equal(from_pretrained(tmp_path / "x")(images), expected)


class Evil:
    def __reduce__(self):
        return print, ("run!",)


def test_mistakes_are_one_sentence_and_write_nothing(tmp_path, mlm_file, capsys):
    torch.save({"x": Evil()}, tmp_path / "evil.pt")
    torch.save([1], tmp_path / "list.pt")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("no weights")
    (tmp_path / "text.pt").write_text("a text: torch's unpickler pops from an empty list")
    (tmp_path / "empty.pt").touch()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("x")
    torch.save(published.vision("S"), tmp_path / "vit.pt")
    bare = tmp_path / "bare.safetensors"
    bare.write_bytes(mlm_file.read_bytes())
    out = tmp_path / "out"
    for arguments, words in (
        ((tmp_path / "none.pt", out), "none.pt does not exist"),
        ((tmp_path / "evil.pt", out), "more than tensors and plain values"),
        ((tmp_path / "list.pt", out), "holds a list: expected a state dict"),
        ((tmp_path / "other.safetensors", out), "no weights in a published naming"),
        ((tmp_path / "text.safetensors", out), "cannot be read"),
        ((tmp_path / "text.pt", out), "no file of torch's"),
        ((tmp_path / "empty.pt", out), "no file of torch's"),
        ((mlm_file, tmp_path / "taken"), "exists already"),
        ((mlm_file, tmp_path / "out.bin", "--to", "published"), "ends in .safetensors"),
        ((bare, out), "num_heads is needed"),
        ((mlm_file, out, "--pool", "cls"), "pool means nothing"),
        ((tmp_path / "vit.pt", out, "--num-heads", 2, "--pool", "mean"), "image_size is needed"),
        ((tmp_path / "taken", out), "holds no weights"),
    ):
        lba_convert(*arguments, code=1)
        said = capsys.readouterr()
        assert said.err.startswith("lba-convert: ") and said.err.count("\n") == 1 and words in said.err, said.err
        assert "run!" not in said.out and not out.exists()
    lba_convert(mlm_file, out, "--image-size", "4y6", code=2)


def test_a_mistake_is_answered_before_torch_is_imported(tmp_path):
    code = "import sys; from lba_exp.commands.convert import main; main(['nowhere', 'x'])"
    code = f"try:\n    {code}\nexcept SystemExit:\n    assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL)


def test_a_run_is_converted_without_its_data(finished, tmp_path):
    folder, record = finished
    lba_convert(folder, tmp_path / "x")
    model = SequenceClassifier.from_pretrained(tmp_path / "x")
    assert sum(p.numel() for p in model.parameters()) == record["parameters"]
    assert model(torch.randn(2, 64, 1)).shape == (2, 10)
    assert torch.equal(read_model(folder / "checkpoints" / "best.ckpt")(torch.ones(1, 64, 1)), model(torch.ones(1, 64, 1)))


def test_a_run_may_start_from_the_weights_of_a_model_folder(finished, tmp_path):
    lba_convert(finished[0], tmp_path / "x")
    model = SequenceClassifier.from_pretrained(tmp_path / "x")
    other = create(model.config)
    starting.initialise(other, tmp_path / "x" / "model.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    with pytest.raises(ConfigError, match=r"init_from=.*model.safetensors holds another model"):
        starting.initialise(create(model.config | {"depth": 2}), tmp_path / "x" / "model.safetensors")


def test_a_setting_that_the_published_names_cannot_tell_is_refused():
    base = load_lion_mlm(published.masked_lm("S"), num_heads=2).config
    for change, words in (
        ({"mixer": [base["mixer"][0] | {"convention": "query"}, base["mixer"][1]]}, "means convention='key' in layer 0, .* has 'query'"),
        ({"mixer": base["mixer"][0] | {"scale": "after"}}, "means scale='none'"),
        ({"norm_position": "pre"}, "no place for encoder.norm.weight"),
        ({"mlp": "glu"}, "no place for encoder.blocks.0.mlp.up.weight"),
    ):
        with pytest.raises(WeightsError, match=words):
            to_published(create(base | change))
    free = {"form": "recurrent", "chunk_size": 8, "gate_init": "random"}
    assert to_published(create(base | {"mixer": base["mixer"][0] | free}))
    with pytest.raises(WeightsError, match="no published naming for SequenceClassifier"):
        to_published(SequenceClassifier(make_mixer=lambda layer: nn.Identity(), classes=2, width=4, depth=1, channels=1, length=3))
