"""Configuration: what is valid composes, a mistake is one sentence that names the key, what is valid, and the nearest match."""

import logging
import subprocess
import sys
import time
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import lba_exp
from lba_exp import checks, composing, config, registry
from lba_exp.commands import train as command
from lba_exp.errors import ConfigError, UserError
from lba_exp.sweeping import plan as planning


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


MISTAKES = {
    # override(s): words that the one sentence must hold
    ("modle=lion_s",): ("modle", "did you mean model?", "Valid"),
    ("model.widht=32",): ("model.widht", "did you mean model.width?", "heads"),
    ("+model.widht=32",): ("model.widht", "did you mean model.width?", "heads"),
    ("++optim.learning_rate=1",): ("optim.learning_rate", "Valid under optim", "lr"),
    ("lr=1e-3",): ("lr", "did you mean optim.lr?"),
    ("model.width=wide",): ("model.width=wide", "an integer >= 1"),
    ("trainer.max_epochs=2.5",): ("trainer.max_epochs=2.5", "an integer"),
    ("trainer.max_epoch=2",): ("trainer.max_epoch", "did you mean trainer.max_epochs?"),
    ("trainer.logger=true",): ("trainer.logger", "logger=csv"),
    ("trainer.precision=bf17",): ("bf17", "did you mean bf16?", "32-true"),
    ("model=lion_x",): ("lion_x", "did you mean lion_s?", "softmax"),
    ("experiments=digits_lion",): ("experiments=digits_lion", "did you mean digits_lion_"),
    ("model.mixer.gate=selektive",): ("selektive", "did you mean selective?", "fixed"),
    ("model.width=-4",): ("model.width=-4", ">= 1"),
    ("optim.lr=0",): ("optim.lr=0", "> 0"),
    ("optim.lr=nan",): ("optim.lr=nan", "> 0"),
    ("optim.betas=[0.9]",): ("optim.betas", "two numbers"),
    ("model.heads=7",): ("model.heads=7", "model.width=64", "8, 16"),
    ("data.source=./no/such/folder",): ("no/such/folder",),
    ("data=images",): ("data.source", "local folder"),
    ("sweeps=digits",): ("sweeps=digits", "-m"),
    ("seed=1,2",): ("seed=1,2", "-m"),
    ("seed",): ("seed", "key=value"),
    ("resume=nowhere.ckpt",): ("nowhere.ckpt is no file", "auto, never"),
    ("init_from=nowhere.ckpt",): ("nowhere.ckpt is no file", "checkpoint"),
    ("plugins=[no_such_module]",): ("no_such_module", "working folder"),
    ("origin.sweep=x",): ("origin.sweep", "cannot be set"),
    ("model.name.x=3",): ("model.name", "has no x"),
    ("hydra.bla=1",): ("hydra.bla", "Hydra"),
    ("trainer.max_epochs=null",): ("trainer.max_epochs", "trainer.max_steps"),
    ("model.mixer.options={a:1}",): ("+model.mixer.options",),
    ("+model.mixer.options.a=1",): ("model.mixer.options", "'linear' takes none"),
    ("-m", "sweeps=digits", "model.width=7"): ("model.width=7", "heads"),
    ("-m", "model=lion_s,lion_t"): ("lion_t", "did you mean lion_"),
    ("-m", "seed=1,2", "trainer.devices=2", "hydra/launcher=joblib"): ("trainer.devices=2", "hydra/launcher=local"),
    ("--config-dir", "nowhere"): ("nowhere", "folder"),
    ("--config-name", "nix"): ("--config-name", "--config-dir"),
    ("hydra.run.dir=here",): ("hydra.run.dir", "folder="),
    ("model=null",): ("model=None", "Valid"),
    ("=3",): ("names no key",),
    ("-m", "seed=interval(0,3)"): ("seed=interval(0,3)", "seed=A,B,C"),
    ("-m", "sweeps=digits,digits_search"): ("sweeps=digits,digits_search", "one sweep at a time"),
    ("-m", "trainer.num_nodes=1,2"): ("trainer.num_nodes=2", "hydra/launcher=submitit_slurm"),
    ("-m", "model.heads=4,5", "seed=0,1"): ("model.heads=5", "does not divide"),
    ("optim.betas=[0.9,x]",): ("optim.betas", "a list"),
    ("optim.lr=${optim.foo}",): ("optim.foo",),
    ("optim.lr=inf",): ("optim.lr=inf", "> 0"),
    ("trainer.max_epochs=0",): ("trainer.max_epochs=0", ">= 1"),
    ("seed=1", "--config-dir", "nowhere"): ("nowhere", "folder"),
    ("data.source=~/x",): ("data.source=~/x", "\"data.source='~/x'\""),
    ("data.source=Übung",): ("\"data.source='Übung'\"",),
    ("data.source=digit",): ("'digit'", "Did you mean digits?", "org/name"),
}


@pytest.mark.parametrize("arguments", MISTAKES, ids=" ".join)
def test_a_mistake_is_one_sentence(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(list(arguments))
    said = capsys.readouterr()
    assert stop.value.code == 1
    assert said.out == ""
    assert said.err.count("\n") == 1 and said.err.startswith("lba-train: ")
    for words in MISTAKES[arguments]:
        assert words in said.err
    assert list(Path.cwd().iterdir()) == []  # no folder left behind


FILES = {
    "# @package _global_\nmodel: {widht: 3}\n": ("model.widht", "experiments/mine.yaml", "did you mean model.width?"),
    "# @package _global_\nmodell: {width: 3}\n": ("modell", "did you mean model?"),
    "# @package _global_\ntrainer: {max_epochs: many}\n": ("trainer.max_epochs=many", "an integer"),
    "seed: 3\n": ("@package _global_", "experiments/"),
    "# @package _global_\nseed: [\n": ("experiments/mine.yaml",),
    "# @package _global_\ndefaults: [override /model: lion_x]\n": ("experiments/mine.yaml", "did you mean lion_s?", "softmax"),
    "# @package _global_\ndefaults: [override /modell: lion_d]\n": ("modell", "experiments/mine.yaml", "did you mean model?", "optim"),
    "# @package _global_\ndefaults: [/model: lion_d]\n": ("override /model: lion_d",),
    "# @package _global_\ndefaults: [model: lion_d]\n": ("override /model: lion_d",),
    "# @package _global_\ndefaults: [digits_lion_x]\n": ("experiments: digits_lion_x", "did you mean digits_lion_s?"),
    "# @package _global_\ndefaults: {model: lion_d}\n": ("defaults in experiments/mine.yaml", "a list"),
    "# @package _global_\ndefaults: [[model]]\n": ("defaults of experiments/mine.yaml",),
    "# @package _global_\nmodel: lion_d\n": ("model: lion_d", "experiments/mine.yaml", "override /model: lion_d"),
    "# @package _global_\noptim: [1, 2]\n": ("optim in experiments/mine.yaml", "a list"),
    "# @package _global_\ntrainer:\n": ("trainer in experiments/mine.yaml", "nothing"),
    "# @package _global_\n- seed\n": ("experiments/mine.yaml holds a list",),
    "# @package _global_\ntrainer: {logger: true}\n": ("trainer.logger (in experiments/mine.yaml)", "logger=csv"),
    "# @package _global_\nplugins: my_gates\n": ("plugins (in experiments/mine.yaml)", "a list"),
}


@pytest.mark.parametrize("text", FILES)
def test_a_mistake_in_a_file_is_one_sentence(text, capsys):
    write(Path("experiments/mine.yaml"), text)
    with pytest.raises(SystemExit) as stop:
        command.main(["experiments=mine"])
    said = capsys.readouterr().err
    assert stop.value.code == 1 and said.count("\n") == 1
    for words in FILES[text]:
        assert words in said


@pytest.mark.parametrize("arguments", [["model.widht=3"], ["data.source=./nowhere"]])
def test_a_real_process_answers_within_three_seconds(arguments):
    code = "from lba_exp.commands.train import main; main()"
    quickest = 99.0
    for _ in range(3):  # a busy machine may be late once
        begin = time.monotonic()
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        quickest = min(quickest, time.monotonic() - begin)
        assert done.returncode == 1 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
        if quickest < 3:
            break
    assert quickest < 3
    assert list(Path.cwd().iterdir()) == []


def test_an_unknown_flag_keeps_exit_code_2(capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["--no-such-flag"])
    assert stop.value.code == 2


def test_configuration_is_checked_without_torch():
    code = "import sys; from lba_exp import composing; composing.compose([]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_entry_composes():
    for model in composing.options("model"):
        assert lba_exp.compose([f"model={model}"]).model.name == model
    for group in ("optim", "trainer", "logger", "parity", "debug"):
        for option in composing.options(group):
            composing.compose([f"{group}={option}"])
    for option in composing.options("augmentation"):
        composing.compose(["size=vit_tiny", "data=digits_images", f"augmentation={option}"])

    for experiment in composing.options("experiments"):
        assert composing.compose([f"experiments={experiment}", *needs(experiment)]).origin.experiment == experiment


def needs(name):
    """What an experiment or a sweep has to be given."""
    source = ["data.source=digits"] if name.startswith(("fashion", "text", "causal", "lra")) else []
    return source + ([f"data.vocabulary={__file__}"] if name.startswith(("text", "causal", "mlm", "glue")) else [])


@pytest.mark.parametrize("sweep", composing.options("sweeps"))
def test_every_job_of_a_sweep_composes(sweep):
    overrides = [f"sweeps={sweep}", *needs(sweep)]
    if "defaults:\n  - " in (text := composing.options("sweeps")[sweep].read_text()) and "_self_" in text:  # another sweep's rows
        rows = list(composing.compose_raw(overrides).sweep.variants)
        overrides.append(f"sweep.only=['{rows[0]}','{rows[-1]}']")
    jobs = planning.plan(overrides).jobs
    assert len({job.folder for job in jobs}) == len(jobs) > 1


def test_the_digits_sweep_is_models_by_seeds():
    jobs = planning.plan(["sweeps=digits"]).jobs
    chosen = {(job.cfg.origin.experiment, job.cfg.model.name, job.cfg.seed) for job in jobs}
    assert len(chosen) == len(jobs) == 12 and ("digits_lion_d", "lion_d", 2) in chosen


def test_the_command_line_wins_over_the_sweep_file():
    assert len(planning.plan(["sweeps=digits", "seed=5"]).jobs) == 4


def test_the_working_folder_comes_before_the_package():
    write(Path("experiments/digits_lion_s.yaml"), "# @package _global_\nseed: 77\n")
    assert composing.compose(["experiments=digits_lion_s"]).seed == 77


def test_a_run_leaves_the_logging_of_its_process_alone(monkeypatch):
    """A further command in the process would find loggers switched off: Hydra's, by which --info speaks, are among them."""
    root, other = logging.getLogger(), logging.getLogger("hydra._internal.hydra")
    before = (root.level, list(root.handlers), other.disabled)
    monkeypatch.setattr("lba_exp.running.train", lambda cfg: {})
    with pytest.raises(SystemExit) as stop:
        command.main([])
    assert stop.value.code == 0 and (root.level, root.handlers, other.disabled) == before and not other.disabled


@pytest.fixture
def _logging_as_before():
    """Hydra's --info logs to the stdout of the moment, for good."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.usefixtures("_logging_as_before")
def test_flags_may_stand_after_overrides(capsys):
    write(Path("mine/model/mine.yaml"), "name: mine\n")
    for arguments in (
        ["model=mine", "--config-dir", "mine", "--cfg", "hydra"],
        ["hydra.searchpath=[file://mine]", "model=mine", "experiments=digits_lion_s", "--info", "searchpath"],
        ["--info"],
        ["seed=3", "--cfg", "job"],
    ):
        try:
            command.main(arguments)
        except SystemExit as stop:
            assert not stop.code, capsys.readouterr().err
        assert capsys.readouterr().out


def test_a_users_hydra_is_left_as_it_was():
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    write(Path("theirs/config.yaml"), "a: 1\n")
    with initialize_config_dir(str(Path("theirs").absolute()), version_base="1.3"):
        before = GlobalHydra.instance().hydra
        composing.compose([])
        assert GlobalHydra.instance().hydra is before


def test_a_plugin_adds_names(monkeypatch):
    monkeypatch.setattr(registry.GATES, "_entries", dict(registry.GATES._entries))
    write(Path("plug_for_test.py"), "from lba_exp.registry import GATES\n@GATES.register('plugged')\nclass Gate: ...\n")
    assert composing.compose(["plugins=[plug_for_test]", "model.mixer.gate=plugged"]).model.mixer.gate == "plugged"
    with pytest.raises(ConfigError, match="plugged"):
        registry.GATES.register("plugged")(object)


def test_trainer_arguments_are_lightnings():
    import inspect

    from lightning.pytorch import Trainer

    names = set(inspect.signature(Trainer.__init__).parameters) - {"self"} - set(config.TRAINER_OWNED)
    assert names == {m.name for m in fields(config.trainer_schema())}
    assert OmegaConf.select(composing.compose(["+trainer.limit_train_batches=0.5"]), "trainer.limit_train_batches") == 0.5


def test_schema_and_registry_agree_with_the_code():
    from lba_exp import ops

    forms = config.MixerSchema.__dataclass_fields__["form"].metadata["choices"]
    assert set(ops.MODEL_FORMS) | {"fused", "auto"} == set(forms)
    for table in (registry.FEATURE_MAPS, registry.GATES, registry.MIXERS, registry.MODELS, registry.TASKS, registry.DATA):
        for name in table.names:
            assert callable(table[name])


def test_every_setting_says_what_it_is():
    def walk(node, prefix=""):
        for member in fields(node):
            value = getattr(node, member.name)
            if is_dataclass(value):
                if member.name != "trainer":
                    walk(value, f"{prefix}{member.name}.")
            else:
                assert member.metadata.get("about"), prefix + member.name

    walk(config.run_schema())


def test_a_changed_configuration_is_checked_again():
    cfg = lba_exp.compose([])
    cfg.model.heads = 5
    with pytest.raises(ConfigError, match="does not divide"):
        checks.check(cfg)
    with pytest.raises(UserError, match="does not divide"):
        lba_exp.train(cfg)
