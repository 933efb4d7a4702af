"""What makes a reward model of a LLaVA-OneVision directory: the shape of its head, and `reward.json`, which says how an
answer is put before it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from etils import epath

from mmrlhf_jax.models.files import read_json, read_text
from mmrlhf_jax.models.llava_onevision.config import LlavaOnevisionConfig

Head = Literal["linear", "tanh"]

SETTINGS = "reward.json"
MARKERS = ("[Question]:", "[LMM Response]:", "[Evaluation]:")
FIELDS = ("{question}", "{answer}")
MOST_OUTPUTS = 4096  # of a head
_OPTIONAL = ("attributes", "quantiles", "facts")
RELEASED_SHA256 = "7a824ae727d143f84cad78bb31ee2a8710e5682e34dc41f2a8a1d0d430450b94"
"""of the template MM-RLHF's released reward model was trained with"""
_BUILT_IN = Path(__file__).parent / "template.txt"


@dataclass(frozen=True)
class CritiqueRewardConfig(LlavaOnevisionConfig):
    """The policy's shape and that of the head: one linear layer, as published, or Linear-tanh-Linear, as released.

    It has one output, a score; or `quantiles` (0: one) for each of `attributes`.
    """

    head: Head = "linear"
    attributes: tuple[str, ...] = ()
    quantiles: int = 0

    @property
    def outputs(self) -> int:
        return max(1, len(self.attributes)) * max(1, self.quantiles)


@dataclass(frozen=True)
class RewardSettings:
    """`reward.json` beside a model's config.json: what the reward model's prompts are made of."""

    head: Head = "linear"
    critique: bool = True
    """False: a scalar model, which reads its score at the end of a plain answer"""
    template: str | None = None
    """the text with `{question}` and `{answer}` to be filled in; None: the released model's, which its user brings"""
    system: str | None = None
    """text of the system turn it was trained with; None leaves it to the chat template"""
    attributes: tuple[str, ...] = ()
    """what the head has outputs for, in their order; none: one output, a score"""
    quantiles: int = 0
    """outputs of each attribute, the quantiles q / (Q + 1) of its rating; 0: one, its mean"""
    facts: bool = False
    """True: a group's facts stand behind its question, and a group without any is refused"""

    def __post_init__(self) -> None:
        """Raises ValueError where the outputs make no sense."""
        if len(set(self.attributes)) < len(self.attributes) or not all(self.attributes):
            raise ValueError(f"attributes are names, each once, not {', '.join(map(repr, self.attributes))}")
        if self.quantiles and (self.quantiles < 2 or not self.attributes):
            raise ValueError(f"{self.quantiles} quantiles: at least 2 (or 0), of attributes that are named")
        if len(self.attributes) * max(1, self.quantiles) > MOST_OUTPUTS:
            raise ValueError(f"{len(self.attributes)} attributes x {self.quantiles} quantiles are over {MOST_OUTPUTS}")
        if self.attributes and self.critique:
            raise ValueError("a head for attributes reads plain answers: it has no critique")

    def write(self, directory: epath.PathLike) -> None:
        """What says nothing is left out: a model of one score is described as it was before there were others."""
        said = dataclasses.asdict(self)
        said = {name: value for name, value in said.items() if name not in _OPTIONAL or value}
        (epath.Path(directory) / SETTINGS).write_text(json.dumps(said, indent=2) + "\n")


def read_settings(directory: epath.PathLike) -> RewardSettings | None:
    """The settings of a reward model's directory, None for a policy's. Raises ValueError for a file that is damaged."""
    file = epath.Path(directory) / SETTINGS
    if not file.exists():
        return None
    try:
        raw: dict[str, Any] = read_json(file)
        settings = RewardSettings(**{**raw, **_outputs(raw)})
        if type(settings.facts) is not bool:
            raise ValueError("facts is true or false")
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{file}: not the settings of a reward model: {error}") from error
    texts = (settings.template, settings.system)
    if settings.head not in ("linear", "tanh") or type(settings.critique) is not bool:
        raise ValueError(f"{file}: head is 'linear' or 'tanh', critique true or false")
    if any(text is not None and not isinstance(text, str) for text in texts):
        raise ValueError(f"{file}: template and system are texts or null")
    if settings.template is not None:
        check_template(settings.template, str(file))
    return settings


def _outputs(raw: dict[str, Any]) -> dict[str, Any]:
    """What a reward.json says of its head's outputs, in our types. Raises ValueError where it is none of them."""
    attributes, quantiles = raw.get("attributes", []), raw.get("quantiles", 0)
    named = isinstance(attributes, list) and all(isinstance(name, str) for name in attributes)
    if not named or type(quantiles) is not int or quantiles < 0:
        raise ValueError("attributes is a list of names, quantiles a whole number")
    return {"attributes": tuple(attributes), "quantiles": quantiles}


def read_template(path: str) -> str:
    """A template file, or the built-in one for an empty path. Raises ValueError saying what is wrong with it.

    A template is text with `{question}` and `{answer}` once each, behind the markers `[Question]:` and
    `[LMM Response]:`, and ends in `[Evaluation]:`: the frame of MM-RLHF's released reward model.
    """
    file = epath.Path(path) if path else epath.Path(_BUILT_IN)
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such template file")
    text = read_text(file)
    # an editor's last newline is no part of it; the released one ends in its last marker
    text = text.removesuffix("\n") if text.endswith(f"{MARKERS[-1]}\n") else text
    check_template(text, str(file))
    return text


def check_template(text: str, name: str) -> None:
    """Raises ValueError where `text` is no template; `name` says in messages which."""
    for part in (*FIELDS, *MARKERS):
        if text.count(part) != 1:
            raise ValueError(f"{name}: a reward template holds {part!r} once, this one {text.count(part)} times")
    places = [text.index(part) for part in (MARKERS[0], FIELDS[0], MARKERS[1], FIELDS[1], MARKERS[2])]
    if places != sorted(places):
        raise ValueError(f"{name}: {', '.join(MARKERS)} and their fields stand in this order in a reward template")


def fill(template: str, question: str, answer: str) -> str:
    """The template with its two fields filled; braces in the texts are text."""
    before, rest = template.split(FIELDS[0])
    between, after = rest.split(FIELDS[1])
    return f"{before}{question}{between}{answer}{after}"


def template_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
