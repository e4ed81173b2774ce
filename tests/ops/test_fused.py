"""The fused form in Triton's interpreter, in float32: kernels against direct summation, and the operation of torch around them."""

import contextlib
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import distributed as dist
from torch.autograd import forward_ad

from lba_exp.ops import bidirectional_linear_attention, bidirectional_linear_attention_parts, can_run_fused, choose_form, estimate_bytes
from lba_exp.ops.fused import operator

from .compare import Case, cases, check, error, gradients, leaves

pytestmark = pytest.mark.skipif(not operator.INTERPRETED, reason="needs Triton, and its interpreter: on a GPU test_fused_gpu.py runs")
if operator.INTERPRETED:
    from lba_exp.ops.fused import launch
    from lba_exp.ops.fused import plan as plans
    from lba_exp.ops.fused.candidates import CANDIDATES

    from .poison import poisoned

OPS = torch.ops.lba_exp


@contextlib.contextmanager
def blocks(size, a_segment=2):
    """Blocks of ``size`` tokens, tiles of 16, ``a_segment`` blocks a segment: several of each in a short sequence."""
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "segments", lambda count, *_: (-(-count // a_segment), a_segment))
        for kind in ("forward", "backward", "linear"):
            plan = CANDIDATES[plans.key_of(kind, torch.float32, 16, 1)][0]
            columns = 32 if size > 32 and kind == "backward" else 16  # a tile of keys read by tiles of fewer queries
            tiles = {"rows": 16, "columns": columns, "state_columns": 16}
            stack.enter_context(plans.override(kind, dataclasses.replace(plan, block=size, **tiles)))
        yield


def one_decay_per_head(case):
    return dataclasses.replace(case, kinds=tuple(kind.removesuffix("_vector") for kind in case.kinds))


@given(case=cases([torch.float32]).map(one_decay_per_head))
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
def test_contract(case):
    with blocks(16, (1, 2, 99)[case.seed % 3]), poisoned():
        check(dataclasses.replace(case, batch=1), "fused")  # an interpreted program takes its time


LONGER = [
    Case(length=97, padded="holes"),
    Case(length=70, level="mixed", padded="right"),
    Case(length=97, kinds=("selective", "fixed"), signed=True, direction="forward", padded="left"),
    Case(length=70, kinds=("none", "selective"), scaled=False, direction="backward", diagonal_weight=0.5),
    Case(length=97, kinds=("none", "none"), padded="holes"),
    Case(length=70, kinds=("none", "none"), signed=True, diagonal_weight=2.0),
    Case(length=37, kinds=("fixed", "none"), key_width=20, value_width=33),
    Case(length=97, level="slow", direction="forward"),
    Case(length=97, level="slow", kinds=("fixed", "selective"), scaled=False, signed=True),
    Case(length=97, level="slow", kinds=("selective", "none"), signed=True, padded="right"),
]


@pytest.mark.parametrize("case", LONGER, ids=range(len(LONGER)))
def test_several_blocks_tiles_and_segments(case):
    for size in (16, 32) if case.length > 70 else (64,):
        with blocks(size, 3), poisoned():
            check(dataclasses.replace(case, batch=1, heads=2), "fused")


@pytest.mark.parametrize("case", [Case(length=37), Case(length=200, level="slow", signed=True, padded="holes")], ids=("one", "two"))
def test_pairs_around_a_tile(case):
    """Blocks of eight tiles: decays whose pairs lie on both sides of their tile."""
    with blocks(128), poisoned():
        plan = dataclasses.replace(plans._OVERRIDES["backward"], columns=16)
        with plans.override("backward", plan):
            check(dataclasses.replace(case, batch=1, heads=2), "fused")


@pytest.mark.slow
@given(case=cases([torch.float32]).map(one_decay_per_head))
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_contract_at_length(case):
    with blocks((16, 32)[case.seed % 2], (1, 2, 3, 99)[case.seed % 4]), poisoned():
        check(case, "fused")


def shifted_gate(call):
    return lambda q, k, v, f, g, *rest: call(q, k, v, f.roll(1, dims=1), g, *rest)


def diagonal_twice(call):
    return lambda *args: call(*args[:7], dataclasses.replace(args[7], weight=2 * args[7].weight), *args[8:])


def mask_ignored(call):
    return lambda q, k, v, f, g, mask, *rest: call(q, k, v, f, g, None, *rest)


@pytest.mark.parametrize("name", ["forward", "backward"])
@pytest.mark.parametrize("change", [shifted_gate, diagonal_twice, mask_ignored], ids=lambda x: x.__name__)
def test_planted_errors_are_found(name, change, monkeypatch):
    monkeypatch.setattr(launch, name, change(getattr(launch, name)))
    with blocks(16), pytest.raises(AssertionError, match="fused: relative errors"):
        check(Case(length=19, batch=1, heads=2, padded="holes"), "fused")


def test_closed_gates_nan_gates_and_no_division_by_zero():
    q, k, v, f, b, _ = Case(length=19, batch=1).tensors()
    closed = torch.full_like(f, -float("inf")).requires_grad_()
    y = bidirectional_linear_attention(q, k, v, closed, closed, form="fused", eps=0.0)
    y.sum().backward()
    assert torch.allclose(y, v, atol=1e-6) and not closed.grad.any()
    f[0, 5, 1] = float("nan")
    y, expected = (bidirectional_linear_attention(q, k, v, f, b, form=form) for form in ("fused", "parallel"))
    assert y[0, :, 1].isnan().any() and not y[0, :, 0].isnan().any() and expected[0, 5:, 1].isnan().all() == y[0, 5:, 1].isnan().all()
    mask = torch.arange(19)[None] < 11
    q.requires_grad_()
    y = bidirectional_linear_attention(q, k, v, None, b, form="fused", eps=0.0, padding_mask=mask)
    y.sum().backward()
    assert y.isfinite().all() and q.grad.isfinite().all() and not y[:, 11:].any()


# The operation of torch


def arguments(case, divided=True, parts=False):
    *tensors, mask = case.tensors()
    directions = [case.direction != "backward", case.direction != "forward"]
    order = torch.randperm(case.length) if divided else None
    return (*leaves(tensors), mask, order, case.diagonal_weight, *directions, divided or parts, divided, 1e-6)


@pytest.mark.parametrize(
    ("case", "options"),
    [
        (Case(length=19, batch=1, heads=2, padded="holes"), {}),
        (Case(length=17, batch=1, heads=2, kinds=("fixed", "none")), {"divided": False, "parts": True}),
        (Case(length=7, batch=1, heads=1, kinds=("none", "none"), direction="forward"), {"divided": False}),
    ],
    ids=["divided", "parts", "plain"],
)
def test_opcheck(case, options):
    with blocks(16):
        given = arguments(case, **options)
        torch.library.opcheck(OPS.fused_forward.default, given)
        with torch.no_grad():
            out, den = OPS.fused_forward(*given)
        q, k, v, f, b, mask, order, *rest = (x.detach() if isinstance(x, torch.Tensor) else x for x in given)
        kept = (out, den) if rest[4] else (None, None)
        grad_den = torch.rand_like(den) if rest[3] and not rest[4] else None
        needs = (f is not None and rest[1], b is not None and rest[2])
        torch.library.opcheck(
            OPS.fused_backward.default, (q, k, v, f, b, mask, order, *kept, torch.rand_like(out), grad_den, *needs, *rest)
        )


@pytest.mark.parametrize("dynamic", [False, True])
def test_one_graph(dynamic):
    def function(q, k, v, f, b, mask):
        num, den = bidirectional_linear_attention_parts(q, k, v, f, b, form="fused", padding_mask=mask)
        return bidirectional_linear_attention(q, k, v, f, b, form="fused", padding_mask=mask) + num / (den[..., None] + 1)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for length in (19, 23) if dynamic else (19,):
        *tensors, mask = Case(length=length, kinds=("selective", "fixed"), padded="holes", batch=1, heads=2).tensors()
        results = []
        for run in (compiled, function):
            inputs = leaves(tensors)
            y = run(*inputs, mask)
            results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
        assert all(error(one, other) <= 1e-6 for one, other in zip(*results, strict=True))


def test_export():
    class Module(torch.nn.Module):
        def forward(self, q, k, v, f, b):
            return bidirectional_linear_attention(q, k, v, f, b, form="fused")

    inputs = Case(length=19, batch=1, heads=2).tensors()[:5]
    program = torch.export.export(Module(), inputs)
    graphs = [x.graph for x in program.graph_module.modules() if isinstance(x, torch.fx.GraphModule)]
    assert any("fused_forward" in str(node.target) for graph in graphs for node in graph.nodes)
    assert torch.equal(program.module()(*inputs), Module()(*inputs))


def test_shapes_without_numbers():
    inputs = [x.to("meta").requires_grad_() for x in Case(length=19).tensors()[:5]]
    y = bidirectional_linear_attention(*inputs, form="fused")
    num, den = bidirectional_linear_attention_parts(*inputs, form="fused")
    (y.sum() + num.sum() + den.sum()).backward()
    assert y.shape == inputs[2].shape and den.shape == y.shape[:3] and all(x.grad.shape == x.shape for x in inputs)


def test_views_of_one_linear_layer_are_not_copied(monkeypatch):
    case, copied = Case(length=19, batch=2, heads=2, key_width=16, value_width=16), []
    rows_last = launch.rows_last

    def note(x):
        found = rows_last(x)
        copied.append(found is not x)
        return found

    monkeypatch.setattr(launch, "rows_last", note)
    *_, f, b, _ = case.tensors()
    tokens = torch.rand(2, 19, 3 * 2 * 16).requires_grad_()
    q, k, v = tokens.unflatten(-1, (3, 2, 16)).unbind(2)
    grads = []
    for inputs in ((q, k, v), (x.contiguous() for x in (q, k, v))):
        y = bidirectional_linear_attention(*inputs, f, b, form="fused")
        grads.append(torch.autograd.grad(y.square().sum(), tokens)[0])
    assert copied and not any(copied) and torch.equal(*grads)
    # a sum's gradient is one number, expanded
    y = bidirectional_linear_attention(q, k, v, f, b, form="fused", scaled=False)
    found = torch.autograd.grad(y.sum(), tokens, retain_graph=True)[0]
    assert torch.equal(found, torch.autograd.grad(y, tokens, torch.ones_like(y))[0])


@pytest.mark.parametrize("scaled", [True, False])
def test_autocast_changes_nothing(scaled):
    *tensors, mask = Case(length=19, padded="holes", batch=1).tensors()
    results = []
    for enabled in (False, True):
        inputs = leaves(tensors)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y = bidirectional_linear_attention(*inputs, form="fused", padding_mask=mask, scaled=scaled)
            results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    assert all(torch.equal(one, other) and one.dtype == torch.float32 for one, other in zip(*results, strict=True))


def test_mixed_dtypes():
    # bfloat16 beside float32: computed in float32
    q, k, v, f, b, _ = Case(length=19, batch=1).tensors()
    inputs = leaves((q.bfloat16(), k, v.half(), f, b))
    y = bidirectional_linear_attention(*inputs, form="fused")
    grads = torch.autograd.grad(y.float().sum(), inputs)
    assert y.dtype == torch.float16 and [g.dtype for g in grads] == [x.dtype for x in inputs]
    assert torch.equal(y, bidirectional_linear_attention(*(x.float() for x in inputs), form="fused").half())


@pytest.mark.parametrize("wanted", range(5))
def test_one_gradient_alone(wanted):
    *tensors, mask = Case(length=19, padded="holes", kinds=("selective", "fixed")).tensors()

    def gradient(*which):
        inputs = [x.clone().requires_grad_(i in which) for i, x in enumerate(tensors)]
        y = bidirectional_linear_attention(*inputs, padding_mask=mask, form="fused")
        return torch.autograd.grad(y.square().sum(), inputs[wanted])[0]

    assert torch.equal(gradient(wanted), gradient(*range(5)))


@pytest.mark.parametrize("part", [0, 1])
def test_one_of_the_parts_alone(part):
    results = []
    for form in ("fused", "parallel"):
        inputs = leaves(Case(length=19).tensors()[:5])
        y = bidirectional_linear_attention_parts(*inputs, form=form)[part]
        results.append(gradients([y], inputs, torch.float32))
    assert all(error(one, other) < 2e-5 for one, other in zip(*results, strict=True))


def test_a_direction_left_out_has_no_decay():
    q, k, v, f, b, _ = Case(length=19).tensors()
    for direction, other in (("forward", "backward"), ("backward", "forward")):
        own, other = f"{direction}_log_decay", f"{other}_log_decay"
        used, unused = leaves((f, b))
        y = bidirectional_linear_attention(q, k, v, **{own: used, other: unused}, direction=direction, form="fused")
        assert torch.equal(y, bidirectional_linear_attention(q, k, v, **{own: used}, direction=direction, form="fused"))
        grads = torch.autograd.grad(y.square().sum(), [used, unused], allow_unused=True)
        assert grads[0].any() and grads[1] is None


def test_training_keeps_no_states():
    inputs, kept = leaves(Case(length=70, key_width=16, value_width=16).tensors()[:5]), {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with blocks(16), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = bidirectional_linear_attention(*inputs, form="fused")
    size = sum(x.numel() * x.element_size() for x in (*inputs, y))
    assert sum(kept.values()) <= size + 4 * y[..., 0].numel()


def rank(number, folder):
    """One of two; prints the worst error of the cases that the form takes."""
    from .test_sequence_parallel import CASES, CUTS, worst_error

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=number, world_size=2)
    scalar = [case for case in CASES.values() if one_decay_per_head(case) == case]
    with blocks(16):
        print(len(scalar), max(worst_error(case, "fused", dist.group.WORLD, CUTS[2]) for case in scalar))
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_sequence_over_two_ranks(tmp_path):
    code = "import sys; from tests.ops.test_fused import rank; rank(int(sys.argv[1]), sys.argv[2])"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])}
    ranks = [subprocess.Popen([sys.executable, "-c", code, str(n), str(tmp_path)], env=environment, stdout=subprocess.PIPE) for n in (0, 1)]
    try:
        for process in ranks:
            count, worst = process.communicate(timeout=200)[0].split()
            assert int(count) >= 6 and float(worst) <= 2e-5
    finally:
        for process in ranks:
            process.kill()


def test_derivatives_that_it_does_not_have_are_refused():
    inputs = leaves(Case(length=7, batch=1, heads=1).tensors()[:5])
    y = bidirectional_linear_attention(*inputs, form="fused")
    for wanted in ({"inputs": inputs}, {"inputs": inputs[:1]}):
        with pytest.raises(RuntimeError, match=r"first derivatives only.*'parallel'"):
            torch.autograd.grad(y.sum(), **wanted, create_graph=True)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        inputs[3] = forward_ad.make_dual(inputs[3].detach(), torch.ones_like(inputs[3]))
        bidirectional_linear_attention(*inputs, form="fused")


REFUSED = [
    (Case(dtype=torch.float64), "form: 'fused' takes float32, bfloat16 and float16, got torch.float64; use 'chunkwise'"),
    (Case(kinds=("fixed_vector", "none")), "form: 'fused' has one decay per head, not one per channel; use 'chunkwise'"),
    (Case(kinds=("none", "selective_vector")), "form: 'fused' has one decay per head, not one per channel; use 'chunkwise'"),
    (Case(value_width=129), "form: 'fused' takes widths Dk and Dv up to 128, got 4 and 129; use 'chunkwise'"),
]


@pytest.mark.parametrize(("case", "sentence"), REFUSED, ids=["float64", "fixed vector", "selective vector", "width"])
def test_what_it_cannot_do_is_said(case, sentence):
    for function in (bidirectional_linear_attention, bidirectional_linear_attention_parts):
        with pytest.raises(ValueError, match=sentence):
            function(*dataclasses.replace(case, length=5).tensors()[:5], form="fused")


def test_without_a_gpu_and_without_triton(monkeypatch):
    inputs = Case(length=5).tensors()[:5]
    monkeypatch.setattr(operator, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"form: 'fused' runs on CUDA devices .*, got cpu; use 'chunkwise'"):
        bidirectional_linear_attention(*inputs, form="fused")
    monkeypatch.setattr(operator, "HAS_TRITON", False)
    with pytest.raises(ValueError, match="form: 'fused' needs Triton, which is not installed"):
        bidirectional_linear_attention(*inputs, form="fused")


def test_the_rule_of_auto(monkeypatch):
    for length in (1, 129, 10_000):
        assert choose_form(length, device="cuda") == choose_form(length, device="cuda:1", dtype=torch.bfloat16, key_width=128) == "fused"
        for options in ({"dtype": torch.float64}, {"vector": True}, {"key_width": 129}, {"value_width": 256}):
            assert choose_form(length, **{"device": "cuda", **options}) == choose_form(length, options.get("vector", False)) != "fused"
        assert choose_form(length) == choose_form(length, device="cpu") != "fused"  # the interpreter is no reason
    monkeypatch.setattr(operator, "HAS_TRITON", False)
    assert not can_run_fused("cuda") and choose_form(193, device="cuda") == "chunkwise"


def test_estimate_bytes():
    states = 2 * 4 * 65536 // 128 * 64 * 65  # at every 128 tokens, both directions
    assert 2 * states < estimate_bytes("fused", 1, 65536, 4, 64, 64, itemsize=2) < estimate_bytes("chunkwise", 1, 65536, 4, 64, 64)
