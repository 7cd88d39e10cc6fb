"""`lite-dil plan`: numbers that a pencil can check, verdicts, and that nothing but config.json is read."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import config, write_pairs
from hub_server import Hub

from lite_dil.base.memory import GIB
from lite_dil.cli.main import main
from lite_dil.models.shape import ModelShape
from lite_dil.planning import fit
from lite_dil.planning.estimate import Load
from lite_dil.planning.memory import CUDA_CONTEXT
from lite_dil.planning.peak import estimate

LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}
SHAPE = ModelShape.of(LLAMA_8B)
# A layer: q and o of 4096 x 4096, k and v of 1024 x 4096, gate, up and down of 14336 x 4096.
LINEARS = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096)
TABLE = 128256 * 4096
NORMS = 32 * 2 * 4096 + 4096
ADAPTER = 32 * 16 * (2 * (4096 + 4096) + 2 * (1024 + 4096) + 3 * (14336 + 4096))


@pytest.fixture
def llama(tmp_path: Path) -> str:
    """A folder that holds the config.json of Llama-3.1-8B and nothing else."""
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text(json.dumps(LLAMA_8B))
    return str(tmp_path / "llama")


def planned(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, dict[str, Any]]:
    code = main(["plan", *flags, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_the_numbers_of_llama_8b(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", llama, "--backend", "cuda", "--memory", "24"]
    code, plan = planned(capsys, *flags, "--4bit")
    assert (code, plan["fits"], plan["remedy"]) == (0, True, None)
    assert plan["parameters"] == LINEARS + NORMS + 2 * TABLE == 8_030_261_248
    assert plan["download"] == 2 * 8_030_261_248
    parts = plan["components"]
    assert sum(parts.values()) == plan["total"]
    # NF4: half a byte a weight, a byte a block of 64 for its scale, and 4 bytes a 256 scales for theirs.
    assert parts["linears"] == pytest.approx(LINEARS * (1 / 2 + 1 / 64 + 4 / (64 * 256)), rel=1e-4)
    assert parts["embeddings"] == parts["head"] == 2 * TABLE
    assert (parts["adapter"], parts["gradients"]) == (4 * ADAPTER, 4 * ADAPTER)
    assert parts["reference"] == 0
    _, whole = planned(capsys, *flags)
    assert whole["components"]["linears"] == 2 * LINEARS
    assert plan["packed_share"] == LINEARS / plan["parameters"]
    assert whole["packed_share"] is None


def test_the_words_add_up(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", llama, "--4bit", "--backend", "cuda", "--memory", "12"]) == 0
    out = capsys.readouterr().out
    words = " ".join(out.split())
    assert re.search("8.03 billion parameters, 32 layers, width 4,096, vocabulary 128,256; .*4 bits", words)
    assert out.count("2^30") == 1
    *parts, total = map(float, re.findall(r"^  [a-z ]+? +([\d.]+) GB   ", out, re.MULTILINE))
    assert len(parts) == 9
    assert sum(parts) == pytest.approx(total, abs=0.005 * len(parts))
    assert "It fits" in out
    assert "Download: 15.0 GB" in out
    assert "Time: not known" in out
    assert all(len(line) <= 100 or llama in line for line in out.splitlines())


@pytest.mark.parametrize("flags", [(), ("--4bit",), ("--4bit", "--batch-size", "8", "--row-tokens", "16384")])
def test_verdicts_on_both_sides_of_the_boundary(
    llama: str, flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--model", llama, "--backend", "cuda", *flags)
    total = planned(capsys, *common, "--memory", "80")[1]["total"]
    enough = (total + CUDA_CONTEXT) / GIB
    assert planned(capsys, *common, "--memory", f"{enough + 1e-6:.9f}")[0] == 0
    code, plan = planned(capsys, *common, "--memory", f"{enough - 1e-6:.9f}")
    assert (code, plan["fits"]) == (1, False)
    assert main(["plan", *common, "--memory", f"{enough - 1e-6:.9f}"]) == 1
    assert "It does not fit" in capsys.readouterr().out


@pytest.mark.parametrize("memory", [4, 6, 6.5, 8, 12])
@pytest.mark.parametrize(
    "flags", [(), ("--4bit", "--batch-size", "8", "--row-tokens", "16384", "--gradient-checkpointing", "off")]
)
def test_what_is_suggested_suffices_and_no_part_of_it_is_needless(
    llama: str, memory: float, flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--model", llama, "--backend", "cuda", "--max-length", "2048", "--memory", str(memory)]
    code, plan = planned(capsys, *common, *flags)
    assert code == 1
    remedy = plan["remedy"]
    parts = [f"--{part}" for part in f" {remedy['flags']}".split(" --")[1:]]
    tried, again = planned(capsys, *common, *flags, *" ".join(parts).split())
    assert again["total"] == remedy["total"]
    assert (tried == 0) == remedy["fits"]
    if remedy["fits"]:
        for leave in parts:
            fewer = [word for part in parts if part != leave for word in part.split()]
            try_fewer = main(["plan", *common, *flags, *fewer])
            assert try_fewer != 0, leave  # 2 where the rest makes no sense without it


def test_the_computers_memory_is_limited_too(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    long = ["--model", llama, "--4bit", "--backend", "cuda", "--memory", "16", "--max-length", "20000"]
    offloads = ["--offload-activations", "--offload-embeddings", "--head-bits", "8"]
    code, free = planned(capsys, *long, *offloads)
    assert (code, free["fits"], free["computer_memory_usable"]) == (0, True, None)
    # Of 32 layers a row of 40,064 tokens of 4,096 bfloat16, in chunks of 32 MiB; the table; half an optimiser; the process.
    inputs = -(-32 * 40064 * 4096 * 2 // 2**25) * 2**25
    parts = free["computer_memory_components"]
    assert parts == {
        "the process": 2 * GIB,
        "embeddings": 2 * TABLE,
        "activations": inputs,
        "paged optimiser": 2 * 32 * 16 * 14336 * 3,
        "loading": 0,
    }
    assert free["computer_memory"] == sum(parts.values())
    enough = free["computer_memory"] / GIB + 1  # for the computer's system
    assert planned(capsys, *long, *offloads, "--host-memory", f"{enough + 1e-6:.9f}")[0] == 0
    code, short = planned(capsys, *long, *offloads, "--host-memory", "12.7")
    assert (code, short["fits"], short["computer_memory_usable"]) == (1, False, int(12.7 * GIB) - GIB)
    again, _ = planned(capsys, *long, *offloads, "--host-memory", "12.7", *short["remedy"]["flags"].split())
    assert short["remedy"]["fits"] and again == 0 and "--no-offload" in short["remedy"]["flags"]
    assert main(["plan", *long, *offloads, "--host-memory", "12.7"]) == 1
    words = " ".join(capsys.readouterr().out.split())
    assert "It does not fit: 1.1 GB of the computer's own memory are missing." in words
    assert "12.8 of 11.7 GB of the computer's own memory: 2.0 the process, 1.0 embeddings, 9.8 activations" in words
    assert main(["plan", *long[:-1], "40000", *offloads, "--host-memory", "12.7"]) == 1
    words = " ".join(capsys.readouterr().out.split())
    assert re.search(r"fit: [\d.]+ GB and [\d.]+ GB of the computer's own memory are missing", words)


def test_the_mildest_remedies_come_first(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--model", llama, "--backend", "cuda", "--4bit", "--max-length", "2048", "--gradient-checkpointing", "off"]
    found = [planned(capsys, *common, "--memory", str(memory))[1]["remedy"] for memory in (16, 12, 7)]
    assert found[0]["flags"] == "--gradient-checkpointing selective"
    assert found[1]["flags"] == "--gradient-checkpointing full"
    assert "--offload" in found[2]["flags"] and "--max-length" not in found[2]["flags"]


def test_what_has_room_has_room(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, plan = planned(capsys, "--model", llama, "--4bit", "--backend", "cuda", "--memory", "12")
    assert [room["name"] for room in plan["room"]] == ["this memory", "8 GB", "12 GB", "16 GB", "24 GB"]
    assert plan["room"][0] == plan["room"][2] | {"name": "this memory"}
    asked = config(load_in_4bit=True, batch_size=1, backend="cuda", data="x.jsonl")

    def total(length: int, pairs: int) -> int:
        load = Load((1,) * pairs, ((length - 1, length - 1),) * pairs)
        return estimate(asked, SHAPE, "cuda", "bfloat16", load).total

    for room in plan["room"]:
        assert room["longest"] % fit.LENGTHS == 0
        assert total(room["longest"], 1) <= room["usable"]
        assert total(1024, room["examples"]) <= room["usable"] < total(1024, room["examples"] + 1)
        assert (room["longest_auto"], room["examples_auto"]) >= (room["longest"], room["examples"])
    assert [room["longest"] for room in plan["room"][1:]] == sorted(room["longest"] for room in plan["room"][1:])


def test_a_file_of_data_gives_the_time_of_an_epoch(llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(write_pairs(tmp_path / "pairs.jsonl", 12))
    common = ["--model", llama, "--4bit", "--backend", "cuda", "--memory", "24"]
    # 12 pairs, two answers each with its prompt of at most 512 tokens together, at 100 tokens per second.
    epoch = planned(capsys, *common, "--data", data, "--max-length", "512", "--tokens-per-second", "100")[1]["epoch"]
    assert (epoch["examples"], epoch["seconds"], epoch["at_most"]) == (12, 12 * 2 * 512 / 100, True)
    run = tmp_path / "run"
    run.mkdir()
    lines = [{"step": i, "tokens_per_second": t, "examples_per_second": t / 200} for i, t in enumerate((10.0, 100.0, 120.0))]
    (run / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in [*lines, {"step": 3, "eval_loss": 1.0}]))
    epoch = planned(capsys, *common, "--data", data, "--like", str(run))[1]["epoch"]
    assert (epoch["examples"], epoch["seconds"], epoch["at_most"]) == (12, 12 / 0.5, False)
    epoch = planned(capsys, *common, "--tokens-per-second", "100")[1]["epoch"]
    assert (epoch["examples"], epoch["seconds"]) == (None, None)  # the default data is not the user's


def test_single_answers_are_half_of_pairs(llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "a", "completion": "b", "label": label} for label in (True, False, True)]
    (tmp_path / "kto.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["--model", llama, "--4bit", "--backend", "cuda", "--memory", "24", "--row-tokens", "4096", "--loss", "kto"]
    _, pairs = planned(capsys, *common)
    _, single = planned(capsys, *common, "--data", str(tmp_path / "kto.jsonl"))
    assert single["epoch"]["examples"] == 3
    ratio = single["components"]["activations"] / pairs["components"]["activations"]
    assert ratio == pytest.approx(1 / 2, abs=0.02)


def test_an_initial_adapter_brings_its_rank(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(write_pairs(tmp_path / "pairs.jsonl"))
    first = ["--model", tiny, "--backend", "cpu", "--data", data, "--lora-r", "4", "--target-modules", "q_proj,down_proj"]
    assert main(["train", *first, "--max-steps", "1", "--report-samples", "0", "--output-dir", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    adapter = ["--init-adapter", str(tmp_path / "run" / "adapter"), "--reference", "initial-adapter"]
    parts = planned(capsys, "--model", tiny, "--backend", "cpu", "--memory", "8", *adapter)[1]["components"]
    assert parts["adapter"] == parts["reference"] == 4 * 2 * 4 * ((64 + 64) + (64 + 128))


def test_nothing_but_config_json_is_read_and_no_array_library_is_needed(llama: str) -> None:
    for name in ("model.safetensors", "tokenizer.json"):
        (Path(llama) / name).write_text("not what it seems")
    code = f"""
import os, sys
sys.modules.update(dict.fromkeys(("torch", "mlx", "mlx_lm", "transformers", "peft")))
opened = set()
sys.addaudithook(lambda event, args: event == "open" and opened.add(str(args[0])))
from lite_dil.cli.main import main
assert main(["plan", "--model", {llama!r}, "--4bit", "--memory", "12"]) == 0
print(sorted(os.path.basename(name) for name in opened if name.startswith({llama!r})))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert out.stdout.splitlines()[-1] == "['config.json']"
    assert "Planned for cuda" in out.stdout
    assert "Download: none" in out.stdout


@pytest.fixture
def hub(llama: str) -> Iterator[tuple[str, list[str]]]:
    """A hub with one model, and the paths that it is asked for."""
    (Path(llama) / "model.safetensors").write_text("weights")
    asked: list[str] = []

    class Listening(Hub):
        def _answer(self, path: str) -> None:
            asked.append(path)
            super()._answer(path)

    Listening.repositories = {"models/owner/llama": Path(llama)}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Listening)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", asked
    server.shutdown()
    server.server_close()


def test_of_a_hub_id_config_json_alone_is_fetched(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    endpoint, asked = hub
    env = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}

    def plan(model: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lite_dil", "plan", "--model", model, "--4bit", "--memory", "12"]
        return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)

    out = plan("owner/llama")
    assert (out.returncode, out.stderr) == (0, "")
    assert "8.03 billion" in out.stdout
    assert {path.rpartition("/")[2] for path in asked} == {"", "config.json"}  # the first asks whether it is there at all
    out = plan("owner/none")
    assert out.returncode == 2
    assert "--model owner/none: the hub has no such model" in out.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--memory", "lots"), "argument --memory: 'lots' is not a number above 0"),
        (("--memory", "0"), "argument --memory: '0' is not a number above 0"),
        (("--memory", "8", "--host-memory", "0"), "argument --host-memory: '0' is not a number above 0"),
        (("--memory", "8", "--tokens-per-second", "-1"), "'-1' is not a number above 0"),
        (("--memory", "8", "--like", "none"), "--like none: metrics.jsonl cannot be read"),
        (("--memory", "8", "--like", "none", "--tokens-per-second", "3"), "not allowed with argument"),
        (("--memory", "8", "--data", "none.jsonl"), "none.jsonl: no such file"),
        (("--memory", "8", "--max-length", "1"), "--max-length is 1; expected at least 2"),
        (("--memry", "8"), "unknown argument --memry (did you mean '--memory'?)"),
        (("--memory", "8", "--model", "./none"), "--model ./none: no such folder"),
        (("--memory", "8", "--unsloth"), "--unsloth"),
        (("--resume",), "--resume is of lite-dil train"),
    ],
)
def test_wrong_input(llama: str, flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = flags if "--model" in flags else ("--model", llama, *flags)
    assert main(["plan", "--backend", "cuda", *given]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("backend", "flags", "message"),
    [
        ("mlx", ("--offload-activations",), "--offload-activations is for the cuda backend"),
        ("mlx", ("--optim", "paged_adamw_8bit"), "--optim paged_adamw_8bit is for the cuda and cpu backends"),
        ("mlx", ("--layout", "packed", "--no-fused-layers"), "these options cannot be used with mlx"),
        ("mlx", ("--unsloth",), "plan does not know what the layers of --unsloth keep"),
        ("cuda", ("--compile",), "--compile is for the mlx backend; leave it out with cuda"),
        ("cpu", ("--host-memory", "8"), "--host-memory is for an NVIDIA GPU"),
        ("cpu", ("--offload-embeddings",), "--offload-embeddings is for the cuda backend"),
    ],
)
def test_options_that_a_backend_has_not(
    llama: str, backend: str, flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--model", llama, "--memory", "16", "--backend", backend, *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_config_that_is_no_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.json"
    for text, message in (
        ("{", "config.json cannot be read"),
        ("[]", "it is not a JSON object"),
        ('{"model_type": "nobody_knows"}', "cannot be planned"),
    ):
        path.write_text(text)
        assert main(["plan", "--model", str(path), "--memory", "8"]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("extra", [(), ("--auto",)])
def test_the_embedded_model_is_planned_without_being_there(
    extra: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LITE_DIL_CACHE", str(tmp_path))
    code, plan = planned(capsys, "--backend", "cpu", "--memory", "8", *extra)
    assert (code, plan["parameters"], plan["download"]) == (0, 134_515_008, None)
    assert plan["total"] < 3 * GIB
