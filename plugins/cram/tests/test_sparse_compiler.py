"""Building the kernels: once, safely, and with a way out."""

import stat
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch

from groundwire_cram.sparse import compiled, compiler
from groundwire_cram.sparse.csr import encode, narrowed
from groundwire_cram.sparse.source import SOURCE

TINY = "int answer(void) { return 42; }"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled.load.cache_clear()
    yield tmp_path / "groundwire"
    compiled.load.cache_clear()


def test_a_library_is_built_once_in_a_folder_of_the_user_alone(cache, monkeypatch):
    runs = []
    original = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **kw: runs.append(command) or original(command, **kw))
    for _ in range(2):
        assert compiler.library("tiny", TINY).answer() == 42
    assert sum("--version" not in command for command in runs) == 1
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert [path.name[:5] for path in cache.iterdir()] == ["tiny-"]
    assert compiler.library("tiny", TINY.replace("42", "43")).answer() == 43


def test_a_folder_that_others_can_enter_is_not_used(cache, tmp_path):
    cache.mkdir(mode=0o700)
    cache.chmod(0o777)
    assert not compiler.private(cache)
    assert compiler.library("tiny", TINY).answer() == 42
    assert not list(cache.iterdir())
    other = tmp_path / "link"
    other.symlink_to(cache)
    assert not compiler.private(other)


def test_a_home_that_cannot_be_written_does_not_matter(monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    assert compiler.library("tiny", TINY).answer() == 42


def test_the_compiler_may_be_named(monkeypatch, cache):
    monkeypatch.setenv("CC", "no-such-compiler -m64")
    assert compiler.find() is None
    assert "no C compiler found" in compiler.library("tiny", TINY)
    monkeypatch.setenv("CC", "cc -DX=1")
    assert compiler.find() == ["cc", "-DX=1"]
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(cache))
    assert compiler.find() is None


def test_a_failing_compiler_is_quoted(cache):
    said = compiler.library("broken", "this is not C")
    assert "could not compile the kernel" in said
    assert "error" in said


def test_a_kernel_that_computes_wrongly_is_not_used(cache, monkeypatch):
    monkeypatch.setattr(compiled, "SOURCE", SOURCE.replace("d += values[k + 3]", "d -= values[k + 3]", 1))
    assert compiled.load() == "the compiled kernels compute wrongly -> name another compiler in CC"
    assert not compiled.ready()


def test_processes_that_build_at_the_same_time_do_not_meet(cache):
    code = textwrap.dedent(f"""
        import importlib.util, sys
        spec = importlib.util.spec_from_file_location("compiler", {compiler.__file__!r})
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.exit(module.library("tiny", {TINY!r}).answer() - 42)
    """)
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(4)]
    assert [process.wait(timeout=60) for process in processes] == [0] * 4
    assert len(list(cache.iterdir())) == 1


def test_importing_builds_nothing_and_needs_no_lightning(cache):
    code = textwrap.dedent(f"""
        import sys, types
        package = sys.modules["groundwire_cram"] = types.ModuleType("groundwire_cram")
        package.__path__ = [{str(Path(compiler.__file__).parents[1])!r}]
        import groundwire_cram.sparse
        assert "lightning" not in sys.modules
    """)
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert not cache.exists()


def test_kernels_run_without_the_gil():
    weight = torch.ones(2000, 2000)
    csr, x = encode(weight), torch.ones(64, 2000)
    csr = csr._replace(columns=narrowed(csr.columns))
    compiled.times_rows(csr, None, x[:1])
    ticks, done = [], threading.Event()

    def tick():
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(1e-3)

    thread = threading.Thread(target=tick)
    thread.start()
    start = time.perf_counter()
    compiled.times_rows(csr, None, x)
    end = time.perf_counter()
    done.set()
    thread.join()
    assert any(start < t < end for t in ticks)
