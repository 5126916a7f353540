"""`If-Match`: a change is made only to the version that its caller has seen (RFC 9110, 13.1.1).

Owns: the tag of a version, the header's form, the comparison. Does not own: the versions. It happens inside the
transaction that makes the change, so of two callers who saw the same version one succeeds.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from starlette.requests import Request

from bon_algos.contracts import Record
from service.errors import PreconditionFailed, Unparseable
from service.headers import IF_MATCH

MAX_LENGTH: Final = 1000
_TAG: Final = re.compile(r'\s*(W/)?("[!#-~]*")\s*')


def etag(version: object) -> str:
    """As `ETag` and `If-Match` write it."""
    return f'"{version}"'


def version_of(record: Record | None, *members: str) -> str | None:
    """The version of a record that counts none: a digest of it, or of these members alone. None of one that is not."""
    if record is None:
        return None
    content = record.model_dump_json(include=set(members) if members else None)
    return sha256(content.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Precondition:
    """Which versions may be changed."""

    tags: frozenset[str] | None = None
    """None: any."""

    @classmethod
    def of(cls, request: Request) -> Precondition:
        """Raises Unparseable (400)."""
        header = request.headers.get(IF_MATCH)
        if header is None or header.strip() == "*":
            return ANY
        found = [_TAG.fullmatch(part) for part in header.split(",")]
        if len(header) > MAX_LENGTH or not all(found):
            raise Unparseable(f'{IF_MATCH} must be * or entity tags like "3"', param=IF_MATCH)
        # A weak tag never matches: it says that two versions are as good as the same.
        return cls(frozenset(match[2] for match in found if match is not None and match[1] is None))

    def require(self, version: object) -> None:
        """Raises PreconditionFailed."""
        if self.tags is not None and etag(version) not in self.tags:
            raise PreconditionFailed(
                f"this was changed since: it is version {version} now; read it again and decide again",
                param=IF_MATCH,
                facts={"etag": etag(version)},
            )


ANY: Final = Precondition()
