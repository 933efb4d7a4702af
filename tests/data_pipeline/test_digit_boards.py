"""The files of a world: what they show, what they say, and that the same configuration makes them again."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmrlhf_jax.data.datasets import open_dataset
from mmrlhf_jax.data.digit_boards.boards import CELL, digits
from mmrlhf_jax.data.digit_boards.measures import reason, score
from mmrlhf_jax.data.digit_boards.questions import TASKS, Question
from mmrlhf_jax.data.digit_boards.world import (
    MAPPING,
    RATED_MAPPING,
    SPLITS,
    WorldConfig,
    plain_world,
    read_questions,
    scene_of,
    write_world,
)
from mmrlhf_jax.data.prepare import PrepareOptions, prepare
from mmrlhf_jax.data.sources.rows import SourceOptions

SMALL = WorldConfig(train_boards=40, held_out_boards=8, seed=3)
GROUPS = {"train": 140, "held_out": 28}  # three questions a board, two a clip, a clip for every fourth board


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sklearn")
    directory = tmp_path_factory.mktemp("digit_boards") / "world"
    assert write_world(directory, SMALL)
    return directory


def prepared(world: Path, split: str, output: Path, mapping: tuple[str, ...] = MAPPING) -> int:
    options = PrepareOptions(
        source="mapped",
        inputs=(str(world / f"{split}.jsonl"),),
        output=str(output),
        media=str(world / "media"),
        source_options=SourceOptions(dict(pair.split("=") for pair in mapping)),
    )
    return prepare(options).groups


def test_no_digit_image_is_in_both_splits() -> None:
    pytest.importorskip("sklearn")
    train, held_out = digits(SMALL.held_out_digits, SMALL.seed)
    assert all(len(pictures[digit]) >= 30 for pictures in (train, held_out) for digit in range(10))
    assert sum(len(p) for p in train.values()) + sum(len(p) for p in held_out.values()) == 1797
    names = [{image.tobytes() for own in pictures.values() for image in own} for pictures in (train, held_out)]
    assert not names[0] & names[1]


def test_pictures_and_frames_show_what_is_true_in_the_digits_of_their_split(world: Path) -> None:
    for split, pictures in zip(SPLITS, digits(SMALL.held_out_digits, SMALL.seed), strict=True):
        for row in read_questions(world, split):
            media, spacing = world / "media" / row.get("image", row.get("video")), 2 if "video" in row else 1
            files = sorted(media.iterdir()) if "video" in row else [media]
            for board, file in zip(scene_of(row), files, strict=True):
                pixels = np.asarray(Image.open(file))[..., 0]
                assert pixels.shape == (3 * CELL, 3 * CELL)
                shown = pixels.reshape(3, CELL, 3, CELL).transpose(0, 2, 1, 3)
                for (y, x), cell in np.ndenumerate(np.array(board, object)):
                    ink = shown[spacing * y, spacing * x]
                    assert not ink.any() if cell is None else any((ink == own).all() for own in pictures[cell])
                if spacing == 2:
                    assert not shown[1].any()
                    assert not shown[:, 1].any()


def test_one_cell_changes_from_frame_to_frame_and_what_stays_looks_the_same(world: Path) -> None:
    for row in read_questions(world, "train"):
        if "video" not in row:
            continue
        files = sorted((world / "media" / row["video"]).iterdir())
        frames = [np.asarray(Image.open(file))[..., 0].reshape(3, CELL, 3, CELL) for file in files]
        scene = np.array(scene_of(row), object)
        for (before, earlier), (after, later) in itertools.pairwise(zip(scene, frames, strict=True)):
            assert (before != after).sum() == 1
            assert (earlier != later).any((1, 3)).sum() == 1
        if (question := Question.parse(row["question"])).kind == "cell":
            assert len(set(scene[:, question.place - 1, question.column - 1])) > 1


def test_all_tasks_are_asked_and_answered_by_three_to_five(world: Path) -> None:
    rows = read_questions(world, "train")
    assert len(rows) == GROUPS["train"]
    asked = Counter(Question.parse(row["question"]).task(scene_of(row)) for row in rows)
    assert set(asked) == set(TASKS)
    assert (asked["board"], asked["video"]) == (40, 20)
    assert {len(row["answers"]) for row in rows} == {3, 4, 5}
    for row in rows:
        scene = scene_of(row)
        assert len(set(row["answers"])) == len(row["answers"])
        assert row["score"] == [score(scene, row["question"], text) for text in row["answers"]]
        assert row["reasons"] == [reason(scene, row["question"], text) for text in row["answers"]]


def test_an_option_is_right_and_another_one_tempting(world: Path) -> None:
    for row in read_questions(world, "train"):
        if (question := Question.parse(row["question"])).kind == "choice":
            cell = scene_of(row)[0][question.place - 1][question.column - 1]
            assert len(set(question.options)) == 4
            assert {cell, 0 if cell is None else None} <= set(question.options)


def test_annotators_are_wrong_about_some_pairs_and_right_about_most(world: Path) -> None:
    pairs = [
        (row["score"][i] - row["score"][j], row["rank"][i] < row["rank"][j])
        for row in read_questions(world, "train")
        for i in range(len(row["rank"]))
        for j in range(len(row["rank"]))
        if row["score"][i] > row["score"][j]
    ]
    close, clear = ([right for difference, right in pairs if (difference > 1) == far] for far in (False, True))
    assert 0.7 < sum(close) / len(close) < 0.97  # sigmoid(1 / 0.5) is 0.88
    assert sum(close) / len(close) < sum(clear) / len(clear)


@pytest.mark.parametrize("split", SPLITS)
def test_the_world_goes_through_prepare_with_ranks_scores_and_clips(world: Path, tmp_path: Path, split: str) -> None:
    assert prepared(world, split, tmp_path / split) == GROUPS[split]
    rows = {row["id"]: row for row in read_questions(world, split)}
    for group in open_dataset(str(tmp_path / split)).groups():
        row = rows[group.id]
        said = list(zip(row["answers"], row["score"], row["reasons"], row["rank"], strict=True))
        by_rank = sorted(said, key=lambda one: one[3])
        assert [(r.text, r.score, r.reason) for r in group.responses] == [one[:3] for one in by_rank]
        assert len(group.pairs) == len(said) * (len(said) - 1) // 2
        (media,) = group.media
        assert (media.kind, len(media.sizes)) == (("video", 3) if "video" in row else ("image", 1))


def test_without_noise_the_margins_of_pairs_are_differences_in_claims(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    write_world(tmp_path / "world", plain_world(train_boards=12, held_out_boards=1, seed=3))
    assert prepared(tmp_path / "world", "train", tmp_path / "train") == 24
    for group in open_dataset(str(tmp_path / "train")).groups():
        right = [response.score for response in group.responses]
        assert right == sorted(right, reverse=True)
        expected = {(i, j): right[i] - right[j] for i in range(4) for j in range(4) if right[i] > right[j]}
        assert {(p.chosen, p.rejected): group.margin(p) for p in group.pairs} == expected


@pytest.mark.parametrize(
    ("config", "lines"),
    [
        # of WORLD_VERSION 2, which had no other world
        (plain_world(12, 5, seed=3), "37ccaf5348e621354283e31a13b7f4aa54c7b33c7c1d4dafe247d957ac002213"),
        (plain_world(1500, 100, seed=1), "2a26bd0805f0e97b55c34afd2afd7e6aa4943f808988c70a9312ec48fd69120c"),
    ],
)
def test_the_world_that_reward_models_were_measured_on_is_still_made(
    config: WorldConfig, lines: str, tmp_path: Path
) -> None:
    pytest.importorskip("sklearn")
    write_world(tmp_path / "world", config)
    found = hashlib.sha256(b"".join((tmp_path / "world" / f"{split}.jsonl").read_bytes() for split in SPLITS))
    assert found.hexdigest() == lines
    if config.train_boards == 12:
        pixels = hashlib.sha256()
        for file in sorted((tmp_path / "world" / "media").rglob("*.png")):
            pixels.update(file.relative_to(tmp_path / "world").as_posix().encode() + Image.open(file).tobytes())
        assert pixels.hexdigest() == "6e6af57c8ed7307c982095895240cdeca09103c70664d04b9e4f4e9b622f024b"


def test_a_rated_world_is_the_same_world_with_ratings_and_facts(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    plain = plain_world(12, 1, seed=3)
    for name, config in (("plain", plain), ("rated", dataclasses.replace(plain, rated=True))):
        write_world(tmp_path / name, config)
    rated = read_questions(tmp_path / "rated", "train")
    assert [
        {key: value for key, value in row.items() if key not in ("ratings", "facts")} for row in rated
    ] == read_questions(tmp_path / "plain", "train")
    assert {name for row in rated for each in row["ratings"] for name in each} == {
        "correctness", "completeness", "brevity"
    }  # fmt: skip
    assert "rated" not in json.loads((tmp_path / "plain" / "world.json").read_text())
    assert prepared(tmp_path / "rated", "train", tmp_path / "data", RATED_MAPPING) == 24
    for group in open_dataset(str(tmp_path / "data")).groups():
        row = next(row for row in rated if row["id"] == group.id)
        assert group.facts == tuple(row["facts"])
        of_text = dict(zip(row["answers"], row["ratings"], strict=True))
        assert all(dict(response.ratings) == of_text[response.text] for response in group.responses)


def test_the_same_configuration_makes_the_same_world_once(world: Path, tmp_path: Path) -> None:
    assert not write_world(world, SMALL)
    assert write_world(tmp_path / "again", SMALL)
    files = [file.relative_to(world) for file in sorted(world.rglob("*")) if file.is_file()]
    assert len(files) > 60
    assert all((tmp_path / "again" / file).read_bytes() == (world / file).read_bytes() for file in files)
    with pytest.raises(ValueError, match="something other than this world"):
        write_world(world, dataclasses.replace(SMALL, seed=4))


def test_a_world_of_an_earlier_version_is_not_taken_for_this_one(tmp_path: Path) -> None:
    (tmp_path / "world.json").write_text(json.dumps(dataclasses.asdict(SMALL), indent=2) + "\n")
    with pytest.raises(ValueError, match="something other than this world"):
        write_world(tmp_path, SMALL)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tasks": ()}, "tasks"),
        ({"tasks": ("row", "row")}, "each once"),
        ({"tasks": ("essay",)}, "essay"),
        ({"responses": (1, 3)}, "answers"),
        ({"responses": (4, 3)}, "answers"),
        ({"responses": (3, 6)}, "answers"),
        ({"noise": -1.0}, "negative"),
        ({"empty": 1.0}, "share"),
        ({"frames": 1}, "frames"),
        ({"more": -1}, "negative"),
    ],
)
def test_a_world_that_cannot_be_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WorldConfig(**fields)


def test_without_scikit_learn_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'mmrlhf-jax\[quickstart\]'"):
        write_world(tmp_path / "world", SMALL)
    assert not (tmp_path / "world").exists()
