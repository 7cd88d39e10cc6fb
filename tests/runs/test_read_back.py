"""What damage does to the files that other commands than --resume read back: said, refused or computed anew."""

from __future__ import annotations

import json
import re
import shutil
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import config, examples, make_checkpoint, write_pairs
from trainings import run

import lite_dil as dil
from lite_dil.base.checked import mark_of, with_digest, with_mark, without_digest
from lite_dil.base.errors import UserError
from lite_dil.base.jsonl import JSONLines
from lite_dil.batching.batch import Batch
from lite_dil.cli.main import main
from lite_dil.evaluation.comparison.files import read_answers, read_measured, write_answers, write_measured
from lite_dil.models.fingerprint import base_of
from lite_dil.reports.listing import list_runs
from lite_dil.reports.page import render
from lite_dil.reports.record import read_record
from lite_dil.reports.trackers import Trackers
from lite_dil.runs import rates
from lite_dil.runs.folder import RunFolder
from lite_dil.runs.history import read_metrics
from lite_dil.runs.options_file import read_options, text_of
from lite_dil.training.reference_cache import ReferenceCache

Said = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def made(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 2 steps with held-out pairs and sample answers, and its model; only read."""
    place = tmp_path_factory.mktemp("made")
    shutil.copytree(tiny, place / "model")
    data, held_out = str(write_pairs(place / "pairs.jsonl")), str(write_pairs(place / "held_out.jsonl", 3))
    flags = ["--model", str(place / "model"), "--data", data, "--eval-data", held_out, "--dtype", "float32"]
    flags += ["--max-steps", "2", "--save-steps", "1", "--report-samples", "1", "--lora-r", "4", "--backend", "cpu"]
    run(flags, place / "run", "--max-length", "64")
    return place


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of the run."""
    shutil.copytree(made / "run", tmp_path / "run")
    return tmp_path / "run"


def change(path: Path, pattern: str, into: str) -> None:
    """Change a file as a flipped bit in a digit would: it stays what it is, with another value."""
    text = path.read_text()
    changed = re.sub(pattern, into, text, count=1)
    assert changed != text
    path.write_text(changed)


LAST = r'("step": 2[^}]*"eval_rewards/accuracies": )[\d.]+'  # of the evaluation, which comes after the last checkpoint
WRONG = {
    "config.yaml": (r"learning_rate: [\d.e-]+", "learning_rate: 0.5"),
    "report.json": (r'"steps": 2', '"steps": 3'),
    "metrics.jsonl": (r'"loss": -?[\d.]+', '"loss": 7.5'),
    "metrics.jsonl of the evaluation": (LAST, r"\g<1>0.125"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_changed_figure_is_not_listed(folder: Path, name: str) -> None:
    (before,) = list_runs(folder)
    assert (before.state, before.why) == ("finished", "")
    file, (pattern, into) = name.partition(" ")[0], WRONG[name]
    change(folder / file, pattern, into)
    (found,) = list_runs(folder)
    assert found.state == "damaged" and file in found.why and found.figures is None
    if file != "metrics.jsonl":
        with pytest.raises(UserError, match=re.escape(str(folder / file))):
            read_record(folder)


def test_an_accuracy_that_is_no_share_is_damage(folder: Path) -> None:
    """As a flipped bit makes of 1.0 a 9.0, of which no error can be computed."""
    change(folder / "metrics.jsonl", LAST, r"\g<1>9.0")
    record = read_record(folder)
    assert record.history.held_out.last("eval_rewards/accuracies") is None and "metrics.jsonl" in record.damage[0]
    assert "metrics.jsonl is not what the run wrote" in render(record)


def test_lost_metrics_are_missed(folder: Path) -> None:
    assert [line["step"] for line in read_metrics(folder)] == [1, 2, 2]
    path = folder / "metrics.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:1]))
    assert "metrics.jsonl is not what the run wrote" in list_runs(folder)[0].why
    path.unlink()
    assert "metrics.jsonl is missing" in list_runs(folder)[0].why
    assert main(["plan", "--like", str(folder)]) == 2


PARTS = {
    "metrics.jsonl": (LAST, r"\g<1>0.125"),
    "report_samples.jsonl": (r'"before_tokens": \d', '"before_tokens": 9'),
    "held_out_pairs.json": (r'"margins": \[-?[\d.]', '"margins": [5'),
}


@pytest.mark.parametrize("name", PARTS)
def test_the_report_says_what_it_leaves_out(folder: Path, name: str, capsys: Said) -> None:
    assert read_record(folder).damage == []
    change(folder / name, *PARTS[name])
    record = read_record(folder)
    (said,) = record.damage
    assert str(folder / name) in said
    assert (record.samples == []) == (name == "report_samples.jsonl")
    assert (record.pairs is None) == (name == "held_out_pairs.json")
    for _ in range(2):  # and a resumed run says it, as often as it is so
        assert main(["train", "--resume", str(folder)]) == 0
        assert (str(folder / name) in capsys.readouterr().out) or name == "report_samples.jsonl"
    page = (folder / "report.html").read_text()
    assert (str(folder / name) in page) == (name != "report_samples.jsonl")  # those are answered again


@pytest.fixture(scope="module")
def another(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with another seed; its files are whole."""
    place = tmp_path_factory.mktemp("another")
    data, held_out = str(made / "pairs.jsonl"), str(made / "held_out.jsonl")
    flags = ["--model", str(made / "model"), "--data", data, "--eval-data", held_out, "--dtype", "float32", "--seed", "5"]
    flags += ["--max-steps", "2", "--save-steps", "1", "--report-samples", "1", "--lora-r", "4", "--backend", "cpu"]
    run(flags, place / "run", "--max-length", "64", "--learning-rate", "1e-2")
    return place / "run"


@pytest.mark.parametrize("name", ["config.yaml", "report_samples.jsonl", "held_out_pairs.json"])
def test_a_whole_file_of_another_run_is_said(folder: Path, another: Path, name: str) -> None:
    shutil.copyfile(another / name, folder / name)
    (said,) = read_record(folder).damage
    assert said.startswith(f"{folder / name} is not what ")
    if name == "config.yaml":
        assert re.search(r" records: \w+ was .+, and is ", said)
        (found,) = list_runs(folder)
        assert found.state == "damaged" and found.why.startswith("config.yaml is not what step-2 records: ")


def test_what_a_resumed_run_may_change_is_no_damage(folder: Path) -> None:
    """Until its next checkpoint the last one records the options of before."""
    shutil.rmtree(folder / "checkpoints" / "step-2")
    shutil.rmtree(folder / "adapter")
    options = read_options(folder)
    del options["format"]
    assert options["save_steps"] == 1
    (folder / "config.yaml").write_text(text_of(options | {"save_steps": 7, "data": "moved.jsonl", "batch_size": 2}))
    assert not any("config.yaml" in text for text in read_record(folder).damage)


def test_an_export_of_a_run_whose_config_was_cut_says_what_was_trained(folder: Path, tmp_path: Path) -> None:
    """The adapter has its options too."""

    def card(name: str) -> str:
        flags = ["--adapter", str(folder), "--format", "adapter", "--no-check", "--output", str(tmp_path / name)]
        assert main(["export", *flags]) == 0
        return (tmp_path / name / "README.md").read_text().replace(str(tmp_path / name), "")

    whole, path = card("whole"), folder / "config.yaml"
    text = path.read_text()
    assert "learning rate" in whole.lower() and "rank 4" in whole
    path.write_text(text[: len(text) // 2])
    assert card("cut") == whole
    path.unlink()
    assert card("without") == whole
    path.write_text(text)
    (folder / "adapter" / "digests.json").unlink()  # as who changes an adapter on purpose does
    assert card("unsealed") == whole


def test_an_adapter_without_its_config_is_not_a_run_that_goes_on(folder: Path, capsys: Said) -> None:
    (folder / "adapter" / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"adapter_config\.json is missing; restore it"):
        dil.load(adapter=folder, trainable=False)
    shutil.rmtree(folder / "adapter")
    assert dil.load(adapter=folder, trainable=False).model


def test_an_adapter_keeps_its_model(made: Path, folder: Path, tmp_path: Path, capsys: Said) -> None:
    """Another model of the same shape, which another run's config.yaml names, is not taken for its own; a moved one is."""
    other, moved = tmp_path / "other", tmp_path / "moved"
    make_checkpoint(other, seed=5)
    shutil.copytree(made / "model", moved)
    path, own = folder / "config.yaml", str(made / "model")
    text = path.read_text()
    path.write_text(text.replace(own, str(other)))
    with pytest.raises(UserError, match=rf"config\.yaml: model is {other}, but the adapter was trained with {own}"):
        dil.load(adapter=folder, trainable=False)
    assert dil.load(str(other), adapter=folder, trainable=False).model == str(other)  # who asks for it gets it
    path.write_text(text.replace(own, str(moved)))
    assert dil.load(adapter=folder, trainable=False).model == str(moved)
    for gone in (folder / "checkpoints").iterdir():
        shutil.rmtree(gone)
    with pytest.raises(UserError, match="model is"):  # nothing is left to compare with
        dil.load(adapter=folder, trainable=False)
    path.unlink()
    found = dil.load(adapter=folder, trainable=False)
    assert (found.model, found.backend.dtype_name) == (own, "float32")  # as the adapter's seal records


def test_an_initial_adapter_is_read_whole_or_not_at_all(
    made: Path, folder: Path, tmp_path: Path, backend_name: str, capsys: Said
) -> None:
    path = folder / "adapter" / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # the largest weight's sign
    path.write_bytes(content)
    argv = ["train", str(made / "pairs.jsonl"), "--model", str(made / "model"), "--backend", backend_name]
    argv += ["--init-adapter", str(folder / "adapter"), "--reference", "base", "--output-dir", str(tmp_path / "new")]
    assert main(argv) == 2
    assert "adapter_model.safetensors is not what was written" in capsys.readouterr().err


def test_a_checkpoint_that_lost_its_progress_is_said(folder: Path, capsys: Said) -> None:
    newest = folder / "checkpoints" / "step-2"
    (newest / "progress.json").unlink()
    said: list[str] = []
    assert RunFolder(folder).whole(newest.with_name("step-1"), said.append) == newest.with_name("step-1")
    assert said == [f"{newest} is damaged: progress.json is missing; going back to step-1"]


def test_another_references_log_probs_are_not_believed(tmp_path: Path) -> None:
    """Two files that changed places, as a copy by hand may leave them; those of older versions are still read."""
    data, values = Batch.of(examples(2)), np.array([-1.5, -2.25, -3.0, -4.125], np.float32)
    one, other = (ReferenceCache(tmp_path, {"weights": name}) for name in ("one", "other"))
    one.add(data, values)
    assert one.path and other.path
    shutil.copyfile(one.path, other.path)
    found = ReferenceCache(tmp_path, {"weights": "other"})
    assert found.lookup(data) is None and found.damaged == 4
    content = one.path.read_bytes()
    records = [content[start : start + 28] for start in range(0, len(content), 32)]
    other.path.write_bytes(b"".join(record + struct.pack("<I", zlib.crc32(record)) for record in records))
    np.testing.assert_array_equal(ReferenceCache(tmp_path, {"weights": "other"}).lookup(data), values)


def test_a_damaged_note_of_a_models_hash_is_made_anew(tmp_path: Path) -> None:
    """Else the model would be another one than its runs recorded."""
    model, memo = make_checkpoint(tmp_path / "model"), tmp_path / "memo"
    right = base_of(str(model), memo)
    notes = (memo / "files.json").read_text()
    for at in range(0, len(notes), 7):
        (memo / "files.json").write_text(notes[:at] + chr(ord(notes[at]) ^ 1) + notes[at + 1 :])
        assert base_of(str(model), memo) == right
    for content in ("", "[]", "[" * 100_000, '{"a": 3}'):
        (memo / "files.json").write_text(content)
        assert base_of(str(model), memo) == right


def test_a_damaged_rate_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITE_DIL_CACHE", str(tmp_path))
    rate = rates.Rate(rates.Setting("owner/model", "cpu", "float32", False, "plain"), 100.0, 1.0, 10, "2026-01-02")
    rates.keep(rate)
    assert rates.known("owner/model") == rate
    change(tmp_path / "rates.json", r"100\.0", "900.0")
    assert rates.known("owner/model") is None


def test_a_comparisons_files(tmp_path: Path) -> None:
    """Each is refused with what to delete."""
    result, reference, answers = tmp_path / "result.json", tmp_path / "reference.json", tmp_path / "samples.jsonl"
    write_measured(result, {"loss": "dpo", "seed": 1, "figures": {"margin": 0.25}, "curve": {1: 2.0}})
    write_measured(reference, {"model": "m", "seed": 0, "logps": [[-1.5]]})
    write_answers(answers, [{"answer": "é", "tokens": 3, "seed": 1}, {"answer": "b", "tokens": 2, "seed": 1}])
    assert read_measured(result, loss="dpo", seed=1)["figures"] == {"margin": 0.25}
    assert [answer["tokens"] for answer in read_answers(answers, 1, 2)] == [3, 2]
    for read, path, beside in (
        (lambda: read_measured(result, loss="dpo", seed=2), result, "delete it, and"),
        (lambda: read_measured(reference, model="other", seed=0), reference, "delete it and the result.json of a run"),
        (lambda: read_answers(answers, 2), answers, "delete it and the result.json beside it"),
        (lambda: read_answers(answers, 1, 3), answers, "it has 2 answers, expected 3"),
    ):
        with pytest.raises(UserError, match=f"{path} is damaged .*{beside}"):
            read()  # type: ignore[no-untyped-call]
    change(result, r"0\.25", "0.75")
    change(answers, '"tokens": 3', '"tokens": 7')
    for read in (lambda: read_measured(result), lambda: read_answers(answers, 1)):
        with pytest.raises(UserError, match="it is not what was written"):
            read()


def test_identifiers_in_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    options = replace(config(), report_to="tensorboard")
    Trackers(options, tmp_path, [], said.append).close(good=True)
    ids = json.loads((tmp_path / "trackers.json").read_text())
    Trackers(options, tmp_path, [], said.append).close(good=True)
    assert json.loads((tmp_path / "trackers.json").read_text()) == ids and not said
    (tmp_path / "trackers.json").write_text(json.dumps(ids | {"tensorboard": "0000beef"}))
    Trackers(options, tmp_path, [], said.append).close(good=True)
    assert len(said) == 1 and f"{tmp_path / 'trackers.json'} is damaged" in said[0]
    assert without_digest(json.loads((tmp_path / "trackers.json").read_text()))["tensorboard"] not in ids.values()


@pytest.mark.parametrize(
    ("tail", "said"), [(b'{"a": 1', "its last line was cut off"), (bytes(9), "zeros are removed"), (b"", "")]
)
def test_a_torn_line_is_said(tail: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 0}\n' + tail)
    file = JSONLines(path, "rows")
    assert file.lines == [b'{"a": 0}'] and said in file.torn and bool(file.torn) == bool(tail)


def test_digests_and_marks() -> None:
    """Any changed value is seen, in any order of keys; without a digest, as of an older version, nothing can be."""
    content: dict[str, Any] = {"a": [1, 2.5, None], "ü": {"b": "c"}}
    written = json.loads(json.dumps(with_digest(content)))
    assert without_digest(dict(reversed(written.items()))) == content
    assert without_digest(content) == content
    wrong: list[Callable[[dict[str, Any]], Any]] = [
        lambda found: found | {"a": [1, 2.5, 0]},
        lambda found: found | {"more": 1},
        lambda found: {name: value for name, value in found.items() if name != "a"},
        lambda found: found | {"digest": found["digest"][:-1]},
        lambda found: [found],
    ]
    for damage in wrong:
        with pytest.raises(ValueError, match="it is not"):
            without_digest(damage(written))
    row = with_mark({"text": "a", "key": "00ff"}, "key")
    assert re.fullmatch("00ff-[0-9a-f]{8}", row["key"]) and mark_of(row, "key") == ("00ff", True)
    assert mark_of(row | {"text": "b"}, "key") == ("00ff", False)
    assert mark_of({"text": "b", "key": "00ff"}, "key") == ("00ff", True)
