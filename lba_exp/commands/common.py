"""What the commands share: one sentence and exit code 1 for a mistake."""

from __future__ import annotations

import sys


def fail(command: str, sentence: str) -> None:
    """Prints a mistake as one sentence on stderr."""
    print(f"{command}: {' '.join(str(sentence).split())}", file=sys.stderr, flush=True)
