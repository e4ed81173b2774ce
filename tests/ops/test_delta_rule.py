"""The delta rule against its recurrences in a Python loop, in float64, and against flash-linear-attention's naive references."""

import itertools
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it says that there is no GPU
    from fla.ops.delta_rule.naive import delta_rule_recurrence
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule

from lba_exp.ops import bidirectional_delta_rule, delta_chunks, delta_rule, step_log_decays

from .compare import TOLERANCE, error, leaves

FORMS = ("parallel", "recurrent", "chunkwise")
LEVELS = torch.tensor([0.0, 1e-5, 1.0, 8.0, 1e4], dtype=torch.float64)


def one_direction(q, k, v, beta, log_decay, order):
    """q_i^T S_i of the tokens in that order, written as the equation stands."""
    batch, _, heads, width = q.shape
    state = torch.zeros(batch, heads, width, v.shape[-1], dtype=v.dtype)
    one, rows = torch.eye(width, dtype=v.dtype), {}
    for i in order:
        key, strength = k[:, i, :, :, None], beta[:, i, :, None, None]
        decay = 1.0
        if log_decay is not None:
            decay = (log_decay if log_decay.ndim == 1 else log_decay[:, i]).exp()[..., None, None]
        state = decay * (one - strength * key @ key.mT) @ state + strength * key @ v[:, i, :, None]
        rows[i] = (q[:, i, :, None] @ state)[:, :, 0]
    return torch.stack([rows[i] for i in range(q.shape[1])], dim=1)


def definition(q, k, v, beta, forward, backward, *, diagonal_weight=1.0, direction="both", padding_mask=None):
    if padding_mask is not None:
        real = padding_mask[:, :, None, None]
        q, k, v, beta = q * real, k * real, v * real, beta * real[..., 0]
    tokens, y, count = range(q.shape[1]), 0, 0
    if direction != "backward":
        y, count = y + one_direction(q, k, v, beta, forward, tokens), count + 1
    if direction != "forward":
        y, count = y + one_direction(q, k, v, beta, backward, reversed(tokens)), count + 1
    return y + (diagonal_weight - count) * (beta * (q * k).sum(-1))[..., None] * v


def operands(
    seed=0, batch=2, length=13, heads=2, key_width=4, value_width=3, kinds=("selective", "selective"), level="mild", highest=1.0
):
    """float64 q, k of length 1, v, beta up to ``highest`` and both log decays, exact in float32."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    shape = (batch, length, heads)
    q, k = (x / x.norm(dim=-1, keepdim=True) for x in (normal(*shape, key_width), normal(*shape, key_width)))
    beta = highest * torch.rand(shape, generator=generator)
    decays = []
    for kind in kinds:
        size = (heads,) if kind == "fixed" else shape
        gate = torch.rand(size, generator=generator)
        if level == "slow":
            gate = 1e-3 * gate
        elif level == "mixed":
            gate = LEVELS[torch.randint(5, size, generator=generator)].float() * (0.5 + 0.5 * gate)
        decays.append(None if kind == "none" else -gate.double())
    return [q.double(), k.double(), normal(*shape, value_width).double(), beta.double(), *decays]


def outputs_and_gradients(function, inputs):
    """y, and the gradients of a fixed random sum of it: zeros where y does not depend on an input."""
    inputs = leaves(inputs)
    y = function(*inputs)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    wanted = [x for x in inputs if x is not None]
    grads = torch.autograd.grad((y * weights.to(y.dtype)).sum(), wanted, allow_unused=True)
    return [y, *(torch.zeros_like(x) if g is None else g for x, g in zip(wanted, grads, strict=True))]


def check(inputs, form, dtype=torch.float64, chunk_size=4, **options):
    cast = [None if x is None else x.to(dtype) for x in inputs]
    ours = outputs_and_gradients(lambda *x: bidirectional_delta_rule(*x, form=form, chunk_size=chunk_size, **options), cast)
    expected = outputs_and_gradients(lambda *x: definition(*x, **options), inputs)
    for one, other in zip(ours, expected, strict=True):
        assert one.dtype == dtype
        if other.norm() < 1e-12:  # the gradient of a decay that acts on an empty state
            assert one.norm() < 1e-6
        else:
            assert error(one, other) <= TOLERANCE[dtype]


KINDS = ("none", "fixed", "selective")


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 2),
    length=st.one_of(st.integers(1, 9), st.sampled_from([16, 17])),
    heads=st.integers(1, 3),
    key_width=st.integers(1, 5),
    value_width=st.integers(1, 5),
    kinds=st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)),
    level=st.sampled_from(["mild", "slow", "mixed"]),
    highest=st.sampled_from([0.0, 1.0, 2.0]),
    weight=st.sampled_from([1.0, 2.0, 0.0, -0.7]),
    direction=st.sampled_from(["both", "forward", "backward"]),
    padded=st.booleans(),
    chunk_size=st.sampled_from([1, 2, 3, 8, 64]),
    form=st.sampled_from(FORMS),
)
def test_outputs_and_gradients_are_those_of_the_definition(seed, weight, direction, padded, chunk_size, form, **shape):
    inputs = operands(seed, **shape)
    mask = None
    if padded:
        mask = torch.rand(inputs[0].shape[:2], generator=torch.Generator().manual_seed(seed)) > 0.3
    check(inputs, form, chunk_size=chunk_size, diagonal_weight=weight, direction=direction, padding_mask=mask)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("level", "highest"), list(itertools.product(["mild", "slow", "mixed"], [1.0, 2.0])))
def test_in_float32(form, level, highest):
    inputs = operands(length=150, key_width=16, value_width=8, level=level, highest=highest, kinds=("selective", "fixed"))
    check(inputs, form, torch.float32, chunk_size=32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(form, dtype):
    q, k, v, beta, forward, backward = operands(length=70, key_width=16)
    rounded = [x.to(dtype) for x in (q, k, v, beta)]
    expected = definition(*(x.double() for x in rounded), forward, backward)
    with torch.autocast("cpu", torch.bfloat16):
        y = bidirectional_delta_rule(*rounded, forward.float(), backward.float(), form=form, chunk_size=16)
    assert y.dtype == dtype and error(y, expected) <= 5e-3  # the rounding of the output alone


@pytest.mark.parametrize("form", ["recurrent", "chunkwise"])
@pytest.mark.parametrize(("level", "highest"), [("slow", 1e-2), ("slow", 2.0), ("none", 1.0)])
def test_long_sequences_in_float32(form, level, highest):
    """Forms against one another: 64 chunks, which are joined in groups."""
    kinds = ("none", "none") if level == "none" else ("selective", "fixed")
    inputs = operands(batch=1, length=4096, key_width=8, value_width=8, level=level, highest=highest, kinds=kinds)
    expected = bidirectional_delta_rule(*inputs, form="recurrent")
    y = bidirectional_delta_rule(*(None if x is None else x.float() for x in inputs), form=form)
    assert error(y, expected) <= 2e-5


@pytest.mark.parametrize("group", [2, 3, 32])
def test_chunks_are_joined_in_groups_of_groups(monkeypatch, group):
    monkeypatch.setattr(delta_chunks, "GROUP", group)
    check(operands(length=23, level="mixed"), "chunkwise", chunk_size=1)
    check(operands(length=37, kinds=("none", "none")), "chunkwise", chunk_size=2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gate", [0.0, -1e4, -math.inf])
def test_open_and_closed_gates(form, gate):
    q, k, v, beta, *_ = operands()
    decay = torch.full(beta.shape, gate, dtype=torch.float64)
    y, *gradients = outputs_and_gradients(
        lambda *x: bidirectional_delta_rule(*x, form=form, chunk_size=4), [q, k, v, beta, decay, decay.clone()]
    )
    open_or_empty = definition(q, k, v, beta, None, None) if gate == 0 else (beta * (q * k).sum(-1))[..., None] * v
    assert error(y, open_or_empty) <= 1e-10
    assert all(x.isfinite().all() for x in gradients)


@pytest.mark.parametrize("form", FORMS)
def test_both_directions_are_the_sum_less_one_diagonal(form):
    q, k, v, beta, forward, backward = operands()
    both = bidirectional_delta_rule(q, k, v, beta, forward, backward, form=form, chunk_size=4)
    there = bidirectional_delta_rule(q, k, v, beta, forward, direction="forward", form=form, chunk_size=4)
    turned = (x.flip(1) for x in (q, k, v, beta, backward))
    back = bidirectional_delta_rule(*turned, direction="forward", form=form, chunk_size=4).flip(1)
    assert error(both, there + back - (beta * (q * k).sum(-1))[..., None] * v) <= 1e-12
    # a direction that is left out has no decay
    again = bidirectional_delta_rule(q, k, v, beta, backward * 3, backward, direction="backward", form=form, chunk_size=4)
    assert torch.equal(again, bidirectional_delta_rule(q, k, v, beta, None, backward, direction="backward", form=form, chunk_size=4))
    assert error(again, back) <= 1e-12


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("direction", ["both", "forward", "backward"])
def test_padding_equals_cutting_off(form, direction):
    inputs, options = operands(length=17), {"direction": direction, "form": form, "chunk_size": 4}
    mask = torch.zeros(2, 17, dtype=torch.bool)
    mask[0, 3:12] = True  # the second sequence has no token at all
    poisoned = [x.masked_fill(~mask.view(2, 17, *[1] * (x.ndim - 2)), math.nan) for x in inputs[:4]]
    y, *gradients = outputs_and_gradients(
        lambda *x: bidirectional_delta_rule(*x, padding_mask=mask, **options), [*poisoned, *inputs[4:]]
    )
    assert not y[~mask].any()
    cut = bidirectional_delta_rule(*(x[:1, 3:12] for x in inputs), **options)
    assert error(y[:1, 3:12], cut) <= 1e-12
    for gradient in gradients[:4]:
        assert gradient.isfinite().all() and not gradient[~mask].any()


def causal(form):
    def run(q, k, v, beta, gate=None):
        decay = None if gate is None else step_log_decays(gate, "query")[0]
        return bidirectional_delta_rule(q, k, v, beta, decay, direction="forward", form=form, chunk_size=16)

    return run


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gated", [False, True])
def test_forward_is_that_of_flash_linear_attention(form, gated):
    q, k, v, beta, gate, _ = (x.float() for x in operands(length=67, key_width=16, value_width=24))

    def theirs(q, k, v, beta, gate=None):
        if gate is not None:
            return naive_recurrent_gated_delta_rule(q, k, v, beta, gate, scale=1.0)[0]
        heads_first = (x.transpose(1, 2) for x in (math.sqrt(16) * q, k, v, beta))  # it multiplies q by Dk^-0.5
        return delta_rule_recurrence(*heads_first)[0].transpose(1, 2)

    inputs = [q, k, v, beta, gate] if gated else [q, k, v, beta]
    for one, other in zip(outputs_and_gradients(causal(form), inputs), outputs_and_gradients(theirs, inputs), strict=True):
        assert error(one, other) <= 2e-5


def test_auto_is_parallel_for_short_and_chunkwise_for_long_sequences():
    for length, form in ((delta_rule.PARALLEL_UP_TO, "parallel"), (delta_rule.PARALLEL_UP_TO + 1, "chunkwise")):
        inputs = [x.float() for x in operands(length=length)]
        assert torch.equal(bidirectional_delta_rule(*inputs), bidirectional_delta_rule(*inputs, form=form))


@pytest.mark.parametrize("form", ["parallel", "chunkwise"])
def test_higher_derivatives(form):
    inputs = leaves(operands(batch=1, length=5, heads=1, key_width=2, value_width=2, kinds=("selective", "fixed")))

    def run(*x):  # keys of length 1, beta and decays in their range, wherever the check goes
        return bidirectional_delta_rule(*x[:3], x[3].sigmoid(), -x[4].square(), -x[5].square(), form=form, chunk_size=2)

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_the_recurrent_form_has_first_derivatives_in_reverse_mode():
    inputs = leaves(operands())
    y = bidirectional_delta_rule(*inputs, form="recurrent")
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(y.sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(lambda q: bidirectional_delta_rule(q, *inputs[1:], form="recurrent"), (inputs[0],), (inputs[0],))


def test_the_recurrent_form_keeps_no_states_in_training():
    length, saved = 200, []
    inputs = leaves(operands(batch=1, length=length, heads=1, key_width=32, value_width=32))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        bidirectional_delta_rule(*inputs, form="recurrent")
    assert sum(saved) < 20 * length * 32  # the states alone would be 2 L 32^2


@pytest.mark.parametrize("form", FORMS)
def test_compiles_to_one_graph(form):
    inputs = [x.float() for x in operands(length=9)]

    def run(*x):
        return bidirectional_delta_rule(*x, form=form, chunk_size=4)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for one, other in zip(outputs_and_gradients(compiled, inputs), outputs_and_gradients(run, inputs), strict=True):
        torch.testing.assert_close(one, other)


def test_the_graph_hardly_grows_with_the_length():
    sizes = []
    for length in (200, 4800):
        graphs = []

        def keep(graph, _, graphs=graphs):
            graphs.append(graph)
            return graph.forward

        inputs = [x.float() for x in operands(length=length, batch=1, heads=1)]
        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(bidirectional_delta_rule, fullgraph=True, backend=keep, dynamic=False)(*inputs, form="chunkwise", chunk_size=4)
        sizes.append(len(graphs[0].graph.nodes))
    assert sizes[1] < 2 * sizes[0]  # 50 and 1,200 chunks


@pytest.mark.parametrize("decays", [False, True])
def test_the_opaque_operations_keep_torchs_rules(decays):
    q, k, v, beta, gate, _ = (x.detach().requires_grad_() for x in operands(length=5))
    rows = [x.transpose(0, 1).flatten(1, 2) for x in (q, k, v, beta)]
    rows.append(gate.transpose(0, 1).flatten(1, 2) if decays else None)
    torch.library.opcheck(delta_rule._run, rows)
    torch.library.opcheck(delta_rule._run_backward, [None if x is None else x.detach() for x in (rows[2], *rows)])


Q, BETA, GATE = torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)
MISTAKES = {
    "k: expected the shape of q": {"k": Q[..., :4]},
    "v: expected a non-empty tensor": {"v": Q[:, :0]},
    r"beta: expected a tensor \(B, L, H\) = \(2, 3, 4\), got \(2, 3\)": {"beta": BETA[..., 0]},
    "beta: expected a tensor .* got float": {"beta": 0.5},
    "beta: expected float64, float32, bfloat16 or float16, got torch.int64": {"beta": BETA.long()},
    "beta: expected the device of q, cpu, got meta": {"beta": BETA.to("meta")},
    "beta: expected values from 0 to 2, got some from -1 to -1": {"beta": BETA - 1},
    "beta: expected values from 0 to 2, got some from 2.5 to 2.5": {"beta": BETA + 2.5},
    "forward_log_decay: expected log decays <= 0": {"forward_log_decay": GATE + 1},
    "forward_log_decay: the delta rule takes one decay per head": {"forward_log_decay": torch.zeros(4, 5)},
    "backward_log_decay: the delta rule takes one decay per head": {"backward_log_decay": torch.zeros(2, 3, 4, 5)},
    "backward_log_decay: expected dtype torch.float32": {"backward_log_decay": GATE.double()},
    "diagonal_weight: expected a finite number": {"diagonal_weight": math.nan},
    "direction: got 'sideways'": {"direction": "sideways"},
    "padding_mask: expected a bool tensor": {"padding_mask": BETA[..., 0]},
    "chunk_size: expected an integer >= 1": {"chunk_size": 0},
    "form: the delta rule has no fused form, valid are 'parallel', 'recurrent', 'chunkwise', 'auto'": {"form": "fused"},
    "form: got 'recurent', valid are .*; did you mean 'recurrent'": {"form": "recurent"},
    "form: got 'blockwise'": {"form": "blockwise"},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_named(message):
    arguments = {"q": Q, "k": Q, "v": Q, "beta": BETA, "forward_log_decay": GATE} | MISTAKES[message]
    with pytest.raises(ValueError, match=message):
        bidirectional_delta_rule(**arguments)
