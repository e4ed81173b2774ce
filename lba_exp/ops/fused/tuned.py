"""Plans that ``lba-bench tune`` found the fastest on a GPU: a file, read once a process."""

from __future__ import annotations

import functools
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import triton

from lba_exp.ops.fused.candidates import CANDIDATES, Key, Plan

VARIABLE = "LBA_EXP_PLANS"


def path() -> Path:
    """The file: what the environment's ``LBA_EXP_PLANS`` names, else ``lba_exp/fused_plans.json`` in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(VARIABLE) or Path(cache) / "lba_exp" / "fused_plans.json")


def section(device: str) -> str:
    """What a file's plans hold for: a GPU's name and Triton's version."""
    return f"{device}, Triton {triton.__version__}"


@functools.cache
def plans(device: str) -> dict[Key, Plan]:
    """The plans for a GPU of that name, of those that are candidates; none where there is no file, or, with a warning, no valid one."""
    try:
        found = {_key(name): Plan(*sizes) for name, sizes in read().get(section(device), {}).items()}
    except (TypeError, ValueError) as error:
        warnings.warn(f"{path()} holds no plans of the fused form ({error}) and is not used; lba-bench tune writes it anew.", stacklevel=2)
        return {}
    return {key: plan for key, plan in found.items() if plan in CANDIDATES.get(key, ())}


def read() -> dict[str, dict[str, list]]:
    """Sections -> plans, as they stand in the file; empty without one. Raises ValueError for a file of another kind."""
    try:
        found = json.loads(path().read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    if not isinstance(found, dict) or not all(isinstance(x, dict) for x in found.values()):
        raise ValueError("no table of plans by GPU")
    return found


def text_of(device: str, best: Mapping[Key, Plan]) -> str:
    """The file's text with these plans for a GPU of that name, beside what it holds for others."""
    try:
        others = read()
    except ValueError:
        others = {}
    own = {" ".join(map(str, key)): list(vars(plan).values()) for key, plan in best.items()}
    return json.dumps(others | {section(device): others.get(section(device), {}) | own}, indent=1) + "\n"


def _key(name: str) -> Key:
    kind, precision, width, span = name.split()
    return kind, precision, int(width), span
