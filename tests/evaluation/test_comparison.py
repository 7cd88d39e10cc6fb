"""lite-dil compare: several losses on tiny models, stopped and gone on with, and what it says of its numbers."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from html import unescape
from html.parser import HTMLParser
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import bare_model, config, oracle_logps, write_pairs
from markupsafe import Markup
from undrawn import SVG, blank

from lite_dil.backends.types import Generated
from lite_dil.base.html import clean
from lite_dil.batching.batch import Batch
from lite_dil.cli import compare
from lite_dil.cli import main as command_line
from lite_dil.cli.progress import Terminal
from lite_dil.config.options import build
from lite_dil.config.train_config import TrainConfig
from lite_dil.data.dataset import load
from lite_dil.data.encoder import Encoder, Example
from lite_dil.data.reader import read_rows
from lite_dil.evaluation.comparison import measure as compare_measure
from lite_dil.evaluation.comparison import page as compare_page
from lite_dil.evaluation.comparison import settings as compare_settings
from lite_dil.evaluation.comparison import table as compare_table
from lite_dil.evaluation.comparison.settings import Comparison
from lite_dil.models.find import load_tokenizer
from lite_dil.reports import charts
from lite_dil.reports.charts import INK
from lite_dil.runs.folder import RunFolder

STEPS, PROMPTS, TOKENS = 4, 9, 6
CURVES = compare_page._curves


def main(argv: list[str]) -> int:
    return command_line.main(["compare", *argv])


@pytest.fixture(scope="module", autouse=True)
def unplotted() -> Iterator[pytest.MonkeyPatch]:
    """The figure of curves is left blank, but where it is looked at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_page, "_curves", blank)
        yield patch


@pytest.fixture(scope="module", params=["cpu", "mlx"])
def flags(request: pytest.FixtureRequest, tiny: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """40 pairs, of which 20 are held out; an answer to 9 of those prompts is two draws, of 8 and of 1."""
    data = write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", 40)
    return [
        "--model", tiny, "--backend", request.param, "--dtype", "float32", "--data", str(data), "--losses", "lsif,dpo",
        "--max-steps", str(STEPS), "--learning-rate", "1e-3", "--lora-r", "4", "--learning-rates", "dpo=2e-3",
        "--sample-prompts", str(PROMPTS), "--sample-tokens", str(TOKENS), "--batch-size", "4",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison that was never stopped, with a reference cache of its own."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        if "cpu" in flags:  # the curves are the same: one backend's are looked at
            patch.setattr(charts, "svg", SVG)
            patch.setattr(compare_page, "_curves", CURVES)
        assert main([*flags, "--output", str(folder), "--reference-cache", "off"]) == 0
    return folder


def metrics(folder: Path, loss: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "runs" / f"{loss}-seed0" / "metrics.jsonl").read_text().splitlines()]


def table(folder: Path) -> dict[str, Any]:
    """The table without what a clock and the machine decide."""
    content = json.loads((folder / "table.json").read_text())
    for row in content["rows"]:
        for name in compare_table.MACHINE_FIGURES:
            assert row["figures"].pop(name)["mean"] > 0
    return content


def test_the_table_is_of_the_runs(whole: Path, flags: list[str], tiny: str) -> None:
    content = table(whole)
    assert [row["loss"] for row in content["rows"]] == ["lsif", "dpo"]
    assert [row["figures"]["learning_rate"]["mean"] for row in content["rows"]] == [1e-3, 2e-3]
    held_out = whole / "data" / "held_out.jsonl"
    encoder = Encoder(load_tokenizer(tiny))
    examples = load(str(held_out), "test", encoder, TrainConfig()).examples
    # Each row is on one side, word for word.
    written = [(whole / "data" / name).read_text().splitlines() for name in ("train.jsonl", "held_out.jsonl")]
    assert sorted(chain(*written)) == sorted(Path(flags[flags.index("--data") + 1]).read_text().splitlines())
    assert len(examples) == 20
    # The reference's figures by the textbook.
    batch = Batch.of(examples)
    sums = [part.sum().item() for part in oracle_logps(bare_model(tiny), batch).split(list(map(len, batch.responses)))]
    assert content["reference"]["logps/chosen"] == pytest.approx(np.mean(sums[0::2]), abs=1e-3)
    assert content["reference"]["logps/rejected"] == pytest.approx(np.mean(sums[1::2]), abs=1e-3)
    for row in content["rows"]:
        figures = {name: figure["mean"] for name, figure in row["figures"].items()}
        last = [line for line in metrics(whole, row["loss"]) if "eval_loss" in line][-1]
        for side in ("chosen", "rejected"):
            assert figures[f"logps/{side}"] == pytest.approx(last[f"eval_logps/{side}"], abs=1e-3)
            assert figures[f"change/{side}"] == pytest.approx(
                figures[f"logps/{side}"] - content["reference"][f"logps/{side}"], abs=1e-3
            )
        assert figures["change/chosen"] > 0.01  # it learned, so that the figures can tell policy from reference
        assert figures["margin"] == pytest.approx(figures["change/chosen"] - figures["change/rejected"], abs=1e-6)
        name = "accuracy_per_token" if row["loss"] == "lsif" else "accuracy"
        assert figures[name] == pytest.approx(last["eval_rewards/accuracies"])
        answers = compare_samples(whole, row["loss"])
        assert len(answers) == PROMPTS
        assert figures["kl"] == pytest.approx(np.mean([answer["log_ratio"] for answer in answers]))
        assert any(answer["log_ratio"] != 0 for answer in answers)
        assert figures["length"] <= TOKENS
    assert all(line["reference_passes"] == 0 for loss in ("lsif", "dpo") for line in metrics(whole, loss) if "loss" in line)
    assert (whole / "reference-cache").is_dir()


def compare_samples(folder: Path, loss: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "runs" / f"{loss}-seed0" / "samples.jsonl").read_text().splitlines()]


def test_the_curves_start_at_the_reference_and_end_in_the_table(whole: Path, flags: list[str]) -> None:
    curves, content = json.loads((whole / "curves.json").read_text()), table(whole)
    for row in content["rows"]:
        for side in ("chosen", "rejected"):
            curve = curves["losses"][row["loss"]][side]
            assert curve["steps"] == [0, 1, 2, 3, 4]
            assert curve["mean"][0] == content["reference"][f"logps/{side}"]
            assert curve["mean"][-1] == pytest.approx(row["figures"][f"logps/{side}"]["mean"], abs=1e-3)
    assert (whole / "figure2.png").read_bytes()[:4] == b"\x89PNG"
    page = (whole / "index.html").read_text()
    assert ("currentColor" in page) == ("cpu" in flags) and INK not in page
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    # Each prompt stands once, with the answers of all beside each other.
    tags = Tags()
    tags.feed(page)
    assert tags.levels == [1, 2, 2, 2, 2, 2]
    reference = [json.loads(line) for line in (whole / "reference" / "samples.jsonl").read_text().splitlines()]
    blocks = [unescape(block) for block in page.split('<div class="sample">')[1:]]
    assert len(blocks) == PROMPTS
    for block, *answers in zip(blocks, reference, *(compare_samples(whole, loss) for loss in ("lsif", "dpo")), strict=True):
        texts = [clean(text) or "(nothing)" for text in (answers[0]["prompt"], *(each["answer"] for each in answers))]
        said = [block.index(f'dir="auto">{text}</div>') for text in texts]
        assert said == sorted(said)
    assert re.search(r'aria-label="Accuracy against KL. lsif: [\d.]+ ± [\d.]+ at [\d.-]+ ± [\d.]+ nats; dpo: ', page)
    assert (whole / "table.md").read_text().count("\n| lsif |") == 1


def test_stopped_and_gone_on_with_is_the_same(
    whole: Path, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C in the second loss's training, then in its sampling; what was done before is not touched."""
    # A cache of its own: one that other tests share may hold log-probs from other batches, which differ in the last places.
    command = [*flags, "--output", str(tmp_path / "out"), "--reference-cache", str(tmp_path / "cache")]
    log, write_answers = RunFolder.log, compare_measure.write_answers

    def stop_in_dpo(self: RunFolder, line: dict[str, float]) -> None:
        log(self, line)
        if "dpo" in str(self.path) and line["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "log", stop_in_dpo)
        assert main(command) == 130
    assert f"--output {tmp_path / 'out'}" in capsys.readouterr().err
    assert metrics(tmp_path / "out", "dpo")[-1]["step"] < STEPS
    finished = tmp_path / "out" / "runs" / "lsif-seed0"
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in finished.rglob("*") if path.is_file()}

    def stop_after_a_draw(path: Path, answers: list[dict[str, Any]]) -> None:
        write_answers(path, answers)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(compare_measure, "write_answers", stop_after_a_draw)
        assert main(command) == 130
    assert "lsif, seed 0 (1 of 2): " in capsys.readouterr().out
    assert len(compare_samples(tmp_path / "out", "dpo")) == compare_measure.ANSWERS_AT_ONCE < PROMPTS
    assert not (tmp_path / "out" / "table.json").exists()

    assert main(command) == 0
    assert table(tmp_path / "out") == table(whole)
    assert (tmp_path / "out" / "curves.json").read_text() == (whole / "curves.json").read_text()
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before} == before


def test_a_run_over_part_of_the_data_computes_that_part_of_the_reference(flags: list[str], tmp_path: Path) -> None:
    """2 steps of 8 of the 20 pairs: the first loss computes them and the next finds them."""
    more = ["--max-steps", "2", "--sample-prompts", "1", "--output", str(tmp_path / "out"), "--reference-cache", "off"]
    assert main([*flags, *more]) == 0
    passes = {
        loss: sum(line["reference_passes"] for line in metrics(tmp_path / "out", loss) if "loss" in line)
        for loss in ("lsif", "dpo")
    }
    assert passes["lsif"] > 0 == passes["dpo"]


def test_other_options_in_the_same_folder_are_refused(
    whole: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    same = [*flags, "--output", str(whole)]
    for more, message in (
        (["--max-steps", "7"], f"--max-steps is 7, but the comparison has {STEPS}"),
        (["--losses", "dpo,lsif"], "--losses is dpo,lsif, but the comparison has lsif,dpo"),
        (["--learning-rates", "dpo=1"], "--learning-rate is 1.0 for dpo, but the comparison has 0.002"),
        (["--sample-tokens", "7"], f"--sample-tokens is 7, but the comparison has {TOKENS}"),
    ):
        assert main([*same, *more]) == 2
        err = capsys.readouterr().err
        assert message in err and str(whole) in err and err.count("\n") == 1
    data = Path(flags[flags.index("--data") + 1])
    text = data.read_text()
    data.write_text(text.replace(" yes", " no, yes", 1))
    assert main(same) == 2
    data.write_text(text)
    assert "contents" in capsys.readouterr().err
    assert main([*same, "--row-tokens", "4000"]) == 0  # which changes no result


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--losses", "lsif,dop"], "'dop' (did you mean 'dpo'?) is not one of"),
        (["--losses", "lsif,lsif"], "lsif is given twice"),
        (["--losses", ","], "none given"),
        (["--loss", "lsif"], "--loss is given by --losses here"),
        (["--output-dir", "x"], "--output-dir is given by --output here"),
        (["--max-stepz", "3"], "unknown argument --max-stepz (did you mean '--max-steps'?)"),
        (["--max-steps", "0"], "--max-steps is 0; expected at least 1"),
        (["--learning-rates", "ukl=1"], "'ukl' is not one of --losses lsif,dpo"),
        (["--learning-rates", "lsif"], "'lsif' is not of the form loss=rate"),
        (["--learning-rates", "lsif=fast"], "'fast' is not a number"),
        (["--seeds", "0,one"], "--seeds: 'one' is not a whole number"),
        (["--sample-prompts", "0"], "'0' is not a whole number above 0"),
        (["--data", "few.jsonl"], "few.jsonl has 39 rows, too few to hold 20 of them out; give --eval-data"),
        (["--data", "none.jsonl"], "none.jsonl: no such file"),
        (["--simpo-gamma", "1"], "--simpo-gamma belongs to --loss simpo, which is not compared"),
        (["--data", "unpaired.jsonl"], "--loss dpo needs pairs"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_trains_nothing(
    more: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_pairs(tmp_path / "few.jsonl", 39)
    write_pairs(tmp_path / "pairs.jsonl", 40)
    singles = [{"prompt": f"{i}", "completion": "yes", "label": i % 2 == 0} for i in range(40)]
    (tmp_path / "unpaired.jsonl").write_text("".join(json.dumps(row) + "\n" for row in singles))
    data = [] if "--data" in more else ["--data", "pairs.jsonl"]
    assert main(["--losses", "lsif,dpo", *data, "--model", "nowhere", *more]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"few.jsonl", "pairs.jsonl", "unpaired.jsonl"}


def test_a_loss_that_diverges_is_a_row(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl", 40)
    flags = [
        "--model", tiny, "--backend", "cpu", "--dtype", "float32", "--data", str(data), "--eval-data", str(data),
        "--losses", "lsif,dpo", "--logp-reduction", "sum", "--beta", "1e4", "--max-steps", "3", "--sample-prompts", "2",
        "--sample-tokens", "4", "--eval-steps", "3", "--output", str(tmp_path / "out"),
    ]  # fmt: skip
    assert main(flags) == 0
    content = json.loads((tmp_path / "out" / "table.json").read_text())
    lsif, dpo = content["rows"]
    assert lsif["diverged"]["0"].startswith("step ") and not dpo["diverged"]
    assert dpo["figures"]["kl"]["mean"] is not None
    assert "lsif (diverged: step " in (tmp_path / "out" / "table.md").read_text()
    assert "no result" in content["verdict"][-1]
    assert not (tmp_path / "out" / "data" / "train.jsonl").exists()
    capsys.readouterr()
    assert main(flags) == 0  # and is not trained again
    assert capsys.readouterr().out.count("already done") == 2


class Tags(HTMLParser):
    """Collects tags and attributes, and that every element is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.levels: list[int] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen += [tag, *(name for name, _ in attrs)]
        self.levels += [int(tag[1])] if re.fullmatch("h[1-6]", tag) else []
        if tag not in ("meta", "use"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag != "use":
            assert self.open.pop() == tag


def test_the_page_escapes_what_data_and_models_say(tmp_path: Path) -> None:
    hostile = "</div><script>alert(1)</script><img src=x onerror=\"alert('1')\"> & \x00"
    options = config(data=hostile, eval_data=hostile, model=hostile)
    comparison = Comparison(tmp_path, {"lsif": options}, [0], 1, 1, 1, hostile)
    samples = [{"prompt": hostile, "answers": [(hostile, hostile), ("lsif", hostile)]}] * (compare_page.OPEN + 1)
    plot, drawn = compare_page.Plot(Markup("<svg></svg>"), hostile), Markup("<svg></svg>")
    page = compare_page.render(comparison, ["loss", hostile], [[hostile, hostile]], [hostile], [hostile], drawn, plot, samples)
    tags = Tags()
    tags.feed(page)
    assert not tags.open
    assert not {"script", "img", "onerror"} & set(tags.seen)
    assert page.count("&lt;script&gt;") == 10 + 4 * len(samples)


def figure(mean: float, error: float | None = None, std: float | None = None) -> dict[str, float | None]:
    return {"mean": mean, "error": error, "std": std}


def row(loss: str, change: float, error: float = 0.1, std: float | None = None) -> dict[str, Any]:
    figures = {"change/chosen": figure(change, error, std), "change/rejected": figure(-1.0, 0.1)}
    return {"loss": loss, "seeds": [0] if std is None else [0, 1], "diverged": {}, "figures": figures}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([row("lsif", 1), row("dpo", -1), row("simpo", -2)], "agrees with these numbers: it rose with lsif; it fell with dpo"),
        ([row("lsif", 0.1), row("dpo", -1)], "agrees with these numbers (of dpo and simpo only dpo was compared): no change"),
        ([row("lsif", 1), row("bce", -1), row("dpo", -1), row("simpo", -1)], "agrees with these numbers in part: it rose"),
        ([row("lsif", 1), row("dpo", -1), row("simpo", 1)], "agrees with these numbers in part: it rose with lsif, simpo"),
        ([row("lsif", 1), row("dpo", 0.1)], "does not agree with these numbers"),
        ([row("lsif", 0.1), row("dpo", -0.1)], "cannot tell whether DIL keeps"),
        ([row("lsif", 0.1), row("ukl", 1), row("dpo", -0.1)], "does not agree with these numbers"),
        ([row("lsif", -1), row("dpo", -1)], "does not agree with these numbers"),
        ([row("lsif", 1, std=0.6), row("dpo", -1)], "no change beyond the noise with lsif"),
        ([row("lsif", 1), row("ipo", -1)], "is not tested here: there is no result of dpo or simpo"),
        ([row("dpo", -1)], "is not tested here: there is no result of a loss of the DIL family"),
    ],
)  # fmt: skip
def test_the_verdict_claims_no_more_than_the_numbers(rows: list[dict[str, Any]], said: str) -> None:
    sentences = compare_table.verdict(rows, 10, 20)
    assert said in sentences[-1]
    assert len(sentences) == len(rows) + 1


def test_a_sentence_names_the_change_and_its_noise() -> None:
    assert compare_table.verdict([row("lsif", 1.234)], 1, 1)[0] == (
        "lsif: the chosen responses' log-prob rose by 1.23 ± 0.10 nats; the rejected responses' fell by 1.00 ± 0.10 nats."
    )
    assert "(+0.19 ± 0.10 nats)" in compare_table.verdict([row("lsif", 0.19)], 1, 1)[0]


def test_held_out_figures_by_hand() -> None:
    """Two pairs: f is 2 and -1 in the first, of 2 and 1 tokens; 1 and 1.5 in the second, of 1 and 3."""
    examples = [Example((1,), ((1, 1), (1,)), (1, -1)), Example((2,), ((1,), (1, 1, 1)), (1, -1))]
    figures, errors = compare_measure.held_out_figures(examples, [[-1, -4], [-2, -4.5]], [[-3, -3], [-3, -6]])
    assert figures == {
        "logps/chosen": -1.5,
        "change/chosen": 1.5,
        "log_ratio/chosen": 1.0,
        "logps/rejected": -4.25,
        "change/rejected": 0.25,
        "log_ratio/rejected": -0.25,
        "margin": 1.25,  # of 3 and -0.5
        "accuracy": 0.5,
        "accuracy_per_token": 1.0,
    }
    assert errors["change/chosen"] == pytest.approx(0.5)  # 2 and 1: deviation 0.5 ** 0.5, over 2 ** 0.5
    assert errors["accuracy"] == pytest.approx(0.75**0.5 / 3)  # of 1 and 0: as with half a trial more on each side
    assert errors["accuracy_per_token"] == pytest.approx(1 / 6)  # of 1 and 1: not 0
    alone = [Example((1,), ((1, 1),), (1,)), Example((2,), ((1,),), (-1,))]
    figures, errors = compare_measure.held_out_figures(alone, [[-1], [-4]], [[-3], [-3]])
    assert figures["margin"] == 3 and "accuracy" not in figures and errors["change/chosen"] is None


def test_rows_over_seeds() -> None:
    def run(seed: int, kl: float, diverged: str | None = None) -> dict[str, Any]:
        result: dict[str, Any] = {"loss": "lsif", "seed": seed, "learning_rate": 1e-4, "diverged": diverged}
        measured = {"figures": {"kl": kl}, "errors": {"kl": kl / 10}, "seconds": 1.0, "peak_memory_mb": 2.0}
        return result | ({} if diverged else measured)

    (made,) = compare_table.make_rows([run(0, 1.0), run(1, 3.0), run(2, 9.0, "step 5: loss nan")])
    assert made["figures"]["kl"] == {"mean": 2.0, "std": pytest.approx(2**0.5), "error": pytest.approx(0.2)}
    assert compare_table.label(made) == "lsif (diverged: seed 2: step 5)"
    assert compare_table.cell(made, "kl", "+.2f") == "+2.00 ± 1.41"
    (single,) = compare_table.make_rows([run(0, 1.0)])
    assert compare_table.cell(single, "kl", "+.2f") == "+1.00 ± 0.10"
    assert compare_table.cell(single, "length", ".0f") == "–"


class Stub:
    """A backend whose log-prob of an answer is twice the sum of its tokens, or once with the adapter off."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder, self.factor, self.asked = encoder, 2.0, []

    @contextmanager
    def adapter_off(self) -> Iterator[None]:
        self.factor = 1.0
        yield
        self.factor = 2.0

    def sequence_logps(self, batch: Batch) -> np.ndarray:
        return np.array([self.factor * response.sum() for response in batch.responses])

    def generate(self, prompts: Any, limit: int, ends: Any, seeds: Any) -> list[Generated]:
        self.asked += seeds
        return [Generated([7, 8], ends[0]) if i == 0 else Generated([5] * limit, None) for i in range(len(prompts))]


def test_an_answers_log_ratio_holds_the_end_token_that_was_drawn(tiny: str, tmp_path: Path) -> None:
    """f of an answer is then the sum of its tokens, by `Stub`; the reference's answers have none."""
    stub: Any = Stub(Encoder(load_tokenizer(tiny)))
    stub.backend = stub
    data = write_pairs(tmp_path / "pairs.jsonl", 3)
    probe = compare_measure.Probe(stub, config(eval_data=str(data)), 3, 4)
    (end,) = probe.ends
    answers = probe.answers(tmp_path / "samples.jsonl", 0)
    assert [answer["log_ratio"] for answer in answers] == [15 + end, 20, 20]
    assert [(answer["tokens"], answer["ended"]) for answer in answers] == [(2, True), (4, False), (4, False)]
    assert len(set(stub.asked)) == 3  # a draw of its own for every prompt
    assert [answer["log_ratio"] for answer in probe.answers(tmp_path / "reference.jsonl", 0, reference=True)] == [None] * 3
    assert stub.factor == 2


def test_constants_go_to_the_losses_that_have_them() -> None:
    given = {"simpo_gamma": "0.5", "beta": "2", "log_ratio_cap": "3", "lora_r": "1", "bpo_lambda": None}
    mine = {loss: compare_settings.of_loss(given, loss, ["lsif", "simpo", "slic"]) for loss in ("lsif", "simpo", "slic")}
    assert mine["lsif"].keys() == {"beta", "log_ratio_cap", "lora_r", "bpo_lambda"}
    assert mine["simpo"].keys() == {"beta", "simpo_gamma", "lora_r", "bpo_lambda"}
    assert mine["slic"].keys() == {"lora_r", "bpo_lambda"}


@pytest.mark.parametrize("form", ["unpaired", "demonstrations"])
def test_rows_of_other_forms_too(form: str, tmp_path: Path) -> None:
    label = {"label": False} if form == "unpaired" else {}
    line = {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}], **label}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(line) + "\n")
    assert "".join(map(compare_settings.as_json, read_rows(str(path)))) == path.read_text()


def test_rows_are_written_as_they_were_read(tmp_path: Path) -> None:
    lines = [
        json.dumps({"prompt": "a\u2028b", "chosen": " c\n", "rejected": "d"}, ensure_ascii=False),
        json.dumps({"prompt": "é", "chosen": "e", "rejected": "</f>"}, ensure_ascii=False),
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert "".join(map(compare_settings.as_json, read_rows(str(path)))) == path.read_text(encoding="utf-8")


def test_options_of_a_config_file_are_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "options.yaml"
    path.write_text("seed: 3\nmax_steps: 16\n")
    data = str(write_pairs(tmp_path / "pairs.jsonl", 300))
    argv = ["--config", str(path), "--losses", "lsif", "--data", data, "--output", str(tmp_path / "out")]
    _, commands = command_line.parsers()
    args = commands["compare"].parse_args(argv)
    args.argv = ["compare", *argv]
    made = compare.settled(args, Terminal())
    assert (made.seeds, made.steps, made.configs["lsif"].eval_steps) == ([3], 16, 2)
    assert made.run("lsif", 3) == build(
        {"seed": 3, "max_steps": 16, "eval_steps": 2, "loss": "lsif", "report_samples": 0}
        | {"data": str(tmp_path / "out/data/train.jsonl"), "eval_data": str(tmp_path / "out/data/held_out.jsonl")},
        {"output_dir": str(tmp_path / "out" / "runs" / "lsif-seed3")},
    )
    assert made.again == shlex.join(["lite-dil", "compare", *argv])
    assert "30 of 300 rows" in capsys.readouterr().out


def settled(folder: Path, data: Path, *more: str) -> list[set[str]]:
    """Return the prompts that `lite-dil compare` would train on and hold out; nothing is trained."""
    argv = ["--losses", "lsif", "--data", str(data), "--max-steps", "40", "--output", str(folder), *more]
    args = command_line.parsers()[1]["compare"].parse_args(argv)
    args.argv = argv
    made = compare.settled(args, Terminal()).configs["lsif"]
    assert made.eval_fraction is None and made.eval_data
    return [{str(row.prompt) for row in read_rows(path)} for path in (made.data, made.eval_data)]


def test_no_prompt_is_on_both_sides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also one that differs only in white space around a message, which a chat template may drop."""
    rows = [
        {
            "prompt": [{"role": "user", "content": f"What is {i % 60}?" + " " * (i // 60 % 2)}],
            "chosen": f"{i}.",
            "rejected": "No.",
        }
        for i in range(300)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for more, least, most in (([], 20, 30), (["--eval-fraction", "0.2"], 50, 60)):
        folder = tmp_path / f"out{most}"
        sides = settled(folder, data, *more)
        bare = [{prompt.replace(" '", "'") for prompt in side} for side in sides]
        assert not bare[0] & bare[1] and len(bare[0] | bare[1]) == 60
        held_out = (folder / "data" / "held_out.jsonl").read_text().splitlines()
        assert least <= len(held_out) <= most
    assert main(["--data", str(data), "--eval-fraction", "0"]) == 2
    assert "a comparison measures held-out rows" in capsys.readouterr().err


def test_a_comparison_that_goes_on_keeps_its_parts(tmp_path: Path) -> None:
    """Also one of an earlier version, which held the last rows out: its finished runs were measured on those."""
    data = write_pairs(tmp_path / "pairs.jsonl", 100)
    settled(tmp_path / "out", data)
    lines = data.read_text().splitlines(keepends=True)
    files = {tmp_path / "out/data/train.jsonl": lines[:-20], tmp_path / "out/data/held_out.jsonl": lines[-20:]}
    for path, part in files.items():
        path.write_text("".join(part))
    settled(tmp_path / "out", data)
    assert all(path.read_text() == "".join(part) for path, part in files.items())
