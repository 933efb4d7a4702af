"""A tokenizer with its chat template, kept safe from the texts it is given. No jax, no torch.

What the template writes is control; what a dataset says is text, even where it spells `<|im_end|>` or `<image>`.
Special tokens in texts are hidden behind marks while the template writes and while special tokens are looked for, then
put back and tokenized as ordinary characters. So a conversation that spells no special token gets exactly the ids the
tokenizer gives the template's output.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from mmrlhf_jax.models.llava_onevision.template_process import TemplateRefused, render_template

Message = dict[str, Any]  # {"role": str, "content": [{"type": "text", "text": str} | {"type": "image" | "video"}, ...]}

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, eq=False)
class Chat:
    """Conversations and responses as token ids.

    `name` says in messages whose template this is. Raises ValueError at construction when tokenizer and template do not
    fit together, so that no run starts on prompts the model was never trained on.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str
    name: str

    def __post_init__(self) -> None:
        for token, identity in self.special_tokens.items():
            if identity in self._text_ids(token):
                raise ValueError(f"{self.name}: the tokenizer cannot write {token!r} as ordinary text")
        self._check_piecewise()
        if not self.closing.strip():
            raise ValueError(f"{self.name}: the chat template writes nothing after an assistant turn to end it")

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Special tokens and their ids, longest first so that none hides behind its own beginning."""
        added = self.tokenizer.added_tokens_decoder
        specials = {token.content: identity for identity, token in added.items() if token.special}
        return dict(sorted(specials.items(), key=lambda item: len(item[0]), reverse=True))

    def prompt(self, messages: Sequence[Message]) -> np.ndarray:
        """Ids i32 [P] of a conversation and the opening of the answer; a picture or video is one placeholder id.

        Raises ValueError for a role the template may take for control, and when the template refuses the conversation.
        """
        if strange := [message["role"] for message in messages if message["role"] not in ROLES]:
            raise ValueError(f"a turn has the role {strange[0]!r}; roles are {', '.join(ROLES)}")
        texts = [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]
        mark = _unused_character(self.template, *texts)
        hidden = [
            {**message, "content": [self._hide(part, mark) for part in message["content"]]} for message in messages
        ]
        return self._ids(self._write(hidden, add_generation_prompt=True), mark)

    def response(self, text: str) -> np.ndarray:
        """Ids i32 [R] of an answer and of what the template writes to close it."""
        mark = _unused_character(self.closing, text)
        return self._ids(self._hide({"text": text}, mark)["text"] + self.closing, mark)

    @cached_property
    def closing(self) -> str:
        """What the template writes after an assistant turn's text (`<|im_end|>` and a newline in ChatML).

        The turn's opening must be the generation prompt, up to white space: the hub's LLaVA-OneVision template opens
        past answers with "assistant \\n" and asks for new ones with "assistant\\n".
        """
        question = {"role": "user", "content": [{"type": "text", "text": "question"}]}
        asked = self._write([question], add_generation_prompt=True)
        closings = set()
        for answer in ("\ue000", "\ue000several words\n\ue000"):
            turn = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
            opening, found, closing = self._write([question, turn], add_generation_prompt=False).partition(answer)
            if not found:
                raise ValueError(f"{self.name}: the chat template does not write the text of an assistant turn")
            if opening.split() != asked.split():
                raise ValueError(
                    f"{self.name}: the chat template opens an assistant turn with {opening!r} but asks for an answer "
                    f"with {asked!r}; responses would be trained in another place than they are generated. Mend the "
                    "template."
                )
            closings.add(closing)
        if len(closings) > 1:
            raise ValueError(
                f"{self.name}: the chat template's end of an assistant turn depends on its text: {closings}"
            )
        return closings.pop()

    def _check_piecewise(self) -> None:
        """Special tokens that swallow neighbouring spaces would make our pieces differ from the whole."""
        parts = [{"type": "image"}, {"type": "video"}, {"type": "text", "text": " two  words, one line \n"}]
        text = self._write([{"role": "user", "content": parts}], add_generation_prompt=True)
        whole = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if self._ids(text, _unused_character(text)).tolist() != whole:
            raise ValueError(
                f"{self.name}: the tokenizer encodes {text!r} otherwise than piece by piece (do its special tokens "
                "strip spaces?); such tokenizers are not served"
            )

    def _write(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        variables = {
            **self.tokenizer.special_tokens_map,
            "messages": list(messages),
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return render_template(self.template, variables)
        except TemplateRefused as error:
            raise ValueError(f"{self.name}: the chat template refuses the conversation: {error}") from error

    @cached_property
    def _special(self) -> re.Pattern[str]:
        return re.compile("(" + "|".join(map(re.escape, self.special_tokens)) + ")")

    def _hide(self, part: dict[str, str], mark: str) -> dict[str, str]:
        if "text" not in part:
            return part
        names = list(self.special_tokens)
        return {**part, "text": self._special.sub(lambda found: f"{mark}{names.index(found[0])}{mark}", part["text"])}

    def _reveal(self, text: str, mark: str) -> str:
        names = list(self.special_tokens)
        return re.sub(f"{mark}(\\d+){mark}", lambda found: names[int(found[1])], text)

    def _ids(self, text: str, mark: str) -> np.ndarray:
        if lone := re.search("[\ud800-\udfff]", text):
            raise ValueError(f"the text holds {lone[0]!r}, half of a character (a lone surrogate); mend or drop it")
        ids: list[int] = []
        for number, piece in enumerate(self._special.split(text)):
            if number % 2:
                ids.append(self.special_tokens[piece])
            elif piece:
                ids += self._text_ids(self._reveal(piece, mark))
        return np.asarray(ids, np.int32)

    def _text_ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


def _unused_character(*texts: str) -> str:
    """A private-use character none of the texts holds. Raises ValueError if they hold all of them."""
    used = set().union(*texts)
    for code in range(0xE000, 0xF900):
        if chr(code) not in used:
            return chr(code)
    raise ValueError("a text holds every private-use character of Unicode's basic plane; it is not language")
