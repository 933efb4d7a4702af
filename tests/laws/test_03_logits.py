"""Law 3, with the model: logits equal transformers' LlavaOnevisionForConditionalGeneration on random tiny weights."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
from PIL import Image
from tiny import TINY, random_params, write_tiny_directory
from torchvision_shim import mend_torchvision
from transformers_peer import group_of, image, load_processor, processed, video

from mmrlhf_jax.batch import Entry, Totals, pack
from mmrlhf_jax.data.media import decode
from mmrlhf_jax.groups import NEWLINE, Bucket, Group, Rendered
from mmrlhf_jax.models.llava_onevision import render as render_module
from mmrlhf_jax.models.llava_onevision import tiles as tiles_module
from mmrlhf_jax.models.llava_onevision.layout import image_layout, image_taps
from mmrlhf_jax.models.llava_onevision.model import Compute, hidden_states
from mmrlhf_jax.models.llava_onevision.render import LlavaOnevisionRenderer, load_renderer
from mmrlhf_jax.models.llava_onevision.tiles import image_tiles
from mmrlhf_jax.models.llava_onevision.weights import save_directory
from mmrlhf_jax.models.qwen2.model import unembedding

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
mend_torchvision()

BUCKET = Bucket(1, 37, 192, 16)
TOLERANCE = 1e-4
# width, height: one tile exactly, several exactly, wide, tall, reduced both ways, the largest canvas, tiny
SIZES = [(42, 42), (126, 84), (190, 100), (300, 20), (20, 300), (240, 200), (200, 240), (252, 252), (5, 3), (1, 1)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model")
    assert write_tiny_directory(path / "assets") == TINY
    save_directory(random_params(), path / "assets", path / "model")
    return str(path / "model")


@pytest.fixture(scope="module")
def theirs(directory):
    from transformers import LlavaOnevisionForConditionalGeneration

    return LlavaOnevisionForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def processor(directory):
    pytest.importorskip("torchvision")
    return load_processor(directory)


@pytest.fixture(scope="module")
def renderer(directory) -> LlavaOnevisionRenderer:
    return load_renderer(directory)


@pytest.fixture(scope="module")
def ours():
    """Rendered -> logits [prompt + response, V]."""

    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def logits(params, batch):
        hidden = hidden_states(params, TINY, batch, Compute())
        return hidden[0] @ unembedding(params.decoder, hidden.dtype).T

    def run(rendered: Rendered) -> np.ndarray:
        none = np.zeros((1, 1), np.float32)
        batch = pack(
            [Entry(0, rendered, none, none, np.zeros(1, np.int32), np.zeros(1, np.float32))],
            BUCKET,
            Totals(1, 1, 1, 1),
            responses=1,
            tokens_per_tile=TINY.tokens_per_tile,
            tile_size=TINY.tower.image_size,
        )
        out = np.asarray(logits(random_params(), batch))
        prompt, response = len(rendered.prompt), len(rendered.branches[0].token)
        return np.concatenate([out[:prompt], out[BUCKET.prompt : BUCKET.prompt + response]])

    return run


def their_logits(theirs, prompt: np.ndarray, rendered: Rendered, **pixels) -> np.ndarray:
    token = torch.from_numpy(np.concatenate([prompt, rendered.branches[0].token])[None]).long()
    with torch.no_grad():
        return theirs(input_ids=token, attention_mask=torch.ones_like(token), **pixels).logits[0].numpy()


def assert_equal_logits(theirs, processor, ours, renderer, group: Group) -> None:
    rendered = renderer.render(group, decode)
    prompt, pixels = processed(processor, group)
    np.testing.assert_array_equal(prompt, rendered.prompt)
    wanted = their_logits(theirs, prompt, rendered, **pixels)
    np.testing.assert_allclose(ours(rendered), wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_any_res_pictures(theirs, processor, ours, renderer, width, height):
    assert_equal_logits(theirs, processor, ours, renderer, group_of(image(width, height)))


def test_the_sizes_reach_every_branch_of_the_layout():
    layouts = [image_layout(*size, TINY) for size in SIZES]
    assert any(layout.unpadded[0] > 0 for layout in layouts), "bars above and below"
    assert any(layout.unpadded[1] > 0 for layout in layouts), "bars left and right"
    assert any(layout.unpadded[:2] == (0, 0) for layout in layouts), "no bars"
    reduced = [layout for layout in layouts if layout.reduced != layout.unpadded[2:]]
    assert len({layout.grid for layout in reduced}) > 1
    assert len({layout.grid for layout in layouts}) > 5


@pytest.mark.parametrize("sizes", [[(30, 90), (91, 30)], [(42, 42), (5, 3), (100, 100)]])
def test_several_pictures(theirs, processor, ours, renderer, sizes):
    group = group_of(*(image(*size, seed=n) for n, size in enumerate(sizes)))
    assert_equal_logits(theirs, processor, ours, renderer, group)


def test_text_only(theirs, processor, ours, renderer):
    assert_equal_logits(theirs, processor, ours, renderer, group_of())


@pytest.mark.parametrize("frames", [1, 4, 23])
def test_a_video_of_our_frames(theirs, ours, renderer, frames):
    """Its resizing differs by a level or two (see test_03_counts), so transformers is given our tiles."""
    rendered = renderer.render(group_of(video(frames, 64, 48)), decode)
    assert len(rendered.tiles) == min(frames, 10)
    pixels = (rendered.tiles.astype(np.float32) / 255 - TINY.pixel_mean) / TINY.pixel_std
    pixels = torch.from_numpy(pixels.astype(np.float32).transpose(0, 3, 1, 2)[None])
    wanted = their_logits(theirs, rendered.prompt, rendered, pixel_values_videos=pixels)
    np.testing.assert_allclose(ours(rendered), wanted, rtol=0, atol=TOLERANCE)


# --- seeded faults: each must show at the logits ------------------------------------------------------------------


def no_newline(patch):
    def taps(layout, first_tile, config):
        index, weight = image_taps(layout, first_tile, config)
        keep = index[:, 0] != NEWLINE
        return index[keep], weight[keep]

    patch.setattr(render_module, "image_taps", taps)


def tiles_by_column(patch):
    def tiles(image, layout, config):
        made = image_tiles(image, layout, config)
        order = np.arange(len(made) - 1).reshape(layout.grid).T.ravel()
        return np.concatenate([made[:1], made[1:][order]])

    patch.setattr(render_module, "image_tiles", tiles)


def width_and_height_swapped(patch):
    patch.setattr(render_module, "image_layout", lambda width, height, config: image_layout(height, width, config))


def unpadding_off_by_one(patch):
    def taps(layout, first_tile, config):
        top, left, height, width = layout.unpadded
        return image_taps(dataclasses.replace(layout, unpadded=(top - 1, left, height, width)), first_tile, config)

    patch.setattr(render_module, "image_taps", taps)


def nearest_pixels(patch):
    def resize(image, width, height):
        return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST))

    patch.setattr(tiles_module, "_resize", resize)


FAULTS = [no_newline, tiles_by_column, width_and_height_swapped, unpadding_off_by_one, nearest_pixels]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_shows_at_the_logits(monkeypatch, theirs, processor, ours, renderer, fault):
    group = group_of(image(190, 100))
    prompt, pixels = processed(processor, group)
    right = renderer.render(group, decode)
    wanted = their_logits(theirs, prompt, right, **pixels)[-len(right.branches[0].token) :]
    fault(monkeypatch)
    wrong = ours(renderer.render(group, decode))[-len(wanted) :]
    assert np.abs(wrong - wanted).max() > 10 * TOLERANCE
