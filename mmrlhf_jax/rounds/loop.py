"""The stages of online rounds, each a program a user calls: generate, prepare, annotate, rank, train, measure."""

from __future__ import annotations

import dataclasses
import functools
import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmrlhf_jax.command import CommandError
from mmrlhf_jax.data.digit_boards.world import read_questions
from mmrlhf_jax.inference.engine import DecodeConfig
from mmrlhf_jax.inference.sample import SamplingConfig
from mmrlhf_jax.rounds import attributes, candidates, figures, ranking, scoring
from mmrlhf_jax.rounds.candidates import Candidates, Tally
from mmrlhf_jax.rounds.options import Options, direction_of, rewards_of
from mmrlhf_jax.rounds.prompts import Prompt, prompts_of_world, read_lines, read_prompt_file, shares, write_lines
from mmrlhf_jax.stages import Stages
from mmrlhf_jax.storage import to_path, write_whole
from mmrlhf_jax.training.data import annotate_command
from mmrlhf_jax.training.model import absolute
from mmrlhf_jax.training.recipe import Recipe


@dataclass(frozen=True)
class Loop:
    """The stages of all rounds. Round 0 only measures the policy it starts from."""

    options: Options
    recipe: Recipe
    stages: Stages

    def run(self) -> None:
        self._check_prompts()
        self._measure(0)
        for number in range(1, self.options.rounds + 1):
            self._answer(number)
            rows = self._scored(number, "", self._shares[number - 1], self._at(number, "answers.jsonl"))
            self._train(number, rows)
            self._measure(number)
        self._tell()

    def _check_prompts(self) -> None:
        """Raises CommandError for prompts that a round cannot be made of, before any."""
        media = [row for share in (*self._shares, self._held_out) for row in share if row.image or row.video]
        if self.options.media is not None and not media:
            raise CommandError(f"--media {self.options.media}: no prompt has a picture or video")

    @functools.cached_property
    def _world(self) -> Path | None:
        return None if self.options.world is None else Path(self.options.world)

    @functools.cached_property
    def _media(self) -> str | None:
        return self.options.media if self._world is None else str(self._world / "media")

    @functools.cached_property
    def _shares(self) -> list[list[Prompt]]:
        """The prompts of each round."""
        asked = self.options
        prompts = prompts_of_world(self._world, "train") if self._world else read_prompt_file(str(asked.prompts))
        return shares(prompts, asked.rounds, asked.prompts_per_round, asked.seed)

    @functools.cached_property
    def _held_out(self) -> list[Prompt]:
        if self._world is not None:
            return prompts_of_world(self._world, "held_out")
        return [] if self.options.held_out is None else read_prompt_file(self.options.held_out)

    def _at(self, number: int, name: str) -> Path:
        return self.stages.output / f"round_{number}" / name

    def _policy(self, number: int) -> str:
        return self.options.policy if number == 0 else str(self._at(number, "policy"))

    def _call(self, number: int, stage: str, product: Path, work: Callable[[], object]) -> None:
        product.parent.mkdir(parents=True, exist_ok=True)
        self.stages.call(figures.stage_name(number, stage), product, work)

    def _program(self, number: int, stage: str, product: Path, program: str, *flags: object) -> None:
        self.stages.program(figures.stage_name(number, stage), product, program, *flags)

    def _answer(self, number: int) -> None:
        """K answers to each prompt of the round, by the last round's policy."""
        prompts, answers = self._at(number, "prompts.jsonl"), self._at(number, "answers.jsonl")
        asked = self._asked(self._shares[number - 1], self._policy(number - 1))
        self._call(number, "prompts", prompts, lambda: write_lines(prompts, asked))
        drawn = dataclasses.replace(self.options.sampling, seed=self.options.seed + number)
        flags = ("--samples", self.options.samples, *flags_of(drawn, SamplingConfig()))
        self._generate(number, "answers", number - 1, prompts, answers, flags)

    def _asked(self, prompts: Sequence[Prompt], policy: str) -> list[dict[str, Any]]:
        """Rows of prompts; a policy that has learned to be steered is told where to."""
        if self.options.select == "steer" and policy != self.options.policy:
            wanted = scoring.wanted_levels(direction_of(self.options))
            prompts = [dataclasses.replace(p, question=scoring.steered(p.question, wanted)) for p in prompts]
        return [prompt.row() for prompt in prompts]

    def _generate(
        self, number: int, stage: str, policy: int, prompts: Path, answers: Path, flags: Sequence[object]
    ) -> None:
        self._program(
            number, stage, answers, "generate", "--model", self._policy(policy), "--input", prompts,
            *self._with_media(self._rows_with_media(prompts)), "--output", answers, *flags, *self._computing(),
            *flags_of(self.recipe.render, type(self.recipe.render)(), "render."), "--layout", self.options.layout,
        )  # fmt: skip

    def _computing(self) -> list[object]:
        """How the recipe computes, for programs that decode."""
        mesh = flags_of(self.recipe.mesh, type(self.recipe.mesh)(), "mesh.")
        decode = flags_of(self.options.decode, DecodeConfig(), "decode.")
        return ["--dtype", self.recipe.compute.dtype, "--attention", self.recipe.compute.attention, *mesh, *decode]

    @staticmethod
    def _rows_with_media(file: Path) -> bool:
        return any(row[kind] is not None for row in read_lines(file) for kind in ("image", "video"))

    def _with_media(self, named: bool) -> list[object]:
        return ["--media", self._media] if named and self._media is not None else []

    def _scored(self, number: int, prefix: str, prompts: Sequence[Prompt], answers: Path) -> Path:
        """The distinct answers with their attributes and scores, a line a prompt; `prefix` sets held-out ones apart."""
        compared, dataset = self._at(number, f"{prefix}candidates.jsonl"), self._at(number, f"{prefix}candidates")
        scored = self._at(number, f"{prefix}scored.jsonl")
        by_id = {prompt.id: prompt for prompt in prompts}

        def distinct(tally: Tally) -> list[Candidates]:
            return candidates.candidates_of(by_id, read_lines(answers), tally)

        def compare() -> None:
            tally = Tally()
            found = distinct(tally)
            if not (found or prefix):
                raise CommandError(_nothing_to_compare(number, tally, self.options.sampling.max_new_tokens))
            write_lines(compared, (each.row() for each in found))

        self._call(number, f"{prefix}compare", compared, compare)
        if not read_lines(compared):  # held-out answers that were all cut off have no score
            self._call(number, f"{prefix}scored", scored, lambda: write_lines(scored, ()))
            return scored
        rewards = rewards_of(self.options)
        if rewards:
            self._prepare(number, f"{prefix}candidates", compared, dataset, "mapped", ("--map", *candidates.MAPPING))
        for name, model in rewards.items():
            self._annotate_reward(number, f"{prefix}score_{name}", dataset, model)
        own = None
        if self.options.attributes is not None:
            own = self._at(number, f"{prefix}attributes.jsonl")
            program = Path(self.options.attributes).resolve().with_suffix("")
            self._program(
                number, f"{prefix}attributes", own, str(program), "--candidates", compared, "--output", own
            )  # fmt: skip
        self._call(
            number, f"{prefix}scored", scored,
            lambda: self._write_scored(scored, distinct(Tally()), dataset, own, "held_out" if prefix else "train"),
        )  # fmt: skip
        return scored

    def _prepare(
        self, number: int, stage: str, rows: Path, dataset: Path, source: str, flags: Sequence[object]
    ) -> None:
        self._program(
            number, stage, dataset, "prepare", "--source", source, "--input", rows, "--output", dataset,
            *self._with_media(self._rows_with_media(rows)), *flags,
        )  # fmt: skip

    def _annotate_reward(self, number: int, stage: str, dataset: Path, model: str) -> None:
        asked = self.options
        multiple = self.recipe.data.multiple
        flags: list[object] = ["--samples", asked.critique_samples, *flags_of(asked.critique, SamplingConfig())]
        flags += [] if asked.critiques is None else ["--critiques", asked.critiques]
        render = dataclasses.replace(self.recipe.render, system=None)  # a reward model brings its own
        self._program(
            number, stage, dataset / "annotations", "annotate", "--dataset", dataset, "--model", model, "--with",
            "reward", "--multiple", multiple, *flags, *self._computing(),
            *flags_of(render, type(render)(), "render."), "--layout", asked.layout,
        )  # fmt: skip

    def _write_scored(self, file: Path, found: list[Candidates], dataset: Path, own: Path | None, split: str) -> None:
        known = [each.attributes for each in found]
        parts = [attributes.of_rewards(found, dataset, absolute(model), name)
                 for name, model in rewards_of(self.options).items()]  # fmt: skip
        parts += [] if own is None else [attributes.of_program(found, own)]
        parts += [] if self._world is None else [attributes.of_world(found, _truth_of(self._world, split))]
        for part in parts:
            known = [tuple({**a, **b} for a, b in zip(*both, strict=True)) for both in zip(known, part, strict=True)]
        write_lines(file, (
            dataclasses.replace(each, attributes=all_of, scores=tuple(map(self._score, all_of))).to_json()
            for each, all_of in zip(found, known, strict=True)
        ))  # fmt: skip

    def _score(self, known: scoring.Attributes) -> float:
        asked = self.options
        try:
            if asked.score == "reward":
                return known[next(iter(rewards_of(asked)))]
            if asked.score == "direction":
                return scoring.along(known, direction_of(asked))
            few = 10.0 if asked.few_claims is None else asked.few_claims
            return scoring.claim_score(known[scoring.SUPPORTED], known[scoring.CLAIMS], few)
        except KeyError as error:
            raise CommandError(f"an answer has no attribute {error}; it has {', '.join(sorted(known))}") from None

    def _train(self, number: int, scored: Path) -> None:
        """Ranks the scored answers and trains the last round's policy on them."""
        options, recipe = self.options, self.recipe
        ranked, dataset, run = (self._at(number, name) for name in ("ranked.jsonl", "data", "policy"))
        self._call(number, "ranked", ranked, lambda: self._rank(number, scored, ranked))
        if options.select in ranking.RULES:
            self._prepare(number, "data", ranked, dataset, "mm_rlhf", ("--margin-column", "margin", *self._measured()))
        else:
            flags = ("--map", *candidates.MAPPING, *self._measured())
            self._prepare(number, "data", ranked, dataset, "mapped", flags)
        start, reference = self._policy(number - 1), self._policy(number - 1)
        other: list[object] = []
        if recipe.objective.needs_reference and options.reference != "moving":
            reference = options.policy
            other = ["--reference-model", reference] * (number > 1)
        if recipe.objective.needs_reference and recipe.reference == "stored":
            words = shlex.split(annotate_command(dataclasses.replace(recipe, model=reference), str(dataset)))
            multiple = ("--multiple", recipe.data.multiple, *flags_of(recipe.mesh, type(recipe.mesh)(), "mesh."))
            self._program(number, "reference", dataset / "annotations", "annotate", *words[2:], *multiple)
        steps: list[object] = [] if options.steps is None else ["--data.max-steps", options.steps]
        self._program(
            number, "policy", run / "complete.json", "train", options.recipe, "--model", start, "--dataset", dataset,
            "--output", run, "--seed", options.seed + number, *other, *steps,
        )  # fmt: skip

    def _measured(self) -> tuple[object, ...]:
        """Flags of prepare that measure lengths as the policy does."""
        return ("--model", self.options.policy)

    def _rank(self, number: int, scored: Path, ranked: Path) -> None:
        """What is learned from the scored answers of a round; and what became of the others, into counted.json."""
        options, tally = self.options, Tally()
        asked = {prompt.id: prompt for prompt in self._shares[number - 1]}
        candidates.candidates_of(asked, read_lines(self._at(number, "answers.jsonl")), tally)
        found = candidates.read_scored(read_lines(scored))
        if options.select == "best":
            rows = list(candidates.best_rows(found, tally))
        elif options.select == "steer":
            rows = list(candidates.steer_rows(found, list(direction_of(options)), tally))
        else:
            rows = list(candidates.preference_rows(found, ranking.RULES[options.select], options.min_gap, tally))
        counted = dataclasses.asdict(tally.counted)
        if not rows:
            raise CommandError(
                f"round {number}: of {counted['prompts']} prompts none tells two answers apart "
                f"({counted['tied']} tie, {counted['near']} differ by less than --min-gap, {counted['alone']} have one "
                "answer): sample more, at a higher --sampling.temperature, or score otherwise"
            )
        _write_json(self._at(number, "counted.json"), counted)
        write_lines(ranked, rows)

    def _measure(self, number: int) -> None:
        """Greedy answers of a policy to the held-out prompts, scored as those that it learns from."""
        if not self._held_out:
            return
        prompts, answers = self._at(number, "held_out.jsonl"), self._at(number, "held_out_answers.jsonl")
        asked = self._asked(self._held_out, self._policy(number))
        self._call(number, "held_out_prompts", prompts, lambda: write_lines(prompts, asked))
        flags = ("--max-new-tokens", self.options.sampling.max_new_tokens)
        self._generate(number, "held_out_answers", number, prompts, answers, flags)
        scored = self._scored(number, "held_out_", self._held_out, answers)
        file = self._at(number, "held_out.json")

        def measure() -> None:
            truth = None if self._world is None else _truth_of(self._world, "held_out")
            _write_json(file, figures.held_out_figures(read_lines(answers), read_lines(scored), truth))

        self._call(number, "held_out_measured", file, measure)

    def _tell(self) -> None:
        """The table, and everything measured."""
        found = []
        for number in range(self.options.rounds + 1):
            held_out, counted = self._at(number, "held_out.json"), self._at(number, "counted.json")
            own: figures.Figures = {"held_out": json.loads(held_out.read_text())} if held_out.exists() else {}
            if number:
                own |= {"counted": json.loads(counted.read_text())}
                own |= {"run": figures.run_figures(self._at(number, "policy"))}
                own |= {"judge": figures.judge_accuracy(read_lines(self._at(number, "scored.jsonl")))}
            found.append(own)
        taken = self.stages.taken()
        lines = figures.table(found, {name: each["seconds"] for name, each in taken.items()})
        output = self.stages.output
        _write_json(output / "results.json", {"rounds": found, "stages": taken})
        write_whole(to_path(output / "table.md"), "".join(f"{line}\n" for line in lines).encode())
        print("\n".join(["", *lines, "", f"the last policy: {self._policy(self.options.rounds)}"]))


def _nothing_to_compare(number: int, tally: Tally, most: int) -> str:
    counted = tally.counted
    return (
        f"round {number}: none of {counted.answers} answers can be scored: {counted.cut} were cut off at "
        f"--sampling.max-new-tokens {most}, {counted.blank} are blank, {counted.unreadable} unreadable"
    )


@functools.cache
def _truth_of(world: Path, split: str) -> dict[str, dict[str, Any]]:
    """What is true of each question of a world, by id."""
    return {row["id"]: row for row in read_questions(world, split)}


def _write_json(file: Path, found: Any) -> None:
    write_whole(to_path(file), (json.dumps(found, indent=1) + "\n").encode())


def flags_of(options: Any, default: Any, prefix: str = "") -> list[object]:
    """The command line of a dataclass: the fields that differ from `default`."""
    flags: list[object] = []
    for entry in dataclasses.fields(options):
        value, name = getattr(options, entry.name), f"--{prefix}{entry.name.replace('_', '-')}"
        if value == getattr(default, entry.name):
            continue
        flags += [name] if value is True else [name, value]
    return flags
