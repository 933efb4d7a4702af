"""The study's second part: every objective there is, from the same SFT run, on the same groups, for as many steps.

An arm is the quickstart's DPO run, a reward model the study's scalar one, under another objective: that of the registry
with its own defaults, or with what its paper ran where the registry keeps TRL's default for all (`PUBLISHED`). Those
that learn ratings of attributes are no members: the annotators of this world rank.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmrlhf_jax.objectives import (
    DPO,
    OBJECTIVES,
    AttributeObjective,
    CritiqueReward,
    Objective,
    RewardObjective,
    Supervised,
    VisitDPO,
)
from mmrlhf_jax.study.arms import CRITIQUE_REWARD, Arm, Part, Source
from mmrlhf_jax.study.arms import DPO as DPO_RECIPE
from mmrlhf_jax.study.figures import BEFORE

MARGINS = "scalar_reward"  # it learns from the same annotations, so no margin tells an arm what others cannot know
SCALAR_REWARD = "study/scalar_reward"
# Each from the paper itself or, marked T, as TRL's "paper index" cites it: huggingface/trl, docs/source/paper_index.md.
PUBLISHED: dict[str, dict[str, Any]] = {
    "sigmoid_norm": {"beta": 5.0},  # https://arxiv.org/abs/2411.15124: length-normalised DPO, its table of settings
    "hinge": {"beta": 0.05},  # T: gamma of hinge-norm in RSO, https://arxiv.org/abs/2309.06657
    "nca_pair": {"beta": 0.01},  # T: alpha, appendix C
    "robust": {"beta": 0.01},  # T: appendix B
    "bco_pair": {"beta": 0.01},  # T: appendix C
    "discopop": {"beta": 0.05},  # T: appendix B.1
    "sppo_hard": {"beta": 0.001},  # https://arxiv.org/abs/2405.00675: one over eta = 1000
}


def write_recipe(file: Path, base: Path, objective: Objective) -> Path:
    """A recipe that is `base` under another objective, each of its options spelled out; in one bucket where a step has
    to be one micro-batch, which changes how the same groups are laid out and not what is learned from them."""
    file.parent.mkdir(exist_ok=True)
    name = type(objective).__name__
    data = ", data=dataclasses.replace(base.data, max_buckets=1)" if objective.needs_step_statistics else ""
    layout = " in one bucket" if data else ""
    file.write_text(
        f'''"""Of launch/study.py --family: {base.stem}.py{layout} with the objective {name}; nothing else changes."""

import dataclasses

from mmrlhf_jax.objectives import {name}
from mmrlhf_jax.training.recipe import read_recipe

base = read_recipe({str(base)!r})
recipe = dataclasses.replace(base, objective={objective!r}{data})
'''
    )
    return file


def arm_name(objective: str) -> str:
    """An objective's name, but where a run has that name already: the SFT run that every arm starts from."""
    return "chosen_nll" if objective == BEFORE else objective


def _policies() -> dict[str, Arm]:
    found = {}
    for name, kind in OBJECTIVES.items():
        objective = kind(**PUBLISHED.get(name, {}))
        if not isinstance(objective, RewardObjective):
            margins = MARGINS if objective.needs_margin else None
            found[arm_name(name)] = Arm(_title(name, objective), DPO_RECIPE, margins, objective=objective)
    best, nll = ("--data.responses", "best"), DPO(gamma=0.25)
    return found | {
        "supervised_best": Arm("supervised, best answers only", DPO_RECIPE, flags=best, objective=Supervised()),
        "dpo_nll": Arm(_title("dpo", nll), DPO_RECIPE, objective=nll),
    }


def _rewards() -> dict[str, Source]:
    """The source of margins first, as others need it."""
    found = {}
    for name in (MARGINS, *(name for name in OBJECTIVES if name != MARGINS)):
        objective = OBJECTIVES[name]()
        if isinstance(objective, RewardObjective) and not isinstance(objective, AttributeObjective):
            writes = isinstance(objective, CritiqueReward)
            recipe = CRITIQUE_REWARD if writes else SCALAR_REWARD
            margins = MARGINS if objective.needs_margin else None
            found[name] = Source(name, name, recipe, "generated" if writes else "none", margins, objective)
    return found


def _title(name: str, objective: Objective) -> str:
    """Its name, with what is not the registry's default, and the weight of the preferred answers' NLL if any."""
    gamma = getattr(objective, "gamma", 0.0)
    named = {**PUBLISHED.get(name, {}), **({"gamma": gamma} if gamma else {})}
    mark = " (visits: †)" if isinstance(objective, VisitDPO) else ""
    return ", ".join([name, *(f"{option} {value:g}" for option, value in named.items())]) + mark


_REWARDS = _rewards()
FAMILY = Part(
    arms=_policies(),
    sources=_REWARDS,
    baselines={"policies": ("dpo",), "scores": (MARGINS,)},
    rewards=tuple(_REWARDS),
)
