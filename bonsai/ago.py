"""How a user says how long ago: 90m, 12h, 7d."""

from __future__ import annotations

import re
import time
from typing import Final

import click

_AGO: Final = re.compile(r"(\d{1,6})([smhd])")
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def ago(_context: click.Context, _param: click.Parameter, value: str | None) -> float | None:
    """Seconds since the epoch."""
    if value is None:
        return None
    found = _AGO.fullmatch(value)
    if found is None:
        raise click.BadParameter("a number with s, m, h or d, such as 90m or 7d")
    return time.time() - int(found[1]) * _SECONDS[found[2]]
