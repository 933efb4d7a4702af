"""Pixels of the tiles a picture or video becomes: raw u8, normalised later on the device. Pillow and numpy only.

Equal, pixel for pixel, to what transformers' LlavaOnevisionImageProcessorPil computes before it rescales and normalises
(bicubic on u8; that class resizes each tile once more to its own size, which changes nothing). Frames of a video are
resized by torchvision there: the same antialiased bicubic filter in another fixed-point arithmetic. On random and
smooth frames about 1 % of the values differ, by at most 2 of 255 levels (tests/laws/test_03_counts.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from mmrlhf_jax.models.llava_onevision.config import LlavaOnevisionConfig
from mmrlhf_jax.models.llava_onevision.layout import ImageLayout


def image_tiles(image: np.ndarray, layout: ImageLayout, config: LlavaOnevisionConfig) -> np.ndarray:
    """Any-res tiles of a picture u8 [H, W, 3]: u8 [layout.tiles, S, S, 3], the thumbnail, then tiles row by row.

    The thumbnail is the whole picture squeezed into a square; the tiles cut a black canvas that holds the picture,
    resized in proportion, at its centre.
    """
    side = config.tower.image_size
    height, width = layout.resized
    top, left = layout.offset
    canvas = np.zeros((*layout.canvas, 3), np.uint8)
    canvas[top : top + height, left : left + width] = _resize(image, width, height)
    rows, columns = layout.grid
    cut = canvas.reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
    return np.concatenate([_resize(image, side, side)[None], cut])


def single_tile(image: np.ndarray, config: LlavaOnevisionConfig) -> np.ndarray:
    """The one tile u8 [1, S, S, 3] of a picture u8 [H, W, 3] that shares its prompt with others.

    The picture is centred on a square of the mean colour and resized.
    """
    height, width = image.shape[:2]
    longest = max(height, width)
    square = np.empty((longest, longest, 3), np.uint8)
    square[:] = [int(channel * 255) for channel in config.pixel_mean]
    top, left = (longest - height) // 2, (longest - width) // 2
    square[top : top + height, left : left + width] = image
    return _resize(square, config.tower.image_size, config.tower.image_size)[None]


def frame_tiles(frames: Sequence[np.ndarray], config: LlavaOnevisionConfig) -> np.ndarray:
    """Frames u8 [H, W, 3] each, squeezed into squares: u8 [frames, S, S, 3]."""
    side = config.tower.image_size
    return np.stack([_resize(frame, side, side) for frame in frames])


def _resize(image: np.ndarray, width: int, height: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
