"""The pytest fixtures of groundwire. Wherever it is installed, pytest imports this file at every start.

So nothing here imports torch or Lightning before a test asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from groundwire.testing.fitting import Fit
    from groundwire.testing.resuming import Resumed


@pytest.fixture
def gw_fit(tmp_path: Path) -> Iterator[Callable[..., Fit]]:
    """``gw_fit(callbacks=(), module=None, *, loader=None, seed=0, **trainer_options) -> Fit``.

    Fits ``module`` (the kit's small classifier on generated data when left out) for two quiet epochs in ``tmp_path``.
    ``callbacks`` is one or several; any option of the Trainer may be given. The result has ``.trainer``,
    ``.module``, ``.logged``, ``.tensors`` and ``.directory``. No installed plugin is found in such a test.
    """
    from groundwire.testing.fitting import fit
    from groundwire.testing.isolation import isolated
    from groundwire.testing.modules import Classifier

    def fit_here(callbacks: Any = (), module: Any = None, **options: Any) -> Fit:
        return fit(callbacks, Classifier() if module is None else module, tmp_path, **options)

    with isolated():
        yield fit_here


@pytest.fixture
def gw_resume(tmp_path: Path) -> Iterator[Callable[..., Resumed]]:
    """``gw_resume(factory, module=None, *, stop_after=3, loader=None, **trainer_options) -> Resumed``.

    Fits in one piece, and in two: stopped after ``stop_after`` optimizer steps (None: after the first epoch), saved
    to disk, and continued by a new Trainer, a new module and new callbacks from ``factory``. ``module`` and
    ``loader`` (of the module) are factories too; the kit's when left out, without dropout, whose random state
    Lightning does not restore. The result has ``.interrupted``, ``.uninterrupted`` and ``.differences``.
    """
    from groundwire.testing.isolation import isolated
    from groundwire.testing.loaders import stateful
    from groundwire.testing.modules import Classifier, without_dropout
    from groundwire.testing.resuming import resume

    def resume_here(factory: Callable[[], Any], module: Any = None, *, loader: Any = None, **options: Any) -> Resumed:
        return resume(factory, module or plain_module, tmp_path, loader=loader or stateful, **options)

    def plain_module() -> Any:
        return without_dropout(Classifier())

    with isolated():
        yield resume_here
