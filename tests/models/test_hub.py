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


@pytest.fixture(scope="module")
def endpoint(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The server's address; owner/good and owner/other have a card that names one of their files a split of "good"."""
    place = tmp_path_factory.mktemp("hub")
    for name in ("prefs", "good", "other"):
        (place / name).mkdir()
        write_pairs(place / name / "train.jsonl", 8)
        write_pairs(place / name / "test.jsonl", 4)
    card = "---\nconfigs:\n- config_name: good\n  data_files:\n  - split: learn\n    path: train.jsonl\n---\n"
    for name in ("good", "other"):
        (place / name / "README.md").write_text(card)
    folders = {f"datasets/owner/{name}": place / name for name in ("prefs", "good", "other")}
    folders["models/owner/tiny"] = Path(tiny)
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


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def asked(endpoint: str, home: Path) -> dict[str, new.Done]:
    """What one new interpreter made of these commands, in this order."""
    both = "--data owner/prefs --eval-data owner/prefs:test"
    commands = {
        "cpu": f"--model owner/tiny {both} --backend cpu",
        "mlx": f"--model owner/tiny {both} --backend mlx",
        "split": "--model owner/tiny --data owner/good/good:learn --max-rows 3 --backend cpu",
        "no split": "--model owner/tiny --data owner/other/good --backend cpu",
    }
    for backend in ("cpu", "mlx"):
        commands |= {
            f"no model, {backend}": f"--model owner/none --data owner/prefs --backend {backend}",
            f"no data, {backend}": f"--model owner/tiny --data owner/none --backend {backend}",
            f"no such split, {backend}": f"--model owner/tiny --data owner/prefs:dev --backend {backend}",
        }
    argvs = [["train", *argv.split(), "--max-steps", "1", "--output-dir", str(home / name)] for name, argv in commands.items()]
    return dict(zip(commands, new.run(argvs, variables(endpoint, home)), strict=True))


@pytest.mark.parametrize("backend", ["cpu", "mlx"])
def test_model_and_data_from_the_hub(asked: dict[str, new.Done], home: Path, backend: str) -> None:
    done = asked[backend]
    assert done.code == 0, done.err
    assert "owner/prefs: 8 pairs" in done.out
    assert "owner/prefs:test: 4 pairs" in done.out
    assert f"owner/tiny on {backend}" in done.out
    assert (home / backend / "adapter").is_dir()


def test_a_config_of_a_data_set_and_its_first_rows(asked: dict[str, new.Done], home: Path) -> None:
    assert "owner/good/good:learn: 3 pairs" in asked["split"].out, asked["split"].err
    kept = {path.relative_to(home / "datasets").parts[0] for path in home.glob("datasets/**/*.arrow")}
    assert "owner___good" not in kept  # the first rows alone are streamed
    assert asked["no split"].code == 2
    assert "owner/other/good:SPLIT" in asked["no split"].err
    assert "Traceback" not in asked["no split"].err


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no model", "--model owner/none: its tokenizer cannot be loaded"),
        ("no data", "owner/none: cannot be loaded from the hub"),
        ("no such split", "owner/prefs:dev: cannot be loaded from the hub"),
    ],
)
def test_ids_that_the_hub_does_not_have(asked: dict[str, new.Done], what: str, message: str) -> None:
    for backend in ("cpu", "mlx"):
        done = asked[f"{what}, {backend}"]
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
        assert (done.code, done.err.count("\n")) == (2, 1), done
        assert done.out in ("", "importing torch ...\n", "importing MLX ...\n")
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
