"""A sequence cut into blocks, one a process: outputs and gradients are those of one device."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from torch import distributed as dist

from lba_exp.ops import (
    CONVENTIONS,
    bidirectional_linear_attention,
    bidirectional_linear_attention_parts,
    sequence_parallel,
    step_log_decays,
)
from tests.ops.compare import TOLERANCE, Case, error, gradients, leaves
from tests.ranks import on_ranks

CUTS = {2: (0, 17, 37), 4: (0, 1, 15, 16, 37)}  # blocks of one token, shorter and longer than a chunk
CASES = {
    "selective": Case(),
    "no decay": Case(kinds=("none", "none"), padded="holes"),
    "fixed": Case(kinds=("fixed", "fixed_vector"), padded="right"),
    "one side": Case(kinds=("none", "selective"), diagonal_weight=2.0, padded="left"),
    "vector": Case(kinds=("selective_vector", "fixed"), level="mixed", padded="holes"),
    "closed gates": Case(level="mixed", diagonal_weight=0.5),
    "forward": Case(direction="forward", kinds=("selective_vector", "none")),
    "backward": Case(direction="backward", kinds=("selective", "fixed")),
    "all padded": Case(padded="all"),
    "signed, unscaled": Case(signed=True, scaled=False),
    "slow": Case(level="slow", kinds=("selective", "selective_vector")),
}
FORMS = ("parallel", "recurrent", "chunkwise")


def share(x, rank, cuts):
    """This rank's tokens of a tensor that has them in dimension 1."""
    return x[:, cuts[rank] : cuts[rank + 1]]


def outputs(case, form, tensors, mask, group=None):
    options = case.options() | {"form": form, "chunk_size": case.chunk_size, "padding_mask": mask, "sequence_group": group}
    if case.scaled and not case.signed:
        return [bidirectional_linear_attention(*tensors, **options)]
    return bidirectional_linear_attention_parts(*tensors, **options)


def worst_error(case, form, group, cuts):
    """Of outputs and gradients of this rank against the whole sequence on one device."""
    rank = dist.get_rank(group)
    *tensors, mask = case.tensors()
    whole = leaves(tensors)
    expected = outputs(case, form, whole, mask)
    # weights of the whole sum, each rank with its part of it
    gradient = gradients(expected, whole, case.dtype)
    mine = leaves([x if x is None or x.ndim < 3 else share(x, rank, cuts) for x in tensors])
    found = outputs(case, form, mine, None if mask is None else share(mask, rank, cuts), group)
    worst = max(error(y, share(e, rank, cuts), e) for y, e in zip(found, expected, strict=True))
    total = 0.0
    for number, y in enumerate(found):
        generator = torch.Generator().manual_seed(number)
        weights = torch.rand(expected[number].shape, generator=generator, dtype=torch.float64) - 0.5
        total = total + (y.double() * share(weights.to(y.device, case.dtype), rank, cuts).double()).sum()
    wanted = [x for x in mine if x is not None]
    grads = iter(torch.autograd.grad(total, wanted, allow_unused=True))
    for x, e in zip(mine, gradient, strict=True):
        if x is None:
            continue
        g = next(grads)
        g = torch.zeros_like(x) if g is None else g
        if x.ndim < 3:  # fixed: each rank's share
            g = g.clone()
            dist.all_reduce(g, group=group)
            worst = max(worst, error(g, e))
        else:
            worst = max(worst, error(g, share(e, rank, cuts), e))
    return worst


def wrong_gates(group, cuts, convention):
    """Largest difference of step decays made from this rank's gates and its neighbours', and of the gate's gradient."""
    rank = dist.get_rank(group)
    gate = (-torch.rand(2, cuts[-1], 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).requires_grad_()
    whole = step_log_decays(gate, convention)
    (expected,) = torch.autograd.grad(sum(x.square().sum() for x in whole), gate)
    mine = share(gate, rank, cuts).detach().clone().requires_grad_()
    found = step_log_decays(mine, convention, sequence_group=group)
    (grad,) = torch.autograd.grad(sum(x.square().sum() for x in found), mine)
    pairs = [*zip(found, whole, strict=True), (grad, expected)]
    return max((x - (y if y.shape == x.shape else share(y, rank, cuts))).abs().max().item() for x, y in pairs)


def process(rank):
    """One of four; what it found."""
    sequence_parallel.SLICE_ELEMENTS = 2 * 3 * 5 * 4  # slices of four tokens
    groups = {2: dist.new_group([0, 1]), 4: dist.group.WORLD}
    found = {}
    for ranks, group in groups.items():
        if rank >= ranks:
            continue
        for name, case in CASES.items():
            for dtype in (torch.float64, torch.float32):
                for form in FORMS:
                    of = dataclasses.replace(case, dtype=dtype)
                    found[f"{ranks} {name} {str(dtype)[6:]} {form}"] = worst_error(of, form, group, CUTS[ranks])
        for convention in CONVENTIONS:
            found[f"{ranks} gates {convention} float64"] = wrong_gates(group, CUTS[ranks], convention)
    try:
        if rank > 1:
            step_log_decays(torch.zeros(1, 2, 1), sequence_group=groups[2])
    except (ValueError, TypeError) as refused:
        found["refused"] = str(refused)
    return found


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    return on_ranks(process, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("ranks", CUTS)
@pytest.mark.parametrize("name", [*CASES, "gates"])
def test_outputs_and_gradients_are_those_of_one_device(answers, ranks, name):
    for answer in answers[:ranks]:
        found = {key: worst for key, worst in answer.items() if key.startswith(f"{ranks} {name} ")}
        assert len(found) == (len(CONVENTIONS) if name == "gates" else 2 * len(FORMS))
        for key, worst in found.items():
            assert worst <= TOLERANCE[torch.float64 if "float64" in key else torch.float32], key


def test_every_rank_has_tokens():
    assert all(right > left for cuts in CUTS.values() for left, right in pairwise(cuts))


def test_a_process_outside_of_the_group_is_refused(answers):
    assert all("sequence_group: expected a process group" in answer["refused"] for answer in answers[2:])


def test_without_distributed_it_is_one_sentence():
    q = torch.rand(1, 4, 1, 2)
    with pytest.raises(ValueError, match="sequence_group: torch"):
        bidirectional_linear_attention(q, q, q, sequence_group=object())
    with pytest.raises(ValueError, match="before and after: expected None beside sequence_group"):
        step_log_decays(-q[..., 0], before=-q[:, 0, :, 0], sequence_group=object())
