"""The groups the step benchmark is run on: of chosen sizes with any-res pictures, and of the sizes MM-RLHF's groups
have. Numpy only: whoever runs a side draws the same groups from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmrlhf_jax.batch import Entry
from mmrlhf_jax.groups import Branch, Rendered
from mmrlhf_jax.models.llava_onevision.config import LlavaOnevisionConfig
from mmrlhf_jax.models.llava_onevision.cost import GroupShape
from mmrlhf_jax.models.llava_onevision.layout import image_layout, image_taps
from mmrlhf_jax.models.llava_onevision.tiles import image_tiles

TOKENS_PER_WORD = 1.35  # Qwen2's tokenizer on English answers
TEXT = 40  # tokens of a question and the template around it
# pictures of the mix, (width, height), and the share of prompts that have one so large: an assumption, MM-RLHF's
# pictures are not in its annotations. 1,485, 2,929, 4,725 and 7,269 tokens
PICTURES = {(336, 336): 0.2, (640, 480): 0.5, (800, 600): 0.2, (1920, 1080): 0.1}
# MM-RLHF-RewardBench's 46 groups: words of each distinct answer, and which is preferred to which
ANSWERS = (
    "171 21 1 42: 0>1 0>2 3>1 3>2",
    "242 228 29 1: 0>1 0>2 0>3 1>2 1>3",
    "1 2 1: 0>1 0>2 1>2",
    "215 68 61 208: 0>1 0>2 3>1 3>2",
    "244 163 4 13: 0>1 0>2 0>3 1>2 1>3 2>3",
    "144 24 33 1: 0>1 0>2 0>3 1>2 1>3",
    "154 127 28 142: 0>1 0>2 0>3 1>2 3>2",
    "1 2 1: 0>1 2>1",
    "42 4 1: 0>1 0>2 2>1",
    "151 33 4 1: 0>1 2>0 2>1 3>0 3>1",
    "1 27 1: 0>1 2>1",
    "48 269 8 10: 0>1 0>3 2>0 2>1 2>3",
    "14 7 34 7: 0>1 0>3 2>0 2>1 2>3",
    "39 1 1: 0>1 0>2",
    "1 1 1: 0>1 2>1",
    "37 8 23 14: 0>1 0>2 0>3 1>2 3>1 3>2",
    "15 1 1: 0>1 0>2",
    "1 34 1: 0>1 2>1",
    "19 52 1 38: 0>1 0>2 2>1 3>1 3>2",
    "21 342 11 24: 0>1 0>2 0>3",
    "349 321 610 471 495: 0>1 2>1 3>1 4>1",
    "188 181 117 200: 0>1 0>2 0>3",
    "243 123 123 98: 0>1 0>2 0>3",
    "180 135 148 35: 0>1 0>2 0>3 1>3 2>3",
    "165 89 82 70: 0>1 0>2 0>3 1>2 3>2",
    "239 193 328 328: 0>1 2>1 3>1",
    "243 106 256 191: 0>1 2>1 3>1",
    "228 113 283 218: 0>1 2>1 3>1",
    "243 251 458 482 496: 0>1 2>1 3>1 4>1",
    "351 350 481 342 262: 0>1 2>1 3>1 4>1",
    "152 55 62 114: 0>1 0>2 0>3 1>2 1>3 3>2",
    "121 9 50 113: 0>1 0>2 0>3 1>2 1>3 3>2",
    "85 148 64 140: 0>1 0>2 0>3 1>2 3>2",
    "61 8 48 8: 0>1 0>2 0>3 2>1 2>3",
    "134 83 104 59: 0>1 0>2 3>1 3>2",
    "88 44 8 62: 0>1 0>2 0>3 1>3 2>1 2>3",
    "81 27 41: 0>1 2>1",
    "110 86 86 130: 0>1 2>1 3>1",
    "37 17 17: 0>1 0>2 1>2",
    "51 17 37: 0>1 0>2 2>1",
    "43 14 16: 0>1 0>2",
    "49 17 35: 0>1 0>2 1>2",
    "38 8 18: 0>1 0>2",
    "28 8 24: 0>1 0>2",
    "26 13 22: 0>1 2>1",
    "17 12 13: 0>1 0>2 1>2",
)


@dataclass(frozen=True)
class Case:
    """One group to time. `responses` are tokens of each answer, `pairs` its (preferred, other) answers."""

    name: str
    picture: tuple[int, int]
    text: int
    responses: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...]
    share: float = 1.0
    """of the mix's prompts"""
    groups: int = 1
    """so many such groups in one micro-batch"""

    def shape(self, config: LlavaOnevisionConfig) -> GroupShape:
        layout = image_layout(*self.picture, config)
        return GroupShape(layout.tiles, layout.tokens + self.text, self.responses)


def ranked_case(k: int, prompt: int, response: int, picture: tuple[int, int], config: LlavaOnevisionConfig) -> Case:
    """K strictly ranked answers of equal length: all K(K-1)/2 pairs. Raises ValueError for a prompt its picture
    fills."""
    tokens = image_layout(*picture, config).tokens
    if prompt <= tokens:
        raise ValueError(f"a picture of {picture[0]} x {picture[1]} is {tokens} tokens, the prompt {prompt}")
    pairs = tuple((i, j) for i in range(k) for j in range(i + 1, k))
    return Case(_picture(picture), picture, prompt - tokens, (response,) * k, pairs)


def mix_cases(groups: int, seed: int = 0) -> list[Case]:
    """`groups` of MM-RLHF's shapes for each size of picture, drawn without replacement from its 46 annotated groups."""
    rng = np.random.default_rng(seed)
    drawn = rng.choice(len(ANSWERS), (len(PICTURES), groups), replace=False)
    return [
        _mix_case(picture, share / groups, ANSWERS[number])
        for (picture, share), numbers in zip(PICTURES.items(), drawn, strict=True)
        for number in numbers
    ]


def _mix_case(picture: tuple[int, int], share: float, line: str) -> Case:
    words, _, order = line.partition(": ")
    lengths = tuple(1 + round(TOKENS_PER_WORD * int(count)) for count in words.split())  # the end of the turn is one
    pairs = tuple((int(a), int(b)) for a, b in (pair.split(">") for pair in order.split()))
    return Case(_picture(picture), picture, TEXT, lengths, pairs, share)


def _picture(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def random_group(config: LlavaOnevisionConfig, case: Case, seed: int = 0) -> Entry:
    """The case as random pixels and tokens: question, picture behind the first of its tokens, answers."""
    rng = np.random.default_rng(seed)
    width, height = case.picture
    layout = image_layout(width, height, config)
    tiles = image_tiles(rng.integers(0, 256, (height, width, 3)).astype(np.uint8), layout, config)
    index, weight = image_taps(layout, 0, config)

    def text(count: int) -> np.ndarray:
        return rng.integers(0, min(config.image_token, config.video_token), count).astype(np.int32)

    def around(taps: np.ndarray) -> np.ndarray:
        return np.concatenate([np.zeros((1, 4), taps.dtype), taps, np.zeros((case.text - 1, 4), taps.dtype)])

    answers = [text(length) for length in case.responses]
    wins = np.zeros((len(answers), len(answers)), np.float32)
    wins[tuple(np.array(case.pairs).T)] = 1
    picture = np.full(layout.tokens, config.image_token, np.int32)
    return Entry(
        row=0,
        rendered=Rendered(
            tiles=tiles,
            prompt=np.concatenate([text(1), picture, text(case.text - 1)]),
            tap_index=around(index),
            tap_weight=around(weight),
            branches=tuple(Branch(answer, np.ones(len(answer), np.float32)) for answer in answers),
        ),
        pair_weight=wins,
        pair_margin=np.zeros_like(wins),
        rank=np.argsort(np.argsort(-wins.sum(1), kind="stable")).astype(np.int32),
        score=np.zeros(len(answers), np.float32),
    )


def as_pairs(group: Entry, pairs: Sequence[tuple[int, int]]) -> list[Entry]:
    """Every preference of the group as an entry of its own, the preferred answer first."""
    r, upper = group.rendered, np.array([[0, 1], [0, 0]], np.float32)
    return [
        Entry(
            row=0,
            rendered=Rendered(r.tiles, r.prompt, r.tap_index, r.tap_weight, (r.branches[i], r.branches[j])),
            pair_weight=upper,
            pair_margin=0 * upper,
            rank=np.array([0, 1], np.int32),
            score=np.zeros(2, np.float32),
        )
        for i, j in pairs
    ]
