"""schemathesis makes requests from the OpenAPI document, good ones and bad ones, and holds the answers against it.

No 5xx, no status, type, header or member that the document does not tell, nothing accepted that it forbids, no key
ignored. What it is told to do, and which checks are off and why: schemathesis.toml.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from service.openapi import OPERATIONS
from tests.fixtures.clients import client_python
from tests.fixtures.gateway import World

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CONFIG = Path(__file__).parent / "schemathesis.toml"
DOCUMENT = Path(__file__).parents[2] / "docs" / "openapi.json"


def test_no_request_of_the_documents_making_gets_an_answer_that_is_not_in_it(world: World, tmp_path: Path):
    for i in range(4):  # of which there is a curve
        assert world.client.post("/generate", {"prompt": f"p{i}", "n": 2}).status == 200
    world.groups(4)
    host, port = world.client.address
    done = subprocess.run(
        [
            str(client_python("schemathesis").with_name("st")), "--config-file", str(CONFIG), "run", str(DOCUMENT),
            "--url", f"http://{host}:{port}", "--header", f"Authorization: Bearer {world.client.key}", "--no-color",
        ],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONUTF8": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Tested: {len(OPERATIONS)}\n" in done.stdout, done.stdout
