"""The composition root: one callback, first in the Trainer's list while a run is open, that carries the services."""

from __future__ import annotations

import copy
import importlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from lightning.pytorch import Callback

import groundwire.specs as specs
from groundwire._lightning import (
    CALLBACK_HOOKS,
    Trainer,
    before_training_step,
    inherited_hooks_skipped,
    instance_attribute,
    is_learning_rate_finder,
    takes_dataloader_iter,
)
from groundwire.context import RunContext
from groundwire.errors import Problem, problems_error
from groundwire.hooks.ordering import name_of, relation_problems, resolve
from groundwire.hooks.registry import Hooks, implementations
from groundwire.optimizers import in_a_run
from groundwire.run import BatchStart, Run, Settings
from groundwire.service import Service

#: The services of a run, in the order in which they begin. Each can be taken out alone, with its module.
SERVICES = (
    "groundwire.services.checkpoint.provenance:CheckpointService",
    "groundwire.services.model:ModelService",
    "groundwire.services.scores.capture:ScoreService",
    "groundwire.services.gradient.step:GradientService",
    "groundwire.services.sample_ids:SampleIdService",
    "groundwire.services.rows:RowService",
    "groundwire.services.variants:VariantService",
    "groundwire.services.report.findings:FindingsService",
)


def host_of(trainer: Trainer) -> Host | None:
    """Return the open run's host in ``trainer``, or None."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, Host)), None)


def open_run(trainer: Trainer, module: Any, stage: str) -> Host:
    """Return the host of the run of ``trainer``, which is opened if it is not open yet.

    Raises:
        PluginError: With all problems of all plugins; everything is as before then.
    """
    host = host_of(trainer)
    if host is not None and host.interrupted:
        host.run.close()  # a callback's on_exception raised, so nobody came to close it
        host = None
    if host is None:
        host = Host(trainer, module, stage)
        try:
            host.open()
        except BaseException:
            host.run.close()
            raise
    return host


class Host(Callback):
    """One run. Services do the work; this class says when.

    Once model and optimizers exist, each of Lightning's hooks is set, on this object, to what the services of this run
    need there: to None, one method, or a function that calls several. Lightning passes by what is None.

    Attributes:
        run: The run.
        callback_list: The plugins among the Trainer's callbacks.
        services: The services.
        interrupted: Whether an exception ended the run.
    """

    def __init__(self, trainer: Trainer, module: Any, stage: str) -> None:
        self.interrupted = False
        self.callback_list = CallbackList(trainer)
        plugins, self._list_problems = self.callback_list.resolve()
        function, seed = str(getattr(stage, "value", stage)), int(os.environ.get("PL_GLOBAL_SEED", 0))
        listed_before = self.callback_list.before_plugins()
        self.run = Run(trainer, module, function, seed, self.callback_list.settings(), plugins, listed_before)
        self.run.hooks = Hooks(specs, lambda name: RunContext(self.run, name))
        self.services = [service_class(path)(self.run) for path in SERVICES]
        self._at_train_end: list[Callable[..., Any]] = []

    def open(self) -> None:
        """Refuse mistakes, enter the Trainer's list, check, and open the services."""
        run = self.run
        datamodule = run.trainer.datamodule
        members = {"lightning_module": run.module} | ({} if datamodule is None else {"datamodule": datamodule})
        problems = self._list_problems + [m for plugin in run.plugins for m in run.hooks.mistakes(plugin, True)]
        problems += [m for member in members.values() for m in run.hooks.mistakes(member, False)]
        if problems:
            raise problems_error(problems)
        run.undo.enter_context(self.callback_list.with_host(self))
        strategy = run.trainer.strategy
        for name, action in (("on_exception", run.close), ("on_train_end", self._training_ended)):
            run.undo.enter_context(instance_attribute(strategy, name, _Then(getattr(strategy, name), action)))
        # Last registered is called first: core's own implementations last of all.
        for service in self.services:
            self.run.hooks.register(service)
        for plugin in reversed(run.plugins):
            self._register(plugin, name_of(plugin))
        for name, member in members.items():
            self._register(member, name)
        self._check([])
        for service in self.services:
            service.open()

    def _register(self, obj: Any, name: str) -> None:
        self.run.hooks.register(obj, name)
        self.run.implementers[name] = obj

    def _check(self, problems: list[Problem]) -> None:
        problems = problems + self.run.hooks.collect("gw_check", Problem)
        if problems:
            raise problems_error(problems)

    def _get_ready(self) -> None:
        """Check again and start the services: model and optimizers exist now, whichever stage comes first."""
        run = self.run
        if run.ready:
            return
        run.ready = True
        for service in self.services:
            service.model_is_built()
        optimizers = [optimizer for optimizer in run.trainer.optimizers if implementations(optimizer)]
        problems = [m for optimizer in optimizers for m in run.hooks.mistakes(optimizer, False)]
        for optimizer in optimizers if not problems else ():
            self._register(optimizer, name_of(optimizer))
            in_a_run.add(optimizer)
            run.undo.callback(in_a_run.discard, optimizer)
        run.batch_starters = run.hooks.owners("gw_batch_start")
        self._check(problems + self._batches_unknown())
        for service in self.services:
            service.start()
        self._tell_searches()
        if run.function == "fit" and run.has_batch_start("train"):
            run.undo.enter_context(before_training_step(run.trainer, self._before_training_step))
        self._set_hooks()

    def _tell_searches(self) -> None:
        """Warn of a search that trains without callbacks: the learning rate is found for another gradient."""
        owners = [*self.run.hooks.owners("gw_gradient"), *self.run.hooks.owners("gw_gradient_edit")]
        searches = [c for c in self.run.trainer.callbacks if is_learning_rate_finder(c)]
        if self.run.function == "fit" and owners and searches:
            warnings.warn(
                f"{type(searches[0]).__name__} searches without callbacks, so {', '.join(dict.fromkeys(owners))} has "
                "no part in the search, and the learning rate is one for training without it",
                stacklevel=2,
            )

    def _batches_unknown(self) -> list[Problem]:
        if self.run.function != "fit" or not self.run.batch_starters or not takes_dataloader_iter(self.run.module):
            return []
        text = "training_step takes dataloader_iter, so no batch is known before its forward pass"
        return [Problem(name, text, "take batch") for name in self.run.batch_starters]

    def _set_hooks(self) -> None:
        """Set each of Lightning's hooks to what it calls in this run; a callback that does nothing costs time too."""
        table: dict[str, list[Callable[..., Any]]] = {hook: [] for hook in CALLBACK_HOOKS}
        for stage, hook in (("validate", "validation"), ("test", "test"), ("predict", "predict")):
            if self.run.has_batch_start(stage) or (stage == "validate" and self.run.has_batch_start("sanity")):
                table[f"on_{hook}_batch_start"].append(self._before_evaluation_batch)
        for service in self.services:
            for hook, method in service.callbacks().items():
                table[hook].append(method)
        self._at_train_end = table.pop("on_train_end")
        vars(self).update({hook: _all_of(methods) for hook, methods in table.items()})
        for callback in [*self.run.plugins, *self.callback_list.bundles]:
            self.run.undo.enter_context(inherited_hooks_skipped(callback))

    def _training_ended(self) -> None:
        """Do what comes after every callback's and the module's ``on_train_end``: weights may change there."""
        if self in self.run.trainer.callbacks:  # tuners end trainings of their own
            for method in self._at_train_end:
                method(self.run.trainer, self.run.module)

    def _before_training_step(self, batch: Any, batch_idx: int) -> None:
        # Tuners take all callbacks out of the Trainer while they try steps.
        if self in self.run.trainer.callbacks:
            self.run.start_batch(BatchStart(batch, "train", batch_idx))

    def _before_evaluation_batch(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        stage: Any = "sanity" if trainer.sanity_checking else self.run.stage
        self.run.start_batch(BatchStart(batch, stage, batch_idx, dataloader_idx))

    # Lightning's hooks, until the services' take their places

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Get ready."""
        self._get_ready()

    on_validation_start = on_test_start = on_predict_start = on_fit_start

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Close the run."""
        self.run.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Keep the plugins' state for checkpoints of the crash.

        Lightning does not call ``teardown`` when a step raises. The run is closed where the strategy is told of the
        exception, after all callbacks; those that save come last among them, when plugins have undone their work.
        """
        self.interrupted = True
        for plugin in self.run.plugins:
            if hasattr(plugin, "state_dict"):
                with suppress(Exception):  # the first error is the one to be told
                    state = _State(copy.deepcopy(plugin.state_dict()))
                    self.run.undo.enter_context(instance_attribute(plugin, "state_dict", state))

    def __reduce__(self) -> Any:
        """Copies and pickles of the Trainer's callbacks take no run along: they hold a callback without hooks."""
        return Callback, ()


class _State:
    """In the place of a callback's ``state_dict``: what it returned when the run was interrupted."""

    def __init__(self, state: Any) -> None:
        self._state = state

    def __call__(self) -> Any:
        return self._state


class _Then:
    """In the place of a method of the strategy: it, and an action afterwards. A copy is the method alone."""

    def __init__(self, method: Callable[..., Any], action: Callable[[], None]) -> None:
        self._method, self._action = method, action

    def __call__(self, *arguments: Any) -> Any:
        result = self._method(*arguments)
        self._action()
        return result

    def __reduce__(self) -> Any:
        return getattr, (self._method.__self__, self._method.__name__)  # type: ignore[attr-defined]


def service_class(path: str) -> type[Service]:
    """Return the class that an entry of :data:`SERVICES` means."""
    module, _, name = path.partition(":")
    service: type[Service] = getattr(importlib.import_module(module), name)
    return service


def _all_of(methods: Sequence[Callable[..., Any]]) -> Callable[..., Any] | None:
    """Return one callable for ``methods``; None for none."""
    if len(methods) < 2:
        return methods[0] if methods else None

    def call(*arguments: Any) -> None:
        for method in methods:
            method(*arguments)

    return call


def is_plugin(callback: Any) -> bool:
    """Tell whether ``callback`` takes part in a run: a Plugin, or any callback that implements a hook."""
    return getattr(callback, "opens_run", False) or bool(implementations(callback))


def is_bundle(callback: Any) -> bool:
    """Tell whether ``callback`` is a ``Plugins``."""
    return hasattr(callback, "bundled_settings")


class CallbackList:
    """The Trainer's callbacks: bundles expanded, plugins in resolved order in the plugins' places.

    The Trainer's list is replaced, not edited: Lightning's loop over ``setup`` keeps the list that it began with, so
    each ``setup`` runs once.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._original: list[Any] = trainer.callbacks
        self.bundles = [c for c in self._original if is_bundle(c)]
        self._expanded = [c for callback in self._original for c in self._expand(callback)]
        self._resolved: list[Any] = []

    def settings(self) -> Settings:
        """Return the settings of the run: those of its ``Plugins``."""
        settings: Settings = self.bundles[0].bundled_settings() if self.bundles else Settings()
        return settings

    def resolve(self) -> tuple[list[Any], list[Problem]]:
        """Return the plugins in resolved order, and everything wrong with the list itself."""
        plugins = [c for c in self._expanded if is_plugin(c)]
        self._resolved, cycles = resolve(plugins)
        return self._resolved, self._bundle_problems() + relation_problems(plugins) + cycles

    @contextmanager
    def with_host(self, host: Host) -> Iterator[None]:
        """Context manager: ``host`` first, plugins in resolved order in the plugins' places, the rest where it was."""
        order = iter(self._resolved)
        ours = [next(order) if is_plugin(c) else c for c in self._expanded]
        self._trainer.callbacks = [host, *ours]
        try:
            yield
        finally:
            # Back to the user's own list; what others added meanwhile stays.
            now = [c for c in self._trainer.callbacks if c is not host]
            added = [c for c in now if c not in ours]
            user = [c for c in self._original if c in now] + added
            self._trainer.callbacks = self._original if now == ours else user

    def items_in_order(self, bundle: Any) -> Sequence[Any]:
        """Return the items of ``bundle`` that are in the run, plugins first in resolved order."""
        items = self._items(bundle)
        return [p for p in self._resolved if p in items] + [c for c in items if not is_plugin(c)]

    def before_plugins(self) -> list[Any]:
        """Return the callbacks listed before the first plugin, whose setup opens the run."""
        places = [i for i, c in enumerate(self._expanded) if is_plugin(c)]
        return [c for c in self._expanded[: min(places, default=0)] if not is_plugin(c)]

    def _expand(self, callback: Any) -> list[Any]:
        return [callback, *self._items(callback)] if is_bundle(callback) else [callback]

    def _items(self, bundle: Any) -> list[Any]:
        return [item for item in bundle.items if name_of(item) not in bundle.off]

    def _bundle_problems(self) -> list[Problem]:
        problems = []
        if len(self.bundles) > 1:
            text = f"{len(self.bundles)} Plugins are in one Trainer"
            problems.append(Problem("Plugins", text, "put all items in one"))
        for bundle in self.bundles:
            names = [name_of(item) for item in bundle.items]
            if any(is_bundle(item) for item in bundle.items):
                text = f"a Plugins is inside another (items: {', '.join(names)})"
                problems.append(Problem("Plugins", text, "flatten it"))
            for name in bundle.off:
                if name not in names:
                    text = f"off={name!r} is none of its items ({', '.join(names)})"
                    problems.append(Problem("Plugins", text, "correct the name"))
        return problems
