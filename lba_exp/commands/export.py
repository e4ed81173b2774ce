"""``lba-export CHECKPOINT --output FILE``: a trained model as a file that runs without this package.

lba-export runs/digits/lion_s/seed0 --output model.pt2 --verify                            # torch.export: any length, any batch
lba-export runs/digits/lion_s/seed0 --to onnx --output model.onnx --form parallel
lba-export runs/text/lion_s/seed0 --to step --output step.pt2                              # a causal language model, token by token
lba-export runs/digits/lion_s/seed0 --to step --output FOLDER                              # both directions: each layer's operator
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lba_exp.commands.common import check_output, fail
from lba_exp.errors import UserError

COMMAND = "lba-export"


def main(arguments: list[str] | None = None) -> None:
    """Entry point; exits with 0, with 1 after a mistake or where an output differs, with 2 for an unknown flag."""
    parser = argparse.ArgumentParser(COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="run folder, checkpoint of a run, or model folder")
    parser.add_argument("--to", default="torch-export", help="torch-export (default), step or onnx (opset 20; needs lba-exp[onnx])")
    parser.add_argument("--output", type=Path, required=True, help="new file: NAME.pt2, NAME.onnx; or a new folder of steps")
    parser.add_argument("--form", help="chunkwise (default; linear in the length) or parallel")
    parser.add_argument("--batch", type=int, help="sequences that the file takes; default: any number")
    parser.add_argument("--block", type=int, default=1, help="tokens that a step takes (default: 1)")
    parser.add_argument("--padding-mask", action="store_true", help="the file takes a padding mask (B, L), True at real tokens, too")
    parser.add_argument("--token-types", action="store_true", help="the file takes a padding mask and token types (B, L), too")
    parser.add_argument("--verify", action="store_true", help="run the file at three lengths it was not made at, against the model")
    args = parser.parse_args(arguments)
    options = {name: getattr(args, name) for name in ("to", "form", "batch", "block", "padding_mask", "token_types", "verify")}
    try:
        from lba_exp.export.options import check_options

        check_options(args.checkpoint, args.output, **options)
        check_output(args.output)
        from lba_exp.export import export

        report = export(args.checkpoint, args.output, **options)
    except UserError as error:
        fail(COMMAND, str(error))
        sys.exit(1)
    about = report["metadata"]
    said = [f"{report['file']}: {about['model']}, {args.to}"]
    said += [f"opset {about['opset']}"] if "opset" in about else []
    said += [f"{about['form']} form"] if about["form"] else []
    said += [f"{x['name']} {tuple(x['shape'])} {x['dtype']}".replace("'", "") for x in about.get("inputs", ())]
    print(", ".join(said))
    for name, error in report["errors"].items():
        print(f"relative error against the model, {name}: {error:.1e}")


if __name__ == "__main__":
    main()
