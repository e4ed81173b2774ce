"""Bidirectional linear attention: models that train in parallel and run as an RNN, with the same outputs.

cfg = lba_exp.compose(["model=lion_d", "seed=1"])
record = lba_exp.train(cfg)
prediction = lba_exp.load(record["folder"], form="recurrent").predict(images)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lba_exp.inference import Predictor

__version__ = "0.1.0"
__all__ = ["__version__", "compose", "evaluate", "load", "train"]


def compose(overrides: Sequence[str] = ()):
    """The checked configuration of one run from Hydra overrides; see ``lba_exp.composing.compose``."""
    from lba_exp.composing import compose as implementation

    return implementation(overrides)


def train(cfg: Any, *, quiet: bool = False) -> dict[str, Any]:
    """Runs a configuration and returns the run's record; see ``lba_exp.running.train``."""
    from lba_exp.running import train as implementation

    return implementation(cfg, quiet=quiet)


def evaluate(
    run: Any, overrides: Sequence[str] = (), *, split: str = "test", form: str | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Evaluates a finished run in its own or another form, on any split or data set; see ``lba_exp.evaluating.evaluate``."""
    from lba_exp.evaluating import evaluate as implementation

    return implementation(run, overrides, split=split, form=form, quiet=quiet)


def load(source: Any, *, device: Any = "auto", form: str = "auto", vocabulary: Any = None) -> Predictor:
    """A trained model ready to predict, from a run folder, a checkpoint or a model folder; see ``lba_exp.inference.load``."""
    from lba_exp.inference import load as implementation

    return implementation(source, device=device, form=form, vocabulary=vocabulary)
