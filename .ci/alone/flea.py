"""Filter with FLEA, in an environment that holds nothing but its wheel, core and what these ask for."""

import numpy as np

import groundwire_flea
from groundwire_flea import filter_sources

assert "site-packages" in groundwire_flea.__file__, f"{groundwire_flea.__file__} is not the installed wheel"
rng = np.random.default_rng(0)
source = np.repeat(list("abcde"), 400)
group = rng.integers(2, size=2000)
x = np.column_stack([rng.normal(size=(2000, 3)), group])
y = (x[:, 0] + rng.normal(size=2000) > 0).astype(int)
y[source == "c"] = 1 - y[source == "c"]
result = filter_sources(x, y, sensitive_features=group, sources=source, n_clean=4)
assert result.suppressed == ("c",), result.suppressed
print(f"groundwire-flea: kept {result.kept}, suppressed {result.suppressed}")
