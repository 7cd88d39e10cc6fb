"""Train several losses from the same start on the same data, and see side by side what each does to the model.

    python scripts/compare.py --data prefs.jsonl --losses lsif,ukl,bce,dpo,simpo
    python scripts/compare.py --data prefs.jsonl --eval-data held_out.jsonl --losses lsif,dpo --seeds 0,1,2 --max-steps 200

Takes the flags of train beside its own. Writes into --output: index.html (one page with everything), table.md, table.json,
figure2.png and curves.json (log-probs of held-out answers during training), and the runs. Interrupted, the same command with
the same --output goes on where it was.
"""

from __future__ import annotations

import gc
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from compare_settings import Comparison, read

from lite_dil.base.errors import TrainingDiverged, UserError
from lite_dil.base.files import replace_file
from lite_dil.base.start import quiet_bars, start
from lite_dil.config.resume import check_same_run, saved_config
from lite_dil.config.train_config import ResolvedConfig
from lite_dil.runs.folder import RunFolder

RESULT = "result.json"  # a run that has it is finished: trained and measured, or diverged


def main(argv: list[str] | None = None) -> int:
    """Run a comparison; return 0, 2 for the user's errors, 130 when stopped."""
    again = ""
    try:
        start(training=True)
        comparison = read(sys.argv[1:] if argv is None else argv, __doc__ or "", lambda text: print(text, flush=True))
        again = comparison.again
        if compare(comparison):
            return 0
    except UserError as error:
        print(f"compare: {error}", file=sys.stderr)
        if again:  # what is done is kept; options that change no result, as --row-tokens, may differ
            print(f"compare: when that is mended, go on with: {again}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass
    print(f"compare: stopped; go on with: {again}" if again else "compare: stopped", file=sys.stderr)
    return 130


def compare(comparison: Comparison) -> bool:
    """Train and measure what is not done yet, and report; return False where a signal ended it early."""
    from lite_dil.backends.registry import prepare

    first = next(iter(comparison.configs.values()))
    prepare(first.backend, first, first)
    quiet_bars()
    from compare_report import report

    from lite_dil.cli.progress import Terminal

    display = Terminal()
    runs = [comparison.run(loss, seed) for seed in comparison.seeds for loss in comparison.configs]
    for number, config in enumerate(runs, 1):
        name = f"{config.loss}, seed {config.seed} ({number} of {len(runs)})"
        if (Path(config.output_dir or "") / RESULT).exists():
            display.say(f"{name}: done before")
            continue
        display.say(f"\n{name}")
        _forget()
        if not run_one(comparison, config, display):
            return False
    report(comparison, display)
    return True


def run_one(comparison: Comparison, config: ResolvedConfig, display: Any) -> bool:
    """Train one loss, from its newest checkpoint where there is one, and measure it; return False where it was stopped."""
    from compare_measure import Probe, measure, measure_reference

    from lite_dil.recipes.preference import train

    folder = RunFolder(Path(config.output_dir or ""))
    checkpoint = folder.latest()
    if checkpoint:
        saved = saved_config(checkpoint)
        config = replace(config, backend=saved["backend"], dtype=saved["dtype"])  # what auto came to
        check_same_run(config, saved, str(checkpoint))
    elif folder.path.exists():  # killed before its first checkpoint
        shutil.rmtree(folder.path)
    result: dict[str, Any] = {"loss": config.loss, "seed": config.seed, "learning_rate": config.learning_rate}
    try:
        trained = train(config, display, checkpoint)
    except TrainingDiverged as error:
        display.say(f"{config.loss} diverged; the comparison goes on. {error}")
        _write(folder.path / RESULT, result | {"diverged": str(error)})
        return True
    if trained.stopped:
        return False
    probe = Probe(trained, config, comparison.sample_prompts, comparison.sample_tokens)
    display.say(f"drawing an answer to each of {len(probe.prompts)} held-out prompts ...")
    reference = measure_reference(probe, comparison.reference, comparison.seeds[0])
    figures = measure(probe, reference, folder.path, config.seed)
    _write(folder.path / RESULT, result | {"diverged": None, **figures})
    return True


def _write(path: Path, content: dict[str, Any]) -> None:
    replace_file(path, json.dumps(content, indent=1) + "\n")


def _forget() -> None:
    """Free the last run's model, and let the next one's memory peak be its own (a CPU's is the process's, and stays)."""
    gc.collect()
    if (torch := sys.modules.get("torch")) and torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if mx := sys.modules.get("mlx.core"):
        mx.clear_cache()
        mx.reset_peak_memory()


if __name__ == "__main__":
    sys.exit(main())
