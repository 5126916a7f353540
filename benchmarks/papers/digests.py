"""Which code a kept result came from: what other code found is found anew.

Owns what counts as that code. Does not own where results are kept (`model_jobs`, `__main__`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import bon_algos
import worker
from benchmarks import claims

_LIBRARY = (bon_algos, worker)


def of_files(files: Iterable[Path]) -> str:
    """Of their bytes, in the order given; 12 hexadecimal digits. OSError where one cannot be read."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


@cache
def of_training(*files: str) -> str:
    """Of the library and of these files beside it."""
    packages = [Path(package.__file__ or "").parent for package in _LIBRARY]
    library = [file for package in packages for file in sorted(package.rglob("*.py"))]
    return of_files([*library, *map(Path, files)])


def of_experiments() -> str:
    """Of the library, all experiments and how they claim. Not of the demo's models, which are built on the way."""
    return of_training(claims.__file__, *map(str, sorted(Path(__file__).parent.glob("*.py"))))
