"""Errors of other libraries in one line that says something."""

import pytest
from torch import nn

from sequencer2d.errors import LONGEST, first_line


def test_the_first_line_that_says_something() -> None:
    assert first_line(ValueError("no route\nmore")) == "no route"
    assert first_line(ValueError("\n\n  late \n")) == "late"
    assert first_line(TimeoutError()) == "TimeoutError"
    assert first_line(KeyError("preprocessing")) == "there is no 'preprocessing'"


def test_what_pytorch_says_of_weights_names_the_parameter_and_ends() -> None:
    with pytest.raises(RuntimeError) as caught:
        nn.Linear(2, 3).load_state_dict({"weight": nn.Linear(2, 3).weight})
    assert first_line(caught.value) == (
        'Error(s) in loading state_dict for Linear: Missing key(s) in state_dict: "bias".'
    )
    assert len(first_line(ValueError("x" * 9999))) == LONGEST + 2
