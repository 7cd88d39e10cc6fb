"""The short form of scripts/soak: what CI runs of it, each part in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "soak"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the layer below the process is for Linux")
def test_kills_power_cuts_and_failing_disks(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "LITE_DIL_CACHE"}
    argv = [sys.executable, str(SCRIPT), "writes", "--short", "--output", str(tmp_path)]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "writes.json").read_text())["rows"]
    assert [row["what"].partition(":")[0] for row in rows][:4] == [
        "who changes the folder",
        "the same command twice",
        "a kill at a write",
        "a power cut at a write",
    ]
    assert not any(row["failures"] for row in rows)
