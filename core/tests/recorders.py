"""Plugins that write down what happens to them, and what a run must leave as it was."""

from groundwire import Plugin, hookimpl
from groundwire.testing.traces import stays


class Recorder(Plugin):
    """Writes down what happens to it."""

    name = "recorder"

    def __init__(self, name=None):
        if name:
            self.name = name
        self.events = []

    @hookimpl
    def gw_check(self, run):
        self.events.append(("check", run.ready, run.stage))

    @hookimpl
    def gw_findings(self, run):
        self.events.append(("findings", run.stage))


class Forgetful(Recorder):
    """Overrides Lightning hooks and forgets super()."""

    name = "forgetful"

    def setup(self, trainer, pl_module, stage):
        self.events.append(("setup", stage))

    def teardown(self, trainer, pl_module, stage):
        self.events.append(("teardown", stage))


def state(trainer, module):
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()]
    names = set(vars(module)) - {"_hparams"}
    strategy = {name for name, value in vars(trainer.strategy).items() if not stays(value)}
    return trainer.callbacks, names, strategy, hooks, list(module.state_dict())


def plugin(name, **relations):
    return type(name, (Plugin,), {"name": name, **relations})()
