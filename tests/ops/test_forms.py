"""Every form against direct summation in float64, outputs and gradients, over the whole contract."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings

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


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@given(case=cases([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_contract_at_length(form, case):
    check(case, form)
