"""``lba-convert INPUT OUTPUT``: weights from a published checkpoint, a run or a model folder, into a model folder or published names.

lba-convert model.safetensors FOLDER --num-heads 12                                        # LION's masked LM, or Hugging Face's BERT
lba-convert lion_s.pth FOLDER --num-heads 3 --image-size 224 --pool mean                   # LION's vision models, or timm's ViT (--softmax)
lba-convert runs/digits/lion_s/seed0 FOLDER                                                # the best weights of a run
lba-convert FOLDER model.safetensors --to published                                        # back
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from lba_exp.commands.common import fail
from lba_exp.errors import UserError

COMMAND = "lba-convert"


def image_size(text: str) -> tuple[int, int]:
    """224 or 224x192 (height x width), in pixels."""
    sides = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if sides is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no image size: give 224, or 224x192 (height x width)")
    return int(sides[1]), int(sides[2] or sides[1])


def main(arguments: list[str] | None = None) -> None:
    """Entry point; exits with 0, with 1 after a mistake, with 2 for an unknown flag."""
    parser = argparse.ArgumentParser(COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path, help="file of weights (.safetensors, or torch's), model folder, or run folder")
    parser.add_argument("output", type=Path, help="new folder; with --to published a new file NAME.safetensors")
    parser.add_argument("--num-heads", type=int, help="heads per layer of published weights; default: from a config.json beside them")
    parser.add_argument("--image-size", type=image_size, help="of published vision weights, in pixels: 224, or HEIGHTxWIDTH")
    parser.add_argument("--pool", choices=("mean", "cls"), help="of published vision weights: mean over all tokens, or class token")
    parser.add_argument("--softmax", action="store_true", help="vision layers without gates are softmax attention, not LION-LIT")
    parser.add_argument("--to", choices=("folder", "published"), default="folder", help="what to write (default: folder)")
    args = parser.parse_args(arguments)
    try:
        check(args)
        from lba_exp.convert import read_model, save_pretrained, write_published

        options = {"num_heads": args.num_heads, "image_size": args.image_size, "pool": args.pool, "softmax": args.softmax}
        model = read_model(args.input, **options)
        (save_pretrained if args.to == "folder" else write_published)(model, args.output)
        kinds = ", ".join(dict.fromkeys(type(mixer).__name__ for mixer in model.mixers))
        print(f"{args.output}: {type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters, {kinds}")
    except UserError as error:
        fail(COMMAND, str(error))
        sys.exit(1)


def check(args: argparse.Namespace) -> None:
    """Raises UserError for what can be seen before torch is imported."""
    if not args.input.exists():
        raise UserError(f"{args.input} does not exist: give a file of weights, a model folder or a run folder.")
    if args.to == "published" and args.output.suffix != ".safetensors":
        raise UserError(f"{args.output}: with --to published give a name that ends in .safetensors.")
    if args.output.exists() and (args.to == "published" or not args.output.is_dir() or any(args.output.iterdir())):
        raise UserError(f"{args.output} exists already: give another OUTPUT.")


if __name__ == "__main__":
    main()
