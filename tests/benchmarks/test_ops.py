"""The step by part: the parts are the model's, every one is timed, and the table's figures belong together."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import TINY

from mmrlhf_jax.benchmarks import ops
from mmrlhf_jax.benchmarks.models import write_models
from mmrlhf_jax.benchmarks.our_side import OurSide
from mmrlhf_jax.benchmarks.sides import Settings
from mmrlhf_jax.benchmarks.workload import ranked_case
from mmrlhf_jax.models.llava_onevision.cost import group_flops
from mmrlhf_jax.models.llava_onevision.model import embed, logps_of
from mmrlhf_jax.nn.attention import GroupRule, group_attention
from mmrlhf_jax.training.recipe import ComputeConfig
from mmrlhf_jax.training.state import combine

CASE = ranked_case(3, 100, 20, (100, 60), TINY)
PARTS = ["tower", "projector and taps", "prompt, linear", "prompt, attention", "responses, attention",
         "responses, linear", "log-probs"]  # fmt: skip


def side(directory, *, rank: int = 0, as_pairs: bool = False) -> OurSide:
    directory.mkdir()
    compute = ComputeConfig(dtype="float32", remat="none")
    made = OurSide(Settings(write_models(TINY, directory, "float32", rank), rank, compute, 0.1, 1), as_pairs=as_pairs)
    made.prepare(CASE, CASE.pairs)
    made.make_batches()
    return made


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    return side(tmp_path_factory.mktemp("models") / "full")


def test_every_part_of_the_step_is_timed_both_ways_where_gradients_pass_it(ours):
    rows = ours.parts(1)
    assert [row["part"] for row in rows] == [*PARTS, "reference, forward"]
    assert all(row["seconds"]["forward"] > 0 for row in rows)
    assert [row["part"] for row in rows if row["seconds"]["both"] is None] == ["tower", "reference, forward"]
    useful = group_flops(TINY, CASE.shape(TINY)).total
    assert sum(ops._counted(row, "flops") for row in rows[:-1]) == pytest.approx(useful)


def test_the_parts_compute_what_the_model_does(ours):
    (batch,) = ours._batches
    policy = combine(ours._trainable, ours._frozen)
    with jax.set_mesh(ours._mesh):
        programs = ops._programs(policy, TINY, ours._compute, batch)
        features = programs["tower"].run(policy, (), batch)
        inputs = programs["projector and taps"].run(policy, (), (features, batch))
        wanted = embed(policy, TINY, batch, ours._compute)
        np.testing.assert_allclose(inputs, wanted, rtol=1e-5, atol=1e-5)
        logps = programs["log-probs"].run(policy, (inputs,), batch)
        np.testing.assert_allclose(logps, logps_of(policy, wanted, batch, ours._compute).logp, rtol=1e-4, atol=1e-4)


def test_both_attentions_together_are_the_group_s(ours):
    (batch,) = ours._batches
    policy, one_layer = (
        combine(ours._trainable, ours._frozen),
        dataclasses.replace(TINY, decoder=dataclasses.replace(TINY.decoder, layers=1)),
    )
    p = batch.tap_index.shape[1]
    with jax.set_mesh(ours._mesh):
        programs = ops._programs(policy, one_layer, ours._compute, batch)
        prompt, answers = (programs[name] for name in ("prompt, attention", "responses, attention"))
        q, (_, k, v) = jnp.concatenate([prompt.moving[0], answers.moving[0]], axis=1), answers.moving
        rule = GroupRule(batch.position, batch.branch, batch.prompt_length, prompt=p)
        wanted = group_attention(q, k, v, rule, backend="xla", platform="cpu")
        found = [program.run(policy, program.moving, program.fixed) for program in (prompt, answers)]
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), wanted, rtol=1e-5, atol=1e-5)


def test_a_part_has_only_the_parameters_it_multiplies_with(ours):
    kept = ops._only(ours._trainable, ("decoder.layers.",))
    assert len(jax.tree.leaves(kept)) == len(jax.tree.leaves(ours._trainable.decoder.layers))


def test_under_lora_group_and_pairs_agree_and_the_adapters_matter(tmp_path):
    group, pairs = (side(tmp_path / form, rank=2, as_pairs=form == "pairs") for form in ("group", "pairs"))
    _, loss, norm = group.step()
    _, other_loss, other_norm = pairs.step()
    assert loss == pytest.approx(other_loss, rel=1e-5)
    assert norm == pytest.approx(other_norm, rel=1e-4)
    assert abs(loss - np.log(2)) > 1e-3
    assert len(jax.tree.leaves(group._trainable)) == 2 * 9  # seven kernels of the decoder, two of the projector
    policy = combine(group._trainable, group._frozen)
    cost = ops.part_costs(TINY, group._shape, group._compute, policy, group._trainable, group._reference)
    assert cost["prompt, linear"].both.flops == 2 * cost["prompt, linear"].forward.flops  # the base has no gradients


def test_the_roofline_is_the_slower_of_both_streams():
    row = {
        "part": "log-probs",
        "flops": {"forward": 100.0, "both": 300.0},
        "bytes": {"forward": 40.0, "both": 20.0},
        "seconds": {"forward": 6.0, "both": 8.0},
    }
    tower = {**row, "part": "tower", "seconds": {"forward": 4.0, "both": None}}
    rows = ops.with_bounds([row, tower], step=20.0, peak=50.0, bandwidth=10.0)
    assert rows[0]["roofline"] == {"forward": 4.0, "both": 6.0}
    assert rows[0]["bound"] == {"forward": "memory", "both": "compute"}
    assert [r["share"] for r in rows] == [0.4, 0.2, pytest.approx(0.6), 1.0]
    total = rows[2]
    assert (total["part"], total["flops"], total["bytes"], total["seconds"], total["roofline"]) == (
        "sum of the parts", 400.0, 60.0, 12.0, 10.0
    )  # fmt: skip
    lines = ops.table(rows)
    assert len(lines) == 6
    assert "compute 6,000.0 ms" in lines[2]
    assert "40%" in lines[2]
    assert "40%" not in lines[1]
    assert "the step itself" in lines[-1]
