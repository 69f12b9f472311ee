"""Arguments of the constructor."""

import lightning.pytorch as pl
import pytest
from limes_digit_stream import Digits

from groundwire_limes import LIMES


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"period": "1 fortnight"}, "period must be a positive length"),
        ({"period": 0}, "period must be a positive length"),
        ({"method": "magic"}, "method must be one of 'auto', 'nearest'"),
        ({"preset": "icpr"}, "preset must be one of None, 'icpr2022'"),
        ({"training_prior": "x"}, "training_prior must be one of"),
        ({"on_backward": "x"}, "on_backward must be one of"),
        ({"batches_per_step": 0}, "batches_per_step must be a whole number of at least 1"),
        ({"lateness": -1}, "lateness must be a whole number of at least 0"),
        ({"season": 1, "batches_per_step": 2}, "season must be a whole number of at least 2"),
        ({"season": "1w", "batches_per_step": 2}, "season must be a whole number of at least 2"),
        ({"season": "7h", "period": "2h"}, "season must be two steps or more, whole ones of 7200 s each, got '7h'"),
        ({"season": 24}, "season must be two steps or more, whole ones of 3600 s each, got 24"),
    ],
)
def test_bad_arguments_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        LIMES(**options)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_arguments_come_from_yaml(kit, monkeypatch):
    monkeypatch.setattr("sys.argv", ["fit"])
    from lightning.pytorch.cli import LightningCLI

    arguments = {
        "trainer": {**kit.QUIET, "max_epochs": 1, "default_root_dir": str(kit.path),
                    "callbacks": [{"class_path": "groundwire_limes.LIMES", "init_args": {"batches_per_step": 4}}]},
    }  # fmt: skip
    cli = LightningCLI(Digits, pl.LightningDataModule, run=False, args=arguments, save_config_callback=None,
                       seed_everything_default=False)  # fmt: skip
    limes = next(c for c in cli.trainer.callbacks if isinstance(c, LIMES))
    assert limes.batches_per_step == 4
