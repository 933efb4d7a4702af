"""Law 10: decoding with the cache == full forward; shared-prefix branches == one at a time; greedy == transformers'."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_groups import rendered
from tiny import TINY, random_params, write_tiny_directory
from torchvision_shim import mend_torchvision
from transformers_peer import group_of, image, load_processor, processed, video

from mmrlhf_jax.batch import Entry, Totals, pack
from mmrlhf_jax.data.media import decode as decode_picture
from mmrlhf_jax.groups import Branch, Bucket, Rendered
from mmrlhf_jax.inference.engine import DecodeConfig, Request, Samples, decode, with_forced_prefix
from mmrlhf_jax.inference.sample import SamplingConfig, branch_keys, pick, request_key
from mmrlhf_jax.models.llava_onevision.model import Compute, declare, hidden_states
from mmrlhf_jax.models.llava_onevision.render import load_renderer
from mmrlhf_jax.models.llava_onevision.weights import save_directory
from mmrlhf_jax.models.qwen2.model import unembedding
from mmrlhf_jax.nn import params as nn_params
from mmrlhf_jax.nn.sharding import MeshConfig, ShardingRules, make_mesh

CLOSING, SAMPLES = (7, 3), 4
STOP = tuple(range(5, 320, 20))  # a twentieth of the vocabulary: about half of the branches meet one
GREEDY = SamplingConfig(max_new_tokens=12)
DRAWN = SamplingConfig(max_new_tokens=12, temperature=1.3, top_k=200, top_p=0.95, seed=5)
RUN = DecodeConfig(branches_per_device=16, max_buckets=2, multiple=16)


def read_score(params, hidden):
    return hidden @ params.newline


def weights(seed: int = 3):
    """Unembedding rows four times as long as they start: probabilities far from even, ties far from rounding."""
    params = random_params(seed=seed)
    table = np.asarray(params.decoder.unembedding) * 4
    return dataclasses.replace(params, decoder=dataclasses.replace(params.decoder, unembedding=table))


@pytest.fixture(scope="module")
def groups() -> list[Rendered]:
    """A picture, text alone and two pictures, with 4, 4 and 2 forced prefixes of many lengths."""
    rng = np.random.default_rng(0)
    return [
        rendered(rng, TINY, tiles=2, text=9, lengths=(1, 4, 2, 7)),
        rendered(rng, TINY, tiles=0, text=21, lengths=(3, 3, 1, 1)),
        rendered(rng, TINY, tiles=1, text=5, lengths=(6, 2)),
    ]


def said(groups: list[Rendered], sampling: SamplingConfig, run: DecodeConfig = RUN, mesh=None, **changes):
    """What `decode` yields, in order."""
    mesh = mesh or make_mesh(MeshConfig(), jax.devices()[:1])
    placed = nn_params.shardings(declare(TINY), mesh, ShardingRules())
    requests = [Request(group.lengths, lambda group=group: group, str(len(group.prompt))) for group in groups]
    settings = {"samples": SAMPLES, "closing": CLOSING, "read": read_score, "stop": STOP} | changes
    found = decode(
        requests,
        params=jax.tree.map(jax.device_put, weights(), placed),
        config=TINY,
        mesh=mesh,
        compute=Compute(),
        sampling=sampling,
        run=run,
        tokens_per_tile=TINY.tokens_per_tile,
        tile_size=TINY.tower.image_size,
        **settings,
    )
    return [samples for _, samples in sorted(found, key=lambda item: item[0])]


@pytest.fixture(scope="module")
def drawn(groups) -> list[Samples]:
    return said(groups, DRAWN)


@jax.jit
def full_forward(params, batch):
    """The teacher-forced group, without a cache: hidden states [P+S, D] and logits [P+S, V]."""
    hidden = hidden_states(params, TINY, batch, Compute())[0]
    return hidden, hidden @ unembedding(params.decoder, hidden.dtype).T


def one_forward(group: Rendered, continuations: list[np.ndarray]):
    """For each branch, a forced prefix and its continuation: hidden states and logits from the prefix's last on."""
    branches = tuple(Branch(token, np.ones(len(token), np.float32)) for token in continuations)
    k, bucket = len(branches), Bucket(1, 2, 48, 16 * 24)
    none, each = np.zeros((k, k), np.float32), np.zeros(k, np.float32)
    batch = pack(
        [Entry(0, dataclasses.replace(group, branches=branches), none, none, each.astype(np.int32), each)],
        bucket,
        Totals(1, 1, 1, 1),
        responses=k,
        tokens_per_tile=TINY.tokens_per_tile,
        tile_size=TINY.tower.image_size,
    )
    hidden, logits = map(np.asarray, full_forward(weights(), batch))
    ends = bucket.prompt + np.cumsum([len(token) for token in continuations])
    return [(hidden[end - len(t) : end], logits[end - len(t) : end]) for end, t in zip(ends, continuations)]


def assert_equal(found: list[Samples], wanted: list[Samples]) -> None:
    for mine, theirs in zip(found, wanted, strict=True):
        for prefix, other in zip(mine, theirs, strict=True):
            assert [(s.token, s.ended) for s in prefix] == [(s.token, s.ended) for s in other]
            np.testing.assert_allclose([s.score for s in prefix], [s.score for s in other], atol=1e-5)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_every_token_and_score_is_that_of_the_full_forward(groups, drawn, sampling):
    """Each branch's choices are made again from the logits of one teacher-forced forward over all of them."""
    answers = drawn if sampling is DRAWN else said(groups, sampling)
    assert {sample.ended for found in answers for prefix in found for sample in prefix} == {True, False}
    for group, found in zip(groups, answers, strict=True):
        flat = [(k, n, sample) for k, prefix in enumerate(found) for n, sample in enumerate(prefix)]
        tokens = [np.array([*group.branches[k].token, *s.token, *CLOSING], np.int32) for k, _, s in flat]
        for (k, n, sample), (hidden, logits) in zip(flat, one_forward(group, tokens), strict=True):
            first = len(group.branches[k].token) - 1
            count = len(sample.token) + sample.ended  # the stop token was chosen too
            chosen = chosen_again(logits[first : first + count], request_key(5, str(len(group.prompt))), k, n, sampling)
            assert tuple(chosen[: len(sample.token)]) == sample.token
            assert not sample.ended or chosen[-1] in STOP
            assert sample.ended or len(sample.token) == sampling.max_new_tokens
            np.testing.assert_allclose(sample.score, read_score(weights(), hidden[-1]), atol=1e-5)


def chosen_again(logits: np.ndarray, request: np.ndarray, k: int, n: int, sampling: SamplingConfig) -> list[int]:
    """Padded, so that it compiles once."""
    count, most = len(logits), sampling.max_new_tokens
    padded = jnp.asarray(np.resize(logits, (1, most, logits.shape[-1])))
    keys = branch_keys(jnp.asarray(request)[None], *(jnp.asarray(x)[None] for x in places(k, n, most)))
    return np.asarray(jax.jit(partial(pick, config=sampling))(padded, keys))[0, :count].tolist()


def places(k: int, n: int, most: int) -> tuple[np.ndarray, ...]:
    return np.full(most, k), np.full(most, n), np.arange(most)


def test_branches_draw_their_own_random_numbers(drawn):
    for found in drawn:
        tokens = [sample.token for prefix in found for sample in prefix]
        assert len(set(tokens)) > 0.8 * len(tokens)  # some stop at once


@pytest.mark.parametrize("width", [1, 3])
def test_sixteen_branches_are_those_said_one_at_a_time(groups, drawn, width):
    """Fewer slots than branches: the next waiting branch takes over a finished one's slot."""
    assert_equal(said(groups, DRAWN, dataclasses.replace(RUN, branches_per_device=width)), drawn)


def test_greedy_branches_are_those_of_separate_runs(groups):
    together = said(groups[:1], GREEDY, samples=1)[0]
    alone = [dataclasses.replace(groups[0], branches=(branch,)) for branch in groups[0].branches]
    for prefix, group in zip(together, alone, strict=True):
        assert_equal(said([group], GREEDY, samples=1), [(prefix,)])
    assert len({prefix[0].token for prefix in together}) == 4


@pytest.mark.parametrize(
    "changes", [{"branches_per_device": 40, "max_buckets": 1}, {"multiple": 48, "steps": 1}], ids=["rows", "padding"]
)
def test_rows_buckets_and_padding_change_nothing(groups, drawn, changes):
    assert_equal(said(groups[::-1], DRAWN, dataclasses.replace(RUN, **changes))[::-1], drawn)


def test_more_samples_begin_with_the_same(groups, drawn):
    more = said(groups[:1], DRAWN, samples=SAMPLES + 1)
    assert_equal([tuple(prefix[:SAMPLES] for prefix in more[0])], drawn[:1])


@pytest.mark.parametrize("mesh", [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(fsdp=8)], ids=["mixed", "fsdp"])
def test_devices_change_nothing(groups, drawn, mesh):
    run = dataclasses.replace(RUN, branches_per_device=4, max_buckets=1)
    assert_equal(said([*groups, *groups], DRAWN, run, make_mesh(mesh)), [*drawn, *drawn])


# --- transformers ------------------------------------------------------------------------------------------------


MOST = 24


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model")
    write_tiny_directory(path / "assets")
    save_directory(weights(), path / "assets", path / "model")
    return str(path / "model")


@pytest.fixture(scope="module")
def theirs(directory):
    mend_torchvision()
    torch = pytest.importorskip("torch")
    from transformers import LlavaOnevisionForConditionalGeneration

    return LlavaOnevisionForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()


def prompts(directory) -> dict[str, tuple[Rendered, dict]]:
    """Rendered prompts, and what transformers is given for them."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("torchvision")
    renderer, processor = load_renderer(directory), load_processor(directory)
    out = {}
    for name, media in {
        "any-res": [image(190, 100)],
        "several": [image(30, 90), image(91, 30, seed=1)],
        "video": [video(4, 64, 48)],
        "text": [],
    }.items():
        group = dataclasses.replace(group_of(*media), responses=())
        prompt = renderer.render(group, decode_picture)
        if name == "video":  # its resizing differs by a level or two, so transformers is given our tiles
            pixels = (prompt.tiles.astype(np.float32) / 255 - TINY.pixel_mean) / TINY.pixel_std
            inputs = {"pixel_values_videos": torch.from_numpy(pixels.astype(np.float32).transpose(0, 3, 1, 2)[None])}
        else:
            ids, inputs = processed(processor, group)
            np.testing.assert_array_equal(ids, prompt.prompt)
        out[name] = (prompt, inputs)
    return out


def their_answer(theirs, prompt: Rendered, inputs: dict, stop: tuple[int, ...]) -> tuple[tuple[int, ...], bool]:
    """Greedy tokens without the stop token, and whether it came; no choice of theirs may hang on rounding."""
    torch = pytest.importorskip("torch")
    ids = torch.from_numpy(prompt.prompt[None]).long()
    with torch.no_grad():
        out = theirs.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), **inputs, do_sample=False, max_new_tokens=MOST,
            eos_token_id=list(stop), pad_token_id=0, output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
    best = torch.stack(out.scores)[:, 0].topk(2).values
    assert (best[:, 0] - best[:, 1]).min() > 1e-3
    token = out.sequences[0, len(prompt.prompt) :].tolist()
    ended = token[-1] in stop
    return tuple(token[: len(token) - ended]), ended


@pytest.mark.parity
def test_greedy_is_transformers_generate_token_for_token(directory, theirs):
    given = prompts(directory)
    stop = (TINY.decoder.vocab - 1,)
    whole = {name: their_answer(theirs, *prompt, stop)[0] for name, prompt in given.items()}
    assert len({token for answer in whole.values() for token in answer}) > 20
    stop = (*stop, whole["any-res"][9], whole["text"][MOST - 1])  # one that fires early, one that is the last allowed
    wanted = {name: their_answer(theirs, *prompt, stop) for name, prompt in given.items()}
    assert {ended for _, ended in wanted.values()} == {True, False}
    ours = said(
        [with_forced_prefix(prompt) for prompt, _ in given.values()],
        SamplingConfig(max_new_tokens=MOST),
        samples=1, closing=(), read=None, stop=stop,
    )  # fmt: skip
    found = {name: (samples[0][0].token, samples[0][0].ended) for name, samples in zip(given, ours, strict=True)}
    assert found == wanted
