"""An option that contradicts another, or that nothing would read, is an error."""

import dataclasses
import math

import pytest
from small_world import ROOT

from mmrlhf_jax.command import UsageError
from mmrlhf_jax.inference.sample import SamplingConfig
from mmrlhf_jax.objectives import CritiqueReward
from mmrlhf_jax.rounds.options import Options, check, direction_of, rewards_of
from mmrlhf_jax.training.recipe import read_recipe

PAIRS = read_recipe(ROOT / "configs" / "rounds" / "mm_dpo.py")
BEST = read_recipe(ROOT / "configs" / "rounds" / "best.py")
GOOD = Options("sft", "r.py", "out", reward=("rm",), world="world")


def test_what_the_recipes_say_is_taken():
    check(GOOD, PAIRS)
    check(dataclasses.replace(GOOD, select="best"), BEST)
    check(dataclasses.replace(GOOD, reward=(), score="claims", few_claims=0.0, reference="moving"), PAIRS)
    several = dataclasses.replace(
        GOOD, reward=("a=A", "b=B"), score="direction", direction=("a=1", "b=-0.5", "wrong=-1")
    )
    check(several, PAIRS)
    assert rewards_of(several) == {"a": "A", "b": "B"}
    assert sum(weight**2 for weight in direction_of(several).values()) == pytest.approx(1)
    check(dataclasses.replace(GOOD, reward=(), score="claims", select="steer", direction=("wrong=-1",)), BEST)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"prompts": "p.jsonl"}, "one of --prompts and --world"),
        ({"world": None}, "one of --prompts and --world"),
        ({"media": "m"}, "--media is for --prompts"),
        ({"held_out": "h"}, "--held-out is for --prompts"),
        ({"rounds": 0}, "--rounds 0 is not positive"),
        ({"sampling": SamplingConfig()}, "greedy answers are all the same"),
        ({"sampling": SamplingConfig(temperature=1, seed=3)}, "set --seed"),
        ({"reward": ()}, "--score reward reads one --reward, 0 are given"),
        ({"reward": ("a=A", "b=B")}, "--score reward reads one --reward, 2 are given"),
        ({"reward": ("a=A", "a=B")}, "with a name of its own"),
        ({"reward": (), "score": "claims", "critiques": "none"}, "--critiques .* is for --reward"),
        ({"score": "claims"}, "--reward reward is scored and nothing reads it"),
        ({"score": "direction"}, "needs --direction"),
        ({"direction": ("wrong=-1",)}, "--direction is for --score direction and --select steer"),
        ({"reward": (), "score": "direction", "direction": ("polite=1",)}, "nothing gives polite"),
        ({"reward": (), "score": "direction", "direction": ("wrong",)}, "write NAME=WEIGHT"),
        ({"reward": (), "score": "direction", "direction": ("wrong=0",)}, "finite weight other than 0"),
        ({"select": "steer", "direction": ("wrong=-1", "claims=0")}, "claims=0: a prompt cannot ask for what counts"),
        ({"attributes": "p.py"}, "--attributes is for --score direction"),
        ({"few_claims": 3.0}, "--few-claims is for --score claims"),
        ({"min_gap": -1.0}, "--min-gap -1.0 is no finite number from 0 on"),
        ({"min_gap": math.nan}, "--min-gap nan is no finite number"),
        ({"samples": 1}, "--samples must be at least 2"),
        ({"seed": -2}, "--seed -2 is negative"),
        ({"reward": (), "score": "claims", "few_claims": math.nan}, "--few-claims is for --score claims, finite"),
        ({"select": "best"}, "--select best gives answers, which MMDPO of r.py does not train on"),
    ],
)  # fmt: skip
def test_contradictions(changed, said):
    with pytest.raises(UsageError, match=said):
        check(dataclasses.replace(GOOD, **changed), PAIRS)


@pytest.mark.parametrize(
    ("recipe", "changed", "said"),
    [
        (BEST, {}, "--select best_vs_worst gives pairs, which Supervised of r.py does not train on"),
        (BEST, {"select": "best", "min_gap": 1.0}, "--min-gap is for pairs"),
        (BEST, {"select": "best", "reference": "fixed"}, "Supervised of r.py reads none"),
        (dataclasses.replace(BEST, objective=CritiqueReward()), {}, "trains a reward model"),
        (dataclasses.replace(PAIRS, margins="reward"), {}, "in rounds they are the scores'"),
        (dataclasses.replace(PAIRS, reference_model="m"), {}, "--reference does"),
        (dataclasses.replace(PAIRS, model="m"), {}, "rounds choose them"),
        (dataclasses.replace(PAIRS, reference="lora_off", lora=dataclasses.replace(PAIRS.lora, rank=4)), {},
         "--reference moving"),
    ],
)  # fmt: skip
def test_recipes_that_do_not_fit(recipe, changed, said):
    with pytest.raises(UsageError, match=said):
        check(dataclasses.replace(GOOD, **changed), recipe)
