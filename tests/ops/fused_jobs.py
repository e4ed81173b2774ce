"""What the fused form is asked on a GPU: cases of the contract, at which lengths, under which plan."""

from __future__ import annotations

import contextlib
import dataclasses

import torch

from lba_exp.ops import bidirectional_linear_attention, bidirectional_linear_attention_parts

from .compare import Case, leaves

LENGTHS = (1, 2, 63, 65, 197, 1000, 3001)
SOME = (197, 1000)  # one block or few, and many
HALF = (torch.bfloat16, torch.float16)


class Judge:
    """The definition at any length: the chunkwise form in float64, which shorter cases hold to direct summation."""

    @staticmethod
    def attention_parts(*tensors, **options):
        return bidirectional_linear_attention_parts(*tensors, form="chunkwise", **options)

    @staticmethod
    def attention(*tensors, scaled=True, hold_den=False, padding_mask=None, **options):
        if not hold_den or not scaled:
            return bidirectional_linear_attention(*tensors, form="chunkwise", scaled=scaled, padding_mask=padding_mask, **options)
        num, den = Judge.attention_parts(*tensors, padding_mask=padding_mask, **options)
        if padding_mask is not None:
            den = den.masked_fill(~padding_mask[:, :, None], 1.0)
        return num / (den.detach() + 1e-6)[..., None]


@dataclasses.dataclass(frozen=True)
class Job:
    """A case at several lengths; ``kind`` and ``plan``: a launch other than the default one; ``processors``: as on a GPU with so many."""

    name: str
    case: Case
    lengths: tuple[int, ...] = SOME
    kind: str | None = None
    plan: object = None
    processors: int | None = None
    precision: str = "highest"

    def cases(self, seed: int) -> list[Case]:
        return [dataclasses.replace(self.case, length=length, seed=seed) for length in self.lengths]

    @contextlib.contextmanager
    def settings(self):
        from lba_exp.ops.fused import plan as plans

        processors, precision = plans.processors, torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self.precision)
        if self.processors:
            plans.processors = lambda device: self.processors
        try:
            with plans.override(self.kind, self.plan) if self.plan else contextlib.nullcontext():
                yield
        finally:
            plans.processors = processors
            torch.set_float32_matmul_precision(precision)


def case(dtype, key_width=64, value_width=64, **options):
    return Case(dtype=dtype, key_width=key_width, value_width=value_width, device="cuda" if torch.cuda.is_available() else "cpu", **options)


def default_jobs() -> list[Job]:
    """Every option, width and dtype under the default plans."""
    jobs = []
    for dtype in (*HALF, torch.float32):
        name = str(dtype).removeprefix("torch.")
        mixed = case(dtype, level="mixed", padded="right")
        jobs += [
            Job(f"{name}-lengths", mixed, LENGTHS),
            Job(f"{name}-one segment", mixed, (1000,), processors=1),
            Job(f"{name}-long segments", dataclasses.replace(mixed, batch=1, heads=2), (3001,), processors=1),
            Job(f"{name}-no decay", case(dtype, kinds=("none", "none"), padded="holes"), LENGTHS if dtype in HALF else SOME),
            Job(f"{name}-parts", case(dtype, signed=True, padded="holes")),
        ]
    options = {
        "one side, twice": {"kinds": ("selective", "none"), "diagonal_weight": 2.0},
        "other side, half": {"kinds": ("none", "selective"), "diagonal_weight": 0.5, "direction": "backward"},
        "fixed": {"kinds": ("fixed", "fixed"), "level": "slow"},
        "unscaled": {"kinds": ("fixed", "selective"), "scaled": False, "signed": True, "padded": "holes"},
        "forward": {"direction": "forward", "padded": "left"},
        "forward, no decay": {"direction": "forward", "kinds": ("none", "none"), "diagonal_weight": 0.0, "signed": True},
        "no decay, plain": {"kinds": ("none", "none"), "scaled": False, "signed": True},
        "no decay, parts": {"kinds": ("none", "none"), "signed": True},
        "no mask": {"level": "mixed"},
    }
    jobs += [Job(f"{dtype}-{name}".removeprefix("torch."), case(dtype, **o)) for dtype in HALF for name, o in options.items()]
    jobs += [Job(f"float32-{name}", case(torch.float32, **options[name]), (1000,)) for name in ("unscaled", "forward", "no decay, parts")]
    widths = {
        torch.bfloat16: [(16, 16), (20, 48), (33, 7), (64, 128), (128, 64), (128, 128), (100, 36)],
        torch.float16: [(16, 32), (48, 20), (7, 33), (128, 128), (36, 100)],
        torch.float32: [(16, 32), (20, 48), (128, 128)],
    }
    for dtype, pairs in widths.items():
        for key_width, value_width in pairs:
            sizes = {"key_width": key_width, "value_width": value_width, "batch": 1, "heads": 2}
            name = f"{dtype}-{key_width} x {value_width}".removeprefix("torch.")
            lengths = SOME if dtype in HALF else (1000,)
            jobs.append(Job(name, case(dtype, kinds=("selective", "fixed"), padded="holes", **sizes), lengths, processors=1))
    jobs.append(Job("tf32", case(torch.float32, level="mixed", padded="right"), (1000,), precision="high"))
    return jobs


def plan_jobs() -> list[Job]:
    """Every plan that a launch may take, in a sequence of several blocks a segment and several segments."""
    from lba_exp.ops.fused.candidates import CANDIDATES

    jobs = []
    for (kind, precision, width, span), listed in CANDIDATES.items():
        dtype, decay = torch.bfloat16 if precision == "half" else torch.float32, "none" if kind == "linear" else "selective"
        tried = case(dtype, width, width, batch=1, heads=2, level="mixed", padded="holes", kinds=(decay, decay))
        lengths = (197,) if span == "short" else (1000,)
        jobs += [Job(f"{kind}-{precision}-{width}-{span}-{n}", tried, lengths, kind, plan, 1) for n, plan in enumerate(listed)]
    return jobs


def run(case: Case) -> list[torch.Tensor]:
    """Outputs and gradients of the fused form alone, in the mode in which the contract judges the case."""
    *tensors, mask = case.tensors()
    inputs, options = leaves(tensors), case.options() | {"padding_mask": mask, "form": "fused"}
    if case.scaled and (case.signed or case.diagonal_weight <= 0):
        outputs = bidirectional_linear_attention_parts(*inputs, **options)
        if case.direction == "both":  # and y itself, which is to be finite
            outputs = (*outputs, bidirectional_linear_attention(*tensors, **options))
    else:
        outputs = (bidirectional_linear_attention(*inputs, scaled=case.scaled, **options),)
    wanted = [x for x in inputs if x is not None]
    grads = torch.autograd.grad(sum(y.float().square().sum() for y in outputs if y.requires_grad), wanted, allow_unused=True)
    return [*outputs, *(x for x in grads if x is not None)]


def compile_ahead(job: Job) -> None:
    """Compiles what a job needs into Triton's cache; what fails here fails again in the test, and says so."""
    with contextlib.suppress(Exception), job.settings():
        for one in job.cases(0):
            run(one)
