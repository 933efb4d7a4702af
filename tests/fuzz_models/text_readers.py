"""The readers of what turns texts into ids: tokenizers, and chat templates with the process that renders them."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

from etils import epath
from fuzz_models import template_child
from fuzz_models.harness import LINES, Reader
from fuzz_models.mutations import dumps, mutate_bytes, mutate_document, mutate_file, places
from fuzz_models.samples import document, file_of, twice, valid, write_valid
from fuzz_models.templates import template_case

from mmrlhf_jax.models import files
from mmrlhf_jax.models.llava_onevision import chat, template_process, tokenizer

# --- tokenizers ---------------------------------------------------------------------------------------------------


@cache
def _tokenizer_places() -> list[tuple[Any, ...]]:
    """Few of the vocabulary's, all others."""
    every = places(document("tokenizer.json"))
    return [place for place in every if place[:2] != ("model", "vocab")] * 8 + every[-40:]


_PARTS = (
    {"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaaaaa"},
    {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False},
    {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 50},
    {"type": "Sequence", "pretokenizers": [{"type": "Sequence", "pretokenizers": []}]},
    {"type": "NFC"},
    "NFC",
    {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}]},
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
)
_SETTINGS = (
    {"tokenizer_file": "../outside/secret"}, {"vocab_file": "/etc/passwd", "merges_file": "/etc/passwd"},
    {"auto_map": {"AutoTokenizer": ["x.y", "x.y"]}}, {"tokenizer_class": "BertTokenizer"},
    {"tokenizer_class": "LlamaTokenizer"}, {"extra_special_tokens": {"a": "b"}}, {"chat_template": "{{ x }}"},
    {"added_tokens_decoder": {"-1": {"content": "x"}}}, {"added_tokens_decoder": {"999999999999": {"content": "x"}}},
    {"eos_token": {"__type": "AddedToken", "content": ""}}, {"model_max_length": 10**400}, {"vocab": {}},
    {"tokenizer_class": "Qwen2Tokenizer"}, {"init_inputs": [1, 2]}, {"fix_mistral_regex": True},
    {"extra_special_tokens": [f"<{n}>" for n in range(8_200)]}, {"added_tokens_decoder": 7},
    {"extra_special_tokens": [f"<{n}>" for n in range(8_190)]},
)  # fmt: skip
_MODELS = (
    {"type": "Unigram"}, {"dropout": 0.5}, {"type": "WordPiece"}, {"merges": [["a", "b"]]}, {"vocab": {}},
    # tokenizers 0.23 cuts so many bytes off the second of a pair, which has fewer, and panics
    {"continuing_subword_prefix": "####", "merges": [["a", "b"]]},
    {"continuing_subword_prefix": "\u00e9", "merges": ["a b"]},
)  # fmt: skip
_PATTERNS: tuple[Any, ...] = (
    *({"Regex": expression} for expression in tokenizer._EXPRESSIONS), {"Regex": "(a+)+$"}, {"Regex": 7},
    {"Regex": tokenizer._EXPRESSIONS[0], "String": "a"}, {"String": "a"}, {}, [], None, tokenizer._EXPRESSIONS[0],
)  # fmt: skip
_ADDED = ({"content": ""}, {"content": "x" * 600}, {"content": 7}, {"id": 2**40}, {"id": -1})


def _odd_tokenizer(rng: Random, given: Any) -> None:
    kind = rng.randrange(5)
    if kind == 0:
        given["model"] = {**given["model"], **rng.choice(_MODELS)} if rng.random() < 0.8 else rng.choice(([], 7, "BPE"))
    elif kind == 1:
        given["added_tokens"][0] = {**given["added_tokens"][0], **rng.choice(_ADDED)}
    elif kind == 2:  # as Qwen2's own file has it
        split = {"type": "Split", "pattern": rng.choice(_PATTERNS), "behavior": "Isolated", "invert": False}
        bytes_of = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        both = {"type": "Sequence", "pretokenizers": [split, bytes_of]}
        given["pre_tokenizer"] = both if rng.random() < 0.7 else split
    else:
        given[rng.choice(("normalizer", "pre_tokenizer", "post_processor", "decoder"))] = rng.choice(_PARTS)


def write_tokenizer_case(rng: Random, directory: Path) -> None:
    """One file changed, seldom all: of many changes the first is refused."""
    spoiled = rng.choice(("tokenizer", "tokenizer", "settings", "beside", "all"))

    def write(name: str, given: Any, kind: str, change: Callable[[Random, Any], Any] = twice) -> None:
        if spoiled in (kind, "all"):
            mutate_file(rng, directory / name, change, given)
        else:
            (directory / name).write_bytes(dumps(given))

    def few(rng: Random, document: Any) -> Any:
        return mutate_document(rng, document, rng.choice((0, 1, 1, 2)), _tokenizer_places())

    if rng.random() < 0.5:
        (directory / "typed").touch()
    own = rng.random()
    if own < 0.01:
        return  # no tokenizer at all
    settings = document("tokenizer_config.json")
    if rng.random() < 0.3:
        settings = {**settings, **rng.choice(_SETTINGS)}
    given = json.loads(valid()["tokenizer.json"])
    if own < 0.12:
        _write_qwen2(rng, directory, given["model"]["vocab"])
        settings = {**settings, "tokenizer_class": "Qwen2Tokenizer"} if rng.random() < 0.8 else settings
    else:
        if own < 0.35:
            _odd_tokenizer(rng, given)
        write("tokenizer.json", given, "tokenizer", few)
    if spoiled == "beside" or rng.random() < 0.2:
        tokens = {"eos_token": "<|im_end|>", "additional_special_tokens": ["<image>", "<video>"]}
        write("special_tokens_map.json", tokens, "beside")
        write("added_tokens.json", {"<image>": 259, "<video>": 260}, "beside")
    write("tokenizer_config.json", settings, "settings")


def _write_qwen2(rng: Random, directory: Path, vocab: dict[str, int]) -> None:
    """Its own files, without a tokenizer.json."""
    (directory / "vocab.json").write_bytes(dumps(mutate_document(rng, vocab, rng.choice((0, 0, 1)))))
    merges = b"#version: 0.2\n" + rng.choice((b"", b"a b\n", b"h e\n"))
    (directory / "merges.txt").write_bytes(mutate_bytes(rng, merges) if rng.random() < 0.5 else merges)


def read_tokenizer_case(directory: Path) -> None:
    model_type = "llava_onevision" if (directory / "typed").exists() else None  # as of both layouts; the former is slow
    loaded = tokenizer.load_tokenizer(epath.Path(directory), model_type=model_type)
    loaded("some text " * 20 + "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!", add_special_tokens=False)


# --- chat templates -----------------------------------------------------------------------------------------------

# with which a template does not fit: special tokens that swallow spaces, one that is the id of an ordinary character
_TOKENIZERS: dict[str, dict[str, Any]] = {"": {}, "strips": {"lstrip": True, "rstrip": True}, "writes": {}}


@cache
def _chat_tokenizer(kind: str) -> Any:
    from mmrlhf_jax.models.llava_onevision.tokenizer import load_tokenizer

    given = json.loads(valid()["tokenizer.json"])
    given["added_tokens"] = [{**token, **_TOKENIZERS[kind]} for token in given["added_tokens"]]
    if kind == "writes":
        given["added_tokens"].insert(
            0, {**given["added_tokens"][0], "content": "!", "id": given["model"]["vocab"]["!"]}
        )
    with tempfile.TemporaryDirectory() as directory:
        write_valid(Path(directory), "tokenizer.json")
        (Path(directory) / "tokenizer.json").write_bytes(dumps(given))
        return load_tokenizer(epath.Path(directory), model_type="llava_onevision")


def write_template_case(rng: Random, directory: Path) -> None:
    text = template_case(rng, valid()["chat_template.jinja"].decode())
    (directory / "chat_template.jinja").write_text(text, errors="replace")
    every = "".join(map(chr, range(0xE000, 0xF900)))  # no character is left to hide special tokens behind
    said = rng.choice(("what <|im_end|> is\nthis?", "", "\ue0000\ue000", every if rng.random() < 0.1 else "\ud800"))
    role = rng.choice(("system", "assistant", "tool<|im_end|>")) if rng.random() < 0.2 else "user"
    kind = rng.choice(("strips", "writes")) if rng.random() < 0.05 else ""
    (directory / "said.json").write_text(json.dumps([role, said, kind]))


def read_template_case(directory: Path) -> None:
    template = files.read_text(epath.Path(directory) / "chat_template.jinja")
    role, said, kind = json.loads((directory / "said.json").read_text())
    child = template_child.__file__ if os.environ.get(LINES) else template_process.__file__
    with mock.patch.object(template_process, "__file__", child):  # the same, with its lines noted
        try:
            talk = chat.Chat(_chat_tokenizer(kind), template, str(directory))
            talk.prompt([{"role": role, "content": [{"type": "image"}, {"type": "text", "text": said}]}])
            talk.response(said)
        except ValueError as error:  # as the renderer does, which knows the row
            raise ValueError(f"{directory}: {error}") from error


READERS = (
    Reader("tokenizer", write_tokenizer_case, read_tokenizer_case, {file_of(tokenizer): ()}),
    Reader("template", write_template_case, read_template_case, {
        file_of(chat): (),
        file_of(template_process): ("_forget",),  # runs where the process forks, whatever is read
    }, traced=1),
)  # fmt: skip
