"""What a job learns from, by the one name OpenAI's clients have for it: `training_file`.

Owns: reading and writing such a name. Does not own: the ledger and which groups of it a job takes, files (files.py).
"""

from __future__ import annotations

import re
from typing import Final

from bon_algos.contracts import FILE_ID_PATTERN, ROUTE_PATTERN, JobSpec
from service.errors import InvalidField

LEDGER: Final = "ledger:"


def name_of(spec: JobSpec) -> str:
    """The file's id, or the name of what was logged on the job's route."""
    return spec.training_file or f"{LEDGER}{spec.route}"


def is_file(training_file: str) -> bool:
    """Whether an uploaded file is named, if one is there."""
    return re.fullmatch(FILE_ID_PATTERN, training_file) is not None


def route_of(training_file: str) -> str:
    """The route whose ledger is named. Raises InvalidField for any other name."""
    route = training_file.removeprefix(LEDGER)
    if route == training_file or not re.fullmatch(ROUTE_PATTERN, route):
        raise InvalidField(
            f"training_file must be {LEDGER} and a route's name, or the id of a file", param="training_file"
        )
    return route
