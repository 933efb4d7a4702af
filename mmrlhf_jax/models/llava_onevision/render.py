"""How a group becomes tokens, tiles and taps for LLaVA-OneVision. No jax, no torch; picklable for data workers."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from etils import epath
from transformers import PreTrainedTokenizerBase

from mmrlhf_jax.groups import Branch, Group, Lengths, Media, Rendered
from mmrlhf_jax.models.files import TEMPLATE_BYTES, read_json, read_text
from mmrlhf_jax.models.llava_onevision.chat import Chat, Message
from mmrlhf_jax.models.llava_onevision.config import LlavaOnevisionConfig, read_config
from mmrlhf_jax.models.llava_onevision.layout import Taps, image_layout, image_taps, single_tile_taps, video_taps
from mmrlhf_jax.models.llava_onevision.lmms_lab import assets_directory
from mmrlhf_jax.models.llava_onevision.tiles import frame_tiles, image_tiles, single_tile
from mmrlhf_jax.models.llava_onevision.tokenizer import load_tokenizer

RENDER_VERSION = 1  # raise it whenever the same group would render differently: stored log-probs then expire

Decode = Callable[[bytes], np.ndarray]


@dataclass(frozen=True)
class RenderOptions:
    """Choices of rendering that are not the model's."""

    frames: int = 10
    """frames taken from a video, evenly: linspace(0, n - 1, frames) cut to integers; all of a shorter one"""
    two_newlines: bool = False
    """one more newline between media and text, as MM-RLHF's released training (not its inference) writes"""
    system: str | None = None
    """text of a system turn for prompts that bring none; None leaves it to the chat template"""

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise ValueError(f"frames is {self.frames}; a video needs at least one")


@dataclass(frozen=True, eq=False)
class LlavaOnevisionRenderer:
    """Implements `groups.Renderer` for one model directory; `name` stands for it in messages.

    One picture in a prompt is cut any-res; several are one tile each, as transformers does. Raises ValueError at
    construction when tokenizer, chat template and config do not fit together.
    """

    config: LlavaOnevisionConfig
    tokenizer: PreTrainedTokenizerBase
    chat_template: str
    options: RenderOptions = field(default_factory=RenderOptions)
    name: str = "model"
    ends: tuple[int, ...] = ()
    """tokens that end an answer by the model's generation_config.json, which rendering does not read"""

    def __post_init__(self) -> None:
        ids = self._chat.special_tokens.values()
        for kind, token in (("image", self.config.image_token), ("video", self.config.video_token)):
            if token not in ids:
                raise ValueError(f"{self.name}: the config's {kind} token {token} is no special token of the tokenizer")

    @property
    def tile_size(self) -> int:
        return self.config.tower.image_size

    @property
    def tokens_per_tile(self) -> int:
        return self.config.tokens_per_tile

    @property
    def max_positions(self) -> int:
        return self.config.decoder.max_positions

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over everything `render` reads besides the group."""
        config = self.config
        parts = {
            "version": RENDER_VERSION,
            "tokenizer": self.tokenizer.backend_tokenizer.to_str(),
            "special_tokens": self.tokenizer.special_tokens_map,  # chat templates may name them
            "chat_template": self.chat_template,
            "options": dataclasses.asdict(self.options),
            "tile": [config.tower.image_size, config.tower.patch_size],
            "pinpoints": config.pinpoints,
            "max_tiles": config.max_tiles,
            "pixel_mean": config.pixel_mean,  # the colour around one of several pictures
            "media_tokens": [config.image_token, config.video_token],
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def measure(self, group: Group) -> Lengths:
        """Tiles and token counts from texts and picture sizes alone; equal to `render(...).lengths`.

        Raises ValueError, naming the group's origin, for a group that cannot be rendered; one that is merely too long
        for the decoder is measured.
        """
        ids, branches = self._split(group)
        tiles, prompt, _, _ = self.with_pictures(group, ids)
        tokens = tuple(len(branch.token) for branch in branches)
        scored = tuple(int(np.count_nonzero(branch.loss_weight)) for branch in branches)
        return Lengths(tiles, len(prompt), tokens, () if scored == tokens else scored)

    def render(self, group: Group, decode: Decode) -> Rendered:
        """A group as arrays; every token of a response is scored. `decode` turns encoded bytes into u8 RGB [H, W, 3].

        Where responses have questions of their own, the prompt is what all conversations begin with, and a branch the
        rest of its question, which is not scored, and the response.

        Raises ValueError, naming the group's origin, when prompt and longest response exceed the decoder's positions
        (nothing is ever cut), when media have not the sizes stated, and when the prompt does not end with a user turn.
        """
        return self.assemble(group, *self._split(group), decode)

    def assemble(self, group: Group, prompt: np.ndarray, branches: Sequence[Branch], decode: Decode) -> Rendered:
        """The group's pictures under `prompt` i32 [P] (one placeholder a picture), and `branches` behind it.

        Raises ValueError, naming the group's origin, as `render` does.
        """
        _, prompt, tap_index, tap_weight = self.with_pictures(group, prompt)
        longest = max((len(branch.token) for branch in branches), default=0)
        most = self.max_positions
        if len(prompt) + longest > most:
            raise ValueError(
                f"{where(group)}: {len(prompt)} prompt tokens and {longest} of the longest response exceed the "
                f"model's {most} positions; use fewer frames or drop the group"
            )
        return Rendered(
            tiles=self._tiles(group, decode),
            prompt=prompt,
            tap_index=tap_index,
            tap_weight=tap_weight,
            branches=tuple(branches),
        )

    def _split(self, group: Group) -> tuple[np.ndarray, list[Branch]]:
        answers = self._responses(group)
        if group.one_prompt:
            return self.prompt_ids(group), [Branch(ids, np.ones(len(ids), np.float32)) for ids in answers]
        asked = [
            self.prompt_ids(dataclasses.replace(group, prompt=group.asked(response))) for response in group.responses
        ]
        shared = shared_length(asked)
        return asked[0][:shared], [
            behind(question[shared:], answer) for question, answer in zip(asked, answers, strict=True)
        ]

    def prompt_ids(self, group: Group) -> np.ndarray:
        """Ids i32 of the conversation and the opening of its answer, a picture or video being one placeholder.

        Raises ValueError, naming the group's origin, where the chat template refuses the conversation.
        """
        try:
            return self._chat.prompt(self._messages(group))
        except ValueError as error:
            raise ValueError(f"{where(group)}: {error}") from error

    def response_ids(self, text: str) -> np.ndarray:
        """Ids i32 of an answer and of what closes its turn."""
        return self._chat.response(text)

    @cached_property
    def _chat(self) -> Chat:
        return Chat(self.tokenizer, self.chat_template, self.name)

    def _responses(self, group: Group) -> list[np.ndarray]:
        try:
            ids = {text: self.response_ids(text) for text in {response.text for response in group.responses}}
        except ValueError as error:
            raise ValueError(f"{where(group)}: {error}") from error
        return [ids[response.text] for response in group.responses]

    def with_pictures(self, group: Group, ids: np.ndarray) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
        """Tiles, and prompt `ids` with every placeholder grown to its picture's tokens: token i32 [P], tap index
        i32 [P, 4] and weight f32 [P, 4]."""
        tiles, taps = self._taps(group)
        places = np.flatnonzero((ids == self.config.image_token) | (ids == self.config.video_token))
        spans = self._in_template_order(group, ids[places], taps)
        repeats = np.ones(len(ids), np.int64)
        repeats[places] = [len(index) for index, _ in spans]
        prompt = np.repeat(ids, repeats)
        tap_index, tap_weight = np.zeros((len(prompt), 4), np.int32), np.zeros((len(prompt), 4), np.float32)
        starts = np.cumsum(repeats) - repeats
        for start, (index, weight) in zip(starts[places], spans, strict=True):
            tap_index[start : start + len(index)] = index
            tap_weight[start : start + len(index)] = weight
        return tiles, prompt, tap_index, tap_weight

    def _messages(self, group: Group) -> list[Message]:
        """The prompt in Hugging Face's format; media stand before the text of their turn, see `Group.media_before`."""
        if not group.prompt or group.prompt[-1].role != "user":
            raise ValueError("the prompt does not end with a user turn")
        counts = group.media_before()
        if sum(counts) != len(group.media):
            raise ValueError(f"the turns place {sum(counts)} pictures and videos, the group has {len(group.media)}")
        remaining, messages = iter(group.media), list[Message]()
        for turn, count in zip(group.prompt, counts, strict=True):
            if count and turn.role != "user":
                raise ValueError(f"a picture or video stands in a turn of the {turn.role}; only user turns have some")
            text = "\n" * (count > 0 and self.options.two_newlines) + turn.text
            media = [{"type": media.kind} for media in itertools.islice(remaining, count)]
            messages.append({"role": turn.role, "content": [*media, {"type": "text", "text": text}]})
        if self.options.system is not None and group.prompt[0].role != "system":
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": self.options.system}]})
        return messages

    def _taps(self, group: Group) -> tuple[int, list[Taps]]:
        """Number of tiles of the group, and the taps of each of its media; tiles follow the order of the media."""
        tiles, taps = 0, []
        for media in group.media:
            if media.kind not in ("image", "video"):
                raise ValueError(f"{where(group)}: {media.path}: {media.kind!r} is neither image nor video")
            if not media.sizes or (media.kind == "image" and len(media.sizes) != 1):
                raise ValueError(f"{where(group)}: {media.path}: {media.kind} with {len(media.sizes)} sizes")
            if media.kind == "video":
                frames = len(_sampled(len(media.sizes), self.options.frames))
                taps.append(video_taps(frames, tiles, self.config))
                tiles += frames
            elif _several_images(group):
                taps.append(single_tile_taps(tiles, self.config))
                tiles += 1
            else:
                layout = image_layout(*media.sizes[0], self.config)
                taps.append(image_taps(layout, tiles, self.config))
                tiles += layout.tiles
        return tiles, taps

    def _in_template_order(self, group: Group, placeholders: np.ndarray, taps: list[Taps]) -> list[Taps]:
        """The taps in the order of the placeholders: templates may write all pictures before all videos."""
        tokens = {"image": self.config.image_token, "video": self.config.video_token}
        queues = {
            tokens[kind]: [tap for media, tap in zip(group.media, taps, strict=True) if media.kind == kind]
            for kind in tokens
        }
        for kind, token in tokens.items():
            if (written := int((placeholders == token).sum())) != len(queues[token]):
                raise ValueError(
                    f"{where(group)}: the chat template of {self.name} writes {written} {kind} placeholders for "
                    f"{len(queues[token])}"
                )
        return [queues[token].pop(0) for token in placeholders.tolist()]

    def _tiles(self, group: Group, decode: Decode) -> np.ndarray:
        side = self.config.tower.image_size
        tiles = [np.zeros((0, side, side, 3), np.uint8)]
        for media in group.media:
            if len(media.encoded) != len(media.sizes):
                raise ValueError(
                    f"{where(group)}: {media.path}: {len(media.encoded)} encoded pictures for {len(media.sizes)} sizes"
                )
            if media.kind == "video":
                chosen = _sampled(len(media.sizes), self.options.frames)
                tiles.append(frame_tiles([_decoded(group, media, i, decode) for i in chosen], self.config))
            elif _several_images(group):
                tiles.append(single_tile(_decoded(group, media, 0, decode), self.config))
            else:
                layout = image_layout(*media.sizes[0], self.config)
                tiles.append(image_tiles(_decoded(group, media, 0, decode), layout, self.config))
        return np.concatenate(tiles)


def shared_length(sequences: Sequence[np.ndarray]) -> int:
    """Length of the longest prefix that all sequences share and that leaves each at least one token."""
    most = min(map(len, sequences)) - 1
    stacked = np.stack([sequence[:most] for sequence in sequences])
    differs = np.flatnonzero((stacked != stacked[0]).any(axis=0))
    return int(differs[0]) if len(differs) else most


def behind(asked: np.ndarray, scored: np.ndarray) -> Branch:
    """A branch of ids that are not scored, and of ids that are."""
    weight = np.concatenate([np.zeros(len(asked)), np.ones(len(scored))]).astype(np.float32)
    return Branch(np.concatenate([asked, scored]), weight)


def load_renderer(directory: str, options: RenderOptions | None = None) -> LlavaOnevisionRenderer:
    """The renderer of a Hugging Face directory in the llava-hf or lmms-lab layout, local or remote (gs://).

    The chat template is the processor's (chat_template.jinja, chat_template.json), else the tokenizer's: a tokenizer
    taken from the language model often brings a template that knows no pictures. Raises ValueError without any.
    """
    assets = assets_directory(directory)
    config = read_config(str(assets))
    tokenizer = load_tokenizer(assets, model_type="llava_onevision")
    if (ids := max(tokenizer.get_vocab().values(), default=0)) >= config.decoder.vocab:
        raise ValueError(f"{directory}: the tokenizer has id {ids}, the model's vocabulary {config.decoder.vocab} rows")
    template = _chat_template(assets) or tokenizer.chat_template
    if not isinstance(template, str) or len(template) > TEMPLATE_BYTES:
        raise ValueError(f"{directory}: no single chat template; put the model's into {directory}/chat_template.jinja")
    options, ends = options or RenderOptions(), _ends(assets, config.decoder.vocab)
    return LlavaOnevisionRenderer(config, tokenizer, template, options, directory, ends)


def _ends(directory: epath.Path, vocab: int) -> tuple[int, ...]:
    """The eos_token_id of generation_config.json, one or several; none without the file, or where it does not say."""
    if not (file := directory / "generation_config.json").exists():
        return ()
    stated = read_json(file).get("eos_token_id")
    ends = stated if isinstance(stated, list) else [] if stated is None else [stated]
    if not all(isinstance(end, int) and not isinstance(end, bool) and 0 <= end < vocab for end in ends):
        raise ValueError(f"{file}: eos_token_id {str(stated)[:80]} is no token, nor a list of them, of {vocab}")
    return tuple(ends)


def _chat_template(directory: epath.Path) -> str | None:
    if (jinja := directory / "chat_template.jinja").exists():
        return read_text(jinja)
    if (legacy := directory / "chat_template.json").exists():
        return read_json(legacy).get("chat_template")
    return None


def where(group: Group) -> str:
    """Where a group came from, for messages."""
    return ", ".join(map(str, group.origins)) or f"group {group.id}"


def _several_images(group: Group) -> bool:
    return sum(media.kind == "image" for media in group.media) > 1


def _sampled(count: int, frames: int) -> list[int]:
    """Which frames of a video are seen: evenly spaced, first and last included."""
    if count <= frames:
        return list(range(count))
    return np.linspace(0, count - 1, frames).astype(int).tolist()


def _decoded(group: Group, media: Media, number: int, decode: Decode) -> np.ndarray:
    image = decode(media.encoded[number])
    width, height = media.sizes[number]
    if image.shape != (height, width, 3) or image.dtype != np.uint8:
        raise ValueError(
            f"{where(group)}: {media.path}: decoded to {image.dtype} {image.shape}, its size says "
            f"{width} x {height} pixels; prepare the dataset again"
        )
    return image
