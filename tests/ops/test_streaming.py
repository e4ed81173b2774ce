"""A sequence that comes in blocks, in both directions, gives what the whole gives."""

import io
import itertools

import pytest
import torch
from torch.autograd import forward_ad

from lba_exp.ops import bidirectional_linear_attention_parts, start_state, step_log_decays, stream

from .compare import KINDS, Case, error


def piece(x, block):
    return x if x is None or x.ndim == 1 or (x.ndim == 2 and x.dtype != torch.bool) else x[:, block]


def run(q, k, v, f, b, mask, cuts, weight=0.5):
    """num and den of the whole sequence, from blocks cut at ``cuts``."""
    total_num, total_den = 0.0, 0.0
    borders = [0, *cuts, q.shape[1]]
    blocks = [slice(start, stop) for start, stop in itertools.pairwise(borders) if stop > start]
    for direction, decay in (("forward", f), ("backward", b)):
        state = start_state(q.shape[0], q.shape[2], q.shape[3], v.shape[3], dtype=torch.float64)
        order = blocks if direction == "forward" else blocks[::-1]
        done = {}
        for block in order:
            arguments = [piece(x, block) for x in (q, k, v, decay)]
            num, den, state = stream(state, *arguments, direction=direction, diagonal_weight=weight, padding_mask=piece(mask, block))
            done[block.start] = (num, den)
        total_num = total_num + torch.cat([done[block.start][0] for block in blocks], dim=1)
        total_den = total_den + torch.cat([done[block.start][1] for block in blocks], dim=1)
    return total_num, total_den


@pytest.mark.parametrize("kinds", list(itertools.product(KINDS, KINDS)), ids="-".join)
def test_kinds(kinds):
    *tensors, mask = Case(kinds=kinds, padded="holes", length=11, dtype=torch.float64).tensors()
    expected = bidirectional_linear_attention_parts(*tensors, padding_mask=mask, form="parallel")
    for y, y_expected in zip(run(*tensors, mask, [3, 8]), expected, strict=True):
        assert error(y, y_expected) < 1e-12


def test_a_split_at_any_point_changes_nothing():
    *tensors, mask = Case(level="mixed", padded="holes", length=11, dtype=torch.float64).tensors()
    whole = run(*tensors, mask, [])
    for cuts in [[i] for i in range(1, 11)] + [list(range(1, 11))]:
        assert all(torch.equal(x, y) for x, y in zip(run(*tensors, mask, cuts), whole, strict=True))


@pytest.mark.parametrize("convention", ["key", "query", "symmetric"])
def test_decays_made_block_by_block(convention):
    q, k, v, gate, _, _ = Case(length=12, dtype=torch.float64).tensors()
    f, b = step_log_decays(gate, convention)
    num, _ = bidirectional_linear_attention_parts(q, k, v, f, b, direction="forward", form="parallel")
    first, _ = step_log_decays(gate[:, :5], convention, after=gate[:, 5])
    second, _ = step_log_decays(gate[:, 5:], convention, before=gate[:, 4])
    state = start_state(*q.shape[::2], q.shape[3], v.shape[3], dtype=torch.float64)
    one, _, state = stream(state, q[:, :5], k[:, :5], v[:, :5], first, direction="forward", diagonal_weight=1.0)
    two, _, state = stream(state, q[:, 5:], k[:, 5:], v[:, 5:], second, direction="forward", diagonal_weight=1.0)
    assert error(torch.cat([one, two], dim=1), num) < 1e-12


def test_the_state_is_a_plain_tensor_and_is_not_changed():
    q, k, v, f, _, _ = Case(length=6).tensors()
    state = start_state(2, 3, 4, 5)
    assert state.shape == (2, 3, 4, 6) and state.dtype == torch.float32
    _, _, after = stream(state, q[:, :3], k[:, :3], v[:, :3], f[:, :3], direction="forward")
    assert state.abs().max() == 0 and after.abs().max() > 0
    file = io.BytesIO()
    torch.save(after, file)
    file.seek(0)
    arguments = [x[:, 3:] for x in (q, k, v, f)]
    expected = stream(after, *arguments, direction="forward")
    restored = stream(torch.load(file, weights_only=True), *arguments, direction="forward")
    assert all(torch.equal(x, y) for x, y in zip(restored, expected, strict=True))


def test_half_precision_keeps_a_float32_state():
    *tensors, _ = Case(dtype=torch.bfloat16).tensors()
    q, k, v, f, _ = tensors
    num, den, state = stream(start_state(2, 3, 4, 5), q, k, v, f, direction="forward", diagonal_weight=1.0)
    assert num.dtype == den.dtype == state.dtype == torch.float32
    expected = bidirectional_linear_attention_parts(*tensors, direction="forward", form="parallel")
    assert error(num, expected[0]) < 1e-6 and error(den, expected[1]) < 1e-6


def test_autocast_changes_nothing():
    q, k, v, f, _, _ = Case(length=6).tensors()
    expected = stream(start_state(2, 3, 4, 5), q, k, v, f, direction="forward")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = stream(start_state(2, 3, 4, 5), q, k, v, f, direction="forward")
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_a_forward_mode_tangent_is_refused_not_dropped():
    q, k, v, f, _, _ = Case(length=6).tensors()
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        stream(start_state(2, 3, 4, 5), forward_ad.make_dual(q, q), k, v, f, direction="forward")


def test_one_token_of_one_head():
    q, k, v, f, _, _ = Case(length=1, batch=1, heads=1).tensors()
    num, den, state = stream(start_state(1, 1, 4, 5), q, k, v, f, direction="forward", diagonal_weight=1.0)
    assert len({x.untyped_storage().data_ptr() for x in (num, den, state)}) == 3
    assert error(num, (q * k).sum(-1, keepdim=True) * v) < 1e-6 and error(den, (q * k).sum(-1)) < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"direction": "both"}, "direction.*'both'.*'forward', 'backward'"),
        ({"state": torch.zeros(2, 3, 4, 5)}, "state.*\\(2, 3, 4, 6\\)"),
        ({"state": torch.zeros(2, 3, 4, 6, dtype=torch.float64)}, "state.*float32"),
        ({"log_decay": -torch.rand(2, 6, 3)}, "log_decay.*shapes"),
        ({"q": torch.rand(2, 3, 4)}, "q.*\\(B, L, H, Dk\\)"),
        ({"q": torch.rand(2, 5, 3, 4, requires_grad=True)}, "q: streaming gives no gradients"),
        ({"padding_mask": torch.ones(2, 5)}, "padding_mask.*bool"),
        ({"diagonal_weight": "half"}, "diagonal_weight"),
    ],
)
def test_errors(change, message):
    q, k, v, f, _, _ = Case(length=5).tensors()
    arguments = {"state": start_state(2, 3, 4, 5), "q": q, "k": k, "v": v, "log_decay": f, "direction": "forward"} | change
    with pytest.raises(ValueError, match=message):
        stream(**arguments)


def test_errors_of_the_start_state():
    with pytest.raises(ValueError, match=r"heads.*>= 1"):
        start_state(1, 0, 4, 4)
    with pytest.raises(ValueError, match=r"dtype.*float16"):
        start_state(1, 1, 4, 4, dtype=torch.float16)
