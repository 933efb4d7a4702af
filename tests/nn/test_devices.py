"""The table of accelerators."""

import pytest

from mmrlhf_jax.nn.devices import ACCELERATORS, accelerator


@pytest.mark.parametrize(
    ("kind", "name"),
    [("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v6 lite", "v6e"), ("NVIDIA H100 80GB HBM3", "h100")],
)
def test_what_jax_calls_a_device_names_a_row(kind, name):
    found = accelerator(kind)
    assert found is not None
    assert found.name == name


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA H100 PCIe", "TPU v99"])
def test_a_device_that_is_not_listed_is_no_other(kind):
    assert accelerator(kind) is None


def test_units_are_those_of_the_fields():
    for chip in ACCELERATORS.values():
        assert 1e14 < chip.bf16_flops < 1e16
        assert 1e10 < chip.memory < 1e12
        assert chip.link < chip.bandwidth < 1e13
        assert chip.network is None or chip.network < chip.link
        assert chip.source
    assert {name for name, chip in ACCELERATORS.items() if chip.is_tpu} == {"v4", "v5e", "v5p", "v6e"}
