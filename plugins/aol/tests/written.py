"""Models whose forward is written by the test."""

from torch import nn


class Apply(nn.Module):
    """``function(module, x)``, which finds ``children`` as attributes of ``module``."""

    def __init__(self, function, **children):
        super().__init__()
        self.function = function
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x):
        return self.function(self, x)
