"""Early stopping: no more epochs once validation has not become better for a while."""

import logging

import pytorch_lightning as pl
from pytorch_lightning.callbacks import EarlyStopping

log = logging.getLogger("sequencer2d")


class StopWithoutImprovement(EarlyStopping):
    """Ends training after `patience` validations without a better accuracy. Its count is part of a checkpoint.

    It must stand before what saves the checkpoint of a validation.
    """

    def __init__(self, patience: int) -> None:
        super().__init__("valid_acc", mode="max", patience=patience, check_on_train_epoch_end=False)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A run that had ended so, and only lacks its final evaluation, is not trained again."""
        if self.wait_count >= self.patience:
            trainer.should_stop = True

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if self.wait_count >= self.patience:
            epoch = trainer.current_epoch + 1
            log.info("stopped after epoch %d: %d validations without a better one", epoch, self.wait_count)
