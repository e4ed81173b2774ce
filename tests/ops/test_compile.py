"""torch.compile(fullgraph=True): no graph breaks, the same outputs and gradients, and no loop over chunks in the graph."""

import pytest
import torch

from lba_exp.ops import bidirectional_linear_attention, start_state, stream

from .compare import Case, error


def compare(case, form, backend, dynamic=None):
    *tensors, mask = case.tensors()

    def function(q, k, v, f, b):
        return bidirectional_linear_attention(q, k, v, f, b, form=form, padding_mask=mask, chunk_size=case.chunk_size)

    torch._dynamo.reset()
    results = []
    for run in (torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic), function):
        leaves = [None if x is None else x.clone().requires_grad_() for x in tensors]
        y = run(*leaves)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x for x in leaves if x is not None])])
    for one, other in zip(*results, strict=True):
        assert error(one, other) <= 2e-5


@pytest.mark.parametrize("kinds", [("selective", "fixed"), ("none", "selective_vector")], ids="-".join)
@pytest.mark.parametrize("form", ["parallel", "chunkwise", "recurrent"])
def test_one_graph(form, kinds):
    compare(Case(kinds=kinds, length=41, padded="holes", batch=1, heads=2), form, "aot_eager")


@pytest.mark.parametrize("form", ["chunkwise", "recurrent"])
def test_the_graph_does_not_grow_with_the_length(form):
    sizes = []
    for length in (200, 400, 12800) if form == "chunkwise" else (50, 100, 600):
        graphs = []

        def keep(graph, _, graphs=graphs):
            graphs.append(graph)
            return graph.forward

        q, k, v, f, b, _ = Case(length=length, batch=1, heads=1).tensors()
        torch._dynamo.reset()
        function = torch.compile(bidirectional_linear_attention, fullgraph=True, backend=keep, dynamic=False)
        with torch.no_grad():
            y = function(q, k, v, f, b, form=form, chunk_size=4)
            assert error(y, bidirectional_linear_attention(q, k, v, f, b, form=form, chunk_size=4)) < 2e-5
        sizes.append(len(graphs[0].graph.nodes))
    # two levels of 32, then a third
    assert sizes[0] == sizes[1] and sizes[2] < 2 * sizes[0]


def test_streaming_in_one_graph():
    q, k, v, _, b, _ = Case(length=5).tensors()

    def function(state, q, k, v, decay):
        return stream(state, q, k, v, decay, direction="backward")

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    arguments = (torch.rand_like(start_state(2, 3, 4, 5)), q, k, v, b)
    assert all(torch.equal(one, other) for one, other in zip(compiled(*arguments), function(*arguments), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["parallel", "chunkwise", "recurrent"])
def test_lengths_as_symbols(form):
    def function(*inputs):
        return bidirectional_linear_attention(*inputs, form=form, chunk_size=16)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (37, 41, 70):
        inputs = [x.requires_grad_() for x in Case(length=length, batch=1, heads=2).tensors()[:5]]
        results = []
        for run in (compiled, function):
            y = run(*inputs)
            results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
        assert all(error(one, other) <= 2e-5 for one, other in zip(*results, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [("none", "none"), ("selective", "selective"), ("selective_vector", "fixed")], ids="-".join)
@pytest.mark.parametrize("form", ["parallel", "chunkwise", "recurrent"])
def test_inductor(form, kinds):
    compare(Case(kinds=kinds, length=300, padded="holes", batch=1, heads=2), form, "inductor", dynamic=False)
