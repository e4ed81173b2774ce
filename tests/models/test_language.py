"""Language models: padding, tying, token types, selected positions, causality, forms. Judges of the whole model are in tests/convert."""

import inspect

import pytest
import torch

from lba_exp.models.language import CausalLM, MaskedLM, TextClassifier, TextEncoder
from lba_exp.nn.attention import LinearAttention
from lba_exp.nn.softmax import SoftmaxAttention
from lba_exp.results.compare import run_form

FORMS = ("parallel", "recurrent", "chunkwise")
MLM = {"feature_map": "identity", "scale": "none", "chunk_size": 4}


def build(cls, mixer="linear", *, direction="both", **options):
    torch.manual_seed(0)

    def make(layer):
        if mixer == "softmax":
            return SoftmaxAttention(8, 2, direction=direction)
        return LinearAttention(8, 2, direction=direction, **MLM)

    model = cls(make_mixer=make, vocabulary=11, width=8, depth=2, **{"length": 12, **options}).double().eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.5 if "norm" not in name else 1.0)
    return model


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def ids(length=7, batch=3):
    return torch.randint(11, (batch, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("norm_position", ["pre", "post"])
@pytest.mark.parametrize("mixer", ["linear", "softmax"])
def test_padding_and_its_content_do_not_matter(mixer, norm_position):
    x = ids()
    padded = torch.cat([x, torch.full((3, 4), -100)], dim=1)
    mask = torch.arange(11).expand(3, -1) < 7
    model = build(MaskedLM, mixer, norm_position=norm_position)
    expected = model(x)
    for form in FORMS:
        model.set_form(form)
        close(model(padded, padding_mask=mask, token_types=torch.where(mask, 0, 99))[:, :7], expected)
    classifier = build(TextClassifier, mixer, classes=3, norm_position=norm_position)
    close(classifier(padded, mask), classifier(x))
    causal = build(CausalLM, mixer, direction="forward", norm_position=norm_position)
    close(causal(padded, mask)[:, :7], causal(x))


def test_the_decoder_is_tied_and_selected_positions_are_those_of_the_whole():
    model, x = build(MaskedLM), ids()
    selected = torch.rand(3, 7) < 0.5
    close(model(x, selected=selected), model(x)[selected])
    assert [n for n, p in model.named_parameters() if p.shape == (11, 8)] == ["encoder.embedding.weight"]
    features = model.transform(model.encoder(x))
    close(model(x), features @ model.encoder.embedding.weight.T + model.bias)
    causal = build(CausalLM, direction="forward")
    close(causal(x, selected=selected), causal(x)[selected])


def test_token_types_are_added():
    model, x = build(MaskedLM), ids()
    close(model(x, token_types=torch.zeros_like(x)), model(x))
    assert (model(x, token_types=torch.ones_like(x)) - model(x)).norm() > 1e-2
    batch = {"inputs": x, "token_types": torch.ones_like(x)}
    close(run_form(model, "recurrent", batch), model(x, token_types=torch.ones_like(x)))
    with pytest.raises(ValueError, match="token_types: expected an integer dtype of shape"):
        model(x, token_types=torch.zeros(3, 2))
    with pytest.raises(ValueError, match="this model has no token types"):
        build(MaskedLM, token_types=0)(x, token_types=x)


@pytest.mark.parametrize("mixer", ["linear", "softmax"])
def test_a_causal_model_reads_nothing_ahead(mixer):
    model, x = build(CausalLM, mixer, direction="forward"), ids(9)
    changed = x.clone()
    changed[:, 5:] = (changed[:, 5:] + 3) % 11
    for form in FORMS:
        model.set_form(form)
        close(model(changed)[:, :5], model(x)[:, :5])
        assert (model(changed)[:, 5:] - model(x)[:, 5:]).norm() > 1e-3


def test_a_causal_model_needs_causal_mixers():
    with pytest.raises(ValueError, match="direction: expected 'forward' in every mixer of a causal model, got 'both' in layer 0"):
        build(CausalLM)


def test_a_classifier_takes_the_weights_of_a_masked_model():
    masked, classifier = build(MaskedLM), build(TextClassifier, classes=3)
    classifier.encoder.load_state_dict(masked.encoder.state_dict())
    first = masked.encoder(ids())[:, 0]
    close(classifier(ids()), classifier.head(torch.tanh(classifier.pooler[0](first))))


def test_signatures_tell_all_arguments():
    assert {"vocabulary", "norm_position", "token_types", "dropout"} <= inspect.signature(MaskedLM).parameters.keys()
    assert "token_types" not in inspect.signature(CausalLM).parameters
    assert inspect.signature(CausalLM).parameters["norm_position"].default == "pre"
    assert inspect.signature(TextEncoder).parameters["norm_position"].default == "post"


@pytest.mark.parametrize("form", [pytest.param("parallel", marks=pytest.mark.slow), "chunkwise"])
def test_compiles_to_one_graph(form):
    model = build(MaskedLM).float()
    model.set_form(form)
    mask = torch.arange(7) < torch.tensor([[7], [3], [5]])
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(ids(), mask), model(ids(), mask))


@pytest.mark.parametrize(
    ("inputs", "words"),
    [(torch.zeros(2, 3), "inputs: expected"), (torch.zeros(2, 0).long(), "inputs: expected"), (ids(13), "at most 12 tokens")],
)
def test_bad_inputs_are_named(inputs, words):
    with pytest.raises(ValueError, match=words):
        build(MaskedLM)(inputs)
