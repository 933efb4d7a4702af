"""The whole pipeline on a laptop CPU: a small model learns to read boards of real handwritten digits, and MM-DPO
teaches it not to claim what is not there.

    python launch/quickstart.py --output runs/quickstart

Needs `pip install 'mmrlhf-jax[quickstart]'`; downloads nothing. Every stage is a program a user calls, printed before
it runs: prepare, train (SFT on answers of mixed quality), annotate (reference log-probs), train (MM-DPO and, beside it,
SFT on the best answers for as many steps), export. At the end a table says how often each policy claims what is wrong,
and how well it prefers the better of two answers, on boards of digits it never saw. It runs on the CPU unless
JAX_PLATFORMS says otherwise. The same command again resumes; finished stages are not run again. Exit codes: 0 done,
1 failed, 2 bad usage, 75 interrupted.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from mmrlhf_jax.command import UsageError, run_command
from mmrlhf_jax.data.digit_boards import measures
from mmrlhf_jax.data.digit_boards.boards import Scene
from mmrlhf_jax.data.digit_boards.world import (
    MAPPING,
    SPLITS,
    WorldConfig,
    plain_world,
    read_questions,
    scene_of,
    write_world,
)
from mmrlhf_jax.quickstart import new_model, pair_accuracy
from mmrlhf_jax.stages import Stages, claim, stop_on_sigterm

LAUNCH = Path(__file__).resolve().parent
RECIPES = LAUNCH.parent / "configs" / "quickstart"
POLICIES = {"sft": "SFT (before)", "sft_best": "SFT on the best", "mm_dpo": "MM-DPO"}
MULTIPLE = 16  # prompts are short: padding to 128 would be most of the work
MOST_TOKENS = 24  # of an answer; the longest right one has 14


@dataclass(frozen=True)
class Arguments:
    """A small model learns to read boards of handwritten digits, and MM-DPO teaches it not to claim what is not
    there."""

    output: str = "runs/quickstart"
    """directory of everything that is made; the same command again resumes"""
    boards: int = WorldConfig.train_boards
    """boards to train on, two questions each"""
    held_out_boards: int = WorldConfig.held_out_boards
    """boards of other digits to evaluate on, two questions each"""
    sft_steps: int | None = None
    """steps of supervised fine-tuning; the recipe's by default"""
    preference_steps: int | None = None
    """steps of MM-DPO and of its control; the recipes' by default"""
    seed: int = 0
    """of the world, the model's weights and the order of the data"""

    def __post_init__(self) -> None:
        for name in ("boards", "held_out_boards", "sft_steps", "preference_steps"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} {value} is not positive")


def main() -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    stop_on_sigterm()
    arguments = tyro.cli(Arguments, prog="quickstart.py", description=__doc__)
    output = Path(arguments.output)
    claim(output, "quickstart", {k: v for k, v in dataclasses.asdict(arguments).items() if k != "output"})
    stages, world = Stages(output, LAUNCH), output / "world"
    config = plain_world(arguments.boards, arguments.held_out_boards, arguments.seed)
    stages.call("world", world, lambda: write_world(world, config))
    stages.call("model", output / "model", lambda: _new_model(output / "model", world, config.side, arguments.seed))
    for split in SPLITS:
        stages.program(
            f"prepare_{split}", output / "data" / split, "prepare", "--source", "mapped",
            "--input", world / f"{split}.jsonl", "--media", world / "media", "--map", *MAPPING,
            "--model", output / "model", "--output", output / "data" / split,
        )  # fmt: skip
    _train(stages, "sft", output / "model", arguments.sft_steps, arguments.seed)
    _annotate(stages, "train", "sft")
    for policy in ("mm_dpo", "sft_best"):
        _train(stages, policy, output / "sft", arguments.preference_steps, arguments.seed)
    for policy in POLICIES:
        _annotate(stages, "held_out", policy)
    exported = output / "mm_dpo_hf"
    stages.program("export", exported, "export", output / "mm_dpo", "--output", exported, "--dtype", "float32")
    results = output / "results.json"
    stages.call("evaluate", results, lambda: _evaluate(output, results))
    print("\n".join(_table(json.loads(results.read_text()), stages.summary(), exported)))


def _train(stages: Stages, policy: str, model: Path, steps: int | None, seed: int) -> None:
    run = stages.output / policy
    flags = ["--model", model, "--dataset", stages.output / "data" / "train", "--output", run, "--seed", seed]
    flags += [] if steps is None else ["--data.max-steps", steps]
    stages.program(policy, run / "complete.json", "train", RECIPES / f"{policy}.py", *flags)


def _annotate(stages: Stages, split: str, policy: str) -> None:
    """Log-probs of every response of a split under a policy: a reference to train against, or to compare policies."""
    data = stages.output / "data" / split
    stages.program(
        f"annotate_{split}_{policy}", data / "annotations", "annotate", "--dataset", data,
        "--model", stages.output / policy, "--with", "reference", "--dtype", "float32",
        "--multiple", MULTIPLE, "--max-buckets", 1,
    )  # fmt: skip


def _new_model(directory: Path, world: Path, side: int, seed: int) -> None:
    rows = read_questions(world, "train")
    new_model(directory, side, [text for row in rows for text in (row["question"], *row["answers"])], seed)


def _evaluate(output: Path, results: Path) -> None:
    """Every policy on the held-out boards, into `results`."""
    from mmrlhf_jax.data.datasets import open_dataset
    from mmrlhf_jax.inference.engine import DecodeConfig
    from mmrlhf_jax.inference.generate import answers_in_order, generate
    from mmrlhf_jax.inference.sample import SamplingConfig
    from mmrlhf_jax.models.llava_onevision.model import Compute
    from mmrlhf_jax.models.llava_onevision.render import load_renderer
    from mmrlhf_jax.nn.sharding import MeshConfig, ShardingRules, make_mesh
    from mmrlhf_jax.training.data import reference_key
    from mmrlhf_jax.training.model import load_model, model_fingerprint
    from mmrlhf_jax.training.recipe import INFERENCE
    from mmrlhf_jax.training.runtime import set_up_jax

    set_up_jax("float32")
    dataset, mesh = open_dataset(output / "data" / "held_out"), make_mesh(MeshConfig())
    groups = [dataset.with_media(row) for row in range(len(dataset))]
    truth = {row["id"]: scene_of(row) for row in read_questions(output / "world", "held_out")}
    boards = [truth[group.id] for group in groups]
    found: dict[str, Any] = {}
    reference: list[Any] = []
    for policy in POLICIES:
        model = load_model(str(output / policy), mesh, ShardingRules(), rates=INFERENCE, dtype="float32")
        renderer = load_renderer(str(model.assets))
        compute = Compute(platform=mesh.devices.flat[0].platform)
        greedy, run = SamplingConfig(max_new_tokens=MOST_TOKENS), DecodeConfig(max_buckets=1, multiple=MULTIPLE)
        answers = answers_in_order(generate(groups, renderer, model, mesh, compute, greedy, run))
        said = [answer.text for (answer,) in answers]
        key = reference_key(model_fingerprint(model.config, model.params), renderer, "float32")
        logps = _response_logps(dataset, renderer, key)
        reference = reference or logps
        found[policy] = {
            "hallucination": _hallucination(boards, groups, said),
            "preference_accuracy": pair_accuracy(groups, logps),
            "reward_accuracy": pair_accuracy(
                groups, [ours - theirs for ours, theirs in zip(logps, reference, strict=True)]
            ),
            "questions": len(groups),
            "answers": [{"id": group.id, "text": text} for group, text in zip(groups, said, strict=True)],
        }
    results.write_text(json.dumps(found, indent=1) + "\n")


def _response_logps(dataset: Any, renderer: Any, key: Mapping[str, str]) -> list[Any]:
    """Log-prob f32 [K] of every response of every group, summed over its tokens, as launch/annotate.py stored them."""
    import numpy as np

    from mmrlhf_jax.data.annotations import AnnotationStore
    from mmrlhf_jax.training.data import REFERENCE

    stored = AnnotationStore.open(dataset.path, REFERENCE, key).read(dataset)
    lengths = [renderer.measure(group).responses for group in dataset.groups()]
    return [
        np.array([part.sum() for part in np.split(stored[row]["logp"], np.cumsum(length)[:-1])])
        for row, length in enumerate(lengths)
    ]


def _hallucination(scenes: list[Scene], groups: list[Any], said: list[str]) -> dict[str, float]:
    """Share of wrong claims, over all questions and over those of each task."""
    asked = [group.prompt[0].text for group in groups]
    return measures.measure(zip(scenes, asked, said, strict=True)).hallucination


def _table(results: dict[str, Any], summary: list[str], exported: Path) -> list[str]:
    """The lines a user came for."""
    kinds = list(results["sft"]["hallucination"])
    lines = ["", f"{results['sft']['questions']} questions about held-out boards", ""]
    head = " ".join(f"{kind:>7}" for kind in kinds)
    lines += [f"{'':16} wrong claims: {head}   preference accuracy: log-prob  reward"]
    for policy, title in POLICIES.items():
        result = results[policy]
        shares = " ".join(f"{result['hallucination'][kind]:7.1%}" for kind in kinds)
        reward = "-" if policy == "sft" else f"{result['reward_accuracy']:.1%}"
        lines.append(f"{title:16} {'':13} {shares}   {'':20} {result['preference_accuracy']:8.1%} {reward:>7}")
    lines += [
        "",
        "wrong claims: share of the claims of greedy answers, counted against the true board (hallucination rate)",
        "log-prob: pairs whose better answer has the higher log-prob, summed over its tokens, not length-normalised",
        "reward: the same of the log-prob less that under SFT, which is DPO's implicit reward",
        "",
        *summary,
        f"the MM-DPO policy, ready for transformers: {exported}",
    ]
    return lines


if __name__ == "__main__":
    run_command(main)
