"""The rehearsal's list of cases, its table and its checkpoints. What it rehearses needs a CUDA build of torch, so not here."""

from __future__ import annotations

import re
import sys
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from rehearse_cuda import __main__ as program
from rehearse_cuda import checkpoints, stand_in
from rehearse_cuda.cases import PARTS, Case, cases
from rehearse_cuda.results import Result, Results, heading, line, summary
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from lite_dil.backends.limits import check_options
from lite_dil.backends.options import EngineOptions
from lite_dil.base.memory import GIB
from lite_dil.config.train_config import TrainConfig
from lite_dil.data.options import Lengths
from lite_dil.models.options import ModelOptions
from lite_dil.models.shape import read_shape
from lite_dil.planning.memory import memory_of

ROOT = Path(__file__).parent.parent.parent
OWN = {"passes", "head", "command", "close", "where"}  # settings that are no options of training
# Options of the engine and the model that no training rehearses, each with its reason.
LEFT_OUT = {
    "model": "is the rehearsal's own",
    "backend": "is the rehearsal's own",
    "compile": "is for mlx",
    "unsloth": "brings kernels and versions of its own",
    "weight_decay": "is one number of the optimiser's kernel",
    "max_grad_norm": "is one number of the update",
    "optim": "is adamw or the paged one by --4bit",
}


def test_every_case_has_a_name_of_its_own() -> None:
    for everything in (False, True):
        keys = Counter(case.key for case in cases(everything=everything))
        assert keys.most_common(1)[0][1] == 1, keys.most_common(1)
    assert {case.part for case in cases()} == set(PARTS)


def test_trainings_use_every_option_of_the_engine_in_both_layouts() -> None:
    known = {field.name for field in (*fields(EngineOptions), *fields(ModelOptions))} - {f.name for f in fields(Lengths)}
    known -= {"trust_remote_code", "chat_template_kwargs"}  # about files and texts
    for layout in ("plain", "packed"):
        trainings = [case for case in cases(("train",)) if case.settings.get("layout") == layout]
        assert len(trainings) == 10
        used = {name for case in trainings for name in case.settings}
        assert known - used == set(LEFT_OUT)
        modes = {case.settings.get("gradient_checkpointing") for case in trainings}
        assert modes == {None, "selective", "full"}


@pytest.mark.parametrize("case", cases(("train", "out-of-memory")), ids=lambda case: case.key)
def test_options_of_a_case_go_together_on_cuda(case: Case) -> None:
    options = {name: value for name, value in case.settings.items() if name not in OWN}
    if "init_adapter" in options:
        options["init_adapter"] = "a folder"
    config = TrainConfig(backend="cuda", **options)
    config.check()
    check_options("cuda", config.resolved(), config.resolved())


def test_attention_has_what_models_are_shipped_with_and_the_whole_table() -> None:
    shipped = [case.settings for case in cases(("attention",))]
    assert len(shipped) == 12
    assert {case["width"] for case in shipped} == {64, 96, 128, 256, 512}
    table = cases(("attention",), everything=True)
    assert len(table) == 7 * 2 * (2 * 5 + 1)  # widths, caps, and types by card
    assert all(case.settings["windows"] == [None, 256] for case in table)
    assert not [case for case in table if case.card == 75 and case.settings["dtype"] == "bfloat16"]
    assert all(case.settings["heads"] % case.settings["kv_heads"] == 0 for case in [*cases(("attention",)), *table])


def test_cards_have_what_plan_says_that_cuda_leaves() -> None:
    for case in cases(("memory",)):
        name = case.settings["memory"]
        assert case.gib == stand_in.USABLE[name]
        if name != "T4":
            assert memory_of(float(name.removesuffix(" GB")), "cuda").usable / GIB == pytest.approx(case.gib)


def test_checkpoints_are_what_transformers_makes_of_their_configs(tmp_path: Path) -> None:
    for name, make in (("tiny", checkpoints.tiny), ("8b", checkpoints.llama_8b)):
        folder = make(tmp_path / name)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
        with safe_open(folder / "model.safetensors", "pt") as file:
            found = {key: list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        assert found == {key: list(value.shape) for key, value in model.state_dict().items()}
    assert read_shape(str(folder)).parameters == 8_030_261_248
    assert (folder / "model.safetensors").stat().st_blocks * 512 < 2**20  # the weights are a hole


def test_counters_are_numbered_as_the_card_numbers_them() -> None:
    text = (stand_in.SOURCES / "card.h").read_text(encoding="utf-8")
    found = re.search(r"enum Kind \{ (.+), KINDS \};", text)
    assert found and found[1].split(", ") == [kind.name for kind in stand_in.Kind]


def test_versions_are_those_of_the_other_environment_but_for_torch() -> None:
    def pins(path: Path) -> dict[str, str]:
        lines = path.read_text(encoding="utf-8").splitlines()
        return dict(line.split("==") for line in lines if not line.startswith("#"))

    own, others = pins(ROOT / "scripts/rehearse_cuda/constraints.txt"), pins(ROOT / "constraints.txt")
    assert {name: others[name] for name in own if name != "torch"} == {n: v for n, v in own.items() if n != "torch"}
    assert own["torch"] > others["torch"]


def test_a_line_a_case() -> None:
    case = Case("train", "plain, 4-bit", 86)
    good, bad = Result(True, "882 launches a step", {"cpu_s": 30.0}, 41.4), Result(False, "no adapter was written", {}, 7.0)
    assert heading().split() == ["part", "card", "case", "s", "what", "was", "seen"]
    for result, state in ((good, "ok       41"), (bad, "FAILED    7")):
        assert line(case, result) == f"train          sm_86   {case.name:44}  {state}  {result.text}"
    assert line(case, good, before=True).split()[-6:] == ["ok", "kept", "882", "launches", "a", "step"]
    assert summary([good, bad]) == "2 cases, 1 failed; 0.5 minutes of CPU time"
    assert summary([good]) == "1 cases, none failed; 0.5 minutes of CPU time"


def test_only_what_passed_with_the_same_sources_is_kept(tmp_path: Path) -> None:
    results, case = Results(tmp_path), Case("train", "plain, 4-bit", settings={"load_in_4bit": True})
    good = Result(True, "fine", {"peak": 1}, 2.0)
    assert results.passed(case) is None
    results.keep(case, good)
    assert Results(tmp_path).passed(case) == good
    assert Results(tmp_path).passed(replace(case, settings={"load_in_4bit": False})) is None
    path = tmp_path / f"{case.key}.json"
    path.write_text(re.sub('"sources": "[0-9a-f]+"', '"sources": "0"', path.read_text()))
    assert Results(tmp_path).passed(case) is None
    results.keep(case, replace(good, ok=False))
    assert Results(tmp_path).passed(case) is None


def test_the_table_of_attention_is_made_of_the_results_so_far(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = {
        (c.card, c.settings["dtype"], c.settings["width"], bool(c.settings["cap"])): c for c in cases(("attention",), True)
    }
    forward, backward = {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 32}, {"bwd_BLOCK_M1": 16, "bwd_BLOCK_N1": 32}
    for card, width, cap, figures in (
        (75, 64, False, {"fits": True, "blocks": {}}),
        (75, 64, True, {"fits": True, "blocks": {}}),
        (75, 80, False, {"fits": True, "blocks": forward}),
        (75, 80, True, {"fits": True, "blocks": forward | backward}),
        (75, 96, False, {"fits": False}),
        (75, 96, True, None),
    ):
        result = Result(figures is not None, "", figures or {}, 1.0)
        Results(tmp_path / "results").keep(table[card, "float16", width, cap], result)
    assert program.main(["--table", "--output", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| | 64 | 80 | 96 | 128 | 192 | 256 | 512 |"
    row = "| sm_75, fp16 | own | 64 x 32 / own; 64 x 32 / 16 x 32 | plain; FAILED | ? | ? | ? | ? |"
    assert lines[2] == row
    assert len(lines) == 2 + 11 + 1 + 2 + 1 and lines[-1] == "148 of 154 cases have no result yet."


def test_a_case_that_fails_is_exit_1_and_what_it_said_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker runs here without a card, which it says in its last line."""
    monkeypatch.setattr(program, "build", lambda folder: folder)
    monkeypatch.setattr(program, "environment", lambda *args: {"OMP_NUM_THREADS": "1"})
    arguments = ["out-of-memory", "--only", "packed, a kernel", "--output", str(tmp_path)]
    assert program.main(arguments) == 1
    out = capsys.readouterr().out.splitlines()
    assert "FAILED" in out[1] and "Error" in out[1] and "log.txt" in out[1]
    assert out[2] == "1 cases, 1 failed; 0.0 minutes of CPU time"
    assert program.main(["--only", "nothing of the kind"]) == 2
    assert "--list shows them" in capsys.readouterr().err


def test_no_heavy_import_for_the_list() -> None:
    assert "rehearse_cuda.stepping" not in sys.modules
