"""How long the heads remember: the distribution of the decays of the trained model, per layer and head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lba_exp.callbacks.parity_measure import head_of, linear_layers, operator_calls
from lba_exp.nn.mixer import OperatorMixer
from lba_exp.results.compare import run_form, undisturbed

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SEQUENCES = 32  # at most so many of the first test batch


class Decays(pl.Callback):
    """On test, reads the log decays that every linear layer gives to the operator on the first batch (arXiv 2502.16249, figure of the
    learned decays).

    A model has linear layers with ``operands(x, padding_mask)``; batches are dicts as for ``Parity``. The model is left as it was found.
    """

    def __init__(self) -> None:
        self._found: dict[str, Any] | None = None

    def on_test_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        model = getattr(pl_module, "model", None)
        if batch_idx == 0 and dataloader_idx == 0 and model is not None:
            with undisturbed(model), trainer.precision_plugin.forward_context():
                self._found = decay_quantiles(getattr(model, "_orig_mod", model), head_of(batch, SEQUENCES))

    def record(self) -> dict[str, Any] | None:
        """The decays' part of a run's record, see ``decay_quantiles``; None before the test and for a model without linear layers."""
        return self._found


def decay_quantiles(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any] | None:
    """Quantiles of log decay over the tokens of a batch (and over the channels of a vector decay), for each layer and head.

    Args:
        model: called as ``model(inputs, padding_mask)``.
        batch: ``inputs`` and, where there is padding, ``padding_mask``.

    Returns:
        ``quantiles`` (the levels), ``sequences``, and ``layers``: in the order in which they run, dicts with ``layer`` (the module's name,
        and the scan or the direction where there are several calls) and, for ``forward`` and ``backward``, None where there is no decay, or
        for each head the list of its quantiles of log f (at most 0). None for a model without linear layers.
    """
    names = {module: name for name, module in model.named_modules()}
    layers: dict[str, dict[str, Any]] = {}

    def hook(layer, args, kwargs):
        mask = args[1] if len(args) > 1 else kwargs.get("padding_mask")
        calls = operator_calls(layer, args[0], mask)
        for number, operands in enumerate(calls, 1):
            apart = len({call.get("direction") for call in calls}) == len(calls)
            which = "" if len(calls) == 1 else f" ({operands['direction']})" if apart else f" (scan {number})"
            name, heads = names[layer] + which, {}
            decays = getattr(layer, "call_decays", OperatorMixer.call_decays)(operands)
            for direction, edge in (("forward", 0), ("backward", -1)):
                decay = decays[direction]
                heads[direction] = None if decay is None else _per_head(decay, operands.get("padding_mask", mask), edge)
            layers.setdefault(name, {"layer": name, **heads})

    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in linear_layers(model)]
    try:
        if not handles:
            return None
        with torch.no_grad():
            run_form(model, None, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {"quantiles": list(QUANTILES), "sequences": len(batch["inputs"]), "layers": list(layers.values())}


def _per_head(decay: Tensor, mask: Tensor | None, edge: int) -> list[list[float]]:
    """Quantiles of the decays of every head.

    Args:
        decay: (H,), (H, Dk), (B, L, H) or (B, L, H, Dk).
        mask: (B, L) bool, True at real tokens; or None.
        edge: the position whose decay never enters: 0 forward, -1 backward.
    """
    decay, mask = decay.detach().cpu().double(), None if mask is None else mask.cpu()
    if decay.dim() <= 2:
        samples = decay.reshape(decay.shape[0], -1)
    else:
        kept = torch.ones(decay.shape[:2], dtype=torch.bool) if mask is None else mask.clone()
        if decay.shape[1] > 1:
            kept[:, edge] = False
        samples = decay[kept].reshape(int(kept.sum()), decay.shape[2], -1).transpose(0, 1).flatten(1)
    levels = torch.tensor(QUANTILES, dtype=torch.float64)
    return [[float(x) for x in _quantiles(head, levels)] for head in samples]


def _quantiles(values: Tensor, levels: Tensor) -> Tensor:
    """Quantiles by linear interpolation; torch.quantile refuses more than 2^24 values."""
    ordered = values.sort().values
    place = levels * (len(ordered) - 1)
    low = place.floor().long()
    high = place.ceil().long()
    return torch.lerp(ordered[low], ordered[high], place - low)
