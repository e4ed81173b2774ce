"""The contract's error measures, and the cases that the tests draw."""

import dataclasses

import torch
from hypothesis import strategies as st

from lba_exp.ops import bidirectional_linear_attention, bidirectional_linear_attention_parts

from . import reference

FORMS = ("parallel", "recurrent", "chunkwise", "blockwise")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
FLOOR = 1e-30  # below it float32 has no full precision left


@dataclasses.dataclass
class Case:
    """One call of the operator, its numbers drawn from ``seed``."""

    seed: int = 0
    batch: int = 2
    length: int = 37
    heads: int = 3
    key_width: int = 4
    value_width: int = 5
    kinds: tuple[str, str] = ("selective", "selective")
    level: str = "mild"
    scaled: bool = True
    diagonal_weight: float = 1.0
    direction: str = "both"
    padded: str = "none"
    chunk_size: int = 8
    signed: bool = False
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def tensors(self):
        """q, k, v, f, b and the padding mask."""
        generator = torch.Generator().manual_seed(self.seed)

        def uniform(*shape):
            return torch.rand(shape, generator=generator, dtype=torch.float64)

        shape = (self.batch, self.length, self.heads)
        q, k = (uniform(*shape, self.key_width) - 0.5 * self.signed for _ in range(2))
        v = uniform(*shape, self.value_width) - 0.5
        gate_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        sizes = {
            "none": None,
            "fixed": (self.heads,),
            "fixed_vector": (self.heads, self.key_width),
            "selective": shape,
            "selective_vector": (*shape, self.key_width),
        }
        decays = []
        for kind in self.kinds:
            size = sizes[kind]
            if size is None:
                decays.append(None)
                continue
            if self.level == "mild":
                gate = uniform(*size)
            elif self.level == "slow":
                gate = 1e-3 * uniform(*size)
            else:  # open, almost open, mild, almost closed and closed side by side
                levels = torch.tensor([0.0, 1e-5, 1.0, 8.0, 1e4], dtype=torch.float64)
                gate = levels[torch.randint(5, size, generator=generator)] * (0.5 + 0.5 * uniform(*size))
            decays.append(-gate.to(gate_dtype))
        mask = None
        if self.padded == "holes":
            mask = uniform(self.batch, self.length) > 0.3
        elif self.padded == "right":
            mask = torch.arange(self.length)[None] < torch.randint(1, self.length + 1, (self.batch, 1), generator=generator)
        elif self.padded == "left":
            mask = torch.arange(self.length)[None] >= torch.randint(0, self.length, (self.batch, 1), generator=generator)
        elif self.padded == "all":
            mask = torch.zeros(self.batch, self.length, dtype=torch.bool)
        tensors = (q.to(self.dtype), k.to(self.dtype), v.to(self.dtype), *decays, mask)
        return tuple(None if x is None else x.to(self.device) for x in tensors)

    def options(self):
        return {"diagonal_weight": self.diagonal_weight, "direction": self.direction}


def gradients(outputs, inputs, dtype):
    """Gradients of fixed random sums of the outputs, weights rounded to dtype; zeros where an output does not depend on an input."""
    total = 0.0
    for number, y in enumerate(outputs):
        generator = torch.Generator().manual_seed(number)
        weights = (torch.rand(y.shape, generator=generator, dtype=torch.float64) - 0.5).to(y.device, dtype)
        total = total + (y.double() * weights.double()).sum()
    wanted = [x for x in inputs if x is not None]
    grads = torch.autograd.grad(total, wanted, allow_unused=True)
    found = iter([torch.zeros_like(x) if g is None else g for x, g in zip(wanted, grads, strict=True)])
    return [None if x is None else next(found) for x in inputs]


def leaves(tensors, double=False):
    return [None if x is None else (x.double() if double else x).detach().clone().requires_grad_() for x in tensors]


def error(x, expected, *others):
    """norm(x - expected) over the largest norm of expected and others."""
    scale = max(FLOOR, *(y.double().norm().item() for y in (expected, *others)))
    return ((x.double() - expected.double()).norm() / scale).item()


def errors(case: Case, form: str, judge=reference) -> dict[str, float]:
    """The contract's relative errors of a form: outputs and gradients; of numerator and denominator where y itself is not judged.

    judge: has the ``attention`` and ``attention_parts`` of ``reference``.
    """
    *tensors, mask = case.tensors()
    judged = case.scaled and not case.signed and case.diagonal_weight > 0
    result = {}
    if case.scaled and not judged:
        y = bidirectional_linear_attention(*tensors, padding_mask=mask, form=form, chunk_size=case.chunk_size, **case.options())
        result["finite"] = 0.0 if bool(y.isfinite().all()) else float("inf")

    def ours(*xs):
        if case.scaled and not judged:
            return bidirectional_linear_attention_parts(*xs, padding_mask=mask, form=form, chunk_size=case.chunk_size, **case.options())
        return (
            bidirectional_linear_attention(
                *xs, scaled=case.scaled, padding_mask=mask, form=form, chunk_size=case.chunk_size, **case.options()
            ),
        )

    def exact(*xs, hold_den=False):
        if case.scaled and not judged:
            return judge.attention_parts(*xs, padding_mask=mask, **case.options())
        return (judge.attention(*xs, scaled=case.scaled, padding_mask=mask, hold_den=hold_den, **case.options()),)

    inputs, doubles, held = leaves(tensors), leaves(tensors, double=True), leaves(tensors, double=True)
    outputs, expected = ours(*inputs), exact(*doubles)
    grads, grads_expected = gradients(outputs, inputs, case.dtype), gradients(expected, doubles, case.dtype)
    grads_held = gradients(exact(*held, hold_den=True), held, case.dtype)
    for name, y, y_expected in zip(("y",) if len(outputs) == 1 else ("num", "den"), outputs, expected, strict=True):
        result[name] = error(y, y_expected)
    for name, g, g_expected, g_held in zip("qkvfb", grads, grads_expected, grads_held, strict=True):
        if g is not None:
            result["d" + name] = error(g, g_expected, g_held)
    return result


def check(case: Case, form: str, judge=reference, tolerance: float | None = None, **others: float) -> None:
    """Raise AssertionError where an error of the form is above the tolerance, the contract's unless another one is given.

    others: tolerances of some results by name, "db" for one.
    """
    tolerance = TOLERANCE[case.dtype] if tolerance is None else tolerance
    wrong = {name: value for name, value in errors(case, form, judge).items() if not value <= others.get(name, tolerance)}
    assert not wrong, f"{form}: relative errors above {tolerance:g}: {wrong} for {case}"


KINDS = ("none", "fixed", "fixed_vector", "selective", "selective_vector")


@st.composite
def cases(draw, dtypes, device="cpu"):
    """Any case of the contract, small enough for direct summation."""
    scaled = draw(st.booleans())
    return Case(
        seed=draw(st.integers(0, 2**31)),
        batch=draw(st.integers(1, 2)),
        length=draw(st.one_of(st.integers(1, 9), st.sampled_from([16, 17, 31, 32, 33, 47]))),
        heads=draw(st.integers(1, 3)),
        key_width=draw(st.integers(1, 5)),
        value_width=draw(st.integers(1, 5)),
        kinds=(draw(st.sampled_from(KINDS)), draw(st.sampled_from(KINDS))),
        level=draw(st.sampled_from(["mild", "slow", "mixed"])),
        scaled=scaled,
        diagonal_weight=draw(st.sampled_from([1.0, 2.0, 0.0, 0.5, -0.7])),
        direction=draw(st.sampled_from(["both", "forward", "backward"])),
        padded=draw(st.sampled_from(["none", "holes", "left", "right", "all"])),
        chunk_size=draw(st.sampled_from([1, 2, 3, 8, 16, 64])),
        signed=draw(st.booleans()),
        dtype=draw(st.sampled_from(dtypes)),
        device=device,
    )
