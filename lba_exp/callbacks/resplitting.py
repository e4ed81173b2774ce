"""Going on with the same optimizer steps cut into other batches: ``trainer.accumulate_grad_batches`` may change on resume."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from lba_exp.errors import ConfigError


class Resplitting(pl.Callback):
    """Translates a checkpoint's place in the data where ``data.global_batch_size`` is shared out in other pieces than when it was written.

    Lightning and the loader count batches. A checkpoint is written at the border of an optimizer step, or at an epoch's end, and both are
    borders of batches too, whatever their size.
    """

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        loop = checkpoint["loops"]["fit_loop"]
        states = loop["state_dict"].get("combined_loader") or []
        order = getattr(trainer.datamodule.train_dataloader(), "order", None)
        if len(states) != 1 or order is None or "order" not in states[0]:
            return
        [state] = states
        before, now = state["order"]["global_batch"], order.global_batch
        if before == now or state["order"] | {"global_batch": now} != order.facts():
            return  # nothing to do, or no place of this run: the loader says so
        if trainer.limit_train_batches not in (None, 1.0):
            raise ConfigError("trainer.accumulate_grad_batches cannot change on resume where trainer.limit_train_batches is given.")
        length, length_before = len(order), order.samples // before if order.drop_last else -(-order.samples // before)

        def place(batches: int) -> int:
            epochs, rest = divmod(batches, length_before)
            if rest * before % now:
                raise ConfigError(
                    f"the checkpoint stands after {rest * before} samples of its epoch, no multiple of the {now} of a batch here: "
                    "resume it with the data.global_batch_size that it was made with."
                )
            return epochs * length + rest * before // now

        state["position"] = place(state["position"])
        state["order"]["global_batch"] = now
        progress = loop["epoch_loop.batch_progress"]
        for counts in (progress["current"], progress["total"]):
            processed, uncompleted = counts["processed"], counts["processed"] - counts["completed"]
            counts.update(dict.fromkeys(("ready", "started", "processed"), place(processed)))
            counts["completed"] = counts["processed"] - uncompleted
