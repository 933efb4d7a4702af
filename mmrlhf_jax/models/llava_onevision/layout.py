"""Where the tokens of a picture come from: the any-res layout of LLaVA-OneVision (arXiv 2408.03326), numpy only.

A tile is a square of `tower.image_size` pixels; the tower turns it into grid x grid feature rows (a "tile's tokens").
Every picture token is a weighted sum of up to four of those rows, its taps; plain copies, unpadding, newlines, the
reduction of `anyres_max_9` and video pooling are all taps. Reference: `pack_image_features`, `unpad_image` and
`apply_pooling` of transformers' modeling_llava_onevision, `select_best_resolution` and `get_patch_output_size` of its
image_processing_utils.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mmrlhf_jax.groups import NEWLINE
from mmrlhf_jax.models.llava_onevision.config import LlavaOnevisionConfig

Taps = tuple[np.ndarray, np.ndarray]  # index i32 [T, 4], weight f32 [T, 4]

REDUCTION_THRESHOLD = 1.1  # side ratio beyond which any-res features are reduced, in the reference


@dataclass(frozen=True, slots=True)
class ImageLayout:
    """How one any-res picture is cut into tiles and which of their features become tokens. Pairs are (height, width).

    canvas    the chosen any-res canvas, in pixels
    resized   the picture inside that canvas, in pixels
    offset    (top, left) of the resized picture on the canvas, in pixels
    grid      (rows, columns) of tiles; the thumbnail is one more, before them
    unpadded  (top, left, height, width) of the canvas' features that show the picture, in feature rows
    reduced   size of the feature grid that becomes tokens; smaller than the unpadded one beyond `max_tiles`
    tokens    thumbnail + reduced grid + one newline a row
    """

    canvas: tuple[int, int]
    resized: tuple[int, int]
    offset: tuple[int, int]
    grid: tuple[int, int]
    unpadded: tuple[int, int, int, int]
    reduced: tuple[int, int]
    tokens: int

    @property
    def tiles(self) -> int:
        return 1 + self.grid[0] * self.grid[1]


def image_layout(width: int, height: int, config: LlavaOnevisionConfig) -> ImageLayout:
    """The any-res layout of a picture of `width` x `height` pixels; the one place that counts and the one that packs.

    Raises ValueError for a side below 1 pixel.
    """
    if width < 1 or height < 1:
        raise ValueError(f"a picture of {width} x {height} pixels has no layout: both sides must be at least 1")
    side, patches = config.tower.image_size, config.tower.grid
    canvas = _best_canvas(width, height, config.pinpoints)
    resized = _fit(width, height, canvas)
    grid = canvas[0] // side, canvas[1] // side
    unpadded = _unpadded(width, height, patches * grid[0], patches * grid[1])
    reduced = _reduced(unpadded[2], unpadded[3], config.max_tiles * patches**2)
    return ImageLayout(
        canvas=canvas,
        resized=resized,
        offset=((canvas[0] - resized[0]) // 2, (canvas[1] - resized[1]) // 2),
        grid=grid,
        unpadded=unpadded,
        reduced=reduced,
        tokens=config.tokens_per_tile + reduced[0] * (reduced[1] + 1),
    )


def image_taps(layout: ImageLayout, first_tile: int, config: LlavaOnevisionConfig) -> Taps:
    """Taps of one any-res picture whose thumbnail is tile `first_tile` of its group.

    Returns (index i32 [T, 4], weight f32 [T, 4]), T = layout.tokens: the thumbnail's rows, then the feature grid row by
    row, each row closed by a newline. Row number = tile * tokens_per_tile + patch; an unused tap is index 0, weight 0.
    """
    patches = config.tower.grid
    top, left, height, width = layout.unpadded
    row_low, row_high, row_fraction = _bilinear_axis(height, layout.reduced[0])
    column_low, column_high, column_fraction = _bilinear_axis(width, layout.reduced[1])

    def feature(row: np.ndarray, column: np.ndarray) -> np.ndarray:
        row, column = top + row[:, None], left + column[None, :]
        tile = first_tile + 1 + (row // patches) * layout.grid[1] + column // patches
        return tile * config.tokens_per_tile + (row % patches) * patches + column % patches

    index, weight = _blend(feature, (row_low, row_high, row_fraction), (column_low, column_high, column_fraction))
    newline_index, newline_weight = _newlines(layout.reduced[0])
    index = np.concatenate([index, newline_index[:, None]], axis=1).reshape(-1, 4)
    weight = np.concatenate([weight, newline_weight[:, None]], axis=1).reshape(-1, 4)
    return _join(_copies(first_tile, config), (index, weight))


def single_tile_taps(first_tile: int, config: LlavaOnevisionConfig) -> Taps:
    """Taps of a picture that is one of several in a prompt: its one tile's rows and a newline, no any-res.

    Returns (index i32 [tokens_per_tile + 1, 4], weight f32 of the same shape).
    """
    return _join(_copies(first_tile, config), _newlines(1))


def video_taps(frames: int, first_tile: int, config: LlavaOnevisionConfig) -> Taps:
    """Taps of a video of `frames` tiles: each frame's grid pooled bilinearly to ceil(grid / 2), one newline at the end.

    Returns (index i32 [frames * ceil(grid / 2)^2 + 1, 4], weight f32 of the same shape). Raises ValueError without
    frames.
    """
    if frames < 1:
        raise ValueError(f"a video of {frames} frames has no tokens: it needs at least one")
    patches = config.tower.grid
    axis = _bilinear_axis(patches, math.ceil(patches / 2))
    index, weight = _blend(lambda row, column: row[:, None] * patches + column[None, :], axis, axis)
    index, weight = index.reshape(-1, 4), weight.reshape(-1, 4)
    tile = first_tile + np.arange(frames, dtype=np.int32)
    every = np.where(weight[None] > 0, index[None] + tile[:, None, None] * config.tokens_per_tile, 0)
    return _join((every.reshape(-1, 4), np.tile(weight, (frames, 1))), _newlines(1))


def _best_canvas(width: int, height: int, pinpoints: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """Most picture pixels kept, then least canvas wasted; the first wins a tie. Pinpoints are (height, width)."""

    def merit(canvas: tuple[int, int]) -> tuple[int, int]:
        scale = min(canvas[1] / width, canvas[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - canvas[0] * canvas[1]

    return max(pinpoints, key=merit)  # max returns the first of equals


def _fit(width: int, height: int, canvas: tuple[int, int]) -> tuple[int, int]:
    """Largest (height, width) of the picture's aspect inside the canvas, rounded up."""
    scale_width, scale_height = canvas[1] / width, canvas[0] / height
    if scale_width < scale_height:
        return min(math.ceil(height * scale_width), canvas[0]), canvas[1]
    return canvas[0], min(math.ceil(width * scale_height), canvas[1])


def _unpadded(width: int, height: int, rows: int, columns: int) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the picture in a feature grid of rows x columns.

    Rounded to seven digits before truncation, as in the reference: 335.99999999 features are 336.
    """
    if width / height > columns / rows:
        top = (rows - int(round(height * (columns / width), 7))) // 2
        return top, 0, rows - 2 * top, columns
    left = (columns - int(round(width * (rows / height), 7))) // 2
    return 0, left, rows, columns - 2 * left


def _reduced(height: int, width: int, most: int) -> tuple[int, int]:
    ratio = math.sqrt(height * width / most)
    if ratio > REDUCTION_THRESHOLD:
        return int(height // ratio), int(width // ratio)
    return height, width


def _bilinear_axis(size: int, out: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Source rows low and high, and the weight of high, of each of `out` rows (align_corners=False, no antialias).

    In float32 because torch computes there for fp32 and bf16 features: float64 would move weights by 1e-5. With
    out == size it is the identity.
    """
    scale = np.float32(size) / np.float32(out)
    source = np.maximum(scale * (np.arange(out, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5), np.float32(0))
    low = np.minimum(source.astype(np.int32), size - 1)
    return low, np.minimum(low + 1, size - 1), np.clip(source - low, 0, 1).astype(np.float32)


def _blend(
    feature: Callable[[np.ndarray, np.ndarray], np.ndarray],
    rows: tuple[np.ndarray, ...],
    columns: tuple[np.ndarray, ...],
) -> Taps:
    """Four taps [rows, columns, 4] for each point of the product of two axes; `feature` makes row numbers of them."""
    (row_low, row_high, row_fraction), (column_low, column_high, column_fraction) = rows, columns
    one = np.float32(1)
    corners = [
        (row_low, one - row_fraction, column_low, one - column_fraction),
        (row_low, one - row_fraction, column_high, column_fraction),
        (row_high, row_fraction, column_low, one - column_fraction),
        (row_high, row_fraction, column_high, column_fraction),
    ]
    weight = np.stack([by_row[:, None] * by_column[None, :] for _, by_row, _, by_column in corners], axis=-1)
    index = np.stack([feature(row, column) for row, _, column, _ in corners], axis=-1)
    return np.where(weight > 0, index, 0).astype(np.int32), weight


def _copies(tile: int, config: LlavaOnevisionConfig) -> Taps:
    index = np.zeros((config.tokens_per_tile, 4), np.int32)
    weight = np.zeros((config.tokens_per_tile, 4), np.float32)
    index[:, 0] = tile * config.tokens_per_tile + np.arange(config.tokens_per_tile)
    weight[:, 0] = 1
    return index, weight


def _newlines(count: int) -> Taps:
    index, weight = np.zeros((count, 4), np.int32), np.zeros((count, 4), np.float32)
    index[:, 0], weight[:, 0] = NEWLINE, 1
    return index, weight


def _join(*parts: Taps) -> Taps:
    return np.concatenate([index for index, _ in parts]), np.concatenate([weight for _, weight in parts])
