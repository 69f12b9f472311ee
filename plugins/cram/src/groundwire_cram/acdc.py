"""AC/DC: alternating compressed and decompressed training (Peste, Iofinova, Vladu, Alistarh, 2021), in Lightning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from groundwire import Finding, Plugin, Problem, RunContext, Section, hookimpl
from groundwire_cram.masks import Frozen, pack, unpack
from groundwire_cram.operators import operators_of
from groundwire_cram.prunable import Skip, check_selection, selected, weights_of
from groundwire_cram.threshold import check_sparsity

#: Callbacks that put an average of weights in place of the last ones.
_AVERAGES = {"WeightAveraging", "StochasticWeightAveraging"}


def schedule(
    epochs: int,
    warmup: int | None = None,
    phase: int | None = None,
    final_dense: int | None = None,
    final_sparse: int | None = None,
) -> list[bool]:
    """Return which epochs are compressed.

    A dense warm-up; then compressed and dense phases in turn; a last dense and a last compressed phase. What is left
    out takes the share of the published 100-epoch schedule: 10, 5, 10 and 15 % of the epochs, at least one.

    Args:
        epochs: Length of the training.
        warmup: Dense epochs at the start.
        phase: Epochs of each phase in between.
        final_dense: Epochs of the last dense phase.
        final_sparse: Epochs of the last compressed phase.

    Returns:
        For each epoch True if it is compressed.

    Raises:
        ValueError: A length is below 1, or they do not fit into ``epochs``.

    Example:
        >>> "".join("dS"[sparse] for sparse in schedule(20))
        'ddSdSdSdSdSdSdSddSSS'
    """
    shares = {"warmup": (warmup, 0.10), "phase": (phase, 0.05), "final_dense": (final_dense, 0.10)}
    shares["final_sparse"] = (final_sparse, 0.15)
    lengths = {name: max(1, round(share * epochs)) if n is None else n for name, (n, share) in shares.items()}
    for name, n in lengths.items():
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"{name} must be a whole number of epochs, at least 1, got {n!r}")
    between = epochs - lengths["warmup"] - lengths["final_dense"] - lengths["final_sparse"]
    if between < 0:
        raise ValueError(f"{epochs} epochs are too few for {lengths} -> train longer, or give shorter phases")
    alternating = [(epoch // lengths["phase"]) % 2 == 0 for epoch in range(between)]
    final = [False] * lengths["final_dense"] + [True] * lengths["final_sparse"]
    return [False] * lengths["warmup"] + alternating + final


class ACDC(Plugin):
    """Train a sparse model and a dense one together, by compressed and dense phases in turn.

    When a compressed phase begins, masks are taken from the magnitudes; pruned weights stay zero until it ends. A
    dense phase lets them grow again from zero. At the end the model is sparse; the dense model of the pair is the
    checkpoint that is written when the last dense phase ends. Costs nothing beside the masks: no second pass.

    Args:
        sparsity: Fraction of weights to prune, in [0, 1). Without effect for an N:M pattern.
        pattern: "global", "layerwise", or an N:M such as "2:4".
        skip: Layers that are never pruned: patterns of names, or a predicate of name and tensor.
        warmup: Dense epochs at the start; by default 10 % of the Trainer's ``max_epochs``.
        phase: Epochs of each further phase; by default 5 %.
        final_dense: Epochs of the last dense phase; by default 10 %.
        final_sparse: Epochs of the last compressed phase; by default 15 %.
        reset_momentum: Set the optimizers' momentum to zero when a dense phase begins.

    Raises:
        ValueError: ``sparsity`` or ``pattern`` is out of its range.

    Example:
        >>> ACDC(0.9).sparsity
        0.9
    """

    name = "acdc"

    def __init__(
        self,
        sparsity: float = 0.9,
        pattern: str = "global",
        *,
        skip: Skip = (),
        warmup: int | None = None,
        phase: int | None = None,
        final_dense: int | None = None,
        final_sparse: int | None = None,
        reset_momentum: bool = False,
    ) -> None:
        self.sparsity = check_sparsity(sparsity)
        if pattern == "n:m mix":
            raise ValueError('the masks of a phase are of one kind -> pattern="2:4" or "4:8"')
        [self.operator] = operators_of((self.sparsity,), pattern)
        self.pattern, self.skip, self.reset_momentum = pattern, skip, reset_momentum
        self.warmup, self.phase, self.final_dense, self.final_sparse = warmup, phase, final_dense, final_sparse
        self.dense_checkpoint: Path | None = None
        self._phases: list[bool] = []
        #: The masks of the compressed phase, also when the zeros went free because the training ended.
        self._masks: dict[str, torch.Tensor] = {}
        self._frozen: Frozen | None = None
        self._run: RunContext | None = None
        self._stopped_dense = False

    @hookimpl
    def gw_check(self, run: RunContext) -> list[Problem]:
        """Return what is wrong: the schedule needs epochs, something prunable, and a model that ends sparse."""
        if not run.ready or run.trainer.state.fn != "fit":
            return []
        self._run = run
        epochs = run.trainer.max_epochs
        if epochs is None or epochs < 1:
            return [Problem(self.name, f"phases are counted in epochs, and max_epochs is {epochs}", "set max_epochs")]
        try:
            self._phases = schedule(epochs, self.warmup, self.phase, self.final_dense, self.final_sparse)
            check_selection(run.module, self.skip)
        except ValueError as error:
            message, _, hint = str(error).partition(" -> ")
            return [Problem(self.name, message, hint)]
        return [Problem(self.name, *found) for found in self._ends_dense(run.trainer)]

    def _ends_dense(self, trainer: Any) -> Iterator[tuple[str, str]]:
        """Yield what would leave a model that is not sparse when the training ends, and what to do."""
        for callback in trainer.callbacks:
            if any(base.__name__ in _AVERAGES for base in type(callback).__mro__):
                text = f"{type(callback).__name__} puts an average over dense phases in place of the sparse weights"
                yield text, "leave it out, or average the weights of a fine-tuning under freeze_masks"
        for optimizer in trainer.optimizers:
            if callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None)):
                text = f"{type(optimizer).__name__} evaluates an average of its weights, which is not sparse"
                yield text, "use an optimizer whose weights are those that it steps"
        if trainer.max_steps is not None and trainer.max_steps >= 0:
            steps, batches = trainer.estimated_stepping_batches, trainer.num_training_batches
            if not 0 < batches < float("inf"):
                yield f"phases are counted in epochs, and an epoch has {batches} batches", "set limit_train_batches"
                return
            each = -(-batches // trainer.accumulate_grad_batches)
            last = min(len(self._phases), max(1, -(-int(steps) // each))) - 1
            if not self._phases[last]:
                text = f"max_steps={trainer.max_steps} ends the training in epoch {last}, in a dense phase"
                yield text, "train by max_epochs alone, or give the lengths of the phases"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Forget another training."""
        if stage == "fit":
            self._masks, self.dense_checkpoint = {}, None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Give a training that continues within a compressed phase its masks from the first batch on."""
        if self._masks:
            self._freeze(pl_module, self._masks)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin the phase of this epoch, if it is another one."""
        self._begin_phase(trainer, pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begin the phase of this batch's epoch: a resume at the end of an epoch starts the next one unannounced."""
        self._begin_phase(trainer, pl_module)

    def _begin_phase(self, trainer: Any, module: Any) -> None:
        compressed = self._phases[trainer.current_epoch]
        if compressed and self._frozen is None:
            if not trainer.fast_dev_run and self._run is not None:
                folder = self._run.directory or Path(trainer.default_root_dir)
                self.dense_checkpoint = folder / "acdc-dense.ckpt"
                trainer.save_checkpoint(self.dense_checkpoint, weights_only=True)
            self._prune(module)
        elif not compressed and self._frozen is not None:
            self._release()
            self._masks = {}
            if self.reset_momentum:
                _forget_momentum(trainer.optimizers)

    def _prune(self, module: Any) -> None:
        self._freeze(module, self.operator.apply(weights_of(module, selected(module, self.skip))))

    def _freeze(self, module: Any, masks: Mapping[str, torch.Tensor]) -> None:
        weights = dict(module.named_parameters())
        masks = {name: mask.to(weights[name].device) for name, mask in masks.items()}
        with torch.no_grad():
            for name, mask in masks.items():
                weights[name].masked_fill_(~mask, 0)
        self._masks, self._frozen = masks, Frozen(module, masks)

    def _release(self) -> None:
        if self._frozen is not None:
            self._frozen.remove()
            self._frozen = None

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Prune a model whose training was stopped in a dense phase: AC/DC ends sparse."""
        self._stopped_dense = self._frozen is None
        if self._stopped_dense:
            self._prune(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the masks of a compressed phase, one bit a weight, as bytes; no tensor."""
        state: dict[str, Any] = {}
        if self._masks:
            state["masks"] = {name: pack(mask) for name, mask in self._masks.items()}
        if self.dense_checkpoint is not None:
            state["dense_checkpoint"] = str(self.dense_checkpoint)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a compressed phase with its masks."""
        self._masks = {name: unpack(packed) for name, packed in state_dict.get("masks", {}).items()}
        path = state_dict.get("dense_checkpoint")
        self.dense_checkpoint = None if path is None else Path(path)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Let the zeros go."""
        self._release()
        self._run = None

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Let the zeros go."""
        self._release()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of copies, which do not hold the masks of the model that is trained."""
        return {**vars(self), "_masks": {}, "_frozen": None, "_run": None}

    @hookimpl
    def gw_findings(self, run: RunContext) -> list[Finding]:
        """Return what the pair is and where."""
        if run.stage != "train" or not self._phases:
            return []
        chosen = weights_of(run.module, selected(run.module, self.skip)).values()
        entries = max(1, sum(w.numel() for w in chosen))
        zeros = sum(int((w == 0).sum()) for w in chosen) / entries
        text, wanted = (
            f"{100 * zeros:.2f} % of the weights are zero.",
            sum(int((~m).sum()) for m in self._masks.values()),
        )
        if zeros < wanted / entries:
            text += f" The masks have {100 * wanted / entries:.2f} %: something changed the weights afterwards."
        elif self._stopped_dense:
            text += " The training was stopped in a dense phase, and the model pruned then in one shot."
        good = zeros >= wanted / entries and not self._stopped_dense
        found = [Finding(self.name, "sparsity", "info" if good else "warn", zeros, text, "train")]
        if self.dense_checkpoint is not None:
            text = f"The dense model of the pair is {self.dense_checkpoint.name}, of the end of the last dense phase."
            found.append(Finding(self.name, "dense_checkpoint", "info", self.dense_checkpoint.name, text, "train"))
        return found

    @hookimpl
    def gw_section(self) -> Section | None:
        """Return the phases as a picture."""
        if not self._phases:
            return None
        count = f"{sum(self._phases)} of {len(self._phases)} epochs compressed"
        text = f"Compressed ({self.operator}) and dense phases in turn; {count}."
        return Section("AC/DC: compressed and dense phases", text, (), [lambda: _picture(self._phases)])

    @hookimpl
    def gw_provenance(self, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
        """Return what was pruned, whether in a compressed phase, and the share of zeros in the saved weights."""
        saved = checkpoint.get("state_dict", {})
        weights = [saved[name] for name in self._masks if name in saved]
        zeros, entries = sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)
        return {
            "compress": str(self.operator),
            "compressed": bool(self._masks),
            "sparsity": zeros / entries if entries else 0.0,
        }


def _forget_momentum(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    for optimizer in optimizers:
        for state in optimizer.state.values():
            for key in ("momentum_buffer", "exp_avg"):
                if isinstance(state.get(key), torch.Tensor):
                    state[key].zero_()


def _picture(phases: Sequence[bool]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 1.6), layout="constrained")
    axes = figure.add_subplot()
    axes.step(range(len(phases) + 1), [*phases, phases[-1]], where="post")
    axes.set(xlabel="epoch", yticks=[0, 1], yticklabels=["dense", "compressed"], ylim=(-0.2, 1.2))
    return figure
