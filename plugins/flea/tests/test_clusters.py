"""Pairs of sources on other engines: a real local Dask cluster through joblib."""

import warnings

import distributed
import joblib
import pytest
from joblib._parallel_backends import ThreadingBackend

from groundwire_flea import filter_sources


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::groundwire_flea.FLEAWarning")
def test_a_dask_cluster_computes_the_same_distances(table, monkeypatch):
    monkeypatch.setattr("groundwire_flea.distances.pair_batches.MAX_ROWS", 500)  # many blocks, as large data have
    data = table(5, (1, 3))
    arguments = {"sensitive_features": data.a, "sources": data.source}
    here = filter_sources(data.X, data.y, **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Dask's own about its dashboard port and shutting down
        with (
            distributed.LocalCluster(
                n_workers=1, threads_per_worker=2, dashboard_address=None, processes=True
            ) as cluster,
            distributed.Client(cluster) as client,
            joblib.parallel_config(backend="dask"),
        ):
            there = filter_sources(data.X, data.y, **arguments, progress=True)
            tasks = [key for log in client.run(lambda dask_worker: list(dask_worker.state.log)).values() for key in log]
    assert there.scores == here.scores
    assert there.kept == here.kept
    assert len(tasks) > 2


class Engine(ThreadingBackend):
    """An engine as Ray's is to joblib: registered from outside, one worker by default, all results at once."""

    supports_return_generator = False
    asked = ()

    def configure(self, n_jobs=1, parallel=None, **options):
        Engine.asked = (*Engine.asked, n_jobs)
        return super().configure(2 if n_jobs == -1 else n_jobs, parallel, **options)


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.setattr(Engine, "__module__", "somebody.elses")
    monkeypatch.setattr(Engine, "asked", ())
    monkeypatch.setattr("groundwire_flea.distances.pair_batches.MAX_ROWS", 500)
    joblib.register_parallel_backend("engine", Engine)
    yield Engine
    joblib.parallel.BACKENDS.pop("engine")


@pytest.mark.parametrize(("options", "workers"), [({}, -1), ({"n_jobs": 3}, 3)])
@pytest.mark.filterwarnings("ignore::groundwire_flea.FLEAWarning")
def test_an_engine_that_is_not_joblibs_own_gets_all_its_workers_unless_told(table, engine, options, workers):
    data = table(5, (1, 3))
    arguments = {"sensitive_features": data.a, "sources": data.source}
    here = filter_sources(data.X, data.y, **arguments)
    with joblib.parallel_config(backend="engine", **options):
        there = filter_sources(data.X, data.y, **arguments, progress=True)
    assert there.scores == here.scores
    assert engine.asked == (workers,)


def test_small_blocks_change_nothing(table, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = table(4, (2,))
        whole = filter_sources(data.X, data.y, sensitive_features=data.a, sources=data.source)
        monkeypatch.setattr("groundwire_flea.distances.pair_batches.MAX_ROWS", 300)
        parts = filter_sources(data.X, data.y, sensitive_features=data.a, sources=data.source)
    assert parts.scores == pytest.approx(whole.scores, abs=1e-9)
