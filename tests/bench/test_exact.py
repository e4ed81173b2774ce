"""The judge of the forms, single rows in float64, against the whole definition in float64 and against softmax attention."""

import pytest
import torch

from lba_exp.bench import exact
from lba_exp.bench.cases import Case, draw
from lba_exp.bench.settings import DECAYS, DIRECTIONS, Settings
from tests.ops import reference


def inputs(decay="selective", batch=2, length=23, dtype="float32"):
    settings = Settings(lengths=(length,), heads=3, key_width=4, value_width=5)
    x = draw(Case(decay, dtype, batch, length, settings), torch.device("cpu"))
    return [x.q, x.k, x.v, x.forward_log_decay, x.backward_log_decay]


def rows_of(y, rows):
    return torch.stack([y[b, i] for b, i in rows])


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("decay", DECAYS)
def test_rows_of_the_definition(decay, direction, scaled):
    tensors = inputs(decay)
    rows = exact.sample_rows(2, 23)
    assert len(rows) == 46, "few rows: all of them"
    found = exact.linear_rows(*tensors, rows, scaled=scaled, direction=direction)
    right = rows_of(reference.attention(*tensors, scaled=scaled, direction=direction), rows)
    assert found.dtype == torch.float64
    assert (found - right).norm() <= 1e-12 * right.norm()


def test_closed_and_open_gates_side_by_side():
    q, k, v, f, b = inputs()
    for x in (f, b):
        x[:, ::3], x[:, 1::3] = -1e4, 0.0
    rows = exact.sample_rows(2, 23)
    right = rows_of(reference.attention(q, k, v, f, b), rows)
    assert (exact.linear_rows(q, k, v, f, b, rows) - right).norm() <= 1e-12 * right.norm()


def test_one_token():
    tensors = inputs(length=1, batch=1)
    right = reference.attention(*tensors)[0]
    assert (exact.linear_rows(*tensors, [(0, 0)]) - right).norm() <= 1e-12 * right.norm()


def test_rows_of_softmax():
    q, k, v, _, _ = inputs()
    rows = exact.sample_rows(2, 23)
    heads_first = (x.double().transpose(1, 2) for x in (q, k, v))
    right = torch.nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2)
    assert (exact.softmax_rows(q, k, v, rows) - rows_of(right, rows)).norm() <= 1e-12 * right.norm()


def test_samples_are_spread():
    rows = exact.sample_rows(3, 1000)
    assert len(rows) > 50 and len(set(rows)) == len(rows) and rows[0] == (0, 0) and rows[-1] == (2, 999)
    assert {b for b, _ in rows} == {0, 1, 2} and all(0 <= i < 1000 for _, i in rows)


def test_relative_error():
    y = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    rows = [(0, 1), (1, 4)]
    right = rows_of(y, rows)
    assert exact.relative_error(y, rows, right) == 0
    assert exact.relative_error(1.001 * y, rows, right) == pytest.approx(1e-3)
    y[1, 4, 0, 0] = torch.nan
    assert exact.relative_error(y, rows, right) != exact.relative_error(y, rows, right)
