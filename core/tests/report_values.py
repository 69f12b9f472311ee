"""Findings, values and figures that a report must carry unharmed, and what its page consists of."""

from html.parser import HTMLParser

from hypothesis import strategies as st
from matplotlib.figure import Figure

from groundwire.records import Finding

HOSTILE = "<script>alert(1)</script>\"'>&{{ 7 * 7 }}"

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()

keys = st.text().filter(lambda key: key != "$float")

values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(keys, inner), max_leaves=10)


def finding(value=1, plugin="cram", code="sparsity", severity="info", message="Half is zero.", **where):
    return Finding(plugin, code, severity, value, message, **where)


def same(a, b):
    """Equality in which nan equals nan and 1 is not 1.0."""
    return type(a) is type(b) and repr(a) == repr(b)


class Elements(HTMLParser):
    """Collects tags, attributes and text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, key, value or "") for key, value in attrs]

    def handle_data(self, data):
        self.text += data

    def values(self, key):
        return [value for _, name, value in self.attributes if name == key]


def hostile_figure():
    figure = Figure()
    axes = figure.subplots()
    axes.set_title(HOSTILE)
    axes.plot([0, 1], label=HOSTILE)
    axes.legend()
    axes.text(0.5, 0.5, "link", url="javascript:alert(1)", gid=HOSTILE)
    return figure
