"""Errors that are the user's to mend: one sentence, shown without a traceback, exit code 1."""


class UserError(Exception):
    """What was wrong and what is valid, in one sentence."""


class ConfigError(UserError):
    """A mistake in the configuration: a key, a value or a combination of values."""


class DataError(UserError):
    """A data set that is missing, or that does not hold what the configuration says."""


class ParityError(UserError):
    """A form of a model that does not reproduce the form it trains in (``parity=strict``)."""


class RunFolderError(UserError):
    """A run folder that is in use, finished, or holds another run."""


class FolderInUseError(RunFolderError):
    """A run folder that another process holds."""


class Terminated(UserError):
    """A run that was asked to end by a signal (SIGTERM, Slurm's), and has saved where it stands; commands exit with 143."""


class TrainingError(UserError):
    """Training that cannot go on: a loss that is not a number, a device out of memory."""


class WeightsError(UserError, ValueError):
    """Weights or a model folder that are not what was asked for, or that may not be overwritten."""


def whose_memory(error: BaseException) -> str | None:
    """Whose memory ran out, "GPU" or "the machine"; None for an error of another kind."""
    import torch  # not above: commands read this file before they need torch

    # the driver's own words, where not even a number fits, and those of the CPU's allocator have no class of their own
    if isinstance(error, torch.OutOfMemoryError) or "CUDA error: out of memory" in str(error):
        return "GPU"
    return "the machine" if isinstance(error, MemoryError) or "can't allocate memory" in str(error) else None
