"""All programs, and what is wrong with them today."""

from programs_generative import PROGRAMS as GENERATIVE
from programs_graphs import PROGRAMS as GRAPHS
from programs_language import PROGRAMS as LANGUAGE
from programs_loops import PROGRAMS as LOOPS
from programs_self_supervised import PROGRAMS as SELF_SUPERVISED
from programs_series import PROGRAMS as SERIES
from programs_tabular import PROGRAMS as TABULAR
from programs_vision import PROGRAMS as VISION

PROGRAMS = VISION | GENERATIVE | SELF_SUPERVISED | LANGUAGE | GRAPHS | SERIES | TABULAR | LOOPS

#: Right in the test, wrong in the code: (program, plugin) and why.
WRONG_TODAY = {
    ("template classifier", "AOL"): "item 21: the LightningModule is deep-copied with the user's metrics",
    ("VAE", "AOL"): "item 21: the tracing refusal does not name the way out",
    ("transformers classifier", "AOL"): "item 21",
    ("batches of a mapping class", "AOL"): "item 21",
    ("batches of a mapping class", "LIMES"): "item 10: the head is found now, and the correction does not act on it",
    ("batches of a mapping class", "BiasAudit"): "item 23: zero-dimensional arrays cannot be concatenated",
    ("graph classifier", "LIMES"): "item 10: the head is found now, and LIMES asks it for out_features",
}

#: A gradient that is kept over a step was made at other weights than those of the replay: see test_replay_windows.py.
NOT_REPLAYED = ("gradients zeroed every second step",)
