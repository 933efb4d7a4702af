"""The host words everyone uses: a group is one prompt (pictures and text) and K responses to it.

Nothing here knows jax, a model or a file format. Sources make groups, `data.dataset` stores them, a model's
renderer turns them into arrays.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a piece of data came from; every message about data names one."""

    file: str
    line: int  # counts from 1

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Media:
    """One picture, or one video as its frames in order.

    `encoded` holds the file bytes (one entry for a picture) and is empty while a group travels without pixels;
    `sizes` are (width, height) as displayed, EXIF rotation applied; `sha256` names the bytes.
    """

    kind: Literal["image", "video"]
    path: str
    sizes: tuple[tuple[int, int], ...] = ()
    sha256: str = ""
    encoded: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says. `media` of the group's media stand before its text, see `Group.media_before`."""

    role: Literal["system", "user", "assistant"]
    text: str
    media: int = 0


@dataclass(frozen=True, slots=True)
class Response:
    """One answer. Rank 0 is the best; tied responses share a rank. `question` is what it answers where a group's
    responses answer several: it then stands for the text of the prompt's last turn. `ratings` are (attribute, value),
    by attribute: what somebody rated it in, each once; an attribute that is not among them was not rated."""

    text: str
    rank: int = 0
    score: float | None = None
    reason: str | None = None
    question: str | None = None
    ratings: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Pair:
    """`responses[chosen]` is preferred to `responses[rejected]`; `margin` is the reward difference, if known."""

    chosen: int
    rejected: int
    margin: float | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """One prompt and its ranked responses.

    The media stand before the text of the first user turn, unless turns say how many stand before theirs. `facts` are
    texts about them (captions, options) that a reward model may be shown and a policy never is. `ties` are (i, j),
    i < j, of responses that somebody said are equally good; equal ranks alone may mean that nobody compared them.
    """

    id: str
    prompt: tuple[Turn, ...]
    media: tuple[Media, ...]
    responses: tuple[Response, ...]
    pairs: tuple[Pair, ...]
    origins: tuple[Origin, ...]
    facts: tuple[str, ...] = ()
    ties: tuple[tuple[int, int], ...] = ()

    def media_before(self) -> tuple[int, ...]:
        """How many media stand before the text of each turn; they follow each other in the order of `media`."""
        counts = tuple(turn.media for turn in self.prompt)
        return counts if any(counts) else self._media_first()

    def _media_first(self) -> tuple[int, ...]:
        """All of them before the first user turn."""
        first = next((i for i, turn in enumerate(self.prompt) if turn.role == "user"), None)
        return tuple(len(self.media) * (i == first) for i in range(len(self.prompt)))

    def asked(self, response: Response) -> tuple[Turn, ...]:
        """The prompt that `response` answers."""
        if response.question is None:
            return self.prompt
        return (*self.prompt[:-1], dataclasses.replace(self.prompt[-1], text=response.question))

    @property
    def one_prompt(self) -> bool:
        """Whether all responses answer the prompt as it stands."""
        return all(response.question is None for response in self.responses)

    def by_question(self) -> tuple[Group, ...]:
        """The group, or one for each question that its responses answer, without the pairs and ties across them."""
        if self.one_prompt:
            return (self,)
        found = []
        for question in dict.fromkeys(response.question for response in self.responses):
            own = [k for k, response in enumerate(self.responses) if response.question == question]
            place = {k: number for number, k in enumerate(own)}
            found.append(
                dataclasses.replace(
                    self,
                    prompt=self.asked(self.responses[own[0]]),
                    responses=tuple(dataclasses.replace(self.responses[k], question=None) for k in own),
                    pairs=tuple(
                        dataclasses.replace(pair, chosen=place[pair.chosen], rejected=place[pair.rejected])
                        for pair in self.pairs
                        if pair.chosen in place and pair.rejected in place
                    ),
                    ties=tuple((place[i], place[j]) for i, j in self.ties if i in place and j in place),
                )
            )
        return tuple(found)

    def margin(self, pair: Pair) -> float | None:
        """A pair's own margin, else the difference of its responses' scores, else None."""
        if pair.margin is not None:
            return pair.margin
        best, worst = self.responses[pair.chosen].score, self.responses[pair.rejected].score
        return None if best is None or worst is None else best - worst

    def content_hash(self, *, reasons: bool = False, facts: bool = False) -> str:
        """sha256 of everything a log-probability depends on: prompt, pictures, response texts in order; with `reasons`
        or `facts` those too, for what is computed with the human critiques, or the facts, in view."""
        prompt: list[list[Any]] = [[turn.role, turn.text] for turn in self.prompt]
        if (counts := self.media_before()) != self._media_first():
            prompt = [[*turn, count] for turn, count in zip(prompt, counts, strict=True)]
        content = {
            "prompt": prompt,
            "media": [[media.kind, media.sha256] for media in self.media],
            "responses": [[r.text, r.reason] if reasons else r.text for r in self.responses],
            **({"facts": self.facts} if facts else {}),
        }
        if not self.one_prompt:
            content["questions"] = [response.question for response in self.responses]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        """The group without its encoded pictures, as one JSON object."""
        bare = dataclasses.replace(self, media=tuple(dataclasses.replace(m, encoded=()) for m in self.media))
        raw = dataclasses.asdict(bare)
        for turn in raw["prompt"]:
            if not turn["media"]:
                del turn["media"]  # so that groups which do not need it are stored as they were before it existed
        for holder in (raw, *raw["responses"]):
            for name in ("facts", "ratings", "question", "ties"):
                if name in holder and holder[name] in (None, ()):
                    del holder[name]
        return json.dumps(raw, ensure_ascii=True)

    @classmethod
    def from_json(cls, text: str) -> Group:
        """Inverse of `to_json`."""
        raw: dict[str, Any] = json.loads(text)
        return cls(
            id=raw["id"],
            prompt=tuple(Turn(**turn) for turn in raw["prompt"]),
            media=tuple(
                Media(kind=m["kind"], path=m["path"], sizes=tuple((w, h) for w, h in m["sizes"]), sha256=m["sha256"])
                for m in raw["media"]
            ),
            responses=tuple(_response_of(response) for response in raw["responses"]),
            pairs=tuple(Pair(**pair) for pair in raw["pairs"]),
            origins=tuple(Origin(**origin) for origin in raw["origins"]),
            facts=tuple(raw.get("facts", ())),
            ties=tuple((i, j) for i, j in raw.get("ties", ())),
        )


def _response_of(raw: dict[str, Any]) -> Response:
    ratings = tuple((name, value) for name, value in raw.pop("ratings", ()))
    return Response(**raw, ratings=ratings)


@dataclass(frozen=True, slots=True)
class Lengths:
    """What a group costs on a device: picture tiles, prompt tokens (pictures included), tokens of each response, and
    how many of those are scored (empty: all of them)."""

    tiles: int
    prompt: int
    responses: tuple[int, ...]
    scored: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Branch:
    """One response as tokens: `token` i32 [R], `loss_weight` f32 [R] (0 = not scored)."""

    token: np.ndarray
    loss_weight: np.ndarray


NEWLINE = -1  # in `Rendered.tap_index`: the row of the model's image_newline


@dataclass(frozen=True, slots=True)
class Rendered:
    """A group as arrays, before packing.

    tiles       u8 [I, H, W, 3]  raw pixels
    prompt      i32 [P]          token ids; the id under a picture token is a placeholder
    tap_index   i32 [P, 4]       rows of the group's projected features: tile * tokens_per_tile + patch, or NEWLINE
    tap_weight  f32 [P, 4]       weights of those rows; all zero = a text token
    branches    K of them
    """

    tiles: np.ndarray
    prompt: np.ndarray
    tap_index: np.ndarray
    tap_weight: np.ndarray
    branches: tuple[Branch, ...]

    @property
    def lengths(self) -> Lengths:
        tokens = tuple(len(branch.token) for branch in self.branches)
        scored = tuple(int(np.count_nonzero(branch.loss_weight)) for branch in self.branches)
        return Lengths(len(self.tiles), len(self.prompt), tokens, () if scored == tokens else scored)


@dataclass(frozen=True, order=True)
class Bucket:
    """A static shape: `groups` a micro-batch over all hosts; `tiles`, `prompt`, `response` slots of a row."""

    groups: int
    tiles: int
    prompt: int
    response: int

    def __str__(self) -> str:
        return f"{self.groups} x ({self.tiles} tiles, {self.prompt} + {self.response} tokens)"


class Renderer(Protocol):
    """What the data pipeline asks of a model family: how a group becomes tokens and tiles."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever the same group would render differently."""

    @property
    def tile_size(self) -> int:
        """Side of a square tile, in pixels."""

    @property
    def tokens_per_tile(self) -> int:
        """Rows of projected features a tile yields."""

    @property
    def max_positions(self) -> int:
        """Tokens of prompt and response together that the model can take."""

    def measure(self, group: Group) -> Lengths:
        """Token counts from text and picture sizes alone; equal to `render(...).lengths`."""

    def render(self, group: Group, decode: Callable[[bytes], np.ndarray]) -> Rendered:
        """`decode` turns encoded bytes into u8 RGB [height, width, 3]."""
