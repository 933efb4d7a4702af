"""The files of a world, for launch/prepare.py:

    DIRECTORY/world.json                     what the world was made from
    DIRECTORY/{train,held_out}.jsonl         one question a line; read with --source mapped --map and `MAPPING`
    DIRECTORY/media/{train,held_out}/*.png   boards
    DIRECTORY/media/{train,held_out}/*/      clips, a directory of frames each

A line has the `question`, K `answers` by careless people, their exact `score` (right claims), the `rank` an annotator
gave them, who is now and then wrong, and `reasons`, the critiques of somebody who sees the true scene; `board` or
`frames` is what is true. In a world that is `rated` it has `ratings` too, an object attribute -> number for each answer
(measures.ratings), and `facts`, captions of what is shown. Held-out boards are other boards, made of digit images that
no training board shows.
"""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmrlhf_jax.data.digit_boards.answerers import Carelessness, annotated_ranks, answers
from mmrlhf_jax.data.digit_boards.boards import (
    CELLS,
    Board,
    Cell,
    Pictures,
    Scene,
    digits,
    frame_pictures,
    picture,
    random_board,
    random_clip,
)
from mmrlhf_jax.data.digit_boards.measures import facts, ratings, reason, score
from mmrlhf_jax.data.digit_boards.questions import LETTERS, TASKS, Question, Task

SPLITS = ("train", "held_out")
MAPPING = (
    "id=id", "image=image", "video=video", "prompt=question", "responses=answers", "rank=rank", "score=score",
    "reason=reasons",
)  # fmt: skip
RATED_MAPPING = (*MAPPING, "ratings=ratings", "facts=facts")
"""of a world that is `rated`"""
MOST_ANSWERS = 5  # every question has as many different ones
WORLD_VERSION = 3  # raise it whenever the same configuration would make other files


@dataclass(frozen=True)
class WorldConfig:
    """What a world is made from; the same configuration makes the same files."""

    train_boards: int = 1500
    held_out_boards: int = 100
    side: int = 3
    """rows and columns of a board"""
    empty: float = 0.4
    """share of cells without a digit"""
    held_out_digits: float = 0.25
    """share of the 1,797 digit images that only held-out boards show"""
    tasks: tuple[Task, ...] = TASKS
    """what is asked: of every board the whole of it and `more`, of other tasks; two things of a clip"""
    more: int = 2
    """questions about a board besides the whole of it, each of another task"""
    clips: float = 0.25
    """clips for each board, where `video` is among the tasks"""
    frames: int = 3
    """of a clip"""
    responses: tuple[int, int] = (3, 5)
    """fewest and most answers to a question, each number being as likely"""
    careless: Carelessness = field(default_factory=Carelessness)
    noise: float = 0.5
    """of an annotator who ranks: an answer worse by d claims is put above with probability sigmoid(-d / noise)"""
    seed: int = 0
    rated: bool = False
    """whether lines have `ratings` and `facts`; the rest of them is the same either way"""

    def __post_init__(self) -> None:
        if self.train_boards < 1 or self.held_out_boards < 1 or self.side < 2:
            raise ValueError("a world needs at least one board in each split, and boards of at least 2 x 2 cells")
        shares = {"empty": self.empty, "held_out_digits": self.held_out_digits, "terse": self.careless.terse}
        for name, value in {**shares, "habit": self.careless.habit, "misread": self.careless.misread}.items():
            if not 0 < value < 1:
                raise ValueError(f"{name} is {value}; it is a share between 0 and 1")
        if not 0 <= self.careless.refuse < 1 or min(self.noise, self.clips, self.more) < 0:
            raise ValueError("refuse is a share, below 1; noise, clips and more may be 0, not negative")
        if not self.tasks or len(set(self.tasks)) < len(self.tasks) or not set(self.tasks) <= set(TASKS):
            raise ValueError(
                f"tasks are {', '.join(self.tasks) or 'missing'}; name some of {', '.join(TASKS)}, each once"
            )
        if not 2 <= self.responses[0] <= self.responses[1] <= MOST_ANSWERS or self.frames < 2:
            raise ValueError(f"a question has 2 to {MOST_ANSWERS} answers, fewest first; a clip has at least 2 frames")


def plain_world(train_boards: int, held_out_boards: int, seed: int) -> WorldConfig:
    """The world that `launch/reward_quickstart.py` has been measured on: pictures only, four answers, exact ranks."""
    return WorldConfig(
        train_boards, held_out_boards, tasks=("board", "row", "empty"), more=1, responses=(4, 4),
        careless=Carelessness(refuse=0.0), noise=0.0, seed=seed,
    )  # fmt: skip


def scene_of(row: dict[str, Any]) -> Scene:
    """The true scene of a line that `write_world` wrote."""
    frames = row["frames"] if "frames" in row else [row["board"]]
    return tuple(tuple(tuple(cells) for cells in board) for board in frames)


def read_questions(directory: Path, split: str) -> list[dict[str, Any]]:
    """The lines of one split: `id`, `image` or `video`, `question`, `answers`, `rank`, `score`, `reasons`, and `board`
    or `frames`."""
    return [json.loads(line) for line in (directory / f"{split}.jsonl").read_text().splitlines()]


def write_world(directory: Path, config: WorldConfig) -> bool:
    """Makes the world in `directory`; False where it is there already.

    Raises ValueError when scikit-learn is missing or the directory holds another world.
    """
    options = dataclasses.asdict(config)
    if not config.rated:
        del options["rated"]  # such a world is the one that was made before there were others
    stated = json.dumps({"version": WORLD_VERSION, **options}, indent=2) + "\n"
    if directory.exists():
        if not (directory / "world.json").exists() or (directory / "world.json").read_text() != stated:
            raise ValueError(f"{directory} holds something other than this world: name another directory")
        return False
    aside = directory.with_name(f".{directory.name}.writing")  # a world appears only when whole
    shutil.rmtree(aside, ignore_errors=True)
    own = digits(config.held_out_digits, config.seed)
    for split, count, pictures in zip(SPLITS, (config.train_boards, config.held_out_boards), own, strict=True):
        media = aside / "media" / split
        media.mkdir(parents=True)
        with (aside / f"{split}.jsonl").open("w") as file:
            for rows in (_boards, _clips):
                file.writelines(json.dumps(row) + "\n" for row in rows(split, count, pictures, media, config))
    (aside / "world.json").write_text(stated)
    aside.rename(directory)
    return True


Rows = Iterator[dict[str, Any]]


def _boards(split: str, count: int, pictures: Pictures, media: Path, config: WorldConfig) -> Rows:
    """The questions about `count` boards; their pictures are written on the way."""
    rng = random.Random(f"{split} {config.seed}")
    for number in range(0 if config.tasks == ("video",) else count):
        board = random_board(config.side, config.empty, rng)
        name = f"{number:05d}.png"
        picture(board, pictures, rng).save(media / name)
        for question in _questions(board, config, rng):
            yield {
                "id": f"{split}-{number:05d}-{question.task((board,))}",
                "image": f"{split}/{name}",
                **_answered((board,), question, config, rng),
                "board": board,
            }


def _clips(split: str, count: int, pictures: Pictures, media: Path, config: WorldConfig) -> Rows:
    """The questions about the clips that go with `count` boards: the last frame, and a cell that changed."""
    rng = random.Random(f"{split} clips {config.seed}")
    for number in range(round(count * config.clips) if "video" in config.tasks else 0):
        scene = random_clip(config.side, config.frames, config.empty, rng)
        name = f"clip-{number:05d}"
        (media / name).mkdir()
        for place, frame in enumerate(frame_pictures(scene, config.side, pictures, rng)):
            frame.save(media / name / f"{place:03d}.png")
        for question in (Question("last"), Question("cell", *rng.choice(_changed(scene)))):
            yield {
                "id": f"{split}-{name}-{question.kind}",
                "video": f"{split}/{name}",
                **_answered(scene, question, config, rng),
                "frames": scene,
            }


def _questions(board: Board, config: WorldConfig, rng: random.Random) -> list[Question]:
    """The whole board, and more: the empty cells, or (on three rows) three times as likely each of the other tasks."""
    rows = range(1, config.side + 1)
    pool: list[tuple[Task, Question | None]] = []
    pool += [("row", Question("row", place)) for place in rows] if "row" in config.tasks else []
    pool += [("empty", Question("empty"))] if "empty" in config.tasks else []
    pool += [(task, None) for task in ("choice", "unanswerable") if task in config.tasks for _ in rows]
    asked = [Question("board")] if "board" in config.tasks else []
    for _ in range(config.more):
        if pool:
            task, question = rng.choice(pool)
            asked.append(question or _drawn(task, board, rng))
            pool = [other for other in pool if other[0] != task]
    return asked


def _drawn(task: Task, board: Board, rng: random.Random) -> Question:
    """A question of a task that chance has a part in."""
    side = len(board)
    if task == "unanswerable":
        absent = Question("row", side + rng.randint(1, 3))
        return rng.choice([absent, Question("writer", rng.randint(1, side)), Question("behind")])
    row, column = rng.randrange(side), rng.randrange(side)
    return Question("choice", row + 1, column + 1, _options(board[row][column], rng))


def _options(cell: Cell, rng: random.Random) -> tuple[Cell, ...]:
    """What is right, what a careless person would see, and others, in any order."""
    tempting = None if cell is not None else 0
    others = rng.sample([other for other in CELLS if other not in (cell, tempting)], len(LETTERS) - 2)
    options = [cell, tempting, *others]
    rng.shuffle(options)
    return tuple(options)


def _changed(scene: Scene) -> list[tuple[int, int]]:
    """Rows and columns, counted from 1, of the cells that are not the same in all frames."""
    sides = range(len(scene[0]))
    return [(r + 1, c + 1) for r in sides for c in sides if len({board[r][c] for board in scene}) > 1]


def _answered(scene: Scene, question: Question, config: WorldConfig, rng: random.Random) -> dict[str, Any]:
    """What is asked and what was said to it."""
    fewest, most = config.responses
    count = fewest if fewest == most else rng.randint(fewest, most)
    said = answers(scene, question, count, config.careless, rng)
    scores = [score(scene, question.text, text) for text in said]
    more: dict[str, Any] = {}
    if config.rated:
        more = {"ratings": [ratings(scene, question.text, text) for text in said], "facts": facts(scene)}
    return {
        "question": question.text,
        "answers": said,
        "rank": annotated_ranks(scores, config.noise, rng),
        "score": scores,
        "reasons": [reason(scene, question.text, text) for text in said],
        **more,
    }
