"""Vision models in the published naming (timm's, with the gates ``a_i`` and ``a2_i`` in ``attn``) <-> ``VisionTransformer``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lba_exp.convert import names
from lba_exp.errors import WeightsError
from lba_exp.models.vision import VisionTransformer, patch_grid

POOLS = {"mean": "mean_all", "cls": "class_token"}
FEATURE_MAPS = {"none": "elu_plus_one", "fixed": "silu_normalised", "selective": "silu_normalised"}


def load_lion_vision(
    state_dict: Mapping[str, Tensor], *, num_heads: int, image_size: int | Sequence[int], pool: str, softmax: bool = False
) -> VisionTransformer:
    """A vision Transformer from published weights (arXiv 2502.16249): ``model(images) -> logits``.

    The kind of a layer is read from its keys: ``attn.a_i.weight`` is LION-S (lambda = 1 - sigmoid(a_i x), the class token's gate 1),
    ``attn.a_i`` LION-D (lambda = sigmoid(a_i)), neither LION-LIT; ``a2_i`` beside them is the second order of the multi-scan. Softmax
    attention has the very keys of LION-LIT, so it has to be asked for.

    Args:
        state_dict: published names -> tensors; ``cls_token`` and ``pos_embed`` may be missing. The model takes the tensors' dtype.
        num_heads: heads per layer.
        image_size: height and width in pixels, or one number for both.
        pool: ``"mean"`` over all tokens, the class token (where there is one) included, or ``"cls"``.
        softmax: layers without gates are softmax attention (ViT, DeiT), not LION-LIT.

    Returns:
        The model in evaluation mode, in the parallel form.

    Raises:
        lba_exp.errors.WeightsError: keys that are missing or unknown, or sizes that do not fit; one sentence that names them.
    """
    published = names.checked(state_dict)
    width, channels, patch_size, patch_width = names.shape(published, "patch_embed.proj.weight", 4)
    if patch_size != patch_width:
        raise WeightsError(f"patch_embed.proj.weight has patches of {patch_size} x {patch_width} pixels: expected square ones.")
    names.check_heads(num_heads, width)
    if not isinstance(pool, str) or pool not in POOLS:
        raise WeightsError(f"pool={pool!r} is not valid: give 'mean' or 'cls'.")
    class_token = "cls_token" in published
    if pool == "cls" and not class_token:
        raise WeightsError("pool='cls' needs a class token, and the weights lack cls_token: give pool='mean'.")
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if not isinstance(size, Sequence) or isinstance(size, str):
        raise WeightsError(f"image_size={image_size!r} is no size in pixels: give one number, or (height, width).")
    try:
        grid = patch_grid(size, patch_size)
    except ValueError as error:
        raise WeightsError(f"{error}.") from None
    layers = [
        _mixer(published, layer, heads=num_heads, grid=grid, class_token=class_token, softmax=softmax)
        for layer in range(names.depth(published, "blocks"))
    ]
    config = {
        "kind": "vit",
        "classes": names.shape(published, "head.weight", 2)[0],
        "width": width,
        "depth": len(layers),
        "heads": num_heads,
        "channels": channels,
        "image_size": list(size),
        "patch_size": patch_size,
        "mlp_ratio": names.shape(published, "blocks.0.mlp.fc1.weight", 2)[0] / width,
        "positional_embedding": "pos_embed" in published,
        "pooling": POOLS[pool] if class_token else "mean",
        "mixer": layers,
    }
    if class_token and "pos_embed" in published and names.shape(published, "pos_embed", 3)[1] == grid[0] * grid[1]:
        row = torch.zeros_like(published["pos_embed"][..., :1, :])  # positions of the patches alone
        published["pos_embed"] = torch.cat([row, published["pos_embed"]], dim=-2)
    return names.build(config, pairs(config), published)


def pairs(config: Mapping[str, Any]) -> list[names.Pair]:
    """The pairs of a vision model of that configuration."""
    found = [*names.both("patches", "patch_embed.proj"), *names.both("norm", "norm"), *names.both("head", "head")]
    if config["pooling"] != "mean":
        found.append(names.flat("class_token.weight", "cls_token", leading=2))
    if config["positional_embedding"]:
        found.append(names.Pair("positions.weight", ("pos_embed",), lambda x: x.flatten(0, -2), lambda x: (x[None],)))
    for layer, mixer in enumerate(config["mixer"]):
        ours, theirs = f"blocks.{layer}", f"blocks.{layer}"
        gates = [("gate", "a_i"), ("gate2", "a2_i")] if mixer.get("scan") == "multi" else [("gate", "a_i")]
        for own, published in (
            ("mixer_norm", "norm1"),
            ("mlp_norm", "norm2"),
            ("mixer.qkv", "attn.qkv"),
            ("mixer.output", "attn.proj"),
            ("mlp.0", "mlp.fc1"),
            ("mlp.2", "mlp.fc2"),
        ):
            found += names.both(f"{ours}.{own}", f"{theirs}.{published}")
        for own, published in gates:
            if mixer.get("gate") == "fixed":
                found.append(names.flat(f"{ours}.mixer.{own}.logit", f"{theirs}.attn.{published}"))
            elif mixer.get("gate") == "selective":
                found += names.negated(f"{ours}.mixer.{own}.projection", f"{theirs}.attn.{published}")
    return found


def _mixer(
    published: Mapping[str, Tensor], layer: int, *, heads: int, grid: tuple[int, int], class_token: bool, softmax: bool
) -> dict[str, Any]:
    prefix = f"blocks.{layer}.attn"
    for gate in ("a_i", "a2_i"):
        names.check_gate(published, f"{prefix}.{gate}", heads)
    gate = "selective" if f"{prefix}.a_i.weight" in published else "fixed" if f"{prefix}.a_i" in published else "none"
    if gate == "none" and softmax:
        return {"kind": "softmax"}
    settings = {"kind": "linear", "feature_map": FEATURE_MAPS[gate], "gate": gate, "convention": "key", "scale": "after"}
    if gate == "selective" and class_token:
        settings["open_first"] = True
    if {f"{prefix}.a2_i", f"{prefix}.a2_i.weight"} & published.keys():
        settings |= {"scan": "multi", "grid": list(grid), "class_token": class_token}
    return settings
