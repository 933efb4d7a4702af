"""Do margins help, do critiques, do groups? The quickstart's world over several seeds, every way to learn from its
annotations side by side, with the uncertainty of each figure and of each difference.

    python launch/study.py --output runs/study

Needs `pip install 'mmrlhf-jax[quickstart]'`; downloads nothing. For each seed a world, a model, its SFT run and the
reward models; then, each from that SFT run, for as many optimizer steps and on the same groups:

    sft_best         SFT on the best answers
    dpo              DPO: every pair has the same beta
    dpo_pairs        DPO, a step being as many single pairs, two full sequences each, as cost what its groups cost
    mm_dpo           MM-DPO as published, on the margins of the critique reward model
    dpo_mean_beta    DPO at the mean beta of that MM-DPO run: as much beta, the same for every pair
    released_factor  MM-DPO as the released per-pair path has it: beta linear in that margin
    released_batch   MM-DPO as the released trainer really runs: one beta a batch, from its own log-ratios
    known_margins    MM-DPO on true margins: the annotators' pairs, each with the margin that is true
    scalar_margins   MM-DPO on the margins of a scalar reward model
    human_margins    MM-DPO on margins of the critique model reading the annotators' reasons, not critiques of its own

and MM-DPO at other w and k (--grid-seeds). Held-out answers are counted against what is true. Figures are means over
seeds with the 95 % interval of Student's t; differences are paired by seed, as seeds differ more than arms. At the end
OUTPUT/table.md, which is printed, and OUTPUT/results.json; of each seed OUTPUT/seed_N/results.json.

    python launch/study.py --family --output runs/family

is the second part, with an --output of its own: every objective that launch/train.py --list-objectives prints, as the
quickstart's DPO run with that objective in place of its own, and SFT on the best answers, held against DPO; and every
reward objective, by the held-out pairs that it ranks right. Margins are those of a scalar reward model. Options are the
defaults that --list-objectives shows, or the papers' where those are far off. The table is sorted by wrong claims.

Steps and rates were chosen on seed 0, which is therefore not among the seeds by default, and are the same for all arms:
none was tuned for itself. Every stage is a program a user calls, printed before it runs: into seed_N/log.txt where
seeds run side by side. It runs on the CPU unless JAX_PLATFORMS says otherwise. The same command again resumes, with
more seeds or arms too; finished stages are not run again. Exit codes: 0 done, 1 failed, 2 bad usage, 75 interrupted.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import tyro
from tqdm import tqdm

from mmrlhf_jax.command import UsageError, run_command
from mmrlhf_jax.data.annotations import find
from mmrlhf_jax.data.digit_boards.world import MAPPING, SPLITS, WorldConfig, write_world
from mmrlhf_jax.data.rewards import REWARD
from mmrlhf_jax.lease import beside, held_by_parent
from mmrlhf_jax.quickstart import (
    MULTIPLE,
    annotate_logps,
    model_of_world,
)
from mmrlhf_jax.stages import Stages, claimed, stop_on_sigterm, worked_on
from mmrlhf_jax.storage import to_path, write_whole
from mmrlhf_jax.study.arms import (
    ARMS,
    GRID,
    HELD_AGAINST,
    SCORE_TITLES,
    SFT,
    STUDY,
    TITLES,
    WITHOUT_MODEL,
    Arm,
    Part,
    Source,
    extra_forwards,
)
from mmrlhf_jax.study.at_once import Job, run_at_once
from mmrlhf_jax.study.figures import BEFORE, policy_figures, score_figures, scores_without_model, step_figures
from mmrlhf_jax.study.report import family_lines, lines_of
from mmrlhf_jax.study.summary import Summary, summarise

LAUNCH = Path(__file__).resolve().parent
CONFIGS = LAUNCH.parent / "configs"
MOST_TOKENS = 24  # of an answer or a critique; the longest right ones have 14 and 17


@dataclass(frozen=True)
class Arguments:
    """Every way to learn from the annotations of the quickstart's world, side by side over several seeds."""

    output: str = "runs/study"
    """directory of everything that is made, a directory a seed; the same command again resumes"""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)  # seed 0 is where the recipes' steps and rates were chosen
    """of the world, the model's weights and the order of the data: everything is done anew for each"""
    family: bool = False
    """instead: every objective side by side, see above"""
    arms: tuple[str, ...] | None = None
    """what to compare, see above, all by default; with --family its rows: objectives as --list-objectives names them,
    without those that need rated answers; a name it does not know is answered with all it does. Reward models that none
    of them needs are not trained"""
    at_once: int = 2
    """so many seeds run side by side: one can use little more than one core. Each takes about 1 GiB of memory"""
    grid_seeds: int = 5
    """so many of the seeds, the first, also run MM-DPO at other w and k, where mm_dpo is among the arms"""
    boards: int = 1000
    """boards to train on, three questions each, and a quarter as many clips with two"""
    held_out_boards: int = 120
    """boards of other digits to evaluate on, and clips, likewise"""
    sft_steps: int | None = None
    """steps of supervised fine-tuning; the recipe's by default"""
    reward_steps: int | None = None
    """steps of each reward model; the recipes' by default"""
    preference_steps: int | None = None
    """steps of every arm; the recipes' by default"""

    def __post_init__(self) -> None:
        for name in ("boards", "held_out_boards", "sft_steps", "reward_steps", "preference_steps"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} {value} is not positive")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise UsageError("--seeds needs at least one seed, none negative and each once")
        names, known = self.names, self.part.names
        if not names or len(set(names)) < len(names) or not set(names) <= set(known):
            raise UsageError(f"--arms {' '.join(names)}: name some of {', '.join(known)}, each once")
        if "dpo_mean_beta" in names and "mm_dpo" not in names:
            raise UsageError("--arms dpo_mean_beta needs mm_dpo, whose mean beta it takes")
        if self.at_once < 1:
            raise UsageError(f"--at-once {self.at_once} is not positive")
        if self.grid_seeds < 0:
            raise UsageError(f"--grid-seeds {self.grid_seeds} is negative")

    @property
    def part(self) -> Part:
        """Of the study."""
        if not self.family:
            return STUDY
        from mmrlhf_jax.study.family import FAMILY  # knows objectives, hence jax, which the first part does without

        return FAMILY

    @property
    def names(self) -> tuple[str, ...]:
        """Of what is compared: arms, and rewards."""
        return self.part.names if self.arms is None else self.arms

    @property
    def sources(self) -> dict[str, Source]:
        """Of the margins that the arms need, and the rewards that are compared themselves."""
        return self.part.sources_of(self.names)

    @property
    def margins(self) -> set[str]:
        """The sources whose scores of the training answers are read."""
        return self.part.margins_of(self.names)

    @property
    def policies(self) -> dict[str, Arm]:
        """The arms, in an order in which each finds what it takes from another."""
        return {name: arm for name, arm in self.part.arms.items() if name in self.names}

    @property
    def of_grid(self) -> tuple[int, ...]:
        """The seeds of the grid of w and k."""
        return self.seeds[: self.grid_seeds] if "mm_dpo" in self.names else ()


def main() -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    stop_on_sigterm()
    arguments = tyro.cli(Arguments, prog="study.py", description=__doc__)
    output = Path(arguments.output)
    free = ("output", "seeds", "family", "arms", "grid_seeds", "at_once")
    options = {k: v for k, v in dataclasses.asdict(arguments).items() if k not in free}
    with claimed(output, "family" if arguments.family else "study", options):
        _run(output, arguments, options)


def _run(output: Path, arguments: Arguments, options: Mapping[str, Any]) -> None:
    """Every seed, and the table of them."""
    print("\n".join(_budget(arguments)), flush=True)
    if min(arguments.at_once, len(arguments.seeds)) > 1:
        _side_by_side(arguments)
    for seed in arguments.seeds:  # whatever is not done yet
        print(f"seed {seed}", flush=True)
        with worked_on(output / f"seed_{seed}"):  # the lease of the whole is not held by a seed that outlives it
            _one_seed(Stages(output / f"seed_{seed}", LAUNCH), seed, arguments)
    if held_by_parent(beside(output)):  # one seed of a study that runs several side by side, and writes the table
        return
    found = {seed: _results(output / f"seed_{seed}", seed, arguments) for seed in arguments.seeds}
    summary = summarise(found, arguments.part.baselines)
    stated = {"options": options, "seeds": found, "summary": summary.as_json()}
    write_whole(to_path(output / "results.json"), (json.dumps(stated, indent=1) + "\n").encode())
    lines = _lines(summary, arguments)
    write_whole(to_path(output / "table.md"), ("\n".join(lines) + "\n").encode())
    taken = [f"{_minutes(output, seed):.1f}" for seed in arguments.seeds]
    print("\n".join(["", *lines, "", f"minutes of each seed: {' '.join(taken)}; this table: {output / 'table.md'}"]))


def _budget(arguments: Arguments) -> list[str]:
    """How much will run, whether or not some of it has."""
    models = len({source.run for source in arguments.sources.values()})
    seeds, arms, grid = len(arguments.seeds), len(arguments.policies), len(arguments.of_grid)
    trained = seeds * (1 + models + arms) + grid * len(GRID)
    return [
        f"{seeds} seeds, each an SFT run, {models} reward models, {arms} arms; {grid} also {len(GRID)} other w and k:",
        f"{trained} runs of train.py, {sum(_stages(arguments, seed) for seed in arguments.seeds)} stages in all",
    ]


def _stages(arguments: Arguments, seed: int) -> int:
    """How many stages a seed has."""
    policies, sources, margins = len(_arms(arguments, seed)), len(arguments.sources), len(arguments.margins)
    models = len({source.run for source in arguments.sources.values()})
    # world, model, two data sets, SFT and three stages to measure it, reference; scores of one split or both, measured;
    # arms
    return 9 + models + 2 * sources + margins + 4 * policies + ("dpo_pairs" in arguments.names)


def _side_by_side(arguments: Arguments) -> None:
    """Every seed that is not done, by this program in processes of its own, which need nothing of each other."""
    output = Path(arguments.output)
    stages = {seed: _stages(arguments, seed) for seed in arguments.seeds}
    done = {seed: _done(output, seed) for seed in arguments.seeds}
    jobs = [
        Job(f"seed {seed}", _alone(arguments, seed), output / f"seed_{seed}" / "log.txt")
        for seed in arguments.seeds
        if done[seed] < stages[seed]
    ]
    if not jobs:
        return
    print("\n".join(f"{job.name}: {job.log}" for job in jobs), flush=True)
    with tqdm(total=sum(stages.values()), initial=sum(done.values()), unit="stage") as bar:
        run_at_once(jobs, arguments.at_once, lambda: _show(bar, output, arguments.seeds))


def _show(bar: tqdm[NoReturn], output: Path, seeds: Iterable[int]) -> None:
    bar.update(sum(_done(output, seed) for seed in seeds) - bar.n)


def _done(output: Path, seed: int) -> int:
    """Stages of a seed that have run; more than were asked for where it also ran other arms."""
    return len(list((output / f"seed_{seed}" / "stages").glob("*.json")))


def _alone(arguments: Arguments, seed: int) -> list[str]:
    """The command for one seed."""
    flags: dict[str, object] = {
        "output": arguments.output, "seeds": seed, "at-once": 1, "grid-seeds": int(seed in arguments.of_grid),
        "boards": arguments.boards, "held-out-boards": arguments.held_out_boards, "sft-steps": arguments.sft_steps,
        "reward-steps": arguments.reward_steps, "preference-steps": arguments.preference_steps,
    }  # fmt: skip
    words = [str(word) for name, value in flags.items() if value is not None for word in (f"--{name}", value)]
    part = ["--family"] if arguments.family else []
    return [sys.executable, str(Path(__file__)), *words, *part, "--arms", *arguments.names]


def _minutes(output: Path, seed: int) -> float:
    """What the stages of a seed took, whenever they ran."""
    return sum(taken["seconds"] for taken in Stages(output / f"seed_{seed}", LAUNCH).taken().values()) / 60


def _one_seed(stages: Stages, seed: int, arguments: Arguments) -> None:
    stages.output.mkdir(exist_ok=True)
    _prepare(stages, seed, arguments)
    for name, arm in _arms(arguments, seed).items():
        _run_arm(stages, name, arm, seed, arguments)


def _arms(arguments: Arguments, seed: int) -> dict[str, Arm]:
    """Of a seed, in an order in which each finds what it takes from another."""
    return arguments.policies | (GRID if seed in arguments.of_grid else {})


def _prepare(stages: Stages, seed: int, arguments: Arguments) -> None:
    """Everything the arms of a seed share: world, data, SFT run, reference log-probs, scores; and SFT measured."""
    output, world, data = stages.output, stages.output / "world", stages.output / "data"
    config = WorldConfig(arguments.boards, arguments.held_out_boards, seed=seed)
    stages.call("world", world, lambda: write_world(world, config))
    stages.call(
        "model",
        output / "model",
        lambda: model_of_world(
            output / "model", world, CONFIGS / "quickstart" / "critique_template.txt", config.side, seed, heads=4
        ),
    )
    for split in SPLITS:
        stages.program(
            f"prepare_{split}", data / split, "prepare", "--source", "mapped",
            "--input", world / f"{split}.jsonl", "--media", world / "media", "--map", *MAPPING,
            "--model", output / "model", "--output", data / split,
        )  # fmt: skip
    _train(stages, BEFORE, _recipe(SFT), output / "model", arguments.sft_steps, seed)
    for name, source in arguments.sources.items():
        _run_source(stages, name, source, seed, arguments)
    annotate_logps(stages, "train", BEFORE)
    _measure_policy(stages, BEFORE)


def _recipe(name: str) -> Path:
    return CONFIGS / f"{name}.py"


def _recipe_of(stages: Stages, name: str, of: Arm | Source) -> Path:
    """Its recipe; under an objective of its own, written beside what the seed makes."""
    if of.objective is None:
        return _recipe(of.recipe)
    from mmrlhf_jax.study.family import write_recipe

    return write_recipe(stages.output / "recipes" / f"{name}.py", _recipe(of.recipe), of.objective)


def _run_source(stages: Stages, name: str, source: Source, seed: int, arguments: Arguments) -> None:
    """Its reward model, unless another source has trained it, and its scores: on train those that are margins of
    others, on held_out to measure."""
    output, sources = stages.output, arguments.sources
    if name == next(other for other, one in sources.items() if one.run == source.run):
        recipe = _recipe_of(stages, name, source)
        margins = _margins(output, sources, source.margins)
        _train(stages, source.run, recipe, output / BEFORE, arguments.reward_steps, seed, margins)
    for split in SPLITS:
        if split != "train" or name in arguments.margins:
            _annotate_rewards(stages, name, source, split)
    file = output / "scores" / f"{name}.json"
    figures = partial(score_figures, output, source.run, source.critiques)
    stages.call(f"measure_scores_{name}", file, partial(_write, file, figures))


def _train(
    stages: Stages, run: str, recipe: Path, model: Path, steps: int | None, seed: int, flags: Iterable[object] = ()
) -> None:
    directory = stages.output / run
    stages.program(
        run, directory / "complete.json", "train", recipe, "--model", model,
        "--dataset", stages.output / "data" / "train", "--output", directory, "--seed", seed,
        *(() if steps is None else ("--data.max-steps", steps)), *flags,
    )  # fmt: skip


def _annotate_rewards(stages: Stages, name: str, source: Source, split: str) -> None:
    """Scores of every answer."""
    data = stages.output / "data" / split
    flags = ("--max-new-tokens", MOST_TOKENS, "--decode.multiple", MULTIPLE, "--decode.max-buckets", 1)
    stages.program(
        f"scores_{split}_{name}", data / "annotations", "annotate", "--dataset", data,
        "--model", stages.output / source.run, "--with", "reward", "--critiques", source.critiques,
        "--dtype", "float32", "--multiple", MULTIPLE, "--max-buckets", 1,
        *(flags if source.critiques == "generated" else ()),
    )  # fmt: skip


def _run_arm(stages: Stages, name: str, arm: Arm, seed: int, arguments: Arguments) -> None:
    flags = [*arm.flags, *_margins(stages.output, arguments.part.sources, arm.margins)]
    if name == "dpo_pairs":
        flags += ["--data.groups-per-step", _pairs_per_step(stages)]
    if name == "dpo_mean_beta":
        flags += ["--objective.beta", f"{step_figures(stages.output / 'mm_dpo')['beta']:.5f}"]
    recipe = _recipe_of(stages, name, arm)
    _train(stages, name, recipe, stages.output / BEFORE, arguments.preference_steps, seed, flags)
    _measure_policy(stages, name)


def _margins(output: Path, sources: Mapping[str, Source], name: str | None) -> list[str]:
    """The flags that name a source's scores beside the training data: no two of them are behind the same critiques."""
    if name is None:
        return []
    (store,) = [s for s in find(output / "data" / "train", REWARD) if s.key["critiques"] == sources[name].critiques]
    return ["--margins", store.directory.name]


def _pairs_per_step(stages: Stages) -> int:
    """That cost what the groups of a step of DPO do."""
    file = stages.output / "pairs_per_step.json"

    def count() -> None:
        from mmrlhf_jax.study.cost import pairs_of_equal_cost
        from mmrlhf_jax.training.recipe import read_recipe

        groups, pairs = (read_recipe(_recipe(ARMS[name].recipe)) for name in ("dpo", "dpo_pairs"))
        data = stages.output / "data" / "train"
        file.write_text(json.dumps(pairs_of_equal_cost(groups, pairs, stages.output / BEFORE, data)) + "\n")

    stages.call("pairs_per_step", file, count)
    return int(json.loads(file.read_text()))


def _measure_policy(stages: Stages, policy: str) -> None:
    """Its log-probs of the held-out answers, its own answers, and what is counted of both."""
    output, answers = stages.output, _answers(stages.output, policy)
    annotate_logps(stages, "held_out", policy)
    stages.program(
        f"answers_{policy}", answers, "generate", "--model", output / policy,
        "--dataset", output / "data" / "held_out", "--output", answers, "--dtype", "float32",
        "--max-new-tokens", MOST_TOKENS, "--decode.multiple", MULTIPLE, "--decode.max-buckets", 1,
    )  # fmt: skip
    file = output / "measured" / f"{policy}.json"
    stages.call(f"measure_{policy}", file, partial(_write, file, partial(policy_figures, output, policy, answers)))


def _answers(output: Path, policy: str) -> Path:
    return output / "answers" / f"{policy}.jsonl"


def _write(file: Path, figures: Callable[[], dict[str, Any]]) -> None:
    found = figures()
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(found, indent=1) + "\n")


def _results(output: Path, seed: int, arguments: Arguments) -> dict[str, Any]:
    """Everything measured of a seed, also into its results.json."""
    policies = (BEFORE, *_arms(arguments, seed))
    scores = {
        **scores_without_model(output),
        **{name: json.loads((output / "scores" / f"{name}.json").read_text()) for name in arguments.sources},
    }
    measured = {policy: json.loads((output / "measured" / f"{policy}.json").read_text()) for policy in policies}
    for kind, of in ((measured, arguments.policies), (scores, arguments.sources)):
        for name, one in of.items():
            if one.objective is not None:
                kind[name]["extra_forwards"] = extra_forwards(one.objective, one.margins)
    found = {"policies": measured, "scores": scores}
    (output / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


def _lines(summary: Summary, arguments: Arguments) -> list[str]:
    if arguments.family:
        titles = {BEFORE: TITLES[BEFORE], **{name: arm.title for name, arm in arguments.policies.items()}}
        rewards = {name: source.title for name, source in arguments.sources.items()}
        return family_lines(summary, titles, {**WITHOUT_MODEL, **rewards})
    arms = {name: TITLES[name] for name in (BEFORE, *ARMS) if name in (BEFORE, *arguments.names)}
    grid = {name: TITLES[name] for name in GRID if name in summary.means["policies"]}
    scores = {name: title for name, title in SCORE_TITLES.items() if name in summary.means["scores"]}
    baselines = {name: TITLES[name] for name in HELD_AGAINST if name in arms}
    return lines_of(summary, arms, grid, scores, baselines)


if __name__ == "__main__":
    run_command(main)
