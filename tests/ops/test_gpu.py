"""The same contract on a GPU: `pytest -m gpu`."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .compare import FORMS, Case, cases, check

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def _full_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases([torch.float64, torch.float32, torch.bfloat16, torch.float16], device="cuda"), form=st.sampled_from(FORMS))
def test_every_form_is_the_definition(case, form):
    check(case, form)


@pytest.mark.parametrize("form", ["parallel", "chunkwise"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["none", "fixed", "selective", "selective_vector"])
def test_long_sequences(form, dtype, kind):
    check(Case(length=300, heads=4, key_width=32, value_width=32, kinds=(kind, kind), level="mixed", dtype=dtype, device="cuda"), form)
