"""One dataclass makes flags, YAML keys, validation and help; a flag wins over YAML, and YAML over the default."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from lite_dil.base.errors import UserError
from lite_dil.config.options import add_flags, build, read_yaml
from lite_dil.config.train_config import FIELDS, TrainConfig, flag
from lite_dil.objectives.table import OBJECTIVES, OPTIONS


def flags(*argv: str) -> dict[str, object]:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return vars(parser.parse_args(argv))


def test_precedence_flag_yaml_default(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("learning_rate: 1e-5\nmax-length: 77\n4bit: true\nbatch_size: 3\ntarget_modules: [q_proj, v_proj]\n")
    config = build(flags("--batch-size", "5"), read_yaml(path))
    assert config.target_modules == "q_proj,v_proj"
    assert (config.learning_rate, config.max_length, config.load_in_4bit, config.batch_size) == (1e-5, 77, True, 5)
    assert config.epochs == 1


def test_every_field_has_a_flag_with_help() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    text = parser.format_help()
    for name in FIELDS:
        assert flag(name) in text
        assert FIELDS[name].metadata["help"]


@pytest.mark.parametrize("loss", list(OBJECTIVES))
def test_defaults_that_depend_on_the_loss(loss: str) -> None:
    config = TrainConfig(loss=loss, data="prefs.jsonl").resolved()
    objective = OBJECTIVES[loss]
    assert (config.logp_reduction, config.beta, config.learning_rate) == (
        objective.reduction,
        1.0 if objective.beta is None else objective.beta,
        objective.learning_rate,
    )
    assert TrainConfig(loss=loss, beta=0.3).resolved().beta == 0.3
    for name, option in OPTIONS.items():
        assert getattr(config, name) == (option.default if name in objective.options else None)
    config.check()  # a resolved config is what --resume starts from


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--simpo-gamma", "1"), "--simpo-gamma belongs to --loss simpo, not to lsif; leave it out"),
        (("--loss", "bce", "--log-ratio-cap", "3"), "--log-ratio-cap belongs to --loss lsif, ukl, basu, not to bce"),
        (("--loss", "rulsif", "--relative-alpha", "1"), "--relative-alpha is 1; expected between 0.001 and 0.999"),
        (("--loss", "basu", "--basu-alpha", "0"), "--basu-alpha is 0; expected at least 0.001"),
        (("--loss", "basu", "--basu-alpha", "nan"), "--basu-alpha is nan; expected at least 0.001"),
        (
            ("--loss", "f-dpo", "--divergence", "jsd"),
            r"'jsd' \(did you mean 'js'\?\) is not one of reverse_kl, forward_kl, js",
        ),
        (("--loss", "sft", "--beta", "0.1"), "--beta: sft has no beta; leave it out"),
        (("--loss", "sft-occupancy", "--logp-reduction", "mean"), "sft-occupancy is a weighted sum"),
        (("--loss", "sft", "--sample-rejected", "1"), "sft trains on chosen responses only"),
        (("--sample-rejected", "0"), "--sample-rejected is 0; expected between 1 and 1000"),
        (("--sample-file", "a.jsonl"), "--sample-file needs --sample-rejected; give that too"),
        (("--sample-max-tokens", "9"), "--sample-max-tokens needs --sample-rejected; give that too"),
        (("--loss", "kto", "--batch-size", "1", "--gradient-accumulation-steps", "1"), "kto compares the responses of a step"),
    ],
)
def test_options_of_another_objective_or_out_of_range(argv: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(flags(*argv), {})


def test_the_embedded_data_brings_its_test_split_and_rate() -> None:
    config = TrainConfig().resolved()
    assert (config.data, config.eval_data, config.learning_rate) == ("short-answers", "short-answers", 2e-4)
    assert TrainConfig(learning_rate=1e-5).resolved().learning_rate == 1e-5


def test_lora_defaults_follow_the_rank() -> None:
    config = TrainConfig(lora_r=4).resolved()
    assert (config.lora_r, config.lora_alpha, config.reference) == (4, 8, "base")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--max-length", "abc"), "argument --max-length: 'abc' is not a whole number"),
        (("--max-length", "1.5"), "argument --max-length: '1.5' is not a whole number"),
        (("--beta", "x"), "argument --beta: 'x' is not a number"),
        (("--beta", "nan"), "--beta is nan; expected a number above 0"),
        (("--loss", "lsfi"), r"'lsfi' \(did you mean 'lsif'\?\) is not one of lsif, ukl, bce, basu"),
        (("--batch-size", "0"), "--batch-size is 0; expected at least 1"),
        (("--max-length", "1"), "--max-length is 1; expected at least 2"),
        (("--warmup-ratio", "2"), "--warmup-ratio is 2; expected between 0 and 1"),
        (("--learning-rate", "-1"), "--learning-rate is -1; expected a number above 0"),
        (("--learning-rate", "1e30"), r"--learning-rate is 1e\+30; expected a number above 0 and below 1e\+18"),
        (("--reference", "initial-adapter"), "--reference initial-adapter needs --init-adapter"),
        (("--init-adapter", "d"), "--init-adapter needs --reference"),
        (("--init-adapter", "d", "--reference", "base", "--lora-r", "4"), "--lora-r: with --init-adapter these come from"),
        (("--batch-size", "0", "--seed", "-1"), "(?s)these options cannot be used:.*--batch-size.*--seed"),
        (("--beta", "x", "--seed", "y"), "(?s)--beta.*--seed"),
    ],
)
def test_bad_flags(argv: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(flags(*argv), {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learnig_rate: 1", r"unknown key 'learnig_rate' \(did you mean 'learning_rate'\?\)"),
        ("beta: [1]", r"key 'beta': \[1\] is not a number"),
        ("load_in_4bit: 1", "key 'load_in_4bit': 1 is not true or false"),
        ("model: 5\nseed: null", "key 'seed': None is not a whole number"),
        ("batch_size: 2.5", "key 'batch_size': 2.5 is not a whole number"),
        ("- a", "expected lines of the form 'key: value'"),
        ("a: b: c", "not valid YAML"),
        ("x: 1\ny: 2", "(?s)unknown key 'x'.*unknown key 'y'"),
    ],
)
def test_bad_yaml(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_yaml(path)


def test_yaml_that_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_yaml(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        read_yaml(tmp_path / "binary.yaml")
