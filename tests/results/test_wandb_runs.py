"""Runs out of W&B, through an object with the documented interface of wandb.Api."""

from types import SimpleNamespace

import pytest
import requests
import wandb

from lba_exp.errors import UserError
from lba_exp.results.layout import lay_out
from lba_exp.results.tables import TableOptions, pivot
from lba_exp.results.wandb_runs import wandb_runs
from tests.run_folders import config


class Summary:
    """W&B's summaries are no dicts, nor are the ones inside of them."""

    def __init__(self, **content):
        self._content = content

    def items(self):
        return self._content.items()


def run(model, seed, state="finished", **summary):
    url = f"https://wandb.ai/us/p/runs/{model}{seed}"
    settings = config(model, seed) | {"_wandb": {"x": 1}}
    return SimpleNamespace(name=f"{model}-seed{seed}", state=state, url=url, group="digits", config=settings, summary=Summary(**summary))


class Api:
    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def runs(self, path):
        self.asked.append(path)
        if isinstance(self.answer, Exception):
            raise self.answer
        yield from self.answer


def test_a_table_from_wandb():
    def record(accuracy):
        test, validation = Summary(accuracy=accuracy), Summary(accuracy=0.9, loss=0.1)
        return {"record": Summary(status="finished", variant="lion_s", metrics=Summary(test=test, validation=validation))}

    runs = [
        run("lion_s", 1, **record(0.8)),
        run("lion_s", 0, **record(0.6)),
        run("lion_d", 0, **{"test/accuracy": 0.5, "test/parity/recurrent/rel": 1e-7}),  # of another program: no record
        run("lion_d", 1, state="crashed"),
        run("softmax", 0, state="running"),
    ]
    api = Api(runs)
    found = wandb_runs(["us/p"], api)
    assert api.asked == ["us/p"] and found[-1].place == "https://wandb.ai/us/p/runs/softmax0"
    assert "_wandb.x" not in found[0].flat and found[0].label("optim.lr") == "0.002"
    table = lay_out(pivot(found, TableOptions(metrics=("test/accuracy",))))
    assert [[cell.text + cell.after for cell in row] for row in table.rows] == [
        ["lion_d", "50.00(n = 1; failed 1 of 2)"],
        ["lion_s", "70.00 ± 14.14(n = 2)"],
        ["softmax", "unfinished 1 of 1"],
    ]
    assert next(r for r in found if r.label("model") == "lion_s").numbers["validation/loss"] == 0.1


@pytest.mark.parametrize(
    "error", [wandb.errors.UsageError("No API key configured."), requests.ConnectionError("no route"), ValueError("Could not find project")]
)
def test_what_cannot_be_read_is_one_sentence(error):
    with pytest.raises(
        UserError,
        match=r"cannot be read \((No API key|its server cannot be reached|Could not).*WANDB_API_KEY.*from their run folders",
    ):
        wandb_runs(["us/p"], Api(error))
    with pytest.raises(UserError, match="there is no run in us/p"):
        wandb_runs(["us/p"], Api([]))
