"""Reading the tokenizer of a local model directory.

Owns: which files it is made of. Does not own: what it does (`bon_algos.chat`).
"""

from __future__ import annotations

import json
from pathlib import Path

from bon_algos.chat import ChatTokenizer


def read_tokenizer(directory: Path) -> ChatTokenizer:
    """Tokenizer and chat template of a local model directory."""
    template = directory / "chat_template.jinja"
    return ChatTokenizer(
        (directory / "tokenizer.json").read_text(encoding="utf-8"),
        json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8")),
        template.read_text(encoding="utf-8") if template.exists() else None,
    )
