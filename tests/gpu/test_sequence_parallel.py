"""Sequences split over two GPUs with NCCL: the operator, models and a run against one GPU.

`pytest -m gpu tests/gpu/test_sequence_parallel.py`; `-m slow` goes the same way with two processes on the CPU and gloo. The figures of long
sequences are those of `lba-bench sequence`.
"""

import dataclasses

import pytest
import torch
from torch import distributed as dist

from lba_exp.bench.sequence import SequenceSettings, measure
from tests.models import test_sequence_parallel as models
from tests.ops import test_sequence_parallel as operator
from tests.ops.compare import TOLERANCE
from tests.ranks import on_ranks
from tests.test_sequence_parallel_runs import both

TWO_GPUS = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]
DTYPES = {str(dtype)[6:]: dtype for dtype in (torch.float64, torch.float32, torch.bfloat16)}
pytestmark = pytest.mark.timeout(600)


def process(rank):
    device = torch.device("cuda", rank) if dist.get_backend() == "nccl" else torch.device("cpu")
    found = {}
    for name, case in operator.CASES.items():
        for dtype in DTYPES:
            for form in ("parallel", "chunkwise", "auto"):
                of = dataclasses.replace(case, dtype=DTYPES[dtype], device=str(device))
                found[f"operator {name} {form} {dtype}"] = operator.worst_error(of, form, dist.group.WORLD, operator.CUTS[2])
    for name, (config, padded) in models.CASES.items():
        found[f"model {name} float64"] = models.worst_error(config, padded, dist.group.WORLD, models.CUTS[2], device)
    bench = measure(SequenceSettings(length=1000, check_length=301, repeats=2, device=device.type), device)
    found |= {f"bench {name} bfloat16": value for name, value in bench["error"].items()}
    assert [row["tokens"] for row in bench["rows"]] == [500, 1000] and all(row["both_ms"] > 0 for row in bench["rows"])
    return found


@pytest.mark.parametrize("backend", [pytest.param("nccl", marks=TWO_GPUS), pytest.param("gloo", marks=pytest.mark.slow)])
def test_operator_and_models_are_those_of_one_device(backend, tmp_path):
    for found in on_ranks(process, tmp_path, 2, backend=backend):
        wrong = {name: value for name, value in found.items() if not value <= TOLERANCE[DTYPES[name.split()[-1]]]}
        assert len(found) > 100 and not wrong


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_run_over_two_gpus_is_the_run_on_one(tmp_path, strategy):
    both(tmp_path, ["trainer.accelerator=gpu", "model.mixer.form=chunkwise"], strategy=strategy, tolerance=1e-3)
