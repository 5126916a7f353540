"""What a measurement was taken on: processor, memory and the versions that matter.

Owns the description, no measurement. Names no path of the machine.
"""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

_PACKAGES = ("torch", "vllm", "transformers", "peft", "fastapi", "celery", "redis")


def describe() -> dict[str, str]:
    """Processor, cores, memory, Python and the installed packages, ready to print."""
    return {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "python": platform.python_version(),
        **{name: version for name in _PACKAGES if (version := _version(name)) is not None},
    }


def one_line(machine: dict[str, str]) -> str:
    """`AMD EPYC · 2 cores · 24 GiB · python 3.11.2 · torch 2.13.0 …`"""
    bare = [machine["processor"], f"{machine['cores']} cores", machine["memory"]]
    named = [f"{name} {value}" for name, value in machine.items() if name not in ("processor", "cores", "memory")]
    return " · ".join(bare + named)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _version(package: str) -> str | None:
    for name in (package, f"{package}-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None
