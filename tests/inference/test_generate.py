"""Greedy answers are the argmax of the full forward, token by token, whoever else is in the batch."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny import TINY

from mmrlhf_jax.batch import Entry, Totals, pack
from mmrlhf_jax.data.media import decode
from mmrlhf_jax.groups import Branch, Bucket, Group, Media, Response, Turn
from mmrlhf_jax.inference.engine import DecodeConfig
from mmrlhf_jax.inference.generate import Answer, answers_in_order, generate, stop_tokens
from mmrlhf_jax.inference.sample import SamplingConfig
from mmrlhf_jax.models.llava_onevision.model import Compute, hidden_states
from mmrlhf_jax.models.llava_onevision.render import LlavaOnevisionRenderer, load_renderer
from mmrlhf_jax.models.llava_onevision.weights import new_directory
from mmrlhf_jax.models.qwen2 import model as qwen2
from mmrlhf_jax.nn.sharding import MeshConfig, ShardingRules, make_mesh
from mmrlhf_jax.training.model import LoadedModel, load_model
from mmrlhf_jax.training.recipe import INFERENCE

GREEDY = SamplingConfig(max_new_tokens=6)
RUN = DecodeConfig(branches_per_device=2, max_buckets=1, multiple=16)
SMALL = dataclasses.replace(TINY, pinpoints=((42, 42), (42, 84)))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("generate") / "model"
    new_directory(path, SMALL, seed=1)
    return path


@pytest.fixture(scope="module")
def model(directory: Path) -> LoadedModel:
    return load_model(str(directory), one_device(), ShardingRules(), rates=INFERENCE, dtype="float32")


@pytest.fixture(scope="module")
def renderer(directory: Path) -> LlavaOnevisionRenderer:
    return load_renderer(str(directory))


def one_device() -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(), jax.devices()[:1])


def question(text: str, size: tuple[int, int] | None = None) -> Group:
    media: tuple[Media, ...] = ()
    if size:
        pixels = np.random.default_rng(sum(size)).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        media = (Media("image", "a.png", (size,), "", (file.getvalue(),)),)
    return Group(text, (Turn("user", text),), media, (Response("never looked at"),), (), ())


QUESTIONS = [question("What?", (50, 40)), question("A longer question, without a picture."), question("And?", (90, 40))]


def answers(groups: list[Group], renderer, model, sampling=GREEDY, run=RUN, mesh=None) -> list[Answer]:
    found = generate(groups, renderer, model, mesh or one_device(), Compute(), sampling, run)
    return [answer for (answer,) in answers_in_order(found)]


@jax.jit
def next_token(params, batch, slot) -> jax.Array:
    hidden = hidden_states(params, SMALL, batch, Compute())
    return jnp.argmax(hidden[0, batch.predictor[0, slot]] @ qwen2.unembedding(params.decoder, hidden.dtype).T)


def by_full_forwards(group: Group, renderer, model, stop: tuple[int, ...], most: int) -> tuple[int, ...]:
    """The same without anything clever: a forward over prompt and answer so far for each token."""
    said: list[int] = []
    bare = renderer.render(dataclasses.replace(group, responses=(Response(""),)), decode)
    none = np.zeros((1, 1), np.float32)
    for _ in range(most):
        so_far = np.array([*said, 0], np.int32)  # one slot more: it is where the next token is predicted
        rendered = dataclasses.replace(bare, branches=(Branch(so_far, np.ones(len(so_far), np.float32)),))
        batch = pack(
            [Entry(0, rendered, none, none, np.zeros(1, np.int32), none[0])],
            Bucket(1, 3, 128, most),
            Totals(1.0, 1.0, 1.0, 1.0),
            responses=1,
            tokens_per_tile=renderer.tokens_per_tile,
            tile_size=renderer.tile_size,
        )
        said.append(int(next_token(model.params, batch, len(said))))
        if said[-1] in stop:
            return tuple(said[:-1])
    return tuple(said)


def test_greedy_is_the_argmax_of_full_forwards(renderer, model) -> None:
    found = answers(QUESTIONS, renderer, model)
    expected = [by_full_forwards(group, renderer, model, stop_tokens(renderer), 6) for group in QUESTIONS]
    assert [answer.token for answer in found] == expected
    assert len(set(expected)) == 3  # the prompts matter


def test_an_answer_ends_at_its_first_stop_token(renderer, model, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = answers(QUESTIONS, renderer, model)
    assert not any(answer.ended for answer in whole)
    second = whole[0].token[1]
    monkeypatch.setattr("mmrlhf_jax.inference.generate.stop_tokens", lambda renderer: (second,))
    cut = answers(QUESTIONS, renderer, model)
    assert cut[0].ended
    assert cut[0].token == whole[0].token[: whole[0].token.index(second)]
    assert cut[0].text == renderer.tokenizer.decode(list(cut[0].token))
    for short, long in zip(cut, whole, strict=True):  # the others go on after it has ended
        assert short.token == (long.token[: long.token.index(second)] if short.ended else long.token)


@pytest.mark.parametrize("changes", [{"branches_per_device": 1}, {"max_buckets": 3}, {"multiple": 64}, {"steps": 1}])
def test_batches_and_padding_change_nothing(renderer, model, changes: dict) -> None:
    whole = answers(QUESTIONS, renderer, model)
    other = answers(QUESTIONS[::-1], renderer, model, run=dataclasses.replace(RUN, **changes))[::-1]
    assert [answer.token for answer in other] == [answer.token for answer in whole]


def test_devices_change_nothing(directory: Path, renderer, model) -> None:
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    split = load_model(str(directory), mesh, ShardingRules(), rates=INFERENCE, dtype="float32")
    assert answers(QUESTIONS, renderer, split, mesh=mesh) == answers(QUESTIONS, renderer, model)


def test_stop_tokens_are_those_that_close_a_turn_and_those_the_model_names(renderer) -> None:
    def names(renderer) -> set[str]:
        return {renderer.tokenizer.convert_ids_to_tokens(token) for token in stop_tokens(renderer)}

    assert names(renderer) == {"<|im_end|>", "<|endoftext|>"}
    assert names(dataclasses.replace(renderer, ends=())) == {"<|im_end|>"}


@pytest.mark.parametrize("stated", ["<|im_end|>", [True], -1, [10**9]])
def test_what_is_no_stop_token_is_refused(directory: Path, tmp_path: Path, stated) -> None:
    copy = Path(shutil.copytree(directory, tmp_path / "copy"))
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": stated}))
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id .* is no token"):
        load_renderer(str(copy))
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": None}))
    assert load_renderer(str(copy)).ends == ()


def test_a_prompt_that_leaves_no_room_is_refused(renderer, model) -> None:
    with pytest.raises(ValueError, match=r"prompt tokens and max_new_tokens 4090 exceed the model's 4096 positions"):
        answers(QUESTIONS, renderer, model, SamplingConfig(max_new_tokens=4090))


def test_no_prompt_no_answer(renderer, model) -> None:
    assert answers([], renderer, model) == []
