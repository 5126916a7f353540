"""A policy's report as the worker left it: which form a caller wants, and the bytes of it, proven.

Owns: content negotiation between its three forms, reading one below `reports/<digest>`. Does not own: what stands in a
report (worker), who may read it (the route). Nothing here draws or computes.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from bon_algos.contracts import REPORT_FILES, Manifest, report_digest
from service.errors import NotAcceptable, ReportNotFound

log = logging.getLogger("bonsai.reports")

FORMATS: Final[Mapping[str, str]] = {"json": "application/json", "markdown": "text/markdown", "png": "image/png"}
"""Name in the query -> media type; where a caller takes several equally, the first."""
_FILES: Final[Mapping[str, str]] = {"json": "report.json", "markdown": "README.md", "png": "report.png"}
MAX_FILE_BYTES: Final = 16 * 2**20
_RANGE: Final = re.compile(r"([\w!#$&^.+*-]+/[\w!#$&^.+*-]+)((?:\s*;[^;]*)*)")
_QUALITY: Final = re.compile(r";\s*q\s*=\s*(0(?:\.\d{0,3})?|1(?:\.0{0,3})?)\s*(?=;|$)")


def wanted_format(accept: str) -> str:
    """Which form an Accept header likes best (RFC 9110 12.5.1): of the ranges that match one, the most specific says
    how much. No header takes anything. Raises NotAcceptable."""
    ranges = [_parsed(part.strip()) for part in accept.lower().split(",")] if accept.strip() else [("*/*", 1.0)]
    liked = {name: _liking(media, ranges) for name, media in FORMATS.items()}
    best = max(liked, key=lambda name: liked[name])
    if liked[best] <= 0:
        raise NotAcceptable(f"a report is {', '.join(FORMATS.values())}", param="Accept")
    return best


def _parsed(part: str) -> tuple[str, float]:
    """A range and how much it is liked; what cannot be read matches nothing."""
    found = _RANGE.fullmatch(part)
    if found is None:
        return "", 0.0
    quality = _QUALITY.search(found[2])
    return found[1], 1.0 if quality is None else float(quality[1])


def _liking(media: str, ranges: list[tuple[str, float]]) -> float:
    for of_range in (media, f"{media.partition('/')[0]}/*", "*/*"):
        said = [quality for one, quality in ranges if one == of_range]
        if said:
            return max(said)
    return 0.0


def with_report(manifest: Manifest | None) -> Manifest:
    """The same. Raises ReportNotFound where it names no report."""
    if manifest is None or set(manifest.report_files) != set(REPORT_FILES):
        raise ReportNotFound(
            "the policy has no report: base and imported policies have none, a job writes it when it publishes"
        )
    return manifest


def entity_tag(manifest: Manifest, form: str) -> str:
    """Of this form of a policy's report."""
    return f'"{manifest.report_files[_FILES[form]]}"'


def is_known(tag: str, if_none_match: str) -> bool:
    """Whether the caller has what this tag stands for (RFC 9110 13.1.2)."""
    told = [one.strip().removeprefix("W/") for one in if_none_match.split(",")]
    return tag in told or told == ["*"]


def read_report(artefacts: Path, manifest: Manifest, form: str) -> bytes:
    """The bytes of one form, with the digest of the manifest. Blocks. Raises ReportNotFound where they are gone, or
    others."""
    name = _FILES[form]
    path = artefacts / "reports" / report_digest(manifest.report_files) / name
    try:
        content = _read(path)
    except OSError as error:
        log.error("the report of %s cannot be read: %s %s", manifest.policy_id, name, error.strerror)
        content = b""
    if hashlib.sha256(content).hexdigest() != manifest.report_files[name]:
        log.error("ALERT %s of the report of %s is not the file that was registered", name, manifest.policy_id)
        raise ReportNotFound(
            "the report's files are not among the artefacts, or not as they were written: restore them"
        )
    return content


def _read(path: Path) -> bytes:
    """A file's content; no link is followed and nothing waited for. The path is made of a digest and a name of ours."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK)) as file:
        return file.read(MAX_FILE_BYTES)
