"""Options by the names of other tools are refused, with what they are here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lite_dil.base.errors import UserError
from lite_dil.cli.main import main, parsers
from lite_dil.config import foreign
from lite_dil.config.options import read_yaml
from lite_dil.config.train_config import FIELDS, flag

# As TRL 1.16, Unsloth, LLaMA-Factory and mlx-lm spell them.
CASES = {
    "--lr 1e-4": "--learning-rate 1e-4",
    "--learning_rate 1e-4": "--learning-rate 1e-4",
    "--iters 500": "--max-steps 500",
    "--num-train-epochs 2": "--epochs 2",
    "--num_train_epochs=2": "--epochs 2",
    "--per_device_train_batch_size 4": "--batch-size 4",
    "--model-name-or-path m": "--model m",
    "--lora-rank 8": "--lora-r 8",
    "--dataset d": "--data d",
    "--cutoff_len 2048": "--max-length 2048",
    "--loss_type sigmoid": "--loss dpo",
    "--loss_type bco_pair": "--loss bce",
    "--pref_beta 0.2": "--beta 0.2",
    "--quantization_bit 4": "--4bit",
    "--bf16": "--dtype bfloat16",
    "--lora_target all": "--target-modules all-linear",
    "--optim_8bit": "",
    "--grad-checkpoint": "--gradient-checkpointing full",
    "--steps-per-eval 50": "--eval-steps 50",
    "--resume_from_checkpoint runs/a": "--resume runs/a",
}


@pytest.mark.parametrize(("given", "ours"), CASES.items())
def test_a_flag_of_another_tool_is_refused_with_ours(given: str, ours: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *given.split()]) == 2
    said = capsys.readouterr().err
    assert f"is {ours} here" in said if ours else "unknown argument" in said


def test_what_is_said_to_be_typed_parses() -> None:
    parser = parsers()[1]["train"]
    for given, ours in CASES.items():
        if ours:
            parser.parse_args(ours.split())
            assert not any(word in parser._option_string_actions for word in given.split() if word.startswith("--"))


def test_all_of_them_are_said_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--use-peft", "--ref-model", "big", "--lr", "1", "--loss-type", "orpo"]) == 2
    said = capsys.readouterr().err
    assert all(name in said for name in ("--use-peft", "--ref-model big", "--learning-rate 1", "orpo is not one of these"))


def test_no_name_of_ours_is_taken_for_another_tools() -> None:
    names = [name for names in (*foreign.SAME.values(), *foreign.NONE.values()) for name in names.split()]
    assert len(names) == len(set(names))
    assert not {f"--{name}" for name in names} & set(map(flag, FIELDS))
    assert set(foreign.SAME) <= set(FIELDS)


def test_keys_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("num_train_epochs: 2\nbf16: true\nlora_target: all\nuse_peft: true\n")
    with pytest.raises(UserError) as raised:
        read_yaml(path)
    said = str(raised.value)
    assert all(ours in said for ours in ("epochs: 2", "dtype: bfloat16", "target_modules: all-linear", "leave it out"))


@pytest.mark.parametrize("given", [["--data", "a.jsonl", "--data", "b.jsonl"], ["a.jsonl", "--data", "b.jsonl"]])
@pytest.mark.parametrize("command", ["train", "plan"])
def test_data_named_twice_is_refused(command: str, given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, *given]) == 2
    assert "--data a.jsonl,b.jsonl" in capsys.readouterr().err


def test_a_file_without_a_flag_is_the_data() -> None:
    commands = parsers()[1]
    for command in ("train", "plan", "data"):
        assert commands[command].parse_args(["prefs.jsonl"]).data == "prefs.jsonl"
    assert re.search(r"\[FILE\]", commands["train"].format_usage())
