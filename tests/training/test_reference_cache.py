"""The durable cache of the reference: what is remembered, what is not believed, and that nothing is computed twice."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import warm
from conftest import config, examples, make_checkpoint, write_pairs

from lite_dil.base.display import Silent
from lite_dil.base.errors import UserError
from lite_dil.base.hashing import blake2
from lite_dil.batching.batch import Batch
from lite_dil.models.fingerprint import fingerprint, reference_key
from lite_dil.recipes.preference import train
from lite_dil.training.reference_cache import ReferenceCache, cache_folder, open_cache

KEY = {"weights": "some"}
DATA = Batch.of(examples(3))
VALUES = np.array([-1.5, -2.25, -3.0, -4.125, -5.0, -6.5], np.float32)


def test_what_is_added_is_found_bit_for_bit_by_the_next_run(tmp_path: Path) -> None:
    cache = ReferenceCache(tmp_path, KEY)
    assert cache.lookup(DATA) is None
    cache.add(DATA, VALUES)
    again = ReferenceCache(tmp_path, KEY)
    np.testing.assert_array_equal(again.lookup(DATA), VALUES)
    # One response by itself, and the whole in another order.
    backwards = Batch.of(examples(3)[::-1])
    np.testing.assert_array_equal(again.lookup(backwards), VALUES.reshape(3, 2)[::-1].ravel())
    assert ReferenceCache(tmp_path, {"weights": "others"}).lookup(DATA) is None


def test_a_prompt_and_its_response_are_kept_apart(tmp_path: Path) -> None:
    def pair(prompt: list[int], response: list[int]) -> Batch:
        return Batch([np.array(prompt)], [np.array(response)], np.array([0]), np.array([1]))

    cache = ReferenceCache(tmp_path, KEY)
    cache.add(pair([1, 2], [3]), np.array([-1.0], np.float32))
    assert cache.lookup(pair([1], [2, 3])) is None
    assert cache.lookup(pair([1, 2], [4])) is None
    cache.add(pair([1], [2, 3]), np.array([-2.0], np.float32))
    assert cache.lookup(pair([1, 2], [3])) == [-1.0]
    assert cache.lookup(pair([1], [2, 3])) == [-2.0]


def test_damaged_and_torn_records_are_computed_again(tmp_path: Path) -> None:
    cache = ReferenceCache(tmp_path, KEY)
    cache.add(DATA, VALUES)
    assert cache.path is not None
    content = bytearray(cache.path.read_bytes())
    content[20] ^= 1  # in the first record's sum
    cache.path.write_bytes(bytes(content[:-5]))  # and a kill in the middle of the last
    damaged = ReferenceCache(tmp_path, KEY)
    assert damaged.damaged == 2
    assert damaged.lookup(DATA) is None
    assert len(damaged.known) == 4
    damaged.add(DATA, VALUES)
    np.testing.assert_array_equal(ReferenceCache(tmp_path, KEY).lookup(DATA), VALUES)


def test_non_finite_values_are_not_remembered(tmp_path: Path) -> None:
    cache = ReferenceCache(tmp_path, KEY)
    cache.add(DATA, np.where(np.arange(6) == 2, np.nan, VALUES).astype(np.float32))
    assert len(cache.known) == 5


def test_two_runs_may_add_to_one_file(tmp_path: Path) -> None:
    one, two = ReferenceCache(tmp_path, KEY), ReferenceCache(tmp_path, KEY)
    other = Batch.of(examples(3, seed=9))
    one.add(DATA, VALUES)
    two.add(other, VALUES)
    one.add(other, VALUES)
    both = ReferenceCache(tmp_path, KEY)
    assert both.damaged == 0
    np.testing.assert_array_equal(both.lookup(DATA), VALUES)
    np.testing.assert_array_equal(both.lookup(other), VALUES)


def test_the_key_changes_with_all_that_the_reference_depends_on(tmp_path: Path) -> None:
    first = make_checkpoint(tmp_path / "first")
    second = make_checkpoint(tmp_path / "second", seed=1)
    third = make_checkpoint(tmp_path / "third", rope_theta=60000.0)  # the same weights in another config

    def key(model: Path, identity: str = "torch float32", **changes: Any) -> str:
        return json.dumps(reference_key(config(**changes), tmp_path / "memo", str(model), identity))

    keys = [key(first), key(second), key(third), key(first, "torch bfloat16")]
    assert len(set(keys)) == 4
    assert key(first) == key(first, loss="dpo", learning_rate=1.0, epochs=3.0) == keys[0]
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for content in (b"a", b"b"):
        (adapter / "adapters.safetensors").write_bytes(content)
        keys.append(key(first, init_adapter=str(adapter), reference="initial-adapter"))
    assert len(set(keys)) == 6
    assert key(first, init_adapter=str(adapter), reference="base") == keys[0]
    # A file that was changed is read again.
    weights = first / "model.safetensors"
    weights.write_bytes((second / "model.safetensors").read_bytes())
    assert key(first) != keys[0]


def test_weights_changed_in_place_are_read_again_though_their_time_was_kept(tmp_path: Path) -> None:
    """Their size and time of change are as before; the time that only the system sets is not."""
    first, second = (make_checkpoint(tmp_path / name, seed=seed) for seed, name in enumerate(("first", "second")))
    memo, weights = tmp_path / "memo", first / "model.safetensors"
    before, stat = fingerprint(first, memo), weights.stat()
    weights.write_bytes((second / "model.safetensors").read_bytes())
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    now = weights.stat()
    assert (now.st_size, now.st_mtime_ns, now.st_ino) == (stat.st_size, stat.st_mtime_ns, stat.st_ino)
    assert fingerprint(first, memo) == fingerprint(second, None) != before


def test_a_files_name_is_its_hash_in_the_hubs_cache_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stranger's folder whose weights are a link to blobs/HASH, HASH being that of an honest model, is not that model."""
    honest, other = (make_checkpoint(tmp_path / name, seed=seed) for seed, name in enumerate(("honest", "other")))
    blob = "ab" * 32

    def linked(cache: Path, weights: Path) -> Path:
        (cache / "blobs").mkdir(parents=True)
        shutil.copyfile(weights, cache / "blobs" / blob)
        (model := cache / "snapshots" / "x").mkdir(parents=True)
        (model / "model.safetensors").symlink_to(cache / "blobs" / blob)
        return model

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    in_hub = linked(tmp_path / "hub" / "models--honest", honest / "model.safetensors")
    strange = linked(tmp_path / "strange", other / "model.safetensors")
    (tmp_path / "hub" / "models--honest" / "blobs" / blob).write_bytes(b"not read: the name says what it is")
    values = [fingerprint(folder, tmp_path / "memo") for folder in (in_hub, strange)]
    assert values[0] == blake2([f"model.safetensors {blob}\n".encode()]).hex() != values[1]


def test_a_folder_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--reference-cache .*file.*: cannot be used"):
        ReferenceCache(tmp_path / "file", KEY)


def run(backend: str, model: str, tmp_path: Path, name: str, **changes: Any) -> list[dict[str, Any]]:
    """Train for a little and return the lines of metrics."""
    data = tmp_path / "pairs.jsonl"
    if not data.exists():
        write_pairs(data)
    settings = {
        "backend": backend,
        "model": model,
        "data": str(data),
        "output_dir": str(tmp_path / name),
        "batch_size": 4,
        "gradient_accumulation_steps": 1,
        "reference_cache": str(tmp_path / "cache"),
        "report_samples": 0,
        **changes,
    }
    train(config(**settings), Silent())
    return [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]


def test_the_second_epoch_and_the_next_loss_do_no_reference_pass(backend_name: str, tiny: str, tmp_path: Path) -> None:
    first = run(backend_name, tiny, tmp_path, "lsif", epochs=2.0)
    # The start-up check computes the first step's passes, which are then known.
    assert [line["reference_passes"] for line in first] == [0, 1, 1, 0, 0, 0]
    second = run(backend_name, tiny, tmp_path, "dpo", loss="dpo", eval_data=str(tmp_path / "pairs.jsonl"))
    assert [line["reference_passes"] for line in second if "loss" in line] == [0, 0, 0]
    without = run(backend_name, tiny, tmp_path, "off", epochs=2.0, reference_cache="off")
    assert [line["reference_passes"] for line in without] == [0, 1, 1, 0, 0, 0]  # remembered in memory
    for one, other in zip(first, without, strict=True):
        assert one["loss"] == other["loss"]
        assert one["log_ratio/chosen"] == other["log_ratio/chosen"]


def test_the_cache_holds_what_the_loop_computes(backend_name: str, tiny: str, tmp_path: Path) -> None:
    """The same run on a cache that was filled up front, in other batches."""
    filled = run(backend_name, tiny, tmp_path, "filled", precompute_reference=True)
    lazy = run(backend_name, tiny, tmp_path, "lazy", reference_cache=str(tmp_path / "other"))
    assert [line["reference_passes"] for line in filled] == [0, 0, 0]
    for one, other in zip(filled, lazy, strict=True):
        assert one["log_ratio/chosen"] == pytest.approx(other["log_ratio/chosen"], abs=1e-5)
        assert one["logps/chosen"] == pytest.approx(other["logps/chosen"], abs=1e-4)
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)


def test_what_several_passes_of_a_step_compute_is_remembered_for_the_right_answers(tiny: str, tmp_path: Path) -> None:
    small = {"batch_size": 1, "gradient_accumulation_steps": 4, "layout": "plain"}
    run("cpu", tiny, tmp_path, "filling", **small)
    again = run("cpu", tiny, tmp_path, "again", **small)
    without = run("cpu", tiny, tmp_path, "without", reference_cache=str(tmp_path / "other"), **small)
    for one, other in zip(again, without, strict=True):
        assert (one["reference_passes"], other["reference_passes"] > 0) == (0, True)
        assert one["log_ratio/chosen"] == other["log_ratio/chosen"]


def test_precomputing_goes_on_where_it_was_stopped(tiny: str, tmp_path: Path) -> None:
    """A real Ctrl-C in a real process, after the first batch."""
    write_pairs(tmp_path / "pairs.jsonl", 40)
    code = """
import os, signal, sys
from lite_dil.training.passes import Passes
done = Passes.reference
def stop_after_one(*args):
    result = done(*args)
    os.kill(os.getpid(), signal.SIGINT)
    return result
Passes.reference = stop_after_one
from lite_dil.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
    arguments = ["train", "--backend", "cpu", "--model", tiny, "--data", str(tmp_path / "pairs.jsonl"), "--row-tokens", "40"]
    arguments += ["--dtype", "float32", "--precompute-reference", "--reference-cache", str(tmp_path / "cache")]
    arguments += ["--max-steps", "1", "--batch-size", "1", "--max-length", "30", "--report-samples", "0"]
    arguments += ["--output-dir", str(tmp_path / "one")]
    stopped = warm.run(*arguments, code=code)
    assert stopped.returncode == 130, stopped.stderr
    assert "stopping" in stopped.stderr
    assert "reference cache" in " ".join(stopped.stdout.split())
    records = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.logps")) // 32
    assert 2 < records < 80
    again = warm.run(*arguments)
    assert again.returncode == 0, again.stderr
    assert f"{records // 2} of 40 pairs are cached, {40 - records // 2} to compute" in again.stdout
    assert sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.logps")) // 32 == 80


def test_weights_are_hashed_once_for_the_cache_and_for_draws(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LITE_DIL_CACHE", str(tmp_path / "default"))
    for folder, given in ((tmp_path / "given", str(tmp_path / "given")), (tmp_path / "default" / "reference", "off")):
        options = config(reference_cache=given)
        reference_key(options, cache_folder(options), tiny, "torch")
        notes = (folder / "files.json").read_text()
        (folder / "files.json").write_text(notes.replace('": [', '" : ['))  # would be written anew with another hash
        open_cache(options, options, tiny, "torch")
        assert (folder / "files.json").read_text() != notes
    assert {path.name for path in (tmp_path / "default").iterdir()} == {"reference"}


def test_off_writes_nothing(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITE_DIL_CACHE", str(tmp_path / "cache"))
    run("cpu", tiny, tmp_path, "run", reference_cache="off", max_steps=1)
    assert not list((tmp_path / "cache").glob("**/*"))
    assert open_cache(config(), config(), tiny, "torch").path is not None
    with pytest.raises(UserError, match="--precompute-reference fills the cache, which --reference-cache off disables"):
        config(precompute_reference=True, reference_cache="off")
