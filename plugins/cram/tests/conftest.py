"""What the tests of sparse layers share, importable by a name that no other package's tests use."""

import importlib.util
import sys
from pathlib import Path

import pytest

from groundwire_cram.sparse import products

spec = importlib.util.spec_from_file_location("cram_sparse_layers", Path(__file__).with_name("sparse_layers.py"))
spec.loader.exec_module(sys.modules.setdefault("cram_sparse_layers", importlib.util.module_from_spec(spec)))


@pytest.fixture
def no_numba(monkeypatch):
    """As on a machine where Numba cannot be imported."""
    monkeypatch.setitem(sys.modules, "groundwire_cram.sparse.numba_products", None)
    products.load_numba.cache_clear()
    yield
    products.load_numba.cache_clear()
