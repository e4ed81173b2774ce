"""Residual blocks around any mixer, and the switch between the forms of a stack of mixers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lba_exp.nn.checks import check_positive
from lba_exp.ops.checks import choice


class PreNormBlock(nn.Module):
    """x + dropout(mixer(norm(x), padding_mask)), then x + dropout(mlp(norm(x))): (B, L, width) -> (B, L, width).

    Args:
        mixer: called as ``mixer(x, padding_mask)``, keeps the shape.
        width: features per token.
        mlp_ratio: hidden width of the GELU MLP over width; above 0.
        dropout: on both residual branches; from 0 to below 1.
    """

    def __init__(self, mixer: nn.Module, width: int, *, mlp_ratio: float = 4.0, dropout: float = 0.0):
        super().__init__()
        check_positive(width=width)
        if not mlp_ratio > 0:
            raise ValueError(f"mlp_ratio: expected a number above 0, got {mlp_ratio}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected a number >= 0 and below 1, got {dropout}")
        hidden = max(1, round(width * mlp_ratio))
        self.mixer_norm = nn.LayerNorm(width)
        self.mixer = mixer
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        x = x + self.dropout(self.mixer(self.mixer_norm(x), padding_mask))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class MixerStack(nn.Module):
    """Base of models that hold mixers: one form for all that have forms, and the state size of all together.

    A subclass sets ``self.blocks``, modules with a ``mixer`` each. A mixer has ``forms`` (empty where it has but one way of computing),
    ``form`` where that is not empty, and ``state_size`` (None where a recurrent form would have no fixed one).
    """

    blocks: Sequence[nn.Module]

    @property
    def mixers(self) -> list[nn.Module]:
        return [block.mixer for block in self.blocks]

    @property
    def forms(self) -> tuple[str, ...]:
        """The forms that every linear layer has; empty for a model without linear layers."""
        forms = [mixer.forms for mixer in self.mixers if mixer.forms]
        return tuple(form for form in forms[0] if all(form in others for others in forms)) if forms else ()

    @property
    def form(self) -> str | None:
        """The form of the linear layers; None where there are none, or where they differ."""
        forms = {mixer.form for mixer in self.mixers if mixer.forms}
        return forms.pop() if len(forms) == 1 else None

    def set_form(self, form: str) -> str | None:
        """Switches every linear layer to ``form``, one of ``forms`` or ``"auto"``; the weights stay.

        Returns:
            The form before.

        Raises:
            ValueError: for an unknown form, and on a model without linear layers. Nothing is changed then.
        """
        if not self.forms:
            raise ValueError(f"form: got {form!r}, but this model has no linear attention layer, so it has no forms")
        choice("form", form, (*self.forms, "auto"))
        previous = self.form
        for mixer in self.mixers:
            if mixer.forms:
                mixer.form = form
        return previous

    @property
    def state_size(self) -> int | None:
        """Numbers that the recurrent form holds per sequence, over all layers; None where a layer has no fixed size."""
        sizes = [mixer.state_size for mixer in self.mixers]
        return None if None in sizes else sum(sizes)
