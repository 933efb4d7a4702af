"""What an arm of the study changes, and that it changes nothing else."""

from __future__ import annotations

import pytest
from small_world import ROOT

from mmrlhf_jax.objectives import MMDPO, MMDPOReleasedBatch, MMDPOReleasedFactor, ScalarReward
from mmrlhf_jax.training.recipe import Recipe, flatten, read_recipe

CONFIGS = ROOT / "configs"


def recipe(name: str) -> Recipe:
    return read_recipe(CONFIGS / f"{name}.py")


@pytest.mark.parametrize(
    ("arm", "base", "changed"),
    [
        ("dpo_pairs", "dpo", {"data.pairing": "pairs", "data.groups_per_step": 12}),
        ("known_margins", "mm_dpo", {"margins": "data"}),
        ("released_batch", "dpo", {"objective": "MMDPOReleasedBatch"}),
        ("released_factor", "mm_dpo", {"objective": "MMDPOReleasedFactor"}),
        ("scalar_reward", "critique_reward_tasks", {"objective": "ScalarReward", "reward.template": ""}),
    ],
)
def test_an_arm_differs_from_the_quickstarts_run_in_what_it_is_named_for(
    arm: str, base: str, changed: dict[str, object]
) -> None:
    ours, theirs = flatten(recipe(f"study/{arm}")), flatten(recipe(f"quickstart/{base}"))
    own = {name: value for name, value in ours.items() if not name.startswith("objective.")}
    differing = {name: value for name, value in own.items() if theirs.get(name) != value}
    assert differing == changed


def test_the_arms_take_as_many_steps_of_as_many_groups() -> None:
    runs = [recipe(f"quickstart/{name}") for name in ("sft_best", "dpo", "mm_dpo")]
    runs += [recipe(f"study/{name}") for name in ("known_margins", "released_batch", "released_factor")]
    assert len({(run.data.max_steps, run.data.groups_per_step, run.optimizer, run.compute) for run in runs}) == 1


def test_the_objectives_are_those_of_their_papers_and_code() -> None:
    published, factor, batch = (
        recipe(name).objective for name in ("quickstart/mm_dpo", "study/released_factor", "study/released_batch")
    )
    assert published == MMDPO(beta=0.1, w=0.5, k=0.5, gamma=0.25)
    assert factor == MMDPOReleasedFactor(beta=0.1, w=0.1, gamma=0.25)
    assert batch == MMDPOReleasedBatch(beta=0.1, w=0.1, gamma=0.25, selected=0.8)
    assert isinstance(recipe("study/scalar_reward").objective, ScalarReward)
