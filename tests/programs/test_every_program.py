"""Each program bare, beside plugins that must not be noticed, and beside each plugin that exists."""

import math
from functools import cache

import pytest
from programs_harness import Idle, Refused, Replay, Works, assert_same, difference, run, zeros
from programs_list import NOT_REPLAYED, PROGRAMS, WRONG_TODAY

from groundwire import PluginError
from groundwire_aol import AOL
from groundwire_bias_audit import BiasAudit
from groundwire_cram import ACDC, CrAM
from groundwire_flea import FLEA
from groundwire_limes import LIMES


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


@pytest.mark.parametrize(("name", "which"), [case(name, "replay") for name in PROGRAMS if name not in NOT_REPLAYED])
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
