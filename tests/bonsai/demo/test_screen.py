"""The lines that the demo leaves on the screen."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

from rich.console import Console

from bonsai.demo.screen import show_curl_lines
from bonsai.status_lines import key_header


def test_every_line_to_try_brings_the_key_from_its_file() -> None:
    console = Console(file=StringIO(), width=80)
    key = key_header(Path("/state/admin.key"))
    show_curl_lines(console, "http://127.0.0.1:8000", key, "Once", "pol-0123456789abcdef", "job_1", 16)
    assert isinstance(console.file, StringIO)
    lines = [line for line in console.file.getvalue().splitlines() if line.strip().startswith("curl")]
    assert len(lines) == 6
    assert all('-H "Authorization: Bearer $(cat /state/admin.key)"' in line for line in lines)
