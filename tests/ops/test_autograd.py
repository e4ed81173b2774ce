"""What autograd may ask of a form beyond the gradients of everything: parts of them, derivatives of them, shapes alone."""

import pytest
import torch
from torch.autograd import forward_ad

from lba_exp.ops import bidirectional_linear_attention, bidirectional_linear_attention_parts

from .compare import FORMS, Case, error, leaves

FIRST_ONLY = ("recurrent", "chunkwise")


def small(kind="selective"):
    return leaves(Case(kinds=(kind, kind), length=7, batch=1, heads=1, key_width=2, value_width=2, dtype=torch.float64).tensors()[:5])


@pytest.mark.parametrize("kind", ["selective", "selective_vector"])
@pytest.mark.parametrize("form", ["parallel", "blockwise"])
@pytest.mark.parametrize("scaled", [True, False])
def test_second_derivatives(form, scaled, kind):
    def function(*inputs):
        return bidirectional_linear_attention(*inputs, form=form, chunk_size=4, scaled=scaled)

    assert torch.autograd.gradgradcheck(function, small(kind))


@pytest.mark.parametrize("form", FIRST_ONLY)
def test_second_derivatives_are_refused_not_left_out(form):
    inputs = small()
    y = bidirectional_linear_attention(*inputs, form=form)
    # a sum's gradient depends on no input: without an error a penalty on these gradients would be a constant
    for wanted in ({"inputs": inputs}, {"inputs": inputs[:1]}):
        with pytest.raises(RuntimeError, match=r"first derivatives only.*'parallel'"):
            torch.autograd.grad(y.sum(), **wanted, create_graph=True)


@pytest.mark.parametrize("form", ["parallel", "blockwise"])
def test_function_transforms(form):
    # torch.func: a gradient for each sequence of a batch
    inputs = [x.detach() for x in Case(length=7, dtype=torch.float64).tensors()[:5]]

    def loss(q, k, v, *decays):
        return bidirectional_linear_attention(q[None], k[None], v[None], *decays, form=form, chunk_size=4).square().sum()

    q, k, v, f, b = inputs
    fixed = f[0, 0], b[0, 0]
    found = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)), in_dims=(0, 0, 0, None, None))(q, k, v, *fixed)
    for i in range(len(q)):
        for one, other in zip(found, torch.autograd.functional.jacobian(lambda *x: loss(*x, *fixed), (q[i], k[i], v[i])), strict=True):
            assert error(one[i], other) < 1e-12


def directional(form, wanted):
    """The tangent of the output for one along the input ``wanted``."""
    inputs = [x.detach() for x in small()]
    with forward_ad.dual_level():
        inputs[wanted] = forward_ad.make_dual(inputs[wanted], inputs[wanted].cos())
        return forward_ad.unpack_dual(bidirectional_linear_attention(*inputs, form=form, chunk_size=4)).tangent


@pytest.mark.parametrize("wanted", range(5))
def test_forward_mode(wanted):
    inputs = small()
    inputs[wanted] = (start := inputs[wanted].detach()) + (step := torch.zeros((), dtype=torch.float64, requires_grad=True)) * start.cos()
    y = bidirectional_linear_attention(*inputs, form="recurrent")
    expected = torch.stack([torch.autograd.grad(x, step, retain_graph=True)[0] for x in y.flatten()]).view(y.shape)
    for form in ("parallel", "blockwise"):
        assert error(directional(form, wanted), expected) < 1e-10


@pytest.mark.parametrize("form", FIRST_ONLY)
def test_forward_mode_is_refused_not_zero(form):
    for wanted in range(5):
        with pytest.raises(RuntimeError, match=r"forward.mode"):
            directional(form, wanted)


@pytest.mark.parametrize("wanted", range(5))
@pytest.mark.parametrize("form", FORMS)
def test_one_gradient_alone(form, wanted):
    *tensors, mask = Case(length=19, padded="holes").tensors()

    def gradient(*which):
        inputs = [x.clone().requires_grad_(i in which) for i, x in enumerate(tensors)]
        y = bidirectional_linear_attention(*inputs, padding_mask=mask, form=form, chunk_size=4)
        return torch.autograd.grad(y.square().sum(), inputs[wanted])[0]

    assert error(gradient(wanted), gradient(*range(5))) < 1e-6


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("form", FIRST_ONLY)
def test_one_of_the_parts_alone(form, part):
    results = []
    for name in (form, "parallel"):
        inputs = leaves(Case(length=19).tensors()[:5])
        y = bidirectional_linear_attention_parts(*inputs, form=name, chunk_size=4)[part]
        grads = torch.autograd.grad(y.square().sum(), inputs, allow_unused=True)
        results.append([torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads, strict=True)])
    for one, other in zip(*results, strict=True):
        assert error(one, other) < 2e-5


@pytest.mark.parametrize("kind", ["fixed", "selective", "selective_vector"])
@pytest.mark.parametrize("form", FORMS)
def test_a_direction_left_out_has_no_decay(form, kind):
    q, k, v, f, b, _ = Case(kinds=(kind, kind), length=19).tensors()
    for direction, other in (("forward", "backward"), ("backward", "forward")):
        own, other = f"{direction}_log_decay", f"{other}_log_decay"
        used, unused = f.clone().requires_grad_(), b.clone().requires_grad_()
        options = {"direction": direction, "form": form, "chunk_size": 4}
        y = bidirectional_linear_attention(q, k, v, **{own: used, other: unused}, **options)
        assert torch.equal(y, bidirectional_linear_attention(q, k, v, **{own: used}, **options))
        grads = torch.autograd.grad(y.square().sum(), [used, unused], allow_unused=True)
        assert grads[0].any() and grads[1] is None


@pytest.mark.parametrize("form", FORMS)
def test_shapes_without_numbers(form):
    # what counts parameters and operations runs a model on the meta device
    inputs = [x.to("meta").requires_grad_() for x in Case(length=19).tensors()[:5]]
    y = bidirectional_linear_attention(*inputs, form=form, chunk_size=4)
    y.sum().backward()
    assert y.shape == inputs[2].shape and all(x.grad.shape == x.shape for x in inputs)
