"""Small cases of the fused form, forward and backward, to be run under compute-sanitizer:

    compute-sanitizer --tool memcheck python -m tests.ops.sanitize
    compute-sanitizer --tool racecheck python -m tests.ops.sanitize
    compute-sanitizer --tool initcheck python -m tests.ops.sanitize

Every tensor is an allocation of its own, so that what lies beside it is out of bounds. Add ``--error-exitcode 1`` for a script.
"""

import os
import sys

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import torch

from .compare import Case
from .fused_jobs import Job, case, run


def jobs() -> list[Job]:
    small = {"batch": 1, "heads": 3}
    found = []
    for dtype in (torch.bfloat16, torch.float32) if torch.cuda.is_available() else (torch.float32,):
        found += [
            Job("selective", case(dtype, 32, 48, padded="holes", **small), (1, 63, 300), processors=1),
            Job("segments", case(dtype, 20, 33, level="mixed", signed=True, **small), (300,)),
            Job("one side", case(dtype, 32, 32, kinds=("none", "fixed"), direction="backward", scaled=False, **small), (131,)),
            Job("no decay", case(dtype, 20, 33, kinds=("none", "none"), padded="right", **small), (63, 300)),
        ]
    return found


def main() -> int:
    cases: list[Case] = []
    for job in jobs():
        with job.settings():
            for one in job.cases(0):
                if not all(bool(x.isfinite().all()) for x in run(one)):
                    print(f"not finite: {one}", file=sys.stderr)
                    return 1
                cases.append(one)
    print(f"{len(cases)} cases ran, forward and backward, on {cases[0].device}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
