"""Which code made a run."""

from __future__ import annotations

import os
import subprocess
from typing import Any


def git_state() -> dict[str, Any]:
    """The commit of the working folder's repository and whether it has uncommitted changes; nulls outside of one."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments], capture_output=True, text=True, timeout=10, env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit, status = git("rev-parse", "HEAD"), git("status", "--porcelain")
    return {"commit": commit, "dirty": None if status is None else bool(status)}
