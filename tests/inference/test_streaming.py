"""One sequence in chunks: the same answer as in one piece, for every kind of model that can, in memory that does not grow with it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from lba_exp import build, ops
from lba_exp.callbacks.memory import LiveTensors
from lba_exp.composing import options
from lba_exp.config import ModelSchema
from lba_exp.data.spec import DataSpec
from lba_exp.errors import ConfigError, DataError
from lba_exp.inference.layers import StreamedBlock, stages
from lba_exp.inference.streaming import Stream
from lba_exp.inference.tapes import FileTape, Tape
from lba_exp.models.classifier import SequenceClassifier, TwoTowers
from lba_exp.models.language import CausalLM, MaskedLM, TextClassifier
from lba_exp.models.vision import VisionTransformer
from lba_exp.nn.attention import LinearAttention
from lba_exp.nn.softmax import SoftmaxAttention

LENGTH = 13
SPEC = DataSpec("line", LENGTH, 3, ["a", "b", "c"], 1, None, {"train": 4}, "0", grid=(1, LENGTH))
REFUSED = {"deltanet", "gated_deltanet", "mlstm", "vim", "lion_d_multiscan", "lion_s_multiscan"}
CHUNKS = (1, 5, 64)
LION = {
    "lit": {"gate": "none", "feature_map": "elu_plus_one"},
    "d": {"gate": "fixed", "convention": "key"},
    "s": {"gate": "selective", "convention": "key"},
    "s_symmetric": {"gate": "selective", "convention": "symmetric", "diagonal": "twice", "open_first": True},
    "s_vector": {"gate": "selective_vector", "scale": "none", "norm": "rms", "convention": "query", "complement_keys": True},
}


def perturbed(model, dtype=torch.float64):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def mixers(**options):
    return lambda layer: LinearAttention(8, 2, layer=layer, **options)


def error(found, expected):
    return float((found - expected).norm() / expected.norm())


def configuration(preset):
    """Of a preset's model, in small."""
    schema = OmegaConf.structured(ModelSchema())
    return OmegaConf.merge(schema, OmegaConf.load(options("model")[preset]), {"width": 8, "depth": 2, "heads": 2, "dropout": 0.0})


@pytest.mark.parametrize("preset", sorted(options("model")))
def test_every_preset_streams_or_says_why_not(preset, tmp_path):
    cfg, x = configuration(preset), torch.randn(LENGTH, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for direction in ("both", "forward", "backward", "alternating"):
        cfg.mixer.direction = direction
        model = perturbed(build.model(cfg, SPEC))
        if preset in REFUSED or preset.startswith("softmax"):
            with pytest.raises(ConfigError, match=r"cannot be streamed \(.* in layer 0: .+\): predict without streaming") as refused:
                Stream(model, x)
            assert str(refused.value).count(".") == 1
            continue
        with torch.no_grad():
            expected = model(x[None])
        for chunk in CHUNKS:
            assert error(Stream(model, x, chunk=chunk, folder=tmp_path if chunk == 5 else None).answer(), expected) < 1e-12, (
                direction,
                chunk,
            )


def classifier(**further):
    options = {"channels": 2, "classes": 3, "width": 8, "depth": 2, "positional_embedding": False, **further}
    return SequenceClassifier(**options)


@pytest.mark.parametrize("mixer", LION)
def test_lion_in_float64_and_float32(mixer):
    x = torch.randn(33, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    directions = ("both",) if "diagonal" in LION[mixer] else ("both", "forward", "backward")
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        for direction in directions:
            model = perturbed(classifier(make_mixer=mixers(direction=direction, **LION[mixer])), dtype)
            with torch.no_grad():
                expected = model(x[None].to(dtype))
            for chunk in (7, 1000):
                found = Stream(model, x, chunk=chunk).answer()
                assert found.dtype == dtype and error(found, expected) < tolerance, (dtype, direction, chunk)


def test_bfloat16_weights_stream_too(tmp_path):
    model = perturbed(classifier(make_mixer=mixers()), torch.bfloat16)
    x = torch.randn(20, 2)
    with torch.no_grad():
        expected = model(x[None])
    for folder in (None, tmp_path):
        assert error(Stream(model, x, chunk=7, folder=folder).answer().float(), expected.float()) < 0.02


@pytest.mark.parametrize("pooling", ("mean", "class_token", "mean_all"))
@pytest.mark.parametrize("norm", ("layer", "batch"))
@pytest.mark.parametrize("position", ("pre", "post"))
def test_every_kind_of_classifier(pooling, norm, position):
    options = {"pooling": pooling, "norm": norm, "norm_position": position, "mlp": "output_glu" if norm == "batch" else "glu"}
    symbols, values = torch.arange(LENGTH) * 5 % 11, torch.randn(LENGTH, 1, dtype=torch.float64)
    for inputs, of in ((symbols, {"vocabulary": 11, "channels": None}), (values, {"channels": 1}), (values[:, 0].numpy(), {"channels": 1})):
        model = perturbed(classifier(make_mixer=mixers(), length=LENGTH, **options | of | {"positional_embedding": True}))
        if norm == "batch":
            for module in model.modules():
                if hasattr(module, "running_mean"):
                    module.running_mean.normal_()
        whole = torch.as_tensor(inputs)[None]
        with torch.no_grad():
            expected = model(whole.unsqueeze(-1) if isinstance(inputs, np.ndarray) else whole)
        for chunk in CHUNKS:
            assert error(Stream(model, inputs, chunk=chunk).answer(), expected) < 1e-12


@pytest.mark.parametrize("pooling", ("mean", "class_token", "mean_all"))
@pytest.mark.parametrize("positions", (True, False))
def test_images_by_patches(pooling, positions, tmp_path):
    options = {"width": 8, "depth": 2, "channels": 3, "classes": 4, "patch_size": 2, "image_size": (6, 10)}
    model = perturbed(VisionTransformer(make_mixer=mixers(), pooling=pooling, positional_embedding=positions, **options))
    image = torch.randn(3, 6, 10, dtype=torch.float64)
    np.save(tmp_path / "image.npy", image.numpy())
    with torch.no_grad():
        expected = model(image[None])
    for chunk in (1, 5, 7, 100):
        assert error(Stream(model, tmp_path / "image.npy", chunk=chunk).answer(), expected) < 1e-12


@pytest.mark.parametrize("kind", (MaskedLM, TextClassifier, CausalLM))
@pytest.mark.parametrize("position", ("pre", "post"))
def test_models_of_text(kind, position, tmp_path):
    options = {"width": 8, "depth": 2, "vocabulary": 19, "length": LENGTH, "norm_position": position}
    options |= {"classes": 3} if kind is TextClassifier else {}
    direction = "forward" if kind is CausalLM else "both"
    model = perturbed(kind(make_mixer=mixers(direction=direction), **options))
    tokens = torch.randint(19, (LENGTH,), generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "tokens.npy", tokens.numpy().astype(np.uint8))
    with torch.no_grad():
        expected = model(tokens[None])
    for chunk in CHUNKS:
        stream = Stream(model, tmp_path / "tokens.npy", chunk=chunk)
        assert stream.per_token == (kind is not TextClassifier)
        found = torch.cat(list(stream.logits()))[None] if stream.per_token else stream.answer()
        assert found.shape == expected.shape and error(found, expected) < 1e-12


def test_causal_layers_are_gone_through_together_and_the_model_stays_as_it_is():
    model = perturbed(classifier(make_mixer=mixers(direction="forward")))
    assert [len(stage) for stage in stages(model.blocks)] == [2]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    keys = [set(vars(module)) for module in model.modules()]
    calls = []
    stream = Stream(model, torch.randn(20, 2), chunk=6, done=lambda: calls.append(1))
    stream.answer()
    assert len(calls) == stream.steps == 4
    assert [set(vars(module)) for module in model.modules()] == keys
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    both = Stream(perturbed(classifier(make_mixer=mixers())), torch.randn(20, 2), chunk=6, done=lambda: calls.append(1))
    both.answer()
    assert len(calls) == stream.steps + both.steps == 4 + 2 * 2 * 4


def test_the_diagonal_is_counted_once(monkeypatch):
    """A planted error: the whole diagonal in each direction."""
    model = perturbed(classifier(make_mixer=mixers()))
    x = torch.randn(20, 2, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x[None])
    right = ops.stream
    monkeypatch.setattr(ops, "stream", lambda *args, diagonal_weight, **named: right(*args, diagonal_weight=1.0, **named))
    assert error(Stream(model, x, chunk=6).answer(), expected) > 1e-3


def test_without_the_neighbours_the_answer_is_another(monkeypatch):
    """A planted error: chunks that do not see the gates beside them."""
    model = perturbed(classifier(make_mixer=mixers()))
    x = torch.randn(20, 2, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x[None])
    monkeypatch.setattr("lba_exp.inference.layers.context", lambda mixer: (0, 0))
    assert error(Stream(model, x, chunk=6).answer(), expected) > 1e-3
    assert error(Stream(model, x, chunk=20).answer(), expected) < 1e-12


def test_memory_is_that_of_a_chunk_and_the_states(tmp_path):
    """Peak bytes of live tensors: the same for twice the length on disk, growing with it in memory."""
    peaks = {}
    model = perturbed(classifier(make_mixer=mixers(), depth=2), torch.float32)
    for length in (40, 80):
        np.save(tmp_path / "values.npy", np.random.default_rng(0).standard_normal((length, 2)).astype(np.float32))
        for folder in (None, tmp_path):
            with LiveTensors() as memory:
                Stream(model, tmp_path / "values.npy", chunk=8, folder=folder).answer()
            peaks[length, folder is None] = memory.bytes
    assert peaks[80, False] == peaks[40, False] < peaks[40, True]
    rows = 4 * (8 + 8 + 2)  # activations; numerators and denominators of the backward direction
    assert peaks[80, True] - peaks[40, True] == 40 * rows


@pytest.mark.parametrize("make", (Tape, FileTape))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.float16, torch.bfloat16))
def test_a_tape_gives_what_was_written(make, dtype, tmp_path):
    tape = Tape(10, 3, dtype) if make is Tape else FileTape(10, 3, dtype, tmp_path)
    rows = torch.randn(10, 3).to(dtype)
    for start in (6, 0, 3):
        tape.write(start, rows[start : start + 4])
    tape.write(2, rows[2:2])
    for start, stop in ((0, 10), (4, 5), (3, 3), (9, 10)):
        found = tape.read(start, stop)
        assert found.dtype == dtype and torch.equal(found, rows[start:stop])
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_streamed_says_why():
    def refused(model):
        with pytest.raises(ConfigError) as stop:
            Stream(model, torch.zeros(4, 2))
        return str(stop.value)

    softmax = classifier(make_mixer=lambda layer: LinearAttention(8, 2) if layer < 1 else SoftmaxAttention(8, 2))
    assert "SoftmaxAttention in layer 1: softmax attention reads every key and value" in refused(softmax)
    assert "scale='before'" in refused(classifier(make_mixer=mixers(scale="before")))
    growing = mixers(gate="softplus_vector", scale="none")
    assert "may exceed 1" in refused(classifier(make_mixer=growing))
    assert "pairs" in refused(TwoTowers(make_mixer=mixers(), channels=2, classes=3, width=8, depth=1, positional_embedding=False))
    with pytest.raises(ConfigError, match="chunk=0"):
        Stream(classifier(make_mixer=mixers()), torch.zeros(4, 2), chunk=0)

    class Unknown(LinearAttention):
        """A plugin's."""

    assert "Unknown does not say how many neighbours" in refused(classifier(make_mixer=lambda layer: Unknown(8, 2)))
    Unknown.stream_context = (2, 1)
    model, x = perturbed(classifier(make_mixer=lambda layer: Unknown(8, 2))), torch.randn(9, 2, dtype=torch.float64)
    with torch.no_grad():
        assert error(Stream(model, x, chunk=4).answer(), model(x[None])) < 1e-12


def test_sources_that_do_not_fit(tmp_path):
    def refused(model, source):
        with pytest.raises(DataError) as stop:
            Stream(model, source).answer()
        return str(stop.value)

    values, symbols = classifier(make_mixer=mixers()), classifier(make_mixer=mixers(), channels=None, vocabulary=5)
    assert "one sequence for this model is (L, 2) of numbers" in refused(values, torch.zeros(4, 3))
    assert "(L,) of integers" in refused(symbols, torch.zeros(4))
    assert "the token 5: this model knows 0 to 4" in refused(symbols, torch.tensor([0, 5]))
    short = classifier(make_mixer=mixers(), positional_embedding=True, length=3)
    assert "an embedding of 3 positions" in refused(short, torch.zeros(4, 2))
    assert "does not exist" in refused(values, tmp_path / "none.npy")
    (tmp_path / "text.npy").write_text("no array")
    assert "cannot be read" in refused(values, tmp_path / "text.npy")
    np.save(tmp_path / "cut.npy", np.zeros((100, 2)))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:400])
    assert "cannot be read" in refused(values, tmp_path / "cut.npy")
    np.save(tmp_path / "words.npy", np.array(["a"]))
    assert "expected some integers or floating-point numbers" in refused(values, tmp_path / "words.npy")
    np.save(tmp_path / "empty.npy", np.zeros((0, 2)))
    assert "expected some" in refused(values, tmp_path / "empty.npy")
    np.savez(tmp_path / "several.npz", inputs=np.zeros((4, 2)))
    assert "several arrays" in refused(values, tmp_path / "several.npz")
    np.save(tmp_path / "fortran.npy", np.asfortranarray(np.random.default_rng(0).standard_normal((9, 2))))
    model = perturbed(values)
    with torch.no_grad():
        expected = model(torch.from_numpy(np.load(tmp_path / "fortran.npy"))[None])
    assert error(Stream(model, tmp_path / "fortran.npy", chunk=4).answer(), expected) < 1e-12


def test_a_folder_that_holds_no_files_is_named():
    model = classifier(make_mixer=mixers())
    with pytest.raises(DataError, match="cannot hold a temporary file"):
        Stream(model, torch.zeros(4, 2), folder=Path("nowhere")).answer()


def test_blocks_of_a_plugin_are_not_guessed_at():
    model = classifier(make_mixer=mixers())
    block = StreamedBlock(model.blocks[0])
    assert block.mixer is not model.blocks[0].mixer and block.mixer.qkv is model.blocks[0].mixer.qkv
    model.blocks[1] = torch.nn.Identity()
    model.blocks[1].mixer = LinearAttention(8, 2)
    with pytest.raises(ConfigError, match="Identity is no block"):
        Stream(model, torch.zeros(4, 2))
