"""Cached log-probs that the model does not compute are found before training; those of other batches and layouts pass."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import config, make_checkpoint, write_pairs

from lite_dil.base.display import Silent
from lite_dil.base.errors import UserError
from lite_dil.recipes.preference import train
from lite_dil.runs.folder import find_checkpoint

Train = Callable[..., None]


@pytest.fixture
def run(backend_name: str, tiny: str, tmp_path: Path) -> Train:
    """Train for a step on 9 pairs, 3 at a time, with one cache."""
    data = write_pairs(tmp_path / "pairs.jsonl", 9)

    def once(name: str, resume: bool = False, **changes: Any) -> None:
        settings = {
            "backend": backend_name,
            "model": tiny,
            "data": str(data),
            "output_dir": str(tmp_path / name),
            "batch_size": 3,
            "max_steps": 1,
            "save_steps": 1,
            "report_samples": 0,
            "reference_cache": str(tmp_path / "cache"),
            **changes,
        }
        train(config(**settings), Silent(), find_checkpoint(str(tmp_path / name), None) if resume else None)

    return once


def poison(folder: Path, by: float, every: int = 1) -> Path:
    """Add `by` nats a token to every `every`-th record, with a checksum that fits."""
    (path,) = folder.glob("*.logps")
    content = path.read_bytes()
    changed = b""
    for number in range(len(content) // 32):
        digest, logps, tokens, _ = struct.unpack_from("<16sdII", content, 32 * number)
        record = struct.pack("<16sdI", digest, logps + by * tokens * (number % every == 0), tokens)
        changed += record + struct.pack("<I", zlib.crc32(record))
    path.write_bytes(changed)
    return path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_honest_values_of_other_batches_and_layouts_pass(run: Train, backend_name: str, dtype: str) -> None:
    run("filling", precompute_reference=True, layout="plain", dtype=dtype)
    for number, layout in enumerate(("plain", {"cpu": "packed", "mlx": "prefix"}[backend_name])):
        run(layout, layout=layout, batch_size=(1, 9)[number], dtype=dtype, seed=number)


@pytest.mark.parametrize(("dtype", "by"), [("float32", 2e-4), ("bfloat16", 1.0)])
def test_poisoned_values_are_found(run: Train, tmp_path: Path, dtype: str, by: float) -> None:
    run("first", precompute_reference=True, dtype=dtype)
    path = poison(tmp_path / "cache", by, every=3)
    for name, resume in (("second", False), ("first", True)):  # also where a run is resumed
        with pytest.raises(UserError) as told:
            run(name, resume, dtype=dtype)
        said = str(told.value)
        assert (
            said.startswith(f"{path} holds a log-prob of -")
            and "apart, of which at most" in said
            and "remove that file" in said
        )
        assert not (tmp_path / "second").exists()
    path.unlink()
    run("second", dtype=dtype)
    poison(tmp_path / "cache", by)
    run("without", dtype=dtype, reference_cache="off")


def test_the_log_probs_of_other_weights_are_not_used(run: Train, tmp_path: Path) -> None:
    """A cache under the name of a model whose weights are others: its records say whose they are."""
    other = make_checkpoint(tmp_path / "other", seed=1)
    run("first", precompute_reference=True)
    run("of another", precompute_reference=True, model=str(other), reference_cache=str(tmp_path / "theirs"))
    (mine,), (theirs,) = ((tmp_path / name).glob("*.logps") for name in ("cache", "theirs"))
    assert mine.name != theirs.name
    mine.write_bytes(theirs.read_bytes())
    run("second")
    first, second = (
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0]) for name in ("first", "second")
    )
    assert first["loss"] == second["loss"] and second["reference_passes"] > 0


def test_only_what_is_cached_is_compared(run: Train, tmp_path: Path) -> None:
    """A cache of other examples alone asks for no pass."""
    run("first", precompute_reference=True)
    poison(tmp_path / "cache", 1.0)
    other = tmp_path / "others.jsonl"
    other.write_text((tmp_path / "pairs.jsonl").read_text().replace(" yes", " and yes").replace(" no", " and no"))
    run("second", data=str(other))
    assert json.loads((tmp_path / "second" / "metrics.jsonl").read_text().splitlines()[0])["step"] == 1
