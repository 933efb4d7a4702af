"""Answers of a policy: one prefill a prompt, any number of samples on top of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from jax.sharding import Mesh

from mmrlhf_jax.data.media import decode as decode_picture
from mmrlhf_jax.groups import Group, Lengths, Rendered, Response, Turn
from mmrlhf_jax.inference.engine import DecodeConfig, Report, Request, Sample, decode, with_forced_prefix
from mmrlhf_jax.inference.sample import SamplingConfig
from mmrlhf_jax.models.llava_onevision.model import Compute
from mmrlhf_jax.models.llava_onevision.render import LlavaOnevisionRenderer
from mmrlhf_jax.training.model import LoadedModel


@dataclass(frozen=True)
class Answer:
    """What a model says: its text, its tokens without the one that ends it, and whether it came to an end."""

    text: str
    token: tuple[int, ...]
    ended: bool


def generate(
    groups: Sequence[Group],
    renderer: LlavaOnevisionRenderer,
    model: LoadedModel,
    mesh: Mesh,
    compute: Compute,
    sampling: SamplingConfig,
    run: DecodeConfig | None = None,
    *,
    samples: int = 1,
    load: Callable[[int], Group] | None = None,
    progress: Report | None = None,
    chosen: Sequence[int] | None = None,
) -> Iterator[tuple[int, tuple[Answer, ...]]]:
    """`samples` answers to the prompt of each group, as (index into `groups`, answers), in the order they are done.

    The groups' responses are not looked at. Groups come with the bytes of their pictures, or `load(index)` brings one
    that does when its turn comes. `chosen` are the groups to answer, all by default; shapes are planned over all of
    them either way, so that a resumed run computes as the first one did. Raises ValueError, before anything is
    computed, where a prompt and `max_new_tokens` exceed the decoder's positions, and as `renderer.render` does.
    """
    bare = [dataclasses.replace(group, responses=(), pairs=()) for group in groups]
    requests = [
        Request(
            lengths=_lengths(group, renderer, sampling.max_new_tokens),
            render=partial(_render, index, groups, renderer, load),
            name=group.content_hash(),
        )
        for index, group in enumerate(bare)
    ]
    said = decode(
        requests,
        params=model.params,
        config=model.config,
        mesh=mesh,
        compute=compute,
        sampling=sampling,
        run=run or DecodeConfig(),
        samples=samples,
        stop=stop_tokens(renderer),
        tokens_per_tile=renderer.tokens_per_tile,
        tile_size=renderer.tile_size,
        progress=progress,
        chosen=chosen,
    )
    for index, (branches,) in said:
        yield index, tuple(_answer(sample, renderer) for sample in branches)


def answers_in_order(found: Iterator[tuple[int, tuple[Answer, ...]]]) -> list[tuple[Answer, ...]]:
    """All that `generate` yields, in the order of the groups."""
    return [answers for _, answers in sorted(found, key=lambda item: item[0])]


def stop_tokens(renderer: LlavaOnevisionRenderer) -> tuple[int, ...]:
    """The tokens that end an answer: the tokenizer's end of sequence, the special tokens that close a trained one, and
    those of the model's generation_config.json.

    Raises ValueError when there is none.
    """
    asked = Group("", (Turn("user", ""),), (), (Response(""),), (), ())
    closing = renderer.render(asked, decode_picture).branches[0].token.tolist()
    special = {token for token, added in renderer.tokenizer.added_tokens_decoder.items() if added.special}
    stop = {renderer.tokenizer.eos_token_id, *special.intersection(closing), *renderer.ends} - {None}
    if not stop:
        raise ValueError(f"{renderer.name}: neither the tokenizer nor the chat template names a token that ends a turn")
    return tuple(sorted(stop))


def _lengths(bare: Group, renderer: LlavaOnevisionRenderer, said: int) -> Lengths:
    measured = renderer.measure(bare)
    if measured.prompt + said > renderer.max_positions:
        raise ValueError(
            f"{', '.join(map(str, bare.origins)) or bare.id}: {measured.prompt} prompt tokens and max_new_tokens "
            f"{said} exceed the model's {renderer.max_positions} positions"
        )
    return Lengths(measured.tiles, measured.prompt - 1, (1,))


def _render(
    index: int, groups: Sequence[Group], renderer: LlavaOnevisionRenderer, load: Callable[[int], Group] | None
) -> Rendered:
    group = groups[index] if load is None else load(index)
    bare = dataclasses.replace(group, responses=(), pairs=())
    return with_forced_prefix(renderer.render(bare, decode_picture))


def _answer(sample: Sample, renderer: LlavaOnevisionRenderer) -> Answer:
    text = renderer.tokenizer.decode(list(sample.token), skip_special_tokens=True)
    return Answer(str(text), sample.token, sample.ended)
