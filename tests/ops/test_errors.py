"""Mistakes: a ValueError that names the argument, what was given and what is valid."""

import pytest
import torch

from lba_exp.ops import FORMS, MODEL_FORMS, bidirectional_linear_attention, bidirectional_linear_attention_parts, estimate_bytes

from .compare import Case

Q, K, V, F, B, _ = Case(length=5).tensors()

MISTAKES = [
    ({"q": Q[0]}, "q: .*\\(B, L, H, Dk\\).*\\(5, 3, 4\\)"),
    ({"q": None}, "q: .*NoneType"),
    ({"q": Q.long()}, "q: .*int64"),
    ({"q": Q[:, :0], "k": K[:, :0], "v": V[:, :0]}, "q: .*non-empty"),
    ({"k": K[..., :3]}, "k: .*\\(2, 5, 3, 4\\).*\\(2, 5, 3, 3\\)"),
    ({"v": V[:, :4]}, "v: .*\\(2, 5, 3\\).*\\(2, 4, 3, 5\\)"),
    ({"q": Q.to("meta")}, "k: .*device"),
    ({"forward_log_decay": -torch.rand(4)}, "forward_log_decay: .*\\(3,\\), \\(3, 4\\), \\(2, 5, 3\\), \\(2, 5, 3, 4\\), got \\(4,\\)"),
    ({"backward_log_decay": -torch.rand(2, 5, 1)}, "backward_log_decay: .*got \\(2, 5, 1\\)"),
    ({"forward_log_decay": 0.9}, "forward_log_decay: .*float"),
    ({"forward_log_decay": F.double()}, "forward_log_decay: .*torch.float32 .*torch.float64"),
    ({"backward_log_decay": B.half()}, "backward_log_decay: .*float16"),
    ({"q": Q.double(), "k": K.double(), "v": V.double()}, "forward_log_decay: .*torch.float64 .*torch.float32"),
    ({"forward_log_decay": -F}, "forward_log_decay: .*<= 0"),
    ({"scaled": 1}, "scaled: .*True or False.*1"),
    ({"diagonal_weight": float("inf")}, "diagonal_weight: .*finite.*inf"),
    ({"diagonal_weight": True}, "diagonal_weight: .*True"),
    ({"direction": "forwards"}, "direction: .*'forwards'.*'both', 'forward', 'backward'; did you mean 'forward'"),
    ({"padding_mask": torch.ones(2, 5)}, "padding_mask: .*bool.*float32"),
    ({"padding_mask": torch.ones(5, dtype=torch.bool)}, "padding_mask: .*\\(2, 5\\).*\\(5,\\)"),
    ({"form": "chunk"}, "form: .*'chunk'.*'parallel', .*'auto'; did you mean 'chunkwise'"),
    ({"form": None}, "form: .*None"),
    ({"chunk_size": 0}, "chunk_size: .*>= 1.*0"),
    ({"chunk_size": 64.0}, "chunk_size: .*64.0"),
    ({"eps": -1.0}, "eps: .*>= 0.*-1.0"),
]


@pytest.mark.parametrize(("change", "message"), MISTAKES)
def test_mistakes(change, message):
    arguments = {"q": Q, "k": K, "v": V, "forward_log_decay": F, "backward_log_decay": B} | change
    with pytest.raises(ValueError, match=message):
        bidirectional_linear_attention(**arguments)
    if not {"scaled", "eps"} & set(change):
        with pytest.raises(ValueError, match=message):
            bidirectional_linear_attention_parts(**arguments)


def test_gates_may_be_closed_for_good():
    closed = torch.full((2, 5, 3), -float("inf"))
    for form in MODEL_FORMS:
        f, b = (closed.clone().requires_grad_() for _ in range(2))
        y = bidirectional_linear_attention(Q, K, V, f, b, form=form, eps=0.0)
        y.sum().backward()
        assert torch.allclose(y, V, atol=1e-6) and not f.grad.any() and not b.grad.any()


def test_no_division_by_zero_at_padded_tokens():
    mask = torch.tensor([[True] * 3 + [False] * 2] * 2)
    for form in MODEL_FORMS:
        q = Q.clone().requires_grad_()
        y = bidirectional_linear_attention(q, K, V, F, B, form=form, eps=0.0, padding_mask=mask)
        y.sum().backward()
        assert y.isfinite().all() and q.grad.isfinite().all() and not y[:, 3:].any()


def test_estimate_bytes():
    assert set(MODEL_FORMS) < set(FORMS)
    sizes = {form: estimate_bytes(form, 1, 65536, 4, 64, 64) for form in FORMS if form != "fused"}
    assert sizes["parallel"] > 4 * 4 * 65536**2 and max(sizes["recurrent"], sizes["chunkwise"]) < 2**30
    assert estimate_bytes("parallel", 2, 512, 4, 64, 64) > estimate_bytes("parallel", 1, 512, 4, 64, 64)
    with pytest.raises(ValueError, match="form"):
        estimate_bytes("chunk", 1, 1, 1, 1, 1)
