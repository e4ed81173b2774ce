"""Trials of W&B's own sweeps: what ``wandb agent`` tells the run that it starts, and what the run makes of it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lba_exp.errors import ConfigError

SWEEP, TRIAL, MODE = "WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_MODE"  # set by the agent, but for the mode, which is the user's
FOLDER = "wandb"  # of sweeps/: the files that W&B reads, and lba-train does not
MODES = {"offline": "offline", "dryrun": "offline", "disabled": "off"}  # W&B's word -> ours


def trial() -> tuple[str, str] | None:
    """Ids of the W&B sweep and of its trial, where an agent started this process."""
    ids = os.environ.get(SWEEP), os.environ.get(TRIAL)
    return ids if all(ids) else None


def adopt(plain: dict[str, Any], overrides: Iterable[str]) -> None:
    """Puts the trial into a configuration: its sweep as the group, a run folder of its own, online unless something else was asked for.

    Args:
        plain: the configuration as plain dicts, ``origin`` filled in; changed where an agent started this process.
        overrides: what the command line says.
    Raises:
        ConfigError: a ``folder=`` that all trials would share.
    """
    ids = trial()
    if ids is None:
        return
    if plain["folder"]:
        raise ConfigError(f"folder={plain['folder']} would be the folder of every trial of the W&B sweep: give root= in its command.")
    plain["origin"] |= {"sweep": f"wandb-{ids[0]}", "trial": ids[1]}
    keys = {override.lstrip("+").partition("=")[0] for override in overrides}
    if plain["logger"]["wandb"] == "offline" and not keys & {"logger", "logger.wandb"}:  # the default, which the agent cannot see
        plain["logger"]["wandb"] = MODES.get(os.environ.get(MODE, ""), "online")


def check_alone() -> None:
    """Raises ConfigError where an agent started a sweep of ours: its jobs would share one trial."""
    if trial() is not None:
        raise ConfigError("a W&B agent starts one run a trial: leave -m (--multirun) out of the sweep's command.")


def check_sweep(name: str, roots: Sequence[Path]) -> None:
    """Raises ConfigError where ``sweeps=NAME`` names a file that is W&B's."""
    for root in roots:
        path = root / "sweeps" / f"{name}.yaml"
        if name.startswith(f"{FOLDER}/") and path.is_file():
            shown = os.path.relpath(path) if path.is_relative_to(Path.cwd()) else path
            raise ConfigError(f"sweeps={name} is a sweep of W&B's own: run `wandb sweep {shown}`, then the `wandb agent` that it names.")
