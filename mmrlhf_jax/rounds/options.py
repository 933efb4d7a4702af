"""What a run of online rounds is asked to do, and what contradicts itself in it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mmrlhf_jax.command import UsageError
from mmrlhf_jax.inference.engine import DecodeConfig
from mmrlhf_jax.inference.sample import SamplingConfig
from mmrlhf_jax.nn.resharding import Layout
from mmrlhf_jax.objectives import RewardObjective, ScoreObjective, Supervised
from mmrlhf_jax.rounds import attributes, ranking, scoring
from mmrlhf_jax.training.recipe import Recipe

REWARD = "reward"  # the attribute of a reward model without a name


@dataclass(frozen=True)
class Options:
    """Of launch/rounds.py."""

    policy: str
    """where it starts: a Hugging Face directory, a hub id, or a RUN"""
    recipe: str
    """what each round trains: a file under configs/. Its dtype, mesh and rendering serve generation too"""
    output: str
    """directory of everything that is made; the same command again resumes"""
    reward: tuple[str, ...] = ()
    """reward models: a MODEL, or several as NAME=MODEL, each an attribute of every answer"""
    prompts: str | None = None
    """questions to train on, JSON lines as launch/generate.py reads them; or give --world"""
    held_out: str | None = None
    """questions to measure every round on, likewise"""
    media: str | None = None
    """root of all picture and video paths of both"""
    world: str | None = None
    """a world of digit boards, as the quickstart and the study write it"""
    rounds: int = 3
    prompts_per_round: int | None = None
    """each prompt is asked in one round; all are by default. Where it is given, --rounds may be raised later"""
    samples: int = 4
    """answers to each prompt"""
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(temperature=1.0))
    """held-out answers are greedy, of as many tokens; the seed is --seed's"""
    score: Literal["reward", "direction", "claims"] = "reward"
    direction: tuple[str, ...] = ()
    """direction, steer: NAME=WEIGHT of each attribute that counts, negative ones against; scaled to length 1"""
    attributes: str | None = None
    """a program of yours that knows attributes of answers, see above"""
    few_claims: float | None = None
    """claims: answers of up to so many claims are discounted by exp(1 - so many / claims); 10 by default, 0: none"""
    select: Literal["best_vs_worst", "all_pairs", "max_gap", "best", "steer"] = "best_vs_worst"
    min_gap: float = 0.0
    """of pairs: no preference where scores are closer than this"""
    reference: Literal["fixed", "moving"] | None = None
    """of a recipe that reads one; fixed by default"""
    critiques: Literal["generated", "none"] | None = None
    """what scores are read behind, as launch/annotate.py has it"""
    critique_samples: int = 1
    critique: SamplingConfig = field(default_factory=SamplingConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    layout: Layout = "whole"
    """where parameters lie while answers and critiques are decoded, as launch/generate.py has it"""
    steps: int | None = None
    """steps of each round; the recipe's by default"""
    seed: int = 0
    """of the shares of prompts, the answers and the order of the data"""


def check(options: Options, recipe: Recipe) -> None:
    """Raises UsageError for options that contradict each other or the recipe, or that nothing would read."""
    if (options.prompts is None) == (options.world is None):
        raise UsageError("give the questions as one of --prompts and --world")
    for name in ("held_out", "media"):
        if options.world is not None and getattr(options, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} is for --prompts: a world has its own")
    for name in ("rounds", "prompts_per_round", "samples", "critique_samples", "steps"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value} is not positive")
    if options.seed < 0:
        raise UsageError(f"--seed {options.seed} is negative")
    if options.sampling.temperature == 0:
        raise UsageError("greedy answers are all the same: set --sampling.temperature above 0")
    if options.sampling.seed or options.critique.seed:
        raise UsageError("the seeds of sampling are --seed and the round's number: set --seed")
    _check_scoring(options)
    _check_recipe(options, recipe)


def _check_scoring(options: Options) -> None:
    rewards, direction, steer = rewards_of(options), direction_of(options), options.select == "steer"
    if not rewards:
        bare = Options(options.policy, options.recipe, options.output)
        for name in ("critiques", "critique_samples", "critique"):
            if getattr(options, name) != getattr(bare, name):
                raise UsageError(f"--{name.replace('_', '-')} (or one of its fields) is for --reward")
    if options.score == "reward" and len(rewards) != 1:
        raise UsageError(f"--score reward reads one --reward, {len(rewards)} are given: see --score direction")
    if options.score == "direction" and not direction:
        raise UsageError("--score direction needs --direction NAME=WEIGHT ...")
    if direction and options.score != "direction" and not steer:
        raise UsageError("--direction is for --score direction and --select steer")
    if steer and not direction:
        raise UsageError("--select steer needs --direction NAME=WEIGHT ...: the attributes that prompts speak of")
    if steer and (idle := [name for name, weight in direction.items() if weight == 0]):
        raise UsageError(f"--direction {idle[0]}=0: a prompt cannot ask for what counts neither way; leave it out")
    known = {*rewards, *(attributes.OF_WORLD if options.world else ())}
    read = {*direction} | ({scoring.SUPPORTED, scoring.CLAIMS} if options.score == "claims" else set())
    if options.attributes is None and (missing := sorted(read - known)):
        raise UsageError(
            f"nothing gives {', '.join(missing)}; there is {', '.join(sorted(known)) or 'nothing'}: add a --reward "
            "NAME=MODEL, a --world, or --attributes PROGRAM.py"
        )
    if options.attributes is not None and not read:
        raise UsageError("--attributes is for --score direction, --score claims and --select steer")
    if unread := sorted(set(rewards) - read - ({*rewards} if options.score == "reward" else set())):
        raise UsageError(f"--reward {', '.join(unread)} is scored and nothing reads it: name it in --direction")
    if (program := options.attributes) is not None and not (program.endswith(".py") and Path(program).is_file()):
        raise UsageError(f"--attributes {program}: no such .py file")
    few = options.few_claims
    if few is not None and (options.score != "claims" or not 0 <= few < math.inf):
        raise UsageError("--few-claims is for --score claims, finite and not negative")


def _check_recipe(options: Options, recipe: Recipe) -> None:
    objective, name = recipe.objective, type(recipe.objective).__name__
    if isinstance(objective, RewardObjective | ScoreObjective):
        raise UsageError(f"{options.recipe} trains a reward model ({name}); rounds train a policy")
    pairs = options.select in ranking.RULES
    if isinstance(objective, Supervised) == pairs:
        raise UsageError(
            f"--select {options.select} gives {'pairs' if pairs else 'answers'}, which {name} of {options.recipe} "
            f"does not train on: choose {'best or steer' if pairs else ', '.join(ranking.RULES)}, or another recipe"
        )
    if not pairs and options.min_gap:
        raise UsageError(f"--min-gap is for pairs, --select {options.select} makes none")
    if not 0 <= options.min_gap < math.inf:
        raise UsageError(f"--min-gap {options.min_gap} is no finite number from 0 on")
    if pairs and options.samples < 2:
        raise UsageError(f"--select {options.select} compares answers to a prompt: --samples must be at least 2")
    if recipe.margins != "data":
        raise UsageError(f"{options.recipe} has margins {recipe.margins!r}; in rounds they are the scores', 'data'")
    if options.reference is not None and not objective.needs_reference:
        raise UsageError(f"--reference: {name} of {options.recipe} reads none")
    if recipe.reference_model:
        raise UsageError(f"{options.recipe} names a reference_model: --reference does")
    if recipe.reference == "lora_off" and options.reference != "moving":
        raise UsageError("reference lora_off is what the adapters are on, the last round's policy: --reference moving")
    if recipe.model or recipe.dataset:
        raise UsageError(f"{options.recipe} names a model or a dataset: rounds choose them")


def rewards_of(options: Options) -> dict[str, str]:
    """Reward models by the attribute each is."""
    found: dict[str, str] = {}
    for each in options.reward:
        name, separator, model = each.partition("=")
        name, model = (name, model) if separator else (REWARD, each)
        if not name or not model or name in found:
            raise UsageError(f"--reward {' '.join(options.reward)}: one MODEL, or NAME=MODEL with a name of its own")
        found[name] = model
    return found


def direction_of(options: Options) -> dict[str, float]:
    """Weights by attribute, of length 1; empty where none is given."""
    found: dict[str, float] = {}
    for each in options.direction:
        name, _, weight = each.partition("=")
        try:
            value = float(weight)
        except ValueError:
            raise UsageError(f"--direction {each}: write NAME=WEIGHT") from None
        if not name or name in found:
            raise UsageError(f"--direction {' '.join(options.direction)}: write NAME=WEIGHT, each name once")
        found[name] = value
    try:
        return scoring.unit(found) if found else {}
    except ValueError as error:
        raise UsageError(f"--direction: {error}") from None
