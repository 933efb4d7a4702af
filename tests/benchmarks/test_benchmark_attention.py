"""The attention benchmark lists every backend, counts what a group needs, and its figures belong together."""

from __future__ import annotations

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrlhf_jax.benchmarks import attention as benchmark
from mmrlhf_jax.benchmarks.attention import BACKENDS, Attention, Case, time_attention, time_case
from mmrlhf_jax.benchmarks.machine import measured_peak
from mmrlhf_jax.command import CommandError, UsageError

SMALL = Attention(models=("0.5b",), prompts=(32,), responses=2, response=8, repeats=3)


@pytest.fixture(autouse=True)
def _small_products(monkeypatch):
    monkeypatch.setattr(benchmark, "measured_peak", lambda dtype: measured_peak(dtype, 64, repeats=1))


def test_on_a_cpu_xla_is_timed_and_the_others_say_why_they_cannot_serve(tmp_path, capsys):
    output = tmp_path / "figures.json"
    time_attention(replace(SMALL, output=str(output)))
    figures = json.loads(output.read_text())
    (row,) = figures["rows"]
    assert set(row["backends"]) == set(BACKENDS) == {"xla", "cudnn", "splash"}
    assert row["backends"]["cudnn"] == {"problem": "cudnn attention needs a GPU, this is cpu"}
    assert row["backends"]["splash"] == {"problem": "splash attention needs a TPU, this is cpu"}
    xla = row["backends"]["xla"]
    assert xla["repeats"] == 3
    assert xla["ratio"] == {"forward": 1.0, "both": 1.0}
    assert (xla["difference"]["forward"], xla["difference"]["gradient"]) == (0, 0)
    for each in ("forward", "both"):
        low, high = xla["range"][each]
        assert 0 < low <= xla["seconds"][each] <= high
        assert xla["flops_per_second"][each] == pytest.approx(row["flops"][each] / xla["seconds"][each])
        assert xla["of_peak"][each] == pytest.approx(xla["flops_per_second"][each] / row["peak_flops"])
    assert figures["dtype"] == "float32"
    assert "cudnn   cannot serve: cudnn attention needs a GPU, this is cpu" in capsys.readouterr().out


def test_operations_are_those_of_the_pairs_that_see_each_other():
    case = Case("0.5b", prompt=5, responses=2, response=3)
    _, rule = benchmark._group(case, "float32")
    position, branch = np.asarray(rule.position[0]), np.asarray(rule.branch[0])
    same = (branch[None] == -1) | (branch[None] == branch[:, None])
    seen = int(((position[None] <= position[:, None]) & same).sum())
    assert case.flops == {"forward": 2 * 2 * 14 * 64 * seen, "both": 3 * 2 * 2 * 14 * 64 * seen}


def test_a_backend_that_lies_apart_is_seen_to(monkeypatch):
    """cuDNN's place taken by one that is wrong, as only a GPU has the real one."""

    def attend(q, k, v, rule, *, backend, platform):
        return real(q, k, v, rule, backend="xla", platform="cpu") + (0.25 if backend == "cudnn" else 0) * q

    real = benchmark.group_attention
    monkeypatch.setattr(benchmark, "group_attention", attend)
    row = time_case(Case("0.5b", 32, 2, 8), "gpu", "bfloat16", 1e9, repeats=2, seconds=10)
    found = row["backends"]["cudnn"]
    q = benchmark._group(Case("0.5b", 32, 2, 8), "bfloat16")[0][0]
    assert found["difference"]["forward"] == pytest.approx(float(jnp.abs(q).max()) / 4, rel=0.02)
    assert found["difference"]["gradient"] > 0.1
    assert found["ratio"]["forward"] > 0


def test_a_backend_that_fails_is_told_and_the_rest_is_still_measured(monkeypatch, capsys):
    real = benchmark.backend_problem

    def attend(q, k, v, rule, *, backend, platform):
        if backend == "cudnn":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED:\nno memory")
        return kept(q, k, v, rule, backend="xla", platform="cpu")

    kept = benchmark.group_attention
    monkeypatch.setattr(benchmark, "group_attention", attend)
    monkeypatch.setattr(benchmark, "backend_problem", lambda name, platform, *rest: real(name, "gpu", *rest))
    with pytest.raises(CommandError, match="cudnn should serve here and failed, see above"):
        time_attention(replace(SMALL, dtype="bfloat16"))
    printed = capsys.readouterr().out
    assert "cudnn   FAILED: RESOURCE_EXHAUSTED: no memory" in printed
    assert "xla     forward" in printed


def test_a_case_stops_in_time_after_one_repeat_at_least():
    row = time_case(Case("0.5b", 32, 2, 8), "cpu", "float32", 1e9, repeats=1000, seconds=0.0)
    assert row["backends"]["xla"]["repeats"] == 1


@pytest.mark.parametrize("wrong", [{"models": ()}, {"prompts": (0,)}, {"repeats": 0}, {"responses": 0}])
def test_a_command_that_would_measure_nothing_is_refused(wrong):
    with pytest.raises(UsageError, match="--models must name some"):
        time_attention(replace(SMALL, **wrong))
