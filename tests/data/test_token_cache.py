"""Tokens that are kept from one run to the next: the same as read anew, never another data set's, never damaged ones."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import WORDS, byte_level_tokenizer, config, sentencepiece_tokenizer
from trainings import run, same_weights

from lite_dil.base.errors import UserError
from lite_dil.base.signs import CHOSEN
from lite_dil.data import token_cache
from lite_dil.data.dataset import DataSet, load, remarks
from lite_dil.data.encoder import Encoder
from lite_dil.data.inspect.findings import source_facts
from lite_dil.data.reader import Reader
from lite_dil.data.rows import Rows

TURNS = [{"role": "user", "content": "tea?"}, {"role": "assistant", "content": "small"}]


def pair(number: int) -> dict[str, Any]:
    draw = random.Random(number)
    say = [" ".join(draw.choices(WORDS, k=draw.randint(1, 9))) for _ in range(3)]
    prompt = [*TURNS[: 2 * (number % 2)], {"role": "user", "content": f"{number} {say[0]}"}]
    return {"prompt": prompt, "chosen": f"{say[1]} yes", "rejected": f"{say[2]} no", "unread": 1}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    rows = [pair(i) for i in range(30)]
    rows[7]["chosen"], rows[9]["rejected"], rows[11]["chosen"] = "", "a<|im_end|>b", rows[11]["rejected"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, for data of any size."""
    monkeypatch.setattr(token_cache, "SMALL", 1)
    monkeypatch.setenv("LITE_DIL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[DataSet, bool, list[str]]]:
    """Load data; return it, whether rows were read, and what was said."""
    started = list[Reader]()
    begin = Reader.__iter__
    monkeypatch.setattr(Reader, "__iter__", lambda self: started.append(self) or begin(self))

    def load_it(data: Any, encoder: Encoder | None = None, **options: Any) -> tuple[DataSet, bool, list[str]]:
        started.clear()
        said: list[str] = []
        good = {"good_only": options.pop("good_only", False)}
        settings = config(**{"skip_bad_rows": True, "max_length": 40, **options})
        found = load(data, "train", encoder or Encoder(byte_level_tokenizer()), settings, say=said.append, **good)
        return found, bool(started), said

    return load_it


def whole(data: DataSet) -> Any:
    """Everything that a data set says."""
    fields = {
        name: value for name, value in vars(data).items() if name not in ("examples", "store", "names", "read", "sources")
    }
    arrays = {name: getattr(data.read, name).tolist() for name in ("lengths", "signs", "names", "first")}
    shown = [data.read.shown(i) for i in range(len(data.read))]
    examples = [(example, example.place) for part in (data.examples, data.store) for example in part]
    return fields, arrays, shown, examples, data.names.tolist(), list(map(source_facts, data.sources)), remarks(data)


def test_a_second_start_reads_no_row_and_finds_the_same(data: Path, read: Any, kept: Path) -> None:
    other = data.with_name("other.jsonl")
    other.write_text(data.read_text())
    both, encoder = f"{data},{other}=1.4", Encoder(byte_level_tokenizer(), {"unknown": 1})
    first, rows_read, _ = read(both, encoder)
    again, rows_read_again, said = read(both, encoder)
    assert any("does not read unknown" in remark for remark in remarks(again))
    assert (rows_read, rows_read_again, said) == (True, False, [])
    assert whole(first) == whole(again)
    assert len(first.problems) == 6 and {problem.place.rpartition(" ")[2] for problem in first.problems} == {"8", "10", "12"}
    assert first.prompts_cut and len(first.examples) == 27 + 38
    # What does not change the tokens takes the same file; the order of an epoch is drawn anew.
    reseeded, rows_read, _ = read(both, encoder, seed=5)
    assert not rows_read and list(reseeded.examples) != list(first.examples) and list(reseeded.store) == list(first.store)
    assert len(list(kept.iterdir())) == 1
    # A strict run is refused by the kept tokens as by the rows.
    with pytest.raises(UserError, match=r"(?s)3 of 30 rows cannot be used.*line 8.*line 10.*line 12"):
        read(both, encoder, skip_bad_rows=False)


def test_the_order_of_problems_is_that_of_the_rows(data: Path, read: Any) -> None:
    """Whether a row is refused when it is read or when it is tokenised."""
    places = [int(problem.place.rpartition(" ")[2]) for problem in read(data.as_posix())[0].problems]
    assert places == [8, 10, 12]


def test_good_answers_alone(tmp_path: Path, read: Any) -> None:
    path = tmp_path / "labels.jsonl"
    rows = [{"prompt": f"{i} tea", "completion": " good" * (i + 1), "label": i % 3 == 0} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    every, _, _ = read(str(path), max_length=12)
    good, rows_read, _ = read(str(path), good_only=True, max_length=12)
    assert not rows_read and [example.signs for example in good.examples] == [(CHOSEN,)] * 4
    assert list(good.examples) == [every.examples[i] for i in (0, 3, 6, 9)] and good.answers == {1: 4, -1: 8}
    assert good.names.tolist() == every.names[::3].tolist()
    assert (good.prompts_cut, good.cuts_none) < (every.prompts_cut, every.cuts_none) and good.prompts_cut


@pytest.mark.parametrize(
    "options",
    [{"max_length": 41}, {"max_rows": 20}, {"data_format": "preference"}, {"columns": "chosen=rejected,rejected=chosen"}],
    ids=lambda options: next(iter(options)),
)
def test_options_that_change_tokens_take_another_file(data: Path, read: Any, kept: Path, options: dict[str, Any]) -> None:
    read(str(data))
    assert read(str(data), **options)[1] and len(list(kept.iterdir())) == 2


def test_another_tokenizer_template_code_or_content_takes_another_file(
    data: Path, read: Any, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tokenizer(change: Callable[[Any], Any] = lambda _: None, make: Callable[[], Any] = byte_level_tokenizer) -> Encoder:
        change(made := make())
        return Encoder(made)

    def template(tokenizer: Any) -> None:
        tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "!<|im_end|>")

    encoders = [
        tokenizer(),
        tokenizer(template),
        tokenizer(lambda made: made.add_tokens(["good"])),
        tokenizer(make=sentencepiece_tokenizer),
        Encoder(byte_level_tokenizer(), {"enable_thinking": False}),
    ]
    for number, encoder in enumerate(encoders, 1):
        assert read(str(data), encoder)[1] and len(list(kept.iterdir())) == number
    assert not read(str(data))[1]
    before = os.stat(data)
    data.write_text(data.read_text().replace("yes", "yep"))
    os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))  # the content counts, not the time
    found, rows_read, _ = read(str(data))
    assert rows_read and found.examples[0] != read(str(data), tokenizer(template))[0].examples[0]
    monkeypatch.setattr(token_cache, "__version__", "9")
    assert read(str(data))[1]


def test_a_damaged_file_is_said_and_made_again(data: Path, read: Any, kept: Path) -> None:
    expected = whole(read(str(data))[0])
    (path,) = kept.iterdir()
    content = path.read_bytes()
    draw = random.Random(0)
    damaged = [b"", content[:1], content[: len(content) // 2], content[:-1], content + b"x", bytes(len(content))]
    for at in [*draw.sample(range(len(content)), 20), *range(len(content) - 45, len(content), 5)]:
        damaged.append(content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :])
    for number, other in enumerate(damaged):
        path.write_bytes(other)
        found, rows_read, said = read(str(data))
        assert rows_read and len(said) == 1 and str(path) in said[0] and "not as it was written" in said[0], number
        assert whole(found) == expected and path.read_bytes() == content, number
    # Another data set's file under this one's name, and what is no file at all.
    other_data = data.with_name("b.jsonl")
    other_data.write_text("".join(json.dumps(pair(i)) + "\n" for i in range(40, 60)))
    read(str(other_data))
    (theirs,) = set(kept.iterdir()) - {path}
    path.write_bytes(theirs.read_bytes())
    found, rows_read, said = read(str(data))
    assert rows_read and len(said) == 1 and whole(found) == expected


def test_rows_of_a_program(read: Any, kept: Path) -> None:
    rows = [pair(i) for i in range(20)]
    first, _, _ = read(Rows(rows))
    again, rows_read, _ = read(Rows([dict(row) for row in rows]))
    assert not rows_read and whole(first) == whole(again)
    rows[3]["chosen"] += "!"
    assert read(Rows(rows))[1]
    # A generator is read once, and may be endless but for --max-rows; of other objects the content is not known.
    for given in (iter(rows), [{**row, "unread": np.zeros(2)} for row in rows]):
        for _ in range(2):
            found, rows_read, _ = read(Rows(given), max_rows=10)
            assert rows_read and len(found.examples) == 10
    assert len(list(kept.iterdir())) == 2


def test_a_file_that_changes_while_it_is_read_is_not_kept(data: Path, read: Any, kept: Path, monkeypatch: Any) -> None:
    encode_all = Encoder.encode_all

    def meanwhile(self: Encoder, rows: Sequence[Any], *rest: Any) -> Any:
        data.write_text(data.read_text() + json.dumps(pair(99)) + "\n")
        return encode_all(self, rows, *rest)

    monkeypatch.setattr(Encoder, "encode_all", meanwhile)
    read(str(data))
    assert not kept.exists()


def test_a_disk_that_keeps_nothing_does_not_end_the_run(data: Path, read: Any, kept: Path) -> None:
    expected = whole(read(str(data))[0])
    for path in kept.iterdir():
        path.unlink()
    kept.rmdir()
    kept.write_text("a file in its place")
    found, _, said = read(str(data))
    assert whole(found) == expected and len(said) == 2 and "LITE_DIL_CACHE" in said[1]


def test_old_files_go_and_used_ones_stay(data: Path, read: Any, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read(str(data))
    (first,) = kept.iterdir()
    unused, foreign = first.with_name("0.tokens"), first.with_name("notes.txt")
    unused.write_bytes(first.read_bytes())
    foreign.write_text("not ours")
    long_ago = time.time() - 40 * 86400
    for path in (first, unused, foreign):
        os.utime(path, (long_ago, long_ago))
    read(str(data))  # which uses the first
    read(str(data), max_length=41)
    assert first.exists() and foreign.exists() and not unused.exists()
    os.utime(first, (long_ago + 11 * 86400,) * 2)
    monkeypatch.setattr(token_cache, "_MOST", first.stat().st_size * 3 // 2)
    read(str(data), max_length=42)
    assert len(list(kept.glob("*.tokens"))) == 1 and not first.exists()


@pytest.mark.parametrize("more", [("--eval-fraction", "0.3"), ("--max-rows", "20")], ids=["held-out", "some-rows"])
def test_a_training_is_the_same_to_the_bit(
    backend_name: str, tiny: str, data: Path, kept: Path, more: tuple[str, ...], monkeypatch: Any, capsys: Any
) -> None:
    flags = ["--model", tiny, "--backend", backend_name, "--data", str(data), "--dtype", "float32", "--skip-bad-rows"]
    flags += ["--max-steps", "3", "--batch-size", "2", "--report-samples", "2", "--max-length", "40", *more]
    folders = [data.parent / name for name in ("without", "cold", "warm")]
    found, said = [], []
    for folder, least in zip(folders, (2**40, 1, 1), strict=True):
        monkeypatch.setattr(token_cache, "SMALL", least)
        found.append(run(flags, folder))
        said.append([line for line in capsys.readouterr().err.splitlines() if "data" in line or "rows" in line])
        assert kept.exists() == (least == 1)
    assert found[0] == found[1] == found[2] and said[0] == said[1] == said[2]
    assert same_weights(folders[0] / "adapter", folders[1] / "adapter")
    assert same_weights(folders[1] / "adapter", folders[2] / "adapter")
    facts = [json.loads((folder / "report.json").read_text())["data"] for folder in folders]
    assert facts[0] == facts[1] == facts[2]
    skipped = [(folder / "skipped_rows.jsonl").read_text() for folder in folders]
    assert skipped[0] == skipped[1] == skipped[2] != ""
