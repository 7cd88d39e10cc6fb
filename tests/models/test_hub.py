"""Hub ids, against a server on this machine that answers as the Hugging Face hub does, for one model and one data set."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import new
import pytest
from conftest import write_pairs
from hub_server import Busy, Hub, serve


@pytest.fixture
def endpoint(tiny: str, tmp_path: Path) -> Iterator[str]:
    (tmp_path / "prefs").mkdir()
    write_pairs(tmp_path / "prefs" / "train.jsonl", 8)
    write_pairs(tmp_path / "prefs" / "test.jsonl", 4)
    folders = {"models/owner/tiny": Path(tiny), "datasets/owner/prefs": tmp_path / "prefs"}
    with serve(Hub, repositories=folders) as (address, _):
        yield address


def variables(endpoint: str, home: Path) -> dict[str, str]:
    return os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_ETAG_TIMEOUT": "5"}


def train(endpoint: str, home: Path, *flags: str, **more: str) -> subprocess.CompletedProcess[str]:
    """A process of its own: the libraries read these variables when they are imported."""
    env = variables(endpoint, home) | more
    command = [
        sys.executable,
        "-m",
        "lite_dil",
        "train",
        *flags,
        "--max-steps",
        "1",
        "--output-dir",
        str(home / "run"),
    ]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)


@pytest.mark.parametrize("backend", ["cpu", "mlx"])
def test_model_and_data_from_the_hub(endpoint: str, tmp_path: Path, backend: str) -> None:
    flags = ["--model", "owner/tiny", "--data", "owner/prefs", "--eval-data", "owner/prefs:test", "--backend", backend]
    out = train(endpoint, tmp_path / "home", *flags)
    assert out.returncode == 0, out.stderr
    assert "owner/prefs: 8 pairs" in out.stdout
    assert "owner/prefs:test: 4 pairs" in out.stdout
    assert f"owner/tiny on {backend}" in out.stdout
    assert (tmp_path / "home" / "run" / "adapter").is_dir()


def test_a_config_of_a_data_set_and_its_first_rows(endpoint: str, tmp_path: Path) -> None:
    card = "---\nconfigs:\n- config_name: good\n  data_files:\n  - split: learn\n    path: train.jsonl\n---\n"
    (tmp_path / "prefs" / "README.md").write_text(card)
    flags = ["--model", "owner/tiny", "--backend", "cpu", "--data"]
    out = train(endpoint, tmp_path / "home", *flags, "owner/prefs/good:learn", "--max-rows", "3")
    assert "owner/prefs/good:learn: 3 pairs" in out.stdout, out.stderr
    assert not list((tmp_path / "home").glob("datasets/**/*.arrow"))  # streamed
    out = train(endpoint, tmp_path / "other", *flags, "owner/prefs/good")
    assert out.returncode == 2
    assert "owner/prefs/good:SPLIT" in out.stderr
    assert "Traceback" not in out.stderr


def test_ids_that_the_hub_does_not_have(endpoint: str, tmp_path: Path) -> None:
    cases = [
        (["--model", "owner/none", "--data", "owner/prefs"], "--model owner/none: its tokenizer cannot be loaded"),
        (["--model", "owner/tiny", "--data", "owner/none"], "owner/none: cannot be loaded from the hub"),
        (["--model", "owner/tiny", "--data", "owner/prefs:dev"], "owner/prefs:dev: cannot be loaded from the hub"),
    ]
    cases = [([*flags, "--backend", backend], message) for flags, message in cases for backend in ("cpu", "mlx")]
    common = ["--max-steps", "1", "--output-dir", str(tmp_path / "run")]
    found = new.run([["train", *flags, *common] for flags, _ in cases], variables(endpoint, tmp_path / "home"))
    for (_, message), done in zip(cases, found, strict=True):
        assert done.code == 2 and message in done.err and "Traceback" not in done.err, done


def refusing() -> str:
    """An address of this machine where nobody listens."""
    with socket.socket() as here:
        here.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{here.getsockname()[1]}"


def test_without_a_network_there_is_one_message(tiny: str, tmp_path: Path) -> None:
    data = str(write_pairs(tmp_path / "pairs.jsonl", 8))
    (tmp_path / "prompts.txt").write_text("the red\n")
    nowhere, model = refusing(), ["--model", "owner/tiny"]
    missing = (
        f"--model owner/tiny: no such folder, not in the hub's cache here, and the hub cannot be reached ({nowhere} does not"
    )
    cases = [
        (["plan", *model], missing),
        (["data", data, *model], missing),
        (["train", *model, "--data", data, "--backend", "cpu"], missing),
        (["train", *model, "--data", data, "--backend", "mlx"], missing),
        (["generate", str(tmp_path / "prompts.txt"), *model, "--output", "-"], missing),
        (["train", "--model", tiny, "--data", "owner/prefs"], "owner/prefs: cannot be loaded from the hub"),
    ]
    found = new.run([argv for argv, _ in cases], variables(nowhere, tmp_path / "home"))
    for (_, message), done in zip(cases, found, strict=True):
        assert (done.code, done.out, done.err.count("\n")) == (2, "", 1), done
        assert message in done.err and f"{nowhere} does not answer" in done.err


def test_without_a_network_a_model_that_was_had_before_trains(endpoint: str, tmp_path: Path) -> None:
    home, flags = tmp_path / "home", ["--model", "owner/tiny", "--backend", "cpu"]
    flags += ["--data", str(write_pairs(tmp_path / "pairs.jsonl", 8))]
    assert train(endpoint, home, *flags).returncode == 0
    # Were it asked again and again, its library would say so.
    out = train(refusing(), home, *flags, "--resume", str(home / "run"), HF_HUB_VERBOSITY="warning")
    assert out.returncode == 0, out.stderr
    assert "the run is finished" in out.stdout and out.stderr == ""


def test_a_hub_that_is_busy_is_asked_again_in_silence(tiny: str, tmp_path: Path) -> None:
    data = str(write_pairs(tmp_path / "pairs.jsonl", 8))
    with serve(Busy, repositories={"models/owner/tiny": Path(tiny)}) as (address, own):
        out = train(address, tmp_path / "home", "--model", "owner/tiny", "--backend", "cpu", "--data", data)
    assert own.busy == 0
    assert (out.returncode, out.stderr) == (0, "")
