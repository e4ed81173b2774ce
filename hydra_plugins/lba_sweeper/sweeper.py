"""Hydra's way in: the sweeper that runs an lba_exp sweep, and the launcher that gives each job a process of its own.

Hydra's scanner runs this file before it stands in sys.modules: annotations of dataclasses are no text here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write


@dataclass
class SweeperConf:
    """``hydra/sweeper=lba``. What is varied stands in ``sweep:``; ``params`` is there to be refused with a sentence."""

    _target_: str = "hydra_plugins.lba_sweeper.sweeper.LbaSweeper"
    params: dict[str, Any] | None = None


@dataclass
class LauncherConf:
    """``hydra/launcher=local``; ``jobs``: how many run side by side."""

    _target_: str = "hydra_plugins.lba_sweeper.sweeper.LocalLauncher"
    jobs: int = 1


ConfigStore.instance().store(group="hydra/sweeper", name="lba", node=SweeperConf, provider="lba_exp")
ConfigStore.instance().store(group="hydra/launcher", name="local", node=LauncherConf, provider="lba_exp")


class LbaSweeper(Sweeper):
    """Expands ``sweep:`` and the command line's lists, leaves finished jobs out, launches the others, tells how each ended."""

    def __init__(self, params: dict[str, Any] | None = None):
        super().__init__()

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from lba_exp.sweeping import plan as planning
        from lba_exp.sweeping.expand import text

        given = [*config.hydra.overrides.hydra, *config.hydra.overrides.task]
        self.plan = planning.ACTIVE.get() or planning.plan([o for o in given if not o.startswith("hydra.mode=")])
        with read_write(config.hydra), open_dict(config.hydra):  # launchers keep their own files in the sweep's folder
            config.hydra.sweep.dir = str(self.plan.folder)
            config.hydra.overrides.hydra.append(f"hydra.sweep.dir={text(str(self.plan.folder))}")
        self.config, self.hydra_context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> list[dict[str, Any]]:
        """The outcome of each job, in order; ``arguments`` are in the plan already."""
        from lba_exp.sweeping.perform import perform

        perform(self.plan, self.launcher)
        return [self.plan.outcomes.get(job.number, {"status": "not started"}) for job in self.plan.jobs]


class LocalLauncher(Launcher):
    """Each job a process of its own on this machine (``lba_exp.sweeping.local``)."""

    def __init__(self, jobs: int = 1):
        super().__init__()
        self.report: Any = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        from lba_exp.errors import ConfigError
        from lba_exp.sweeping.local import Pool

        if self.report is None:
            raise ConfigError("hydra/launcher=local is for hydra/sweeper=lba.")
        plan = self.report.plan
        by_overrides = {tuple(job.overrides): job for job in plan.jobs}
        jobs = [by_overrides[tuple(overrides)] for overrides in job_overrides]
        for_hydra = [o for o in self.config.hydra.overrides.hydra if o.startswith("hydra.searchpath=")]
        environment = {k: str(v) for k, v in OmegaConf.to_container(self.config.hydra.job.env_set, resolve=True).items()}
        Pool(plan, for_hydra, environment, self.report.ended, self.report.say).run(jobs)
        return [
            JobReturn(overrides=job.overrides, cfg=job.cfg, status=JobStatus.COMPLETED, _return_value=plan.outcomes[job.number])
            for job in jobs
        ]
