"""The command line: errors are one message and exit code 2, never a traceback."""

from __future__ import annotations

import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import write_pairs

from lite_dil.backends import registry
from lite_dil.base.errors import UserError
from lite_dil.base.start import check_alone
from lite_dil.cli.main import main


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: COMMAND; see lite-dil --help"),
        (["trian"], "invalid choice: 'trian'"),
        (
            ["train", "--learning-rat", "1"],
            "unknown argument --learning-rat (did you mean '--learning-rate'?); see lite-dil train",
        ),
        (["train", "--learing-rate=1"], "(did you mean '--learning-rate'?)"),
        (["train", "--max-length"], "argument --max-length: expected one argument"),
        (["train", "--loss", "sfl"], "'sfl'"),
        (["train", "--config", "none.yaml"], "none.yaml: cannot be read"),
        (["train", "--resume", "none"], "--resume none: no checkpoint there"),
        (["train", "--model", "./none"], "--model ./none: no such folder, and not a hub id"),
        (["train", "--model", "none"], "--model none: no such folder, and not a hub id"),
        (["train", "--data", "x.jsonl", "--eval-steps", "5", "--eval-fraction", "0"], "--eval-steps needs held-out data"),
        (["demo", "--data", "x.jsonl"], "the demo is the embedded model on the embedded data; use lite-dil train"),
        (
            ["generate", "--output", "x", "--data", "y", "z"],
            "PROMPTS is named without a flag here, as in lite-dil generate prefs",
        ),
        (["chat", "--adapter", "x", "--data", "y"], "--data is of lite-dil train and changes nothing here"),
        (["train", "--backend", "tpu"], "is not one of auto, cuda, mlx, cpu"),
    ],
)
def test_user_errors(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("lite-dil: ")
    assert "Traceback" not in err


def test_bad_data_and_models_are_found_before_anything_is_written(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    good = str(write_pairs(tmp_path / "good.jsonl"))
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "empty").mkdir()
    (tmp_path / "no-weights").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "no-weights" / name).write_bytes((Path(tiny) / name).read_bytes())
    shutil.copytree(tiny, tmp_path / "mute", ignore=lambda _, names: [name for name in names if "tokenizer" in name])
    before = set(tmp_path.rglob("*"))
    for flags, message in (
        (["--model", "mute", "--data", good], "--model mute: the folder has no tokenizer; copy tokenizer.json and"),
        (["--model", tiny, "--data", "bad.jsonl"], "line 1: no field 'chosen'"),
        (["--model", tiny, "--data", good, "--eval-data", "none.jsonl"], "none.jsonl: no such file"),
        (["--model", "empty", "--data", good], "the folder has no config.json"),
        (["--model", good, "--data", good], "is a file; give the folder"),
        (["--model", "no-weights", "--data", good], "--model no-weights: cannot be loaded"),
        (["--model", "no-weights", "--data", good, "--backend", "mlx"], "no model*.safetensors"),
        (["--model", "no/such-model", "--data", good], "--model no/such-model: no such folder, not in the hub's cache here"),
        (["--model", tiny, "--data", good, "--init-adapter", "empty", "--reference", "base"], "no adapter_config.json there"),
        (["--model", tiny, "--data", good, "--output-dir", good], "--output-dir"),
    ):
        backend = [] if "--backend" in flags else ["--backend", "cpu"]
        assert main(["train", *flags, *backend]) == 2, flags
        captured = capsys.readouterr()
        assert message in captured.err, (flags, captured.err)
    assert set(tmp_path.rglob("*")) == before


def test_broken_checkpoints_are_refused(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, GPT2Config

    good = str(write_pairs(tmp_path / "good.jsonl"))
    for name in ("cut", "lacking", "gpt2"):
        shutil.copytree(tiny, tmp_path / name)
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    tensors = load_file(tmp_path / "lacking" / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "lacking" / "model.safetensors", {"format": "pt"})
    gpt2 = GPT2Config(vocab_size=512, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=2)
    AutoModelForCausalLM.from_config(gpt2).save_pretrained(tmp_path / "gpt2")
    for name, cpu, mlx in (
        ("cut", "cannot be loaded", "mlx-lm cannot load it"),
        ("lacking", "lack 1 of the model's weights, the first is model.layers.1.mlp.up_proj.weight", "mlx-lm cannot load it"),
        ("gpt2", "its decoder has no linear layers that LoRA can adapt", "mlx-lm cannot load it"),
    ):
        for backend, message in (("cpu", cpu), ("mlx", mlx)):
            assert main(["train", "--model", str(tmp_path / name), "--data", good, "--backend", backend]) == 2, (name, backend)
            assert message in capsys.readouterr().err, (name, backend)


@pytest.mark.parametrize("backend", ["cpu", "mlx"])
def test_broken_adapters_are_refused(tiny: str, tmp_path: Path, backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    good = str(write_pairs(tmp_path / "good.jsonl"))
    peft, mlx = '{"peft_type": "LORA", "r": 2, "lora_alpha": 4}', '{"lora_parameters": {"rank": 2, "scale": 2}}'
    for config, tensors, message in (
        ("[]", b"", "it is not a JSON object"),
        ("{", b"", "adapter_config.json cannot be read"),
        ('{"peft_type": "LORA"}', b"", "adapter_config.json: r is 'missing'; expected a whole number"),
        (peft, None, "no adapter_model.safetensors there"),
        (peft, b"not tensors at all", "adapter_model.safetensors: not a readable safetensors file"),
        (mlx, b"not tensors at all", "adapters.safetensors: not a readable safetensors file"),
    ):
        folder = tmp_path / "adapter"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "adapter_config.json").write_text(config)
        for name in ("adapter_model.safetensors", "adapters.safetensors") if tensors is not None else ():
            (folder / name).write_bytes(tensors or b"")
        flags = ["--model", tiny, "--data", good, "--backend", backend, "--init-adapter", str(folder), "--reference", "base"]
        assert main(["train", *flags]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "MLX_RANK"])
def test_several_processes_are_refused(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(name, "2")
    assert main(["train"]) == 2
    assert f"{name}=2" in capsys.readouterr().err


def test_what_launchers_say_of_their_processes(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts.json"
    hosts.write_text('[["127.0.0.1:5000"], ["127.0.0.1:5001"]]')
    for several in (
        {"WORLD_SIZE": "4", "RANK": "0"},
        {"PMI_SIZE": "2", "PMI_RANK": "0"},
        {"MLX_RANK": "1"},
        {"MLX_RANK": "0", "MLX_WORLD_SIZE": "2"},
        {"MLX_RANK": "0", "MLX_HOSTFILE": str(hosts)},
        {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"},
        {"SLURM_NTASKS": "2", "SLURM_PROCID": "1"},
    ):
        with pytest.raises(UserError, match="one process"):
            check_alone(several)
    hosts.write_text('[["127.0.0.1:5000"]]')
    for alone in (
        {},
        {"WORLD_SIZE": "1", "RANK": "0"},
        {"WORLD_SIZE": ""},
        {"MLX_RANK": "0", "MLX_HOSTFILE": str(hosts)},
        {"MLX_RANK": "0", "MLX_HOSTFILE": str(tmp_path / "none")},
        {"SLURM_NTASKS": "2", "SLURM_PROCID": "0"},  # a batch script
    ):
        check_alone(alone)


def test_adapters_that_do_not_fit_are_refused(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    good = str(write_pairs(tmp_path / "good.jsonl"))
    other = AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    )
    for name, settings, message in (
        ("narrow", {}, "is for 32 x 32 weights, the model's are 64 x 64"),
        ("dora", {"use_dora": True}, "use_dora = True is not supported"),
        ("bias", {"bias": "all"}, "bias = 'all' is not supported"),
        ("head", {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ("pissa", {"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' is not supported"),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = get_peft_model(other, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **settings))
            made.save_pretrained(tmp_path / name)
            other = made.unload()
        flags = ["--model", tiny, "--data", good, "--backend", "cpu", "--init-adapter", str(tmp_path / name)]
        assert main(["train", *flags, "--reference", "base"]) == 2
        assert message in capsys.readouterr().err


def test_a_backend_that_is_not_there_is_one_line_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--backend cuda: torch finds no CUDA GPU here; use --backend cpu"):
        registry.resolve("cuda")
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: None)
    for name in ("cpu", "cuda", "mlx"):
        with pytest.raises(UserError, match=rf'--backend {name}: .*not installed: pip install -e ".*\[{name}\]"'):
            registry.resolve(name)
    with pytest.raises(UserError, match="no backend is installed"):
        registry.resolve("auto")


@pytest.mark.parametrize(
    ("system", "machine", "cuda", "best"),
    [
        ("Darwin", "arm64", False, "mlx"),
        ("Linux", "x86_64", True, "cuda"),
        ("Linux", "x86_64", False, "cpu"),
        ("Darwin", "x86_64", False, "cpu"),
    ],
)
def test_auto_takes_the_best_backend(
    monkeypatch: pytest.MonkeyPatch, system: str, machine: str, cuda: bool, best: str
) -> None:
    monkeypatch.setattr(registry.platform, "system", lambda: system)
    monkeypatch.setattr(registry.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert registry.resolve("auto") == best


def test_a_closed_pipe_is_no_traceback() -> None:
    command = f"{sys.executable} -m lite_dil train --help | head -1"
    out = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert out.stdout.startswith("usage: lite-dil train")
    assert "Traceback" not in out.stderr
