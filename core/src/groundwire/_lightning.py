"""Everything that groundwire uses of Lightning without Lightning documenting it, and nothing else.

Each function names what it touches and why there is no documented way. ``core/tests/test_lightning_contract.py``
checks each one, so that a Lightning release that moves something fails there first, with a name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.connectors.data_connector import _request_dataloader
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor, nn

from groundwire.modules import overrides


class Trainer(Protocol):
    """The parts of a Trainer, of either Lightning package, that core uses and that plugins usually ask for."""

    callbacks: list[Any]
    loggers: list[Any]
    fit_loop: Any
    validate_loop: Any
    test_loop: Any
    state: Any
    accumulate_grad_batches: int
    fast_dev_run: Any
    limit_train_batches: int | float
    should_stop: bool

    @property
    def strategy(self) -> Any: ...
    @property
    def precision_plugin(self) -> Any: ...
    @property
    def lightning_module(self) -> Any: ...
    @property
    def datamodule(self) -> Any: ...
    @property
    def optimizers(self) -> list[Any]: ...
    @property
    def precision(self) -> Any: ...
    @property
    def ckpt_path(self) -> Any: ...
    @property
    def logger(self) -> Any: ...
    @property
    def callback_metrics(self) -> dict[str, Tensor]: ...
    @property
    def estimated_stepping_batches(self) -> int | float: ...
    @property
    def global_rank(self) -> int: ...
    @property
    def global_step(self) -> int: ...
    @property
    def current_epoch(self) -> int: ...
    @property
    def max_epochs(self) -> int | None: ...
    @property
    def world_size(self) -> int: ...
    @property
    def is_global_zero(self) -> bool: ...
    @property
    def sanity_checking(self) -> bool: ...
    @property
    def testing(self) -> bool: ...
    @property
    def log_dir(self) -> str | None: ...
    @property
    def default_root_dir(self) -> str: ...
    @property
    def train_dataloader(self) -> Any: ...
    @property
    def val_dataloaders(self) -> Any: ...
    @property
    def test_dataloaders(self) -> Any: ...
    @property
    def predict_dataloaders(self) -> Any: ...


#: Attributes that Lightning and torch keep on every module; all others are the user's own.
MODULE_NAMES = frozenset(vars(nn.Module()))
LIGHTNING_MODULE_NAMES = frozenset(vars(LightningModule())) | {"log", "log_dict"}


def collect_rng_states() -> dict[str, Any]:
    """Return the global random states of torch, CUDA, NumPy and Python.

    ``_collect_rng_states``: the public ``isolate_rng`` does not restore after an exception.
    """
    states: dict[str, Any] = _collect_rng_states(include_cuda=torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
    return states


def set_rng_states(states: dict[str, Any]) -> None:
    """Set the states: inverse of :func:`collect_rng_states`."""
    _set_rng_states(dict(states))


def step_arguments(trainer: Trainer, batch: Any, batch_idx: int) -> tuple[Any, ...]:
    """Return the arguments of the user's ``training_step``: ``batch_idx`` is optional and may have any name.

    ``fit_loop.epoch_loop._build_kwargs``: only the loop knows the rule. Not the one that :func:`before_training_step`
    put in its place.
    """
    build = trainer.fit_loop.epoch_loop._build_kwargs
    return tuple(getattr(build, "original", build)({}, batch, batch_idx).values())


@contextmanager
def before_training_step(trainer: Trainer, action: Callable[[Any, int], None]) -> Iterator[None]:
    """While open, call ``action(batch, batch_idx)`` before each training step, after every ``on_train_batch_start``.

    ``fit_loop.epoch_loop._build_kwargs``: it is called once for each batch, the last thing before the step. Callbacks
    and the strategy's ``on_train_batch_start`` see a batch that the module or a later callback may still replace, and
    also one that the module then skips.
    """
    loop = trainer.fit_loop.epoch_loop
    original = loop._build_kwargs

    def build(kwargs: Any, batch: Any, batch_idx: int) -> Any:
        action(batch, batch_idx)
        return original(kwargs, batch, batch_idx)

    build.original = original  # type: ignore[attr-defined]
    with instance_attribute(loop, "_build_kwargs", build):
        yield


def evaluation_arguments(
    trainer: Trainer, loop: Any, batch: Any, batch_idx: int, dataloader_idx: int
) -> tuple[Any, ...]:
    """Return the arguments of the user's ``validation_step`` or ``test_step``.

    ``_EvaluationLoop._build_kwargs`` and ``_build_step_args_from_hook_kwargs``: the same optional arguments again.
    """
    kwargs = _evaluation_kwargs(loop, batch, batch_idx, dataloader_idx)
    name = "test_step" if trainer.testing else "validation_step"
    return tuple(loop._build_step_args_from_hook_kwargs(kwargs, name))


def evaluation_hook_arguments(loop: Any, batch: Any, batch_idx: int, dataloader_idx: int) -> tuple[Any, ...]:
    """Return the arguments of the hooks before such a step; those after it take its output first."""
    return tuple(_evaluation_kwargs(loop, batch, batch_idx, dataloader_idx).values())


def _evaluation_kwargs(loop: Any, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
    return loop._build_kwargs(batch, batch_idx, dataloader_idx if one_after_another(loop) else None)


def one_after_another(loop: Any) -> bool:
    """Tell whether an evaluation reads several loaders, each by itself: their index is then an argument and a suffix.

    ``_is_sequential``: loaders of a ``CombinedLoader`` of another mode are read side by side.
    """
    return bool(loop._is_sequential and loop.num_dataloaders > 1)


def move_batch(trainer: Trainer, batch: Any, dataloader_idx: int) -> Any:
    """Do to a loader's batch what the loops do before a step.

    ``LightningModule._on_before_batch_transfer``: the transfer hooks have no public entry point.
    """
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=dataloader_idx)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=dataloader_idx)


def evaluation_loop(trainer: Trainer) -> Any:
    """Return the loop that evaluates now.

    ``fit_loop.epoch_loop.val_loop``: validation in ``fit`` has a loop of its own.
    """
    if trainer.testing:
        return trainer.test_loop
    fitting = trainer.state.fn == "fit"
    return trainer.fit_loop.epoch_loop.val_loop if fitting else trainer.validate_loop


def flattened_loaders(loaders: Any) -> list[Any]:
    """Return the loaders in a loader, a list, a dict or a ``CombinedLoader`` of loaders, flat.

    ``CombinedLoader`` is documented for its iteration; ``flattened`` is not.
    """
    return list((loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders)).flattened)


def fresh_pass(trainer: Trainer) -> CombinedLoader:
    """Return the loaders of the running evaluation, combined and limited as the loop does, from the beginning.

    ``_combined_loader`` with its ``_mode``: only the loop knows how the user's loaders are combined.
    """
    loop = evaluation_loop(trainer)
    combined = CombinedLoader(loop._combined_loader.iterables, loop._combined_loader._mode)
    combined.limits = loop.max_batches
    iter(combined)
    return combined


def is_misconfiguration(error: Exception) -> bool:
    """Tell whether ``error`` is a MisconfigurationException of either Lightning package: two unrelated classes."""
    return type(error).__name__ == "MisconfigurationException"


def gradient_scaler(trainer: Trainer) -> torch.amp.GradScaler | None:
    """Return the gradient scaler of fp16 mixed precision, or None. ``precision_plugin.scaler`` is not documented."""
    return getattr(trainer.precision_plugin, "scaler", None)


def zeroing_objects(trainer: Trainer) -> list[tuple[Any, Any]]:
    """Return each optimizer with all objects that can zero its gradient: itself, Lightning's wrapper of it, the module.

    ``strategy._lightning_optimizers``: the wrapper is of a class of its own and does not see the optimizer's
    attributes.
    """
    pairs = zip(trainer.optimizers, trainer.strategy._lightning_optimizers, strict=True)
    return [
        (optimizer, zeroing)
        for optimizer, wrapper in pairs
        for zeroing in (optimizer, wrapper, trainer.lightning_module)
    ]


def is_lightnings_step(kwargs: Mapping[str, Any]) -> bool:
    """Tell whether a Trainer steps an optimizer: ``Precision._wrap_closure`` is then what that gets as closure."""
    function = getattr(kwargs.get("closure"), "func", None)
    return getattr(function, "__name__", "") == "_wrap_closure"


def gradients_are_views(trainer: Trainer) -> bool:
    """Tell whether DDP keeps gradients as views of its buckets, so that a later backward overwrites them.

    ``strategy.model`` is the wrapped module.
    """
    return bool(getattr(trainer.strategy.model, "gradient_as_bucket_view", False))


def without_sync(trainer: Trainer, block: bool) -> AbstractContextManager[Any]:
    """Postpone gradient reduction. ``block_backward_sync`` exists on parallel strategies only."""
    if block and hasattr(trainer.strategy, "block_backward_sync"):
        sync: AbstractContextManager[Any] = trainer.strategy.block_backward_sync()
        return sync
    return nullcontext()


@contextmanager
def instance_attribute(obj: Any, name: str, value: Any) -> Iterator[None]:
    """Shadow ``obj.name`` by an instance attribute, whatever class it is of; the previous state comes back on exit.

    Lightning looks hooks up with ``getattr``, so an instance attribute is seen; ``nn.Module.__setattr__`` is bypassed.
    """
    store, missing = vars(obj), object()
    before = store.get(name, missing)
    store[name] = value
    try:
        yield
    finally:
        if before is missing:
            store.pop(name, None)
        else:
            store[name] = before


#: Lightning asks each callback at each of these for each training batch.
BATCH_HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


#: All hooks at which Lightning asks each callback through ``_call_callback_hooks``, from the first ``on_*_start`` on.
CALLBACK_HOOKS = (
    *BATCH_HOOKS,
    *(
        f"on_{stage}_{place}"
        for stage in ("train", "validation", "test", "predict")
        for place in ("start", "end", "epoch_start", "epoch_end", "batch_start", "batch_end")
        if (stage, place[:5]) != ("train", "batch")
    ),
    "on_sanity_check_start",
    "on_sanity_check_end",
)


def skip_hooks(callback: Any, *hooks: str) -> None:
    """Have Lightning pass ``callback`` by at ``hooks``: ``_call_callback_hooks`` calls only what is callable.

    Each call costs 1.5 to 2 us of a step, also one that does nothing.
    """
    vars(callback).update(dict.fromkeys(hooks))


@contextmanager
def inherited_hooks_skipped(callback: Any) -> Iterator[None]:
    """Context manager: as :func:`skip_hooks`, at those of :data:`BATCH_HOOKS` that ``callback`` inherits."""
    hooks = [name for name in BATCH_HOOKS if name not in vars(callback) and not overrides(callback, name)]
    skip_hooks(callback, *hooks)
    try:
        yield
    finally:
        for name in hooks:
            vars(callback).pop(name, None)


def state_key(callback: Any, name: str) -> str:
    """Return the key under which a checkpoint keeps the state of a callback that has a name of its own.

    ``Callback._generate_state_key``: Lightning's documentation shows it, and only it knows how keys are spelled.
    """
    key: str = callback._generate_state_key(name=name)
    return key


@contextmanager
def loggers_replaced(trainer: Trainer, replacement: Callable[[Any], Any]) -> Iterator[None]:
    """Context manager that puts ``replacement(logger)`` in the place of each of the Trainer's loggers.

    ``trainer.loggers`` has a setter without documentation.
    """
    loggers = list(trainer.loggers)
    trainer.loggers = [replacement(logger) for logger in loggers]
    try:
        yield
    finally:
        trainer.loggers = loggers


@contextmanager
def logging_to(module: nn.Module, sink: Callable[..., None]) -> Iterator[None]:
    """Send ``self.log`` and ``self.log_dict`` of every LightningModule in ``module`` to ``sink(name, value, ...)``.

    A call in a place that Lightning did not prepare overwrites or duplicates the user's metrics without a message.
    """

    def log_dict(values: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        for name, value in values.items():
            sink(name, value, *args, **kwargs)

    loggers = [m for m in module.modules() if hasattr(type(m), "log_dict") and hasattr(type(m), "training_step")]
    before = [{k: vars(m).get(k) for k in ("log", "log_dict")} for m in loggers]
    for m in loggers:
        vars(m).update(log=sink, log_dict=log_dict)
    try:
        yield
    finally:
        for m, old in zip(loggers, before, strict=True):
            for key, value in old.items():
                vars(m).pop(key, None)
                if value is not None:
                    vars(m)[key] = value


@dataclass(frozen=True)
class LoggedMetrics:
    """What a Trainer's ``callback_metrics``, ``logged_metrics`` and ``progress_bar_metrics`` hold.

    Attributes:
        finished: Values of earlier batches, by attribute of the logger connector.
        running: What was logged for this batch, by Lightning's key: its result and its value.
    """

    finished: Mapping[str, Mapping[str, Any]]
    running: Mapping[str, tuple[Any, Any]]


def logged_metrics(trainer: Trainer) -> LoggedMetrics:
    """Return the Trainer's metrics of now, without computing any.

    ``_logger_connector`` and ``_results``: the public properties compute what they hold, and keep it.
    """
    connector: Any = trainer._logger_connector  # type: ignore[attr-defined]
    results: Any = trainer._results or {}  # type: ignore[attr-defined]
    names = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")
    return LoggedMetrics(
        {name: dict(getattr(connector, name)) for name in names},
        {key: (result, result._forward_cache) for key, result in results.items()},
    )


@contextmanager
def showing_metrics(trainer: Trainer, metrics: LoggedMetrics) -> Iterator[None]:
    """Context manager in which the Trainer's metrics are ``metrics``."""
    now = logged_metrics(trainer)
    try:
        _show(trainer, metrics)
        yield
    finally:
        _show(trainer, now)


def _show(trainer: Any, metrics: LoggedMetrics) -> None:
    vars(trainer._logger_connector).update({name: dict(values) for name, values in metrics.finished.items()})
    if trainer._results is not None:
        trainer._results.clear()
        trainer._results.update({key: result for key, (result, _) in metrics.running.items()})
    for result, value in metrics.running.values():
        result._forward_cache = value


def takes_dataloader_iter(module: Any, step: str = "training_step") -> bool:
    """Tell whether a step takes the loader's iterator, which cannot be read twice."""
    return "dataloader_iter" in inspect.signature(getattr(module, step)).parameters


def spawns_processes(trainer: Trainer) -> bool:
    """Tell whether training runs in child processes of this one (fork, spawn, notebook).

    ``_MultiProcessingLauncher``: no public question answers this.
    """
    launcher = trainer.strategy.launcher
    return any(cls.__name__ == "_MultiProcessingLauncher" for cls in type(launcher).__mro__)


def is_averaging(callback: Any) -> bool:
    """Tell whether a callback of either Lightning package keeps an averaged copy of the model."""
    names = {cls.__name__ for cls in type(callback).__mro__}
    return bool(names & {"WeightAveraging", "StochasticWeightAveraging"})


def is_learning_rate_finder(callback: Any) -> bool:
    """Tell whether a callback, of either Lightning package, tries learning rates with all other callbacks taken out."""
    return any(cls.__name__ in ("LearningRateFinder", "_LRCallback") for cls in type(callback).__mro__)


@contextmanager
def choosing_train_loader(trainer: Trainer, choose: Callable[[Any], Any], reload: list[int]) -> Iterator[None]:
    """Let ``choose(loader)`` replace the training loader whenever the fit loop is about to ask for one.

    An epoch in ``reload`` makes it ask again at the epoch after it.

    ``fit_loop.setup_data`` with ``_combined_loader``, ``_should_reload_train_dl`` and ``_data_source``: the loader may
    be an argument or a method of module or DataModule. ``choose`` runs outside ``_request_dataloader``, which patches
    the DataLoader class and would leave it patched if ``choose`` raised.
    """
    loop = trainer.fit_loop
    original = loop.setup_data

    def setup_data() -> None:
        wanted = any(epoch < trainer.current_epoch for epoch in reload)
        if loop._combined_loader is not None and not (wanted or loop._should_reload_train_dl):
            return
        if trainer.limit_train_batches == 0:
            original()  # asks for no loader
            return
        reload.clear()
        loop._combined_loader = None
        loader = choose(_request_dataloader(loop._data_source))
        with instance_attribute(loop._data_source, "dataloader", lambda: loader):
            original()

    with instance_attribute(loop, "setup_data", setup_data):
        yield


@contextmanager
def before_restoring(cls: type[Any], action: Callable[[Any], None]) -> Iterator[None]:
    """Run ``action(module)`` while ``cls.load_from_checkpoint`` works, after building and before loading weights.

    ``on_load_checkpoint`` is the last thing that Lightning calls before ``load_state_dict``.
    """
    original = cls.on_load_checkpoint

    def on_load_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
        action(self)
        original(self, checkpoint)

    own = "on_load_checkpoint" in vars(cls)
    cls.on_load_checkpoint = on_load_checkpoint
    try:
        yield
    finally:
        if own:
            cls.on_load_checkpoint = original
        else:
            del cls.on_load_checkpoint


def closure_loss(output: Any) -> Tensor | None:
    """Return the loss in what ``training_step`` gave, by the rule of ``ClosureResult.from_training_step_output``."""
    return output.get("loss") if isinstance(output, Mapping) else output
