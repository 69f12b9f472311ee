"""Each program bare, beside plugins that must not be noticed, and beside each plugin that exists."""

import math
from functools import cache

import pytest
from programs_generative import PROGRAMS as GENERATIVE
from programs_graphs import PROGRAMS as GRAPHS
from programs_harness import Idle, Refused, Replay, Works, assert_same, difference, run, zeros
from programs_language import PROGRAMS as LANGUAGE
from programs_loops import PROGRAMS as LOOPS
from programs_self_supervised import PROGRAMS as SELF_SUPERVISED
from programs_series import PROGRAMS as SERIES
from programs_tabular import PROGRAMS as TABULAR
from programs_vision import PROGRAMS as VISION

from groundwire import PluginError
from groundwire_aol import AOL
from groundwire_bias_audit import BiasAudit
from groundwire_cram import ACDC, CrAM
from groundwire_flea import FLEA
from groundwire_limes import LIMES

PROGRAMS = VISION | GENERATIVE | SELF_SUPERVISED | LANGUAGE | GRAPHS | SERIES | TABULAR | LOOPS

#: Right in the test, wrong in the code: (program, plugin) and why.
WRONG_TODAY = {
    ("DCGAN", "replay"): "items 4, 6: buffers get a new version by a replay; loss_fn is not told which optimizer steps",
    ("DCGAN", "CrAM"): "items 4, 6",
    ("batches of a mapping class", "replay"): "item 2: a UserDict is shared with the recording",
    ("batches of a mapping class", "CrAM"): "item 2",
    ("graph classifier", "replay"): "item 2: a plain object is shared with the recording",
    ("a gradient row zeroed", "replay"): "item 1: on_after_backward is not called for a replay",
    ("template classifier", "AOL"): "item 21: the LightningModule is deep-copied with the user's metrics",
    ("VAE", "AOL"): "item 21: the tracing refusal does not name the way out",
    ("transformers classifier", "AOL"): "item 21",
    ("batches of a mapping class", "AOL"): "item 21",
    ("autoencoder", "CrAM"): "item 13: recalibration runs forward, which is not what the user's step runs",
    ("graph classifier", "CrAM"): "item 13: recalibration does not ask Plugins(fields=...)",
    ("NamedTuple batches", "CrAM"): "item 13",
    ("transformers classifier", "LIMES"): "item 10: a dict batch is given to forward(**inputs) as one argument",
    ("transformers classifier", "BiasAudit"): "item 10",
    ("batches of a mapping class", "LIMES"): "item 10",
    ("batches of a mapping class", "BiasAudit"): "item 10",
    ("graph classifier", "LIMES"): "item 10: a layer with its own weight and F.linear is not offered as a head",
    ("graph classifier", "BiasAudit"): "item 10",
    ("forecasting with several loaders", "CrAM"): "a variant edits the parameters in an LSTM's list of them",
    ("EMA", "LIMES"): "refused while the offset is a buffer, which an averaging callback pairs",
    ("SWA", "LIMES"): "refused while the offset is a buffer",
    ("EMA", "ACDC"): "item 14: the averaged weights are not sparse",
    ("SWA", "ACDC"): "item 14: an epoch after the last one of the schedule",
}


def case(name, plugin):
    """A program with a plugin, marked where that is wrong today."""
    reason = WRONG_TODAY.get((name, plugin))
    marks = [pytest.mark.xfail(strict=True, reason=reason)] if reason else []
    return pytest.param(name, plugin, marks=marks, id=f"{name}-{plugin}")


@cache
def bare(name):
    """Trained once, however many tests compare with it."""
    return run(PROGRAMS[name])


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_warns_of_nothing_by_itself(name):
    assert not bare(name).warned


@pytest.mark.parametrize("name", PROGRAMS)
def test_an_idle_plugin_is_not_noticed(name):
    assert_same(bare(name), run(PROGRAMS[name], Idle()))


# A gradient that is kept over a step was made at other weights than those of the replay: see test_replay_windows.py.
REPLAYED = [name for name in PROGRAMS if name != "gradients zeroed every second step"]


@pytest.mark.parametrize(("name", "which"), [case(name, "replay") for name in REPLAYED])
def test_a_replay_at_the_same_weights_gives_the_same_training(name, which):
    plugin = Replay(PROGRAMS[name].loss_fn)
    replayed = run(PROGRAMS[name], plugin)
    assert plugin.replays > 0
    assert_same(bare(name), replayed)


def flea(program):
    """Four sources and two groups that lie evenly over the rows."""
    train, _ = program.data()
    rows = range(len(getattr(train, "dataset", range(64))))
    return FLEA(source=[i % 4 for i in rows], groups=[i // 4 % 2 for i in rows], permutations=0)


PLUGINS = {
    "CrAM": lambda program: CrAM((0.5,), evaluate_every=1, loss_fn=program.loss_fn),
    "ACDC": lambda program: ACDC(0.5),
    "AOL": lambda program: AOL(),
    "LIMES": lambda program: LIMES(batches_per_step=2),
    "BiasAudit": lambda program: BiasAudit(groups=program.groups),
    "FLEA": flea,
}


@pytest.mark.parametrize(("name", "which"), [case(name, which) for name in PROGRAMS for which in PLUGINS])
def test_a_plugin_works_in_a_program_or_says_why_not(name, which):
    program = PROGRAMS[name]
    # With so few rows FLEA has to warn.
    expected = program.plugins.get(which, Works("flea: W") if which == "FLEA" else Works())
    plugin = PLUGINS[which](program)
    if isinstance(expected, Refused):
        with pytest.raises(PluginError) as error:
            run(program, plugin)
        assert [word for word in expected.words if word not in str(error.value)] == []
    elif expected is not None:
        trained = run(program, plugin)
        CHECKS[which](plugin, bare(name), trained, program)
        assert all(any(word in text for text in trained.warned) for word in expected.warns)
        assert all(any(word in text for word in expected.warns) for text in trained.warned)


def more(plain, trained):
    """What the plugin logged, which is all numbers."""
    assert plain.metrics.keys() <= trained.metrics.keys()
    found = {key: value for key, value in trained.metrics.items() if key not in plain.metrics}
    assert all(map(math.isfinite, found.values()))
    return found


def check_cram(plugin, plain, trained, program):
    assert difference(plain.state, trained.state) > 0
    # Losses that are logged in training stand beside them.
    wanted = {key for key in plain.metrics if key.startswith("val")}
    found = more(plain, trained)
    assert {f"cram/{key}@{version}" for key in wanted for version in ("dense", "0.5")} <= found.keys()
    for key in wanted if not program.draws else ():
        assert found[f"cram/{key}@dense"] == pytest.approx(trained.metrics[key], abs=1e-6)


def check_acdc(plugin, plain, trained, program):
    assert difference(plain.state, trained.state) > 0
    assert zeros(trained.module) > 0.4


def check_aol(plugin, plain, trained, program):
    assert trained.metrics["aol/lipschitz"] == pytest.approx(1, abs=1e-3)
    assert 0 < more(plain, trained)["aol/clean"] <= 1


def check_limes(plugin, plain, trained, program):
    assert difference(plain.state, trained.state) > 0
    assert 0 < more(plain, trained)["limes/accuracy"] <= 1


def check_bias_audit(plugin, plain, trained, program):
    assert difference(plain.state, trained.state) == 0
    assert {key: trained.metrics[key] for key in plain.metrics} == plain.metrics
    assert len(plugin.results["validate"]["dense"].to_frame()) > 1
    assert more(plain, trained)


def check_flea(plugin, plain, trained, program):
    assert set(plugin.decision.kept) == {True, False}
    assert difference(plain.state, trained.state) > 0


CHECKS = {
    "CrAM": check_cram,
    "ACDC": check_acdc,
    "AOL": check_aol,
    "LIMES": check_limes,
    "BiasAudit": check_bias_audit,
    "FLEA": check_flea,
}
