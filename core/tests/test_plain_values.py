"""What may be in a report, and that it survives strict JSON."""

import json

import numpy as np
import pytest
import torch
from core_report_values import finding, same, values
from hypothesis import given

from groundwire.plain import dumps, loads, plain
from groundwire.services.report.report import Report


@given(values)
def test_every_plain_value_survives_strict_json(value):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    text = dumps(plain(value))
    json.loads(text, parse_constant=refuse)
    assert same(loads(text), value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.tensor(3), 3),
        (torch.tensor([0.5, 1.0], requires_grad=True), [0.5, 1.0]),
        (torch.tensor([1.5], dtype=torch.bfloat16), [1.5]),
        (np.float64(0.5), 0.5),
        (np.float32(0.5), 0.5),
        (np.int64(7), 7),
        (np.bool_(True), True),
        (np.str_("a"), "a"),
        (np.array([[1, 2]]), [[1, 2]]),
        ({np.int64(0): (1, 2)}, {"0": [1, 2]}),
    ],
)
def test_tensors_and_numpy_values_become_plain(value, expected):
    assert same(plain(value), expected)


@pytest.mark.parametrize("value", [{1, 2}, object(), 1j, torch.tensor(1j), b"x", {(1, 2): 3}, {1: 0, "1": 0}])
def test_what_is_not_plain_is_refused_by_name(value):
    with pytest.raises(TypeError, match="finding 'sparsity' of cram cannot be stored: value"):
        Report().add([finding(value)])


def test_the_refusal_says_where_in_a_nested_value():
    with pytest.raises(TypeError, match="value: group: a: set is not a plain value"):
        Report().add([finding({"group": {"a": {1}}})])


def test_meta_that_is_not_plain_is_refused_by_name():
    with pytest.raises(TypeError, match="meta of the report cannot be stored: module: object"):
        Report({"module": object()})
