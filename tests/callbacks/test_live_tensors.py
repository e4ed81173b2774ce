"""Peak bytes of programs that can be counted by hand: float32, 4 bytes a number."""

import pytest
import torch

from lba_exp.callbacks.memory import LIVE_TENSORS, LiveTensors
from lba_exp.ops import bidirectional_linear_attention

N = 1000
BYTES = 4 * N


def peak(program) -> int:
    with LiveTensors("cpu") as memory:
        program()
    assert memory.method == LIVE_TENSORS
    return memory.bytes


def test_nothing_created():
    x = torch.ones(N)
    assert peak(lambda: None) == 0
    assert peak(lambda: x.view(10, -1).t()) == 0, "a view of an outside tensor holds nothing new"
    assert peak(lambda: x.add_(1)) == 0


def test_views_count_once():
    assert peak(lambda: torch.ones(N).view(10, -1).transpose(0, 1)[2:]) == BYTES


def test_a_view_keeps_its_base_alive():
    def program():
        first = torch.ones(N)[:1]
        torch.ones(N)
        return first

    assert peak(program) == 2 * BYTES


def test_freed_temporaries_are_released():
    def program():
        x = torch.ones(N)
        for _ in range(5):
            x = x + 1  # the old x is freed after the new one exists

    assert peak(program) == 2 * BYTES


def test_in_place_adds_nothing():
    def program():
        x = torch.ones(N)
        for _ in range(5):
            x.mul_(2).add_(1)

    assert peak(program) == BYTES


def test_peak_is_not_the_last_value():
    def program():
        x = torch.ones(4 * N)
        del x
        return torch.ones(N)

    assert peak(program) == 4 * BYTES


def test_autograd_saves_tensors():
    x = torch.ones(N, requires_grad=True)

    def program(keep_graph):
        y = x if keep_graph else x.detach()
        for _ in range(4):
            y = y.exp()  # exp saves its output
        return y

    assert peak(lambda: program(True)) == 4 * BYTES
    assert peak(lambda: program(False)) == 2 * BYTES


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_temporaries_of_composite_operations(mode):
    x = torch.ones(N)

    def program():
        with mode():
            # outer: a matrix of N x N; its sum along one axis: N
            return torch.outer(x, x).sum(0)

    assert peak(program) == N * BYTES + BYTES


def test_inference_mode_sees_inside_composite_operations():
    a, b = torch.ones(20, 30, 2), torch.ones(20, 30, 5)

    def program():
        # tensordot, one operation to the outside, copies both operands into matrices
        return torch.tensordot(a, b.transpose(0, 1), dims=([1, 0], [0, 1]))

    with torch.inference_mode():
        inside = peak(program)
    with torch.no_grad():
        outside = peak(program)
    assert inside == outside == 4 * (a.numel() + b.numel() + 2 * 5)


def test_growth_of_an_outside_tensor_counts():
    x = torch.ones(N)
    assert peak(lambda: x.resize_(3 * N)) == 2 * BYTES


def test_addresses_used_again():
    def program():
        for _ in range(200):
            torch.ones(N)

    assert peak(program) == BYTES


def test_no_figure_rather_than_a_wrong_one():
    with LiveTensors("cpu") as memory:
        torch.ones(3, 3).to_sparse()
    assert memory.bytes is None

    with LiveTensors("meta") as memory:
        torch.ones(3, device="meta")
    assert memory.bytes is None and memory.method is None

    memory = LiveTensors("cpu")
    with pytest.raises(ZeroDivisionError), memory:
        raise ZeroDivisionError
    assert memory.bytes is None


def test_quadratic_attention_shows_its_matrix():
    q = torch.ones(1, 1, 64, 4)

    def program():
        with torch.inference_mode():
            return (q @ q.transpose(-1, -2)) @ q

    assert peak(program) == 4 * (64 * 64 + 64 * 4)


@torch.library.custom_op("lba_exp_tests::opaque", mutates_args=())
def opaque(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x] * 50)[: len(x)].clone()


def test_an_operation_written_in_python_is_seen_inside():
    x = torch.ones(N)
    assert peak(lambda: opaque(x)) == 51 * BYTES


def test_the_recurrent_form_is_seen_inside():
    """Its output and its gradients are less than the states it keeps for a backward pass."""
    x = [torch.rand(1, 512, 1, 32, requires_grad=True) for _ in range(3)]
    gate = (-torch.rand(1, 512, 1)).requires_grad_()
    borders = 512 // 23 * 2 * 32 * 33 * 4  # a state every isqrt(511) + 1 tokens, in both directions
    gradients = 3 * 512 * 32 * 4
    assert peak(lambda: bidirectional_linear_attention(*x, gate, gate, form="recurrent").sum().backward()) > borders + gradients


@pytest.mark.gpu
def test_cuda_allocator():
    with LiveTensors("cuda") as memory:
        x = torch.ones(2**20, device="cuda")
        y = x + 1
        del x, y
    assert memory.method == "cuda allocator" and memory.bytes == 2 * 4 * 2**20
