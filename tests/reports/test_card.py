"""The model card: what it says is the run's, what it publishes is no machine's, and the code in it runs."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from conftest import write_pairs
from hub_server import Hub, serve
from huggingface_hub import ModelCard, ModelCardData, constants

from lite_dil.cli import adapter_flags
from lite_dil.cli.main import main
from lite_dil.config.options import add_flags, build, read_yaml
from lite_dil.config.train_config import FIELDS
from lite_dil.generation.policy import AdapterSource
from lite_dil.models.names import public_name
from lite_dil.reports.card import write_card
from lite_dil.reports.card_words import code, public_command, public_sources, train_command

CHECK = SimpleNamespace(rows=8, tokens=1234, data="/home/me/held.jsonl", mean=0.00123, max=0.045, tolerance=0.02)
DATA = "pre`fs` |<b>#*_.jsonl"


@pytest.fixture(scope="module")
def runs(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of each backend, of a base model with a card of its own, on data with a hostile name."""
    place = tmp_path_factory.mktemp("place")
    base = place / "a: base"
    shutil.copytree(tiny, base)
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: tiny-1\nlicense_link: https://x.org/y\n---\n# base\n")
    data, held_out = write_pairs(place / DATA), write_pairs(place / "held.jsonl", 6)
    flags = ["--model", str(base), "--data", str(data), "--eval-data", str(held_out), "--max-steps", "2", "--dtype", "float32"]
    flags += ["--save-steps", "1", "--eval-steps", "1", "--lora-alpha", "7", "--report-samples", "0"]
    for backend in ("cpu", "mlx"):
        assert main(["train", *flags, "--backend", backend, "--output-dir", str(place / backend)]) == 0
    return {"place": place, "cpu": place / "cpu", "mlx": place / "mlx"}


def source(adapter: Path, **given: str) -> AdapterSource:
    parser = argparse.ArgumentParser()
    adapter_flags.add_arguments(parser)
    return adapter_flags.find(
        parser.parse_args(["--adapter", str(adapter), *(w for n, v in given.items() for w in (f"--{n}", v))])
    )


def card(folder: Path) -> tuple[ModelCardData, str]:
    text = (folder / "README.md").read_text(encoding="utf-8")
    return ModelCard(text).data, text


def changed(run: Path, target: Path, **options: Any) -> AdapterSource:
    """A copy of a run with other options, and where it is."""
    shutil.copytree(run, target)
    path = target / "config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | options))
    (target / "adapter" / "digests.json").unlink()  # which would tell that config.yaml has changed
    return source(target, backend="cpu")


@pytest.mark.parametrize(("backend", "library"), [("cpu", "peft"), ("mlx", "mlx")])
def test_a_run_leaves_a_card_beside_its_adapter(runs: dict[str, Path], backend: str, library: str) -> None:
    data, text = card(runs[backend] / "adapter")
    assert data.library_name == library and data.pipeline_tag == "text-generation"
    assert data.tags == ["lite-dil", "dil", "lsif", "lora", "preference"]
    assert (data.license, data.license_name, data.license_link) == ("other", "tiny-1", "https://x.org/y")
    assert data.base_model is None and data.datasets is None, "nothing of this is on the hub"
    assert str(runs["place"]) not in text and runs["place"].name not in text
    assert code(DATA) in text and "12 pairs, read as" in text
    assert "alpha 7" in text and "arXiv 2503.05079" in text and "-r_w + r_l^2 / 2" in text
    *_, last = map(json.loads, (runs[backend] / "metrics.jsonl").read_text().splitlines())
    accuracy = last["eval_rewards/accuracies"]
    assert f"Accuracy {accuracy:.3f} (standard error {(6 * accuracy * (1 - accuracy) + 0.25) ** 0.5 / 7:.3f}, 6 pairs)" in text
    for name in ("log_ratio", "logps"):
        assert f"| {last[f'eval_{name}/chosen']:+.3f} | {last[f'eval_{name}/rejected']:+.3f} |" in text
    assert "lite-dil 0." in text and ("mlx-lm " if backend == "mlx" else "peft ") in text.partition("Versions")[2]
    assert "Check of" not in text


@pytest.mark.parametrize("backend", ["cpu", "mlx"])
def test_its_command_gives_the_same_options(runs: dict[str, Path], backend: str) -> None:
    """What the card tells to type is the run, but for where files lie."""
    saved = read_yaml(runs[backend] / "config.yaml")
    words = shlex.split(train_command(saved))
    assert f"lite-dil train {shlex.join(words[2:])}" in card(runs[backend] / "adapter")[1]
    parser = argparse.ArgumentParser()
    add_flags(parser)
    given = build(vars(parser.parse_args(words[2:])), {}).as_dict()
    elsewhere = {"model": "a: base", "data": DATA, "eval_data": "held.jsonl", "output_dir": None}
    assert given == saved | elsewhere
    assert set(given) == set(FIELDS)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of PEFT with transformers 5.23
@pytest.mark.parametrize(("backend", "form"), [("cpu", "adapter"), ("mlx", "adapter"), ("cpu", "merged"), ("mlx", "mlx")])
def test_its_code_runs(
    runs: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    form: str,
) -> None:
    folder = runs[backend] / "adapter"
    if form != "adapter":  # the base model stands for what was merged
        folder = Path(shutil.copytree(runs["place"] / "a: base", tmp_path / "whole"))
        write_card(folder, source(runs[backend]), form, None, "")
    _, text = card(folder)
    (block,) = re.findall(r"```python\n(.*?)```", text, re.S)
    block = block.replace('"FOLDER_OF_a: base"', repr(str(runs["place"] / "a: base"))).replace("256", "4")
    assert str(runs["place"]) in block or form != "adapter"
    monkeypatch.chdir(folder)
    exec(block, {})
    assert capsys.readouterr().out.strip()


def test_ids_of_the_hub_are_named(runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"model": "owner/base", "data": "owner/prefs:learn,/home/me/own.jsonl=0.5", "eval_data": "owner/prefs/good:test"}
    found = changed(runs["cpu"], tmp_path / "run", **options)
    write_card(tmp_path, found, "merged", None, "")
    data, text = card(tmp_path)
    assert (data.base_model, data.datasets, data.library_name) == ("owner/base", ["owner/prefs"], "transformers")
    assert data.to_dict()["base_model_relation"] == "finetune"
    assert data.license is None, "the hub cannot be asked here"
    assert "[owner/base](https://huggingface.co/owner/base)" in text or "[`owner/base`](" in text
    assert "`owner/prefs:learn`, `own.jsonl=0.5`" in text and "/home" not in text

    folders = {"models/owner/base": runs["place"] / "a: base"}
    with serve(Hub, repositories=folders, card={"license": "llama3.1", "license_link": "LICENSE"}) as (address, _):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        write_card(tmp_path, found, "merged", None, "")
    data, _ = card(tmp_path)
    assert (data.license, data.license_link) == ("llama3.1", "https://huggingface.co/owner/base/blob/main/LICENSE")


def test_the_embedded_model_and_data(runs: dict[str, Path], tmp_path: Path) -> None:
    found = changed(
        runs["cpu"], tmp_path / "run", model="smollm2-135m", data="short-answers", loss="dpo", logp_reduction="sum"
    )
    (tmp_path / "tuned.gguf").touch()
    write_card(tmp_path, found, "ollama", None, "")
    data, text = card(tmp_path)
    assert (data.base_model, data.license) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")
    assert data.tags == ["lite-dil", "dpo", "lora", "preference", "gguf"] and data.datasets is None
    assert "ollama create tuned -f Modelfile" in text and "llama-cli -m tuned.gguf" in text
    assert "nats per response" in text and "nats per token" not in text
    assert "Rafailov" in text and "theorem" not in text


def test_several_rejected_answers_a_prompt_are_pairs_and_not_prompts(runs: dict[str, Path], tmp_path: Path) -> None:
    write_card(tmp_path, changed(runs["cpu"], tmp_path / "run", sample_rejected=4), "adapter", None, "")
    _, text = card(tmp_path)
    *_, last = map(json.loads, (runs["cpu"] / "metrics.jsonl").read_text().splitlines())
    accuracy = last["eval_rewards/accuracies"]
    assert f"(standard error {(6 * accuracy * (1 - accuracy) + 0.25) ** 0.5 / 7:.3f}, 24 pairs)" in text


@pytest.mark.parametrize(("backend", "how"), [("cpu", "BitsAndBytesConfig"), ("mlx", "mlx_lm.convert --quantize")])
def test_fewer_bits_in_training_are_said(runs: dict[str, Path], tmp_path: Path, backend: str, how: str) -> None:
    assert "4 bits" not in card(runs[backend] / "adapter")[1]
    found = changed(runs[backend], tmp_path / "run", load_in_4bit=True, head_bits=8)
    write_card(found.adapter, found, "adapter", None, "")  # type: ignore[arg-type]
    _, text = card(tmp_path / "run" / "adapter")
    assert re.search("4 bits, .*head in 8 bits", text)
    assert how in text


def test_figures_are_those_of_the_checkpoint(runs: dict[str, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs["cpu"], tmp_path / "step-1" / "run"))  # a folder of that name is no checkpoint
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "eval_loss" in line:
            line |= {"eval_rewards/accuracies": line["step"] / 4, "eval_log_ratio/chosen": 1.5 - line["step"]}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"half')
    for place, step in ((run / "checkpoints" / "step-1", 1), (run, 2)):
        write_card(tmp_path, source(place), "adapter", None, "")
        _, text = card(tmp_path)
        assert f"figures after step {step}" in text and f"Accuracy {step / 4:.3f}" in text
        assert ("likelihood fell" in text) == (step == 2)


def test_check_command_and_strength(runs: dict[str, Path], tmp_path: Path) -> None:
    command = (
        "lite-dil export --adapter /home/me/x/adapter --output=../out --check-data ~/a.jsonl,/b/c.csv=2 --push-to-hub o/n"
    )
    write_card(tmp_path, source(runs["cpu"], strength="0.5"), "merged", CHECK, command)
    _, text = card(tmp_path)
    assert "1,234 response tokens in 8 rows of `held.jsonl`" in text
    assert re.search(r"0\.0012 nats .*\b0\.02\b.*\b0\.045\b", text)
    assert "lite-dil export --adapter adapter --output=out --check-data a.jsonl,c.csv=2 --push-to-hub o/n" in text
    assert "0.5 times" in text


def test_a_plain_adapter_has_a_card_that_says_less(runs: dict[str, Path], tmp_path: Path) -> None:
    plain = Path(shutil.copytree(runs["cpu"] / "adapter", tmp_path / "plain"))
    write_card(plain, source(plain, model=str(runs["place"] / "a: base")), "adapter", None, "")
    data, text = card(plain)
    assert data.tags == ["lite-dil", "lora"] and data.library_name == "peft" and data.license == "other"
    for word in ("## Training", "loss", "Accuracy", "lite-dil train", "Citation", str(tmp_path)):
        assert word not in text
    assert "PeftModel.from_pretrained" in text


@pytest.mark.parametrize(
    "broken", ["---\nlicense: [\n---\n", "---\n- a list\n---\n", "---\nlicense: {a: b}\n---\n", "no card"]
)
def test_a_base_model_whose_card_says_nothing_good(runs: dict[str, Path], tmp_path: Path, broken: str) -> None:
    base = Path(shutil.copytree(runs["place"] / "a: base", tmp_path / "base"))
    (base / "README.md").write_text(broken)
    (base / "LICENSE.txt").write_text("You may.")
    write_card(tmp_path, source(runs["cpu"], model=str(base)), "merged", None, "")
    data, text = card(tmp_path)
    assert data.license is None
    assert "`LICENSE.txt`" in text


def test_words_that_may_be_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "prefs").mkdir()
    assert code("a`b``c") == "```a`b``c```" and code("`a") == "`` `a ``" and code("a\n```\x1b[0m<b>") == "````a ``` [0m<b>````"
    for name, shown in (
        ("owner/name", "owner/name"),
        ("/home/me/model/", "model"),
        ("C:\\models\\tiny", "tiny"),
        ("./model", "model"),
        ("data/prefs", "prefs"),
        ("smollm2-135m", "smollm2-135m"),
        (".", tmp_path.name),
        ("data/..", tmp_path.name),
        ("x" * 5000, "x" * 5000),
    ):
        assert public_name(name) == shown
    assert public_sources("data/prefs,data/prefs:test,a/b,a/b/c:d=2,a/b.jsonl") == (
        ["prefs", "prefs:test", "a/b", "a/b/c:d=2", "b.jsonl"],
        ["a/b"],
    )
    assert public_command("x --data='/a b/c.jsonl' runs/one ~/two o/n") == "x --data=c.jsonl runs/one two o/n"
