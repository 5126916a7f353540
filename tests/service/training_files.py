"""Files of a few lines, and the form they are sent in."""

from __future__ import annotations

import json
from collections.abc import Mapping

from tests.fixtures.gateway import Client, Reply

BOUNDARY = "----bonsai"
FORM = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}


def line(**changes: object) -> bytes:
    """A good one, with these members instead; None leaves one out."""
    row: dict[str, object] = {
        "prompt": "p",
        # The stub's tokenizer does not say how a completion ends.
        "completions": [{"text": text, "token_ids": list(text.encode())} for text in ("aa", "bb")],
        "rewards": [1.0, 0.0],
        "policy": "base",
        **changes,
    }
    return json.dumps({name: value for name, value in row.items() if value is not None}).encode() + b"\n"


def part(name: str, content: bytes, filename: str | None = None) -> bytes:
    named = "" if filename is None else f'; filename="{filename}"'
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{named}\r\n\r\n'
    return head.encode() + content + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


def uploaded(client: Client, content: bytes, headers: Mapping[str, str] = FORM, filename: str = "f.jsonl") -> Reply:
    body = form(part("purpose", b"fine-tune"), part("file", content, filename))
    return client.request("POST", "/v1/files", body, headers)
