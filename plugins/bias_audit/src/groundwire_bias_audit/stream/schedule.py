"""Schedule: the passes in which variants of the model are evaluated, the same on all processes."""

from __future__ import annotations

from typing import Any


def variants_due(trainer: Any, every_n_epochs: int | None) -> bool:
    """True if variants are due in this pass: of every n-th epoch, perhaps the last of the fit, or outside of a fit."""
    if last(trainer):
        return True
    return every_n_epochs is not None and (trainer.current_epoch + 1) % every_n_epochs == 0


def last(trainer: Any) -> bool:
    """True if this run may have no later pass."""
    return str(trainer.state.fn.value) != "fit" or _may_be_last(trainer)


def _may_be_last(trainer: Any) -> bool:
    """Epochs or steps run out before the next validation, or a callback may stop the fit after this one."""
    if trainer.should_stop or not _validated_later(trainer):
        return True
    steps = _batches_between(trainer) / trainer.accumulate_grad_batches
    if trainer.max_steps != -1 and trainer.global_step + steps > trainer.max_steps:
        return True
    return any(c.wait_count + 1 >= c.patience for c in trainer.early_stopping_callbacks)


def _validated_later(trainer: Any) -> bool:
    """True if the epochs leave room for another validation."""
    if trainer.max_epochs in (None, -1):
        return True
    if trainer.check_val_every_n_epoch is None:  # by batches, whatever the epoch
        seen = trainer.fit_loop.total_batch_idx + 1
        return bool(seen + _batches_between(trainer) <= trainer.max_epochs * trainer.num_training_batches)
    later = range(trainer.current_epoch + 2, trainer.max_epochs + 1)
    return any(epoch % trainer.check_val_every_n_epoch == 0 for epoch in later)


def _batches_between(trainer: Any) -> float:
    """From one validation to the next."""
    whole = trainer.num_training_batches * (trainer.check_val_every_n_epoch or 1)
    within = trainer.val_check_batch
    by_batch = trainer.check_val_every_n_epoch is None or (within or whole) < trainer.num_training_batches
    return float(within if by_batch and within is not None else whole)
