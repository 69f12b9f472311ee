"""Audit predictions, in an environment that holds nothing but the plugin's wheel, core and what these ask for."""

import subprocess
import sys

import numpy as np
import pandas as pd

import groundwire_bias_audit
from groundwire_bias_audit import audit

assert "site-packages" in groundwire_bias_audit.__file__, f"{groundwire_bias_audit.__file__} is not the wheel"
rng = np.random.default_rng(0)
group, label = rng.integers(2, size=4000), rng.integers(2, size=4000)
score = np.where(rng.random(4000) < np.where(group == 1, 0.75, 0.95), label, 1 - label) * 0.8 + 0.1
result = audit(label, score, sensitive_features={"group": group})
assert str(result.verdict) == "disparity", result.verdict
pd.DataFrame({"label": label, "score": score, "group": group}).to_csv("predictions.csv", index=False)
command = [sys.executable, "-m", "groundwire_bias_audit", "predictions.csv"]
command += ["--label", "label", "--score", "score", "--groups", "group"]
code = subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode
assert code == 1, f"exit code {code}, expected 1 for a disparity"
print("groundwire-bias-audit: a planted disparity is found, also from the command line")
