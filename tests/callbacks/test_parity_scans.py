"""A layer that calls the operator twice: parity sees and judges both calls."""

import pytest
import torch

import lba_exp
from lba_exp.callbacks import parity_measure as measure
from lba_exp.models.classifier import SequenceClassifier
from lba_exp.nn.attention import LinearAttention
from lba_exp.ops import api


def model():
    torch.manual_seed(0)
    return SequenceClassifier(
        make_mixer=lambda layer: LinearAttention(8, 2, scan="multi", grid=(3, 4), chunk_size=5),
        classes=3,
        width=8,
        depth=2,
        channels=1,
        length=12,
        mlp_ratio=1.0,
    ).eval()


@pytest.mark.parametrize("wrong_call", [None, 0, 1])
def test_an_error_in_either_scan_is_found(monkeypatch, wrong_call):
    batch, true, calls = {"inputs": torch.randn(2, 12, 1)}, api._IMPLEMENTATIONS["recurrent"], []

    def wrong(*args, **options):
        num, den = true(*args, **options)
        calls.append(None)
        return (num * 1.01, den) if (len(calls) - 1) % 2 == wrong_call else (num, den)

    net = model()
    shapes = measure.layer_shapes(net, batch)
    assert shapes == [(12, 2, 4, 4)] * 4  # two layers, two scans each
    if wrong_call is not None:
        monkeypatch.setitem(api._IMPLEMENTATIONS, "recurrent", wrong)
    with torch.no_grad():
        errors, _ = measure.operator_errors(net, batch, ["recurrent", "chunkwise"], shapes, 1.0)
    assert errors["chunkwise"] < 2e-5
    assert (errors["recurrent"] > 2e-5) == (wrong_call is not None)


def test_a_multiscan_model_trains_under_strict_parity(small):
    overrides = ["model=lion_s_multiscan", "model.pooling=class_token", "parity=strict", "trainer.max_epochs=1"]
    small = [o for o in small if not o.startswith("trainer.max_epochs")]
    record = lba_exp.train(lba_exp.compose([*small, *overrides]), quiet=True)
    assert record["parity"]["verdict"] == "pass"
    assert record["state_size"] == 2 * 2 * 2 * 8 * (8 + 1)
