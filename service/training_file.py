"""What a job learns from, by the one name OpenAI's clients have for it: `training_file`.

Owns: reading and writing such a name. Does not own: the ledger, nor which groups of it a job takes.
"""

from __future__ import annotations

import re
from typing import Final

from bon_algos.contracts import ROUTE_PATTERN
from service.errors import InvalidField

LEDGER: Final = "ledger:"


def ledger_of(route: str) -> str:
    """The name of what was logged on a route."""
    return f"{LEDGER}{route}"


def route_of(training_file: str) -> str:
    """The route whose ledger is named. Raises InvalidField for any other name."""
    route = training_file.removeprefix(LEDGER)
    if route == training_file or not re.fullmatch(ROUTE_PATTERN, route):
        raise InvalidField(f"training_file must be {LEDGER} and a route's name", param="training_file")
    return route
