"""What Lightning keeps to itself is touched in core's ``_lightning.py`` only."""

import ast
from pathlib import Path

import lightning
import pytest
from torch import Tensor, nn
from torch.optim import Optimizer

ROOT = Path(__file__).parents[1]
SOURCES = [ROOT / "core/src", *ROOT.glob("plugins/*/src")]
LIGHTNING = [Path(lightning.__file__).parent / part for part in ("pytorch", "fabric")]
#: Attributes without an underscore that Lightning's documentation does not name.
UNDOCUMENTED = {
    "epoch_loop", "val_loop", "flattened", "launcher", "scaler", "block_backward_sync", "gradient_as_bucket_view",
}  # fmt: skip


def trees(folders):
    for folder in folders:
        for file in sorted(folder.rglob("*.py")):
            yield file, ast.parse(file.read_text("utf-8"))


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def is_own(node):
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def defined(tree, of_self_only):
    """Private names that a file gives to functions, classes and attributes (only of ``self``)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and is_private(node.name):
            yield node.name
        stored = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_private(node.attr)
        if stored and (is_own(node.value) or not of_self_only):
            yield node.attr
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and is_private(node.target.id):
            yield node.target.id


@pytest.fixture(scope="module")
def lightnings():
    torchs = {name for cls in (nn.Module, Tensor, Optimizer) for name in dir(cls)} | set(vars(nn.Module()))
    return {name for _, tree in trees(LIGHTNING) for name in defined(tree, of_self_only=False)} - torchs


def touched(tree, lightnings):
    """Lines that import or use something private of Lightning: (line, what)."""
    own = set(defined(tree, of_self_only=True))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("lightning", "pytorch_lightning"):
            for part in [*node.module.split("."), *(alias.name for alias in node.names)]:
                if is_private(part):
                    yield node.lineno, part
        if isinstance(node, ast.Attribute):
            private = is_private(node.attr) and node.attr in lightnings and node.attr not in own
            if private or node.attr in UNDOCUMENTED:
                yield node.lineno, node.attr
        if isinstance(node, ast.Constant) and node.value in UNDOCUMENTED:
            yield node.lineno, node.value


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.parent.name)
def test_only_one_file_touches_what_lightning_keeps_to_itself(source, lightnings):
    found = [
        f"{file.relative_to(ROOT)}:{line}: {what}"
        for file, tree in trees([source])
        if file.name != "_lightning.py"
        for line, what in touched(tree, lightnings)
    ]
    assert not found


def test_the_search_finds_what_that_file_touches(lightnings):
    [tree] = [tree for file, tree in trees([ROOT / "core/src"]) if file.name == "_lightning.py"]
    found = {what for _, what in touched(tree, lightnings)}
    assert {"_build_kwargs", "_collect_rng_states", "_request_dataloader", "_combined_loader", "val_loop"} <= found
