"""The worst errors of every form over drawn cases of the contract, by dtype, as a Markdown table.

    python -m tests.ops.worst_errors --cases 300 --seed 7

Cases come from ``compare.cases`` (dtype set apart, so that each gets as many), errors from ``compare.errors``: relative L2 of the outputs
(y, or numerator and denominator where the contract judges those), and the contract's measure of the gradients of q, k, v and the forward
and backward log decays. Exit code 1 where one is above the contract's tolerance. About 10 ms
a case, form and dtype on a CPU core.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

from .compare import FORMS, TOLERANCE, Case, cases, errors

COLUMNS = ("y", "num", "den", "dq", "dk", "dv", "df", "db")


def draw(count: int, number: int, dtype: torch.dtype) -> list[Case]:
    """``count`` cases of one dtype; the same for the same ``number``, whatever the dtype."""
    found = []

    @seed(number)
    @settings(max_examples=count, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(case=cases([torch.float32]))
    def collect(case):
        found.append(dataclasses.replace(case, dtype=dtype))

    collect()
    return found


def worst(form: str, drawn: Sequence[Case]) -> dict[str, tuple[float, Case]]:
    """Name of an output or a gradient -> its largest error and the case that has it; "finite" as well."""
    found: dict[str, tuple[float, Case]] = {}
    for case in drawn:
        for name, value in errors(case, form).items():
            value = value if value == value else float("inf")
            if name not in found or value > found[name][0]:
                found[name] = (value, case)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Worst errors of every form over drawn cases, as a Markdown table.")
    parser.add_argument("--cases", type=int, default=300, help="cases for each dtype (default 300)")
    parser.add_argument("--seed", type=int, default=7, help="of the cases (default 7)")
    options = parser.parse_args(arguments)
    if options.cases < 1:
        parser.error(f"--cases: expected a whole number >= 1, got {options.cases}")
    torch.set_num_threads(1)
    print("| " + " | ".join(("form", "dtype", "cases", *COLUMNS, "tolerance")) + " |")
    print("| " + " | ".join(["---"] * (len(COLUMNS) + 4)) + " |")
    wrong = []
    for dtype, tolerance in TOLERANCE.items():
        drawn = draw(options.cases, options.seed, dtype)
        for form in FORMS:
            found = worst(form, drawn)
            cells = [f"{found[name][0]:.1e}" if name in found else "" for name in COLUMNS]
            head = (form, str(dtype).removeprefix("torch."), str(len(drawn)))
            print("| " + " | ".join((*head, *cells, f"{tolerance:g}")) + " |", flush=True)
            wrong += [(form, name, *pair) for name, pair in found.items() if not pair[0] <= tolerance]
    for form, name, value, case in wrong:
        print(f"above the tolerance: {form}, {name}: {value:.1e} for {case}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
