"""Digests that name something on disk: old caches, runs and files of answers are known by them, so the figures stay."""

from __future__ import annotations

import ast
from pathlib import Path

from conftest import config, pair_row

import lite_dil
from lite_dil import backends
from lite_dil.base import hashing
from lite_dil.batching.batch import Batch
from lite_dil.data.encoder import Example, fingerprint
from lite_dil.evaluation.comparison import settings
from lite_dil.generation import policy
from lite_dil.models.fingerprint import fingerprint as weights_fingerprint
from lite_dil.training import reference_cache as reference

EXAMPLES = [Example((1, 2, 3), ((4, 5), (6,)), (1, -1), "a 1"), Example((7,), ((8,),), (1,), "a 2")]


def test_digests_of_values_and_tokens() -> None:
    assert hashing.digest("1", 3, (1, 2), None, "ü") == "7c6c6c70a5c002f145f536106d3a8846"
    assert hashing.tokens_digest((1, 2, 3), [(5,), (4, 6)]).hex() == "1dae0c87032a5cd8a45d93a485828ca3"
    assert hashing.tokens_digest((1, 2, 3), [(4, 6), (5,)]).hex() == "1dae0c87032a5cd8a45d93a485828ca3"
    assert int(hashing.digest(7, (1, 2, 3), 0)[:16], 16) == 17008368878018335359  # the seed of a drawn answer


def test_the_fingerprint_of_a_runs_data() -> None:
    assert fingerprint(EXAMPLES) == "c6ba181c39797fac"


def test_the_names_in_a_reference_cache(tmp_path: Path) -> None:
    found = [each.hex() for each in reference._digests(Batch.of(EXAMPLES[:1]))]
    assert found == ["1b111cf92ed57c879ba901376a4338ad", "32b37bc49a400cedb4a9194b03637dc0"]
    cache = reference.ReferenceCache(tmp_path, {"weights": "some", "computed": "torch"})
    assert cache.path == tmp_path / "e9646607a93ba0fd8fc1.logps"


def test_the_names_of_weights(tmp_path: Path) -> None:
    model, memo = tmp_path / "m", tmp_path / "memo"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    (model / "config.json").write_bytes(b"{}")
    assert weights_fingerprint(model, memo) == "42db91015dbc0a3667a7ba21e7930f8d"
    notes = (memo / "files.json").read_text()
    assert '"873ac3c6df553eaa62331fd4ff9b521a"' in notes and '"2afb9b83f9314e5d029766197f539792"' in notes
    (model / "adapters.safetensors").write_bytes(b"more")
    assert policy.identity(policy.AdapterSource(model, None, config(), 0.5)) == "tuned-88d1ce97"


def test_the_name_of_a_comparisons_rows() -> None:
    rows = [pair_row("a", "b", "c", "x 1"), pair_row("ü", "b", "d", "x 2")]
    assert settings.digest_of(rows) == "05b6ab792344ff403b16cbcc501e3a64"


def test_a_file_is_read_in_pieces(tmp_path: Path) -> None:
    content = bytes(range(256)) * 2**16 + b"rest"  # more than a piece
    (tmp_path / "a").write_bytes(content)
    assert [len(piece) for piece in hashing.file_pieces(tmp_path / "a")] == [2**24, 4]
    assert hashing.blake2(hashing.file_pieces(tmp_path / "a")) == hashing.blake2([content])
    assert hashing.sha256(hashing.file_pieces(tmp_path / "a")) == hashing.sha256([content])


def test_no_other_module_hashes() -> None:
    roots = [Path(package.__file__).parent for package in (lite_dil, backends) if package.__file__]
    scripts = Path(__file__).parents[2] / "scripts"
    users = set()
    for path in (path for root in [*roots, scripts] for path in root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            users |= {path.name for name in names if name == "hashlib"}
    assert users == {"hashing.py"}
