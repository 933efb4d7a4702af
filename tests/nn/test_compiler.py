"""XLA is told what the table says, for the programs it names, unless the user has said it."""

import jax
import pytest

from mmrlhf_jax.nn.compiler import OPTIONS, compiler_options


def test_only_the_named_programs_are_told():
    assert compiler_options("gpu", "step") == {"xla_gpu_enable_latency_hiding_scheduler": True}
    assert compiler_options("gpu", "decode") is None
    assert compiler_options("tpu", "decode") == {"xla_tpu_enable_async_collective_fusion": False}
    assert compiler_options("cpu", "step") is None


def test_what_the_user_names_is_left_alone(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_latency_hiding_scheduler=false")
    assert compiler_options("gpu", "step") is None


@pytest.mark.parametrize("option", [o for o in OPTIONS if o.platform == "gpu"], ids=lambda option: option.name)
def test_this_xla_knows_the_options_for_gpus(option):
    """Every build of XLA knows them; libtpu's are asked for by its own tests."""
    assert jax.jit(lambda x: x + 1, compiler_options={option.name: option.value})(1) == 2
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        jax.jit(lambda x: x + 1, compiler_options={option.name + "_": option.value})(1)
