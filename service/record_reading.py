"""A record of the registry as this gateway understands it.

Owns: what is answered where a gateway of another version wrote it. Does not own: reading many at once, where such a one
is passed over (catalogue.py, circles.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, TypeVar

from pydantic import ValidationError

from bon_algos.contracts import Circle, Experiment, PolicyRecord, Route
from service.errors import Unavailable

RegistryRecord = TypeVar("RegistryRecord", Circle, Experiment, PolicyRecord, Route)
_CALLED: Final[Mapping[type, str]] = {
    Circle: "circle",
    Experiment: "experiment",
    PolicyRecord: "policy",
    Route: "route",
}


def read_record(kind: type[RegistryRecord], row: str | bytes) -> RegistryRecord:
    """Raises Unavailable for one of another version: to write it back would lose what only the other one knows."""
    try:
        return kind.model_validate_json(row)
    except ValidationError as error:
        called = _CALLED[kind]
        raise Unavailable(
            f"the {called} is of another version than this gateway: ask a gateway of that version",
            code=f"{called}_of_other_version",
        ) from error
