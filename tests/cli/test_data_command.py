"""`lite-dil data`: its figures worked out by hand, its exit codes, and that what it shows is what is trained on."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import config, sentencepiece_tokenizer

from lite_dil.cli.main import main
from lite_dil.data.dataset import load
from lite_dil.data.encoder import Encoder
from lite_dil.data.held_out import split
from lite_dil.models.find import load_tokenizer


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def pair(prompt: str, chosen: str, rejected: str) -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def labelled(prompt: str, answer: str, label: bool) -> dict[str, Any]:
    return {"prompt": prompt, "completion": answer, "label": label}


@pytest.fixture
def data(tiny: str, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command with --json; returns the exit code and the object."""

    def run(*argv: str) -> tuple[int, dict[str, Any]]:
        code = main(["data", *argv, "--model", tiny, "--json"])
        captured = capsys.readouterr()
        assert captured.err == ""
        return code, json.loads(captured.out)

    return run


def words(number: int, word: str = "the") -> str:
    """A text of that many tokens: " the" is one, and an answer has its end-of-turn token besides."""
    return f" {word}" * number


def asked(number: int) -> str:
    """A prompt of that many tokens."""
    return words(number, "what")


def test_lengths_and_what_max_length_cuts(data: Any, tmp_path: Path) -> None:
    # Answers of 2 .. 11 tokens against answers of 3, with prompts of 1 .. 10: needed are 1 + 3, 2 + 3, 3 + 4, ..., 10 + 11.
    file = write(tmp_path / "a.jsonl", [pair(asked(n), words(n), words(2) + ".") for n in range(1, 11)])
    code, found = data(file, "--max-length", "13")
    assert code == 0
    assert found["tokens"]["prompt"] == {"p50": 5, "p90": 9, "p95": 10, "p99": 10, "max": 10, "mean": 5.5}
    assert found["tokens"]["chosen"] == {"p50": 6, "p90": 10, "p95": 11, "p99": 11, "max": 11, "mean": 6.5}
    assert found["tokens"]["rejected"] == {"p50": 4, "p90": 4, "p95": 4, "p99": 4, "max": 4, "mean": 4.0}
    assert found["tokens"]["whole"]["max"] == 10 + 11 + 4
    # Of 6 + 7 = 13 tokens nothing is cut, of 7 + 8 = 15 two.
    assert found["max_length"] == {
        "given": 13, "prompts_cut": 4, "prompts_halved": 2, "answers_cut": 0, "examples_cut": 4,
        "cuts_none": 21, "cuts_one_percent": 21,
    }  # fmt: skip
    assert any(re.match("2 prompts .*--max-length 13", text) for text in found["warnings"])
    whole = 10 * 4 + sum(n + n + 1 for n in range(1, 11))
    assert found["all_rows"] == {"computed": whole - (2 + 4 + 6 + 8), "trained": 40 + 65}
    assert found["length_bias"] == {
        "chosen_longer": 0.7, "rejected_longer": 0.2, "mean_difference": 2.5, "beyond_chance": False,
    }  # fmt: skip
    # 8 tokens hold no more than 7 of an answer, beside the one that is left of the prompt.
    _, found = data(file, "--max-length", "8")
    assert (found["max_length"]["answers_cut"], found["max_length"]["examples_cut"]) == (4, 7)
    assert any(re.search("4 responses .*--max-length 8", warning) for warning in found["warnings"])
    # What it says is what training does.
    for limit in ("cuts_none", "given"):
        length = found["max_length"][limit]
        encoder = Encoder(load_tokenizer(found["model"]))
        loaded = load(file, "train", encoder, config(max_length=length))
        assert (loaded.prompts_cut > 0) == (limit == "given")


def test_one_percent_is_of_the_examples(data: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [pair(asked(1), words(n), words(200)) for n in range(201, 351)])
    _, found = data(file)
    assert found["max_length"]["cuts_none"] == 1 + 350 + 1
    assert found["max_length"]["cuts_one_percent"] == 1 + 349 + 1  # 1 of 150 may be cut
    _, again = data(file, "--max-length", "351")
    assert again["max_length"]["examples_cut"] == 1


@pytest.mark.parametrize(
    ("longer", "shorter", "loss", "said"),
    [
        (60, 40, "lsif", ""),  # 0.6 is two standard errors of 100 above a half, and not more
        (61, 39, "lsif", "--loss lsif averages log-probs"),
        (61, 39, "dpo", "--loss dpo sums log-probs"),
        (61, 39, "sft", "--loss sft learns the lengths of the chosen responses"),
        (39, 61, "dpo", ""),
    ],
)
def test_length_bias_beyond_chance(data: Any, tmp_path: Path, longer: int, shorter: int, loss: str, said: str) -> None:
    rows = [pair(asked(n + 1), words(3), words(2)) for n in range(longer)]
    rows += [pair(asked(n + 1), words(2), words(3)) for n in range(shorter)]
    _, found = data(write(tmp_path / "a.jsonl", rows), "--loss", loss)
    assert found["length_bias"]["beyond_chance"] == bool(said)
    warnings = [warning for warning in found["warnings"] if "longer is better" in warning]
    assert bool(warnings) == bool(said)
    assert all(said in warning and ("--loss simpo" in warning) == (loss == "dpo") for warning in warnings)


def test_what_is_held_out_is_what_train_holds_out(
    data: Any, tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "a.jsonl", [pair(f"what is {n // 2}", words(n), "red") for n in range(1, 41)])
    encoder = Encoder(load_tokenizer(tiny))
    for fraction in ("0.1", "0.3"):
        _, held_out = split(load(file, "train", encoder, config(), good_only=False), float(fraction))
        code, found = data(file, "--eval-fraction", fraction)
        assert held_out and code == 0 and found["held_out"]["in_training"]["of"] == len(held_out.examples) > 0
        assert main(["data", file, "--model", tiny, "--eval-fraction", fraction]) == 0
        out = capsys.readouterr().out
        assert f"{len(held_out.examples)} of these rows would be held out" in out and f"--eval-fraction {fraction}" in out
    assert main(["data", file, "--model", tiny]) == 0
    assert "nothing would be held out" in capsys.readouterr().out
    code, found = data(file, "--eval-fraction", "0.01")
    assert code == 2 and [stop["why"] for stop in found["stops"]] == [
        "--eval-fraction 0.01 of 40 rows is 0, and no prompt has so few; give --eval-data"
    ]


def test_duplicates_and_contradictions_of_pairs(data: Any, tmp_path: Path) -> None:
    rows = [
        pair("a", "the", "red"),
        pair("b", "the", "red"),
        pair("a", "red", "the"),  # against 1
        pair("a", "the", "red"),  # as 1
        pair("a", "red", "the"),  # against 1, as 3
        pair("a", "the", "blue"),
    ]
    file = write(tmp_path / "a.jsonl", rows)
    code, found = data(file)
    assert code == 0
    assert found["duplicates"] == {"rows": 2, "first": f"{file} line 4", "earlier": f"{file} line 1"}
    assert found["contradictions"] == {"rows": 2, "first": f"{file} line 3", "earlier": f"{file} line 1"}
    told = [warning for warning in found["warnings"] if re.search("an earlier (row|one)", warning)]
    assert len(told) == 2 and all(f"{file} line 1" in warning for warning in told)


def test_where_the_prompt_ends_tells_rows_apart(data: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "what is", "completion": " the"}, {"prompt": "what", "completion": " is the"}]
    assert data(write(tmp_path / "a.jsonl", rows), "--loss", "sft")[1]["duplicates"]["rows"] == 0


def test_an_answer_that_is_called_good_and_bad(data: Any, tmp_path: Path) -> None:
    rows = [labelled("a", "the", True), labelled("a", "red", False), labelled("a", "the", False), labelled("b", "red", True)]
    file = write(tmp_path / "a.jsonl", [*rows, labelled("a", "red", False)])
    _, found = data(file)
    assert found["form"] == "unpaired"
    assert found["answers"] == {"chosen": 2, "rejected": 3}
    assert found["contradictions"] == {"rows": 1, "first": f"{file} line 3", "earlier": f"{file} line 1"}
    assert found["duplicates"] == {"rows": 1, "first": f"{file} line 5", "earlier": f"{file} line 2"}
    assert "dpo" not in found["losses"] and {"kto", "lsif", "sft"} <= set(found["losses"])


def test_marks_of_other_templates(data: Any, tmp_path: Path) -> None:
    rows = [
        pair("[INST] a [/INST]", "the </s>", "red"),
        pair("b <|im_start|>", "[INST] the", "red\n\nHuman: go on"),
        pair("c", "<sup>1</sup>", "a <|x|>"),
    ]
    file = write(tmp_path / "a.jsonl", rows)
    _, found = data(file)
    marks = {mark.pop("mark"): mark for mark in found["marks"]}
    assert marks["[INST]"] == {"rows": 2, "first": f"{file} line 1", "as_token": False}
    assert marks["\n\nHuman:"] == {"rows": 1, "first": f"{file} line 2", "as_token": False}
    assert marks["<|im_start|>"] == {"rows": 1, "first": f"{file} line 2", "as_token": True}
    assert marks.keys() == {"[INST]", "[/INST]", "</s>", "\n\nHuman:", "<|im_start|>"}
    (told,) = (warning for warning in found["warnings"] if "another model's template" in warning)
    assert "'[INST]' in 2 rows" in told and "im_start" not in told
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b </s>"}, {"role": "user", "content": "c"}]
    answers = {"chosen": [{"role": "assistant", "content": "<|eot_id|>"}], "rejected": "red"}
    _, found = data(write(tmp_path / "b.jsonl", [{"prompt": chat, **answers}]))
    assert {mark["mark"] for mark in found["marks"]} == {"</s>", "<|eot_id|>"}


def test_plain_text_for_a_model_that_chats_is_warned_of(data: Any, tmp_path: Path) -> None:
    def warned(prompt: Any) -> bool:
        row = {"prompt": prompt, "chosen": "the", "rejected": "red"}
        return any("without the model's chat template" in w for w in data(write(tmp_path / "a.jsonl", [row]))[1]["warnings"])

    assert warned("what")
    assert not warned([{"role": "user", "content": "what"}])
    assert not warned("<|im_start|>user\nwhat<|im_end|>\n<|im_start|>assistant\n")  # laid out by hand


GOOD = [labelled("a", "the", True), labelled("b", "red", True)]
DEMOS = [{"prompt": "a", "completion": "the"}]


@pytest.mark.parametrize(
    ("rows", "flags", "code", "why"),
    [
        ([pair("a", "the", "red")], [], 0, ""),
        ([pair("a", "the", "red"), pair("a", "", "red")], [], 2, "1 of 2 rows cannot be used"),
        ([pair("a", "the", "red"), pair("a", "", "red")], ["--skip-bad-rows"], 0, ""),
        ([pair("a", "the", "")], ["--skip-bad-rows"], 2, "none of 1 row can be used"),
        (GOOD, ["--loss", "kto"], 2, "--loss kto needs good and bad responses"),
        (GOOD, [], 2, "--loss lsif needs good and bad responses"),
        (GOOD, ["--loss", "sft"], 0, ""),
        (DEMOS, [], 2, "--loss lsif needs rejected responses"),
        (DEMOS, ["--loss", "sft"], 0, ""),
        ([labelled("a", "the", True), labelled("a", "red", False)], ["--loss", "kto"], 2, "all rows have the same prompt"),
        ([*GOOD, labelled("a", "red", False)], ["--loss", "dpo"], 2, "--loss dpo needs pairs"),
        ([*GOOD, labelled("a", "red", False)], ["--loss", "kto"], 0, ""),
    ],
)
def test_exit_codes_are_those_of_training(
    data: Any, tiny: str, tmp_path: Path, rows: list[Any], flags: list[str], code: int, why: str, capsys: Any
) -> None:
    file = write(tmp_path / "a.jsonl", rows)
    returned, found = data(file, *flags)
    assert returned == code
    assert [why in stop["why"] for stop in found["stops"]] == ([True] if why else [])
    # The report is printed all the same, and its last line says what to do.
    assert main(["data", file, *flags, "--model", tiny]) == code
    out = capsys.readouterr().out
    last = out.splitlines()[-1]
    if code == 0:
        words = " ".join([*flags, "--model", tiny])
        assert ": lite-dil train --data " in last
        assert all(word in last for word in words.split())
    else:
        assert f"train stops: {found['stops'][0]['why']}" in out
        assert last == f"what to do: {found['stops'][0]['mend']}"
    # And training agrees.
    more = ["--max-steps", "1", "--report-samples", "0", "--backend", "cpu", "--output-dir", str(tmp_path / "run")]
    assert main(["train", "--data", file, "--model", tiny, *flags, *more]) == code


def test_every_reason_is_told_with_its_first_place(data: Any, tmp_path: Path) -> None:
    rows = [{"chosen": "a"}, pair("a", "the", "red"), pair("a", "", "red"), pair("a", "the", "the"), pair("b", "the", "")]
    file = write(tmp_path / "a.jsonl", rows)
    code, found = data(file)
    assert code == 2
    (source,) = found["sources"]
    assert (source["kept"], source["format"], source["weight"]) == (1, "preference", 1)
    empty, lacking, same = source["left_out"]
    assert (empty["reason"], empty["rows"]) == ("empty response", 2)
    # Each different story is told, with the first place that has it.
    assert [story["first"].rpartition(" ")[2] for story in empty["stories"]] == ["3", "5"]
    assert "empty" in empty["stories"][0]["message"]
    assert (lacking["rows"], lacking["stories"][0]["first"]) == (1, f"{file} line 1")
    assert (same["reason"], same["rows"]) == ("identical responses", 1)


def test_held_out_data_is_read_and_compared(data: Any, tiny: str, tmp_path: Path, capsys: Any) -> None:
    rows = [pair("a", "the", "red"), pair("b", "the", "red"), pair("c", "the", "red")]
    file = write(tmp_path / "a.jsonl", rows)
    code, found = data(file)
    assert (code, found["held_out"]) == (0, None)
    others = [pair("b", "the", "blue"), pair("d", "the", "red"), pair("e", "the", "red")]
    held_out = write(tmp_path / "b.jsonl", [rows[0], *others])
    code, found = data(file, "--eval-data", held_out)
    assert code == 0 and found["held_out"]["in_training"] == {"of": 4, "rows": 1, "prompts": 2}
    assert [found["held_out"][name] for name in ("data", "form", "chat")] == [held_out, "pairs", False]
    assert found["held_out"]["sources"][0]["kept"] == 4
    (told,) = (warning for warning in found["warnings"] if "held-out" in warning)
    assert re.match("1 of 4 held-out rows .*, 1 more ", told)
    # From a file of options too, where it was read over before.
    (tmp_path / "run.yaml").write_text(f"data: {file}\neval_data: {held_out}\n")
    assert data("--config", str(tmp_path / "run.yaml"))[1] == found
    assert main(["data", file, "--eval-data", held_out, "--model", tiny]) == 0
    out = capsys.readouterr().out
    assert f"{held_out}, held out\n" in out and f"warning: {told}\n" in out
    assert shlex.split(out.splitlines()[-1].partition(": ")[2])[-6:].count(held_out) == 1
    fresh = write(tmp_path / "c.jsonl", rows[2:])
    assert main(["data", held_out, "--eval-data", fresh, "--model", tiny]) == 0
    assert "no held-out prompt" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "flags", "why"),
    [
        ([pair("a", "the", "red"), pair("b", "", "red")], [], "1 of 2 rows cannot be used"),
        ([pair("a", "the", "red"), pair("b", "", "red")], ["--skip-bad-rows"], ""),
        ([pair("b", "", "red")], ["--skip-bad-rows"], "none of 1 row can be used"),
        ([{"prompt": "a", "completion": "the"}], [], "held-out data: --loss lsif needs rejected responses"),
        ([{"prompt": "a", "completion": "the"}], ["--loss", "sft"], ""),
    ],
)
def test_held_out_data_stops_training_too(
    data: Any, tiny: str, tmp_path: Path, rows: list[dict[str, Any]], flags: list[str], why: str
) -> None:
    """As training itself would."""
    file = write(tmp_path / "a.jsonl", [pair("x", "the", "red"), pair("y", "the", "red")])
    given = [file, "--eval-data", write(tmp_path / "b.jsonl", rows), *flags]
    code, found = data(*given)
    assert code == (2 if why else 0) and why in " ".join(stop["why"] for stop in found["stops"])
    assert bool(found["stops"]) == bool(why)
    training = ["train", "--data", *given, "--model", tiny, "--backend", "cpu", "--max-steps", "1", "--report-samples", "0"]
    assert main([*training, "--output-dir", str(tmp_path / "run")]) == code


def test_notes_and_several_sources(data: Any, tmp_path: Path) -> None:
    repeated = pair("the capital", "the capital is Paris", "the capital is red")
    one, other = write(tmp_path / "a.jsonl", [repeated]), write(tmp_path / "b.jsonl", [pair("a", "b", "c")] * 2)
    code, found = data(f"{one},{other}=0.5")
    assert code == 0
    assert [(source["name"], source["weight"], source["kept"]) for source in found["sources"]] == [
        (one, 1, 1),
        (other, 0.5, 2),
    ]
    assert [note["rows"] for note in found["sources"][0]["notes"]] == [1]
    assert found["duplicates"] == {"rows": 1, "first": f"{other} line 2", "earlier": f"{other} line 1"}


def test_a_sample_is_exactly_what_is_trained_on(data: Any, tiny: str, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "the capital of 日本 😀?"}]
    rows = [{"prompt": chat, "chosen": f"東京 is {n}", "rejected": words(30)} for n in range(9)]
    file = write(tmp_path / "a.jsonl", rows)
    _, found = data(file, "--max-length", "40", "--seed", "3")
    tokenizer = load_tokenizer(tiny)
    loaded = load(file, "train", Encoder(tokenizer), config(max_length=40)).examples
    by_place = {example.place: example for example in loaded}
    assert len(found["samples"]) == len({sample["place"] for sample in found["samples"]}) == 3
    for sample in found["samples"]:
        example, (prompt, chosen, rejected) = by_place[sample["place"]], sample["parts"]
        assert [tuple(part["ids"]) for part in sample["parts"]] == [example.prompt, *example.responses]
        assert [part["side"] for part in sample["parts"]] == ["prompt", "chosen", "rejected"]
        assert [part["trained"] for part in sample["parts"]] == [False, True, True]
        for part in (prompt, chosen, rejected):
            assert part["text"] == tokenizer.decode(part["ids"])
            assert part["text"] == "".join(text for text, _, _ in part["pieces"])
            assert len(part["ids"]) == sum(number for _, number, _ in part["pieces"])
        assert (prompt["cut"] > 0, chosen["cut"], rejected["cut"]) == (True, 0, 0)
        assert chosen["pieces"][-1] == ["<|im_end|>", 1, True]
        assert ["東", 3, False] in chosen["pieces"]
    again, other = data(file, "--seed", "3")[1], data(file, "--seed", "4")[1]
    places = [[sample["place"] for sample in run["samples"]] for run in (found, again, other)]
    assert places[0] == places[1] != places[2]
    assert not data(file, "--loss", "sft")[1]["samples"][0]["parts"][2]["trained"]


def test_a_sample_of_a_tokenizer_that_drops_a_first_space(tiny: str, tmp_path: Path, capsys: Any) -> None:
    sentencepiece_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_bytes((Path(tiny) / "config.json").read_bytes())
    file = write(tmp_path / "a.jsonl", [pair("what is", " the capital", "\nred")])
    assert main(["data", file, "--model", str(tmp_path / "model"), "--json"]) == 0
    (sample,) = json.loads(capsys.readouterr().out)["samples"]
    assert [part["text"] for part in sample["parts"]] == ["<s> what is", " the capital</s>", "\nred</s>"]
    assert sample["parts"][0]["pieces"][0] == ["<s>", 1, True]


def test_a_run_s_config_can_be_checked(data: Any, tiny: str, tmp_path: Path, capsys: Any) -> None:
    file = write(tmp_path / "a.jsonl", [pair("a", "the", "red"), pair("a", "", "red")])
    (tmp_path / "run.yaml").write_text(f"data: {file}\nloss: simpo\nlearning_rate: 1e-5\nskip_bad_rows: true\nmax_length: 7\n")
    code, found = data("--config", str(tmp_path / "run.yaml"))
    assert code == 0
    assert (found["data"], found["loss"], found["max_length"]["given"]) == (file, "simpo", 7)
    code, found = data("--config", str(tmp_path / "run.yaml"), "--no-skip-bad-rows", "--max-length", "9")
    assert code == 2 and found["max_length"]["given"] == 9
    settings = ["--config", str(tmp_path / "run.yaml"), "--model", tiny, "--max-rows", "1", "--no-skip-bad-rows"]
    assert main(["data", *settings]) == 0
    last = capsys.readouterr().out.splitlines()[-1].partition("lite-dil train ")[2]
    assert sorted(shlex.split(last)) == sorted(settings)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max-lenght", "9"], "unknown argument --max-lenght (did you mean '--max-length'?); see lite-dil data --help"),
        (["--learning-rate", "1"], "--learning-rate is of lite-dil train and changes nothing here"),
        (["--data", "x.jsonl"], "FILE is named without a flag here, as in lite-dil data prefs.jsonl"),
        (["--loss", "sfl"], "argument --loss: 'sfl'"),
        (["none.jsonl"], "none.jsonl: no such file"),
        (["--columns", "good"], "--columns good: expected FIELD=COLUMN"),
    ],
)
def test_user_errors(argv: list[str], message: str, tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", *argv, "--model", tiny, "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("lite-dil: ") and message in captured.err
    assert captured.out == ""


def test_sources_that_do_not_go_together(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = write(tmp_path / "a.jsonl", [pair("a", "b", "c")]), write(tmp_path / "b.jsonl", DEMOS)
    assert main(["data", f"{one},{other}", "--model", tiny]) == 2
    assert "one kind" in capsys.readouterr().err


def test_neither_torch_nor_mlx_is_needed(tiny: str, tmp_path: Path) -> None:
    """In a new interpreter in which neither can be imported, to a pipe that takes no accents."""
    file = write(tmp_path / "a.jsonl", [pair("a", "the é", "red")])
    code = (
        "import runpy, sys\n"
        "sys.modules.update(dict.fromkeys(('torch', 'mlx', 'mlx_lm', 'peft')))\n"
        f"sys.argv = ['lite-dil', 'data', {file!r}, '--model', {tiny!r}]\n"
        "runpy.run_module('lite_dil', run_name='__main__')\n"
    )
    root = Path(__file__).parent.parent.parent
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(root)}
    out = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert (out.returncode, out.stderr) == (0, "")
    assert r"the\u2502" in out.stdout and r"\xe9" in out.stdout


def test_no_flag_is_the_data_of_the_demo(data: Any) -> None:
    code, found = data()
    assert (code, found["data"], found["form"], found["chat"]) == (0, "short-answers", "pairs", True)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, text in (
        (["--help"], "show what would be trained on"),
        (["data", "--help"], "lite-dil data prefs.jsonl --model"),
    ):
        with pytest.raises(SystemExit):
            main(argv)
        assert text in " ".join(capsys.readouterr().out.split())
