"""Rejected answers drawn from the reference: what is in the file, that it is drawn once, and that it is what is trained on."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import byte_level_tokenizer, config, criterion, examples, load, one_step, pair_row, sentencepiece_tokenizer

from lite_dil.base.display import Silent
from lite_dil.base.errors import UserError
from lite_dil.base.signs import CHOSEN, REJECTED
from lite_dil.batching.batch import Batch
from lite_dil.data.encoder import Encoder, Example, truncate
from lite_dil.data.reader import read_rows
from lite_dil.generation.batch_generator import batched
from lite_dil.generation.reference_samples import SampleFile, add_samples
from lite_dil.generation.reference_samples import draws as wanted_draws

QUESTIONS = ["what is tea", "how do you make good bread and tea", "a red house", "the capital of France is", "is it"]
SETTINGS: dict[str, Any] = {"max_length": 40, "row_tokens": 15, "seed": 7}  # batches of 3
EOS = 2


class Heard(Silent):
    """A display whose lines can be read."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(byte_level_tokenizer())


@pytest.fixture(scope="module")
def chosen(encoder: Encoder) -> list[Example]:
    """Demonstrations: a prompt and one good answer each; the last prompt comes twice."""
    out = []
    for i, question in enumerate([*QUESTIONS, QUESTIONS[-1]]):
        prompt = encoder.prompt([{"role": "user", "content": question}])
        out.append(Example(prompt, ((*encoder.ids(f"it is {'very ' * i}good"), EOS),), (CHOSEN,)))
    return [truncate(example, SETTINGS["max_length"])[0] for example in out]


def add(backend: Any, data: list[Example], encoder: Encoder, path: Path, count: int = 2, **changes: Any) -> Any:
    heard = Heard()
    out = add_samples(data, count, backend, encoder, path, "a reference", config(**{**SETTINGS, **changes}), heard)
    return out, heard.lines


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def moved(name: str, model: str) -> Any:
    """A backend whose adapter does something."""
    backend = load(name, model, **SETTINGS)
    one_step(backend, [Batch.of(examples())], criterion(), 0.05)
    return backend


def test_the_file_and_the_examples(
    backend_name: str, tiny: str, encoder: Encoder, chosen: list[Example], tmp_path: Path
) -> None:
    path = tmp_path / "folder" / "samples.jsonl"
    out, said = add(load(backend_name, tiny, **SETTINGS), chosen, encoder, path)
    assert len(said) == 1 and f"0 of 12 are in {path}, 12 to draw" in said[0]
    lines = rows(path)
    assert len(lines) == 12 and len({line["key"] for line in lines}) == 12
    ids = {(line["prompt"], line["sample"]): tuple(line["rejected_ids"]) for line in lines}
    assert len(set(ids.values())) == 12
    decode = encoder.tokenizer.decode
    taken: dict[str, int] = {}
    for example, after in zip(chosen, out, strict=True):
        assert (after.prompt, after.responses[:1], after.signs) == (example.prompt, example.responses, (1, -1, -1))
        prompt = decode(list(example.prompt))
        for response in after.responses[1:]:
            # Exactly the ids that were drawn, in the order of their numbers.
            assert response == ids[prompt, taken.setdefault(prompt, 0)]
            taken[prompt] += 1
            assert EOS not in response[:-1]
            assert response[-1] == EOS or len(response) == SETTINGS["max_length"] - len(example.prompt)
    assert taken[decode(list(chosen[-1].prompt))] == 4  # two examples, whose draws are different ones
    ended = [response for after in out for response in after.responses[1:] if response[-1] == EOS]
    assert len(ended) < 12
    for line in lines:
        whole = decode(line["rejected_ids"])
        assert line["rejected"] == whole.removesuffix("<|im_end|>")
        assert line["chosen"].startswith("it is ")


def test_the_file_is_ordinary_preference_data(
    backend_name: str, tiny: str, encoder: Encoder, chosen: list[Example], tmp_path: Path
) -> None:
    path = tmp_path / "samples.jsonl"
    add(load(backend_name, tiny, **SETTINGS), chosen, encoder, path)
    pairs = [encoder.encode(row) for row in read_rows(str(path))]
    assert {pair.prompt for pair in pairs} == {example.prompt for example in chosen}
    assert {pair.responses[0] for pair in pairs} == {example.responses[0] for example in chosen}


def test_a_second_call_draws_nothing(
    backend_name: str, tiny: str, encoder: Encoder, chosen: list[Example], tmp_path: Path
) -> None:
    path, backend = tmp_path / "samples.jsonl", load(backend_name, tiny, **SETTINGS)
    first, _ = add(backend, chosen, encoder, path)
    before = path.read_bytes()
    backend.generate = None  # calling it would fail
    again, said = add(backend, chosen, encoder, path)
    assert again == first and path.read_bytes() == before
    assert "12 of 12" in said[0] and "0 to draw" in said[0] and len(said) == 1
    # Other data needs no draw that is there already, in whatever order.
    fewer, said = add(backend, chosen[3:1:-1], encoder, path, count=1)
    assert [example.responses[1] for example in fewer] == [first[i].responses[1] for i in (3, 2)]
    assert len(said) == 1  # the other lines are not wanted, and nothing is wrong with them


def test_draws_come_from_the_reference_and_a_fresh_policy_has_log_ratio_0(
    backend_name: str, tiny: str, encoder: Encoder, chosen: list[Example], tmp_path: Path
) -> None:
    fresh, other = load(backend_name, tiny, **SETTINGS), moved(backend_name, tiny)
    out, _ = add(fresh, chosen, encoder, tmp_path / "fresh.jsonl")
    same, _ = add(other, chosen, encoder, tmp_path / "moved.jsonl")
    assert out == same
    data = Batch.of(out)
    policy = fresh.sequence_logps(data)
    with fresh.adapter_off():
        np.testing.assert_array_equal(fresh.sequence_logps(data), policy)
    with other.adapter_off():
        reference = other.sequence_logps(data)
    assert np.abs(other.sequence_logps(data) - reference).max() > 0.1


def test_a_run_that_was_stopped_or_killed_goes_on_to_the_same_file(
    backend_name: str, tiny: str, encoder: Encoder, chosen: list[Example], tmp_path: Path
) -> None:
    backend = load(backend_name, tiny, **SETTINGS)
    whole, _ = add(backend, chosen, encoder, tmp_path / "whole.jsonl")
    content = (tmp_path / "whole.jsonl").read_bytes()
    path = tmp_path / "stopped.jsonl"
    generate, calls = backend.generate, []

    def stop_in_the_second_batch(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return generate(*arguments)

    backend.generate = stop_in_the_second_batch
    stopped, _ = add(backend, chosen, encoder, path)
    assert stopped is None
    assert 0 < len(rows(path)) < 12 and content.startswith(path.read_bytes())
    backend.generate = generate
    going_on, said = add(backend, chosen, encoder, path)
    assert going_on == whole and path.read_bytes() == content
    assert f"{sum(len(call[0]) for call in calls)} of 12" in said[0]
    # Killed in the middle of a line, in the middle of a batch.
    for cut in (len(content) - 5, content.index(b"\n") + 20, 3):
        path.write_bytes(content[:cut])
        again, said = add(backend, chosen, encoder, path)
        assert again == whole and path.read_bytes() == content
        assert len(said) == 2 and f"{path}: its last line was cut off and is removed" in said[0]


def test_an_answer_that_ends_at_once_is_its_end_token(encoder: Encoder, chosen: list[Example], tmp_path: Path) -> None:
    path, wanted = tmp_path / "samples.jsonl", wanted_draws(chosen, 1, [EOS], "a reference", config(**SETTINGS))
    SampleFile(path, wanted, [EOS], encoder.tokenizer).add(wanted[0], (EOS,))
    again = SampleFile(path, wanted, [EOS], encoder.tokenizer)
    assert (again.known, again.ignored) == ({wanted[0].key: (EOS,)}, 0)
    assert rows(path)[0]["rejected"] == ""


def test_damaged_and_edited_lines_are_ignored_and_drawn_again(
    tiny: str, encoder: Encoder, chosen: list[Example], tmp_path: Path
) -> None:
    path, backend = tmp_path / "samples.jsonl", load("cpu", tiny, **SETTINGS)
    whole, _ = add(backend, chosen, encoder, path)
    lines = path.read_bytes().splitlines()
    edited, wrong_ids, other_key = (json.loads(lines[i]) for i in (1, 2, 3))
    edited["rejected"] += " and more"
    wrong_ids["rejected_ids"][0] = "x"
    other_key["key"] = "0" * 32
    lines[:4] = [lines[0][:-9] + b"!", *(json.dumps(row).encode() for row in (edited, wrong_ids, other_key))]
    path.write_bytes(b"\n".join([*lines, b"[]", b"\xff", b"{}"]) + b"\n")
    again, said = add(backend, chosen, encoder, path)
    assert again == whole
    assert "8 of 12" in said[0] and "ignored 6 edited or damaged lines" in said[1]
    assert len(rows_that_parse(path)) == 8 + 3 + 2 + 4  # what was there is left there


def test_an_end_token_that_was_changed_is_seen(encoder: Encoder, chosen: list[Example], tmp_path: Path) -> None:
    """The text leaves it out, so the text still matches."""
    path, ends = tmp_path / "samples.jsonl", [EOS, 5]
    wanted = wanted_draws(chosen, 1, ends, "a reference", config(**SETTINGS))
    SampleFile(path, wanted, ends, encoder.tokenizer).add(wanted[0], (300, EOS))
    (row,) = rows(path)
    path.write_text(json.dumps(row | {"rejected_ids": [300, 5]}) + "\n")
    again = SampleFile(path, wanted, ends, encoder.tokenizer)
    assert (again.known, again.ignored) == ({}, 1)


def rows_that_parse(path: Path) -> list[Any]:
    out = []
    for line in path.read_bytes().splitlines():
        try:
            out.append(json.loads(line))
        except ValueError:
            continue
    return out


def test_what_decides_a_draw_is_in_its_key(encoder: Encoder, chosen: list[Example]) -> None:
    def keys(ends: tuple[int, ...] = (EOS,), **changes: Any) -> set[str]:
        return {draw.key for draw in wanted_draws(chosen, 2, ends, "a reference", config(**{**SETTINGS, **changes}))}

    first = keys()
    limited = config(**SETTINGS, sample_rejected=1, sample_max_tokens=5)
    assert {draw.room for draw in wanted_draws(chosen, 1, [EOS], "a reference", limited)} == {5}
    for group in batched(wanted_draws(chosen, 1, [EOS], "a reference", limited), 240):  # also where all have the same room
        assert len(group[0].example.prompt) == max(len(draw.example.prompt) for draw in group)
    short = {"sample_rejected": 1, "sample_max_tokens": 5}
    for other in (keys(seed=8), keys(max_length=41), keys(ends=(EOS, 5)), keys(**short)):
        assert first.isdisjoint(other)
    assert first == keys(row_tokens=None, batch_size=7, learning_rate=1.0)


def test_a_draw_does_not_depend_on_the_batch(
    backend_name: str, tiny: str, encoder: Encoder, chosen: list[Example], tmp_path: Path
) -> None:
    backend = load(backend_name, tiny, **SETTINGS)
    together, _ = add(backend, chosen, encoder, tmp_path / "a.jsonl", row_tokens=200)
    alone, _ = add(backend, chosen, encoder, tmp_path / "b.jsonl", row_tokens=1)
    assert together == alone
    other_seed, _ = add(backend, chosen, encoder, tmp_path / "c.jsonl", seed=8)
    assert all(set(a.responses[1:]).isdisjoint(b.responses[1:]) for a, b in zip(together, other_seed, strict=True))


def test_rejected_answers_that_are_there_stay(tiny: str, encoder: Encoder, chosen: list[Example], tmp_path: Path) -> None:
    example = Example(chosen[0].prompt, (*chosen[0].responses, (9, 8, EOS)), (CHOSEN, REJECTED))
    (out,), _ = add(load("cpu", tiny, **SETTINGS), [example], encoder, tmp_path / "samples.jsonl", count=1)
    assert out.responses[:2] == example.responses and out.signs == (CHOSEN, REJECTED, REJECTED)


def test_batches_keep_to_their_tokens(chosen: list[Example]) -> None:
    wanted = wanted_draws(chosen, 3, [EOS], "a reference", config(**SETTINGS))
    batches = batched(wanted, 8 * SETTINGS["row_tokens"])
    assert max(map(len, batched(wanted, 8 * SETTINGS["row_tokens"], rows=2))) == 2
    assert sorted(draw.key for batch in batches for draw in batch) == sorted(draw.key for draw in wanted)
    assert len(batches) > 3
    for batch in batches:
        tokens = len(batch) * max(len(draw.example.prompt) for draw in batch) + len(batch) * max(d.room for d in batch)
        assert tokens <= 8 * SETTINGS["row_tokens"]


def test_answers_to_the_same_prompt_are_drawn_together() -> None:
    """Also where other prompts of the same length stand between them in the data."""
    examples = [Example((5, number % 3), ((7, EOS),), (CHOSEN,)) for number in range(9)]
    wanted = wanted_draws(examples, 2, [EOS], "a reference", config(**SETTINGS))
    batches = batched(wanted, 10**6, rows=6)
    assert [{draw.prompt for draw in batch} for batch in batches] == [{(5, 2)}, {(5, 1)}, {(5, 0)}]


def test_drawn_answers_end_where_a_chat_stops(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the template's end of turn too, where EOS is another token, as with Gemma; whatever form the rows have."""
    tokenizer = byte_level_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    encoder, backend = Encoder(tokenizer), load("cpu", tiny, **SETTINGS)
    generate, ends = backend.generate, list[list[int]]()
    monkeypatch.setattr(backend, "generate", lambda *args, **more: ends.append(args[2]) or generate(*args, **more))
    for number, prompt in enumerate(("what is tea", [{"role": "user", "content": "what is tea"}])):
        example = encoder.encode(pair_row(prompt, "good tea", "bread", ""))
        add(backend, [example], encoder, tmp_path / f"{number}.jsonl", count=1)
    assert ends == [encoder.end_ids()] * 2 == [[0, 2]] * 2


def test_the_text_of_a_sentencepiece_tokenizer_keeps_its_spaces(tiny: str, tmp_path: Path) -> None:
    encoder = Encoder(sentencepiece_tokenizer())
    example = encoder.encode(pair_row("the capital of", " France is", " Paris", ""))
    add(load("cpu", tiny, **SETTINGS), [example], encoder, tmp_path / "samples.jsonl", count=1)
    (line,) = rows(tmp_path / "samples.jsonl")
    assert line["chosen"] == " France is" and line["prompt"].endswith("the capital of")


def test_a_file_that_cannot_be_written_is_one_message(
    tiny: str, encoder: Encoder, chosen: list[Example], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file.*cannot be used"):
        add(load("cpu", tiny, **SETTINGS), chosen, encoder, tmp_path / "file" / "samples.jsonl")
