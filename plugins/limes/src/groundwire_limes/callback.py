"""LIMES inside Lightning: when a prior is forecast, labels are counted, and the offset is written into the head."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from groundwire import Fields, Finding, Plugin, PluginError, Problem, RunContext, Section, Variant, hookimpl
from groundwire.modules import outputs_of
from groundwire.services.checkpoint.load import read
from groundwire_limes.adaptation import adapted_offset, remember
from groundwire_limes.batch_fields import row_weights
from groundwire_limes.class_counts import accumulation_dtype
from groundwire_limes.compatibility import prior_changes, refuse_probabilities, warn
from groundwire_limes.distributed import Processes
from groundwire_limes.expectation_maximization import LabelledScores
from groundwire_limes.export import BiasTable, bias_table, fold_into_bias
from groundwire_limes.extrapolator import METHODS, Method, PriorExtrapolator
from groundwire_limes.functional import Array
from groundwire_limes.labels import as_two_logits, check_class_indices, class_scores, labels_of
from groundwire_limes.logit_offset import LogitOffset, by_row, device_of
from groundwire_limes.prior_tracker import PriorTracker
from groundwire_limes.report import stream_findings, stream_section
from groundwire_limes.time_steps import DAY, BatchSteps, TimeIndex, period_seconds
from groundwire_limes.validation import check_choice, check_whole_number

TrainingPrior = Literal["running", "forecast", "realised"]

#: Version of what a checkpoint holds.
FORMAT = 1
NO_HISTORY = (
    "LIMES has no history, so scores stay as they are; if the weights were trained with LIMES, load it with them: pass "
    "ckpt_path= to the Trainer, or use the LIMES object of the fit"
)
NO_LABELS = (
    "no labels are found in a training batch, so nothing is counted of it and forecasts do not learn from it -> tell "
    "where they are: Plugins(fields=lambda batch: Fields(inputs, targets=...))"
)


class LIMES(Plugin):
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
            this helps (:mod:`groundwire_limes.expectation_maximization`). Costs a second forward pass of those batches.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> LIMES(period="1h").training_prior
        'running'
        >>> LIMES(preset="icpr2022").method
        'nearest'
    """

    name = "limes"
    changes = "shift"
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
        check_choice("preset", preset, (None, "icpr2022"))
        if preset is not None:
            method, training_prior = "nearest", "forecast"
        check_choice("method", method, METHODS)
        check_choice("training_prior", training_prior, ("running", "forecast", "realised"))
        check_choice("on_backward", on_backward, ("raise", "replay"))
        check_whole_number("lateness", lateness, 0)
        if batches_per_step is not None:
            check_whole_number("batches_per_step", batches_per_step, 1)
        self.time, self.period, self.method, self.preset = time, period, method, preset
        self.training_prior, self.head, self.on_backward = training_prior, head, on_backward
        self.batches_per_step, self.season, self.lateness = batches_per_step, season, lateness
        self.weights, self.unlabelled = weights, unlabelled
        self._time_index = TimeIndex(time, period_seconds(period), batches_per_step)
        self._season_steps = self._time_index.season(season)
        self._module: weakref.ref[Any] | None = None
        self._forget_stream()
        self._forget_run()

    def _forget_stream(self) -> None:
        """Begin with another stream. What is set here goes into checkpoints."""
        self._tracker: PriorTracker | None = None
        self._labelled_scores = LabelledScores()
        self._batches = 0  # training batches so far
        self._head_name: str | None = None

    def _forget_run(self) -> None:
        self._run: RunContext | None = None
        self._processes = Processes()
        self._hook: LogitOffset | None = None
        self._conv = False  # whether classes are in dimension 1 of the scores
        self._is_prepared, self._warned_of_labels = False, False
        self._to_count: tuple[BatchSteps, Tensor | None] | None = None  # steps and weights of a batch's rows
        self._evaluation_tracker: PriorTracker | None = None
        self._notes: list[tuple[str, str]] = []

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles take what was learned along, and nothing of a run."""
        twin = type(self).__new__(type(self))
        twin._forget_run()
        return {**vars(self), **vars(twin), "_module": None}

    # A run begins

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Another module is another stream; the same one goes on where it was."""
        self._forget_run()
        if stage == "fit" and self._module is not None and self._module() is not pl_module:
            self._forget_stream()
        if stage == "fit" or self._module is None:
            self._module = weakref.ref(pl_module)

    @hookimpl
    def gw_check(self, run: RunContext) -> list[Problem]:
        """Take the head if it is known, so that even a first batch is corrected; see what else corrects the classes."""
        if not run.ready:
            others = [c for c in run.trainer.callbacks if c is not self and getattr(c, "changes", None) == self.changes]
            names = [getattr(other, "name", type(other).__name__) for other in others]
            text = "{!r} and {!r} both correct the scores of the head"
            return [Problem(self.name, text.format(self.name, name), "keep one of them") for name in names]
        self._run, self._processes = run, Processes(run.trainer)
        if run.trainer.state.fn != "fit":
            self._restore_from(run.trainer)
        if run.head is not None:
            try:
                self._take_head(run)
            except PluginError as error:
                return [Problem(self.name, *str(error).removeprefix("limes: ").split(" -> ", 1))]
        fits = run.trainer.state.fn == "fit"
        if self.training_prior == "realised" and fits and not hasattr(run.trainer.datamodule, "step_counts"):
            text = "training_prior='realised' needs all labels of a step first, and the DataModule has no step_counts()"
            return [Problem(self.name, text, "use StreamDataModule, or training_prior='running'")]
        return []

    def _restore_from(self, trainer: Any) -> None:
        """Lightning restores callbacks in ``fit`` only: a checkpoint would be predicted with uncorrected."""
        if self._tracker is None and trainer.ckpt_path:
            self.load_state_dict(read(trainer.ckpt_path).get("callbacks", {}).get(self.state_key, {}))
        self._absorb()
        if self._tracker is None or not self._tracker.extrapolator.observed:
            logging.getLogger("groundwire.limes").warning(NO_HISTORY)

    def _take_head(self, run: RunContext) -> None:
        """Attach the offset to the head, and begin a stream of its classes unless there is one."""
        if run.head is None:
            raise PluginError("limes: the head is not known -> name it: LIMES(head=...)")
        layer, outputs = run.head.module, outputs_of(run.head.module)
        classes = max(2, outputs)
        if self._tracker is None:
            self._tracker = PriorTracker(self._new_extrapolator(classes), outputs, self.lateness)
        known = self._tracker.extrapolator.num_classes
        if known != classes:
            raise PluginError(
                f"limes: what was learned has {known} classes and the head {run.head.name!r} has {classes} -> "
                "use the model that it was learned with, or a new LIMES()"
            )
        self._head_name, self._conv = run.head.name, hasattr(layer, "kernel_size")
        if self._hook is None:
            self._hook = LogitOffset(torch.zeros(outputs, device=device_of(layer)))
            run.on_close(layer.register_forward_hook(self._hook).remove)

    def _new_extrapolator(self, classes: int) -> PriorExtrapolator:
        if self.method == "seasonal" and self._season_steps is None:
            raise PluginError("limes: method='seasonal' needs a season of two steps or more -> season='1d'")
        return PriorExtrapolator(classes, method=self.method, period=self._season_steps)

    # The offset of each batch

    @hookimpl
    def gw_batch_start(self, batch: Any, stage: str, first_result: Tensor | None, run: RunContext) -> Tensor:
        """Write the offset of this batch into the head; a replayed one gets that which it had at first."""
        if not self._is_prepared:
            self._take_head(run)
            assert self._hook is not None
            refuse_probabilities(run, batch)
            self._hook.refuse_bypass(run, batch)
            self._is_prepared = True
        tracker, hook = self._tracker, self._hook
        assert tracker is not None
        assert hook is not None
        assert run.head is not None
        if first_result is not None:
            offset = first_result
        elif stage == "train":
            offset = self._training_offset(tracker, batch, run, device_of(run.head.module))
        else:
            offset = self._evaluation_offset(self._evaluation_tracker or tracker, batch, run)
        hook.write(run.head.module, offset)
        return offset

    def _training_offset(self, tracker: PriorTracker, batch: Any, run: RunContext, device: torch.device) -> Tensor:
        """Agree on the time step, finish those before it, and return the offset of a training batch."""
        fields = run.fields(batch)
        if fields.targets is None and not self._warned_of_labels:
            self._warned_of_labels = True
            warn([("no_labels", NO_LABELS)])
        check_class_indices(fields.targets, tracker.extrapolator.num_classes)  # the loss would fail without a name
        steps = self._time_index.of_training_batch(batch, fields, self._batches)
        weights = row_weights(self.weights, batch, steps.rows)
        agreed = self._processes.earliest(steps.earliest)
        is_replay = tracker.replays(agreed)
        if is_replay and self.on_backward == "raise":
            tracker.refuse(agreed)
        self._to_count = None if is_replay else (steps, weights)
        for finished in tracker.advance(agreed, self._processes.all_gather):
            run.send(tracker.metrics(finished))
        if not is_replay:
            tracker.judge_later(agreed)
        if self.training_prior == "forecast" or is_replay:
            return by_row(steps, lambda step: tracker.offset(step, device))
        if self.training_prior == "realised":
            classes, counts = tracker.extrapolator.num_classes, run.trainer.datamodule.step_counts
            return by_row(steps, lambda step: tracker.realised_offset(counts(step, classes), device))
        # A sum over the ranks, also where a rank has no row of that step.
        running = tracker.running_offset(agreed, self._processes.total(tracker.new_labels(agreed, device)))
        return by_row(steps, lambda step: running if step == agreed else tracker.offset(step, device))

    def _evaluation_offset(self, tracker: PriorTracker, batch: Any, run: RunContext) -> Tensor:
        """Return the offset of a batch that is only predicted, from the forecast for its time."""
        assert run.head is not None
        assert self._hook is not None
        device = device_of(run.head.module)
        current = tracker.current or 0 if run.trainer.state.fn == "fit" else self.next_step
        steps = self._time_index.of_evaluation_batch(batch, run.fields(batch), otherwise=current)
        offset = by_row(steps, lambda step: tracker.offset(step, device))
        if not self.unlabelled or self._hook.is_off:
            return offset
        self._hook.write(run.head.module, offset)  # the last batch's may be of other rows
        adapted = adapted_offset(tracker, self._labelled_scores, run, batch, steps)
        return offset if adapted is None else adapted.to(device)

    # Training

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """What changes the effective prior of the batches is said, not guessed around."""
        self._notes = prior_changes(pl_module, trainer)
        warn(self._notes)

    @hookimpl
    def gw_scores(self, fields: Fields, stage: str, run: RunContext) -> None:
        """Count the labels of a training batch, now that it was learned from, and how well it had been predicted."""
        if stage != "train" or self._to_count is None or fields.targets is None:
            return
        (steps, weights_of_rows), tracker = self._to_count, self._tracker
        assert tracker is not None
        assert run.raw_scores is not None
        classes = tracker.extrapolator.num_classes
        scores = as_two_logits(class_scores(run.raw_scores, self._conv))
        indices = check_class_indices(fields.targets, classes)  # once more: the step may have edited them
        labels = labels_of(fields.targets, classes, len(scores), self._conv, indices)
        if self.unlabelled:
            remember(self._labelled_scores, steps, scores, labels)
        weights = labels.weights(accumulation_dtype(scores.device))
        if weights_of_rows is not None:
            weights = weights * weights_of_rows.to(weights).repeat_interleave(len(scores) // steps.rows)
        tracker.count(steps, scores, labels, weights)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """One batch more."""
        self._batches += 1
        self._to_count = None

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """The last complete step, for whoever monitors it."""
        self._log_last()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """The last step may be incomplete; what is known of it serves later forecasts."""
        self._absorb()

    def _absorb(self) -> None:
        if self._tracker is not None:
            self._tracker.absorb(self._processes.all_gather)

    def _log_last(self) -> None:
        """Log what checkpoints and schedules can monitor; the loggers have every step already."""
        if self._run is not None and self._tracker is not None and self._tracker.finished:
            for name, value in self._tracker.metrics(self._tracker.finished[-1]).items():
                self._run.log(name, value, logger=False, sync_dist=True)

    # Evaluation

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Forecasts use all labels so far; training goes on as if nobody had asked."""
        if self._tracker is not None and not trainer.sanity_checking:
            self._tracker.gather(self._processes.all_gather)
            self._evaluation_tracker = self._tracker.up_to_date()

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Whoever runs the module next may have another number of rows."""
        if self._hook is not None:
            self._hook.rows = None

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """As at the end of an epoch: a checkpoint may be decided on here."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._log_last()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Training goes on with its own step; the next batch says which."""
        self._evaluation_tracker = None

    @hookimpl
    def gw_variants(self) -> list[Variant]:
        """The model without the correction, so that others can see what it does, and to whom."""
        return [] if self._hook is None else [Variant("without LIMES", self._hook.off)]

    # Reporting

    @hookimpl
    def gw_findings(self, run: RunContext) -> list[Finding]:
        """Prequential quality, and what the reader should know."""
        if run.stage != "train" or self._tracker is None:
            return []
        self._absorb()
        return stream_findings(self._tracker, self._season_steps, self._notes)

    @hookimpl
    def gw_section(self) -> Section | None:
        """Curves of accuracy, forecast and realised priors, and what the guard did."""
        return None if self._tracker is None else stream_section(self._tracker, self.training_prior, self._season_steps)

    @hookimpl
    def gw_provenance(self) -> dict[str, Any]:
        """What the weights need to be read right."""
        facts: dict[str, Any] = {"head": self._head_name, "method": self.method, "training_prior": self.training_prior}
        if self._tracker is not None:
            known = self._tracker.up_to_date().extrapolator
            facts |= {"observed_steps": known.observed, "last_step": known.last_step}
        return facts

    # Serving

    @property
    def extrapolator(self) -> PriorExtrapolator:
        """The forecaster with all that it observed.

        Raises:
            PluginError: Nothing was observed yet.
        """
        return self._history().extrapolator

    @property
    def next_step(self) -> int:
        """The step after the newest one that has labels; 0 if there is none."""
        last = None if self._tracker is None else self._tracker.up_to_date().extrapolator.last_step
        return 0 if last is None else last + 1

    def _history(self) -> PriorTracker:
        if self._tracker is None:
            raise PluginError("limes: nothing was observed yet -> fit first, or load a checkpoint")
        return self._tracker.up_to_date()

    def prior(self, timestamp: Any = None) -> Array:
        """Return the class prior expected at ``timestamp``, or in the step after the last one; (K,), float64."""
        step = self.next_step if timestamp is None else self._time_index.of_times(timestamp, 1).earliest
        return self.extrapolator.forecast(step)

    def export_adapted(self, timestamps: Sequence[Any], module: nn.Module | None = None) -> BiasTable:
        """Return biases for serving without this plugin: what to add to the plain model's scores, step by step.

        Args:
            timestamps: When the model will be asked; each step in which one falls gives a row of the table. Step
                numbers with ``batches_per_step``.
            module: With the model, the table holds complete biases of its head.

        Raises:
            PluginError: Nothing was observed yet, or a timestamp is wrong.
        """
        tracker = self._history()
        steps, length = self._time_index.distinct(timestamps)
        head = None if module is None else module.get_submodule(self._head_name or "")
        return bias_table(tracker, steps, length, head)

    @hookimpl
    def gw_export(self, module: nn.Module) -> None:
        """Fold the forecast of the step after the last one into the head's bias."""
        if self._tracker is not None and self._head_name is not None:
            offset = self._tracker.up_to_date().offset(self.next_step)
            fold_into_bias(module.get_submodule(self._head_name), offset)

    # State

    def state_dict(self) -> dict[str, Any]:
        """Return counts, quality, place in the stream; plain types. Under DDP all ranks call it: they save together."""
        if self._tracker is None:
            return {}
        self._tracker.gather(self._processes.all_gather)
        return {
            "format": FORMAT,
            "arguments": self._forecast_arguments(),
            "batches": self._batches,
            "head": self._head_name,
            "line": self._tracker.state_dict(),
            "memory": self._labelled_scores.state_dict() if self.unlabelled else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was saved.

        Raises:
            PluginError: It was saved with other arguments, which are listed, or by a newer version.
        """
        if not state_dict:
            return
        if state_dict.get("format") != FORMAT:
            format_ = state_dict.get("format")
            raise PluginError(f"limes: the checkpoint has format {format_}, this version reads {FORMAT}")
        saved, here = state_dict["arguments"], self._forecast_arguments()
        other = [
            f"{name}: {saved.get(name)!r} in the checkpoint, {value!r} here"
            for name, value in here.items()
            if saved.get(name) != value
        ]
        if other:
            raise PluginError(f"limes: the checkpoint was saved with other arguments ({'; '.join(other)}) -> use those")
        tracked = state_dict["line"]
        extrapolator = self._new_extrapolator(tracked["extrapolator"]["num_classes"])
        self._forget_stream()
        self._tracker = PriorTracker.restored(tracked, extrapolator, self.lateness)
        if state_dict["memory"] is not None:
            self._labelled_scores.load_state_dict(state_dict["memory"])
        self._batches, self._head_name = state_dict["batches"], state_dict["head"]
        self._is_prepared = False

    def _forecast_arguments(self) -> dict[str, Any]:
        """Return the arguments that forecasts depend on."""
        return {
            "method": self.method,
            "period": self._time_index.seconds if self.batches_per_step is None else None,
            "batches_per_step": self.batches_per_step,
            "season": self._season_steps,
            "training_prior": self.training_prior,
        }
