"""The sequence classifier: padding, positions, pooling, forms, and what reversal does to it."""

import pytest
import torch

from lba_exp.callbacks.parity_measure import layer_shapes
from lba_exp.models.classifier import SequenceClassifier, TwoTowers
from lba_exp.nn.attention import LinearAttention
from lba_exp.nn.softmax import SoftmaxAttention

FORMS = ("parallel", "recurrent", "chunkwise")


def classifier(mixer="linear", *, mixer_options=None, seed=0, **options):
    """A float64 model of two layers in eval mode, its gates far from constant."""
    torch.manual_seed(seed)
    kinds = {"linear": LinearAttention, "softmax": SoftmaxAttention}
    mixer_options = {"chunk_size": 4, **(mixer_options or {})} if mixer == "linear" else {}
    if "vocabulary" not in options:
        options["channels"] = options.get("channels", 2)
    options = {"classes": 3, "width": 8, "depth": 2, "length": 12, "mlp_ratio": 2.0, **options}
    model = SequenceClassifier(make_mixer=lambda layer: kinds[mixer](options["width"], 2, **mixer_options), **options).double().eval()
    for name, parameter in model.named_parameters():
        if ".gate." in name:
            torch.nn.init.normal_(parameter)
    return model


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pooling", ["mean", "class_token"])
@pytest.mark.parametrize("convention", ["key", "query", "symmetric"])
@pytest.mark.parametrize("gate", ["none", "fixed", "selective"])
def test_forms_agree(gate, convention, pooling):
    model = classifier(mixer_options={"gate": gate, "convention": convention}, pooling=pooling)
    x, mask = torch.randn(3, 10, 2, dtype=torch.float64), torch.arange(10) < torch.tensor([[10], [7], [1]])
    logits = {}
    for form in FORMS:
        model.set_form(form)
        logits[form] = model(x, mask)
    close(logits["recurrent"], logits["parallel"])
    close(logits["chunkwise"], logits["parallel"])


@pytest.mark.parametrize("pooling", ["mean", "class_token"])
@pytest.mark.parametrize("mixer", ["linear", "softmax"])
def test_padding_and_its_content_do_not_matter(mixer, pooling):
    model = classifier(mixer, pooling=pooling)
    x = torch.randn(2, 7, 2, dtype=torch.float64)
    mask = torch.arange(12).expand(2, -1) < 7
    for content in (0.0, 1e3, float("nan")):
        padded = torch.cat([x, torch.full((2, 5, 2), content, dtype=torch.float64)], dim=1)
        close(model(padded, mask), model(x))
    assert not torch.allclose(model(torch.cat([x, x[:, :5]], dim=1)), model(x))


@pytest.mark.parametrize("pooling", ["mean", "class_token"])
def test_padding_of_symbols(pooling):
    model = classifier(vocabulary=5, pooling=pooling)
    ids = torch.randint(5, (2, 6))
    padded = torch.cat([ids, torch.full((2, 3), -100)], dim=1)
    close(model(padded, torch.arange(9).expand(2, -1) < 6), model(ids))
    close(model(ids.int()), model(ids))


@pytest.mark.parametrize("mixer", ["linear", "softmax"])
def test_a_sequence_of_padding_alone_is_finite_and_leaves_the_others_alone(mixer):
    model = classifier(mixer)
    x = torch.randn(2, 4, 2, dtype=torch.float64)
    logits = model(x, torch.tensor([[False] * 4, [True] * 4]))
    logits.sum().backward()
    assert logits.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    close(logits[1:], model(x[1:]))


def test_mean_pooling_is_the_mean_over_real_tokens():
    model = classifier(mixer_options={"gate": "none"})
    x, mask = torch.randn(1, 5, 2, dtype=torch.float64), torch.tensor([[True, True, True, False, False]])
    seen = {}
    model.norm.register_forward_hook(lambda module, inputs, output: seen.update(tokens=output))
    logits = model(x, mask)
    close(logits, model.head(seen["tokens"][:, :3].mean(1)))


def test_the_class_token_comes_first_and_alone_is_read():
    model = classifier(pooling="class_token")
    seen = {}
    model.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.update(x=inputs[0], mask=inputs[1]))
    model.norm.register_forward_hook(lambda module, inputs, output: seen.update(tokens=output))
    logits = model(torch.randn(2, 4, 2, dtype=torch.float64), torch.tensor([[True] * 4, [False] * 4]))
    assert torch.equal(seen["x"][:, 0], model.class_token.weight.expand(2, -1))
    assert seen["mask"].tolist() == [[True] * 5, [True] + [False] * 4]
    close(logits, model.head(seen["tokens"][:, 0]))


REVERSAL_BLIND = [("none", "key"), ("fixed", "key"), ("fixed", "symmetric"), ("selective", "key"), ("selective", "query")]


@pytest.mark.parametrize(("gate", "convention"), REVERSAL_BLIND)
def test_without_positions_a_sequence_and_its_reverse_are_the_same(gate, convention):
    model = classifier(mixer_options={"gate": gate, "convention": convention}, positional_embedding=False)
    x = torch.randn(2, 9, 2, dtype=torch.float64)
    close(model(x.flip(1)), model(x))


@pytest.mark.parametrize(
    ("gate", "convention", "positional_embedding"), [("selective", "symmetric", False), ("selective", "key", True), ("none", "key", True)]
)
def test_with_positions_or_the_symmetric_convention_a_sequence_and_its_reverse_differ(gate, convention, positional_embedding):
    model = classifier(mixer_options={"gate": gate, "convention": convention}, positional_embedding=positional_embedding)
    x = torch.randn(2, 9, 2, dtype=torch.float64)
    assert (model(x.flip(1)) - model(x)).norm() > 1e-5 * model(x).norm()


def test_positional_embedding_is_added_and_bounds_the_length():
    model = classifier()
    x = torch.randn(1, 4, 2, dtype=torch.float64)
    close(model.positions(x.new_zeros(1, 4, 8))[0], model.positions.weight[:4])
    with pytest.raises(ValueError, match=r"length: expected at most 12 tokens, .* got 13"):
        model(torch.randn(1, 13, 2, dtype=torch.float64))
    assert classifier(positional_embedding=False, length=None)(torch.randn(1, 13, 2, dtype=torch.float64)).shape == (1, 3)


@pytest.mark.parametrize("form", FORMS)
def test_every_parameter_gets_a_finite_gradient(form):
    model = classifier(pooling="class_token")
    model.set_form(form)
    model(torch.randn(2, 9, 2, dtype=torch.float64)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(("mixer", "form"), [("linear", form) for form in FORMS] + [("softmax", None)])
def test_one_token_one_sequence(mixer, form):
    model = classifier(mixer)
    if form:
        model.set_form(form)
    assert model(torch.randn(1, 1, 2, dtype=torch.float64)).isfinite().all()


def test_forms_form_and_state_size():
    model = classifier()
    assert set(FORMS) <= set(model.forms) and model.form == "parallel"
    assert model.set_form("recurrent") == "parallel" and model.form == "recurrent"
    assert model.state_size == 2 * 2 * (2 * 4 * 4 + 2 * 4)  # layers, directions, S and z of 2 heads
    softmax = classifier("softmax")
    assert softmax.forms == () and softmax.form is None and softmax.state_size is None
    assert softmax.set_form("recurrent") is None


def test_layers_are_made_by_index():
    made = []

    def make(layer):
        made.append(layer)
        return SoftmaxAttention(8, 2)

    SequenceClassifier(make_mixer=make, classes=2, width=8, depth=3, channels=1, length=4)
    assert made == [0, 1, 2]


def test_weights_follow_the_seed_and_values_and_positions_start_on_one_scale():
    first, second, third = classifier(vocabulary=50), classifier(vocabulary=50), classifier(vocabulary=50, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.embedding.weight, third.embedding.weight)
    for embedded in (
        first.embedding.weight,
        first.positions.weight,
        classifier(channels=4, width=64).embedding(torch.randn(99, 4).double()),
    ):
        assert 0.014 < embedded.std().item() < 0.023


def test_autocast_keeps_the_residual_stream_in_float32():
    model = classifier(positional_embedding=False).float()
    x = torch.randn(2, 9, 2)
    seen = {}
    model.norm.register_forward_pre_hook(lambda module, inputs: seen.update(dtype=inputs[0].dtype))
    exact = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(x)
    assert seen["dtype"] == torch.float32
    assert (logits - exact).norm() < 3e-2 * exact.norm()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": None}, "exactly one of them, got channels=None and vocabulary=None"),
        ({"vocabulary": 4, "channels": 2}, "exactly one of them, got channels=2 and vocabulary=4"),
        ({"length": None}, "length: .* got None"),
        ({"length": 0}, "length: .* got 0"),
        ({"depth": 0}, "depth: .* got 0"),
        ({"classes": -1}, "classes: .* got -1"),
        ({"pooling": "max"}, "pooling: got 'max', valid are 'mean', 'class_token'"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        classifier(**options)


@pytest.mark.parametrize(
    ("options", "inputs"),
    [
        ({}, torch.zeros(2, 4)),
        ({}, torch.zeros(2, 4, 3)),
        ({}, torch.zeros(2, 0, 2)),
        ({}, torch.zeros(2, 4, 2, dtype=torch.long)),
        ({"vocabulary": 5}, torch.zeros(2, 4)),
        ({"vocabulary": 5}, torch.zeros(2, 4, 1, dtype=torch.long)),
    ],
)
def test_bad_inputs_are_named(options, inputs):
    with pytest.raises(ValueError, match=r"inputs: expected .* got torch"):
        classifier(**options)(inputs)


def test_a_bad_mask_is_named():
    with pytest.raises(ValueError, match=r"padding_mask: expected torch.bool of shape"):
        classifier()(torch.zeros(2, 4, 2), torch.ones(2, 5, dtype=torch.bool))


@pytest.mark.parametrize("options", [{"norm": "batch"}, {"norm_position": "post"}, {"mlp": "glu"}, {"mlp": "output_glu", "norm": "batch"}])
def test_recipes_take_padding_and_agree_in_all_forms(options):
    model = classifier(**options)
    x, mask = torch.randn(2, 7, 2, dtype=torch.float64), torch.arange(7) < torch.tensor([[7], [4]])
    expected = model(x, mask)
    close(model(torch.cat([x, x.new_full((2, 3, 2), float("nan"))], 1), torch.cat([mask, mask[:, :3] & False], 1)), expected)
    for form in FORMS:
        model.set_form(form)
        close(model(x, mask), expected)
    model.train()(x, mask).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_mean_all_is_the_mean_with_the_class_token():
    model = classifier(pooling="mean_all")
    seen = {}
    model.norm.register_forward_hook(lambda module, inputs, output: seen.update(tokens=output))
    logits = model(torch.randn(2, 4, 2, dtype=torch.float64), torch.tensor([[True] * 4, [False] * 4]))
    close(logits, model.head(torch.stack([seen["tokens"][0].mean(0), seen["tokens"][1, 0]])))


@pytest.mark.parametrize("form", ["parallel", pytest.param("chunkwise", marks=pytest.mark.slow)])
def test_compiles_to_one_graph(form):
    model = classifier(pooling="class_token", norm="batch", drop_path=0.1).float().train()
    model.set_form(form)
    x, mask = torch.randn(3, 9, 2), torch.arange(9) < torch.tensor([[9], [5], [1]])
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    expected = model(x, mask)
    expected.square().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.manual_seed(0)
    logits = compiled(x, mask)
    logits.square().sum().backward()
    torch.testing.assert_close(logits, expected)
    for one, other in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(one, other.grad, rtol=1e-3, atol=1e-4 * one.abs().max().item())


def two_towers(**options):
    torch.manual_seed(0)
    options = {"classes": 2, "width": 8, "depth": 2, "length": 12, **options}
    return TwoTowers(make_mixer=lambda layer: LinearAttention(8, 2, chunk_size=4), **options).double().eval()


@pytest.mark.parametrize("options", [{"vocabulary": 7}, {"channels": 2}])
def test_two_towers_share_an_encoder(options):
    model = two_towers(**options)
    shape = (3, 2, 6) if "vocabulary" in options else (3, 2, 6, 2)
    inputs = torch.randint(7, shape) if "vocabulary" in options else torch.randn(shape, dtype=torch.float64)
    mask = torch.arange(6) < torch.tensor([[[6], [2]], [[3], [6]], [[1], [1]]])
    a, b = model.encode(inputs[:, 0], mask[:, 0]), model.encode(inputs[:, 1], mask[:, 1])
    expected = model.head(torch.cat([a, b, a * b, a - b], dim=-1))
    for form in FORMS:
        model.set_form(form)
        close(model(inputs, mask), expected)
    assert model.count_tokens(inputs) == 36
    assert layer_shapes(model, {"inputs": inputs, "padding_mask": mask}) == 2 * [(6, 2 * 2, 4, 4)]
    with pytest.raises(ValueError, match=r"padding_mask: expected .*\(3, 2, 6\)"):
        model(inputs, mask[:, 0])
    with pytest.raises(ValueError, match=r"inputs: expected \(B, 2, L"):
        model(inputs[:, :1])
