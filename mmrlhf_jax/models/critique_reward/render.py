"""How a group is put before a reward model: template, question and answer are the user's turn, the critique is the
assistant's, and the score is read where that turn is closed. No jax, no torch; picklable for data workers.

Conversations are tokenized whole, each answer's on its own; what the token sequences of a group share is its prompt,
the rest of each its branch. So pictures, question and template go through the model once, and every sequence is token
for token what it would be alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from etils import epath

from mmrlhf_jax.groups import Branch, Group, Lengths, Rendered, Renderer, Response, Turn
from mmrlhf_jax.models.critique_reward.config import (
    RELEASED_SHA256,
    Head,
    RewardSettings,
    fill,
    read_settings,
    read_template,
    template_sha256,
)
from mmrlhf_jax.models.llava_onevision.render import (
    Decode,
    LlavaOnevisionRenderer,
    RenderOptions,
    behind,
    load_renderer,
    shared_length,
    where,
)

REWARD_RENDER_VERSION = 1  # raise it whenever the same group would render differently
FACTS = "[Facts]:"
FACTS_CURE = "prepare with --source mapped --map facts=FIELD, a text or a list of texts in every row"


@dataclass(frozen=True, eq=False)
class _ThroughPolicy:
    """What a reward model's renderer has from the policy's, through which it renders."""

    policy: LlavaOnevisionRenderer

    @property
    def name(self) -> str:
        return self.policy.name

    @property
    def tile_size(self) -> int:
        return self.policy.tile_size

    @property
    def tokens_per_tile(self) -> int:
        return self.policy.tokens_per_tile

    @property
    def max_positions(self) -> int:
        return self.policy.max_positions


@dataclass(frozen=True, eq=False)
class RewardRenderer(_ThroughPolicy):
    """Implements `groups.Renderer` for a critique reward model: `response.reason` is the critique of a response.

    A response without one ends where its critique would begin, and that is where its score is then read, as the
    released scorer does without critiques. Critique and what closes its turn are scored tokens (`loss_weight` 1), the
    answer is not. Earlier turns of a conversation stay as they are; the last one is the question.
    """

    template: str
    facts: bool = False
    """a group's facts stand behind its question"""

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over everything `render` reads besides the group."""
        parts = [REWARD_RENDER_VERSION, self.policy.fingerprint, self.template, *[FACTS] * self.facts]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @cached_property
    def closing(self) -> tuple[int, ...]:
        """Ids that close a critique; the score stands behind the last of them."""
        return tuple(self.policy.response_ids("").tolist())

    def measure(self, group: Group) -> Lengths:
        """Tiles and token counts from texts and picture sizes alone; equal to `render(...).lengths`. Raises as
        `render` does, but measures what is too long."""
        group = self._seen(group)
        prompt, branches = self._split(group)
        tiles, grown, _, _ = self.policy.with_pictures(group, prompt)
        tokens = tuple(len(branch.token) for branch in branches)
        scored = tuple(int(branch.loss_weight.sum()) for branch in branches)
        return Lengths(tiles, len(grown), tokens, () if scored == tokens else scored)

    def render(self, group: Group, decode: Decode) -> Rendered:
        """A group as arrays. Raises ValueError, naming the group's origin, as the policy's renderer does."""
        group = self._seen(group)
        return self.policy.assemble(group, *self._split(group), decode)

    def _seen(self, group: Group) -> Group:
        return with_facts(group) if self.facts else group

    def _split(self, group: Group) -> tuple[np.ndarray, list[Branch]]:
        """The ids i32 that all conversations of the group begin with, and what follows in each."""
        asked = [self._asked(group, response) for response in group.responses]
        said = [
            np.zeros(0, np.int32) if response.reason is None else self._said(group, response.reason)
            for response in group.responses
        ]
        shared = shared_length(asked)
        return asked[0][:shared], [
            behind(question[shared:], critique) for question, critique in zip(asked, said, strict=True)
        ]

    def _asked(self, group: Group, response: Response) -> np.ndarray:
        if not group.prompt or group.prompt[-1].role != "user":
            raise ValueError(f"{where(group)}: the prompt does not end with a user turn")
        *before, last = group.asked(response)
        asked = Turn("user", fill(self.template, last.text, response.text), last.media)
        return self.policy.prompt_ids(dataclasses.replace(group, prompt=(*before, asked)))

    def _said(self, group: Group, critique: str) -> np.ndarray:
        try:
            return self.policy.response_ids(critique)
        except ValueError as error:
            raise ValueError(f"{where(group)}: {error}") from error


@dataclass(frozen=True, eq=False)
class FactualRenderer(_ThroughPolicy):
    """Implements `groups.Renderer` for a scalar model that is shown facts: plain answers behind question and facts."""

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over everything `render` reads besides the group."""
        parts = [REWARD_RENDER_VERSION, self.policy.fingerprint, FACTS]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def measure(self, group: Group) -> Lengths:
        """As `render(...).lengths`. Raises ValueError, naming the group's origin, where it has no facts."""
        return self.policy.measure(with_facts(group))

    def render(self, group: Group, decode: Decode) -> Rendered:
        """A group as arrays. Raises ValueError as `measure` and the policy's renderer do."""
        return self.policy.render(with_facts(group), decode)


AnyRewardRenderer = RewardRenderer | FactualRenderer | LlavaOnevisionRenderer
"""How a reward model sees a group; the policy's own renderer is that of a scalar model without facts."""


def shows_facts(renderer: Renderer) -> bool:
    """Whether what is rendered depends on a group's facts."""
    return isinstance(renderer, FactualRenderer) or (isinstance(renderer, RewardRenderer) and renderer.facts)


def with_facts(group: Group) -> Group:
    """The group with its facts behind the question, a line each: what an annotator who can check would know.

    Source: Fact-RLHF, https://arxiv.org/abs/2309.14525, whose reward model reads captions and options beside the
    picture; the words around them are ours. Raises ValueError, naming the group's origin, where there are none.
    """
    if not group.facts:
        raise ValueError(f"{where(group)}: no facts, and this reward model is shown them: {FACTS_CURE}")
    if not group.prompt or group.prompt[-1].role != "user":
        raise ValueError(f"{where(group)}: the prompt does not end with a user turn")
    shown = "\n".join([f"\n{FACTS} {group.facts[0]}", *group.facts[1:]])
    last = dataclasses.replace(group.prompt[-1], text=group.prompt[-1].text + shown)
    responses = tuple(
        each if each.question is None else dataclasses.replace(each, question=each.question + shown)
        for each in group.responses
    )
    return dataclasses.replace(group, prompt=(*group.prompt[:-1], last), responses=responses)


def check_facts(groups: Sequence[Group]) -> str:
    """How many facts of how many groups will be shown, for people. Raises ValueError counting those without any."""
    if bare := [group for group in groups if not group.facts]:
        named = ", ".join(map(where, bare[:3])) + (", ..." if len(bare) > 3 else "")
        raise ValueError(
            f"{len(bare)} of {len(groups)} groups have no facts ({named}), and this reward model is shown them: "
            f"{FACTS_CURE}"
        )
    return f"{sum(len(group.facts) for group in groups)} facts of {len(groups)} groups are shown to the reward model"


def without_critiques(group: Group) -> Group:
    """The group with no response's reason: what a model is asked that is to criticise, or to score without."""
    return dataclasses.replace(group, responses=tuple(dataclasses.replace(r, reason=None) for r in group.responses))


def load_reward_renderer(
    directory: str, options: RenderOptions | None = None, *, template: str = ""
) -> AnyRewardRenderer:
    """The renderer of a reward model's assets: of a scalar model the policy's, or one with facts, of a critique model
    one with its template.

    `template` is a file, for a model that does not bring its own (the released one, whose sha256 is checked), or to say
    what it must be. Raises ValueError where the two differ, and where neither is there.
    """
    settings = read_settings(directory)
    if settings is None:
        raise ValueError(
            f"{directory}: a policy; a reward model is asked for here (train one: configs/critique_reward_7b.py)"
        )
    if settings.critique:
        settings = dataclasses.replace(settings, template=_template(directory, settings, template))
    elif template:
        raise ValueError(f"{directory}: a scalar reward model reads plain answers; leave out the template {template}")
    return renderer_with(settings, directory, options)


def renderer_with(settings: RewardSettings, directory: str, options: RenderOptions | None = None) -> AnyRewardRenderer:
    """The renderer of a reward model with these settings on the assets of `directory`, a policy's or its own."""
    options = options or RenderOptions()
    if options.system is None:
        options = dataclasses.replace(options, system=settings.system)
    policy = load_renderer(directory, options)
    if settings.critique and settings.template:
        return RewardRenderer(policy, settings.template, settings.facts)
    return FactualRenderer(policy) if settings.facts else policy


def _template(directory: str, settings: RewardSettings, file: str) -> str:
    given = read_template(file) if file else None
    if settings.template is not None:
        if given not in (None, settings.template):
            raise ValueError(f"{file} is not the template {directory} was trained with: leave it out")
        return settings.template
    if given is None:
        raise ValueError(
            f"{directory}: MM-RLHF's released reward model was trained with a template that its code holds and that is "
            f"not ours to ship: write it to a file and name that (sha256 {RELEASED_SHA256}, 434 characters with "
            "{question} and {answer})"
        )
    if (found := template_sha256(given)) != RELEASED_SHA256:
        raise ValueError(
            f"{file}: sha256 {found}, but the template of MM-RLHF's released reward model has {RELEASED_SHA256}"
        )
    return given


def settings_for_training(
    start: epath.PathLike,
    head: str,
    critique: bool,
    template: str,
    *,
    attributes: tuple[str, ...] = (),
    quantiles: int = 0,
    facts: bool = False,
) -> RewardSettings:
    """What a run's reward.json says, given the assets it starts from: a policy's, or those of a reward model that is
    trained on.

    `template` is a file, empty for the model's own or the built-in one. Raises ValueError where the head is another, or
    what it is shown.
    """
    settings = read_settings(start)
    if settings is None:
        text = read_template(template) if critique else None
        form: Head = "tanh" if head == "tanh" else "linear"
        return RewardSettings(form, critique, text, attributes=attributes, quantiles=quantiles, facts=facts)
    for name, asked in (("head", head), ("attributes", attributes), ("quantiles", quantiles), ("facts", facts)):
        if (own := getattr(settings, name)) != asked:
            verb = "is" if name == "head" else "are"
            raise ValueError(f"{start}: its {name} {verb} {own!r}, the recipe asks for {asked!r}: set reward.{name}")
    if not critique:
        return dataclasses.replace(settings, critique=False, template=None)
    if template:
        return dataclasses.replace(settings, critique=True, template=read_template(template))
    own = settings.template if settings.critique else read_template("")
    if own is None:
        raise ValueError(f"{start}: the released reward model brings no template: set reward.template")
    return dataclasses.replace(settings, critique=True, template=own)
