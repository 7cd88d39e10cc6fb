"""Where rows lie, and what becomes of them on their way to training: files, folders, tables, several sources, the store."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from conftest import byte_level_tokenizer, config

from lite_dil.base.errors import UserError
from lite_dil.data.dataset import load
from lite_dil.data.encoder import Encoder, Example
from lite_dil.data.reader import read_rows
from lite_dil.data.sources import split_sources
from lite_dil.data.store import StoreWriter


def pairs(count: int, prefix: str = "") -> list[dict[str, str]]:
    return [{"prompt": f"{prefix}{i} tea", "chosen": " good", "rejected": " small"} for i in range(count)]


def lines(path: Path, rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def prompts(source: Path | str, split: str = "train") -> list[Any]:
    return [row.prompt for row in read_rows(str(source), split)]


@pytest.mark.parametrize(("delimiter", "name"), [(",", "a.csv"), (";", "a.csv"), ("\t", "a.tsv")])
def test_tables_of_text(tmp_path: Path, delimiter: str, name: str) -> None:
    chat = json.dumps([{"role": "user", "content": "a, b;\t\n\nc"}])
    long = "x\n" * 3 + "x" * 200_000
    with (tmp_path / name).open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([["prompt", "completion", "label", "id"], [chat, long, "True", 1], [chat, "no\n", "0", 2]])
    first, second = read_rows(str(tmp_path / name))
    assert first.prompt == second.prompt == json.loads(chat)
    assert (first.answers, first.signs, second.answers, second.signs) == ((long,), (1,), ("no\n",), (-1,))
    # A row's place is the line that it starts on, of the file as an editor shows it.
    assert second.place.rpartition(" ")[2] == "6"


def test_a_cell_that_looks_like_a_boolean_stays_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected\nIs it?,True,False\n")
    assert read_rows(str(tmp_path / "a.csv"))[0].answers == ("True", "False")


def test_a_cell_of_json_is_text_unless_it_is_messages_or_a_list(tmp_path: Path) -> None:
    rows = [["instruction", "output"], ["Who?", '["John", "Ann"]'], ["Who?", '{"a": 1}'], ["Who?", "[]"]]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    assert [row.answers for row in read_rows(str(tmp_path / "a.csv"))] == [('["John", "Ann"]',), ('{"a": 1}',), ("[]",)]
    with (tmp_path / "b.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["prompt", "responses", "scores"], ["hi", '["a", "b"]', "[1, 2]"]])
    assert read_rows(str(tmp_path / "b.csv"))[0].answers == ("b", "a")


def test_compressed_files_whole_and_cut_off(tmp_path: Path) -> None:
    whole = "".join(json.dumps(row) + "\n" for row in pairs(5000)).encode()
    frames = zstandard.compress(whole[:100_000]) + zstandard.compress(whole[100_000:])
    (tmp_path / "a.jsonl.zst").write_bytes(frames)
    assert len(prompts(tmp_path / "a.jsonl.zst")) == 5000
    for cut in (len(frames) - 1, len(frames) // 2):
        (tmp_path / "b.jsonl.zst").write_bytes(frames[:cut])
        with pytest.raises(UserError, match=r"b.jsonl.zst: .*truncated"):
            read_rows(str(tmp_path / "b.jsonl.zst"))


def test_columnar_files_and_saved_data_sets(tmp_path: Path) -> None:
    chat = [{"prompt": [{"role": "user", "content": str(i)}], "chosen": "a", "rejected": "b"} for i in range(2500)]
    table = pyarrow.Table.from_pylist(chat)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as file:
        file.write_table(table)
    data = datasets.Dataset.from_list(chat)
    data.save_to_disk(tmp_path / "saved", num_shards=3)
    datasets.DatasetDict({"train": data, "test": data.select(range(7))}).save_to_disk(tmp_path / "splits")
    for source in ("a.parquet", "a.arrow", "saved", "splits"):
        assert prompts(tmp_path / source) == [row["prompt"] for row in chat], source
    assert len(prompts(tmp_path / "splits", "test")) == len(prompts(f"{tmp_path / 'splits'}:test")) == 7
    with pytest.raises(UserError, match=r"'dev'; .*test, train.*splits:test"):
        read_rows(f"{tmp_path / 'splits'}:dev")
    assert read_rows(str(tmp_path / "a.parquet"))[1].place == f"{tmp_path / 'a.parquet'} row 2"


def test_a_folder_of_files(tmp_path: Path) -> None:
    lines(tmp_path / "data" / "b.jsonl", pairs(2, "b"))
    lines(tmp_path / "data" / "a" / "part.json", pairs(1, "a"))
    lines(tmp_path / "data" / ".cache" / "c.jsonl", pairs(1, "hidden"))
    (tmp_path / "data" / "README.md").write_text("# not data")
    (tmp_path / "data" / "dataset_info.json").write_text("{}")
    assert prompts(tmp_path / "data") == prompts(tmp_path / "data", "test") == ["a0 tea", "b0 tea", "b1 tea"]
    # Training never reads what its name says is for testing.
    lines(tmp_path / "data" / "test-00000-of-00001.jsonl", pairs(1, "t"))
    assert prompts(tmp_path / "data") == ["a0 tea", "b0 tea", "b1 tea"]
    assert prompts(tmp_path / "data", "test") == prompts(f"{tmp_path / 'data'}:test") == ["t0 tea"]
    lines(tmp_path / "data" / "train.jsonl", pairs(1, "n"))
    assert prompts(tmp_path / "data") == ["a0 tea", "b0 tea", "b1 tea", "n0 tea"]
    assert prompts(f"{tmp_path / 'data'}:train") == ["n0 tea"]
    # A file's own name decides before its folder's.
    for name in ("train", "test"):
        lines(tmp_path / "train_test_split" / f"{name}.jsonl", pairs(1, name))
        lines(tmp_path / "outer" / "test" / f"{name}.jsonl", pairs(1, name))
    assert prompts(tmp_path / "train_test_split") == prompts(tmp_path / "outer") == ["train0 tea"]
    with pytest.raises(UserError, match="'dev_part'"):
        read_rows(f"{tmp_path / 'data'}:dev_part")


def test_names_and_weights_of_several_sources(tmp_path: Path) -> None:
    comma = lines(tmp_path / "a,b=2.jsonl", pairs(1))
    assert split_sources(str(comma)) == [(str(comma), 1.0)]
    assert split_sources("a.jsonl, o/n/c:train=0.5,b=c.jsonl=2") == [
        ("a.jsonl", 1.0),
        ("o/n/c:train", 0.5),
        ("b=c.jsonl", 2.0),
    ]
    for bad in ("a=0", "a=x", "a=-1", "=2"):
        with pytest.raises(UserError, match="expected a number above 0"):
            split_sources(f"b.jsonl,{bad}")
    many = [f"{'a' * 30}{i}.jsonl" for i in range(20)]
    assert split_sources(",".join(many)) == [(name, 1.0) for name in many]  # as one name too long for any file
    with pytest.raises(UserError, match="an empty name"):
        split_sources("a.jsonl,")


@pytest.fixture
def encoder() -> Encoder:
    return Encoder(byte_level_tokenizer())


def test_weights_are_how_often_an_epoch_takes_a_row(tmp_path: Path, encoder: Encoder) -> None:
    a, b = (lines(tmp_path / f"{name}.jsonl", pairs(10, name)) for name in "ab")
    settings = config(seed=3)
    data = load(f"{a}=2.5,{b}=0.3", "train", encoder, settings)
    counts = Counter(example.place.rpartition("/")[2] for example in data.examples)
    assert len(data.examples) == 25 + 3
    assert Counter(counts.values()) == {2: 5, 3: 5, 1: 3}
    assert [(source.weight, source.kept, source.format) for source in data.sources] == [
        (2.5, 10, "preference"),
        (0.3, 10, "preference"),
    ]
    assert list(load(f"{a}=2.5,{b}=0.3", "train", encoder, settings).examples) == list(data.examples)
    assert list(load(f"{a}=2.5,{b}=0.3", "train", encoder, config(seed=4)).examples) != list(data.examples)
    one = lines(tmp_path / "one.jsonl", pairs(1))
    assert len(load(f"{one}=0.1", "train", encoder, settings).examples) == 1
    lines(tmp_path / "c.jsonl", [{"prompt": "x", "completion": "y"}])
    with pytest.raises(UserError, match=r"a.jsonl .*pairs .*c.jsonl .*demonstrations"):
        load(f"{a},{tmp_path / 'c.jsonl'}", "train", encoder, settings)


def test_bad_rows_stop_or_are_left_out(tmp_path: Path, encoder: Encoder) -> None:
    rows = [
        *pairs(3),
        {"prompt": "x", "chosen": "", "rejected": "y"},
        {"prompt": "x", "chosen": "a<|im_end|>b", "rejected": "y"},
    ]
    path = lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match=r"(?s)2 of 5 rows.*line 4: .*empty.*line 5: .*'<\|im_end\|>'"):
        load(str(path), "train", encoder, config())
    seen = []
    data = load(str(path), "train", encoder, config(skip_bad_rows=True, max_length=12), lambda *row: seen.append(row))
    assert [(problem.kind, problem.place.rpartition(" ")[2]) for problem in data.problems] == [
        ("empty response", "4"),
        ("control token", "5"),
    ]
    assert len(data.examples) == len(seen) == 3
    row, whole, cut = seen[0]
    assert (row.prompt, encoder.encode(row), data.examples[0]) == ("0 tea", whole, cut)
    assert len(load(str(path), "train", encoder, config(max_rows=2)).examples) == 2
    nothing = lines(tmp_path / "b.jsonl", rows[3:])
    with pytest.raises(UserError, match="2 of 2 rows"):
        load(str(nothing), "train", encoder, config(skip_bad_rows=True))


def test_the_store_gives_back_what_it_was_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LITE_DIL_CACHE", str(tmp_path / "cache"))
    draw = np.random.default_rng(0)

    def ids() -> tuple[int, ...]:
        return tuple(draw.integers(0, 2**31 - 1, draw.integers(1, 50)).tolist())

    given = [
        Example(ids(), tuple(ids() for _ in range(count)), tuple(draw.choice([1, -1], count).tolist()), f"a b.jsonl line {i}")
        for i, count in enumerate(draw.integers(1, 4, 300).tolist(), 1)
    ]
    writer = StoreWriter()
    for example in given:
        writer.append(example)
    store = writer.store()
    assert list(store) == given
    assert [example.place for example in store] == [example.place for example in given]
    assert store[-1] == given[-1] and store[3:5] == given[3:5] and len(store) == 300
    with pytest.raises(IndexError):
        store[300]
    assert not list((tmp_path / "cache").iterdir())  # its file has no name
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LITE_DIL_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="the data's tokens in"):
        StoreWriter()


def test_columns_and_good_answers_alone(tmp_path: Path, encoder: Encoder) -> None:
    rows = [{"question": f"{i} tea", "answer": " good", "thumb": i % 3 == 0} for i in range(9)]
    path = lines(tmp_path / "a.jsonl", rows)
    settings = config(columns="prompt=question,completion=answer,label=thumb")
    data = load(str(path), "train", encoder, settings)
    assert (data.form, len(data.examples), data.answers) == ("unpaired", 9, {1: 3, -1: 6})
    data = load(str(path), "train", encoder, settings, good_only=True)
    assert ([example.signs for example in data.examples], data.answers) == ([(1,)] * 3, {1: 3, -1: 6})
