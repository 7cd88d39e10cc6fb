"""The model card for publishing: README.md with the hub's front matter, made from a run's files."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from lite_dil.base.files import replace_file
from lite_dil.base.observer import Event, Observer
from lite_dil.base.redaction import redacted
from lite_dil.base.version import __version__
from lite_dil.config.resume import trained_with
from lite_dil.data.formats import FORMATS
from lite_dil.data.rows import is_rows_name
from lite_dil.generation.policy import AdapterSource
from lite_dil.models.find import EMBEDDED_MODEL
from lite_dil.models.names import is_hub_id, public_name
from lite_dil.objectives.own import is_own, shown
from lite_dil.objectives.table import DIL_FAMILY, objective_of
from lite_dil.reports.card_use import how_to_use
from lite_dil.reports.card_words import code, public_command, public_sources, train_command
from lite_dil.reports.record import FACTS, read_facts, shared, with_error
from lite_dil.reports.scores import HEADING, card_scores, read_evaluations
from lite_dil.runs.folder import RunFolder, checkpoint_of
from lite_dil.runs.history import read_history

# The embedded model's name on the hub; it was made from a package, which has no card.
_EMBEDDED = {"base_model": "HuggingFaceTB/SmolLM2-135M-Instruct", "license": "apache-2.0"}
_LIBRARIES = {"peft": "peft", "mlx-lm": "mlx", "merged": "transformers", "mlx": "mlx"}
_PACKAGES = {
    "torch": ("torch", "transformers", "peft", "bitsandbytes"),
    "mlx": ("mlx", "mlx-lm", "transformers"),
}
_SIDES = ("chosen", "rejected")
_FORMS = {"pairs": "pairs", "unpaired": "good and bad responses", "demonstrations": "demonstrations"}
_BIBTEX = """\
```bibtex
@inproceedings{xiao2025dil,
  title = {On a Connection Between Imitation Learning and {RLHF}},
  author = {Xiao, Teng and Yuan, Yige and Li, Mingxiao and Chen, Zhengyu and Honavar, Vasant G.},
  booktitle = {International Conference on Learning Representations},
  year = {2025}
}
```"""


class ModelCard(Observer):
    """Writes the card of a run's final adapter, which is then ready to upload."""

    writes = True

    def __init__(self, source: AdapterSource) -> None:
        self.source = source

    def finished(self, event: Event) -> None:
        """Write the card next to the adapter's files."""
        assert self.source.adapter is not None
        write_card(self.source.adapter, self.source, "adapter", None, "")


def write_card(folder: Path, source: AdapterSource, format: str, check: Any, command: str) -> None:
    """Write README.md into `folder`, replacing any that is there.

    What the run's files do not say is left out; only the last part of a path is published, and no secret.

    Args:
        folder: the exported folder, with its files in place.
        source: the adapter it was made from.
        format: "adapter", "merged", "mlx", "gguf" or "ollama".
        check: the comparison of these files with the trained model: `rows`, `tokens`, `mean` and `max` (nats per token),
            `tolerance`, `data`; None if nothing was compared.
        command: the command that made the folder; "" if training itself did.
    """
    kind = format
    if format == "adapter":
        kind = "peft" if (folder / "adapter_model.safetensors").is_file() else "mlx-lm"
    options = trained_with(source.adapter, source.run) if source.run and source.adapter else {}
    model = source.options.model
    base = _EMBEDDED if model == EMBEDDED_MODEL else ({"base_model": model} if is_hub_id(model) else {}) | _license(model)
    facts = _facts(source.run) if source.run else {}
    parts = [
        f"---\n{_front_matter(kind, base, options)}\n---",
        *_introduction(kind, model, base, options, source.strength),
        "## Use",
        how_to_use(
            kind, folder, base.get("base_model", f"FOLDER_OF_{public_name(model)}"), options, facts.get("training", {})
        ),
    ]
    if source.run and options:
        parts += ["## Training", *_training(options, facts), *_figures(source.run, _step(source), options, facts)]
    parts += _scores(source)
    if check is not None:
        parts += ["## Check of these files", _checked(check)]
    parts += ["## How it was made", *_made(options, command), "## Limits", _limits(options)]
    if options:
        parts += ["## Citation", *_citation(options["loss"])]
    replace_file(folder / "README.md", redacted("\n\n".join(parts)) + "\n")


def _scores(source: AdapterSource) -> list[str]:
    """Return the section on evaluations of this adapter."""
    if source.run is None or source.adapter is None:
        return []
    return list(card_scores(read_evaluations(source.run.path), source.adapter, source.strength))


def write_card_scores(folder: Path, source: AdapterSource) -> None:
    """Write the section on evaluations into the README.md of `folder`, if there is one; leave its other words as they are."""
    path = folder / "README.md"
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8")
    before, old, rest = text.partition(f"{HEADING}\n")
    if old:  # up to the next section
        text = before + (rest[place + 1 :] if (place := rest.find("\n## ")) >= 0 else "")
    if section := "\n\n".join(_scores(source)):
        place = text.find("\n## How it was made\n") + 1 or len(text)
        text = f"{text[:place].rstrip()}\n\n{redacted(section)}\n\n{text[place:]}".rstrip() + "\n"
    replace_file(path, text)


def _front_matter(kind: str, base: dict[str, Any], options: dict[str, Any]) -> str:
    """Return the YAML that the hub reads."""
    from huggingface_hub import ModelCardData

    loss = options.get("loss")
    tags = ["lite-dil"]
    if loss:
        tags += [*(["dil"] if loss in DIL_FAMILY else []), shown(loss)]
    tags += ["lora", *(["preference"] if loss and objective_of(loss).data != "chosen" else [])]
    tags += ["gguf"] if kind in ("gguf", "ollama") else []
    relation = "adapter" if kind in ("peft", "mlx-lm") else "finetune"
    return ModelCardData(
        **base,
        base_model_relation=relation if "base_model" in base else None,
        library_name=_LIBRARIES.get(kind),
        pipeline_tag="text-generation",
        datasets=public_sources(options.get("data", ""))[1] or None,
        tags=tags,
    ).to_yaml()


def _license(model: str) -> dict[str, str]:
    """Return the licence fields of the base model's own card, as far as available."""
    import yaml
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    from lite_dil.base.yaml_file import LARGEST_YAML, parse_yaml

    card: dict[str, Any] = {}
    try:
        if (readme := Path(model) / "README.md").is_file():
            with readme.open("rb") as file:
                start = file.read(LARGEST_YAML).decode("utf-8", "replace")
            if head := re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---", start, re.S):
                content = parse_yaml(head[1])
                card = content if isinstance(content, dict) else {}
        elif is_hub_id(model):
            found = HfApi().model_info(model, timeout=10).card_data
            card = found.to_dict() if found else {}
    except (OSError, HTTPError, ValueError, yaml.YAMLError):  # no network or a broken card: claim nothing
        return {}
    if not isinstance(name := card.get("license"), str) or not re.fullmatch(r"[\w.-]+", name):
        return {}
    fields = {"license": name}
    for key in ("license_name", "license_link"):
        if isinstance(value := card.get(key), str) and value:
            fields[key] = value
    link = fields.get("license_link", "https://")
    if "://" not in link:  # a file in the base model's repository
        fields.pop("license_link")
        if is_hub_id(model):
            fields["license_link"] = f"https://huggingface.co/{model}/blob/main/{link}"
    return fields


def _introduction(kind: str, model: str, base: dict[str, str], options: dict[str, Any], strength: float) -> Iterator[str]:
    name = public_name(base.get("base_model", model))
    linked = f"[{name}](https://huggingface.co/{base['base_model']})" if "base_model" in base else code(name)
    what = {
        "peft": "A LoRA adapter, in PEFT's format, for",
        "mlx-lm": "A LoRA adapter, in mlx-lm's format, for",
        "merged": "The weights, in 16 bits, with a LoRA adapter merged into them, of",
        "mlx": "An MLX model, with a LoRA adapter merged into its weights, of",
        "gguf": "A GGUF file, with a LoRA adapter merged into its weights, of",
        "ollama": "A GGUF file and an Ollama Modelfile, with a LoRA adapter merged into the weights, of",
    }[kind]
    text = f"{what} {linked}"
    if options:
        text += f", trained by lite-dil with the loss {code(shown(options['loss']))}"
    yield f"# {code(name)}, tuned" if options else f"# {code(name)} with an adapter"
    yield text + "." + (f" The adapter is applied at {strength:g} times its trained strength." if strength != 1 else "")
    if "license" in base:
        told = base.get("license_name", base["license"])
        link = f" ({base['license_link']})" if "license_link" in base else ""
        yield f"The base model's licence is {code(told)}{link}; it also applies to derived models."
    elif files := sorted(path.name for path in Path(model).glob("LICEN[SC]E*")):
        yield f"The base model's licence, which also applies to derived models, is in its file {code(files[0])}."
    else:
        yield "The base model's own licence also applies to derived models."


def _facts(run: RunFolder) -> dict[str, dict[str, Any]]:
    """Return the run's notes on its data by use, "training" and "held out"."""
    return {data["use"]: data for data in read_facts(run.path)["data"]} if (run.path / FACTS).is_file() else {}


def _training(options: dict[str, Any], facts: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yield the data, the loss and the settings of the training."""
    loss = options["loss"]
    objective = objective_of(loss)
    constants = [f"{name} {options[name]}" for name in ("beta", *objective.options) if options.get(name) is not None]
    if options.get("init_adapter"):  # its rank, alpha and layers are used
        lora = f"continued from {code(public_name(options['init_adapter']))}; reference: {options['reference']}"
    else:
        lora = f"rank {options['lora_r']}, alpha {options['lora_alpha']:g}, on {code(options['target_modules'])}"
    steps = f"{options['max_steps']} steps" if options.get("max_steps") else f"{options['epochs']:g} times the data"
    lines = [
        f"data: {_data(options['data'], facts.get('training'))}",
        f"held-out data: {_held_out(options.get('eval_data'), facts.get('held out'))}",
        f"loss: {code(shown(loss))}, {objective.title}: {code(objective.formula)}",
        f"source of the loss: {objective.source}",
        f"constants: {', '.join([*constants, 'log-ratio: ' + str(options['logp_reduction']) + ' over the tokens'])}",
        f"LoRA: {lora}" + (f", dropout {options['lora_dropout']:g}" if options.get("lora_dropout") else ""),
        f"base weights in training: {'4 bits' if options['load_in_4bit'] else 'as the base model has them'}"
        + (f", the output head in {options['head_bits']} bits" if options.get("head_bits") else "")
        + f", computed in {options['dtype']} on {options['backend']}",
        f"{steps} of {options['batch_size'] * options['gradient_accumulation_steps']} examples, learning rate "
        f"{options['learning_rate']:g} ({options['lr_scheduler_type']}), at most {options['max_length']} tokens, "
        f"seed {options['seed']}",
    ]
    if options.get("reward"):
        lines.insert(1, f"reward of the answers: {code(options['reward'])}, {options['samples']} answers to a prompt")
    if options.get("eval_reward"):
        lines.insert(2, f"held-out reward, measured and not trained on: {code(options['eval_reward'])}")
    if options.get("sample_rejected"):
        lines.insert(1, f"rejected responses: {options['sample_rejected']} per prompt, generated by the base model")
    yield "\n".join(f"- {line}" for line in lines)


def _held_out(text: str | None, facts: dict[str, Any] | None) -> str:
    """Name the held-out data: a separate data set, or a part of the training data that was not trained on."""
    if text:
        return _data(text, facts)
    return f"{facts['examples']:,} rows of this data, whole prompts, not trained on" if facts else "none"


def _data(text: str, facts: dict[str, Any] | None) -> str:
    """Name a data set, with its number of examples and its formats."""
    names = ", ".join(map(code, public_sources(text)[0]))
    if facts is None:
        return names
    if facts["form"] == "prompts":
        return f"{names}, {facts['examples']:,} prompts, which the model answered itself"
    formats = ", ".join(dict.fromkeys(FORMATS[source["format"]].title for source in facts["sources"]))
    return f"{names}, {facts['examples']:,} {_FORMS[facts['form']]}, read as {formats}"


def _step(source: AdapterSource) -> float:
    """Return the adapter's step: a checkpoint's own, or the run's last."""
    checkpoint = checkpoint_of(source.adapter.absolute()) if source.adapter else None
    return int(checkpoint.name.removeprefix("step-")) if checkpoint else math.inf


def _figures(run: RunFolder, last: float, options: dict[str, Any], facts: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yield the adapter's held-out figures from the last evaluation up to the step `last`."""
    held_out = read_history(run.metrics).held_out
    lines = np.flatnonzero(held_out.get("step") <= last)
    if not len(lines):
        return

    def figure(name: str) -> float | None:
        return held_out.at(int(lines[-1]), f"eval_{name}")

    yield f"### Held-out figures after step {held_out.get('step')[lines[-1]]:.0f}"
    if "held out" in facts and (accuracy := figure("rewards/accuracies")) is not None:
        _, error, pairs = with_error(accuracy, facts["held out"], options)
        yield (
            f"Accuracy {accuracy:.3f} (standard error {error:.3f}, {pairs:,} pairs): the share of pairs where the chosen "
            "response gained more than the rejected one."
        )
    if warning := shared(facts.get("held out")).warning:
        yield f"Note: {warning}."
    per = "per token" if options["logp_reduction"] == "mean" else "per response"
    rows = [f"| | {' | '.join(_SIDES)} |", "|---|---|---|"]
    for title, name in ((f"log-ratio to the reference, nats {per}", "log_ratio"), ("log-prob, nats per response", "logps")):
        cells = [figure(f"{name}/{side}") for side in _SIDES]
        rows.append(f"| {title} | {' | '.join('-' if cell is None else f'{cell:+.3f}' for cell in cells)} |")
    yield "\n".join(rows)
    if (figure("log_ratio/chosen") or 0) < 0:
        yield (
            "Note: the chosen responses' likelihood fell. The tuned model gives them less probability than its reference, "
            "though it may prefer them to the rejected ones."
        )


def _checked(check: Any) -> str:
    return (
        f"{check.tokens:,} response tokens in {check.rows:,} rows of {', '.join(map(code, public_sources(check.data)[0]))}: "
        f"the log-probs from these files differ from those of the trained model by {check.mean:.2g} nats per token on "
        f"average ({check.tolerance:g} is allowed), and by {check.max:.2g} at most."
    )


def _made(options: dict[str, Any], command: str) -> Iterator[str]:
    """Yield the commands, with only the last parts of paths, and the versions."""
    commands = [train_command(options)] if options and not _of_a_program(options) else []
    commands += [public_command(command)] if command else []
    if options and _of_a_program(options):
        yield (
            "Trained by a Python program with `lite_dil.train`, which gave its own "
            + " and ".join(_of_a_program(options))
            + "."
        )
    if commands:
        yield "```bash\n" + "\n".join(commands) + "\n```"
    found = [f"lite-dil {__version__}"]
    for package in _PACKAGES["mlx" if options.get("backend") == "mlx" else "torch"]:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    yield f"Versions used: {', '.join(found)}."


def _of_a_program(options: dict[str, Any]) -> list[str]:
    """Return the objects that a program gave to the run and no command can name."""
    found = ["loss"] if is_own(options["loss"]) else []
    return found + ["data"] * any(is_rows_name(str(options.get(name))) for name in ("data", "eval_data"))


def _limits(options: dict[str, Any]) -> str:
    text = (
        "This model knows no more than the base model, and has the biases of the base model and the data. "
        "Figures are from data similar to the training data; nothing was tested for safety or other uses."
    )
    if options.get("loss") in DIL_FAMILY and options["logp_reduction"] == "mean":
        text += (
            " The log-ratio was averaged over the tokens, for which the paper's theorem (the minimiser is the true density "
            "ratio) does not hold."
        )
    return text


def _citation(loss: str) -> Iterator[str]:
    if loss not in DIL_FAMILY:
        yield f"The loss: {objective_of(loss).source}. The library is made for Direct Imitation Learning:"
    yield _BIBTEX
