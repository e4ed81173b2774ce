"""Every form against direct summation in float64, outputs and gradients, over the whole contract."""

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from lba_exp.ops import api, bidirectional_linear_attention, choose_form

from .compare import FORMS, KINDS, Case, cases, check

SETTINGS = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "derandomize": True}


@pytest.mark.parametrize("form", FORMS)
@given(case=cases([torch.float64, torch.float32]))
@settings(max_examples=100, **SETTINGS)
def test_contract(form, case):
    check(case, form)


@pytest.mark.parametrize("form", FORMS)
@given(case=cases([torch.bfloat16, torch.float16]))
@settings(max_examples=40, **SETTINGS)
def test_half_precision(form, case):
    check(case, form)


@pytest.mark.parametrize("kinds", list(itertools.product(KINDS, KINDS)), ids="-".join)
@pytest.mark.parametrize("form", FORMS)
def test_kinds_of_decay(form, kinds):
    check(Case(kinds=kinds, padded="holes"), form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["selective", "selective_vector"])
def test_extreme_gates(form, dtype, kind):
    # several groups of chunks, open and closed gates side by side
    check(Case(kinds=(kind, kind), level="mixed", length=300, chunk_size=4, batch=1, heads=2, dtype=dtype), form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [1, 2])
def test_gradient_of_few_tokens(form, length):
    # the exact gradient of one token's scaled output is nearly zero
    check(Case(length=length, batch=1, heads=1), form)


@pytest.mark.parametrize("vector", [False, True])
def test_auto_runs_what_its_rule_says(vector, monkeypatch):
    ran = []
    for name, function in api._IMPLEMENTATIONS.items():

        def note(*args, name=name, function=function, **options):
            ran.append(name)
            return function(*args, **options)

        monkeypatch.setitem(api._IMPLEMENTATIONS, name, note)
    border = 128 if vector else 192
    for length, expected in ((1, "parallel"), (border, "parallel"), (border + 1, "chunkwise")):
        kind = "selective_vector" if vector else "selective"
        q, k, v, f, b, _ = Case(kinds=(kind, "selective"), length=length, batch=1, heads=1).tensors()
        bidirectional_linear_attention(q, k, v, f, b)
        assert ran.pop() == choose_form(length, vector) == expected
    # a decay that the direction drops does not count: 129 tokens, parallel without one per channel
    bidirectional_linear_attention(*(x[:, :129] for x in (q, k, v, f)), direction="backward")
    assert ran == ["parallel"]


def test_the_rule_of_auto_is_in_the_readme():
    text = " ".join((Path(__file__).parents[2] / "README.md").read_text().split())
    rule = f"`parallel` up to {api.PARALLEL_UP_TO} tokens ({api.PARALLEL_UP_TO_VECTOR} with a decay per channel) and `chunkwise` above"
    assert rule in text


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@given(case=cases([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_contract_at_length(form, case):
    check(case, form)
