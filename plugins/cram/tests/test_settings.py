"""The arguments that CrAM and CrAMOptimizer have in common: shown, typed and documented for both; and what is gone."""

import inspect
import os
import subprocess
import sys
import textwrap
from dataclasses import fields

import lightning.pytorch as pl
import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn

from groundwire import Report
from groundwire_cram import ACDC, CrAM, CrAMOptimizer
from groundwire_cram.kernels import backends, forced
from groundwire_cram.settings import Settings

OWN = {
    CrAM: ["evaluate_every", "calibration", "calibration_batches", "loss_fn"],
    CrAMOptimizer: ["base_optimizer", "first_pass", "module", "loss_fn"],
}
#: What --help says of the type of each argument.
TYPES = {
    "sparsities": "Union[float, Sequence[float], null]",
    "rho": "float",
    "pattern": "str",
    "plus": "bool",
    "sparse_grad": "bool",
    "interval": "int",
    "skip": "str | Sequence[str | Callable[[str, Tensor], bool]] | Callable[[str, Tensor], bool]",
    "grad_norm": "bool",
    "compress": "Union[Operator, Sequence[Operator], null]",
    "compat": "Optional[Literal['reference']]",
    "strict": "bool",
    "seed": "int",
}
SHARED = [field.name for field in fields(Settings)]


def test_every_shared_argument_is_listed_here():
    assert list(TYPES) == SHARED


def help_text(cls):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "it", skip={"base_optimizer", "module"})
    return " ".join(parser.format_help().split())


@pytest.mark.parametrize("cls", [CrAM, CrAMOptimizer])
def test_help_shows_every_argument_with_its_type_and_description(cls):
    text = help_text(cls)
    described = inspect.getdoc(Settings)
    for name, kind in TYPES.items():
        assert f"--it.{name}" in text, name
        first_words = " ".join(described.split(f"{name}: ", 1)[1].split()[:5])
        assert first_words in text, name
        shown = text.partition(first_words)[2].partition(" --it.")[0]
        assert f"(type: {kind}, default: " in shown, name
    for name in OWN[cls]:
        assert name in ("base_optimizer", "module") or f"--it.{name}" in text, name
    assert "backend" not in text


@pytest.mark.parametrize("cls", [CrAM, CrAMOptimizer])
def test_signature_and_docstring_have_them_too(cls):
    parameters = inspect.signature(cls).parameters
    assert set(parameters) == {*SHARED, *OWN[cls]}
    assert [name for name in parameters if name in SHARED] == SHARED
    assert [n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD][-2:] == ["sparsities", "rho"]
    for name in parameters:
        assert f"    {name}: " in cls.__doc__, name


QUANTIZE = {"class_path": "groundwire_cram.Quantize", "init_args": {"bits": 4}}
NM = {"class_path": "groundwire_cram.NM", "init_args": {"pattern": "2:4"}}
CHAIN = {"class_path": "groundwire_cram.Chain", "init_args": {"operators": [NM, QUANTIZE]}}
EXAMPLES = {
    CrAM: {
        "sparsities": [0.9, [0.5, 0.9]],
        "rho": [0.1],
        "pattern": ["layerwise", "2:4"],
        "plus": [False],
        "sparse_grad": [False],
        "interval": [3],
        "skip": ["head", ["head", "*.downsample.*"], []],
        "grad_norm": [True],
        "compress": [QUANTIZE, CHAIN, [QUANTIZE, NM]],
        "compat": ["reference"],
        "strict": [True],
        "seed": [3],
        "evaluate_every": [2],
        "calibration": [[1, 2]],
        "calibration_batches": [5],
        "loss_fn": ["torch.nn.functional.mse_loss"],
    },
    ACDC: {
        "sparsity": [0.8],
        "pattern": ["4:8"],
        "skip": ["head", ["head"], []],
        "warmup": [2],
        "phase": [3],
        "final_dense": [4],
        "final_sparse": [5],
        "reset_momentum": [True],
    },
}
CASES = [(cls, {}) for cls in EXAMPLES]
CASES += [(cls, {name: value}) for cls, found in EXAMPLES.items() for name, values in found.items() for value in values]


@pytest.mark.parametrize(("cls", "arguments"), CASES, ids=lambda x: getattr(x, "__name__", None) or str(x)[:40])
def test_a_saved_config_runs_again(cls, arguments):
    """As LightningCLI does it: the callback by class path, every default written out."""
    assert set(EXAMPLES[cls]) == set(inspect.signature(cls).parameters)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(pl.Callback, "callback")
    asked = {"class_path": f"groundwire_cram.{cls.__name__}", "init_args": arguments}
    saved = parser.dump(parser.parse_object({"callback": asked}))
    assert parser.dump(parser.parse_string(saved)) == saved
    first, again = (
        parser.instantiate(config).callback
        for config in (parser.parse_object({"callback": asked}), parser.parse_string(saved))
    )
    for name in inspect.signature(cls).parameters:
        mine, other = getattr(first, name), getattr(again, name)
        assert [str(mine), type(mine)] == [str(other), type(other)] or [*mine] == [*other] == [], name


def test_backend_is_deprecated_and_still_works(kit):
    with pytest.warns(DeprecationWarning, match="kernels are chosen by device and dtype"):
        cram = CrAM(0.5, backend="aten")
    kit.fit(kit.Net(), cram, max_epochs=1, logger=pl.loggers.CSVLogger(kit.path, name="", version=""))
    assert [f.value for f in Report.read(kit.path).findings if f.code == "backend"] == ["aten"]
    layer = nn.Linear(4, 2)
    with pytest.warns(DeprecationWarning, match="backend="), pytest.raises(ValueError, match="backend must be one of"):
        CrAMOptimizer(torch.optim.SGD(layer.parameters(), lr=0.1), backend="cuda")


def test_a_forced_backend_ends_with_its_block():
    with forced("aten"), pytest.raises(ValueError, match="backend must be one of"):
        forced("cuda").__enter__()
    assert not backends._forced


@pytest.mark.slow
def test_neither_importing_nor_a_run_leaves_a_hook_of_torch_behind(tmp_path):
    code = textwrap.dedent("""
        import torch
        from torch.nn.modules import module as modules
        from torch.optim import optimizer as optimizers

        def hooks():
            found = [(name, kept) for home in (modules, optimizers) for name, kept in vars(home).items()]
            return {name: list(kept) for name, kept in found if name.startswith("_global_") and isinstance(kept, dict)}

        import groundwire, groundwire.testing
        from groundwire import hookimpl
        before = hooks()
        assert before
        import groundwire_cram
        from groundwire_cram import ACDC, CrAM, CrAMOptimizer, freeze_masks, prune
        assert hooks() == before

        import lightning.pytorch as pl
        from lightning.pytorch.demos.boring_classes import BoringModel
        options = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
                       enable_checkpointing=False, limit_train_batches=2, limit_val_batches=1, max_epochs=4)
        pl.Trainer(callbacks=[CrAM(0.5), groundwire.Plugins(report=False)], **options).fit(BoringModel())
        assert hooks() == before
        model = BoringModel()
        pl.Trainer(callbacks=[ACDC(0.5), groundwire.Plugins(report=False)], **options).fit(model)
        assert hooks() == before
        frozen = freeze_masks(prune(model, 0.5))
        assert hooks() != before
        frozen.remove()
        assert hooks() == before
    """)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
