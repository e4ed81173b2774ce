"""The vision model: patches, class token, positions, padding, forms, sizes. Judges of the whole model are in tests/convert."""

import pytest
import torch

from lba_exp.models.vision import VisionTransformer
from lba_exp.nn.attention import LinearAttention
from lba_exp.nn.softmax import SoftmaxAttention

FORMS = ("parallel", "recurrent", "chunkwise")


def vit(mixer=None, **options):
    torch.manual_seed(0)
    options = {"classes": 3, "width": 8, "depth": 2, "channels": 2, "image_size": (4, 6), "patch_size": 2, **options}
    token = options.get("pooling", "class_token") != "mean"
    make = mixer or (lambda layer: LinearAttention(8, 2, scan="multi", grid=(2, 3), class_token=token, open_first=token, chunk_size=4))
    return VisionTransformer(make_mixer=make, **options).double().eval()


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def images(size=(4, 6), batch=3):
    return torch.randn(batch, 2, *size, dtype=torch.float64)


@pytest.mark.parametrize("pooling", ["mean", "class_token", "mean_all"])
def test_forms_agree_and_every_parameter_is_trained(pooling):
    model, x = vit(pooling=pooling), images()
    expected = model(x)
    for form in FORMS:
        model.set_form(form)
        model.zero_grad()
        logits = model(x)
        close(logits, expected)
        logits.square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_tokens_are_patches_in_row_major_order_behind_the_class_token():
    model, x, seen = vit(), images(), {}
    model.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.update(x=inputs[0]))
    model(x)
    kernel, bias = model.patches.weight, model.patches.bias
    for token, (row, column) in enumerate([(0, 0), (0, 2), (0, 4), (2, 0), (2, 2), (2, 4)], start=1):
        patch = x[:, None, :, row : row + 2, column : column + 2]
        close(seen["x"][:, token], (patch * kernel).sum((2, 3, 4)) + bias + model.positions.weight[token])
    close(seen["x"][:, 0], (model.class_token.weight + model.positions.weight[0]).expand(3, -1))


def test_patches_that_are_left_out_do_not_matter():
    model, x = vit(lambda layer: SoftmaxAttention(8, 2)), images()
    mask = torch.tensor([[True] * 4 + [False] * 2]).expand(3, -1)
    other = x.clone()
    other[:, :, 2:, 2:] = 100.0
    close(model(other, mask), model(x, mask))
    assert (model(x) - model(x, mask)).norm() > 1e-4


@pytest.mark.parametrize("pooling", ["mean", "class_token", "mean_all"])
def test_leaving_a_row_of_patches_out_is_cutting_it_off(pooling):
    model, x = vit(lambda layer: LinearAttention(8, 2), positional_embedding=False, pooling=pooling), images()
    mask = torch.tensor([[True] * 3 + [False] * 3]).expand(3, -1)
    close(model(x, mask), model(x[:, :, :2]))


def test_without_positions_any_multiple_of_the_patch_will_do():
    model = vit(lambda layer: LinearAttention(8, 2), positional_embedding=False)
    assert model(images((8, 2))).shape == (3, 3)
    with pytest.raises(ValueError, match=r"inputs: expected \(B, 2, height, width\), both multiples of the patch size 2"):
        model(images((5, 4)))
    with pytest.raises(ValueError, match=r"inputs: expected \(B, 2, 4, 6\)"):
        vit()(images((8, 2)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 4}, r"patch_size: expected a divisor .*\(4, 6\), got 4"),
        ({"image_size": (4,)}, "image_size: expected"),
        ({"pooling": "cls"}, "pooling: got 'cls'"),
        ({"channels": 0}, "channels: .* got 0"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        vit(**options)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["parallel", "chunkwise"])
def test_compiles_to_one_graph(form):
    model = vit().float()
    model.set_form(form)
    x = images().float()
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


def test_counts_patches():
    assert vit().count_tokens(images()) == 18
