"""LIMES inside Lightning: when what is forecast, counted and written into the head."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from groundwire import Fields, PluginError, Problem, RunContext, hookimpl
from groundwire.modules import outputs_of
from groundwire_limes import inspection
from groundwire_limes.arguments import one_of, whole
from groundwire_limes.clock import DAY, Clock, Steps
from groundwire_limes.correction import Correction, TrainingPrior
from groundwire_limes.distributed import Ranks
from groundwire_limes.extrapolator import METHODS, Method
from groundwire_limes.labelled import Labelled, weights_of
from groundwire_limes.labels import class_indices
from groundwire_limes.learned import Learned
from groundwire_limes.reported import Reported
from groundwire_limes.steps import seconds
from groundwire_limes.timeline import Timeline


class LIMES(Reported):
    """Keep a classifier right while the class mix moves (Tomaszewska and Lampert, 2022).

    At every time step a forecast of the class prior is added to the logits as ``log prior - log(1/K)``, in training
    and in prediction. The network so learns what does not depend on the class mix; the state dict stays the user's.
    Data must come in the order of time, in one ``fit``: see :class:`StreamDataModule`.

    Args:
        time: Where a batch says when its rows were observed: a key of the batch or of its dict (the fields ``time``
            and ``timestamp`` are found by themselves), or ``time(batch)``. One value for a batch or one for each row:
            Unix seconds, or datetimes with a time zone.
        period: Length of a time step: ``"1h"``, ``"15min"``, ``"1d"``, a number of seconds.
        method: How priors are forecast, see :class:`PriorExtrapolator`.
        preset: ``"icpr2022"`` for the published algorithm: ``method="nearest"`` and ``training_prior="forecast"``.
        training_prior: What corrects the loss: ``"running"``, the forecast and the labels of the step so far, without
            the current batch; ``"forecast"``; or ``"realised"``, all labels of the step, which the DataModule must
            tell in ``step_counts(step, num_classes)``.
        head: Name of the layer that gives the scores, such as ``"net.4"``; found by itself when left out.
        on_backward: What to do when time goes backwards: ``"raise"``, or ``"replay"`` to train without counting.
        batches_per_step: A step is so many training batches; ``time`` and ``period`` are then not used.
        season: Length of a season, a whole number of steps. By default a day, where that is one. With
            ``batches_per_step``, a number of steps, and by default none.
        lateness: Steps that a batch may be older than the newest one, without being an error.
        weights: Key or ``weights(batch)`` of the weight of each row in the counts; 1 when left out.
        unlabelled: Re-estimate the prior of each batch that is predicted from its scores, where past labels show that
            this helps (:mod:`groundwire_limes.unlabelled`). Costs a second forward pass of those batches.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> LIMES(period="1h").training_prior
        'running'
        >>> LIMES(preset="icpr2022").method
        'nearest'
    """

    name = "limes"
    score_stages = ("train", "validate", "test", "predict")

    def __init__(
        self,
        time: str | Callable[[Any], Any] = "timestamp",
        period: float | str = "1h",
        method: Method = "auto",
        preset: Literal["icpr2022"] | None = None,
        training_prior: TrainingPrior = "running",
        head: str | None = None,
        on_backward: Literal["raise", "replay"] = "raise",
        *,
        batches_per_step: int | None = None,
        season: int | str | None = DAY,
        lateness: int = 0,
        weights: str | Callable[[Any], Any] | None = None,
        unlabelled: bool = False,
    ) -> None:
        one_of("preset", preset, (None, "icpr2022"))
        if preset is not None:
            method, training_prior = "nearest", "forecast"
        one_of("method", method, METHODS)
        one_of("training_prior", training_prior, ("running", "forecast", "realised"))
        one_of("on_backward", on_backward, ("raise", "replay"))
        whole("lateness", lateness, 0)
        if batches_per_step is not None:
            whole("batches_per_step", batches_per_step, 1)
        self.time, self.period, self.method, self.preset = time, period, method, preset
        self.training_prior, self.head, self.on_backward = training_prior, head, on_backward
        self.batches_per_step, self.season, self.lateness = batches_per_step, season, lateness
        self.weights, self.unlabelled = weights, unlabelled
        self._clock = Clock(time, seconds(period), batches_per_step)
        self._season_steps = self._clock.season(season)
        self._learned = Learned()
        self._module: weakref.ref[Any] | None = None
        self._forget_run()

    def _forget_run(self) -> None:
        self._run: RunContext | None = None
        self._ranks = Ranks()
        self._inspected, self._told, self._omitted = False, False, False
        self._correction: Correction | None = None
        self._steps: Steps | None = None
        self._asked: Timeline | None = None
        self._row_weights: Tensor | None = None
        self._counted = True
        self._notes: list[tuple[str, str]] = []

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles take what was learned along, and nothing of a run."""
        gone = dict.fromkeys(("_run", "_module", "_correction", "_steps", "_asked", "_row_weights"))
        return {**vars(self), **gone, "_ranks": Ranks()}

    # Lightning

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Another module is another stream; the same one goes on where it was."""
        self._forget_run()
        if stage == "fit" and self._module is not None and self._module() is not pl_module:
            self._learned = Learned()
        if stage == "fit" or self._module is None:
            self._module = weakref.ref(pl_module)

    @hookimpl
    def gw_check(self, run: RunContext) -> list[Problem]:
        """Take the head if it is known, so that even a first batch is corrected; see what else corrects the classes."""
        if not run.ready:
            return []
        self._run, self._ranks = run, Ranks(run.trainer.world_size)
        if run.trainer.state.fn != "fit":
            self._restore_from(run.trainer)
        if run.head is not None:
            try:
                self._take_head(run)
            except PluginError as error:
                return [Problem(self.name, *str(error).removeprefix("limes: ").split(" -> ", 1))]
        if self.training_prior == "realised" and not inspection.knows_labels_first(run.trainer):
            text = "training_prior='realised' needs all labels of a step first, and the DataModule has no step_counts()"
            return [Problem(self.name, text, "use StreamDataModule, or training_prior='running'")]
        return []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """What changes the effective prior of the batches is said, not guessed around."""
        self._notes = inspection.interactions(pl_module, trainer)
        inspection.warn(self._notes)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Agree on the step, close those before it, and correct the head for this batch."""
        correction = self._ready(batch)
        line, fields = correction.line, correction.run.fields(batch)
        if fields.targets is None and not self._told:
            self._told = True
            inspection.warn([("no_labels", inspection.NO_LABELS)])
        class_indices(fields.targets, line.extrapolator.num_classes)  # before the loss fails on one, without a name
        self._steps = self._clock.training(batch, fields, self._learned.batches)
        self._row_weights = weights_of(self.weights, batch, self._steps.rows)
        step = self._ranks.earliest(self._steps.earliest)
        self._counted = not line.replays(step)
        if not self._counted and self.on_backward == "raise":
            line.refuse(step)
        for closed in line.advance(step, self._ranks.gather):
            correction.run.send(line.measured(closed))
        if self._counted:
            line.expect(step)
        correction.train(self._steps, step, self._counted)

    @hookimpl
    def gw_scores(self, fields: Fields, stage: str, run: RunContext) -> None:
        """Count the labels of a training batch, now that it was learned from, and how well it had been predicted."""
        if stage != "train":
            return
        line, steps = self._line, self._steps
        if line is None or steps is None or fields.targets is None or not self._counted:
            return
        assert run.raw_scores is not None
        classes = line.extrapolator.num_classes
        indices = class_indices(fields.targets, classes)  # once more: the step may have edited them
        labelled = Labelled.of(steps, run.raw_scores, fields.targets, classes, self._learned.conv, indices)
        if self.unlabelled:
            labelled.remember(self._learned.memory)
        labelled.count(line, self._row_weights)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """One batch more."""
        self._learned.batches += 1
        self._steps = None

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """The last step may be incomplete; what is known of it serves later forecasts."""
        self._absorb()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Forecasts use all labels so far; training goes on as if nobody had asked."""
        if self._line is not None and not trainer.sanity_checking:
            self._line.gather(self._ranks.gather)
            self._asked = self._line.informed()

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Correct the head for what is expected of this batch."""
        correction = self._ready(batch)
        if self._omitted:
            correction.omit()
            return
        if self._asked is not None:
            correction = replace(correction, line=self._asked)
        current = correction.line.current or 0 if trainer.state.fn == "fit" else self.next_step
        steps = self._clock.evaluation(batch, correction.run.fields(batch), otherwise=current)
        correction.evaluate(steps)
        if self.unlabelled:
            correction.adapt(self._learned.memory, batch, steps)

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Training goes on with its own step; the next batch says which."""
        self._steps, self._asked = None, None

    # What happens in these places

    def _ready(self, batch: Any) -> Correction:
        """What corrects the head, which is taken and looked at the first time."""
        if self._correction is not None:
            return self._correction
        run = self._run
        if run is None or run.head is None:
            raise PluginError("limes: the head is not known -> name it: LIMES(head=...)")
        line = self._take_head(run)
        if not self._inspected:
            self._inspected = True
            inspection.refuse_probabilities(run, batch)
        self._correction = Correction(self.name, run, line, self._ranks, self.training_prior)
        return self._correction

    def _take_head(self, run: RunContext) -> Timeline:
        assert run.head is not None
        line = self._learned.take_head(run.head, self._extrapolator, self.lateness)
        if not hasattr(run.head.module, "gw_offset"):
            run.offset(self.name, torch.zeros(outputs_of(run.head.module)))
        return line
