"""Float32 without short cuts, and torch's settings as they were found."""

import pytest
import torch

from lba_exp.callbacks import parity_measure as measure


def settings():
    backends = torch.backends
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:
        legacy = None
    return legacy, backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision, backends.cudnn.conv.fp32_precision


@pytest.fixture(params=["default", "old", "new"])
def chosen(request):
    """Settings as a user leaves them: untouched, made with torch's old function, or with its new attributes."""
    before = torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
    if request.param == "old":
        torch.set_float32_matmul_precision("medium")
    if request.param == "new":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    yield request.param
    if request.param == "old":
        torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision = before


def test_settings_are_exact_inside_and_restored(chosen):
    before = settings()
    assert measure.float32_is_exact() == (chosen == "default")
    with torch.autocast("cpu", torch.bfloat16), measure.exact_float32():
        assert measure.float32_is_exact()
        assert torch.backends.cuda.matmul.fp32_precision != "tf32" and torch.backends.mkldnn.matmul.fp32_precision != "bf16"
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    assert settings() == before
    with pytest.raises(ZeroDivisionError), measure.exact_float32():
        raise ZeroDivisionError
    assert settings() == before


@pytest.mark.gpu
def test_products_on_cuda(chosen):
    x = torch.randn(256, 256, device="cuda")
    with measure.exact_float32():
        error = (x @ x).double() - x.double() @ x.double()
    assert float(error.norm() / (x.double() @ x.double()).norm()) < 1e-6
