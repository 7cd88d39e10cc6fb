"""A trained adapter to be used: from a run, a checkpoint or a plain folder, on either backend."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import BACKENDS, batch, config, write_pairs

from lite_dil.backends import registry
from lite_dil.base.errors import UserError
from lite_dil.cli import adapter_flags
from lite_dil.cli.main import main
from lite_dil.config import adapter_source
from lite_dil.generation import policy
from lite_dil.runs.folder import checkpoint_of
from lite_dil.runs.seal import DIGESTS


def parsed(*argv: str, required: bool = True) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    adapter_flags.add_arguments(parser, required)
    return parser.parse_args(argv)


def logps(*argv: str) -> np.ndarray:
    """Load what the flags name; return log-probs under it."""
    said: list[str] = []
    model = policy.load(adapter_flags.find(parsed(*argv)), said.append)
    assert model.backend.name in said[-1]
    return model.backend.token_logps(batch())


class Runs(NamedTuple):
    """A finished run of each backend, with checkpoints."""

    folders: dict[str, Path]
    model: str


@pytest.fixture(scope="module")
def runs(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    data = str(write_pairs(folder / "pairs.jsonl"))
    argv = ["train", "--model", tiny, "--data", data, "--dtype", "float32", "--learning-rate", "0.01", "--lora-dropout", "0.1"]
    argv += ["--max-steps", "3", "--save-steps", "1", "--gradient-accumulation-steps", "1", "--report-samples", "0"]
    for name in BACKENDS:
        assert main([*argv, "--backend", name, "--output-dir", str(folder / name)]) == 0
    return Runs({name: folder / name for name in BACKENDS}, tiny)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_run_its_adapter_and_its_last_checkpoint_are_one(runs: Runs, name: str) -> None:
    """Model, backend and type are the run's; either backend reads what the other wrote."""
    run = runs.folders[name]
    own = logps("--adapter", str(run))
    np.testing.assert_array_equal(logps("--adapter", str(run / "adapter")), own)
    np.testing.assert_array_equal(logps("--adapter", str(run / "checkpoints/step-3")), own)
    first = logps("--adapter", str(run / "checkpoints/step-1"))
    base = logps("--adapter", str(run), "--strength", "0")
    assert np.abs(first - own).max() > 1e-4
    assert np.abs(base - own).max() > 1e-4
    other = "mlx" if name == "cpu" else "cpu"
    np.testing.assert_allclose(logps("--adapter", str(run), "--backend", other, "--dtype", "float32"), own, atol=1e-4)
    source = adapter_flags.find(parsed("--adapter", str(run)))
    assert (source.options.backend, source.options.dtype, source.options.model) == (name, "float32", runs.model)
    assert source.run is not None
    assert source.run.path == run.absolute()


@pytest.mark.parametrize("name", BACKENDS)
def test_a_folder_of_an_adapter_alone_names_its_model(runs: Runs, name: str, tmp_path: Path) -> None:
    """In PEFT's format and in mlx-lm's; --model wins over what it names."""
    alone = tmp_path / "adapter"
    shutil.copytree(runs.folders[name] / "adapter", alone)
    own = logps("--adapter", str(runs.folders[name]))
    np.testing.assert_array_equal(logps("--adapter", str(alone), "--backend", name, "--dtype", "float32"), own)
    assert adapter_flags.find(parsed("--adapter", str(alone))).run is None
    moved = tmp_path / "model"
    shutil.copytree(runs.model, moved)
    config = json.loads((alone / "adapter_config.json").read_text())
    key = "base_model_name_or_path" if name == "cpu" else "model"
    assert config[key] == runs.model
    (alone / "adapter_config.json").write_text(json.dumps(config | {key: str(tmp_path / "gone")}))
    with pytest.raises(UserError, match=rf"adapter_config\.json is not what was written.*delete {DIGESTS}"):
        adapter_flags.find(parsed("--adapter", str(alone)))
    (alone / DIGESTS).unlink()  # as of one from elsewhere
    flags = ["--adapter", str(alone), "--backend", name, "--dtype", "float32"]
    with pytest.raises(UserError, match="gone: "):
        logps(*flags)
    np.testing.assert_array_equal(logps(*flags, "--model", str(moved)), own)
    del config[key]
    (alone / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="--model"):
        adapter_flags.find(parsed(*flags))


def test_a_config_of_another_program_is_left_alone(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("layers: 3\n")
    for folder in (tmp_path / "mine", tmp_path / "models" / "adapter", tmp_path / "models" / "x" / "adapter"):
        shutil.copytree(runs.folders["cpu"] / "adapter", folder)
        assert adapter_flags.find(parsed("--adapter", str(folder))).run is None


@pytest.mark.parametrize("ended", [True, False])
def test_checkpoints_of_older_versions_hold_their_adapter_beside_the_state(runs: Runs, tmp_path: Path, ended: bool) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs.folders["cpu"], run)
    for checkpoint in (run / "checkpoints").iterdir():
        (checkpoint / "adapters" / "policy").rename(checkpoint / "adapter")
        (checkpoint / "adapters").rmdir()
        (checkpoint / "digests.json").unlink()
    if not ended:
        shutil.rmtree(run / "adapter")
    first, last = (run / "checkpoints" / f"step-{step}" for step in (1, 3))
    for named, adapter in (
        (first, first / "adapter"),
        (first / "adapter", first / "adapter"),
        (run, run / "adapter" if ended else last / "adapter"),
    ):
        found = adapter_flags.find(parsed("--adapter", str(named)))
        assert (found.adapter, found.run.path if found.run else None) == (adapter, run)
    assert [checkpoint_of(path) for path in (first / "adapter", run / "adapter")] == [first, None]


def test_of_a_run_that_has_not_ended_the_newest_checkpoint_is_used(runs: Runs, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs.folders["cpu"], run)
    shutil.rmtree(run / "adapter")
    said: list[str] = []
    model: Any = policy.load(adapter_flags.find(parsed("--adapter", str(run))), said.append)
    assert said[0].startswith(f"{run} ") and "step-3" in said[0]
    np.testing.assert_array_equal(model.backend.token_logps(batch()), logps("--adapter", str(runs.folders["cpu"])))
    said.clear()
    policy.load(adapter_flags.find(parsed("--adapter", str(runs.folders["cpu"]))), said.append)
    assert len(said) == 1


def test_the_bare_model(runs: Runs) -> None:
    source = adapter_flags.find(parsed("--model", runs.model, "--backend", "cpu", "--dtype", "float32", required=False))
    assert source.adapter is None
    bare = policy.load(source, lambda _: None).backend.token_logps(batch())
    np.testing.assert_array_equal(bare, logps("--adapter", str(runs.folders["cpu"]), "--strength", "0"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--adapter", "nowhere"), "--adapter nowhere: no adapter there; give a run's folder"),
        (("--adapter", "{run}", "--strength", "1.6"), "--strength 1.6: expected 0"),
        (("--adapter", "{run}", "--strength", "nan"), "--strength nan: expected 0"),
        (("--strength", "0.5"), "--strength 0.5 needs an adapter; give --adapter too"),
        (("--adapter", "{run}", "--backend", "tpu"), "is not one of auto, cuda, mlx, cpu"),
        (("--adapter", "{broken}"), "adapter_config.json cannot be read"),
    ],
)
def test_what_cannot_be_found(runs: Runs, tmp_path: Path, argv: tuple[str, ...], message: str) -> None:
    (tmp_path / "adapter_config.json").write_text("{")
    places = {"run": runs.folders["cpu"], "broken": tmp_path}
    with pytest.raises(UserError) as caught:
        adapter_flags.find(parsed(*(text.format(**places) for text in argv), required=False))
    assert message in str(caught.value)


def test_what_a_library_remarks_when_it_is_imported_is_told_once(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a policy that is loaded, and of a backend alone."""
    monkeypatch.setattr(registry, "import_library", lambda name: f"a remark on {name}")
    said = list[str]()
    registry.load("cpu", config(model=tiny), tiny, None, None, said.append)
    assert said == ["a remark on cpu"]
    policy.load(adapter_source.find(None, {"model": tiny, "backend": "cpu"}), said.append).close()
    assert said.count("a remark on cpu") == 2
