"""What the tests of LIMES share: Trainers that write no report unless asked, and one run that several tests look at."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest

from groundwire import Plugins
from groundwire_limes import LIMES

spec = importlib.util.spec_from_file_location("limes_digit_stream", Path(__file__).with_name("digit_stream.py"))
digit_stream = sys.modules.setdefault("limes_digit_stream", importlib.util.module_from_spec(spec))
spec.loader.exec_module(digit_stream)


def trainer_in(path, callbacks, options, report=False):
    """Drawing a report takes longer than the fits of these tests."""
    made = [Plugins([c], report=False) if isinstance(c, LIMES) and not report else c for c in callbacks]
    return pl.Trainer(callbacks=made, **{"max_epochs": 1, "default_root_dir": path, **options})


@pytest.fixture
def kit(kit):
    def trainer(*callbacks, report=False, **options):
        return trainer_in(kit.path, callbacks, {**kit.QUIET, **options}, report)

    return SimpleNamespace(**{**vars(kit), "trainer": trainer})


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """LIMES() after twelve hours: ``limes``, ``module``, and a ``checkpoint``. Look at it, predict with it."""
    path = tmp_path_factory.mktemp("fitted")
    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
             "enable_model_summary": False}  # fmt: skip
    limes, module, spy = LIMES(), digit_stream.Digits(), digit_stream.Spy()
    trainer = trainer_in(path, [limes, spy], quiet, report=True)
    trainer.fit(module, datamodule=digit_stream.module_of())
    trainer.save_checkpoint(path / "x.ckpt", weights_only=False)
    return SimpleNamespace(limes=limes, module=module, offsets=spy.offsets, checkpoint=path / "x.ckpt")
