"""--auto: what it chooses fits, never gets slower with more memory, and changes no result."""

from __future__ import annotations

import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import config, examples, write_pairs
from safetensors.numpy import load_file
from test_plan import SHAPE

from lite_dil.base.errors import UserError
from lite_dil.base.memory import GIB, Memory
from lite_dil.batching.batch import Batch
from lite_dil.batching.schedule import LargestPass, Schedule, batch_tokens, computed_tokens
from lite_dil.cli.main import main
from lite_dil.config.train_config import TrainConfig
from lite_dil.models.shape import read_shape
from lite_dil.planning import auto
from lite_dil.planning.auto import choose, largest_example
from lite_dil.planning.estimate import Load
from lite_dil.planning.fit import Model, memory_line, several
from lite_dil.planning.peak import estimate

ASKED = config(load_in_4bit=True, backend="cuda", data="x.jsonl", batch_size=4, gradient_accumulation_steps=4)
MODES = ["off", "selective", "full"]


def pair(length: int = 1024) -> Load:
    """A pair whose answers are of `length` tokens with their prompt of one."""
    return Load((1,), ((length - 1, length - 1),))


def chosen(
    memory: float,
    asked: TrainConfig = ASKED,
    load: Load | None = None,
    given: tuple[str, ...] = (),
    host: float = math.inf,
) -> TrainConfig:
    return choose(asked, SHAPE, "cuda", "bfloat16", Memory(int(memory * GIB), "", host * GIB), load or pair(), set(given))


def total(config: TrainConfig, length: int = 1024) -> int:
    """The estimate of the largest pass that the config allows, of pairs of `length` tokens."""
    count = min(config.batch_size, max(1, (config.row_tokens or 0) // (2 * length - 1)))
    return estimate(config, SHAPE, "cuda", "bfloat16", several(pair(length), count)).total


@pytest.mark.parametrize("length", [128, 1024, 3000])
def test_what_is_chosen_fits_and_never_gets_slower_with_more_memory(length: int) -> None:
    before: tuple[int, int, int] | None = None
    seen = set()
    for memory in np.arange(4, 81, 0.5):
        try:
            found = chosen(memory, load=pair(length))
        except UserError:
            assert before is None, f"{memory} GB hold less than fewer did"
            continue
        assert total(found, length) <= memory * GIB
        assert found.batch_size * found.gradient_accumulation_steps == 16
        changed = {n for n, v in found.as_dict().items() if v != getattr(ASKED, n)}
        assert changed <= set(auto.TUNABLE)
        slowness = (MODES.index(found.gradient_checkpointing), found.offload_embeddings + 2 * found.offload_activations)
        rank = (*slowness, -int(found.row_tokens or 0))
        assert before is None or rank <= before, memory
        before = rank
        seen.add(slowness)
    assert before is not None and before[:2] == (0, 0)  # in 80 GB nothing is computed again
    assert len(seen) >= 4


def test_a_faster_setting_would_not_have_fitted() -> None:
    for memory in (7, 8, 12, 16, 24):
        found = chosen(memory)
        rank = MODES.index(found.gradient_checkpointing)
        for faster in MODES[:rank]:
            tried = replace(found, gradient_checkpointing=faster, offload_activations=False, offload_embeddings=False)
            assert total(replace(tried, row_tokens=2 * 1024)) > memory * GIB


def test_passes_grow_where_there_is_room() -> None:
    short = pair(100)
    small, large = chosen(12, load=short), chosen(80, load=short)
    assert auto.ENOUGH_GPU * 0.9 <= (small.row_tokens or 0) <= (large.row_tokens or 0) <= auto.MOST_GPU
    assert (chosen(16, load=short).row_tokens or 0) < (large.row_tokens or 0) == 16 * 199
    one = replace(ASKED, batch_size=1, gradient_accumulation_steps=1)
    assert chosen(80, one, short).row_tokens == 199  # there is no more to a step


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": "full"},
        {"gradient_checkpointing": "off"},
        {"row_tokens": 6000},
        {"batch_size": 2},
        {"gradient_accumulation_steps": 8},
        {"offload_embeddings": True},
        {"offload_activations": True},
        {"offload_activations": False, "offload_embeddings": False},
    ],
)
@pytest.mark.parametrize("memory", [10, 80])
def test_what_is_given_stays(options: dict[str, object], memory: float) -> None:
    asked = replace(ASKED, **options)  # type: ignore[arg-type]
    if memory == 10 and options.get("gradient_checkpointing") == "off":
        with pytest.raises(UserError, match=r"\(--gradient-checkpointing .*fit: --gradient-checkpointing selective"):
            chosen(memory, asked, given=tuple(options))
        return
    found = chosen(memory, asked, given=tuple(options))
    assert {name: getattr(found, name) for name in options} == options
    assert found.batch_size * found.gradient_accumulation_steps == asked.batch_size * asked.gradient_accumulation_steps
    assert total(found) <= memory * GIB
    if options.get("offload_activations"):
        assert found.gradient_checkpointing == "full"


def test_where_nothing_fits_it_says_what_would() -> None:
    plain = replace(ASKED, load_in_4bit=False)
    with pytest.raises(UserError, match=r"--auto: at least 1\d\.\d GB are needed, and 8\.0 GB are free.*would fit: --4bit \("):
        chosen(8, plain)
    with pytest.raises(UserError, match=r"--auto: at least .*would fit: .*--max-length \d+ \(") as caught:
        chosen(6.5, load=pair(8192), asked=replace(ASKED, max_length=8192, head_bits=8))
    length = int(re.search(r"--max-length (\d+)", str(caught.value)).group(1))  # type: ignore[union-attr]
    shorter = replace(ASKED, max_length=length, head_bits=8)
    assert chosen(6.5, shorter, pair(length)).row_tokens == 2 * length - 1
    with pytest.raises(UserError, match=r"No setting.*smaller model"):
        chosen(2)


def test_no_more_goes_into_the_computer_than_it_holds() -> None:
    """Of 20,000 tokens an answer 9.8 GB of activations are offloaded, of the table 1 GB; the process takes 2."""
    asked, load = replace(ASKED, head_bits=8, max_length=20000), pair(20000)
    both = chosen(11.2, asked, load)
    assert both.offload_activations and both.offload_embeddings
    one = chosen(15.4, asked, load, host=12.5)
    assert one.offload_activations and not one.offload_embeddings
    for memory, host, short in (
        (11.2, 12.5, "GB are needed, and 11.2 GB are free"),
        (23.4, 2.5, "GB of the computer's own memory are needed, and 2.5 GB are free"),
    ):
        with pytest.raises(UserError, match=short):
            chosen(memory, asked, load, host=host)
    given = {"offload_activations": True, "offload_embeddings": True}
    with pytest.raises(UserError, match=r"12\.\d GB of the computer's own memory are needed, and 9\.0 GB are free") as caught:
        chosen(30, replace(asked, **given), load, tuple(given), host=9)
    assert "What would fit: --no-offload-activations" in str(caught.value)


def test_on_a_cpu_passes_stay_small_and_nothing_is_offloaded() -> None:
    asked = replace(ASKED, backend="cpu", load_in_4bit=False)
    for memory in (18, 24, 64):
        found = choose(asked, SHAPE, "cpu", "bfloat16", Memory(memory * GIB, ""), pair(100))
        assert (found.row_tokens or 0) <= auto.ENOUGH["cpu"]
        assert not (found.offload_embeddings or found.offload_activations)


@pytest.mark.parametrize("layout", ["packed", "plain", "prefix"])
def test_the_largest_example_is_as_large_as_any(layout: str) -> None:
    data = examples(20)
    load = largest_example(data, config(), layout)
    assert max(computed_tokens([e], layout) for e in data) <= load.tokens(layout if layout != "prefix" else "plain")
    assert load.answer_tokens == max(sum(map(len, e.responses)) for e in data)


def test_drawn_answers_count_at_their_longest() -> None:
    asked = config(sample_rejected=3, sample_max_tokens=100, data="x.jsonl", max_length=64)
    load = largest_example([replace(e, responses=e.responses[:1], signs=(1,)) for e in examples(5)], asked, "packed")
    assert len(load.responses[0]) == 4
    assert load.longest == 64


def test_the_largest_pass_is_that_of_the_whole_run() -> None:
    asked, data = config(batch_size=3, gradient_accumulation_steps=2, max_length=24, data="x.jsonl"), examples(30)
    for layout in ("packed", "plain"):
        largest, schedule = LargestPass(layout), Schedule(asked, data, layout)
        assert largest.batch is None
        for step in range(1, schedule.steps + 1):
            largest.add(schedule.batches(step))
        taken = [Load.of(batch) for step in range(1, schedule.steps + 1) for batch in schedule.batches(step)]
        assert largest.batch is not None
        assert Load.of(largest.batch) == max(taken, key=lambda load: (load.tokens(layout), load.answer_tokens))


@pytest.fixture
def flags(tiny: str, tmp_path: Path) -> list[str]:
    """12 pairs in 6 steps of 4."""
    data = str(write_pairs(tmp_path / "pairs.jsonl"))
    return [
        "--model", tiny, "--backend", "cpu", "--data", data, "--dtype", "float32", "--learning-rate", "1e-3", "--lora-r", "4",
        "--epochs", "2", "--max-length", "64", "--report-samples", "0",
    ]  # fmt: skip


def train(flags: list[str], folder: Path, *more: str) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    """Return the adapter and the options of a run."""
    assert main(["train", *flags, "--output-dir", str(folder), *more]) == 0
    options = yaml.safe_load((folder / "config.yaml").read_text())
    return load_file(folder / "adapter" / "adapter_model.safetensors"), options


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_allclose(value, other[name], atol=2e-5, err_msg=name)


def test_the_result_is_that_of_the_run_without_it(
    flags: list[str], tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, _ = train(flags, tmp_path / "plain")
    capsys.readouterr()
    loads: list[Load] = []
    monkeypatch.setattr(auto, "largest_example", lambda *args: loads.append(largest_example(*args)) or loads[-1])
    roomy, options = train(flags, tmp_path / "roomy", "--auto")
    assert "--auto: nothing recomputed, passes of up to" in capsys.readouterr().out
    assert (options["batch_size"], options["gradient_accumulation_steps"]) == (4, 1)
    assert options["gradient_checkpointing"] == "off"
    same(roomy, plain)

    # As little memory as one example in full checkpointing needs.
    asked = config(lora_r=4, max_length=64, backend="cpu", gradient_checkpointing="full", data="x.jsonl")
    least = Model(read_shape(tiny), "cpu", "float32").total(asked, loads[0])
    monkeypatch.setattr(auto, "memory_here", lambda backend: Memory(least, "a little"))
    tight, options = train(flags, tmp_path / "tight", "--auto")
    assert "--auto: full checkpointing, passes of up to" in capsys.readouterr().out
    assert options["gradient_checkpointing"] == "full"
    same(tight, plain)

    monkeypatch.setattr(auto, "memory_here", lambda backend: Memory(10000, "next to nothing"))
    assert main(["train", *flags, "--auto", "--output-dir", str(tmp_path / "none")]) == 2
    assert "--auto: at least" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_flags_win_and_a_files_defaults_do_not(flags: list[str], tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("auto: true\nbatch_size: 2\ngradient_checkpointing: selective\nrow_tokens: null\n")
    _, options = train(flags, tmp_path / "a", "--config", str(tmp_path / "c.yaml"), "--max-steps", "1")
    assert options["gradient_checkpointing"] == "selective"
    assert options["row_tokens"] is not None
    assert options["batch_size"] == 4  # 2 is the default, whoever writes it
    more = ["--auto", "--gradient-checkpointing", "full", "--batch-size", "2", "--row-tokens", "100", "--max-steps", "1"]
    _, options = train(flags, tmp_path / "b", *more)
    asked = {"gradient_checkpointing": "full", "batch_size": 2, "gradient_accumulation_steps": 2, "row_tokens": 100}
    assert {name: options[name] for name in asked} == asked


def test_a_resumed_run_may_split_its_steps_otherwise(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, _ = train(flags, tmp_path / "run", "--save-steps", "3")
    run = tmp_path / "run"
    shutil.rmtree(run / "checkpoints" / "step-6")
    shutil.rmtree(run / "adapter")
    capsys.readouterr()
    assert main(["train", "--resume", str(run), "--batch-size", "4"]) == 2
    message = "--batch-size x --gradient-accumulation-steps makes steps of 8 examples, but the run has steps of 4"
    assert message in capsys.readouterr().err
    assert main(["train", "--resume", str(run), "--batch-size", "4", "--gradient-accumulation-steps", "1", "--auto"]) == 0
    same(load_file(run / "adapter" / "adapter_model.safetensors"), whole)
    assert "step 3 of 6" in capsys.readouterr().out


def test_the_estimate_stands_beside_the_peak_at_the_end(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(flags, tmp_path / "cpu", "--max-steps", "1")
    number = r"\d+\.\d+ GB"
    line = rf"^memory: {number} of tensors estimated, the whole process took {number} at its peak, {number} before the model"
    assert re.search(line, capsys.readouterr().out, re.MULTILINE)
    mlx = ["mlx" if flag == "cpu" else flag for flag in flags]
    assert main(["train", *mlx, "--max-steps", "1", "--output-dir", str(tmp_path / "mlx")]) == 0
    assert re.search(rf"^memory: ({number} estimated, )?{number} peak$", capsys.readouterr().out, re.MULTILINE)


def test_what_the_line_says(tiny: str, tmp_path: Path) -> None:
    asked = config(lora_r=4, backend="cuda", dtype="float32", layout="packed", data="x.jsonl")
    load = Load.of(Batch.of(examples(2)))
    expected = Model(read_shape(tiny), "cuda", "float32").total(asked, load)
    assert memory_line(asked, tiny, load, 3 * GIB, GIB) == f"memory: {expected / GIB:.2f} GB estimated, 3.0 GB peak"
    (tmp_path / "config.json").write_text('{"model_type": "nobody_knows"}')
    assert memory_line(asked, str(tmp_path), load, 3 * GIB, GIB) == "memory: 3.0 GB peak"
    strange = replace(asked, dtype="float8")  # any failure of the estimate is said, and ends no training
    assert memory_line(strange, tiny, load, 3 * GIB, GIB) == "memory: 3.0 GB peak (no estimate: 'float8')"


@pytest.mark.parametrize("layout", ["plain", "packed", "prefix"])
def test_a_load_counts_tokens_as_passes_are_planned(layout: str) -> None:
    data = examples(7)
    assert Load.of(Batch.of(data)).tokens(layout) == computed_tokens(data, layout) == batch_tokens(Batch.of(data), layout)
