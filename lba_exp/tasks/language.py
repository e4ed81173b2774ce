"""Language modelling as a LightningModule: masked tokens, or the next one."""

from __future__ import annotations

from torch import Tensor, nn

from lba_exp.errors import ConfigError
from lba_exp.tasks.classification import Classification
from lba_exp.tasks.metrics import IGNORED_LABEL


class LanguageModelling(Classification):
    """Trains ``model(inputs, padding_mask, selected=positions) -> (n, vocabulary)`` on batches {"inputs", "labels", ...}.

    Labels are (B, L) int64, the token at the positions that are to be predicted and -100 elsewhere; there are always some. Logits are
    computed at the labelled positions alone. Losses and accuracies are means over those positions of an optimizer step or a split, each
    counted once on any number of devices. Arguments as of ``Classification``, ``classes`` being the size of the vocabulary.
    """

    targets_vary = True

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits (n, vocabulary) at the labelled positions of a batch."""
        return self.logits(batch, selected=batch["labels"] != IGNORED_LABEL)

    def _recorded_part(self) -> nn.Module:
        """The encoder: the number of labelled positions is another one in every batch."""
        encoder = getattr(self.model, "encoder", None)
        if not isinstance(encoder, nn.Module):
            raise ConfigError(
                f"compile=graphs does not go with {type(self.model).__name__}, a language model without an encoder of its own, as the "
                "number of its outputs is another one in every batch: give compile=true."
            )
        return encoder

    def logits_and_labels(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        labels = batch["labels"]
        return self(batch), labels[labels != IGNORED_LABEL]
