"""Law 3, the half that needs no model: token counts, tiles and taps equal transformers' LLaVA-OneVision.

The counts and the tiles need transformers only; what needs torch is marked `parity`.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tiny import TINY
from torchvision_shim import mend_torchvision

from mmrlhf_jax.models.llava_onevision import tiles as tiles_module
from mmrlhf_jax.models.llava_onevision.config import LlavaOnevisionConfig
from mmrlhf_jax.models.llava_onevision.fresh import hf_config
from mmrlhf_jax.models.llava_onevision.layout import Taps, image_layout, image_taps, single_tile_taps, video_taps
from mmrlhf_jax.models.llava_onevision.tiles import frame_tiles, image_tiles, single_tile

mend_torchvision()

REAL = LlavaOnevisionConfig()
EXTREMES = [(1, 1), (12000, 50), (50, 12000), (1, 700), (700, 1), (42, 42), (252, 252), (253, 251), (43, 41)]

# Width, height, tiles, feature grid, tokens: measured on the released LLaVA-NeXT code with `anyres_max_9`.
TABLE = [
    (384, 384, 2, (27, 27), 1485),
    (200, 200, 2, (27, 27), 1485),
    (640, 480, 5, (40, 54), 2929),
    (480, 640, 5, (54, 40), 2943),
    (1024, 768, 7, (54, 73), 4725),
    (800, 600, 7, (54, 73), 4725),
    (1280, 720, 9, (54, 96), 5967),
    (1920, 1080, 16, (60, 108), 7269),
    (2000, 500, 13, (40, 162), 7249),
    (4000, 3000, 31, (70, 93), 7309),
    (2304, 2304, 37, (81, 81), 7371),
    (300, 1500, 5, (108, 21), 3105),
]


def random_sizes(count: int, largest: int, seed: int = 0) -> list[tuple[int, int]]:
    """(width, height), as many small ones as large ones."""
    exponents = np.random.default_rng(seed).uniform(0, np.log(largest), (count, 2))
    return [(int(w), int(h)) for w, h in np.exp(exponents).astype(int)]


def picture(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(("width", "height", "tiles", "grid", "tokens"), TABLE)
def test_counts_equal_the_released_code(width, height, tiles, grid, tokens):
    layout = image_layout(width, height, REAL)
    assert (layout.tiles, layout.reduced, layout.tokens) == (tiles, grid, tokens)
    assert len(image_taps(layout, 0, REAL)[0]) == tokens


def test_videos_and_several_pictures_have_the_released_code_s_counts():
    assert len(video_taps(10, 0, REAL)[0]) == 1961
    assert len(video_taps(32, 0, REAL)[0]) == 6273
    assert len(single_tile_taps(0, REAL)[0]) == 730


def test_counts_equal_transformers_for_2000_random_sizes():
    from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

    processor = object.__new__(
        LlavaOnevisionProcessor
    )  # its constructor wants a torch video processor; counting does not
    processor.image_processor = SimpleNamespace(image_grid_pinpoints=[list(p) for p in REAL.pinpoints])
    processor.num_image_tokens, processor.vision_aspect_ratio = REAL.tokens_per_tile, f"anyres_max_{REAL.max_tiles}"
    for width, height in random_sizes(2000, 13000):
        want = processor._get_number_of_features(height, width, REAL.tower.image_size, REAL.tower.image_size)
        assert image_layout(width, height, REAL).tokens == want, (width, height)


def pil_processor(config: LlavaOnevisionConfig):
    """transformers' processor, stopped before it leaves u8."""
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    side = config.tower.image_size
    return LlavaOnevisionImageProcessorPil(
        size={"height": side, "width": side},
        image_grid_pinpoints=[list(p) for p in config.pinpoints],
        image_mean=config.pixel_mean,
        do_rescale=False,
        do_normalize=False,
    )


def same_tiles(image: np.ndarray, tiles: np.ndarray, config: LlavaOnevisionConfig = TINY) -> bool:
    processed = pil_processor(config)(image, input_data_format="channels_last")  # or a height of 1 passes for a channel
    want = np.asarray(processed["pixel_values"][0]).transpose(0, 2, 3, 1)
    return want.shape == tiles.shape and want.dtype == tiles.dtype and bool((want == tiles).all())


@pytest.mark.parametrize(("width", "height"), EXTREMES + random_sizes(40, 900, seed=1))
def test_tiles_equal_transformers_pixel_for_pixel(width, height):
    image = picture(width, height)
    assert same_tiles(image, image_tiles(image, image_layout(width, height, TINY), TINY))


@pytest.mark.parametrize(("width", "height"), [(640, 480), (5, 900), (1500, 1100)])
def test_tiles_equal_transformers_at_the_real_size(width, height):
    image = picture(width, height)
    assert same_tiles(image, image_tiles(image, image_layout(width, height, REAL), REAL), REAL)


def test_one_of_several_pictures_equals_transformers():
    images = [picture(*size, seed=i) for i, size in enumerate([(30, 90), (91, 30), (64, 64), (1, 500)])]
    config = dataclasses.replace(TINY, pixel_mean=(0.481, 0.457, 0.408))
    want = pil_processor(config)([images])["pixel_values"]
    for image, tile in zip(images, want, strict=True):
        np.testing.assert_array_equal(single_tile(image, config), np.asarray(tile).transpose(0, 2, 3, 1))


def test_faults_in_the_tiles_are_caught(monkeypatch):
    width, height = 190, 100
    image, layout = picture(width, height), image_layout(width, height, TINY)
    tiles = image_tiles(image, layout, TINY)
    rows, columns = layout.grid
    assert rows != columns
    assert layout.offset[0] > 0
    assert same_tiles(image, tiles)

    order = np.arange(rows * columns).reshape(rows, columns).T.ravel()
    assert not same_tiles(image, np.concatenate([tiles[:1], tiles[1:][order]])), "tile order transposed"
    swapped = image_tiles(image.swapaxes(0, 1).copy(), image_layout(height, width, TINY), TINY)
    assert not same_tiles(image, swapped), "width and height swapped"
    shifted = dataclasses.replace(layout, offset=(layout.offset[0] - 1, layout.offset[1]))
    assert not same_tiles(image, image_tiles(image, shifted, TINY)), "padding off by one"

    def without_antialias(image, width, height):
        scale = (image.shape[1] / width, 0, 0, 0, image.shape[0] / height, 0)
        affine = Image.Transform.AFFINE, scale, Image.Resampling.BICUBIC
        return np.asarray(Image.fromarray(image).transform((width, height), *affine))

    monkeypatch.setattr(tiles_module, "_resize", without_antialias)
    assert not same_tiles(image, image_tiles(image, layout, TINY)), "antialias removed"


def gather(features: np.ndarray, newline: np.ndarray, taps: Taps) -> np.ndarray:
    """What the model does with taps: features [I, tokens_per_tile, D] -> tokens [T, D]."""
    rows = np.concatenate([features.reshape(-1, features.shape[-1]), newline[None]])
    index, weight = taps
    return np.einsum("tkd,tk->td", rows[index], weight)


def random_features(tiles: int, config: LlavaOnevisionConfig, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(tiles, config.tokens_per_tile, 3)).astype(np.float32)
    return features, rng.normal(size=3).astype(np.float32)


def same_tokens(width: int, height: int, taps: Taps, config: LlavaOnevisionConfig = TINY) -> bool:
    torch = pytest.importorskip("torch")
    from transformers import LlavaOnevisionConfig as HFConfig
    from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

    model = SimpleNamespace(config=HFConfig.from_dict(hf_config(config)))
    features, newline = random_features(image_layout(width, height, config).tiles, config)
    packed, _ = LlavaOnevisionModel.pack_image_features(
        model,
        [torch.from_numpy(features)],
        torch.tensor([[height, width]]),
        image_newline=torch.from_numpy(newline),
        vision_aspect_ratio=f"anyres_max_{config.max_tiles}",
    )
    have, want = gather(features, newline, taps), packed[0].numpy()
    return have.shape == want.shape and bool(np.abs(have - want).max() <= 1e-5)


@pytest.mark.parity
@pytest.mark.parametrize("config", [TINY, REAL], ids=["tiny", "real"])
def test_taps_equal_pack_image_features(config):
    largest, count = (1000, 150) if config is TINY else (6000, 25)
    sizes = random_sizes(count, largest, seed=2) + EXTREMES + [(6 * config.tower.image_size,) * 2]
    layouts = {size: image_layout(*size, config) for size in sizes}
    assert any(layout.reduced != layout.unpadded[2:] for layout in layouts.values())
    for size, layout in layouts.items():
        assert same_tokens(*size, image_taps(layout, 0, config), config), size


@pytest.mark.parity
def test_faults_in_the_taps_are_caught():
    width, height = 190, 100
    layout = image_layout(width, height, TINY)
    index, weight = image_taps(layout, 0, TINY)
    top, left, rows, columns = layout.unpadded
    assert layout.grid[0] != layout.grid[1]
    assert top > 0
    assert same_tokens(width, height, (index, weight))

    def changed(**fields) -> Taps:
        return image_taps(dataclasses.replace(layout, **fields), 0, TINY)

    text = index[:, 0] >= 0
    assert not same_tokens(width, height, (index[text], weight[text])), "newline dropped"
    assert not same_tokens(width, height, changed(unpadded=(top - 1, left, rows, columns))), "unpad off by one"
    assert not same_tokens(width, height, changed(grid=layout.grid[::-1])), "tile order transposed"
    swapped = image_taps(image_layout(height, width, TINY), 0, TINY)
    assert not same_tokens(width, height, swapped), "width and height swapped"


@pytest.mark.parity
def test_a_reduction_done_another_way_is_caught():
    layout = image_layout(240, 200, TINY)
    index, weight = image_taps(layout, 0, TINY)
    assert layout.reduced != layout.unpadded[2:]
    assert same_tokens(240, 200, (index, weight))
    nearest = (weight == weight.max(axis=1, keepdims=True)).astype(np.float32)
    assert not same_tokens(240, 200, (index, nearest / nearest.sum(axis=1, keepdims=True)))


@pytest.mark.parity
@pytest.mark.parametrize("config", [TINY, REAL], ids=["tiny", "real"])
def test_video_taps_equal_apply_pooling(config):
    torch = pytest.importorskip("torch")
    from transformers import LlavaOnevisionConfig as HFConfig
    from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

    features, newline = random_features(5, config)
    model = SimpleNamespace(config=HFConfig.from_dict(hf_config(config)))
    pooled = LlavaOnevisionModel.apply_pooling(model, torch.from_numpy(features)).numpy().reshape(-1, 3)
    have = gather(features, newline, video_taps(5, 0, config))
    np.testing.assert_allclose(have, np.concatenate([pooled, newline[None]]), atol=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize(("width", "height"), [(42, 42), (320, 240), (37, 20), (1280, 720)])
def test_frames_are_within_two_levels_of_the_torchvision_processor(width, height):
    """The same antialiased bicubic filter in another fixed-point arithmetic: about 1 % of the values differ."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("torchvision")
    from transformers import LlavaOnevisionVideoProcessor

    side = TINY.tower.image_size
    processor = LlavaOnevisionVideoProcessor(size={"height": side, "width": side}, do_rescale=False, do_normalize=False)
    frames = [picture(width, height, seed) for seed in range(3)]
    video = torch.from_numpy(np.stack(frames).transpose(0, 3, 1, 2))
    want = processor(videos=[video], return_tensors="pt")["pixel_values_videos"][0].numpy().transpose(0, 2, 3, 1)
    difference = np.abs(frame_tiles(frames, TINY).astype(int) - want.astype(int))
    assert difference.max() <= 2
    assert (difference > 0).mean() < 0.02
