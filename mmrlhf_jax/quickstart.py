"""What the programs on the digit boards share: the small model they start from, and how they measure.

Only functions here start a jax backend, not the module.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmrlhf_jax.data.digit_boards import measures
from mmrlhf_jax.data.digit_boards.boards import CELL
from mmrlhf_jax.data.digit_boards.world import read_questions, scene_of
from mmrlhf_jax.groups import Group
from mmrlhf_jax.stages import Stages

if TYPE_CHECKING:
    import numpy as np

    from mmrlhf_jax.data.dataset import PreparedDataset
    from mmrlhf_jax.data.rewards import GroupReward

MULTIPLE = 16  # of slots: prompts are short, padding them to 128 would be most of the work
Rows = Mapping[str, dict[str, Any]]  # lines of a world, by their id


def new_model(directory: Path, side: int, texts: Iterable[str], seed: int, heads: int = 2) -> None:
    """A LLaVA-OneVision of under a million parameters whose patches are the cells of a board, `side` x `side` of them.

    `heads` share the decoder's 128 features. Its tokens are learned from `texts`. Random weights; starts a jax backend.
    """
    from mmrlhf_jax.models.llava_onevision.config import LlavaOnevisionConfig
    from mmrlhf_jax.models.llava_onevision.model import declare
    from mmrlhf_jax.models.llava_onevision.weights import new_directory
    from mmrlhf_jax.models.qwen2.config import Qwen2Config
    from mmrlhf_jax.models.siglip.config import SiglipConfig
    from mmrlhf_jax.nn.params import count

    pixels = side * CELL
    made = new_directory(
        directory,
        LlavaOnevisionConfig(
            tower=SiglipConfig(embed=96, layers=1, heads=2, mlp=256, image_size=pixels, patch_size=CELL),
            decoder=Qwen2Config(
                embed=128, layers=3, heads=heads, kv_heads=heads, head_dim=128 // heads, mlp=256, rope_theta=1e4,
                tied=True, max_positions=256,
            ),
            pinpoints=((pixels, pixels),),
        ),
        texts=[*texts, "user", "assistant"],  # the chat template's words are tokens of their own too
        seed=seed,
    )  # fmt: skip
    print(f"  {count(declare(made)):,} parameters, {made.decoder.vocab} rows of vocabulary")


def model_of_world(directory: Path, world: Path, template: Path, side: int, seed: int, heads: int = 2) -> None:
    """`new_model` that knows the words of a world's training questions, answers and reasons, and of the prompt
    of critiques, a file."""
    rows = read_questions(world, "train")
    texts = [text for row in rows for text in (row["question"], *row["answers"], *row["reasons"])]
    new_model(directory, side, [*texts, *[template.read_text()] * len(rows)], seed, heads)


def annotate_logps(stages: Stages, split: str, policy: str) -> None:
    """A stage: log-probs of every answer under a policy, a reference to train against or to compare policies."""
    data = stages.output / "data" / split
    stages.program(
        f"logps_{split}_{policy}", data / "annotations", "annotate", "--dataset", data,
        "--model", stages.output / policy, "--with", "reference", "--dtype", "float32",
        "--multiple", MULTIPLE, "--max-buckets", 1,
    )  # fmt: skip


def pair_accuracy(groups: Sequence[Group], values: Sequence[Sequence[float]]) -> float:
    """Share of the pairs of different known quality whose better response has the higher of the groups' values [K];
    equal is wrong. Who annotated the pairs may be wrong; `score` is not."""
    right = [
        value[better] > value[worse]
        for group, value in zip(groups, values, strict=True)
        for better, worse in known_pairs(group)
    ]
    return float(sum(right) / len(right))


def known_pairs(group: Group) -> list[tuple[int, int]]:
    """(better, worse) of all responses of a group whose scores differ."""
    scores = [response.score or 0.0 for response in group.responses]
    return [(i, j) for i, one in enumerate(scores) for j, other in enumerate(scores) if one > other]


def annotator_accuracy(groups: Sequence[Group]) -> float:
    """Share of the pairs of different known quality that the annotator ranked as they are."""
    return pair_accuracy(groups, [[-float(response.rank) for response in group.responses] for group in groups])


def response_logps(dataset: PreparedDataset, policy: Path) -> list[np.ndarray]:
    """Log-prob f32 [K] of every response of every group under `policy`, summed over its tokens, as launch/annotate.py
    stored them in float32."""
    import numpy as np

    from mmrlhf_jax.data.annotations import AnnotationStore
    from mmrlhf_jax.models.llava_onevision.render import load_renderer
    from mmrlhf_jax.training.data import REFERENCE, reference_key
    from mmrlhf_jax.training.model import assets_of

    renderer = load_renderer(str(assets_of(str(policy))))
    key = reference_key(_fingerprint(policy), renderer, "float32")
    stored = AnnotationStore.open(dataset.path, REFERENCE, key).read(dataset)
    lengths = [renderer.measure(group).responses for group in dataset.groups()]
    return [
        np.array([part.sum() for part in np.split(stored[row]["logp"], np.cumsum(length)[:-1])])
        for row, length in enumerate(lengths)
    ]


def stored_rewards(dataset: PreparedDataset, judge: Path, critiques: str, samples: int) -> list[GroupReward]:
    """What launch/annotate.py stored beside the dataset for this reward model, in the order of the rows."""
    from mmrlhf_jax.data.annotations import find
    from mmrlhf_jax.data.rewards import REWARD, read_rewards

    made_by = {"model": _fingerprint(judge), "critiques": critiques, "samples": samples}
    (store,) = [s for s in find(dataset.path, REWARD) if made_by.items() <= s.key.items()]
    stored = read_rewards(store, dataset)
    return [stored[row] for row in range(len(dataset))]


def critique_measures(groups: Sequence[Group], rewards: Sequence[GroupReward], truth: Rows) -> dict[str, float]:
    """Of generated critiques: the share of true statements, and of critiques whose last one, the count, is true."""
    right = total = counted = critiques = 0
    for group, reward in zip(groups, rewards, strict=True):
        scene, question = scene_of(truth[group.id]), group.prompt[0].text
        for response, (critique,) in zip(group.responses, reward.critiques, strict=True):
            true, stated = measures.critique_correctness(scene, question, response.text, critique)
            wrong, _ = measures.wrong_claims(scene, question, response.text)
            right, total, critiques = right + true, total + stated, critiques + 1
            counted += measures.stated_count(critique) == str(wrong)
    return {"critique_statements": right / total, "critique_counts": counted / critiques}


def read_answers(file: Path) -> list[dict[str, Any]]:
    """The lines of a file of launch/generate.py."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def measured_answers(answers: Sequence[dict[str, Any]], truth: Rows) -> measures.Measured:
    """What is counted of the first answer of each line."""
    said = ((truth[line["id"]], line["responses"][0]["text"]) for line in answers)
    return measures.measure((scene_of(row), row["question"], text) for row, text in said)


def write_marked(file: Path, answers: Sequence[dict[str, Any]], truth: Rows) -> None:
    """The lines of launch/generate.py, each response with what is wrong of it, as launch/report.py reads it: "wrong",
    "missing" and "claims"."""
    lines = []
    for line in answers:
        row = truth[line["id"]]
        scene, question = scene_of(row), row["question"]
        responses = [
            {**response, **dataclasses.asdict(measures.faults(scene, question, response["text"]))}
            for response in line["responses"]
        ]
        lines.append(json.dumps({**line, "responses": responses}, ensure_ascii=False) + "\n")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(lines))


def _fingerprint(model: Path) -> str:
    from mmrlhf_jax.nn.sharding import MeshConfig, ShardingRules, make_mesh
    from mmrlhf_jax.training.model import load_model, model_fingerprint
    from mmrlhf_jax.training.recipe import INFERENCE

    loaded = load_model(str(model), make_mesh(MeshConfig()), ShardingRules(), rates=INFERENCE)
    return model_fingerprint(loaded.config, loaded.params)
