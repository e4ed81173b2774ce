"""``lba-eval RUN [overrides]``: evaluate a finished run in any form, on any split or data set; its record stays as it is."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from lba_exp.commands.common import check_output, fail
from lba_exp.errors import UserError

COMMAND = "lba-eval"


def main(arguments: list[str] | None = None) -> None:
    """Entry point; exits with 0, or with 1 after a mistake."""
    parser = argparse.ArgumentParser(COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder: one that holds config.yaml and checkpoints/")
    parser.add_argument("overrides", nargs="*", help="form=recurrent, split=validation, data.source=FOLDER, model.mixer.chunk_size=16, ...")
    parser.add_argument("--output", type=Path, help="also write the figures to this new JSON file")
    args = parser.parse_args(arguments)
    own = {"form": None, "split": "test"}
    rest = []
    for override in args.overrides:
        key, _, value = override.partition("=")
        if key in own and value:
            own[key] = value
        else:
            rest.append(override)
    try:
        check_output(args.output)
        from lba_exp.evaluating import evaluate

        result = evaluate(args.run, rest, **own)
        if args.output is not None:
            try:
                args.output.write_text(json.dumps(result, indent=2) + "\n")
            except OSError as error:
                raise UserError(f"{args.output} cannot be written ({error.strerror}).") from None
    except UserError as error:
        fail(COMMAND, str(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
