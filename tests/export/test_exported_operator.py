"""What an export makes of the operator: the same outputs as the forms that run otherwise, whatever the number of chunks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lba_exp.ops import bidirectional_linear_attention_parts, exported, start_state, stream
from lba_exp.ops.decays import to_steps
from lba_exp.ops.exported import exported_chunkwise, exported_step

DIRECTIONS = {"both": ("forward", "backward"), "forward": ("forward",), "backward": ("backward",)}


def tensors(length, kind, dtype=torch.float64):
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(2, length, 3, width, generator=generator, dtype=dtype) for width in (4, 4, 5))
    shape = {"none": None, "fixed": (3,), "fixed_vector": (3, 4), "selective": (2, length, 3), "vector": (2, length, 3, 4)}[kind]
    decays = [None if shape is None else -torch.rand(shape, generator=generator, dtype=dtype) for _ in range(2)]
    return q, k, v, *decays


def close(found, expected, dtype=torch.float64):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=float((1e-12 if dtype == torch.float64 else 1e-5) * other.abs().max()))


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(1, 150),
    chunk=st.sampled_from([1, 3, 4]),
    kinds=st.tuples(*[st.sampled_from(["none", "fixed", "fixed_vector", "selective", "vector"])] * 2),
    direction=st.sampled_from(list(DIRECTIONS)),
    weight=st.sampled_from([0.0, 1.0, 2.0]),
    symbol=st.booleans(),
)
def test_chunkwise(length, chunk, kinds, direction, weight, symbol):
    q, k, v, forward, _ = tensors(length, kinds[0])
    backward = tensors(length, kinds[1])[4]
    decays = [x if name in DIRECTIONS[direction] else None for name, x in (("forward", forward), ("backward", backward))]
    expected = bidirectional_linear_attention_parts(q, k, v, *decays, direction=direction, diagonal_weight=weight, form="recurrent")
    options = {"weight": weight, "directions": DIRECTIONS[direction], "chunk_size": chunk}
    with pytest.MonkeyPatch.context() as patch:
        if symbol:  # what is done where the length is one
            patch.setattr(exported, "pieces", lambda count, size: (count + size - 1) // size + 1)
        found = exported_chunkwise(q, k, v, *map(to_steps, decays), with_den=True, **options)
        num, none = exported_chunkwise(q, k, v, *map(to_steps, decays), with_den=False, **options)
    close(found, expected)
    assert none is None and torch.equal(num, found[0])


def test_chunkwise_where_decays_end_everything():
    q, k, v, forward, backward = tensors(70, "selective")
    forward[:, 20] = -torch.inf
    options = {"weight": 1.0, "directions": DIRECTIONS["both"], "chunk_size": 4, "with_den": True}
    found = exported_chunkwise(q, k, v, to_steps(forward), to_steps(backward), **options)
    close(found, bidirectional_linear_attention_parts(q, k, v, forward, backward, form="recurrent"))


@pytest.mark.parametrize("kind", ["none", "fixed", "fixed_vector", "selective", "vector"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_step(kind, direction, length):
    q, k, v, decay, _ = tensors(length, kind)
    state = torch.randn_like(start_state(2, 3, 4, 5, dtype=torch.float64))
    expected = stream(state, q, k, v, decay, direction=direction, diagonal_weight=0.5)
    close(exported_step(state, q, k, v, to_steps(decay), direction == "backward", 0.5), expected)


def test_one_float32_step_is_exact_enough():
    q, k, v, decay, _ = tensors(64, "selective", torch.float32)
    state = start_state(2, 3, 4, 5)
    expected = stream(state.double(), *(x.double() for x in (q, k, v, decay)), direction="forward")
    found = exported_step(state, q, k, v, to_steps(decay), False, 0.5)
    close([x.double() for x in found], expected, torch.float32)
