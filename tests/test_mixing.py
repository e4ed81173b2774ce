"""Mixup and CutMix: what a batch, its labels and the loss become."""

import numpy as np
import pytest
import torch
from torch import nn

from lba_exp.tasks.classification import Classification, mean_loss
from lba_exp.tasks.mixing import Mixing, hard


def mixing(**settings):
    return Mixing(5, **{"mixup": 0.8, "cutmix": 1.0, "mix_probability": 1.0, "cutmix_share": 0.5, **settings})


def batch(samples=7, side=8):
    """Sample i is i + 1 everywhere, so that every pixel tells where it is from."""
    values = torch.arange(1.0, samples + 1).view(-1, 1, 1, 1)
    return {"inputs": values.expand(-1, 3, side, side).clone(), "labels": torch.arange(samples) % 5, "other": 1}


def test_mixup_is_a_weighted_sum_with_the_sample_before():
    given = batch()
    torch.manual_seed(0)
    found = mixing(cutmix=0.0)(given)
    own = found["labels"][1, 1]  # sample 1 has class 1, the one before it class 0
    expected = own * given["inputs"] + (1 - own) * given["inputs"].roll(1, 0)
    torch.testing.assert_close(found["inputs"], expected)
    hot = nn.functional.one_hot(given["labels"], 5).float()
    torch.testing.assert_close(found["labels"], own * hot + (1 - own) * hot.roll(1, 0))
    assert found["other"] == 1 and given["labels"].dtype == torch.int64 and torch.equal(given["inputs"], batch()["inputs"])


def test_cutmix_labels_are_the_shares_of_the_pixels():
    torch.manual_seed(1)
    for _ in range(20):
        given, found = batch(), mixing(mixup=0.0)(batch())
        own = (found["inputs"] == given["inputs"]).float().mean((1, 2, 3))
        foreign = (found["inputs"] == given["inputs"].roll(1, 0)).float().mean((1, 2, 3))
        torch.testing.assert_close(own + foreign, torch.ones(7))
        torch.testing.assert_close(found["labels"][torch.arange(7), given["labels"]], own)


def test_shares_of_the_methods_and_of_mixed_batches():
    def kinds(**settings):
        torch.manual_seed(2)
        mix, found = mixing(**settings), []
        for _ in range(400):
            one = mix(batch(samples=2))
            if one["labels"].ndim == 1:
                found.append("none")
                continue
            assert one["labels"].dtype == torch.float32
            torch.testing.assert_close(one["labels"].sum(1), torch.ones(2))
            found.append("cutmix" if set(one["inputs"].unique().tolist()) <= {1.0, 2.0} else "mixup")
        return {kind: found.count(kind) / 400 for kind in ("none", "cutmix", "mixup")}

    assert kinds() == pytest.approx({"none": 0, "cutmix": 0.5, "mixup": 0.5}, abs=0.08)
    assert kinds(cutmix_share=0.2) == pytest.approx({"none": 0, "cutmix": 0.2, "mixup": 0.8}, abs=0.08)
    assert kinds(mix_probability=0.3, mixup=0.0) == pytest.approx({"none": 0.7, "cutmix": 0.3, "mixup": 0}, abs=0.08)
    torch.manual_seed(2)
    once = mixing()(batch())
    torch.manual_seed(2)
    assert torch.equal(mixing()(batch())["inputs"], once["inputs"])


def test_the_loss_of_mixed_and_smoothed_labels():
    rng = np.random.default_rng(0)
    logits, shares = torch.tensor(rng.normal(size=(6, 5))), torch.tensor(rng.dirichlet(np.ones(5), 6))
    smooth = 0.9 * shares + 0.1 / 5
    expected = -(smooth * logits.log_softmax(-1)).sum(-1).mean()
    assert float(mean_loss(logits, shares.float(), 0.1)) == pytest.approx(float(expected), rel=1e-5)
    assert torch.equal(hard(shares), shares.argmax(-1)) and torch.equal(hard(torch.tensor([3, 1])), torch.tensor([3, 1]))


class Seen(nn.Module):
    def __init__(self):
        super().__init__()
        self.inputs = []
        self.weight = nn.Linear(1, 5)

    def forward(self, inputs, padding_mask=None):
        self.inputs.append(inputs)
        return self.weight(inputs[:, 0, 0, :1])


def test_training_batches_are_mixed_and_no_others():
    optim = {"label_smoothing": 0.0}
    settings = {"mixup": 0.8, "cutmix": 0.0, "mix_probability": 1.0, "cutmix_share": 0.5}
    task = Classification(Seen(), classes=5, optim=optim, mixing=settings)
    task.log = lambda *args, **kwargs: None
    task._trainer = type("NoTrainer", (), {"train_dataloader": None, "global_rank": 0, "world_size": 1, "accumulate_grad_batches": 1})()
    task.validation_step(batch(), 0)
    task.test_step(batch(), 0)
    assert all(torch.equal(inputs, batch()["inputs"]) for inputs in task.model.inputs)
    task.training_step(batch(), 0)
    assert not torch.equal(task.model.inputs[-1], batch()["inputs"])
    assert Classification(Seen(), classes=5, optim=optim)._mixing is None
