"""RUN directories, files of answers and scored datasets as the programs write them, for tests of the report."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from data_samples import picture, write_media

from mmrlhf_jax.data.annotations import AnnotationStore
from mmrlhf_jax.data.dataset import PreparedDataset
from mmrlhf_jax.data.datasets import Dataset, open_dataset
from mmrlhf_jax.data.prepare import PrepareOptions, prepare
from mmrlhf_jax.data.rewards import REWARD, GroupReward, content_of, note_command
from mmrlhf_jax.data.sources.rows import SourceOptions
from mmrlhf_jax.objectives import MMDPO, Objective
from mmrlhf_jax.training.recipe import Recipe, as_json

MAPPING = {"id": "id", "image": "image", "prompt": "question", "responses": "answers", "rank": "rank", "score": "score"}


def write_run(
    directory: Path,
    objective: Objective | None = None,
    *,
    steps: int = 40,
    dataset: Dataset | None = None,
    more: Mapping[int, Mapping[str, Any]] | None = None,
    **fields: Any,
) -> Path:
    """A finished run of `steps` steps; `more` changes the lines of single steps, `fields` the recipe."""
    directory.mkdir(parents=True)
    recipe = Recipe(
        objective=objective or MMDPO(), model="start", dataset=dataset.path if dataset else "gone/data", **fields
    )
    start = {"model": "a" * 32, "renderer": "b" * 64, "dataset": dataset.fingerprint if dataset else "c" * 64}
    (directory / "recipe.json").write_text(as_json(recipe))
    (directory / "start.json").write_text(json.dumps(start))
    lines = [{**_line(step), **(more or {}).get(step, {})} for step in range(1, steps + 1)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    held_out = [
        {"step": step, "eval/loss": 0.7 - step / 200, "eval/rewards/accuracies": 0.6, "groups": 9, "seconds": 1.0}
        for step in (0, steps // 2, steps)
    ]
    (directory / "evaluation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in held_out))
    (directory / "complete.json").write_text(json.dumps({"steps": steps, "planned": steps}))
    return directory


def _line(step: int) -> dict[str, Any]:
    wave = math.sin(step)
    return {
        "step": step,
        "loss": 0.7 * math.exp(-step / 30) + 0.02 * wave,
        "rewards/accuracies": 1 - 0.5 * math.exp(-step / 10),
        "rewards/margins": step / 50,
        "rewards/chosen": step / 100,
        "rewards/rejected": -step / 100,
        "logps/chosen": -20 + wave,
        "logps/rejected": -22 - step / 4,
        "length/chosen": 12.0,
        "length/rejected": 14.5,
        "beta/mean": 0.12 + 0.001 * wave,
        "grad_norm": 3 * math.exp(-step / 9),
        "seconds": 1.5,
        "seconds/data_wait": 0.03,
        "seconds/compile": 2.0 if step == 1 else 0.0,
        "tokens_per_second": 9000 + 100 * wave,
        "groups_per_second": 21.3,
        "rows": [step],
    }


def write_dataset(directory: Path, questions: Sequence[str] = ("What is it?",) * 6) -> PreparedDataset:
    """Groups of three ranked answers with scores 2, 1, 0 about a picture; `questions` are their prompts."""
    media = write_media(directory / "media", a=picture())
    rows = [
        {
            "id": f"q{i}",
            "image": "a.png",
            "question": question,
            "answers": [f"good {i}", f"fair {i}", f"bad {i}"],
            "rank": [1, 2, 3],
            "score": [2.0, 1.0, 0.0],
        }
        for i, question in enumerate(questions)
    ]
    file = directory / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(
        PrepareOptions(
            source="mapped",
            inputs=(str(file),),
            output=str(directory / "data"),
            media=str(media),
            source_options=SourceOptions(mapping=MAPPING),
        )
    )
    found = open_dataset(directory / "data")
    assert isinstance(found, PreparedDataset)
    return found


def write_scores(dataset: PreparedDataset, scores: Sequence[float], critique: str, model: str = "judge") -> None:
    """What launch/annotate.py --with reward stores, the same scores and critique for the responses of every group."""
    key = {"model": "d" * 32, "renderer": "e" * 64, "dtype": "float32"}
    store = AnnotationStore.open(
        dataset.path, REWARD, {**key, "critiques": "generated", "samples": 1, "sampling": {"temperature": 0}}
    )
    groups = list(dataset.groups())
    one = GroupReward(
        np.array([[score] for score in scores], np.float32),
        tuple((critique,) for _ in scores),
        np.ones((len(scores), 1), bool),
    )
    arrays = {name: [value] * len(groups) for name, value in one.arrays().items()}
    store.write(range(len(groups)), [content_of(group, "generated") for group in groups], arrays)
    note_command(store, model, "annotate")


def answer(dataset: PreparedDataset, row: int, **response: Any) -> dict[str, Any]:
    """A line of launch/generate.py about a row of `dataset`; `response` are the fields of its one response."""
    group = dataset.group(row)
    return {
        "id": group.id,
        "row": row,
        "prompt": group.prompt[0].text,
        "responses": [{"tokens": 3, "ended": True, **response}],
    }


def write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
