"""Do margins help, do critiques, do groups? The quickstart's world over several seeds, every way to learn from its
annotations side by side, with the uncertainty of each figure and of each difference.

    python launch/study.py --output runs/study

Needs `pip install 'mmrlhf-jax[quickstart]'`; downloads nothing. For each seed a world, a model, its SFT run and the
reward models; then, each from that SFT run, for as many optimizer steps and on the same groups:

    sft_best         SFT on the best answers
    dpo              DPO: every pair has the same beta
    dpo_pairs        DPO, a step being as many single pairs, two full sequences each, as cost what its groups cost
    mm_dpo           MM-DPO as published, on the margins of the critique reward model
    released_factor  MM-DPO as the released per-pair path has it: beta linear in that margin
    released_batch   MM-DPO as the released trainer really runs: one beta a batch, from its own log-ratios
    known_margins    MM-DPO on margin-matched labels: the annotators' pairs, each with the margin that is true
    scalar_margins   MM-DPO on the margins of a scalar reward model
    human_margins    MM-DPO on margins of the critique model reading the annotators' reasons, not critiques of its own

and, for the first --grid-seeds, MM-DPO at other w and k. Held-out answers are counted against what is true. Figures are
means over seeds with the 95 % interval of Student's t; differences are paired by seed, as seeds differ more than arms.
At the end OUTPUT/table.md, which is printed, and OUTPUT/results.json; OUTPUT/seed_N/results.json for each seed.

Steps and rates were chosen on seed 0, which is therefore not among the seeds by default. Every stage is a program a
user calls, printed before it runs. It runs on the CPU unless JAX_PLATFORMS says otherwise. The same command again
resumes, with more seeds or arms too; finished stages are not run again. Seeds share nothing: two terminals may run
different --seeds of one OUTPUT at a time, and the whole command then only makes the table. Exit codes: 0 done,
1 failed, 2 bad usage, 75 interrupted.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tyro

from mmrlhf_jax.command import UsageError, run_command
from mmrlhf_jax.data.annotations import find
from mmrlhf_jax.data.digit_boards.questions import TASKS
from mmrlhf_jax.data.digit_boards.world import MAPPING, SPLITS, WorldConfig, read_questions, write_world
from mmrlhf_jax.data.rewards import REWARD
from mmrlhf_jax.quickstart import new_model
from mmrlhf_jax.stages import Stages, claim, stop_on_sigterm
from mmrlhf_jax.study.figures import BEFORE, policy_figures, score_figures, scores_without_model
from mmrlhf_jax.study.summary import Summary, summarise
from mmrlhf_jax.study.table import Column, table

LAUNCH = Path(__file__).resolve().parent
QUICKSTART = LAUNCH.parent / "configs" / "quickstart"
STUDY = LAUNCH.parent / "configs" / "study"
MULTIPLE = 16  # prompts are short: padding to 128 would be most of the work
MOST_TOKENS = 24  # of an answer or a critique; the longest right ones have 14 and 17


@dataclass(frozen=True)
class Source:
    """Where scores come from: a reward model, and the critiques they are read behind."""

    title: str
    run: str
    recipe: Path
    critiques: str


@dataclass(frozen=True)
class Arm:
    """A way to learn from the annotations; `margins` is the source of MM-DPO's, where they are not in the data."""

    title: str
    recipe: Path
    margins: str | None = None
    flags: tuple[object, ...] = ()


CRITIQUE_REWARD = QUICKSTART / "critique_reward_tasks.py"
MM_DPO = QUICKSTART / "mm_dpo.py"
SOURCES = {
    "scalar": Source("scalar reward model", "scalar_reward", STUDY / "scalar_reward.py", "none"),
    "generated": Source("critique model, its own critiques", "critique_reward", CRITIQUE_REWARD, "generated"),
    "human": Source("critique model, annotators' reasons", "critique_reward", CRITIQUE_REWARD, "human"),
}
ARMS = {
    "sft_best": Arm("SFT on the best", QUICKSTART / "sft_best.py"),
    "dpo": Arm("DPO", QUICKSTART / "dpo.py"),
    "dpo_pairs": Arm("DPO, pairs at equal compute", STUDY / "dpo_pairs.py"),
    "mm_dpo": Arm("MM-DPO, published", MM_DPO, "generated"),
    "released_factor": Arm("MM-DPO, released factor", STUDY / "released_factor.py", "generated"),
    "released_batch": Arm("MM-DPO, released batch beta", STUDY / "released_batch.py"),
    "known_margins": Arm("MM-DPO, margin-matched labels", STUDY / "known_margins.py"),
    "scalar_margins": Arm("MM-DPO, scalar margins", MM_DPO, "scalar"),
    "human_margins": Arm("MM-DPO, margins behind reasons", MM_DPO, "human"),
}
W_AND_K = ((0.1, 0.5), (2.0, 0.5), (0.5, 0.1), (0.5, 2.0), (2.0, 2.0))  # beside the recipe's own .5 and .5
GRID = {
    f"mm_dpo_w{w:g}_k{k:g}": Arm(f"w {w:g}, k {k:g}", MM_DPO, "generated", ("--objective.w", w, "--objective.k", k))
    for w, k in W_AND_K
}
TITLES = {BEFORE: "SFT (before)", **{name: arm.title for name, arm in {**ARMS, **GRID}.items()}}
SCORE_TITLES = {
    "longer": "the longer answer",
    "annotators": "annotators' ranks",
    **{name: source.title for name, source in SOURCES.items()},
}
BASELINES = {"policies": ("dpo", "sft_best", "mm_dpo"), "scores": ("scalar",)}


@dataclass(frozen=True)
class Arguments:
    """Every way to learn from the annotations of the quickstart's world, side by side over several seeds."""

    output: str = "runs/study"
    """directory of everything that is made, a directory a seed; the same command again resumes"""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)  # seed 0 is where the recipes' steps and rates were chosen
    """of the world, the model's weights and the order of the data: everything is done anew for each"""
    arms: tuple[str, ...] = tuple(ARMS)
    """what to compare, see above; reward models that none of them needs are not trained"""
    grid_seeds: int = 2
    """so many of the seeds also run MM-DPO at other w and k, where mm_dpo is among the arms"""
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
        if not self.arms or len(set(self.arms)) < len(self.arms) or not set(self.arms) <= set(ARMS):
            raise UsageError(f"--arms {' '.join(self.arms)}: name some of {', '.join(ARMS)}, each once")
        if self.grid_seeds < 0:
            raise UsageError(f"--grid-seeds {self.grid_seeds} is negative")

    @property
    def sources(self) -> dict[str, Source]:
        """Of the margins that the arms need."""
        needed = {ARMS[arm].margins for arm in self.arms}
        return {name: source for name, source in SOURCES.items() if name in needed}

    @property
    def of_grid(self) -> tuple[int, ...]:
        """The seeds of the grid of w and k."""
        return self.seeds[: self.grid_seeds] if "mm_dpo" in self.arms else ()


def main() -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    stop_on_sigterm()
    arguments = tyro.cli(Arguments, prog="study.py", description=__doc__)
    output = Path(arguments.output)
    free = ("output", "seeds", "arms", "grid_seeds")
    options = {k: v for k, v in dataclasses.asdict(arguments).items() if k not in free}
    claim(output, "study", options)
    print("\n".join(_budget(arguments)), flush=True)
    for done, seed in enumerate(arguments.seeds):
        print(f"\nseed {seed}" + _left(arguments, done), flush=True)
        stages = Stages(output / f"seed_{seed}", LAUNCH)
        stages.output.mkdir(exist_ok=True)
        _prepare(stages, seed, arguments)
        for name in arguments.arms:
            _run_arm(stages, name, ARMS[name], seed, arguments)
    for seed in arguments.of_grid:
        print(f"\nseed {seed}, other w and k", flush=True)
        for name, arm in GRID.items():
            _run_arm(Stages(output / f"seed_{seed}", LAUNCH), name, arm, seed, arguments)
    found = {seed: _results(output / f"seed_{seed}", seed, arguments) for seed in arguments.seeds}
    summary = summarise(found, BASELINES)
    stated = {"options": options, "seeds": found, "summary": summary.as_json()}
    (output / "results.json").write_text(json.dumps(stated, indent=1) + "\n")
    lines = _tables(summary, arguments)
    (output / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(["", *lines, f"{_minutes(output, arguments.seeds):.0f} minutes in all; {output / 'table.md'}"]))


def _budget(arguments: Arguments) -> list[str]:
    """How much will run, whether or not some of it has."""
    seeds, arms, sources = len(arguments.seeds), len(arguments.arms), len(arguments.sources)
    models = len({source.run for source in arguments.sources.values()})
    grid = len(arguments.of_grid) * len(GRID)
    trained = seeds * (1 + models + arms) + grid
    # prepare; train; annotate: rewards, the reference, each policy; generate
    programs = seeds * (len(SPLITS) + len(SPLITS) * sources + 1 + 2 * (arms + 1)) + 2 * grid + trained
    return [
        f"{seeds} seeds, each an SFT run, {models} reward models and {arms} arms; {len(GRID)} other w and k for "
        f"{len(arguments.of_grid)} of them:",
        f"{trained} runs of train.py, {programs} programs in all",
    ]


def _left(arguments: Arguments, done: int) -> str:
    if not done:
        return ""
    each = _minutes(Path(arguments.output), arguments.seeds[:done]) / done
    left = each * (len(arguments.seeds) - done)
    return f": {done} of {len(arguments.seeds)} took {each:.1f} minutes each, about {left:.0f} are left"


def _minutes(output: Path, seeds: Iterable[int]) -> float:
    """What the stages of these seeds took, whenever they ran."""
    taken = [one for seed in seeds for one in Stages(output / f"seed_{seed}", LAUNCH).taken().values()]
    return sum(one["seconds"] for one in taken) / 60


def _prepare(stages: Stages, seed: int, arguments: Arguments) -> None:
    """Everything the arms of a seed share: world, data, SFT run, reference log-probs, scores; and SFT measured."""
    output, world, data = stages.output, stages.output / "world", stages.output / "data"
    config = WorldConfig(arguments.boards, arguments.held_out_boards, seed=seed)
    stages.call("world", world, lambda: write_world(world, config))
    stages.call("model", output / "model", lambda: _new_model(output / "model", world, config.side, seed))
    for split in SPLITS:
        stages.program(
            f"prepare_{split}", data / split, "prepare", "--source", "mapped",
            "--input", world / f"{split}.jsonl", "--media", world / "media", "--map", *MAPPING,
            "--model", output / "model", "--output", data / split,
        )  # fmt: skip
    _train(stages, BEFORE, QUICKSTART / "sft_tasks.py", output / "model", arguments.sft_steps, seed)
    for run, recipe in {source.run: source.recipe for source in arguments.sources.values()}.items():
        _train(stages, run, recipe, output / BEFORE, arguments.reward_steps, seed)
    for name in arguments.sources:
        for split in SPLITS:
            _annotate_rewards(stages, name, split)
        file = output / "scores" / f"{name}.json"
        stages.call(
            f"measure_scores_{name}",
            file,
            partial(_write, file, partial(score_figures, output, SOURCES[name].run, SOURCES[name].critiques)),
        )
    _annotate_logps(stages, "train", BEFORE)
    _measure_policy(stages, BEFORE)


def _new_model(directory: Path, world: Path, side: int, seed: int) -> None:
    rows = read_questions(world, "train")
    template = (QUICKSTART / "critique_template.txt").read_text()
    texts = [text for row in rows for text in (row["question"], *row["answers"], *row["reasons"])]
    new_model(directory, side, [*texts, *[template] * len(rows)], seed, heads=4)


def _train(
    stages: Stages, run: str, recipe: Path, model: Path, steps: int | None, seed: int, flags: Iterable[object] = ()
) -> None:
    directory = stages.output / run
    stages.program(
        run, directory / "complete.json", "train", recipe, "--model", model,
        "--dataset", stages.output / "data" / "train", "--output", directory, "--seed", seed,
        *(() if steps is None else ("--data.max-steps", steps)), *flags,
    )  # fmt: skip


def _annotate_rewards(stages: Stages, name: str, split: str) -> None:
    """Scores of every answer: on train the margins of MM-DPO, on held_out to measure."""
    source, data = SOURCES[name], stages.output / "data" / split
    flags = ("--max-new-tokens", MOST_TOKENS, "--decode.multiple", MULTIPLE, "--decode.max-buckets", 1)
    stages.program(
        f"scores_{split}_{name}", data / "annotations", "annotate", "--dataset", data,
        "--model", stages.output / source.run, "--with", "reward", "--critiques", source.critiques,
        "--dtype", "float32", "--multiple", MULTIPLE, "--max-buckets", 1,
        *(flags if source.critiques == "generated" else ()),
    )  # fmt: skip


def _annotate_logps(stages: Stages, split: str, policy: str) -> None:
    """Log-probs of every answer under a policy: a reference to train against, or to see which of two it prefers."""
    data = stages.output / "data" / split
    stages.program(
        f"logps_{split}_{policy}", data / "annotations", "annotate", "--dataset", data,
        "--model", stages.output / policy, "--with", "reference", "--dtype", "float32",
        "--multiple", MULTIPLE, "--max-buckets", 1,
    )  # fmt: skip


def _run_arm(stages: Stages, name: str, arm: Arm, seed: int, arguments: Arguments) -> None:
    flags = list(arm.flags)
    if arm.margins is not None:
        flags += ["--margins", _store(stages.output, SOURCES[arm.margins])]
    if name == "dpo_pairs":
        flags += ["--data.groups-per-step", _pairs_per_step(stages)]
    _train(stages, name, arm.recipe, stages.output / BEFORE, arguments.preference_steps, seed, flags)
    _measure_policy(stages, name)


def _store(output: Path, source: Source) -> str:
    """The name of a source's scores beside the training data: no two sources read scores behind the same critiques."""
    (store,) = [s for s in find(output / "data" / "train", REWARD) if s.key["critiques"] == source.critiques]
    return store.directory.name


def _pairs_per_step(stages: Stages) -> int:
    """That cost what the groups of a step of DPO do."""
    file = stages.output / "pairs_per_step.json"

    def count() -> None:
        from mmrlhf_jax.study.cost import pairs_of_equal_cost
        from mmrlhf_jax.training.recipe import read_recipe

        groups, pairs = (read_recipe(ARMS[name].recipe) for name in ("dpo", "dpo_pairs"))
        data = stages.output / "data" / "train"
        file.write_text(json.dumps(pairs_of_equal_cost(groups, pairs, stages.output / BEFORE, data)) + "\n")

    stages.call("pairs_per_step", file, count)
    return int(json.loads(file.read_text()))


def _measure_policy(stages: Stages, policy: str) -> None:
    """Its log-probs of the held-out answers, its own answers, and what is counted of both."""
    output, answers = stages.output, _answers(stages.output, policy)
    _annotate_logps(stages, "held_out", policy)
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
    policies = (BEFORE, *arguments.arms, *(GRID if seed in arguments.of_grid else ()))
    scores = {
        **scores_without_model(output),
        **{name: json.loads((output / "scores" / f"{name}.json").read_text()) for name in arguments.sources},
    }
    measured = {policy: json.loads((output / "measured" / f"{policy}.json").read_text()) for policy in policies}
    found = {"policies": measured, "scores": scores}
    (output / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


SHORT = {"unanswerable": "untold"}
CLAIMS = tuple(Column(f"hallucination/{task}", SHORT.get(task, task)) for task in ("all", *TASKS))
OTHERS = (
    Column("refusal", "untold refused"),
    Column("over_refusal", "others refused"),
    Column("length", "claims", share=False, digits=2),
    Column("preference_accuracy", "log-prob"),
    Column("reward_accuracy", "reward"),
)
SCORES = (
    Column("accuracy", "pairs"),
    Column("critique_statements", "true statements"),
    Column("critique_counts", "true counts"),
)
STEP = (
    Column("step/items", "items", share=False, digits=0),
    Column("step/pairs", "pairs", share=False, digits=0),
    Column("step/gigaflop", "GFLOP", share=False),
    Column("step/seconds", "seconds", share=False, digits=3),
    Column("step/margin", "margin", share=False, digits=2),
    Column("step/beta", "beta", share=False, digits=4),
)


def _tables(summary: Summary, arguments: Arguments) -> list[str]:
    """What a user came for."""
    means, arms = summary.means, {name: TITLES[name] for name in (BEFORE, *arguments.arms)}
    grid = {name: TITLES[name] for name in GRID if name in means["policies"]}
    lines = [
        f"Seeds {' '.join(map(str, summary.seeds))}; {means['policies'][BEFORE]['answers'].mean:.0f} questions about "
        "held-out boards and clips each.",
        "Mean over seeds ± half of its 95 % interval (Student's t). Shares in %, differences in points.",
    ]
    lines += _section("Wrong claims of greedy answers (hallucination rate), by task; untold: no picture answers it")
    lines += table(means["policies"], arms, CLAIMS)
    lines += _section(
        "Untold questions and others refused, claims an answer, and pairs of held-out answers whose better one has the "
        "higher log-prob, and log-prob less that under SFT"
    )
    lines += table(means["policies"], arms, OTHERS)
    for baseline in ("dpo", "sft_best"):
        if baseline in summary.differences and len(arms) > 2:
            lines += _differences(summary, baseline, arms, f"Less {TITLES[baseline]}, paired by seed")
    if grid:
        less = f"Other w and k, {len(arguments.of_grid)} seeds only: less MM-DPO at w 0.5 and k 0.5, paired by seed"
        lines += _differences(summary, "mm_dpo", grid, less)
    scored = {name: title for name, title in SCORE_TITLES.items() if name in means["scores"]}
    lines += _section("Pairs of held-out answers whose better one is scored higher; what its critiques state")
    lines += table(means["scores"], scored, SCORES)
    if "scalar" in summary.differences:
        lines += _section("Less the scalar reward model, paired by seed; * leaves out 0")
        lines += table(summary.differences["scalar"], scored, SCORES[:1], signed=True)
    lines += _section("A mean step: groups (or pairs of two sequences), their pairs, operations, seconds, margin, beta")
    return [*lines, *table(means["policies"], {**arms, **grid}, STEP)]


def _differences(summary: Summary, baseline: str, titles: Mapping[str, str], title: str) -> list[str]:
    found = summary.differences[baseline]
    tables = [table(found, titles, columns, signed=True) for columns in (CLAIMS, OTHERS)]
    return [*_section(f"{title}; * leaves out 0"), *tables[0], "", *tables[1]]


def _section(title: str) -> list[str]:
    return ["", f"**{title}**", ""]


if __name__ == "__main__":
    run_command(main)
