"""``lba-train``: one run, or with -m a sweep of runs.

lba-train model=lion_d optim.lr=1e-3
lba-train experiments=fashion_mnist_lion_s data.source=FOLDER
lba-train -m sweeps=digits
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from lba_exp import composing
from lba_exp.commands.common import fail
from lba_exp.errors import ConfigError, Terminated, UserError

COMMAND = "lba-train"
_outcomes: list[tuple[list[str], str, str]] = []  # overrides, status, sentence


def main(arguments: list[str] | None = None) -> None:
    """Entry point; exits with 0, with 1 after a mistake or a failed run, with 2 for an unknown flag."""
    arguments = sys.argv[1:] if arguments is None else arguments
    args = get_args_parser().parse_args(arguments)
    if args.help or args.hydra_help or args.shell_completion or args.info:
        return _hydra(arguments, args.overrides)
    try:
        if args.config_name is not None or args.config_path is not None:
            raise ConfigError(
                "--config-name and --config-path are not for lba-train: give --config-dir FOLDER, or put files into experiments/."
            )
        overrides = _with_config_dir(args.overrides, args.config_dir)
        if args.multirun:
            jobs = composing.check_sweep(overrides)
            _refuse_many_devices(jobs)
        else:
            cfg = composing.compose(overrides)
            if args.cfg == "job":
                print(OmegaConf.to_yaml(cfg, resolve=args.resolve), end="")
                return None
    except UserError as error:
        fail(COMMAND, str(error))
        sys.exit(1)
    if args.cfg:
        return _hydra(arguments, args.overrides)
    _outcomes.clear()
    _hydra(arguments, args.overrides)
    if args.multirun:
        _summary()
    sys.exit(1 if any(status == "failed" for _, status, _ in _outcomes) else 0)


def _with_config_dir(overrides: list[str], folder: str | None) -> list[str]:
    if folder is None:
        return list(overrides)
    if not Path(folder).is_dir():
        raise ConfigError(f"--config-dir {folder} is no folder: give a folder that holds configuration groups.")
    return [*overrides, f"hydra.searchpath=['file://{Path(folder).absolute()}']"]


def _refuse_many_devices(jobs: list[list[str]]) -> None:
    seen = set()
    for job in jobs:
        parts = tuple(o for o in job if o.split("=")[0].lstrip("+").split(".")[0] in ("trainer", "experiments", "sweeps", "debug"))
        if parts in seen:
            continue
        seen.add(parts)
        trainer = composing.compose([o for o in job if not o.startswith("hydra.")], in_sweep=True).trainer
        devices = len(trainer.devices) if OmegaConf.is_list(trainer.devices) else trainer.devices
        if (devices not in (1, "1") and not (devices == "auto" and trainer.accelerator == "cpu")) or trainer.num_nodes > 1:
            raise ConfigError(
                f"-m with trainer.devices={trainer.devices} is not safe: each process of a run would start the sweep again; "
                "run the jobs one by one without -m, or give trainer.devices=1."
            )


def _hydra(arguments: list[str], overrides: list[str]) -> None:
    """Hands over to Hydra: it lists, completes, composes and launches.

    The search path stands beside the other overrides: argparse takes them from one place of the command line only.
    """
    composing.register_schema()
    path = composing.search_path_override(o for o in overrides if "=" in o)
    arguments = [a for a in arguments if not a.lstrip("+").startswith("hydra.searchpath=")]
    first = next((arguments.index(o) for o in overrides if o in arguments), 0)
    saved, sys.argv = sys.argv, [sys.argv[0], *arguments[:first], path, *arguments[first:]]
    try:
        hydra.main(config_path=str(composing.conf_folder()), config_name=composing.CONFIG_NAME, version_base="1.3")(job)()
    finally:
        sys.argv = saved


def job(raw: DictConfig) -> dict | None:
    """One run under Hydra; never raises for a failed run, so that the other runs of a sweep go on."""
    context = HydraConfig.get()
    overrides = list(context.overrides.task)
    choices = dict(context.runtime.choices)
    in_sweep = context.mode is not None and context.mode.name == "MULTIRUN"
    HydraConfig.instance().cfg = None  # Lightning would give the further processes of a run flags of Hydra's that this command refuses
    try:
        cfg = composing.finalise(raw, overrides, choices, in_sweep=in_sweep)
        from lba_exp.running import train  # torch and Lightning: imported once the configuration is known to be right

        record = train(cfg)
    except Terminated as error:
        fail(COMMAND, str(error))
        sys.exit(128 + signal.SIGTERM)
    except UserError as error:
        _outcomes.append((overrides, "failed", str(error)))
        fail(COMMAND, str(error))
        return None
    except KeyboardInterrupt:
        fail(COMMAND, "stopped by the user; the same command goes on from the last checkpoint.")
        sys.exit(130)
    except Exception as error:
        _outcomes.append((overrides, "failed", f"{type(error).__name__}: {error}"))
        traceback.print_exc()
        return None
    _outcomes.append((overrides, "skipped" if record.get("already_finished") else "done", record["folder"]))
    return record


def _summary() -> None:
    """The runs of a sweep, counted and listed."""
    print(f"\n{len(_outcomes)} runs: " + ", ".join(f"{sum(o[1] == s for o in _outcomes)} {s}" for s in ("done", "skipped", "failed")))
    for overrides, status, sentence in _outcomes:
        shown = os.path.relpath(sentence) if status != "failed" else sentence
        print(f"  {status:8}{' '.join(o for o in overrides if not o.startswith('hydra.'))}: {shown}")


if __name__ == "__main__":
    main()
