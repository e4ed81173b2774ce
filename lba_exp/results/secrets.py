"""What may not be written down: the keys and passwords in the environment."""

from __future__ import annotations

import os
import re

NAMES = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$")
SHORTEST = 8  # characters: what is shorter is a word like any other


def redacted(text: str) -> str:
    """A text with ``***`` for the value of every environment variable whose name ends in KEY, TOKEN, SECRET, PASSWORD or CREDENTIALS."""
    for name, value in os.environ.items():
        if len(value) >= SHORTEST and NAMES.search(name.upper()):
            text = text.replace(value, "***")
    return text
