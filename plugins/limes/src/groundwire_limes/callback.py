"""LIMES inside Lightning: when what is forecast, counted and written into the head."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from groundwire import Fields, Finding, Plugin, PluginError, Problem, RunContext, Section, hookimpl
from groundwire.offset import outputs_of
from groundwire_limes import inspection
from groundwire_limes.adaptation import adapted_offsets
from groundwire_limes.distributed import Ranks
from groundwire_limes.export import BiasTable, bias_table, fold
from groundwire_limes.extrapolator import METHODS, Method, PriorExtrapolator
from groundwire_limes.functional import Array
from groundwire_limes.labels import class_scores, refuse_unknown_labels, soft_labels, two_columns
from groundwire_limes.report import findings_of, section
from groundwire_limes.steps import seconds, step_keys, steps_in
from groundwire_limes.tally import Scored
from groundwire_limes.timeline import Closed, Timeline
from groundwire_limes.times import times_of
from groundwire_limes.unlabelled import Memory

TrainingPrior = Literal["running", "forecast", "realised"]
FORMAT = 1


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
            tell in ``step_counts(step)``.
        head: Name of the layer that gives the scores, such as ``"net.4"``; found by itself when left out.
        on_backward: What to do when time goes backwards: ``"raise"``, or ``"replay"`` to train without counting.
        batches_per_step: A step is so many training batches; ``time`` and ``period`` are then not used.
        season: Length of a season, ``"1d"`` by default; with ``batches_per_step``, a number of steps or None.
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
        period: str | float = "1h",
        method: Method = "auto",
        preset: Literal["icpr2022"] | None = None,
        training_prior: TrainingPrior = "running",
        head: str | None = None,
        on_backward: Literal["raise", "replay"] = "raise",
        *,
        batches_per_step: int | None = None,
        season: str | int | None = "1d",
        lateness: int = 0,
        weights: str | Callable[[Any], Any] | None = None,
        unlabelled: bool = False,
    ) -> None:
        _one_of("preset", preset, (None, "icpr2022"))
        if preset is not None:
            method, training_prior = "nearest", "forecast"
        _one_of("method", method, METHODS)
        _one_of("training_prior", training_prior, ("running", "forecast", "realised"))
        _one_of("on_backward", on_backward, ("raise", "replay"))
        _whole("lateness", lateness, 0)
        if batches_per_step is not None:
            _whole("batches_per_step", batches_per_step, 1)
        self.time, self.period, self.method, self.preset = time, period, method, preset
        self.training_prior, self.head, self.on_backward = training_prior, head, on_backward
        self.batches_per_step, self.season, self.lateness = batches_per_step, season, lateness
        self.weights, self.unlabelled = weights, unlabelled
        self._seconds = seconds(period)
        self._season_steps = self._season()
        self._line: Timeline | None = None
        self._batches = 0
        self._module: weakref.ref[Any] | None = None
        self._head_name: str | None = None
        self._conv = False
        self._memory = Memory()
        self._forget_run()

    def _forget_run(self) -> None:
        self._run: RunContext | None = None
        self._ranks = Ranks()
        self._inspected = False
        self._steps: np.ndarray[Any, Any] | None = None
        self._row_weights: Tensor | None = None
        self._counted = True
        self._notes: list[tuple[str, str]] = []

    def _season(self) -> int | None:
        if self.batches_per_step is None:
            return steps_in(self.season, self._seconds)
        if isinstance(self.season, int):
            _whole("season", self.season, 2)
            return self.season
        return None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles take what was learned along, and nothing of a run."""
        gone = {"_run": None, "_module": None, "_steps": None, "_row_weights": None, "_ranks": Ranks()}
        return {**vars(self), **gone}

    # Lightning

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Another module is another stream; the same one goes on where it was."""
        self._forget_run()
        if stage == "fit" and self._module is not None and self._module() is not pl_module:
            self._line, self._batches, self._memory = None, 0, Memory()
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
        return self._data_problems(run)

    def _data_problems(self, run: RunContext) -> list[Problem]:
        wanted = self.training_prior == "realised" and run.trainer.state.fn == "fit"
        if wanted and not hasattr(run.trainer.datamodule, "step_counts"):
            text = "training_prior='realised' needs all labels of a step first, and the DataModule has no step_counts()"
            return [Problem(self.name, text, "use StreamDataModule, or training_prior='running'")]
        return []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """What changes the effective prior of the batches is said, not guessed around."""
        self._notes = inspection.interactions(pl_module, trainer)
        inspection.warn(self._notes)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Agree on the step, close those before it, and correct the head for this batch."""
        run = self._ready(batch)
        assert self._line is not None
        fields = run.fields(batch)
        refuse_unknown_labels(fields.targets, self._line.extrapolator.num_classes)
        self._steps = self._train_steps(batch, fields)
        self._row_weights = self._weights_of(batch)
        step = self._ranks.earliest(int(self._steps.min()))
        self._counted = not self._line.replays(step)
        if not self._counted and self.on_backward == "raise":
            raise PluginError(self._backward(step))
        for closed in self._line.advance(step, self._ranks.gather):
            self._log(run, closed)
        if self._counted:
            self._line.expect(step)
        self._write(run, self._steps, training=step)

    @hookimpl
    def gw_scores(self, scores: Tensor, fields: Fields, stage: str, variant: str | None, run: RunContext) -> None:
        """Count the labels of a training batch, now that it was learned from, and how well it had been predicted."""
        if stage != "train":
            return
        line = self._line
        if line is None or self._steps is None or fields.targets is None or not self._counted:
            return
        assert run.raw_scores is not None
        raw = two_columns(class_scores(run.raw_scores, self._conv))
        classes = line.extrapolator.num_classes
        shares, mask = soft_labels(fields.targets, classes, len(raw), self._conv)
        if self.unlabelled:
            self._remember(raw, shares, mask)
        weights = mask.float()
        each = len(raw) // len(self._steps)
        if self._row_weights is not None:
            weights = weights * self._row_weights.to(weights.device).float().repeat_interleave(each)
        for step in np.unique(self._steps).tolist():
            rows = torch.as_tensor(self._steps == step, device=raw.device).repeat_interleave(each)
            line.expect(step)
            offset = torch.as_tensor(line.forecast(step).prior, device=raw.device).log().float()
            if bool((self._steps == step).all()):
                line.tally.add(step, Scored(raw, offset, shares, weights))
            else:
                line.tally.add(step, Scored(raw[rows], offset, shares[rows], weights[rows]))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """One batch more."""
        self._batches += 1
        self._steps = None

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """The last step may be incomplete; what is known of it serves later forecasts."""
        self._absorb()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Forecasts use all labels so far."""
        if not trainer.sanity_checking:
            self._absorb()

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Correct the head for what is expected of this batch."""
        run = self._ready(batch)
        steps = self._evaluation_steps(batch, run.fields(batch))
        self._write(run, steps)
        if self.unlabelled:
            self._adapt(run, batch, steps)

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Training goes on with its own step; the next batch says which."""
        self._steps = None

    # What happens in these places

    def _ready(self, batch: Any) -> RunContext:
        """The run, with the head taken and looked at."""
        run = self._run
        if run is None or run.head is None:
            raise PluginError("limes: the head is not known -> name it: LIMES(head=...)")
        self._take_head(run)
        if not self._inspected:
            self._inspected = True
            inspection.refuse_probabilities(run, batch)
        return run

    def _take_head(self, run: RunContext) -> None:
        assert run.head is not None
        layer = run.head.module
        outputs = outputs_of(layer)
        if self._line is None:
            extrapolator = self._extrapolator(max(2, outputs))
            self._line = Timeline(extrapolator, outputs, self.lateness)
        known = self._line.extrapolator.num_classes
        if known != max(2, outputs):
            raise PluginError(
                f"limes: what was learned has {known} classes and the head {run.head.name!r} has {max(2, outputs)} -> "
                "use the model that it was learned with, or a new LIMES()"
            )
        if self._head_name is None or self._run is run:
            self._head_name, self._conv = run.head.name, hasattr(layer, "kernel_size")
        if not hasattr(layer, "gw_offset"):
            run.offset(self.name, torch.zeros(outputs))

    def _extrapolator(self, classes: int) -> PriorExtrapolator:
        return PriorExtrapolator(classes, method=self.method, period=self._used_season())

    def _used_season(self) -> int | None:
        if self.method == "seasonal" and self._season_steps is None:
            raise PluginError("limes: method='seasonal' needs a season of two steps or more -> season='1d'")
        return self._season_steps

    def _train_steps(self, batch: Any, fields: Fields) -> np.ndarray[Any, Any]:
        rows = inspection.rows_of(fields)
        if self.batches_per_step is not None:
            return np.full(rows, self._batches // self.batches_per_step)
        times = times_of(self.time, batch, fields)
        if times is None:
            raise PluginError(
                f"limes: no {self.time!r} in a training batch -> LIMES(time='its key') or LIMES(time=lambda batch: "
                "...), or count batches: LIMES(batches_per_step=...)"
            )
        return self._keys(times, rows)

    def _keys(self, times: Any, rows: int) -> np.ndarray[Any, Any]:
        try:
            keys = step_keys(times, self._seconds)
        except ValueError as error:
            raise PluginError(f"limes: {error}") from error
        if keys.size not in (1, rows):
            raise PluginError(
                f"limes: {keys.size} timestamps for a batch of {rows} rows -> one for each, or one for all"
            )
        return np.broadcast_to(keys, (rows,))

    def _evaluation_steps(self, batch: Any, fields: Fields) -> np.ndarray[Any, Any]:
        """Of a batch without time: the step that training is at, or the one after the last."""
        assert self._line is not None
        rows = inspection.rows_of(fields)
        times = times_of(self.time, batch, fields) if self.batches_per_step is None else None
        if times is not None:
            return self._keys(times, rows)
        return np.full(rows, self.next_step if self._run is None or not self._training else self._line.current or 0)

    @property
    def _training(self) -> bool:
        return self._run is not None and self._run.trainer.state.fn == "fit"

    @property
    def next_step(self) -> int:
        """The step after the newest one that has labels; 0 if there is none."""
        last = None if self._line is None else self._line.extrapolator.last_step
        return 0 if last is None else last + 1

    def _write(self, run: RunContext, steps: np.ndarray[Any, Any], training: int | None = None) -> None:
        """One vector for the head, or one for each row of a mixed batch."""
        assert self._line is not None
        assert run.head is not None
        device = next(run.head.module.parameters()).device
        unique, inverse = np.unique(steps, return_inverse=True)
        if training is not None and self.training_prior == "running" and self._counted:
            running = self._running(training, device)
        else:
            running = None
        vectors = [
            running if running is not None and step == training else self._vector(step, device, training is not None)
            for step in unique.tolist()
        ]
        run.offset(self.name, vectors[0] if len(vectors) == 1 else torch.stack(vectors)[torch.as_tensor(inverse)])

    def _running(self, step: int, device: Any) -> Tensor:
        assert self._line is not None
        new = self._line.tally.pending(step)
        if new is None:
            dtype = torch.float32 if device.type == "mps" else torch.float64
            new = torch.zeros(self._line.extrapolator.num_classes, dtype=dtype, device=device)
        return self._line.running_offset(step, self._ranks.total(new))

    def _vector(self, step: int, device: Any, training: bool) -> Tensor:
        assert self._line is not None
        assert self._run is not None
        if training and self.training_prior == "realised" and self._counted:
            counts = self._run.trainer.datamodule.step_counts(step, self._line.extrapolator.num_classes)
            return self._line.realised_offset(counts, device)
        return self._line.offset(step, device)

    def _remember(self, raw: Tensor, shares: Tensor, mask: Tensor) -> None:
        """Scores and labels for the gate of :mod:`groundwire_limes.unlabelled`."""
        assert self._steps is not None
        each = len(raw) // len(self._steps)
        steps = np.repeat(self._steps, each)
        kept, labels = mask.cpu().numpy(), shares.argmax(dim=1).cpu().numpy()
        for step in np.unique(steps).tolist():
            if self._memory.wants(step):
                rows = kept & (steps == step)
                self._memory.learn(step, raw[torch.as_tensor(rows, device=raw.device)].cpu().numpy(), labels[rows])

    def _adapt(self, run: RunContext, batch: Any, steps: np.ndarray[Any, Any]) -> None:
        """Move the prior of this batch to what its scores say, if past labels allow it."""
        assert self._line is not None
        offsets = adapted_offsets(self._line, self._memory, run, batch, steps)
        if offsets is not None:
            run.offset(self.name, offsets)

    def _weights_of(self, batch: Any) -> Tensor | None:
        if self.weights is None:
            return None
        found = self.weights(batch) if callable(self.weights) else times_of(self.weights, batch, Fields(None))
        if found is None:
            raise PluginError(f"limes: no weights {self.weights!r} in a training batch -> LIMES(weights='their key')")
        weights = torch.as_tensor(found).reshape(-1)
        if not bool((torch.isfinite(weights) & (weights >= 0)).all()):
            raise PluginError("limes: a row's weight is negative or not finite -> weights are at least 0")
        return weights

    def _absorb(self) -> None:
        if self._line is not None:
            self._line.absorb(self._ranks.gather)

    def _backward(self, step: int) -> str:
        assert self._line is not None
        return (
            f"limes: time goes backwards, from step {self._line.current} to {step}: a stream that is over began again "
            "(max_epochs=1 stops there), a shuffled loader, or rows out of order -> give data in the order of time "
            f"(StreamDataModule), allow lateness={(self._line.current or 0) - step} steps, or train without counting: "
            "on_backward='replay'"
        )

    def _log(self, run: RunContext, closed: Closed) -> None:
        assert self._line is not None
        quality = self._line.tally.quality(closed.step)
        for name, value in (("accuracy", quality.get("accuracy")), ("divergence", closed.divergence)):
            if value is not None:
                run.log(name, float(value), on_step=True, on_epoch=False)

    # State

    def state_dict(self) -> dict[str, Any]:
        """Counts, quality, place in the stream; plain types. Under DDP all ranks call it, as they save together."""
        if self._line is None:
            return {}
        self._absorb()
        return {
            "format": FORMAT,
            "arguments": self._arguments(),
            "batches": self._batches,
            "head": self._head_name,
            "conv": self._conv,
            "line": self._line.state_dict(),
            "memory": self._memory.state_dict() if self.unlabelled else None,
        }

    def _arguments(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "period": self._seconds if self.batches_per_step is None else None,
            "batches_per_step": self.batches_per_step,
            "season": self._season_steps,
            "training_prior": self.training_prior,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was saved.

        Raises:
            PluginError: It was saved with other arguments, which are listed, or by a newer version.
        """
        if not state_dict:
            return
        if state_dict.get("format") != FORMAT:
            raise PluginError(
                f"limes: the checkpoint has format {state_dict.get('format')}, this version reads {FORMAT}"
            )
        saved, here = state_dict["arguments"], self._arguments()
        other = [f"{n}: {saved.get(n)!r} in the checkpoint, {here[n]!r} here" for n in here if saved.get(n) != here[n]]
        if other:
            raise PluginError(f"limes: the checkpoint was saved with other arguments ({'; '.join(other)}) -> use those")
        classes = state_dict["line"]["extrapolator"]["num_classes"]
        self._line = Timeline.restored(state_dict["line"], self._extrapolator(classes), self.lateness)
        self._batches, self._head_name = state_dict["batches"], state_dict["head"]
        self._conv = state_dict["conv"]
        self._memory = Memory()
        if state_dict["memory"] is not None:
            self._memory.load_state_dict(state_dict["memory"])

    def _restore_from(self, trainer: Any) -> None:
        """Lightning restores callbacks in ``fit`` only: a checkpoint would be predicted with uncorrected."""
        if self._line is None and trainer.ckpt_path:
            from groundwire.checkpoint import read

            self.load_state_dict(read(trainer.ckpt_path).get("callbacks", {}).get(self.state_key, {}))
        if self._line is None or not self._line.extrapolator.observed:
            inspection.say(inspection.NO_HISTORY)

    # What comes out

    @property
    def extrapolator(self) -> PriorExtrapolator:
        """The forecaster with all that it observed.

        Raises:
            PluginError: Nothing was observed yet.
        """
        if self._line is None:
            raise PluginError("limes: nothing was observed yet -> fit first, or load a checkpoint")
        return self._line.extrapolator

    def prior(self, timestamp: Any = None) -> Array:
        """The class prior expected at ``timestamp``, or in the step after the last one; shape (K,), float64."""
        step = self.next_step if timestamp is None else int(self._keys(timestamp, 1)[0])
        return self.extrapolator.forecast(step)

    def export_adapted(self, timestamps: Sequence[Any], module: nn.Module | None = None) -> BiasTable:
        """Biases for serving without this plugin: what to add to the plain model's scores, step by step.

        Args:
            timestamps: When the model will be asked; each step in which one falls gives a row of the table. Steps
                numbers with ``batches_per_step``.
            module: With the model, the table holds complete biases of its head.

        Raises:
            PluginError: Nothing was observed yet, or a timestamp is wrong.
        """
        line = self._line
        if line is None:
            raise PluginError("limes: nothing was observed yet -> fit first, or load a checkpoint")
        if self.batches_per_step is not None:
            keys, length = np.unique(np.asarray(timestamps, np.int64)), None
        else:
            try:
                keys, length = np.unique(step_keys(timestamps, self._seconds)), self._seconds
            except ValueError as error:
                raise PluginError(f"limes: {error}") from error
        head = None if module is None else module.get_submodule(self._head_name or "")
        return bias_table(line, keys.tolist(), length, head)

    @hookimpl
    def gw_export(self, module: nn.Module) -> None:
        """Fold the forecast of the step after the last one into the head's bias."""
        if self._line is not None and self._head_name is not None:
            fold(module.get_submodule(self._head_name), self._line.offset(self.next_step))

    @hookimpl
    def gw_findings(self, run: RunContext) -> list[Finding]:
        """Prequential quality, and what the reader should know."""
        if run.stage != "train" or self._line is None:
            return []
        self._absorb()
        return findings_of(self._line, self._season_steps, self._notes)

    @hookimpl
    def gw_section(self, findings: list[Finding], run: RunContext) -> Section | None:
        """Curves of accuracy, forecast and realised priors, and what the guard did."""
        return None if self._line is None else section(self, self._line, self._season_steps)

    @hookimpl
    def gw_provenance(self) -> dict[str, Any]:
        """What the weights need to be read right."""
        facts: dict[str, Any] = {"head": self._head_name, "method": self.method, "training_prior": self.training_prior}
        if self._line is not None:
            facts |= {
                "observed_steps": self._line.extrapolator.observed,
                "last_step": self._line.extrapolator.last_step,
            }
        return facts


def _one_of(name: str, value: Any, allowed: Sequence[Any]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
