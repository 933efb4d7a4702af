"""Who belongs to the family, what is changed for each, and what its table says."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_world import ROOT

from mmrlhf_jax.objectives import OBJECTIVES, AttributeObjective
from mmrlhf_jax.study.arms import Arm, Source, extra_forwards
from mmrlhf_jax.study.family import FAMILY, MARGINS, PUBLISHED, arm_name, write_recipe
from mmrlhf_jax.study.report import family_lines
from mmrlhf_jax.study.summary import summarise
from mmrlhf_jax.training.recipe import flatten, read_recipe

CONFIGS = ROOT / "configs"
MEMBERS: dict[str, Arm | Source] = {**FAMILY.arms, **FAMILY.sources}
RANKED = {name: kind for name, kind in OBJECTIVES.items() if not isinstance(kind(), AttributeObjective)}
"""Who learns from what the world's annotators give: ranks, not ratings."""


def test_every_objective_is_a_member_once_with_its_own_defaults_or_its_papers() -> None:
    assert set(MEMBERS) == {arm_name(name) for name in RANKED} | {"supervised_best", "dpo_nll"}
    assert OBJECTIVES.keys() - RANKED.keys() == {"multi_objective_reward", "quantile_reward"}
    assert not set(FAMILY.arms) & set(FAMILY.sources)
    for name, kind in RANKED.items():
        assert MEMBERS[arm_name(name)].objective == kind(**PUBLISHED.get(name, {}))
    for name, options in PUBLISHED.items():
        defaults = OBJECTIVES[name]()
        assert all(getattr(defaults, option) != value for option, value in options.items())
        assert all(f"{option} {value:g}" in MEMBERS[name].title for option, value in options.items())
    assert {name: arm.title for name, arm in FAMILY.arms.items() if "gamma" in arm.title} == {
        **{name: f"{name}, gamma 0.25" for name in ("mmdpo", "mmdpo_released_factor", "mmdpo_released_batch")},
        "mpo": "mpo, gamma 1",
        "dpo_nll": "dpo, gamma 0.25",
    }


@pytest.mark.parametrize("name", MEMBERS)
def test_a_members_recipe_differs_from_what_all_share_in_its_objective(name: str, tmp_path: Path) -> None:
    member = MEMBERS[name]
    base = CONFIGS / f"{member.recipe}.py"
    assert member.objective is not None
    recipe = read_recipe(write_recipe(tmp_path / "recipes" / f"{name}.py", base, member.objective))
    assert recipe.objective == member.objective
    ours, theirs = (flatten(one) for one in (recipe, read_recipe(base)))
    differing = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
    layout = {"data.max_buckets"} if member.objective.needs_step_statistics else set()
    assert {key for key in differing if not key.startswith("objective")} <= layout
    assert recipe.data.max_buckets == 1 or not layout


def test_policies_see_as_many_groups_as_each_other_and_so_do_reward_models() -> None:
    for members in (FAMILY.arms, FAMILY.sources):
        recipes = [read_recipe(CONFIGS / f"{member.recipe}.py") for member in members.values()]
        assert len({(one.data.groups_per_step, one.data.max_steps, one.optimizer) for one in recipes}) == 1


def test_margins_are_a_reward_models_that_is_trained_before_they_are_read() -> None:
    needing = {name for name, member in MEMBERS.items() if member.objective.needs_margin}
    assert {name for name, member in MEMBERS.items() if member.margins} == needing
    assert {MEMBERS[name].margins for name in needing} == {MARGINS}
    assert next(iter(FAMILY.sources)) == MARGINS
    assert list(FAMILY.sources_of(["mmdpo"])) == [MARGINS] == list(FAMILY.sources_of([MARGINS]))
    assert list(FAMILY.sources_of(["margin_reward", "dpo"])) == [MARGINS, "margin_reward"]
    assert FAMILY.margins_of(["dpo", MARGINS]) == set()


@pytest.mark.parametrize(
    ("name", "forwards"), [("chosen_nll", 0), ("dpo", 1), ("mmdpo", 2), ("tokenwise_reward", 0), ("margin_reward", 1)]
)
def test_the_forwards_an_objective_costs_beside_its_steps(name: str, forwards: int) -> None:
    member = MEMBERS[name]
    assert extra_forwards(member.objective, member.margins) == forwards


def policy(wrong: float, forwards: int | None) -> dict[str, object]:
    extra = {} if forwards is None else {"extra_forwards": forwards}
    return {"hallucination": {"all": wrong}, "length": 4.0, "answers": 20, "step": {"gigaflop": 4.0}, **extra}


def test_the_table_is_sorted_and_held_against_dpo() -> None:
    found = {
        seed: {
            "policies": {
                "sft": policy(0.5, None),
                "dpo": policy(0.2, 1),
                "ipo": policy(0.1 * seed, 1),
                "mmdpo": policy(0.3, 2),
            },
            "scores": {"longer": {"accuracy": 0.5}, "scalar_reward": {"accuracy": 0.8, "extra_forwards": 0}},
        }
        for seed in (1, 2)
    }
    lines = family_lines(
        summarise(found, FAMILY.baselines),
        {"sft": "SFT (before)", "mmdpo": "mmdpo", "dpo": "dpo", "ipo": "ipo"},
        {"longer": "longer", "scalar_reward": "scalar_reward"},
    )
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    assert [row[0] for row in rows] == [
        "", "SFT (before)", "ipo", "dpo", "mmdpo",
        "", "SFT (before)", "ipo", "mmdpo",
        "", "scalar_reward", "longer",
        "", "longer",
    ]  # fmt: skip
    assert rows[0][1:] == ["wrong claims", "claims", "GFLOP", "forwards", "seeds"]
    assert rows[1][1:] == ["50.0 ± 0.0", "4.00 ± 0.00", "4.0 ± 0.0", "-", "2"]
    assert rows[2][1] == "15.0 ± 63.5"
    assert rows[4][4] == "2 ± 0"
    assert [row[1] for row in rows[6:9]] == ["+30.0 ± 0.0*", "-5.0 ± 63.5", "+10.0 ± 0.0*"]
    assert rows[-1][1].startswith("-30.0")
