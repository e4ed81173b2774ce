"""W&B's own sweeps: the command lines that its agent issues, by its own code, and the runs that they start."""

import itertools
import json
import os
import sys
from pathlib import Path

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args, load_sweep_config
from wandb.wandb_agent import Agent

import lba_exp
from lba_exp.commands import train as command
from lba_exp.errors import ConfigError
from lba_exp.results import naming
from lba_exp.results.wandb_runs import _nested
from tests import wandb_file

ROOT = Path(command.__file__).parents[2]
FILES = sorted((ROOT / "sweeps" / "wandb").glob("*.yaml"))


def load(name: str) -> dict:
    return load_sweep_config(str(ROOT / "sweeps" / "wandb" / f"{name}.yaml"))


def arguments(values: dict) -> dict:
    """The trial's settings as W&B's server sends them to the agent."""
    return {"args": {key: {"value": value} for key, value in values.items()}}


@pytest.fixture
def as_trial(monkeypatch):
    """Makes this process one that an agent has started, for the trial of an id."""

    def told(trial: str) -> None:
        monkeypatch.setenv("WANDB_SWEEP_ID", "sw33p")
        monkeypatch.setenv("WANDB_RUN_ID", trial)

    monkeypatch.delenv("WANDB_MODE", raising=False)
    return told


def test_there_is_a_grid_and_a_bayes_sweep():
    assert {load(path.stem)["method"] for path in FILES} == {"grid", "bayes"}
    for path in FILES:
        config = load(path.stem)
        assert config["metric"] == {"name": "val/accuracy", "goal": "maximize"} and config["program"] == "lba-train"


@pytest.mark.parametrize("name", [path.stem for path in FILES])
def test_every_trial_composes_and_has_a_folder_of_its_own(name, as_trial):
    choices = []
    for key, said in load(name)["parameters"].items():
        choices.append([(key, value) for value in said.get("values", (said.get("min"), said.get("max")))])
    folders = set()
    for number, values in enumerate(itertools.product(*choices)):
        as_trial(f"t{number}")
        cfg = lba_exp.compose(create_sweep_command_args(arguments(dict(values)))["args_no_hyphens"])
        assert cfg.logger.wandb == "online" and (cfg.origin.sweep, cfg.origin.trial) == ("wandb-sw33p", f"t{number}")
        folders.add(naming.folder(cfg))
        assert naming.folder(cfg).name.endswith(f"-t{number}") and naming.folder(cfg).parents[1].name == "wandb-sw33p"
    assert len(folders) == number + 1


def test_trials_of_the_same_settings_have_two_folders(as_trial):
    folders = []
    for trial in ("a1", "b2"):
        as_trial(trial)
        folders.append(naming.folder(lba_exp.compose(["model.width=32"])))
    assert [f.name for f in folders] == ["seed0-a1", "seed0-b2"] and folders[0].parent == folders[1].parent


def test_the_mode_of_a_trial(as_trial, monkeypatch):
    as_trial("a1")
    for overrides, mode in (([], "online"), (["logger=wandb_offline"], "offline"), (["logger=csv"], "off"), (["logger.wandb=off"], "off")):
        assert lba_exp.compose(overrides).logger.wandb == mode
    for theirs, mode in (("offline", "offline"), ("disabled", "off"), ("online", "online")):
        monkeypatch.setenv("WANDB_MODE", theirs)
        assert lba_exp.compose([]).logger.wandb == mode
    monkeypatch.delenv("WANDB_SWEEP_ID")  # WANDB_RUN_ID alone is no agent's
    cfg = lba_exp.compose([])
    assert cfg.logger.wandb == "offline" and cfg.origin.trial is None


def test_what_does_not_go_with_an_agent(as_trial, capsys):
    as_trial("a1")
    with pytest.raises(ConfigError, match=r"folder=here would be the folder of every trial.*root="):
        lba_exp.compose(["folder=here"])
    with pytest.raises(SystemExit) as stop:
        command.main(["-m", "seed=0,1"])
    said = capsys.readouterr().err
    assert stop.value.code == 1 and "one run a trial" in said and said.count("\n") == 1


@pytest.mark.parametrize("flags", [["-m"], [], ["-m", "--dry-run"]])
def test_lba_train_says_whose_file_it_is(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main([*flags, "sweeps=wandb/digits_grid"])
    said = capsys.readouterr().err
    assert stop.value.code == 1 and said.count("\n") == 1
    assert f"wandb sweep {ROOT / 'sweeps/wandb/digits_grid.yaml'}" in said and "wandb agent" in said
    with pytest.raises(ConfigError, match="wandb/digits_gird"):
        lba_exp.compose(["sweeps=wandb/digits_gird"])


def test_the_agents_process_ends_in_the_record_of_the_direct_command(tmp_path, small, monkeypatch):
    """The agent's own code makes the command line from the file and starts it; W&B's server is all that is not there."""
    program = tmp_path / "bin" / "lba-train"  # as an installation makes it
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nfrom lba_exp.commands.train import main\nmain()\n")
    program.chmod(0o755)
    config = load("digits_grid")
    for key, value in {
        "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "offline",
        "WANDB_API_KEY": "5ecret" * 6 + "5ecr",
        "WANDB_SWEEP_ID": "sw33p",
        "WANDB_DIR": str(tmp_path),
        **dict.fromkeys(("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"), ""),  # the agent sets them: they are undone after the test
    }.items():
        monkeypatch.setenv(key, value)
    smaller = {key: yaml.safe_load(value) for key, value in (o.split("=") for o in small if not o.startswith("logger"))}
    values = {"model": "lion_d", "seed": 1, "optim.lr": 4e-3, **smaller, "trainer.max_epochs": 1}
    agent = Agent(api=None, queue=None, sweep_id="sw33p")
    agent._sweep_command = config["command"]
    agent._command_run({"run_id": "tr1al", "program": config["program"], **arguments(values)})
    process = agent._run_processes["tr1al"]
    assert process.wait(timeout=200) == 0
    assert process._popen.args == ["/usr/bin/env", "lba-train", *(f"{key}={value}" for key, value in values.items())]
    (folder,) = tmp_path.glob("runs/wandb-sw33p/lion_d,*/seed1-tr1al")
    record = json.loads((folder / "result.json").read_text())
    assert (record["status"], record["sweep"], record["trial"]) == ("finished", "wandb-sw33p", "tr1al")

    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    direct = lba_exp.train(lba_exp.compose([*(f"{k}={v}" for k, v in values.items()), "logger=csv"]), quiet=True)
    assert record["metrics"] == direct["metrics"] and record["best"] == direct["best"]
    assert record["parity"]["forms"]["recurrent"]["rel"] == direct["parity"]["forms"]["recurrent"]["rel"]

    # on W&B: the trial's own id, the parameters that W&B's search reads, and beside them the whole configuration
    (run,) = wandb_file.runs(folder)
    theirs, _, code = wandb_file.read(folder)
    assert (run.run_id, run.sweep_id, run.run_group, code) == ("tr1al", "sw33p", "wandb-sw33p", 0)
    assert {key: theirs[key] for key in values} == values
    ours = yaml.safe_load((folder / "config.yaml").read_text())
    nested = _nested({key: value for key, value in theirs.items() if not key.startswith("_")})
    assert {key: nested[key] for key in ours} == ours
    assert [str(p) for p in folder.rglob("*") if p.is_file() and b"5ecret5ecret" in p.read_bytes()] == []
