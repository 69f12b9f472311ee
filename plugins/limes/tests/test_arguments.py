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


@pytest.fixture
def cli(kit, monkeypatch):
    """LIMES as a LightningCLI makes it."""
    monkeypatch.setattr("sys.argv", ["fit"])
    from lightning.pytorch.cli import LightningCLI

    def made(arguments):
        cli = LightningCLI(Digits, pl.LightningDataModule, run=False, args=arguments, save_config_callback=None,
                           seed_everything_default=False)  # fmt: skip
        return next(c for c in cli.trainer.callbacks if isinstance(c, LIMES))

    return made


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_arguments_come_from_yaml(kit, cli):
    given = {"batches_per_step": 4, "season": 12, "time": "when"}
    callback = {"class_path": "groundwire_limes.LIMES", "init_args": given}
    quiet = {**kit.QUIET, "max_epochs": 1, "default_root_dir": str(kit.path)}
    limes = cli({"trainer": {**quiet, "callbacks": [callback]}})
    assert {name: getattr(limes, name) for name in given} == given


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["period=900"], {"period": 900}),
        (["period=15min", "season=4h"], {"period": "15min", "season": "4h"}),
        (["batches_per_step=4", "season=12"], {"batches_per_step": 4, "season": 12}),
    ],
)
def test_arguments_come_from_the_command_line_with_their_types(cli, given, expected):
    chosen = [f"--trainer.callbacks.{text}" for text in given]
    limes = cli(["--trainer.logger=false", "--trainer.callbacks+=groundwire_limes.LIMES", *chosen])
    assert {name: getattr(limes, name) for name in expected} == expected
