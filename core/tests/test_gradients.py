"""Whose gradient it is: one owner, then edits, then everyone who watches."""

import pytest
import torch
from torch import nn

from groundwire import Plugin, PluginError, hookimpl


def test_parameters_without_gradient_and_frozen_ones_stay(kit):
    class Module(kit.Net):
        def __init__(self):
            super().__init__()
            self.unused = nn.Linear(2, 2)
            self.net[0].weight.requires_grad_(False)

    module = Module()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    kit.fit(module, kit.SAM())
    after = module.state_dict()
    for name in ("unused.weight", "unused.bias", "net.0.weight"):
        assert torch.equal(before[name], after[name])
    assert not torch.equal(before["net.3.weight"], after["net.3.weight"])


def test_tied_weights_are_moved_once(kit):
    seen = []

    class Spy(Plugin):
        @hookimpl
        def gw_gradient(self, step):
            seen.append(sorted(step.parameters))

    class Module(kit.Net):
        def __init__(self):
            super().__init__()
            self.twin = self.net[0]

    kit.fit(Module(), Spy())
    assert len(seen) == 5
    assert all(len(names) == 6 for names in seen)


def test_gradient_edits_come_after_the_owner_and_before_clipping(kit):
    norms = []

    class Half(Plugin):
        @hookimpl
        def gw_gradient_edit(self, step):
            for grad in step.grads.values():
                grad.mul_(0.5)

    class Module(kit.Net):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            norms.append(float(kit.total_norm([p.grad for p in self.parameters()])))

    kit.fit(Module(), kit.SAM(), max_steps=1)
    kit.fit(Module(), Half(), kit.SAM(), max_steps=1)
    assert norms[1] == pytest.approx(norms[0] / 2)


def test_every_gradient_watcher_sees_the_final_gradient(kit):
    import lightning.pytorch as pl

    seen = []

    class Watcher(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen.append([p.grad.clone() for p in pl_module.parameters()])

    kit.fit(kit.Net(), Watcher(), kit.SAM(), Watcher(), max_steps=1)
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    kit.fit(kit.Net(), Watcher(), max_steps=1)
    assert not all(torch.equal(a, b) for a, b in zip(seen[0], seen[2], strict=True))


def test_nonfinite_gradients_skip_the_replay_and_are_reported(kit):
    class Module(kit.Net):
        def training_step(self, batch, batch_idx):
            value = super().training_step(batch, batch_idx)
            return value * float("nan") if batch_idx == 4 else value

    found = []

    class Watch(kit.SAM):
        @hookimpl
        def gw_report(self, report):
            found.extend(report.findings)

    kit.fit(Module(), Watch())
    [finding] = [f for f in found if f.plugin == "groundwire"]
    assert (finding.code, finding.value, finding.severity) == ("nonfinite_gradients", 1, "warn")


def test_a_nonfinite_replay_falls_back_to_the_first_gradient(kit):
    class Far(kit.SAM):
        @hookimpl
        def gw_gradient(self, step, run):
            with step.perturbed() as weights:
                weights["net.0.weight"].fill_(float("inf"))
                return step.replay()

    module, plain = kit.Net(), kit.Net()
    kit.fit(module, Far())
    kit.fit(plain)
    assert kit.difference(module.state_dict(), plain.state_dict()) == 0.0


def test_unknown_parameter_names_in_the_result_are_refused(kit):
    class Wrong(Plugin):
        @hookimpl
        def gw_gradient(self, step):
            return {"nonsense": torch.zeros(1)}

    with pytest.raises(PluginError, match=r"wrong .*nonsense"):
        kit.fit(kit.Net(), Wrong())


def test_two_gradient_owners_are_an_error_that_names_both(kit):
    class Other(kit.SAM):
        name = "other"

    with pytest.raises(PluginError, match="'other' and 'sam' both own the gradient"):
        kit.fit(kit.Net(), kit.SAM(), Other())


def test_a_fused_optimizer_under_a_scaler_sees_true_gradients(kit):
    """fp16 needs a GPU; the scaler is real, the autocast is bf16."""
    from lightning.pytorch.plugins import MixedPrecision

    def run(*callbacks, scaled):
        class Module(kit.Net):
            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.1, fused=True)

        plugin = MixedPrecision("bf16-mixed", "cpu")
        if scaled:
            plugin.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        module = Module()
        kit.fit(module, *callbacks, plugins=[plugin])
        return module.state_dict()

    assert kit.difference(run(kit.SAM(), scaled=True), run(kit.SAM(), scaled=False)) < 1e-6
    assert kit.difference(run(kit.SAM(), scaled=True), run(scaled=True)) > 1e-5


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (torch.zeros(2), r"'net.3.bias' must be a tensor of shape \(3,\), got shape \(2,\)"),
        (1.0, r"'net.3.bias' must be a tensor of shape \(3,\), got float"),
    ],
)
def test_wrong_gradients_name_owner_and_parameter(kit, result, text):
    class Wrong(Plugin):
        @hookimpl
        def gw_gradient(self, step):
            return {"net.3.bias": result}

    with pytest.raises(PluginError, match=f"wrong: the gradient of {text}"):
        kit.fit(kit.Net(), Wrong())


def test_perturbing_an_unknown_parameter_names_the_known_ones(kit):
    class Wrong(Plugin):
        @hookimpl
        def gw_gradient(self, step):
            with step.perturbed(["nonsense"]):
                pass

    with pytest.raises(KeyError, match=r"nonsense.*net\.0\.weight"):
        kit.fit(kit.Net(), Wrong())
