"""What a study compares: ways to learn from the annotations, and where their margins come from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmrlhf_jax.data.rewards import Critiques
from mmrlhf_jax.study.figures import BEFORE

if TYPE_CHECKING:
    from mmrlhf_jax.objectives import Objective


@dataclass(frozen=True)
class Source:
    """Where scores come from: a reward model, of a recipe under configs/ (its objective replaced by `objective`, where
    there is one), and the critiques they are read behind. `margins`: the source of those it is itself trained on."""

    title: str
    run: str
    recipe: str
    critiques: Critiques
    margins: str | None = None
    objective: Objective | None = None


@dataclass(frozen=True)
class Arm:
    """A way to learn from the annotations: a recipe under configs/ (its objective replaced by `objective`, where there
    is one), and flags it is run with. `margins` is the source of those it reads, where they are not in the data."""

    title: str
    recipe: str
    margins: str | None = None
    flags: tuple[object, ...] = ()
    objective: Objective | None = None


@dataclass(frozen=True)
class Part:
    """Arms that are compared, where their margins come from, and what each kind is held against. `rewards`: sources
    that are compared for their own sake, and can be asked for as arms can."""

    arms: Mapping[str, Arm]
    sources: Mapping[str, Source]
    baselines: Mapping[str, tuple[str, ...]]
    rewards: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """What can be asked for."""
        return (*self.rewards, *self.arms)

    def margins_of(self, names: Iterable[str]) -> set[str]:
        """The sources of margins that these arms and rewards need."""
        asked = set(names)
        found = [arm.margins for name, arm in self.arms.items() if name in asked]
        found += [self.sources[name].margins for name in self.rewards if name in asked]
        return {name for name in found if name is not None}

    def sources_of(self, names: Iterable[str]) -> dict[str, Source]:
        """Whose reward models are trained for these arms and rewards; each behind the source of its margins."""
        names = set(names)
        needed = self.margins_of(names) | (names & set(self.rewards))
        return {name: source for name, source in self.sources.items() if name in needed}


def extra_forwards(objective: Objective, margins: str | None) -> int:
    """Forwards of every answer before an objective trains: the reference's, and that of the reward model whose margins
    it reads."""
    return int(objective.needs_reference) + int(margins is not None)


SFT = "quickstart/sft_tasks"
CRITIQUE_REWARD = "quickstart/critique_reward_tasks"
DPO, MM_DPO = "quickstart/dpo", "quickstart/mm_dpo"
SOURCES = {
    "scalar": Source("scalar reward model", "scalar_reward", "study/scalar_reward", "none"),
    "generated": Source("critique model, its own critiques", "critique_reward", CRITIQUE_REWARD, "generated"),
    "human": Source("critique model, annotators' reasons", "critique_reward", CRITIQUE_REWARD, "human"),
}
ARMS = {  # each behind what it takes from another
    "sft_best": Arm("SFT on the best", "quickstart/sft_best"),
    "dpo": Arm("DPO", DPO),
    "dpo_pairs": Arm("DPO, pairs at equal compute", "study/dpo_pairs"),
    "mm_dpo": Arm("MM-DPO, published", MM_DPO, "generated"),
    "dpo_mean_beta": Arm("DPO at MM-DPO's mean beta", DPO),
    "released_factor": Arm("MM-DPO, released factor", "study/released_factor", "generated"),
    "released_batch": Arm("MM-DPO, released batch beta", "study/released_batch"),
    "known_margins": Arm("MM-DPO, true margins", "study/known_margins"),
    "scalar_margins": Arm("MM-DPO, scalar margins", MM_DPO, "scalar"),
    "human_margins": Arm("MM-DPO, margins behind reasons", MM_DPO, "human"),
}
W_AND_K = ((0.1, 0.5), (2.0, 0.5), (0.5, 0.1), (0.5, 2.0), (2.0, 2.0))  # beside the recipe's own .5 and .5
GRID = {
    f"mm_dpo_w{w:g}_k{k:g}": Arm(f"w {w:g}, k {k:g}", MM_DPO, "generated", ("--objective.w", w, "--objective.k", k))
    for w, k in W_AND_K
}
TITLES = {BEFORE: "SFT (before)", **{name: arm.title for name, arm in {**ARMS, **GRID}.items()}}
WITHOUT_MODEL = {"longer": "the longer answer", "annotators": "annotators' ranks"}
SCORE_TITLES = {**WITHOUT_MODEL, **{name: source.title for name, source in SOURCES.items()}}
HELD_AGAINST: tuple[str, ...] = ("dpo", "sft_best")  # and the grid against mm_dpo
BASELINES = {"policies": (*HELD_AGAINST, "mm_dpo"), "scores": ("scalar",)}
STUDY = Part(ARMS, SOURCES, BASELINES)
