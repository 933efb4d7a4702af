"""Boards of real handwritten digits, and clips of boards that change.

A board is a rectangle of cells, each empty or holding one digit of scikit-learn's bundled `load_digits` (8 x 8 pixels,
https://archive.ics.uci.edu/dataset/80). What is shown to somebody is a scene: one board, a picture, or several, the
frames of a clip. The images do not say who wrote them, so the splits share no image, though they share writers.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

CELL = 8  # pixels

Cell = int | None
Board = tuple[tuple[Cell, ...], ...]
Scene = tuple[Board, ...]
Pictures = Mapping[int, Sequence[np.ndarray]]
CELLS: tuple[Cell, ...] = (None, *range(10))

_BLANK = np.zeros((CELL, CELL), np.uint8)


def digits(held_out_share: float, seed: int) -> tuple[Pictures, Pictures]:
    """The digit images u8 [8, 8] of training and of held-out boards, by digit; no image is in both.

    Raises ValueError when scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError(
            "the digits come with scikit-learn, which is not installed: pip install 'mmrlhf-jax[quickstart]'"
        ) from error
    found = load_digits()
    pixels = np.minimum(found.images * 16, 255).astype(np.uint8)  # 17 levels of ink
    order = np.random.default_rng(seed).permutation(len(pixels))
    held_out, train = np.split(order, [round(len(order) * held_out_share)])

    def by_digit(own: np.ndarray) -> Pictures:
        return {digit: [pixels[i] for i in own if found.target[i] == digit] for digit in range(10)}

    return by_digit(train), by_digit(held_out)


def random_board(side: int, empty: float, rng: random.Random) -> Board:
    """`side` x `side` cells, the share `empty` of them without a digit."""
    return tuple(tuple(None if rng.random() < empty else rng.randrange(10) for _ in range(side)) for _ in range(side))


def picture(board: Board, pictures: Pictures, rng: random.Random) -> Image.Image:
    """White ink on black, one handwritten digit a cell."""
    cells = [[_BLANK if cell is None else rng.choice(pictures[cell]) for cell in row] for row in board]
    return Image.fromarray(np.block(cells)).convert("RGB")


def random_clip(side: int, frames: int, empty: float, rng: random.Random) -> Scene:
    """Boards of ceil(side / 2) rows and columns; from each frame to the next one cell changes."""
    scene = [random_board(math.ceil(side / 2), empty, rng)]
    while len(scene) < frames:
        cells = [list(row) for row in scene[-1]]
        row, column = rng.randrange(len(cells)), rng.randrange(len(cells))
        cells[row][column] = rng.choice([cell for cell in CELLS if cell != cells[row][column]])
        scene.append(tuple(map(tuple, cells)))
    return tuple(scene)


def frame_pictures(scene: Scene, side: int, pictures: Pictures, rng: random.Random) -> list[Image.Image]:
    """The frames of a clip, as large as the picture of a board of `side` rows: its rows and columns stand a cell apart.

    LLaVA-OneVision halves the grid of a frame by bilinear pooling; so each cell keeps a token that shows no other cell.
    A digit that stays is the same handwriting in every frame.
    """
    ink: dict[tuple[int, int, Cell], np.ndarray] = {}
    images: list[Image.Image] = []
    for board in scene:
        frame = np.zeros((side, side, CELL, CELL), np.uint8)
        for row, cells in enumerate(board):
            for column, cell in enumerate(cells):
                if (row, column, cell) not in ink:
                    ink[row, column, cell] = _BLANK if cell is None else rng.choice(pictures[cell])
                frame[2 * row, 2 * column] = ink[row, column, cell]
        images.append(Image.fromarray(frame.transpose(0, 2, 1, 3).reshape(side * CELL, side * CELL)).convert("RGB"))
    return images
