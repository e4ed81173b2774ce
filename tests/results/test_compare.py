"""Comparing logits: figures that can be worked out by hand."""

import math

import pytest
import torch
from torch import nn

from lba_exp.results.compare import Totals, compare, evaluate_forms, undisturbed


def test_equal_logits():
    logits = torch.tensor([[1.0, 2.0], [4.0, 3.0]])
    figures = compare(logits, logits, torch.tensor([1, 1])).figures()
    assert figures == {"max_abs": 0, "rel": 0, "agreement": 1, "different": 0, "near_ties": 0, "accuracy": 0.5, "count": 2}


def test_relative_error_and_predictions():
    reference = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    other = torch.tensor([[3.0, 0.0], [5.0, 4.0]])
    figures = compare(reference, other, torch.tensor([0, 0])).figures()
    assert figures["rel"] == 1 and figures["max_abs"] == 5
    assert figures["agreement"] == 0.5 and figures["different"] == 1 and figures["accuracy"] == 1


def test_near_ties_are_counted_apart():
    """At tolerance 1e-2 and norm 1 a margin of 0.0141 is the border."""
    reference = torch.nn.functional.normalize(torch.tensor([[1.0, 0.99], [1.0, 0.9]]), dim=-1)
    other = reference.flip(-1)
    figures = compare(reference, other, tolerance=1e-2).figures()
    assert figures["near_ties"] == 1 and figures["different"] == 1 and figures["agreement"] == 0
    figures = compare(reference[:1], other[:1], tolerance=1e-2).figures()
    assert figures["near_ties"] == 1 and figures["different"] == 0 and figures["agreement"] is None
    assert compare(reference[:1], other[:1], tolerance=1e-4).figures()["different"] == 1


def test_an_allowed_error_never_makes_a_difference():
    """Whatever error of relative size ``tolerance`` a sample has, its prediction is the same or it is a near tie."""
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(2000, 3, generator=generator, dtype=torch.float64)
    error = torch.randn(2000, 3, generator=generator, dtype=torch.float64)
    error *= 0.1 * reference.norm(dim=-1, keepdim=True) / error.norm(dim=-1, keepdim=True)
    figures = compare(reference, reference + error, tolerance=0.1).figures()
    assert figures["different"] == 0 and 0 < figures["near_ties"] < 1000
    assert figures["rel"] == pytest.approx(0.1)
    assert compare(reference, reference + error, tolerance=0.01).figures()["different"] > 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_differs(value):
    reference = torch.tensor([[1.0, 0.0]] * 2)
    other = torch.tensor([[1.0, 0.0], [value, 0.0]])
    figures = compare(reference, other).figures()
    assert not figures["rel"] <= 1e9 and not figures["max_abs"] <= 1e9
    assert figures["different"] == 1 and figures["agreement"] == 0.5
    figures = compare(other, other).figures()
    assert not figures["rel"] <= 1e9 and figures["different"] == 1, "a reference that is not finite proves nothing"


def test_totals_add_up():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 10, 4, generator=generator).unbind(0)
    labels = torch.randint(4, (10,), generator=generator)
    labels[2] = -100
    whole = compare(a, b, labels)
    parts = compare(a[:3], b[:3], labels[:3]) + compare(a[3:], b[3:], labels[3:])
    assert parts.figures() == pytest.approx(whole.figures())
    assert whole.count == 9, "ignored labels are left out"
    assert Totals.from_sums(whole.sums(), whole.max_abs) == whole and len(whole.sums()) == Totals.width()
    assert math.isnan((whole + Totals(max_abs=math.nan)).max_abs) and math.isnan((Totals(max_abs=math.nan) + whole).max_abs)
    assert compare(a[:0], b[:0]).figures()["accuracy"] is None
    with pytest.raises(ValueError, match="shape"):
        compare(a, b[:5])


class Model(nn.Module):
    """Two forms: ``b`` adds ``shift`` to the first logit."""

    forms = ("a", "b")

    def __init__(self, shift: float):
        super().__init__()
        self.linear, self.dropout, self.form, self.shift = nn.Linear(4, 3), nn.Dropout(0.5), "a", shift

    def set_form(self, form):
        previous, self.form = self.form, form
        return previous

    def forward(self, inputs, padding_mask=None):
        assert not self.training and not torch.is_grad_enabled()
        logits = self.dropout(self.linear(inputs))
        return logits + torch.tensor([self.shift, 0, 0]) if self.form == "b" else logits


def batches():
    generator = torch.Generator().manual_seed(0)
    for size in (5, 2):
        yield {"inputs": torch.randn(size, 4, generator=generator), "labels": torch.zeros(size, dtype=torch.long)}


def test_evaluate_forms():
    model = Model(100.0)
    model.linear.eval()  # a frozen part stays frozen
    state = torch.get_rng_state()
    found = evaluate_forms(model, batches())
    assert list(found) == ["a", "b"] and found["a"]["rel"] == 0 and found["a"]["agreement"] == 1
    assert found["b"]["accuracy"] == 1 and found["b"]["max_abs"] == pytest.approx(100) and found["b"]["count"] == 7
    assert found["b"]["different"] > 0 and found["b"]["accuracy"] != found["a"]["accuracy"]
    assert model.form == "a" and model.training and not model.linear.training and torch.equal(torch.get_rng_state(), state)

    assert evaluate_forms(model, batches(), ["a"], reference="b")["a"]["rel"] > 0
    assert evaluate_forms(Model(0.0), batches())["b"]["agreement"] == 1
    half = evaluate_forms(model, batches(), context=lambda: torch.autocast("cpu", torch.bfloat16))
    assert half["a"]["count"] == 7
    with pytest.raises(ValueError, match="no form 'c'"):
        evaluate_forms(model, batches(), ["c"])


def test_undisturbed_after_an_error():
    model = Model(0.0)
    model.linear.eval()
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), undisturbed(model):
        torch.rand(1)
        raise ZeroDivisionError
    assert model.training and not model.linear.training and torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()
