"""The other libraries in scripts/benchmark.py, each driven through its own trainer on the same tokens.

None of them is a requirement of lite-dil: each is imported in its own function, in a separate process.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

from benchmark_cases import Job, read_config
from benchmark_models import text_of, word_tokenizer
from benchmark_worker import Meter, sixteen_bit

from lite_dil.data.encoder import Example

Steps = Sequence[Sequence[Example]]


def trl(job: Job, steps: Steps, meter: Meter) -> dict[str, Any]:
    """Drive TRL's DPOTrainer.

    `trl`: its defaults (bf16 autocast over float32 weights, gradient checkpointing, all positions through the head, reference
    computed in each step), except for the batch, the adapter and no limit on the length.
    `trl-best`: the weights in 16 bits, the reference precomputed, the head on response positions only (which TRL does on a
    GPU; on a CPU one of its functions is overridden), Liger's kernels on a GPU, checkpointing by the job.
    `trl-sorted`: the same, with the pairs in order of length, as its sampling strategy group_by_length would give.
    """
    import torch
    import trl.trainer.utils
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig
    from trl import DPOConfig, DPOTrainer

    best = job.contestant != "trl"
    dtype = sixteen_bit(job.device)
    options: dict[str, Any] = {"gradient_checkpointing": job.checkpointing != "off"}
    extra: dict[str, Any] = {}
    if best or dtype == "float16":  # its default, bfloat16, fails on GPUs without it
        options |= {"bf16": dtype == "bfloat16", "fp16": dtype == "float16"}
    if best:
        options["precompute_ref_log_probs"] = True
        options["model_init_kwargs"] = {"dtype": dtype}
        options["use_liger_kernel"] = job.device == "cuda" and _installed("liger_kernel")
        if hasattr(trl.trainer.utils, "_use_triton"):
            trl.trainer.utils._use_triton = lambda device: True  # used only to decide whether to skip the prompt's positions
    if job.bits == 4:
        extra["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )
    if read_config(job.model).get("quantization_config"):
        extra = {}  # set by the checkpoint itself
    if job.contestant == "trl-sorted":
        steps = _sorted(job, steps, meter)
    adapter = LoraConfig(r=job.rank, lora_alpha=2 * job.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with _training_arguments(DPOConfig, job, steps, options) as args:
        before = time.perf_counter()
        trainer = DPOTrainer(
            model=job.model,
            args=args,
            train_dataset=_dataset(steps),
            processing_class=word_tokenizer(read_config(job.model)["vocab_size"]),
            peft_config=adapter,
            callbacks=[_stamps(meter)],
            **extra,
        )
        _repack_never(trainer.model)
        prepared = time.perf_counter() - before
        _check_lengths(trainer.train_dataset, steps)
        trainer.train()
    settings = "autocast over 16-bit weights, precomputed reference" if best else "defaults"
    return {"description": f"trl {version('trl')}, {settings}", "prepare_seconds": prepared}


def unsloth(job: Job, steps: Steps, meter: Meter) -> dict[str, Any]:
    """Drive Unsloth's DPO: its model and its version of TRL's DPOTrainer; `unsloth-best` fuses head and loss."""
    best = job.contestant == "unsloth-best"
    if best:
        os.environ["UNSLOTH_FUSED_PREFERENCE_LOSS"] = "1"
    from unsloth import FastLanguageModel  # isort: skip  # first: importing it changes transformers and TRL
    from trl import DPOConfig, DPOTrainer  # isort: skip

    model, _ = FastLanguageModel.from_pretrained(
        job.model, max_seq_length=max(sum(lengths) for lengths in job.lengths), load_in_4bit=job.bits == 4, dtype=None
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=job.rank,
        lora_alpha=2 * job.rank,
        lora_dropout=0,
        bias="none",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        use_gradient_checkpointing=False if job.checkpointing == "off" else "unsloth",
    )
    tokenizer = word_tokenizer(read_config(job.model)["vocab_size"])
    dtype = sixteen_bit(job.device)
    options = {"precompute_ref_log_probs": best, "bf16": dtype == "bfloat16", "fp16": dtype == "float16"}
    with _training_arguments(DPOConfig, job, steps, options) as args:
        trainer = DPOTrainer(
            model=model,
            ref_model=None,
            args=args,
            train_dataset=_dataset(steps),
            processing_class=tokenizer,
            callbacks=[_stamps(meter)],
        )
        _check_lengths(trainer.train_dataset, steps)
        trainer.train()
    return {"description": f"unsloth {version('unsloth')}, trl {version('trl')}"}


def mlx_lm_lora(job: Job, steps: Steps, meter: Meter) -> dict[str, Any]:
    """Drive mlx-lm-lora's train_dpo: its model loading, second model as the reference, batches, loss, step and Adam."""
    import mlx.core as mx
    import mlx.optimizers as optimizers
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm.utils import load
    from mlx_lm_lora.trainer import dpo_trainer
    from mlx_lm_lora.utils import from_pretrained

    if not mx.metal.is_available():  # it reads the GPU's working set
        mx.device_info = lambda: {"max_recommended_working_set_size": 0}
        mx.set_wired_limit = lambda limit: 0

    class Stamps(TrainingCallback):
        def on_train_loss_report(self, train_info: dict) -> None:
            meter.end()

    rows = [_mlx_row(example) for step in _timed_once(job, steps, meter) for example in step]
    longest = max(len(row[side]) for row in rows for side in ("chosen", "rejected"))
    # Its own batches (pairs sorted by the chosen response's length), each once per round instead of drawn with replacement.
    trainer: Any = dpo_trainer
    own = list(trainer.iterate_dpo_batches(rows, job.batch, longest, train=False))
    assert len(own) * job.batch == len(rows)
    order = iter([*own, *own * job.rounds] if job.warmup == "full" else [own[0], *own * job.rounds])

    def batches(**_: Any) -> Iterator[Any]:
        batch = next(order)
        meter.begin()
        yield batch

    trainer.iterate_dpo_batches = batches
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        loaded: Any = from_pretrained(
            model=job.model,
            new_adapter_path=folder,
            lora_config={"rank": job.rank, "scale": 2.0, "dropout": 0.0, "use_dora": False, "num_layers": -1},
        )
        reference = load(job.model)[0].freeze()
        dpo_trainer.train_dpo(
            model=loaded[0],
            ref_model=reference,
            optimizer=optimizers.Adam(learning_rate=1e-5),
            train_dataset=rows,
            args=dpo_trainer.DPOTrainingArgs(
                batch_size=job.batch,
                iters=len(steps),
                steps_per_report=1,
                steps_per_save=10**9,
                max_seq_length=longest,
                adapter_file=str(loaded[2]),
                grad_checkpoint=job.checkpointing != "off",
            ),
            training_callback=Stamps(),
        )
    return {"description": f"mlx-lm-lora {version('mlx-lm-lora')}, second model in memory"}


def two_models(job: Job, steps: Steps, meter: Meter) -> dict[str, Any]:
    """Train as a textbook would on MLX: padded rows, whole logits, a second model in memory for the reference."""
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optimizers
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load

    from lite_dil.batching.batch import Batch
    from lite_dil.batching.layouts import plain

    model, reference = load(job.model)[0], load(job.model)[0].freeze()
    model.freeze()
    linear_to_lora_layers(model, -1, {"rank": job.rank, "scale": 2.0, "dropout": 0.0})
    if job.checkpointing != "off":
        from mlx_lm.tuner.trainer import grad_checkpoint

        grad_checkpoint(model.layers[0])
    optimizer = optimizers.Adam(learning_rate=1e-5)

    def sums(which: Any, layout: Any) -> Any:
        logits = which(mx.array(layout.input_ids)).astype(mx.float32)
        picked = logits.reshape(-1, logits.shape[-1])[mx.array(layout.hidden_index)]
        logps = -nn.losses.cross_entropy(picked, mx.array(layout.targets))
        return (logps[mx.array(layout.token_index)] * mx.array(layout.token_mask)).sum(-1)

    def loss(layout: Any) -> Any:
        f = sums(model, layout) - mx.stop_gradient(sums(reference, layout))
        return -nn.log_sigmoid(0.1 * (f[0::2] - f[1::2])).mean()

    gradient = nn.value_and_grad(model, loss)
    for step in steps:
        layout = plain(Batch.of(step))
        meter.begin()
        value, grads = gradient(layout)
        optimizer.update(model, grads)
        mx.eval(value, model.trainable_parameters(), optimizer.state)
        meter.end()
    return {"description": f"mlx-lm {version('mlx-lm')}, second model in memory"}


def unsloth_mlx(job: Job, steps: Steps, meter: Meter) -> dict[str, Any]:
    """Drive Unsloth's MLX DPO, which runs only on a Mac."""
    from unsloth_zoo.mlx.loader import FastMLXModel
    from unsloth_zoo.mlx.trainer import MLXDPOConfig, MLXDPOTrainer

    longest = max(sum(lengths) for lengths in job.lengths)
    model, _ = FastMLXModel.from_pretrained(job.model, max_seq_length=longest, load_in_4bit=job.bits == 4)
    checkpointing = False if job.checkpointing == "off" else "mlx"
    model = FastMLXModel.get_peft_model(
        model, r=job.rank, lora_alpha=2 * job.rank, use_gradient_checkpointing=checkpointing, max_seq_length=longest
    )
    with tempfile.TemporaryDirectory() as folder:
        args = MLXDPOConfig(
            output_dir=folder,
            per_device_train_batch_size=job.batch,
            gradient_accumulation_steps=1,
            max_steps=len(steps),
            max_length=longest,
            max_prompt_length=longest,
        )
        tokenizer = word_tokenizer(read_config(job.model)["vocab_size"])
        rows = _rows(steps)
        MLXDPOTrainer(model=model, tokenizer=tokenizer, train_dataset=rows, args=args, callbacks=[_stamps(meter)]).train()
    return {"description": f"unsloth {version('unsloth')}"}


@contextlib.contextmanager
def _training_arguments(kind: Any, job: Job, steps: Steps, options: dict[str, Any]) -> Iterator[Any]:
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "output_dir": folder,
            "per_device_train_batch_size": job.batch,
            "gradient_accumulation_steps": 1,
            "max_steps": len(steps),
            "max_length": max(prompt + max(answers) for prompt, *answers in job.lengths),
            "train_sampling_strategy": "sequential",  # the same pairs in each step for all contestants
            "report_to": "none",
            "save_strategy": "no",
            "logging_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": job.device == "cpu",
            "dataloader_pin_memory": job.device == "cuda",
            **options,
        }
        known = inspect.signature(kind.__init__).parameters
        yield kind(**{name: value for name, value in options.items() if name in known})


def _stamps(meter: Meter) -> Any:
    class Stamps:
        """Calls the meter, and ignores all other trainer events."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            meter.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            meter.end()

        def __getattr__(self, name: str) -> Any:
            if name.startswith("on_"):
                return lambda *_, **__: None
            raise AttributeError(name)

    return Stamps()


def _rows(steps: Steps) -> list[dict[str, str]]:
    return [
        {
            "prompt": text_of(example.prompt),
            "chosen": " " + text_of(example.responses[0]),
            "rejected": " " + text_of(example.responses[1]),
        }
        for step in steps
        for example in step
    ]


def _dataset(steps: Steps) -> Any:
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    os.environ["TQDM_DISABLE"] = "1"
    return Dataset.from_list(_rows(steps))


def _check_lengths(dataset: Any, steps: Steps) -> None:
    """Raise ValueError unless the peer trains on the same tokens."""
    if "prompt_ids" not in dataset.column_names:
        return
    for row, example in zip(dataset, [example for step in steps for example in step], strict=True):
        theirs = row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]
        if tuple(map(tuple, theirs)) != (example.prompt, *example.responses):
            raise ValueError("the trainer tokenised the pairs differently")


def _sorted(job: Job, steps: Steps, meter: Meter) -> Steps:
    """Return the steps with each round's pairs sorted by length."""
    pairs = [example for step in _timed_once(job, steps, meter) for example in step]
    pairs.sort(key=lambda example: len(example.prompt) + max(map(len, example.responses)))
    once = [pairs[i : i + job.batch] for i in range(0, len(pairs), job.batch)]
    return [*(once if job.warmup == "full" else steps[: meter.warmup]), *once * job.rounds]


def _repack_never(model: Any) -> None:
    """Keep bitsandbytes from packing weights for inference on a CPU, after which gradients are silently wrong."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _timed_once(job: Job, steps: Steps, meter: Meter) -> Steps:
    return steps[meter.warmup : meter.warmup + (len(steps) - meter.warmup) // job.rounds]


def _mlx_row(example: Example) -> dict[str, Any]:
    chosen, rejected = example.responses
    length = len(example.prompt)
    return {
        "chosen": [*example.prompt, *chosen],
        "rejected": [*example.prompt, *rejected],
        "chosen_prompt_length": length,
        "rejected_prompt_length": length,
    }


def _installed(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None
