"""Pairs of sources on other engines: a real local Dask cluster through joblib."""

import warnings

import joblib
import pytest

from groundwire_flea import filter_sources


@pytest.mark.filterwarnings("ignore::groundwire_flea.FLEAWarning")
def test_a_dask_cluster_computes_the_same_distances(table, monkeypatch):
    distributed = pytest.importorskip("distributed", reason="the extra groundwire-flea[dask] is not installed")
    monkeypatch.setattr("groundwire_flea.rows.BLOCK", 500)  # many blocks, as large data have
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


def test_small_blocks_change_nothing(table, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = table(4, (2,))
        whole = filter_sources(data.X, data.y, sensitive_features=data.a, sources=data.source)
        monkeypatch.setattr("groundwire_flea.rows.BLOCK", 300)
        parts = filter_sources(data.X, data.y, sensitive_features=data.a, sources=data.source)
    assert parts.scores == pytest.approx(whole.scores, abs=1e-9)
