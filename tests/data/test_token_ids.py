"""Rows of token ids: trained as they are, the same as the text that they came from; what is refused, and where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import config, write_pairs
from trainings import metrics, same_weights

import lite_dil as dil
from lite_dil.cli.main import main
from lite_dil.data.dataset import load
from lite_dil.data.encoder import Encoder, Example
from lite_dil.data.rows import Rows
from lite_dil.evaluation.comparison.settings import as_json
from lite_dil.models.find import load_tokenizer

PAIR = {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 2], "rejected_ids": [9, 10, 2]}


@pytest.fixture(scope="module")
def encoder(tiny: str) -> Encoder:
    return Encoder(load_tokenizer(tiny))


def read(encoder: Encoder, *rows: Any, **options: Any) -> list[Example]:
    return list(load(Rows(list(rows)), "train", encoder, config(**options)).examples)


def test_a_training_on_ids_is_that_on_their_text(tiny: str, encoder: Encoder, tmp_path: Path, backend_name: str) -> None:
    texts = [json.loads(line) for line in write_pairs(tmp_path / "pairs.jsonl").read_text().splitlines()]
    ids = [
        {"prompt_ids": each.prompt, "chosen_ids": list(each.responses[0]), "rejected_ids": np.array(each.responses[1])}
        for each in read(encoder, *texts)
    ]
    policy = dil.load(tiny, backend=backend_name, dtype="float32", lora_r=4)
    for name, rows in (("text", texts), ("ids", ids)):
        options: dict[str, Any] = {"learning_rate": 1e-2, "max_steps": 2, "report_samples": 1, "output_dir": tmp_path / name}
        dil.train(policy.fresh() if policy.trained else policy, rows, eval_data=rows[:2], **options)
    assert metrics(tmp_path / "ids") == metrics(tmp_path / "text")
    assert same_weights(tmp_path / "ids/adapter", tmp_path / "text/adapter")
    said = json.loads((tmp_path / "ids/report_samples.jsonl").read_text())["prompt"]
    assert said.startswith("<|im_start|>") and "token ids" in (tmp_path / "ids/report.html").read_text()


def test_pairs_demonstrations_and_labelled_responses(encoder: Encoder, tmp_path: Path) -> None:
    assert read(encoder, PAIR) == [Example((5, 6, 7), ((8, 2), (9, 10, 2)), (1, -1))]
    one = {"prompt_ids": [5], "completion_ids": [8, 2]}
    assert read(encoder, one, loss="sft") == [Example((5,), ((8, 2),), (1,))]
    labelled = [one | {"label": True}, one | {"label": False}]
    assert [each.signs for each in read(encoder, *labelled)] == [(1,), (-1,)]
    table = tmp_path / "rows.csv"
    table.write_text('prompt_ids,chosen_ids,rejected_ids\n"[5, 6, 7]","[8, 2]","[9, 10, 2]"\n')
    assert list(load(str(table), "train", encoder, config()).examples) == read(encoder, PAIR)
    for rows in ([PAIR], [one], labelled):  # a comparison's parts are read as they were written
        assert [json.loads(as_json(row)) for row in dil.read(rows)] == rows


def test_a_row_too_long_is_cut_as_text_is(encoder: Encoder) -> None:
    (cut,) = read(encoder, PAIR | {"prompt_ids": [3, *range(20, 40)]}, max_length=8)
    assert cut.prompt == (3, 36, 37, 38, 39) and cut.responses == ((8, 2), (9, 10, 2))
    with pytest.raises(dil.UserError, match=r"differ from token 2 on"):
        read(encoder, PAIR | {"rejected_ids": [8, 11]}, max_length=2)


def test_equal_draws_are_kept_and_counted(encoder: Encoder) -> None:
    data = load(Rows([PAIR | {"rejected_ids": [8, 2]}, PAIR | {"rejected_ids": [8]}]), "train", encoder, config())
    assert data.examples[0].responses == ((8, 2), (8, 2)) and len(data.examples) == 2
    equal, unended = data.sources[0].notes.items()
    assert equal[1] == 1 and "the same tokens" in equal[0] and unended[1] >= 1 and "end token" in unended[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen_ids": []}, "field 'chosen_ids' is empty; expected a list of one or more token ids"),
        ({"prompt_ids": [5, -1]}, r"prompt_ids\[1\] is '-1'; expected a token id, an integer from 0 on"),
        ({"rejected_ids": [5, True]}, r"rejected_ids\[1\] is 'True'"),
        ({"rejected_ids": [5.0]}, r"rejected_ids\[0\] is '5.0'"),
        ({"chosen_ids": "5 6"}, "field 'chosen_ids' is text; expected a list"),
        (
            {"chosen_ids": [511, 512]},
            "field 'chosen_ids' has the token 512, which the model lacks; expected ids from 0 to 511",
        ),
        ({"rejected_ids": None}, "field 'rejected_ids' is null"),
        ({"prompt": "what is"}, "field 'prompt' beside 'chosen_ids': .*remove one of the two"),
        ({"system": "be brief"}, "field 'system' beside 'chosen_ids'"),
        ({"completion_ids": [5]}, "field 'completion_ids' beside 'chosen_ids'"),
    ],
)
def test_what_is_refused(encoder: Encoder, change: dict[str, Any], message: str) -> None:
    with pytest.raises(dil.UserError, match=f"data row 2: ({message})"):
        read(encoder, PAIR, PAIR | change)


def test_ids_do_not_mix_with_text(encoder: Encoder, tmp_path: Path) -> None:
    text = {"prompt": "what is", "chosen": " one", "rejected": " two"}
    with pytest.raises(dil.UserError, match=r"data row 3: .*looks like chosen and rejected .preference., but"):
        read(encoder, PAIR, PAIR, text)
    for name, row in (("ids", PAIR), ("text", text)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    with pytest.raises(dil.UserError, match=r"has pairs of token ids and .* pairs of plain text"):
        load(f"{tmp_path / 'ids.jsonl'},{tmp_path / 'text.jsonl'}", "train", encoder, config())
    with pytest.raises(dil.UserError, match="--chat makes messages of text, and the row has token ids"):
        read(encoder, PAIR, chat=True)
    assert read(encoder, PAIR | text, data_format="preference")[0].prompt != (5, 6, 7)


def test_commands(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(PAIR | {"prompt_ids": [5, 6, i]}) + "\n" for i in range(20, 24)))
    assert main(["data", str(file), "--model", tiny]) == 0
    said = capsys.readouterr().out
    assert "token ids, trained as they are" in said and "plain text" not in said
    assert main(["plan", "--data", str(file), "--model", tiny, "--backend", "cpu"]) == 0
    assert "over 4 examples an epoch" in capsys.readouterr().out
    assert main(["label", str(file), "--model", tiny, "--output", str(tmp_path / "pairs.jsonl")]) == 2
    assert "the row has token ids, which only training and held-out data may be; expected text" in capsys.readouterr().err
