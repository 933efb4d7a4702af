"""Decoding with a shared prompt cache: the host's side.

Requests (a prompt with its K forced prefixes) are planned into buckets, rendered ahead on threads, prefilled one a
shard of the mesh at a time, and said by as many branches at once as a device is given. What a branch says depends on
nothing here: not on buckets, rows, slots, devices or order.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mmrlhf_jax.batch import Entry, Totals, pack
from mmrlhf_jax.command import progress_line
from mmrlhf_jax.data.buckets import MULTIPLE, ItemLengths, plan_buckets
from mmrlhf_jax.groups import Branch, Bucket, Lengths, Rendered
from mmrlhf_jax.inference.decoding import Arrivals, Programs, Read, Said, Shape, State, Status, programs
from mmrlhf_jax.inference.sample import SamplingConfig, request_key
from mmrlhf_jax.models.llava_onevision.config import LlavaOnevisionConfig
from mmrlhf_jax.models.llava_onevision.model import Compute
from mmrlhf_jax.nn.sharding import batch_share
from mmrlhf_jax.training.metrics import Clock
from mmrlhf_jax.training.peers import BEHIND, STEP, doing, new_pace, next_step
from mmrlhf_jax.training.runtime import to_devices

STEP_TOKENS = 64  # prompt tokens that take as long as a step of decoding; on accelerators more, which then have time
_AHEAD = 3  # requests of a shard that are rendered or being rendered


@dataclass(frozen=True)
class DecodeConfig:
    """How decoding runs. Changes no answer beyond rounding."""

    branches_per_device: int = 32
    """branches a device says at once; devices that split a layer (`tensor`) count as one"""
    max_buckets: int = 4
    multiple: int = MULTIPLE
    """prompt and prefix slots are multiples of this"""
    steps: int = 64
    """tokens between two looks of the host, at the most"""
    workers: int = 4
    """threads that decode pictures and tokenize ahead"""

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")


@dataclass(frozen=True)
class Request:
    """A prompt and its K forced prefixes, to be rendered when their turn comes.

    `lengths` are those of `render()`, whose branches are the forced prefixes, at least one token each; `render` is
    called on a thread. `name` is where its random numbers begin: a hash of its content.
    """

    lengths: Lengths
    render: Callable[[], Rendered]
    name: str


@dataclass(frozen=True)
class Sample:
    """What one branch said: its tokens without the one that ended it; whether one did, rather than max_new_tokens; the
    score read at the end of the closed branch, where a reader was given."""

    token: tuple[int, ...]
    ended: bool
    score: float | None


@dataclass(frozen=True)
class Progress:
    """So far: requests `done` of `total`, prompt and prefix tokens prefilled, tokens generated."""

    done: int
    total: int
    prefilled: int
    generated: int


Report = Callable[[Progress], None]
Samples = tuple[tuple[Sample, ...], ...]  # [K][samples]


def with_forced_prefix(rendered: Rendered) -> Rendered:
    """A prompt without branches as one with a single forced prefix: its own last token, from which decoding goes on.

    Raises ValueError where that token is part of a picture.
    """
    if rendered.branches:
        raise ValueError(f"the prompt has {len(rendered.branches)} branches already")
    if not len(rendered.prompt) or rendered.tap_weight[-1].any():
        raise ValueError("the prompt does not end with a text token for the answer to go on from")
    last = Branch(rendered.prompt[-1:], np.ones(1, np.float32))
    return Rendered(
        rendered.tiles, rendered.prompt[:-1], rendered.tap_index[:-1], rendered.tap_weight[:-1], branches=(last,)
    )


@contextmanager
def progress_bar(*, unit: str = "group", shown: bool = True) -> Iterator[Report]:
    """A bar of requests done, with the rates of prefilled and of generated tokens."""
    with progress_line(unit=unit, disable=not shown) as bar:

        def report(now: Progress) -> None:
            bar.total = now.total
            seconds = max(bar.format_dict["elapsed"], 1e-9)
            rates = f"{now.prefilled / seconds:,.0f} prompt + {now.generated / seconds:,.0f} generated tokens/s"
            bar.set_postfix_str(rates, refresh=False)
            bar.update(now.done - bar.n)

        yield report


def decode(
    requests: Sequence[Request],
    *,
    params: Any,
    config: LlavaOnevisionConfig,
    mesh: Mesh,
    compute: Compute,
    sampling: SamplingConfig,
    run: DecodeConfig,
    samples: int,
    stop: tuple[int, ...],
    tokens_per_tile: int,
    tile_size: int,
    closing: tuple[int, ...] = (),
    read: Read | None = None,
    progress: Report | None = None,
    chosen: Sequence[int] | None = None,
) -> Iterator[tuple[int, Samples]]:
    """Says `samples` continuations of every forced prefix of every request; yields (index of the request, [K][samples])
    as requests finish.

    With `closing` tokens and `read`, a finished branch is closed with them and `read(params, hidden [..., D])`, f32
    [...], taken at the last. Both or neither; `read` is a function of a module, since programs are kept by it. All
    processes of a mesh call this with the same arguments and are given the same. `chosen` are the requests to say, all
    by default; shapes are planned over all of them either way, so that a resumed run computes as the first one did.

    Raises ValueError where a request does not fit the model's positions, renders to other lengths than it states, or
    where logits are not finite.
    """
    if samples < 1:
        raise ValueError(f"samples is {samples}; it must be at least 1")
    if bool(closing) != (read is not None):
        raise ValueError("closing tokens and the reader of a score come together, or not at all")
    if not stop:
        raise ValueError("there is no stop token: every branch would go on to max_new_tokens")
    if not requests:
        return
    _check(requests, config.decoder.max_positions, sampling.max_new_tokens + len(closing))
    share = batch_share(mesh)
    lengths = [request.lengths for request in requests]
    plan = plan_buckets(
        ItemLengths(
            tiles=np.array([n.tiles for n in lengths]),
            prompt=np.array([max(1, n.prompt) for n in lengths]),
            response=np.array([sum(n.responses) - len(n.responses) for n in lengths]),
        ),
        max_buckets=run.max_buckets,
        multiple=run.multiple,
        slots_per_shard=1,  # one group a shard at a time
        shards=share.of,
        groups_per_step=len(requests),
        tile_cost=4 * config.tile_cost,  # a forward alone
    )
    responses = max(len(n.responses) for n in lengths)
    slots = min(responses * samples, run.branches_per_device)
    wanted = set(range(len(requests)) if chosen is None else chosen)
    tally = _Tally(len(wanted), progress)
    tile = (tokens_per_tile, tile_size)
    for index, bucket in enumerate(plan.buckets):
        dealt = np.flatnonzero(plan.assignment == index).tolist()
        mine = [request for request in dealt if request in wanted]
        if not mine:
            continue
        shape = Shape(
            model=config,
            compute=compute,
            sampling=dataclasses.replace(sampling, seed=0),
            stop=stop,
            closing=closing,
            read=read,
            shards=share.of,
            rows=min(max(1, run.branches_per_device // slots), math.ceil(len(dealt) / share.of)),
            slots=slots,
            prefix=bucket.prompt + bucket.response,
            responses=responses,
            samples=samples,
        )
        with ThreadPoolExecutor(run.workers) as pool:
            host = _Bucket(requests, mine, bucket, shape, mesh, params, sampling.seed, pool, tile)
            try:
                yield from _decode_bucket(host, run.steps, tally)
            finally:  # also where the consumer has had enough, or a request cannot be rendered
                host.cancel()
                doing(BEHIND)


def _check(requests: Sequence[Request], most: int, said: int) -> None:
    for index, request in enumerate(requests):
        prompt, prefixes = request.lengths.prompt, request.lengths.responses
        if min(prefixes, default=0) < 1:
            raise ValueError(f"request {index} ({request.name}): it needs forced prefixes of at least one token each")
        if (total := prompt + max(prefixes) + said) > most:
            raise ValueError(
                f"request {index} ({request.name}): {prompt + max(prefixes)} tokens of prompt and forced prefix and "
                f"{said} to come are {total}, more than the model's {most} positions"
            )


@dataclass
class _Tally:
    """Counts for whoever watches."""

    total: int
    report: Report | None
    done: int = 0
    prefilled: int = 0
    generated: int = 0

    def tell(self, generated: int) -> None:
        """`generated` by the bucket in work, on top of those before it."""
        if self.report is not None:
            self.report(Progress(self.done, self.total, self.prefilled, self.generated + generated))


@dataclass
class _Bucket:
    """The requests of a bucket, dealt to the shards in order: each process knows, and renders ahead, those of its own
    shards only. `held` [shards][rows]: the request in each row, or None."""

    requests: Sequence[Request]
    indices: list[int]
    bucket: Bucket
    shape: Shape
    mesh: Mesh
    params: Any
    seed: int
    pool: ThreadPoolExecutor
    tile: tuple[int, int]  # tokens, side
    queues: list[deque[int]] = field(init=False)
    held: list[list[int | None]] = field(init=False)
    rendering: dict[int, Future[Rendered]] = field(init=False, default_factory=dict)
    here: tuple[int, ...] = field(init=False)
    programs: Programs = field(init=False)

    def __post_init__(self) -> None:
        shards = self.shape.shards
        self.queues = [deque(self.indices[shard::shards]) for shard in range(shards)]
        self.held = [[None] * self.shape.rows for _ in range(shards)]
        self.here = batch_share(self.mesh).parts
        self.programs = programs(self.shape, self.mesh)

    def ready(self) -> list[int]:
        """The shards with a free row and a request for it."""
        return [s for s, queue in enumerate(self.queues) if queue and None in self.held[s]]

    def admissible(self) -> int:
        """How many prefills, one after the other, would fill the free rows."""
        return max(min(len(queue), held.count(None)) for queue, held in zip(self.queues, self.held, strict=True))

    def in_flight(self) -> bool:
        return any(index is not None for rows in self.held for index in rows)

    def pending(self) -> bool:
        return self.in_flight() or any(self.queues)

    def tokens(self, shard: int) -> int:
        """Of the next request's prompt and prefixes."""
        lengths = self.requests[self.queues[shard][0]].lengths
        return lengths.prompt + sum(lengths.responses)

    def render_ahead(self) -> None:
        for shard in self.here:
            for index in list(self.queues[shard])[:_AHEAD]:
                if index not in self.rendering:
                    self.rendering[index] = self.pool.submit(self.requests[index].render)

    def cancel(self) -> None:
        for future in self.rendering.values():
            future.cancel()

    def rendered(self, index: int) -> Rendered:
        rendering = self.rendering.pop(index)
        if not rendering.done():
            doing("waiting for data", bounded=True)
        found = rendering.result()
        doing(STEP, bounded=True)
        if found.lengths != self.requests[index].lengths:
            raise ValueError(
                f"request {index} ({self.requests[index].name}): rendered to {found.lengths}, it states "
                f"{self.requests[index].lengths}"
            )
        return found

    def admit(self, state: State, shards: Sequence[int]) -> State:
        """Prefills the next request of each of `shards` into a free row."""
        k, parts = self.shape.responses, len(self.here)
        arrivals = Arrivals(
            place=np.full(parts, -1, np.int32),
            key=np.zeros((parts, 2), np.uint32),
            token=np.zeros((parts, k), np.int32),
            position=np.zeros((parts, k), np.int32),
            branches=np.zeros(parts, np.int32),
        )
        entries: list[Entry | None] = [None] * parts
        for shard in shards:
            index = self.queues[shard].popleft()
            row = self.held[shard].index(None)
            self.held[shard][row] = index
            if shard not in self.here:
                continue
            part, rendered = self.here.index(shard), self.rendered(index)
            prefixes = rendered.branches
            entries[part] = _entry(index, rendered)
            arrivals.place[part] = row
            arrivals.key[part] = request_key(self.seed, self.requests[index].name)
            arrivals.token[part, : len(prefixes)] = [prefix.token[-1] for prefix in prefixes]
            arrivals.position[part, : len(prefixes)] = [
                len(rendered.prompt) + len(prefix.token) - 1 for prefix in prefixes
            ]
            arrivals.branches[part] = len(prefixes) * self.shape.samples
        self.render_ahead()
        totals = Totals(1.0, 1.0, 1.0, 1.0)  # nothing is divided: there is no loss
        tokens, side = self.tile
        batch = pack(entries, self.bucket, totals, responses=k, tokens_per_tile=tokens, tile_size=side)
        with jax.set_mesh(self.mesh):
            return self.programs.admit(self.params, state, *to_devices((batch, arrivals), self.mesh))

    def run(self, state: State, need: int, steps: int) -> tuple[State, Status]:
        waiting = np.array([bool(self.queues[shard]) for shard in self.here])
        arguments = to_devices((waiting, np.int32(need), np.int32(steps)), self.mesh)
        with jax.set_mesh(self.mesh):
            return self.programs.run(self.params, state, *arguments)

    def finished(self, state: State, status: Status) -> list[tuple[int, Samples]]:
        """The requests of the rows that are no longer busy, and what was said; the rows are free then."""
        if np.any(status.broken):
            index = self._in_row(int(np.flatnonzero(status.broken)[0]))
            assert index is not None
            raise ValueError(f"request {index} ({self.requests[index].name}): the model gives non-finite logits")
        rows = [row for row in np.flatnonzero(~status.busy).tolist() if self._in_row(row) is not None]
        if not rows:
            return []
        with jax.set_mesh(self.mesh):
            said = jax.device_get(self.programs.collect(state.said))
        out = []
        for row in rows:
            index = self._in_row(row)
            assert index is not None
            out.append((index, self._samples(said, row, len(self.requests[index].lengths.responses))))
            self.held[row // self.shape.rows][row % self.shape.rows] = None
        return out

    def _in_row(self, row: int) -> int | None:
        return self.held[row // self.shape.rows][row % self.shape.rows]

    def _samples(self, said: Said, row: int, responses: int) -> Samples:
        def one(branch: int) -> Sample:
            token = said.token[row, branch, : said.length[row, branch]].tolist()
            score = float(said.score[row, branch]) if self.shape.read else None
            return Sample(tuple(token), bool(said.ended[row, branch]), score)

        n = self.shape.samples
        return tuple(tuple(one(response * n + sample) for sample in range(n)) for response in range(responses))


def _entry(index: int, rendered: Rendered) -> Entry:
    """What is prefilled: prompt and forced prefixes without each one's last token, which is fed by the first step."""
    cut = tuple(Branch(prefix.token[:-1], prefix.loss_weight[:-1]) for prefix in rendered.branches)
    pairs, each = np.zeros((len(cut), len(cut)), np.float32), np.zeros(len(cut), np.float32)
    return Entry(index, dataclasses.replace(rendered, branches=cut), pairs, pairs, each.astype(np.int32), each)


def _decode_bucket(host: _Bucket, steps: int, tally: _Tally) -> Iterator[tuple[int, Samples]]:
    with jax.set_mesh(host.mesh):
        state = host.programs.blank()
    host.render_ahead()
    finished: list[tuple[int, Samples]] = []
    generated = 0
    clock, slots = Clock(), host.bucket.tiles * host.shape.model.tile_cost + host.bucket.prompt + host.bucket.response
    prefill = slots / STEP_TOKENS
    new_pace()
    while host.pending():
        next_step(steps + prefill * host.admissible())
        admitted = 0
        # a prefill forwards a row on every shard: it waits until half of those that have requests have room
        need = max(1, math.ceil(sum(map(bool, host.queues)) / 2))
        while (ready := host.ready()) and (len(ready) >= need or not host.in_flight()):
            tally.prefilled += sum(host.tokens(shard) for shard in ready)
            admitted += 1
            with clock.compiling(host.programs.admit):
                state = host.admit(state, ready)
        with clock.compiling(host.programs.run):
            state, running = host.run(state, need, steps)
        yield from finished  # whoever consumes them works while the devices do
        status = jax.device_get(running)
        finished = host.finished(state, status)
        tally.done += len(finished)
        generated = int(status.sampled.sum())
        tally.tell(generated)
        clock.lap(int(status.steps) + prefill * admitted)
    tally.generated += generated
    yield from finished
