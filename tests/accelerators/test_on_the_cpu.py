"""What tests/gpu runs on GPUs, on the CPU over Gloo as far as it takes no GPU: so that it is right where it counts."""

import pytest
from support.on_devices import EVERYWHERE, run


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("function", EVERYWHERE, ids=lambda function: function.__name__)
def test_layers(function, size):
    run(function, size, "cpu", "gloo")
