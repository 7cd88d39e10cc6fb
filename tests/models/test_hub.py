"""Hub ids, against a server on this machine that answers as the Hugging Face hub does, for one model and one data set."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import new
import pytest
from conftest import write_pairs
from hub_server import Busy, serve


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
    with serve(Busy, repositories=folders) as (address, own):  # refuses the first two questions for a file
        yield address
        assert own.busy == 0


def variables(endpoint: str, home: Path) -> dict[str, str]:
    return os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_ETAG_TIMEOUT": "5"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def asked(endpoint: str, home: Path, tiny: str) -> dict[str, new.Done]:
    """What one new interpreter made of these commands, in this order."""
    both, own = "--data owner/prefs --eval-data owner/prefs:test", write_pairs(home / "pairs.jsonl", 8)
    commands = {
        # First: what libraries print beside sys.stderr is in its `err`.
        "own": f"--model owner/tiny --data {own} --backend cpu",
        "local": f"--model {tiny} --data {own} --backend cpu",
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
    short = ["--max-steps", "1", "--report-samples", "0"]
    argvs = [["train", *argv.split(), *short, "--output-dir", str(home / name)] for name, argv in commands.items()]
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


@pytest.fixture(scope="module")
def offline(
    asked: dict[str, new.Done], home: Path, tiny: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, new.Done]:
    """What a second interpreter makes of these, whose hub does not answer; `asked` had the model from it before."""
    place = tmp_path_factory.mktemp("offline")
    data, nowhere = str(write_pairs(place / "pairs.jsonl", 8)), refusing()
    (place / "prompts.txt").write_text("the red\n")
    model = ["--model", "owner/none"]
    commands = {
        "had before": ["train", "--resume", str(home / "own")],
        "plan": ["plan", *model],
        "data": ["data", data, *model],
        "train, cpu": ["train", *model, "--data", data, "--backend", "cpu"],
        "train, mlx": ["train", *model, "--data", data, "--backend", "mlx"],
        "generate": ["generate", str(place / "prompts.txt"), *model, "--output", "-"],
        "rows": ["train", "--model", tiny, "--data", "owner/none"],
    }
    export = ["export", "--adapter", str(home / "local"), "--model", "owner/tiny", "--format"]
    commands |= {form: [*export, form, "--output", str(home / form)] for form in ("merged", "adapter")}
    # Were a hub asked again and again, its library would say so.
    found = new.run(list(commands.values()), variables(nowhere, home) | {"HF_HUB_VERBOSITY": "warning"})
    return dict(zip(commands, (done._replace(err=done.err.replace(nowhere, "NOWHERE")) for done in found), strict=True))


@pytest.mark.parametrize("command", ["plan", "data", "train, cpu", "train, mlx", "generate", "rows"])
def test_without_a_network_there_is_one_message(command: str, offline: dict[str, new.Done]) -> None:
    done = offline[command]
    assert (done.code, done.err.count("\n")) == (2, 1), done
    assert done.out in ("", "importing torch ...\n", "importing MLX ...\n")
    what = "--model owner/none: no such folder, not in the hub's cache here, and the hub cannot be reached (NOWHERE does not"
    assert ("owner/none: cannot be loaded from the hub" if command == "rows" else what) in done.err
    assert "NOWHERE does not answer" in done.err


def test_without_a_network_a_model_that_was_had_before_trains(offline: dict[str, new.Done]) -> None:
    done = offline["had before"]
    assert (done.code, done.err) == (0, "") and "the run is finished" in done.out, done


def test_a_hub_id_stays_one_in_an_export(offline: dict[str, new.Done], home: Path, tiny: str) -> None:
    """Of a run on a folder, exported with the same model from the hub."""
    for form in ("merged", "adapter"):
        assert offline[form].code == 0, offline[form].err
        assert json.loads((home / form / "export.json").read_text())["model"] == "owner/tiny"
    assert json.loads((home / "adapter" / "adapter_config.json").read_text())["model"] == "owner/tiny"
    for path in [path for path in home.glob("merged/*") if path.suffix in (".json", ".md")]:
        assert tiny not in path.read_text() and str(home / "hub") not in path.read_text(), path


def test_a_hub_that_is_busy_is_asked_again_in_silence(asked: dict[str, new.Done]) -> None:
    assert (asked["own"].code, asked["own"].err) == (0, ""), asked["own"]
