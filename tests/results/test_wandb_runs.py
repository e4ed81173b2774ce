"""Runs out of W&B, through an object with the documented interface of wandb.Api, and through wandb.Api itself."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
import wandb
import yaml

import lba_exp
from lba_exp.errors import UserError
from lba_exp.results.layout import lay_out
from lba_exp.results.tables import TableOptions, pivot
from lba_exp.results.wandb_runs import wandb_runs
from tests import wandb_file, wandb_server
from tests.conftest import SMALL
from tests.run_folders import config, write_run


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

    def runs(self, path, *, lazy):
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


def served(folder, number):
    """A run folder as W&B has it, by what ``tracking`` sends there."""
    config, record = yaml.safe_load((folder / "config.yaml").read_text()), json.loads((folder / "result.json").read_text())
    summary = {"record": {key: value for key, value in record.items() if key != "folder"}, "_step": 3, "test/accuracy": None}
    told = {"name": f"id{number}", "displayName": f"run {number}", "group": "digits"}
    return {**told, "state": record["status"], "config": config, "summary": summary}


def table(environment, *arguments):
    """``lba-table`` in a process of its own: W&B reads the environment once."""
    command = [sys.executable, "-m", "lba_exp.commands.table", *arguments]
    environment = os.environ | environment | {"PYTHONPATH": str(Path(lba_exp.__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    return done.returncode, done.stdout, done.stderr


def test_the_whole_way_through_wandbs_own_client(tmp_path):
    """wandb.Api and its service, over HTTP, against a server on this machine: pages, a real offline run among them, what is refused."""
    overrides = [*(o for o in SMALL if not o.startswith("logger")), "trainer.max_epochs=1", "seed=60", "folder=runs/real"]
    lba_exp.train(lba_exp.compose(overrides), quiet=True)
    config, summary = wandb_file.read(Path("runs/real"))[0], wandb_file.summary(Path("runs/real"))
    real = {"name": "real", "displayName": "real", "state": "finished", "group": "digits", "config": config, "summary": summary}
    folders = [write_run(Path("runs"), model, seed, 0.5 + seed / 100) for model in ("lion_s", "lion_d") for seed in range(26)]
    folders.append(write_run(Path("runs"), "softmax", 0, None, status="failed"))
    runs = [real, *(served(folder, number) for number, folder in enumerate(folders))]
    metrics = "test/accuracy,validation/loss,parity/recurrent/rel,peak_memory_bytes"
    options = ["--metric", metrics, "--format", "csv", "--rows", "model,seed"]
    with wandb_server.serving({"us/p": runs, "us/closed": "permission denied"}) as (server, environment):
        environment |= {"HOME": str(tmp_path)}
        code, shown, said = table(environment, "--from", "wandb", "us/p", *options)
        assert code == 0, said
        assert server.asked.count("Runs") == 2 and "Run" not in server.asked  # 54 runs: two pages, and no request a run
        code, refused, said = table(environment, "--from", "wandb", "us/closed")
        assert (code, refused, said.count("\n")) == (1, "", 1) and "cannot be read (" in said and "permission denied)" in said
        code, refused, said = table(environment, "--from", "wandb", "us/none")
        assert (code, refused, said.count("\n")) == (1, "", 1) and "Could not find project none" in said
        code, refused, said = table(environment | {"WANDB_API_KEY": "1" * 40}, "--from", "wandb", "us/p")
        assert (code, refused, said.count("\n")) == (1, "", 1) and "1" * 40 not in said
    code, expected, said = table({}, "runs", *options)
    assert code == 0 and sorted(shown.splitlines()) == sorted(expected.splitlines()) and len(expected.splitlines()) > 54, said
