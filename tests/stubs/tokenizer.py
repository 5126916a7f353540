"""A model directory for stubs: one token per byte, so that lengths in tests are counted by hand."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

TEMPLATE = (
    "{% for message in messages %}{{ message.role[0] }}:{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
"""A user's "hi" becomes "u:hi\\na:", eight tokens... one for each character."""

VOCABULARY = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
_CHARACTERS = {i: character for character, i in VOCABULARY.items()}


def write_model_directory(directory: Path, template: str = TEMPLATE) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(byte_tokenizer().to_str())
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return directory


def byte_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab=VOCABULARY, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def token_ids(text: str) -> list[int]:
    ids: list[int] = byte_tokenizer().encode(text).ids
    return ids


def text_of(ids: list[int]) -> str:
    return str(byte_tokenizer().decode(ids))
