"""`lite-dil doctor`: right numbers are said to be right, wrong ones to be wrong, and nothing private is printed."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import BACKENDS

from lite_dil.base.install import install
from lite_dil.cli.main import main
from lite_dil.doctor import checks, examine
from lite_dil.doctor.checks import CHECKS, Subject


@pytest.fixture(scope="module", params=BACKENDS)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject(request.param, tmp_path_factory.mktemp("doctor"))


def test_the_names_are_those_of_the_checks() -> None:
    assert tuple(CHECKS) == examine.NAMES
    assert examine.names_for("cuda", True) == list(CHECKS)
    assert {"4 bits", "offloads"}.isdisjoint(examine.names_for("cpu", False))


@pytest.mark.parametrize("name", [name for name in CHECKS if name != "offloads"])
def test_what_is_right_is_said_to_be(subject: Subject, name: str) -> None:
    ok, text = CHECKS[name](subject)
    assert ok or (ok is None and subject.dtype == "float32"), text


def test_a_wrong_layout_is_found(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sharing layout has later tokens one position too far on, or hides the prompt's first token."""
    place = "torch.reading" if subject.sharing == "packed" else "mlx.backend"
    module = importlib.import_module(f"lite_dil.backends.{place}")
    made = getattr(module, subject.sharing)

    def wrong(*args: Any, **options: Any) -> Any:
        found = made(*args, **options)
        if subject.sharing == "packed":
            return replace(found, position_ids=found.position_ids + (np.arange(found.position_ids.shape[-1]) > 60))
        mask = found.prompt_mask.copy()
        mask[np.arange(len(mask)), mask.argmax(1)] = False
        return replace(found, prompt_mask=mask)

    plain = subject.measured()
    backend = subject.load(init_adapter=subject.adapter, reference="base", layout=subject.sharing)
    monkeypatch.setattr(module, subject.sharing, wrong)
    monkeypatch.setattr(subject, "load", lambda **changes: backend)
    assert checks.equal(subject.measured(layout=subject.sharing, again=True), plain, "the plain layout").ok is False


def test_a_check_that_ends_its_process_is_not_ok() -> None:
    (found,) = examine.examine("cpu", ["no such check"])
    assert (found.name, found.ok) == ("no such check", False)
    assert "KeyError" in found.text


def test_the_caches_are_said_with_their_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own, hub = tmp_path / "own", tmp_path / "hub"
    monkeypatch.setenv("LITE_DIL_CACHE", str(own))
    monkeypatch.setenv("HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(examine, "examine", lambda backend, names: iter(()))
    for path, size in ((own / "tokens" / "a", 1), (own / "rates.json", 2), (hub / "models--x" / "blobs" / "b", 4)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.truncate(size * 2**30)  # a hole
    (hub / "models--x" / "weights").symlink_to(hub / "models--x" / "blobs" / "b")
    main(["doctor", "--backend", "cpu"])
    said = capsys.readouterr().out
    assert f"cache     3.0 GB in {own} (tokens 1.0, other 2.0); LITE_DIL_CACHE moves it\n" in said
    assert f"cache     4.0 GB in {hub}; HF_HUB_CACHE moves it\n" in said
    main(["doctor", "--backend", "cpu", "--json"])
    found = json.loads(capsys.readouterr().out)["caches_gb"]
    assert found == {"tokens": 1.0, "reference": 0.0, "sampled": 0.0, "other": 2.0, "hub": 4.0}


def test_json_holds_what_a_report_needs_and_nothing_private(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    token, path = "hf_abcdefgh", str(Path.home() / "models" / "own")

    def broken(backend: str, names: list[str]) -> Any:
        yield examine.Checked(names[0], False, f"no file {path} with {token}", 0.0)

    monkeypatch.setattr(examine, "examine", broken)
    assert main(["doctor", "--backend", "cpu", "--json"]) == 1
    text = capsys.readouterr().out
    found = json.loads(text)
    assert found["packages"]["torch"] and found["backend"] == "cpu" and found["checks"][0]["ok"] is False
    assert token not in text and "models" not in text


def test_no_backend(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    find = importlib.util.find_spec
    gone = {"torch", "peft", "mlx", "mlx_lm", "bitsandbytes"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in gone else find(name))
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert f"no backend is installed: {install('cpu')}" in out
    assert re.search(rf"  --4bit on cuda and cpu +{re.escape(install('cpu'))}\n", out)
