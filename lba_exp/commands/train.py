"""``lba-train``: one run, or with -m a sweep of runs.

lba-train model=lion_d optim.lr=1e-3
lba-train experiments=fashion_mnist_lion_s data.source=FOLDER
lba-train -m sweeps=digits
lba-train -m sweeps=digits --dry-run
"""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from lba_exp import composing, trials
from lba_exp.commands.common import fail
from lba_exp.commands.job import hydra_job
from lba_exp.errors import ConfigError, Terminated, UserError

COMMAND = "lba-train"
DRY_RUN = "--dry-run"  # with -m: print the jobs, run nothing


def main(arguments: list[str] | None = None) -> None:
    """Entry point; exits with 0, with 1 after a mistake or a failed run, 2 for an unknown flag, 128 + n where signal n stops it."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    dry_run = DRY_RUN in arguments
    arguments = [a for a in arguments if a != DRY_RUN]
    args = get_args_parser().parse_args(arguments)
    if args.help or args.hydra_help or args.shell_completion or args.info:
        return _hydra(arguments, args.overrides)
    try:
        if args.config_name is not None or args.config_path is not None:
            raise ConfigError(
                "--config-name and --config-path are not for lba-train: give --config-dir FOLDER, or put files into experiments/."
            )
        if args.multirun and args.cfg:
            raise ConfigError("--cfg shows the configuration of one run: leave -m out, or give --dry-run to list the jobs.")
        if dry_run and not args.multirun:
            raise ConfigError("--dry-run lists the jobs of a sweep: add -m (--multirun).")
        overrides = _with_config_dir(args.overrides, args.config_dir)
        if args.multirun:
            trials.check_alone()
            sys.exit(_sweep(arguments, args.overrides, overrides, dry_run))
        cfg = composing.compose(overrides)
        if args.cfg == "job":
            print(OmegaConf.to_yaml(cfg, resolve=args.resolve), end="")
            return None
    except UserError as error:
        fail(COMMAND, str(error))
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    _hydra(arguments, args.overrides, job)
    sys.exit(0)


def _sweep(arguments: list[str], overrides: list[str], with_folder: list[str], dry_run: bool) -> int:
    """Checks every job, then has Hydra's sweeper run them, or lists them; returns the exit code."""
    from lba_exp.sweeping import perform, report
    from lba_exp.sweeping import plan as planning

    plan = planning.plan(with_folder)
    if dry_run:
        report.show_plan(plan, perform.console())
        return 0
    token = planning.ACTIVE.set(plan)
    try:
        _hydra(arguments, overrides, hydra_job)
    finally:
        planning.ACTIVE.reset(token)
    return report.exit_code(plan)


def _with_config_dir(overrides: list[str], folder: str | None) -> list[str]:
    if folder is None:
        return list(overrides)
    if not Path(folder).is_dir():
        raise ConfigError(f"--config-dir {folder} is no folder: give a folder that holds configuration groups.")
    return [*overrides, f"hydra.searchpath=['file://{Path(folder).absolute()}']"]


def _hydra(arguments: list[str], overrides: list[str], task: Callable[[DictConfig], dict] = hydra_job) -> None:
    """Hands over to Hydra: it lists, completes, composes and launches.

    The search path stands beside the other overrides: argparse takes them from one place of the command line only.
    """
    composing.register_schema()
    path = composing.search_path_override(o for o in overrides if "=" in o)
    arguments = [a for a in arguments if not a.lstrip("+").startswith("hydra.searchpath=")]
    first = next((arguments.index(o) for o in overrides if o in arguments), 0)
    saved, sys.argv = sys.argv, [sys.argv[0], *arguments[:first], path, *arguments[first:]]
    try:
        hydra.main(config_path=str(composing.conf_folder()), config_name=composing.CONFIG_NAME, version_base="1.3")(task)()
    finally:
        sys.argv = saved


def job(raw: DictConfig) -> dict:
    """One run under Hydra."""
    context = HydraConfig.get()
    HydraConfig.instance().cfg = None  # Lightning would give the further processes of a run flags of Hydra's that this command refuses
    try:
        cfg = composing.finalise(raw, list(context.overrides.task), dict(context.runtime.choices))
        from lba_exp.running import train  # torch and Lightning: imported once the configuration is known to be right

        return train(cfg)
    except Terminated as error:
        fail(COMMAND, str(error))
        sys.exit(128 + signal.SIGTERM)
    except UserError as error:
        fail(COMMAND, str(error))
        sys.exit(1)
    except KeyboardInterrupt:
        fail(COMMAND, "stopped by the user; the same command goes on from the last checkpoint.")
        sys.exit(130)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


if __name__ == "__main__":
    main()
