"""The Numba products: compiled late, and without the GIL."""

import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import torch

from groundwire_cram.sparse import products
from groundwire_cram.sparse.csr import encode, narrowed


def test_importing_compiles_nothing_and_needs_no_lightning():
    code = textwrap.dedent(f"""
        import sys, types
        package = sys.modules["groundwire_cram"] = types.ModuleType("groundwire_cram")
        package.__path__ = [{str(Path(products.__file__).parents[1])!r}]
        import groundwire_cram.sparse
        assert not {{"lightning", "numba"}} & set(sys.modules)
    """)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=environment)


def test_kernels_run_without_the_gil():
    weight = torch.ones(2000, 2000)
    csr, x = encode(weight), torch.ones(64, 2000)
    csr = csr._replace(columns=narrowed(csr.columns))
    products.numba_times_rows(csr, None, x[:2])
    ticks, done = [], threading.Event()

    def tick():
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(1e-3)

    thread = threading.Thread(target=tick)
    thread.start()
    start = time.perf_counter()
    products.numba_times_rows(csr, None, x)
    end = time.perf_counter()
    done.set()
    thread.join()
    assert any(start < t < end for t in ticks)
