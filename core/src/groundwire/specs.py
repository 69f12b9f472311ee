"""The hooks that a plugin can implement, as pluggy specifications.

Every hook may take ``run`` (:class:`groundwire.RunContext`), and an implementation may leave out arguments that it
does not need. Only what Lightning's own callback hooks cannot express is here: epochs, batches, state and logging
stay Lightning's. ``docs/hooks.md`` shows the same text and is checked against this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from groundwire.context import RunContext
from groundwire.errors import Problem
from groundwire.hooks.markers import hookspec
from groundwire.hooks.registry import specified
from groundwire.records import (
    BatchStage,
    Fields,
    Finding,
    GradientStep,
    Report,
    Section,
    Stage,
    Variant,
)
from groundwire.train_data import TrainData


@hookspec
def gw_check(run: RunContext) -> list[Problem] | None:
    """Say why this run must not start.

    When: twice a run, at opening (strategy, order, conflicts) and again when model and optimizers exist; ``run.ready``
    is False the first time and True the second. The problems of all plugins are raised together.
    May change: nothing.
    Returns: a list of :class:`Problem`, or None.

    .. versionadded:: 0.1
    """


@hookspec(firstresult=True)
def gw_fields(batch: Any, run: RunContext) -> Fields | None:
    """Tell what a batch holds.

    When: whenever a plugin needs inputs, targets, groups, source, time or ids of a batch. The first answer that is
    not None counts: ``Plugins(fields=...)``, then the LightningModule's or the DataModule's own implementation, then
    plugins, then core's default.
    May change: nothing.

    .. versionadded:: 0.1
    """


@hookspec
def gw_train_data(data: TrainData, run: RunContext) -> None:
    """Choose the training rows.

    When: each time Lightning asks for the training loader, before it builds its own from it: before the first epoch,
    after callback state was restored, and again at the next epoch after ``data.reload()``.
    May change: the rows, through ``data.keep(indices)`` and ``data.weights(array)``. Validation and test data never.

    .. versionadded:: 0.1
    """


@hookspec
def gw_transform_model(module: nn.Module, run: RunContext | None) -> None:
    """Change the model's structure, in place and idempotent.

    When: as soon as the model exists (at once, and again after a late ``setup`` or ``configure_model``), before
    weights are restored and optimizers are made; also by ``groundwire.load``, where ``run`` is None. The change stays
    until ``groundwire.export``.
    May change: the structure of ``module``, best through ``torch.nn.utils.parametrize``.

    .. versionadded:: 0.1
    """


@hookspec(firstresult=True)
def gw_gradient(step: GradientStep, run: RunContext) -> Mapping[str, Tensor] | None:
    """Replace the gradient of one optimizer step. Exclusive: two owners are an error that names both.

    When: once for each real optimizer step, when the gradient is complete (accumulated, reduced, unscaled) and not
    yet clipped.
    May change: weights, inside ``step.perturbed()`` only.
    Returns: the new gradient by parameter name (a name left out keeps its gradient), or None for "nothing to do".

    .. versionadded:: 0.1
    """


@hookspec
def gw_gradient_edit(step: GradientStep, run: RunContext) -> None:
    """Edit the final gradient in place.

    When: after the owner of ``gw_gradient``, before clipping, in plugin order.
    May change: the tensors in ``step.grads``.

    .. versionadded:: 0.1
    """


@hookspec
def gw_backward_done(phase: str, run: RunContext) -> None:
    """All backward passes of a window are done and no gradient was read yet.

    When: after the last backward of an accumulation window (``phase="window"``) and of every replay
    (``phase="replay"``).
    May change: gradients, for layers that postpone a part of their backward.

    .. versionadded:: 0.1
    """


@hookspec
def gw_batch_start(batch: Any, stage: BatchStage, variant: str | None, first_result: Any, run: RunContext) -> Any:
    """Prepare for the forward passes of one batch.

    When: before the forward passes of every batch, on the device: of training (after every ``on_train_batch_start``),
    of the sanity check, of validation, test and prediction, of ``run.evaluate`` (with the variant's name), and of each
    micro-batch that a replay runs again. ``stage`` is "sanity" in the sanity check and "train" in a replay.
    ``first_result`` is, in a replay, what this implementation returned when the batch came for the first time, and
    None otherwise: state that has moved on since need not be computed again.
    May change: what a forward hook of the plugin's own adds, never the batch.
    Returns: anything; it is kept with the batch for replays.

    .. versionadded:: 0.2
    """


@hookspec
def gw_scores(scores: Tensor, fields: Fields, stage: Stage, variant: str | None, run: RunContext) -> None:
    """See the model's scores, as computed by the forward pass that happens anyway.

    When: after each batch of the stages in the class attribute ``score_stages`` (``("validate", "test")`` unless
    changed; also "train" and "predict"); never in the sanity check. ``variant`` is None for the model itself.
    ``scores``: float32, detached, shape (B, K) or as the head gives it.
    May change: nothing.

    .. versionadded:: 0.1
    """


@hookspec
def gw_variants(module: nn.Module, run: RunContext) -> list[Variant] | None:
    """Offer variants of the model.

    When: someone calls ``run.variants()``.
    May change: nothing now; each :class:`Variant` edits and undoes when it is applied.

    .. versionadded:: 0.1
    """


@hookspec
def gw_findings(run: RunContext) -> list[Finding] | None:
    """Report what was found.

    When: on all ranks, at the end of training, of validation and of test; ``run.stage`` tells which. At the end of
    training it comes after every callback's and the module's ``on_train_end``, so averaged weights are in place.
    Collective operations are allowed, and at the ends of validation and test ``run.evaluate``.
    May change: nothing.

    .. versionadded:: 0.1
    """


@hookspec
def gw_section(findings: list[Finding], run: RunContext) -> Section | None:
    """Draw this plugin's part of the report page.

    When: on rank 0, before the page is written; ``findings`` are all findings of the run. Collective operations
    would hang.
    May change: nothing.

    .. versionadded:: 0.1
    """


@hookspec
def gw_report(report: Report, run: RunContext) -> None:
    """Take the finished report elsewhere.

    When: on rank 0, after ``findings.json`` and ``report.html`` were written.
    May change: nothing.

    .. versionadded:: 0.1
    """


@hookspec
def gw_provenance(run: RunContext, checkpoint: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Add facts about this plugin to every checkpoint.

    When: on every save, also ``weights_only`` ones, on rank 0 only, so it must not communicate; once more when the run
    closes, for saves after ``fit`` returned.
    ``checkpoint``: what is about to be saved. What a plugin says about weights, it counts on
    ``checkpoint["state_dict"]``: averaging callbacks save other weights than those that are trained. When the run
    closes it has that one entry, of the module.
    May change: nothing.
    Returns: a mapping of plain types (None, bool, int, float, str, list, dict), or None.

    .. versionadded:: 0.1
    """


@hookspec
def gw_export(module: nn.Module, run: RunContext | None) -> None:
    """Bake everything this plugin added into a plain module, in place.

    When: ``groundwire.export(module)``, on its copy, in reverse plugin order; ``run`` is None outside a run.
    May change: ``module``.

    .. versionadded:: 0.1
    """


#: The arguments of each hook, by its name.
HOOKS = specified(globals())
