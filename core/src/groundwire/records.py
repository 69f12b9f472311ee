"""The records that plugins and core exchange, and what a plugin may count on of those that a service makes.

Plain frozen dataclasses, and protocols: nothing here does anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

if TYPE_CHECKING:  # a report is read without torch, which takes seconds to import
    from torch import Tensor, nn
    from torch.optim import Optimizer

Severity: TypeAlias = Literal["info", "warn", "fail"]
Stage: TypeAlias = Literal["train", "validate", "test", "predict"]
#: Stages of batches: the sanity check is one of its own for ``gw_batch_start``.
BatchStage: TypeAlias = Literal["train", "sanity", "validate", "test", "predict"]
Scalar: TypeAlias = bool | int | float | str | None
LossFn: TypeAlias = "Callable[..., Tensor]"


@dataclass(frozen=True)
class Fields:
    """The parts of a batch, by role.

    Attributes:
        inputs: What the model's ``forward`` takes; any shape, rows first.
        targets: Labels of the rows, or None.
        groups: Sensitive attribute of each row (tensor, array or list), or None.
        source: Which data source each row came from, or None.
        time: When each row was observed (Unix seconds or a step number), or None.
        ids: An identifier of each row that the batch carries itself, or None.

    Example:
        >>> import torch
        >>> Fields(torch.zeros(2, 3), targets=torch.tensor([0, 1])).targets
        tensor([0, 1])
    """

    inputs: Any
    targets: Any = None
    groups: Any = None
    source: Any = None
    time: Any = None
    ids: Any = None


@dataclass(frozen=True)
class Finding:
    """One thing a plugin found out, kept in ``findings.json`` and shown in the report.

    Attributes:
        plugin: Name of the plugin that found it.
        code: Short stable identifier, for example ``"sparsity"``; unique per plugin, stage and epoch.
        severity: ``"info"``, ``"warn"`` or ``"fail"``.
        value: Number, string, bool, None, or a list or dict of these; a run turns tensors and NumPy values into such.
            Numbers also go to the Trainer's loggers.
        message: One sentence for a reader who does not know the plugin.
        stage: ``"train"``, ``"validate"``, ``"test"``, ``"predict"`` or None.
        epoch: Epoch number, counted from 0, or None.

    Raises:
        ValueError: ``severity`` is none of the three.

    Example:
        >>> Finding("sam", "replays", "info", 120, "120 second passes were made.").code
        'replays'
    """

    plugin: str
    code: str
    severity: Severity
    value: Any
    message: str
    stage: str | None = None
    epoch: int | None = None

    def __post_init__(self) -> None:
        if self.severity not in ("info", "warn", "fail"):
            raise ValueError(f"severity must be 'info', 'warn' or 'fail', got {self.severity!r}")


@dataclass(frozen=True)
class Variant:
    """Another version of the model, such as a pruned one.

    Attributes:
        name: How reports call it, for example ``"90 % sparse"``.
        apply: Returns a context manager that edits the tensors of ``module.named_parameters()`` in place, or what
            shifts the scores, and undoes it on exit, whatever happens. Never edit ``layer.weight`` of a parametrized
            layer: it is recomputed from the originals and the edit is lost without a message.

    Example:
        >>> from contextlib import nullcontext
        >>> Variant("unchanged", nullcontext).name
        'unchanged'
    """

    name: str
    apply: Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Table:
    """A table of a report section: a caption, column titles, and rows of plain values.

    Example:
        >>> Table("Accuracy", ("model", "accuracy"), [("dense", 0.99)]).rows[0]
        ('dense', 0.99)
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Scalar]]


@dataclass(frozen=True)
class Section:
    """A plugin's part of the report page.

    Attributes:
        title: Heading.
        text: Plain text; blank lines separate paragraphs. It is escaped, never taken as HTML.
        tables: :class:`Table` records.
        figures: matplotlib figures, or callables that return one (called only when the page is drawn).

    Example:
        >>> Section("Compression", "Nothing was pruned.").title
        'Compression'
    """

    title: str
    text: str = ""
    tables: Sequence[Table] = ()
    figures: Sequence[Any] = ()


@dataclass(frozen=True)
class Head:
    """The layer that produces the model's scores: its name in ``named_modules()`` and the layer itself."""

    name: str
    module: Any


@dataclass(frozen=True)
class MicroBatch:
    """One recorded batch of an accumulation window.

    Attributes:
        batch: A shallow copy of the batch's containers; the tensors are the user's own.
        batch_idx: Its index in the epoch.
    """

    batch: Any
    batch_idx: int


@dataclass(frozen=True)
class Evaluation:
    """The measurements of one :meth:`RunContext.evaluate`.

    Attributes:
        variant: Name of the variant, None for the model itself.
        metrics: Mean over the pass of everything the evaluation step logged, by name.
        batches: Number of batches seen by this rank.
    """

    variant: str | None
    metrics: Mapping[str, float] = field(default_factory=dict)
    batches: int = 0


class GradientStep(Protocol):
    """One optimizer step whose gradient is complete: accumulated, reduced over ranks, unscaled, not yet clipped.

    Attributes:
        parameters: The optimizer's parameters by name in ``module.named_parameters()``; a tied one appears once.
        grads: Gradient of each parameter that has one, writable.
        optimizer: The optimizer that is about to step.
        finite: False as soon as a replay of this step produced a non-finite gradient.
        views: Whether the gradients of the parameters are views of DDP buckets (then :attr:`grads` holds copies).
    """

    parameters: dict[str, nn.Parameter]
    grads: dict[str, Tensor]
    optimizer: Optimizer
    finite: bool
    views: bool

    @property
    def micro_batches(self) -> tuple[MicroBatch, ...]:
        """The batches of the accumulation window, in order."""

    def perturbed(
        self, names: Iterable[str] | None = None, *, saved: dict[str, Tensor] | None = None
    ) -> AbstractContextManager[dict[str, nn.Parameter]]:
        """Save parameters, hand them out for in-place edits (gradients are off), and restore them, whatever happens.

        Args:
            names: The parameters that will be changed; all that have a gradient when left out.
            saved: For a kernel that saves and restores while it edits: an empty dict, in which the caller puts the
                copy of a parameter before it changes it and from which it takes what it has restored itself. Nothing
                is copied here then; what the dict holds at the end is restored.

        Returns:
            A context manager that gives the saved parameters by name. Edit them in place:
            ``weights[name].add_(...)``.

        Raises:
            KeyError: A name is not one of :attr:`parameters`.
        """

    def replay(self, loss_fn: LossFn | None = None, *, same_rng: bool = False) -> dict[str, Tensor]:
        """Return the gradient of the window's loss at the current weights; all other state stays as it is.

        Args:
            loss_fn: ``loss_fn(module, batch)`` or ``loss_fn(module, batch, optimizer)`` gives a scalar and is used
                instead of ``training_step``, which it may call; the plugin's own attribute ``loss_fn`` when left out.
                Required under manual optimization, where ``training_step`` would step again, and then taken as it is
                (not divided by the number of accumulated batches).
            same_rng: Use the first pass's dropout masks instead of fresh ones, which are seeded by
                (seed, global_step, micro-batch).

        Returns:
            New gradients by parameter name, unscaled and reduced over ranks. A parameter that this pass did not
            reach is missing.

        Raises:
            PluginError: Manual optimization without ``loss_fn``, a batch that was edited in place, or a caller other
                than the owner of ``gw_gradient`` in a run without one.
        """


class Report(Protocol):
    """All findings of a run, as ``gw_report`` sees them; :class:`groundwire.Report` reads and writes them.

    Attributes:
        meta: What the run was: plain values by name.
        sections: ``(plugin, Section)`` pairs. Figures are kept in the page only.
        path: The page, ``report.html``; ``findings.json`` lies next to it.
    """

    meta: dict[str, Any]
    sections: list[tuple[str, Section]]
    path: Path | None

    @property
    def findings(self) -> list[Finding]:
        """All findings, in the order in which each was first added."""
