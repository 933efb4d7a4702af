"""Taps and layouts against a reference written with loops; law 3 compares them with transformers itself."""

from __future__ import annotations

import numpy as np
import pytest
from tiny import TINY

from mmrlhf_jax.groups import NEWLINE
from mmrlhf_jax.models.llava_onevision.config import LlavaOnevisionConfig
from mmrlhf_jax.models.llava_onevision.layout import Taps, image_layout, image_taps, single_tile_taps, video_taps

REAL = LlavaOnevisionConfig()
SIZES = [(42, 42), (190, 100), (100, 190), (250, 250), (240, 130), (7, 300), (1, 1), (500, 333)]


def gathered(features: np.ndarray, taps: Taps) -> np.ndarray:
    """Tokens from features [I, tokens_per_tile] of one number each; a newline is worth 1000."""
    index, weight = taps
    return (np.append(features.ravel(), 1000.0)[index] * weight).sum(axis=1)


def bilinear(grid: np.ndarray, height: int, width: int) -> np.ndarray:
    def along(size: int, out: int, at: int) -> tuple[int, int, float]:
        source = max((at + 0.5) * size / out - 0.5, 0.0)
        low = int(source)
        return low, min(low + 1, size - 1), source - low

    result = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            top, bottom, down = along(grid.shape[0], height, y)
            left, right, across = along(grid.shape[1], width, x)
            upper = grid[top, left] * (1 - across) + grid[top, right] * across
            lower = grid[bottom, left] * (1 - across) + grid[bottom, right] * across
            result[y, x] = upper * (1 - down) + lower * down
    return result


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_a_picture_s_tokens_are_the_thumbnail_then_rows_closed_by_newlines(width, height):
    layout = image_layout(width, height, TINY)
    features = np.random.default_rng(0).normal(size=(layout.tiles, TINY.tokens_per_tile))
    patches, (rows, columns) = TINY.tower.grid, layout.grid
    canvas = np.zeros((rows * patches, columns * patches))
    for tile in range(rows * columns):
        y, x = divmod(tile, columns)
        square = features[1 + tile].reshape(patches, patches)
        canvas[y * patches : (y + 1) * patches, x * patches : (x + 1) * patches] = square
    top, left, inner_height, inner_width = layout.unpadded
    kept = bilinear(canvas[top : top + inner_height, left : left + inner_width], *layout.reduced)
    want = [*features[0], *np.pad(kept, ((0, 0), (0, 1)), constant_values=1000.0).ravel()]
    np.testing.assert_allclose(gathered(features, image_taps(layout, 0, TINY)), want, atol=1e-4)


def test_a_video_is_pooled_frame_by_frame_and_closed_by_one_newline():
    features = np.random.default_rng(0).normal(size=(4, TINY.tokens_per_tile))
    pooled = [bilinear(frame.reshape(3, 3), 2, 2).ravel() for frame in features]
    want = np.append(np.concatenate(pooled), 1000.0)
    np.testing.assert_allclose(gathered(features, video_taps(4, 0, TINY)), want, atol=1e-5)


def test_one_of_several_pictures_is_its_tile_and_a_newline():
    features = np.random.default_rng(0).normal(size=(2, TINY.tokens_per_tile))
    np.testing.assert_allclose(gathered(features, single_tile_taps(1, TINY)), [*features[1], 1000.0], atol=1e-6)


@pytest.mark.parametrize("first_tile", [0, 5])
def test_taps_point_into_their_own_tiles(first_tile):
    for width, height in SIZES:
        layout = image_layout(width, height, TINY)
        for (index, weight), tiles in [
            (image_taps(layout, first_tile, TINY), layout.tiles),
            (single_tile_taps(first_tile, TINY), 1),
            (video_taps(3, first_tile, TINY), 3),
        ]:
            assert (index.dtype, weight.dtype) == (np.int32, np.float32)
            np.testing.assert_allclose(weight.sum(axis=1), 1, atol=1e-6)
            assert (index[weight == 0] == 0).all()
            assert (index[index[:, 0] == NEWLINE] == [NEWLINE, 0, 0, 0]).all()
            tile = index[(weight > 0) & (index != NEWLINE)] // TINY.tokens_per_tile
            assert set(tile.tolist()) <= set(range(first_tile, first_tile + tiles))
            assert first_tile in tile


def test_without_reduction_every_token_is_one_row():
    layout = image_layout(640, 480, REAL)
    assert layout.reduced == layout.unpadded[2:]
    index, weight = image_taps(layout, 0, REAL)
    assert (weight == [1, 0, 0, 0]).all()
    rows = index[index[:, 0] != NEWLINE, 0]
    assert len(set(rows.tolist())) == len(rows)


def test_a_reduced_picture_has_at_most_the_budget_of_tokens():
    layout = image_layout(4000, 3000, REAL)
    height, width = layout.reduced
    assert height * width <= REAL.max_tiles * REAL.tokens_per_tile < layout.unpadded[2] * layout.unpadded[3]


@pytest.mark.parametrize(("width", "height"), [(0, 5), (5, 0), (-1, 5)])
def test_a_picture_without_pixels_is_refused(width, height):
    with pytest.raises(ValueError, match=f"{width} x {height} pixels"):
        image_layout(width, height, TINY)


def test_a_video_without_frames_is_refused():
    with pytest.raises(ValueError, match="0 frames"):
        video_taps(0, 0, TINY)
