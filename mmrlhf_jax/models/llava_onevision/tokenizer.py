"""The tokenizer of a model directory, which is a program too: its tokenizer.json may name any normalizer, any regular
expression and any Python class of transformers.

So it is checked before the library sees it: byte-level BPE as Qwen2's (all that LLaVA-OneVision has ever had), whose
work is linear in the text, and nothing else. Only the files below are shown to transformers, in a directory of their
own. No jax, no torch.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from etils import epath
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mmrlhf_jax.models.files import MIB, is_number, parse_json, read_file, read_json, shown

FILES = {  # and the most bytes of each; Qwen2's tokenizer.json has 7 MB
    "tokenizer.json": 32 * MIB, "vocab.json": 16 * MIB, "merges.txt": 16 * MIB, "tokenizer_config.json": 2 * MIB,
    "special_tokens_map.json": MIB, "added_tokens.json": MIB,
}  # fmt: skip
ADDED_TOKENS, ADDED_LENGTH = 8_192, 512  # Qwen2's has 22
_CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")
# how texts are split into words: an expression of a stranger could take exponential time on some text
_EXPRESSIONS = tuple(  # Qwen2's, and what differs in its relatives': how many digits are one word
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    + digits
    + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in ("", "{1,3}")
)
_PARTS = {
    "normalizer": ("NFC",),
    "pre_tokenizer": ("ByteLevel", "Split"),
    "post_processor": ("ByteLevel", "TemplateProcessing"),  # transformers writes the latter when it saves
    "decoder": ("ByteLevel",),
}


def load_tokenizer(directory: epath.Path, *, model_type: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a local or remote directory; `model_type` is the config.json's, where transformers shall know.

    Raises FileNotFoundError without any, ValueError naming what of it is not served.
    """
    with tempfile.TemporaryDirectory() as aside:
        local, found = Path(aside), [name for name in FILES if (directory / name).exists()]
        if not found:
            raise FileNotFoundError(f"{directory}: no tokenizer there ({', '.join(FILES)})")
        for name in found:
            (local / name).write_bytes(read_file(directory / name, FILES[name]))
        settings = _settings(directory)
        if "tokenizer.json" in found:
            file = directory / "tokenizer.json"
            _check_pipeline(file, parse_json(file, (local / file.name).read_bytes()))
        elif not str(settings.get("tokenizer_class")).startswith("Qwen2Tokenizer"):
            raise ValueError(f"{directory}: no tokenizer.json, and vocab.json and merges.txt are read as Qwen2's only")
        for name in ("vocab.json", "special_tokens_map.json", "added_tokens.json"):
            if name in found:
                _check_added(directory / name, read_json(directory / name, FILES[name]), name != "vocab.json")
        (local / "tokenizer_config.json").write_text(json.dumps(settings))
        if model_type:
            (local / "config.json").write_text(json.dumps({"model_type": model_type}))
        tokenizer = _load(directory, aside)
    if len(tokenizer.added_tokens_decoder) > ADDED_TOKENS:
        raise ValueError(f"{directory}: the tokenizer adds more than {ADDED_TOKENS:,} tokens")
    return tokenizer


def _load(directory: epath.Path, local: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(local, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of transformers, tokenizers, or where neither expected such a value
        raise ValueError(f"{directory}: the tokenizer does not load: {shown(str(error))}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of the library in Rust; no Exception
            raise
        raise ValueError(f"{directory}: the tokenizer does not load: {shown(str(error))}") from error


def _settings(directory: epath.Path) -> dict[str, Any]:
    """tokenizer_config.json without what would have other files read, or code run."""
    file = directory / "tokenizer_config.json"
    raw = read_json(file, FILES[file.name]) if file.exists() else {}
    if raw.get("auto_map"):
        raise ValueError(f"{file}: auto_map names code of its own, which is not run")
    if (kind := raw.get("tokenizer_class")) not in (None, *_CLASSES):
        raise ValueError(f"{file}: tokenizer_class = {shown(kind)}, supported: {', '.join(_CLASSES)}")
    if "model_max_length" in raw and not is_number(raw["model_max_length"], 1, 1e31):  # 1e30 stands for no bound
        raise ValueError(f"{file}: model_max_length = {shown(raw['model_max_length'])}, a number from 1 is needed")
    _check_added(file, raw.get("added_tokens_decoder", {}), True)
    for name in ("extra_special_tokens", "additional_special_tokens"):
        _check_added(file, raw.get(name) or {}, True)
    return {name: value for name, value in raw.items() if not name.endswith("_file") and name not in _OTHER}


_OTHER = ("auto_map", "init_inputs", "name_or_path", "vocab", "merges", "gguf_file", "tokenizer_object")


def _check_added(file: epath.Path, tokens: Any, few: bool) -> None:
    if not isinstance(tokens, (dict, list)) or (few and len(tokens) > ADDED_TOKENS):
        raise ValueError(f"{file}: at most {ADDED_TOKENS:,} added tokens are served; there: {shown(tokens)}")


def _check_pipeline(file: epath.Path, document: dict[str, Any]) -> None:
    """Raises ValueError where a tokenizer.json is more than byte-level BPE."""
    model, added = document.get("model"), document.get("added_tokens") or []
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        kind = model.get("type") if isinstance(model, dict) else model
        raise ValueError(f"{file}: model is {shown(kind)}, supported: 'BPE'")
    if model.get("dropout"):
        raise ValueError(f"{file}: dropout = {shown(model['dropout'])} makes ids a matter of chance")
    for name, served in _PARTS.items():
        for part in _parts(file, name, document.get(name)):
            if (kind := part.get("type")) not in served:
                raise ValueError(f"{file}: {name} {shown(kind)}, supported: {', '.join(served)}")
            if kind == "Split" and _expression(part) not in _EXPRESSIONS:
                raise ValueError(f"{file}: the {name} splits at {shown(part.get('pattern'))}; only Qwen2's is served")
    _check_added(file, added, True)
    contents = [token.get("content") if isinstance(token, dict) else None for token in added]
    if not all(isinstance(c, str) and 0 < len(c) <= ADDED_LENGTH for c in contents):
        raise ValueError(f"{file}: added_tokens: those of 1 to {ADDED_LENGTH} characters are served")


def _parts(file: epath.Path, name: str, value: Any) -> list[dict[str, Any]]:
    """The members of a part of the pipeline, a Sequence being a list of them; one level, as anybody writes it."""
    if value is None:
        return []
    if not isinstance(value, dict):
        raise ValueError(f"{file}: {name} = {shown(value)} is no part of a tokenizer")
    if value.get("type") != "Sequence":
        return [value]
    members: Any = next(
        (value[key] for key in ("normalizers", "pretokenizers", "processors", "decoders") if key in value), []
    )
    if not isinstance(members, list) or len(members) > 4 or not all(isinstance(member, dict) for member in members):
        raise ValueError(f"{file}: {name}: a Sequence of up to 4 parts is served")
    return members


def _expression(part: dict[str, Any]) -> Any:
    pattern = part.get("pattern")
    return pattern.get("Regex") if isinstance(pattern, dict) and set(pattern) == {"Regex"} else None
