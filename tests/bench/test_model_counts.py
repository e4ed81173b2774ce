"""What operators take by formula, against what torch counts, and against loops."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lba_exp import build
from lba_exp.bench import memory_fit, model, model_settings
from lba_exp.bench.model_counts import DELTA, SCAN, Call, operator_flops, read_counts

LENGTH = 24


def built(name, width=8, heads=2, depth=2, length=LENGTH):
    sizes = (f"model.width={width}", f"model.heads={heads}", f"model.depth={depth}")
    settings = model_settings.ModelSettings((name,), sizes, lengths=(length,), classes=5, device="cpu")
    (cfg,) = model_settings.configurations(settings).values()
    torch.manual_seed(0)
    return build.model(cfg.model, model.data_spec(settings, length)).eval(), torch.randn(1, length, 1)


def counted(network, inputs):
    """Operations of all matrix products, and those of the linear layers."""
    linear = []
    hooks = [
        m.register_forward_hook(lambda m, args, y: linear.append(2 * args[0].numel() * m.out_features))
        for m in network.modules()
        if isinstance(m, nn.Linear)
    ]
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(inputs)
    for hook in hooks:
        hook.remove()
    return counter.get_total_flops(), sum(linear)


@pytest.mark.parametrize("name", ["softmax", "lion_lit", "lion_s"])
def test_the_parallel_form_is_its_matrix_products(name):
    network, inputs = built(name)
    if network.forms:
        network.set_form("parallel")
    total, linear = counted(network, inputs)
    calls = read_counts(network, inputs).calls
    gates = 2 * 2 * LENGTH * 8 * 2 if name == "lion_s" else 0  # called in float32 as functions, not as layers
    assert operator_flops(calls, "parallel" if network.forms else None, None) == 2 * 2 * 2 * LENGTH**2 * (4 + 4)
    assert total - linear in (2 * 2 * 2 * LENGTH**2 * (4 + 4), 2 * 2 * 2 * LENGTH**2 * (4 + 4) + gates)


def test_the_recurrent_form_by_a_loop():
    keys, values, length, directions = 3, 5, 7, 2
    done = 0
    for _ in range(directions):
        for _ in range(length):
            for _ in range(keys):
                for _ in range(values + 1):
                    done += 1  # decay
                    done += 2  # key times value, added
                    done += 2  # query times state, added
    for _ in range(length):
        done += 2 * keys + 2 * values  # the diagonal: query times key, and that times the value, added
    call = Call(length, 1, keys, values, directions, True, True)
    assert operator_flops([call], "recurrent", None) == done
    assert operator_flops([call, call], "recurrent", None) == 2 * done
    assert operator_flops([Call(length, 4, keys, values, directions, True, True)], "recurrent", None) == 4 * done
    without = Call(length, 1, keys, values, directions, True, False)
    assert operator_flops([without], "recurrent", None) == done - directions * length * keys * (values + 1)


def test_chunks_and_kernels():
    call = Call(128, 1, 8, 8, 2, True, True)
    inside, states = 2 * 128 * 16 * (8 + 9), 4 * 2 * 128 * 8 * 9
    assert operator_flops([call], "chunkwise", 16) == operator_flops([call], "fused", 16) == inside + states
    assert operator_flops([call], "chunkwise", 10**6) == 2 * 128 * 128 * (8 + 9) + states, "no chunk is longer than the sequence"
    undivided = Call(128, 1, 8, 8, 1, False, True)
    assert operator_flops([undivided], "chunkwise", 16) == 2 * 128 * 16 * (8 + 8) + 4 * 128 * 8 * 8
    scan = Call(128, 1, 8, 1, 1, False, True, SCAN)
    assert operator_flops([scan], "fused", 16) == operator_flops([scan], "recurrent", None) < operator_flops([scan], "chunkwise", 16)
    assert operator_flops([Call(128, 1, 8, 8, 2, True, True, DELTA)], "recurrent", None) is None


@pytest.mark.parametrize(
    ("name", "calls", "first"),
    [
        ("lion_s", 2, Call(LENGTH, 2, 4, 4, 2, True, True)),
        ("lion_lit", 2, Call(LENGTH, 2, 4, 4, 2, True, False)),
        ("lion_lit_mlm", 2, Call(LENGTH, 2, 4, 4, 2, False, False)),
        ("hydra", 4, Call(LENGTH, 2, 64, 8, 1, False, True)),
        ("vim", 4, Call(LENGTH, 16, 16, 1, 1, False, True, SCAN)),
        ("softmax", 2, Call(LENGTH, 2, 4, 4, 2, True, False)),
    ],
)
def test_calls_of_presets(name, calls, first):
    found = read_counts(*built(name))
    assert len(found.calls) == calls and found.calls[0] == first and found.token_bytes > 0


def test_the_delta_rule_has_no_formula():
    found = read_counts(*built("deltanet"))
    assert {call.kind for call in found.calls} == {DELTA} and operator_flops(found.calls, "recurrent", None) is None


def test_a_tokens_bytes_grow_as_the_width():
    one, two = (read_counts(*built("lion_s", width=8 * n, heads=2 * n)).token_bytes for n in (1, 2))
    # at the mixer: stream, norm, q, k, v, log decay in two directions, numerator, denominator, output; all float32
    assert two == 2 * one and one >= 4 * (8 + 8 + 3 * 8 + 2 + 8 + 2 + 8)
    assert read_counts(*built("lion_s", length=2 * LENGTH)).token_bytes == one


def test_a_line_is_fitted():
    slope, intercept, r_squared = memory_fit.fit([1, 2, 3, 4], [5.0, 7.0, 9.0, 11.0])
    assert (slope, intercept, r_squared) == (2, 3, 1)
    slope, _, r_squared = memory_fit.fit([1, 2, 3, 4], [1.0, 3.0, 2.0, 4.0])
    assert slope == pytest.approx(0.8) and r_squared == pytest.approx(0.64)
    assert memory_fit.fit([1, 2], [3.0, 3.0]) == (0, 3, 1)


def test_lines_take_what_was_measured():
    def cell(tokens, **others):
        about = {"model": "m", "form": "recurrent", "tokens": tokens, "batch": 2, "forward_bytes": 100 * 2 * tokens + 7, "state_size": 5}
        return about | {"token_bytes": 80.0} | others

    cells = [cell(100), cell(512), cell(1024), cell(2048), cell(4096, forward_bytes=None), cell(512, form="parallel", forward_bytes=1)]
    (line,) = memory_fit.fits(cells)
    assert (line["points"], line["shortest"], line["longest"]) == (3, 1024, 4096)
    assert line["bytes_per_token"] == pytest.approx(100) and line["over_predicted"] == pytest.approx(1.25)
    assert line["intercept_bytes"] == pytest.approx(7) and (line["state_size"], line["state_constant"]) == (5, True)
    assert memory_fit.fits(cells[:3]) == []
    (line,) = memory_fit.fits([*cells, cell(8192, state_size=6)])
    assert (line["state_size"], line["state_constant"]) == (None, False)
