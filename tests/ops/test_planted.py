"""The comparison with direct summation must be able to fail: a planted error in each form is found."""

import pytest
import torch

from lba_exp.ops import api, chunkwise, recurrent

from . import worst_errors
from .compare import FORMS, Case, check

CASE = Case(length=70, chunk_size=8, padded="holes", batch=1, heads=2)


def with_change(form, change):
    """The form, its arguments changed by ``change(q, k, v, forward, backward, options)``."""
    correct = api._IMPLEMENTATIONS[form]

    def faulty(q, k, v, forward, backward, **options):
        q, k, v, forward, backward, options = change(q, k, v, forward, backward, options)
        return correct(q, k, v, forward, backward, **options)

    return faulty


def shift_gate(q, k, v, forward, backward, options):
    return q, k, v, forward.roll(1, dims=1), backward, options


def count_diagonal_twice(q, k, v, forward, backward, options):
    return q, k, v, forward, backward, options | {"weight": 2.0 * options["weight"]}


def forget_borders(q, k, v, forward, backward, options):
    # closed gates wherever a chunk of 8 tokens begins or ends
    starts = torch.arange(q.shape[1]) % 8 == 0
    forward = forward.masked_fill(starts[None, :, None, None], -1e4)
    return q, k, v, forward, backward.masked_fill(starts.roll(-1)[None, :, None, None], -1e4), options


@pytest.mark.parametrize("change", [shift_gate, count_diagonal_twice, forget_borders], ids=lambda x: x.__name__)
@pytest.mark.parametrize("form", FORMS)
def test_planted_errors_are_found(form, change, monkeypatch):
    check(CASE, form)
    monkeypatch.setitem(api._IMPLEMENTATIONS, form, with_change(form, change))
    with pytest.raises(AssertionError, match=f"{form}: relative errors"):
        check(CASE, form)


@pytest.mark.parametrize("form", FORMS)
def test_an_ignored_mask_is_found(form, monkeypatch):
    monkeypatch.setattr(api, "hide_padding", lambda q, k, v, mask: (q, k, v))
    with pytest.raises(AssertionError, match=f"{form}: relative errors"):
        check(CASE, form)


def test_forgotten_states_are_found(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(chunkwise, "scan_states", lambda own, total, reverse: own.zero_())
        with pytest.raises(AssertionError, match="chunkwise: relative errors"):
            check(CASE, "chunkwise")
    correct = recurrent.advance
    monkeypatch.setattr(recurrent, "SEGMENT", 8)
    check(CASE, "recurrent")
    monkeypatch.setattr(recurrent, "advance", lambda state, *others: correct(torch.zeros_like(state), *others))
    with pytest.raises(AssertionError, match="recurrent: relative errors"):
        check(CASE, "recurrent")


def test_the_table_of_worst_errors(monkeypatch, capsys):
    arguments = ["--cases", "4", "--seed", "1"]
    assert worst_errors.main(arguments) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 2 + 4 * len(FORMS) and len({line.count("|") for line in table}) == 1
    monkeypatch.setitem(api._IMPLEMENTATIONS, "chunkwise", with_change("chunkwise", count_diagonal_twice))
    assert worst_errors.main(arguments) == 1
    wrong = capsys.readouterr().err.splitlines()
    assert wrong and all("chunkwise" in line for line in wrong)
