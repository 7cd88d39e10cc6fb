"""The README and docs/ cannot rot: every command parses, every make target and link exists, and the example data trains."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest
import yaml
from conftest import write_pairs

from lite_dil.cli.main import main, parsers
from lite_dil.config.options import add_flags, build, read_yaml

ROOT = Path(__file__).parent.parent
PAGES = {
    path: path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
}
BLOCKS = {path: re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M) for path, text in PAGES.items()}
COMMANDS = [
    line.partition("  #")[0].strip()
    for blocks in BLOCKS.values()
    for language, block in blocks
    if language == "bash"
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith("#")
]
TRAIN = [c for c in COMMANDS if re.match(r"(python scripts/train\.py|lite-dil (train|demo))\b", c)]


OTHERS = [c for c in COMMANDS if re.match(r"lite-dil (?!train|demo)", c)]


def train_flags(command: str) -> list[str]:
    words = shlex.split(command)
    return words[3 - (words[0] == "python") - (words[0] == "lite-dil") :]


def test_there_are_commands() -> None:
    assert len(TRAIN) >= 5
    assert {"make demo", "make test"} <= set(COMMANDS)


@pytest.mark.parametrize("command", TRAIN)
def test_train_commands_parse(command: str) -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    parser.add_argument("--config")
    parser.add_argument("--resume", nargs="?")
    given = vars(parser.parse_args(train_flags(command)))
    build({name: value for name, value in given.items() if name not in ("config", "resume")}, {})


@pytest.mark.parametrize("command", OTHERS)
def test_other_commands_parse(command: str) -> None:
    _, name, *flags = shlex.split(command)
    parsers()[1][name].parse_args(flags)


def test_make_targets_and_scripts_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for command in COMMANDS:
        words = shlex.split(command)
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.M), command
        if words[:1] == ["python"] and words[1].startswith("scripts/"):
            assert (ROOT / words[1]).is_file(), command


def test_extras_exist() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    for names in re.findall(r"\.\[([\w,]+)\]|lite-dil\[([\w,]+)\]", "".join(PAGES.values())):
        for extra in "".join(names).split(","):
            assert re.search(rf"^{extra} = \[", project, re.M), extra


def test_links_lead_somewhere() -> None:
    for page, text in PAGES.items():
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_no_heading_is_there_twice() -> None:
    """On a page, or in the changes of a version: a part that is there twice is what a merge leaves."""
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").split("\n## ")
    for name, text in [*((path.name, text) for path, text in PAGES.items()), *(("CHANGELOG.md", part) for part in changes)]:
        headings = re.findall(r"^#+ .+", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), re.M)
        twice = {heading for heading in headings if headings.count(heading) > 1}
        assert not twice, f"{name}: {', '.join(sorted(twice))}"


def test_the_example_data_and_config_train(tiny: str, tmp_path: Path) -> None:
    """The example rows and the example config, on a tiny model."""
    pairs, *others = [block for language, block in BLOCKS[ROOT / "docs" / "data.md"] if language == "json"]
    assert ("json", pairs) in BLOCKS[ROOT / "README.md"]
    options = next(block for language, block in BLOCKS[ROOT / "docs" / "training.md"] if language == "yaml")
    for number, (block, loss) in enumerate(
        [*((line, "lsif") for line in pairs.splitlines()), *zip(others, ("kto", "sft"), strict=True)]
    ):
        data = tmp_path / f"{number}.jsonl"
        data.write_text(block, encoding="utf-8")
        flags = ["--model", tiny, "--backend", "cpu", "--loss", loss, "--data", str(data), "--max-steps", "1"]
        assert main(["train", *flags, "--report-samples", "0", "--output-dir", str(tmp_path / f"out{number}")]) == 0
    (tmp_path / "c.yaml").write_text(options, encoding="utf-8")
    assert read_yaml(tmp_path / "c.yaml").keys() == yaml.safe_load(options).keys()
    own = ["--model", tiny, "--data", str(write_pairs(tmp_path / "p.jsonl")), "--max-steps", "1", "--dtype", "float32"]
    own += ["--max-length", "64"]  # for the sample answers
    flags = ["--config", str(tmp_path / "c.yaml"), *own, "--backend", "cpu", "--no-4bit", "--output-dir", str(tmp_path / "o")]
    assert main(["train", *flags]) == 0
