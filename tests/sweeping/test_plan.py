"""What a sweep is before anything runs: its jobs, their names and folders, what is there already, and --dry-run."""

import json
import os
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lba_exp import composing
from lba_exp.commands import train as command
from lba_exp.errors import ConfigError
from lba_exp.results.folder import Claim
from lba_exp.sweeping import local
from lba_exp.sweeping import plan as planning


def write(path: str, text: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)


def finish(job: planning.Job, seconds: float = 60.0, **changes) -> None:
    """A run folder as a finished run leaves it, as far as a plan looks."""
    job.folder.mkdir(parents=True)
    (job.folder / "config.yaml").write_text(OmegaConf.to_yaml(job.cfg))
    record = {"status": "finished", "variant": job.cfg.model.name, "efficiency": {"wall_seconds": seconds}} | changes
    (job.folder / "result.json").write_text(json.dumps(record))


def test_the_digits_sweeps_keep_their_jobs_and_folders():
    jobs = planning.plan(["sweeps=digits"]).jobs
    names = ["digits_lion_lit", "digits_lion_d", "digits_lion_s", "digits_softmax"]
    assert [j.folder for j in jobs] == [Path.cwd() / "runs/digits" / n / f"seed{s}" for n in names for s in range(3)]
    assert {j.cfg.optim.lr for j in jobs} == {0.001, 0.002} and {j.cfg.model.name for j in jobs} == {n[7:] for n in names}
    jobs = planning.plan(["sweeps=digits_search"]).jobs
    folders = [
        f"{m},optim.lr={r}/seed{s}"
        for m in ("lion_lit", "lion_d", "lion_s", "softmax")
        for r in (0.001, 0.002, 0.004, 0.008)
        for s in (10, 11, 12)
    ]
    assert [j.label for j in jobs] == folders


def test_every_job_is_as_if_it_were_composed_alone():
    """Also where the seed alone differs, and where something refers to the seed."""
    for overrides in (
        ["sweeps=digits_ablation", "sweep.only=[full,unscaled]", "seed=3,4"],
        ["data.split_seed=${seed}", "seed=3,4", "model=lion_d"],
    ):
        for job in planning.plan(overrides).jobs:
            assert job.cfg == composing.compose(job.overrides, in_sweep=True)
    assert job.cfg.data.split_seed == 4


def test_a_rows_name_is_in_folder_and_configuration_and_its_overrides_are_not_in_the_name():
    jobs = planning.plan(["sweeps=digits_ablation", "sweep.only=[full,no decay]", "seed=7", "threads=1"]).jobs
    assert [j.label for j in jobs] == ["lion_s,full,threads=1/seed7", "lion_s,no_decay,threads=1/seed7"]
    assert [j.cfg.origin.row for j in jobs] == ["full", "no decay"] and jobs[1].cfg.model.mixer.gate == "none"
    assert jobs[1].cfg.origin.overrides == ["seed=7", "model.mixer.gate=none", "sweeps=digits_ablation", "threads=1"]
    assert "sweep" not in jobs[1].cfg


FILES = {
    "hydra: {sweeper: {params: {seed: '0,1', model: lion_s}}}": ("hydra.sweeper.params", "grid: {seed: [0,1], model: [lion_s]}"),
    "sweep: {grd: {seed: [0, 1]}}": ("sweep.grd", "sweeps/mine.yaml", "did you mean sweep.grid?"),
    "sweep: {grid: {model.widht: [8, 16]}}": ("model.widht", "did you mean model.width?"),
    "sweep: {grid: {model: [lion_s, lion_x]}}": ("model=lion_x", "did you mean lion_"),
    "sweep: {variants: {a: [], b: [model.mixer.form=parallel]}}": ("same run", "lion_s,a/seed0", "lion_s,b/seed0"),
    "sweep: {variants: {a b: [], a_b: [model.width=32]}}": ("origin.row=a b", "origin.row=a_b", "share the folder"),
    "sweep: {variants: {wide: [model.width=30]}}": ("model.heads=4", "model.width=30"),
    "sweep: {zip: [{seed: [0, 1], model.width: [32]}]}": ("seed has 2", "model.width has 1"),
    "sweep: {exclude: 3}": ("sweep.exclude",),
}


@pytest.mark.parametrize("text", FILES)
def test_a_mistake_in_a_sweep_file_is_one_sentence(text, capsys):
    write("sweeps/mine.yaml", f"# @package _global_\n{text}\n")
    with pytest.raises(SystemExit) as stop:
        command.main(["-m", "sweeps=mine"])
    said = capsys.readouterr().err
    assert stop.value.code == 1 and said.count("\n") == 1, said
    for words in FILES[text]:
        assert words in said
    assert os.listdir() == ["sweeps"]


def dry_run(arguments: list[str], capsys) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        command.main(["-m", "--dry-run", *arguments])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_a_dry_run_lists_jobs_states_and_time_and_writes_nothing(capsys):
    arguments = ["model=lion_s,softmax", "seed=0,1,2"]
    said = dry_run(arguments, capsys)
    assert "6 jobs in runs/digits: 6 missing; 6 to run." in said and "no finished run" in said and os.listdir() == []
    assert "lion_s/seed0" in said and "model=softmax seed=2" in said

    jobs = planning.plan(arguments).jobs
    finish(jobs[0], seconds=100)
    finish(jobs[3], seconds=500)
    finish(jobs[1], status="failed")
    finish(jobs[4])
    (jobs[4].folder / "result.json").unlink()
    write(str(jobs[5].folder / "notes.txt"), "mine")
    with Claim(jobs[2].folder):
        states = [planning.state(job)[0] for job in planning.plan(arguments).jobs]
    assert states == ["finished", "failed", "running", "finished", "unfinished", "blocked"]
    (jobs[2].folder / ".lock").unlink()
    jobs[2].folder.rmdir()
    before = {p: p.stat().st_mtime_ns for p in Path("runs").rglob("*")}
    said = dry_run([*arguments, "hydra.launcher.jobs=2"], capsys)
    assert "2 finished, 1 failed, 1 missing, 1 unfinished, 1 blocked; 3 to run." in said
    assert "about 6 min 2 side by side, by 2 finished runs" in said  # (100 + 100 + 500) s on two
    assert f"{jobs[5].folder} is no run folder" in said
    assert {p: p.stat().st_mtime_ns for p in Path("runs").rglob("*")} == before


def test_a_folder_of_another_configuration_is_blocked_with_the_reason():
    (job,) = planning.plan(["seed=3"]).jobs
    finish(job)
    (other,) = planning.plan(["seed=3", f"folder={job.folder}", "optim.lr=0.5"]).jobs
    state, sentence = planning.state(other)
    assert state == "blocked" and "optim.lr is 0.002 there, 0.5 here" in sentence


def test_a_root_in_the_home_folder_is_found(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    made = planning.plan(["root='~/x'", "seed=0,1"])
    assert made.folder == tmp_path / "home/x/digits/.sweep" and made.jobs[0].folder == tmp_path / "home/x/digits/lion_s/seed0"


def test_jobs_of_several_groups_keep_the_sweep_in_their_root():
    made = planning.plan(["experiments=digits_lion_s,digits_lion_d"])
    assert made.folder == Path.cwd() / "runs/.sweep"
    assert {j.label for j in made.jobs} == {"digits_lion_s/lion_s/seed0", "digits_lion_d/lion_d/seed0"}


def test_the_machine_is_shared_among_jobs_side_by_side(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6")
    one, two, cpu = (composing.compose([f"trainer.{o}" for o in t]) for t in (["devices=1"], ["devices=2"], ["accelerator=cpu"]))
    shares = [local.share(one, slot, 4) for slot in range(4)]
    assert [s["CUDA_VISIBLE_DEVICES"] for s in shares] == ["3", "5", "6", "3"]
    assert {s["OMP_NUM_THREADS"] for s in shares} == {"4"}
    assert [local.share(two, slot, 2)["CUDA_VISIBLE_DEVICES"] for slot in range(2)] == ["3,5", "6,3"]
    assert "CUDA_VISIBLE_DEVICES" not in local.share(cpu, 1, 2) | local.share(one, 0, 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert "OMP_NUM_THREADS" not in local.share(one, 0, 4)


def test_several_devices_a_job_need_a_process_of_its_own_or_slurms_tasks():
    several = ["seed=0,1", "trainer.devices=2"]
    assert len(planning.plan(several).jobs) == 2
    slurm = ["hydra/launcher=submitit_slurm", "hydra.launcher.tasks_per_node=2"]
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    assert len(planning.plan([*several, *slurm]).jobs) == 2
    with pytest.raises(ConfigError, match="hydra/launcher=local"):
        planning.plan([*several, "hydra/launcher=submitit_local"])
