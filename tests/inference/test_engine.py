"""The engine's economy: what is compiled, held and stepped, and what it refuses."""

from __future__ import annotations

import dataclasses
import logging
import math
import re
import time

import jax
import numpy as np
import pytest
from random_groups import rendered
from tiny import TINY, random_params

from mmrlhf_jax.batch import Entry, Totals, pack
from mmrlhf_jax.groups import Branch, Bucket, Rendered
from mmrlhf_jax.inference import engine
from mmrlhf_jax.inference.decoding import Arrivals, Shape, blank, programs
from mmrlhf_jax.inference.engine import DecodeConfig, Progress, Request, decode, with_forced_prefix
from mmrlhf_jax.inference.sample import SamplingConfig
from mmrlhf_jax.models.llava_onevision.model import Compute, declare
from mmrlhf_jax.nn import params as nn_params
from mmrlhf_jax.nn.sharding import MeshConfig, ShardingRules, make_mesh
from mmrlhf_jax.training import peers
from mmrlhf_jax.training.runtime import to_devices

STOP = tuple(range(5, 320, 20))
RUN = DecodeConfig(branches_per_device=2, max_buckets=1, multiple=16)


def group(seed: int, lengths: tuple[int, ...] = (3, 1)) -> Rendered:
    return rendered(np.random.default_rng(seed), TINY, tiles=1, text=6, lengths=lengths)


def requests_of(groups: list[Rendered], rendering: list[int] | None = None) -> list[Request]:
    def render(index: int) -> Rendered:
        if rendering is not None:
            rendering.append(index)
        return groups[index]

    return [Request(g.lengths, lambda i=i: render(i), str(i)) for i, g in enumerate(groups)]


def start(requests: list[Request], *, run: DecodeConfig = RUN, params=None, mesh=None, **changes):
    settings = {"sampling": SamplingConfig(10, temperature=1.0), "samples": 1, "stop": STOP} | changes
    return decode(
        requests,
        params=random_params() if params is None else params,
        config=TINY,
        mesh=mesh or make_mesh(MeshConfig(), jax.devices()[:1]),
        compute=Compute(),
        run=run,
        tokens_per_tile=TINY.tokens_per_tile,
        tile_size=TINY.tower.image_size,
        **settings,
    )


def test_new_rows_and_new_runs_of_a_known_bucket_compile_nothing(caplog):
    list(start(requests_of([group(0)])))
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        list(start(requests_of([group(i, (2, 2)) for i in range(4)]), sampling=SamplingConfig(10, 1.0, seed=9)))
        assert [r.message for r in caplog.records if "compil" in r.message.lower()] == []
        list(start(requests_of([group(0)]), sampling=SamplingConfig(11, 1.0)))
        assert any("Finished XLA compilation" in r.message for r in caplog.records)  # they would have been seen


def shape(**changes) -> Shape:
    sampling = SamplingConfig(max_new_tokens=32)
    known = Shape(
        TINY, Compute(), sampling, (1,), (), None, shards=1, rows=1, slots=4, prefix=1024, responses=4, samples=1
    )
    return dataclasses.replace(known, **changes)


def held(shape: Shape) -> int:
    """Bytes of keys and values."""
    state = jax.eval_shape(lambda: blank(shape))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.cache))


def test_memory_is_one_prefix_and_what_each_branch_may_say():
    token = 2 * TINY.decoder.layers * TINY.decoder.kv_heads * TINY.decoder.head_dim * 4
    assert held(shape()) == token * (1024 + 4 * 33)
    assert held(shape(slots=16, samples=4)) == token * (1024 + 16 * 33)
    assert held(shape(slots=16, samples=64)) == token * (1024 + 16 * 33)  # waiting branches cost nothing


def test_a_step_copies_no_prefix_to_a_branch():
    """Temporary memory of the whole loop stays below a few prefixes, with 16 branches on each."""
    mesh, big = make_mesh(MeshConfig(), jax.devices()[:1]), shape(slots=16, samples=4, prefix=4096)
    with jax.set_mesh(mesh):
        made = programs(big, mesh)
        state = jax.eval_shape(made.blank)
        arguments = (np.zeros(1, bool), np.int32(1), np.int32(1))
        memory = made.run.lower(random_params(), state, *arguments).compile().memory_analysis()
    prefix = 2 * TINY.decoder.layers * TINY.decoder.kv_heads * TINY.decoder.head_dim * 4 * 4096
    assert memory.alias_size_in_bytes >= held(big)  # the state is updated in place
    scores = 16 * TINY.decoder.heads * 4096 * 4
    assert memory.temp_size_in_bytes < 3 * scores + 2 * prefix


def test_every_device_holds_its_rows_and_heads_and_never_more():
    """On 2 x 2 x 2 devices no keys or values of either program are more than a device's share of them."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    split = shape(shards=4, rows=2, slots=2, prefix=4096 + 512, sampling=SamplingConfig(8))
    params = jax.tree.map(jax.device_put, random_params(), nn_params.shardings(declare(TINY), mesh, ShardingRules()))
    made = programs(split, mesh)
    nothing = Entry(0, group(0, (1,) * 4), np.zeros((4, 4)), np.zeros((4, 4)), np.zeros(4), np.zeros(4))
    batch = pack(
        [nothing] * 4, Bucket(4, 1, 4096, 512), Totals(1, 1, 1, 1), responses=4,
        tokens_per_tile=TINY.tokens_per_tile, tile_size=TINY.tower.image_size,
    )  # fmt: skip
    each = np.zeros((4, 4), np.int32)
    arrivals = Arrivals(each[0], np.zeros((4, 2), np.uint32), each, each, each[0])
    with jax.set_mesh(mesh):
        state = made.blank()
        admit = made.admit.lower(params, state, *to_devices((batch, arrivals), mesh))
        run = made.run.lower(params, state, *to_devices((np.zeros(4, bool), np.int32(1), np.int32(1)), mesh))
    share = state.cache.prefix_key.addressable_shards[0].data.shape
    assert share == (TINY.decoder.layers, 2, 1, 4608, 8)
    for lowered in (admit, run):
        shapes = {
            tuple(map(int, found.split(","))) for found in re.findall(r"f32\[([\d,]+)\]", lowered.compile().as_text())
        }
        caches = [math.prod(found) for found in shapes if {4608, TINY.decoder.head_dim} <= set(found)]
        assert max(caches) == math.prod(share)


def test_a_finished_branch_makes_room_for_the_next_at_once():
    """With two slots, eight branches of unlike length take about half the steps of one after the other."""
    looks: list[Progress] = []
    run = dataclasses.replace(RUN, steps=1)
    ((_, found),) = start(requests_of([group(1)]), run=run, samples=4, progress=looks.append)
    lengths = [len(sample.token) + sample.ended for prefix in found for sample in prefix]
    assert len(set(lengths)) > 3
    assert sum(lengths) / 2 <= len(looks) <= sum(lengths) / 2 + max(lengths)
    assert looks[-1].generated == sum(lengths)
    assert looks[-1].prefilled == group(1).lengths.prompt + 4


def test_groups_are_yielded_as_they_finish_and_rendered_shortly_before():
    rendering: list[int] = []
    stream = start(requests_of([group(i) for i in range(9)], rendering))
    index, found = next(stream)
    assert index == 0
    assert len(found) == 2
    assert len(rendering) < 9
    assert sorted([0, *(i for i, _ in stream)]) == list(range(9))


def test_a_stream_that_is_dropped_leaves_the_engine_usable():
    stream = start(requests_of([group(i) for i in range(9)]))
    next(stream)
    stream.close()
    assert len(list(start(requests_of([group(0)])))) == 1


def test_progress_counts_all_requests():
    looks: list[Progress] = []
    list(start(requests_of([group(i) for i in range(3)]), progress=looks.append))
    assert (looks[-1].done, looks[-1].total) == (3, 3)


def test_the_others_of_a_job_are_told_when_a_look_waits_for_data_and_when_it_may_take_any_time(monkeypatch):
    """What makes a host that hangs in a picture's disk known by name, within a minute."""
    monkeypatch.setattr(peers, "_here", here := peers._Here())
    peers.set_limits(peers.StuckConfig(step=40.0, other=3600.0))
    groups, waits, looks = [group(i) for i in range(6)], [], []

    def doing(what: str, **more: bool) -> None:
        peers.doing(what, **more)
        if what == "waiting for data":
            waits.append(here.place)

    def render(index: int) -> Rendered:
        until = time.monotonic() + 60
        while len(waits) <= index:  # until it is waited for
            assert time.monotonic() < until
            time.sleep(0.001)
        return groups[index]

    monkeypatch.setattr(engine, "doing", doing)
    requests = [Request(g.lengths, lambda i=i: render(i), str(i)) for i, g in enumerate(groups)]
    list(start(requests, progress=lambda now: looks.append(here.place)))
    assert len(waits) == len(groups)
    assert [place.step for place in looks] == list(range(1, len(looks) + 1))
    assert {place.what for place in looks} == {peers.STEP}
    # of the first look, which compiles, nothing tells how long it may take, nor of the next: it tells nothing itself
    assert [place.limit for place in looks] == [3600.0] * 2 + [40.0] * (len(looks) - 2)
    assert {place.limit for place in waits if place.step > 2} == {40.0}
    assert here.place == peers.Place(len(looks), peers.BEHIND, 3600.0)


def test_branches_without_an_end_are_given_as_they_stand():
    ((_, found),) = start(requests_of([group(0)]), stop=(319,), sampling=SamplingConfig(4))
    assert [(len(prefix[0].token), prefix[0].ended, prefix[0].score) for prefix in found] == [(4, False, None)] * 2


def test_a_prompt_hands_its_last_token_over():
    bare = group(0, ())
    forced = with_forced_prefix(bare)
    assert forced.lengths.prompt == bare.lengths.prompt - 1
    assert forced.branches[0].token.tolist() == [bare.prompt[-1]]
    with pytest.raises(ValueError, match="has 1 branches already"):
        with_forced_prefix(forced)
    picture = dataclasses.replace(bare, tap_weight=np.ones_like(bare.tap_weight))
    with pytest.raises(ValueError, match="does not end with a text token"):
        with_forced_prefix(picture)


def test_a_prompt_of_a_single_token_is_decoded():
    token = np.array([8], np.int32)
    alone = Rendered(
        np.zeros((0, 42, 42, 3), np.uint8), token[:0], np.zeros((0, 4), np.int32), np.zeros((0, 4), np.float32),
        (Branch(token, np.ones(1, np.float32)),),
    )  # fmt: skip
    ((_, ((sample,),)),) = start(requests_of([alone]), sampling=SamplingConfig(4), stop=(319,))
    assert len(sample.token) == 4


def test_no_requests_no_samples():
    assert list(start([])) == []


def test_requests_that_cannot_be_served_are_refused():
    stated = requests_of([group(0, (3, 1))])[0]
    with pytest.raises(ValueError, match=r"request 0 \(0\): rendered to .*it states"):
        list(start([dataclasses.replace(stated, render=lambda: group(0, (2, 2)))]))
    with pytest.raises(ValueError, match="forced prefixes of at least one token each"):
        list(start(requests_of([group(0, (3, 0))])))
    prompt = stated.lengths.prompt
    fits = TINY.decoder.max_positions - prompt - 3
    with pytest.raises(ValueError, match=f"{prompt + 3} tokens .* and {fits + 1} to come are 4097, more than .* 4096"):
        list(start([stated], sampling=SamplingConfig(fits + 1)))
    with pytest.raises(ValueError, match="come together"):
        list(start([stated], closing=(3,)))
    with pytest.raises(ValueError, match="no stop token"):
        list(start([stated], stop=()))
    with pytest.raises(ValueError, match="samples is 0"):
        list(start([stated], samples=0))
    with pytest.raises(ValueError, match="steps is 0"):
        DecodeConfig(steps=0)


def test_a_model_that_gives_nan_is_an_error_not_an_answer():
    params = random_params()
    broken = dataclasses.replace(params, decoder=dataclasses.replace(params.decoder, norm=params.decoder.norm * np.nan))
    with pytest.raises(ValueError, match=r"request 0 \(0\): the model gives non-finite logits"):
        list(start(requests_of([group(0)]), params=broken))
