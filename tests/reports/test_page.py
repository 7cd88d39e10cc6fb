"""report.html as text: whole for every objective, however short, long or broken the run; its sentences from known figures."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jinja2 import UndefinedError
from reported import HOSTILE, make_run

from lite_dil.objectives.table import OBJECTIVES
from lite_dil.reports import charts, html
from lite_dil.reports.outcome import outcome, warnings, what
from lite_dil.reports.page import render
from lite_dil.reports.pairs import PAIRS, HeldOutPairs, beginning, by_length, end, page_of, write_pairs
from lite_dil.reports.record import SAMPLES, read_record
from lite_dil.reports.run_report import write_report
from lite_dil.reports.samples import read_samples, write_samples
from lite_dil.runs.history import POINTS, MetricColumns, read_history

FINE = 'class="note good"'  # what stands in the place of warnings
VOID = {"meta", "br", "path", "use", "rect"}


class Tags(HTMLParser):
    """Which tags there are, whether each is closed, and the charts' spoken figures."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.spoken: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen |= {tag, *(name for name, _ in attrs)}
        self.spoken += [value or "" for name, value in attrs if name == "aria-label"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("loss", list(OBJECTIVES))
def test_every_objective_has_its_page(loss: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if loss in ("lsif", "dpo", "kto", "sft"):  # of each form of data, and in nats per token and per response
        request.getfixturevalue("drawn")
    form = {"chosen": "demonstrations", "pairs": "pairs", "sides": "unpaired"}[OBJECTIVES[loss].data]
    page = Tags(make_run(tmp_path, loss=loss, form=form))
    assert not page.open
    titles = {spoken.partition(".")[0].partition(" (")[0] for spoken in page.spoken}
    wanted = {"Loss", "Log-ratio to the reference, by side", "Log-prob of the responses, by side", "Learning rate", "Speed"}
    assert titles >= wanted | {"Gradient norm before clipping", "Peak memory so far"}
    assert any("Accuracy" in title for title in titles) == (form == "pairs")
    assert any("Margin" in title for title in titles) == (form != "demonstrations")
    assert "nan" not in page.text.lower().split()


@pytest.mark.usefixtures("drawn")
def test_a_run_of_one_step_and_one_that_logged_nothing(tmp_path: Path) -> None:
    page = Tags(make_run(tmp_path / "one", steps=1, eval_steps=None, samples=0))
    assert "0.5 at step 1" in page.spoken[0]
    assert "no held-out data" in page.text
    assert "last training pairs" not in page.text  # a new adapter changes nothing yet
    page = Tags(make_run(tmp_path / "none", steps=0, eval_steps=None, samples=0))
    assert "No step" in page.text
    assert not page.spoken


@pytest.mark.usefixtures("drawn")
def test_what_was_not_finite_is_a_gap(tmp_path: Path) -> None:
    def broken(line: dict[str, Any]) -> None:
        if line["step"] in (9, 10):
            for name in line.keys() - {"step"}:
                line[name] = None
        if line["step"] == 12 and "loss" in line:
            line["loss"] = 1e300

    whole, gap = make_run(tmp_path / "whole"), make_run(tmp_path / "gap", change=broken)
    assert Tags(gap).text.count("not finite") > 5
    paths = [re.findall(r' d="([^"]*)"', page[page.index("<figure>") : page.index("</figure>")]) for page in (whole, gap)]
    moves = [max(path.count("M ") for path in found) for found in paths]
    assert moves == [1, 3]  # a pen that is lifted twice
    assert "1e+300" not in gap


@pytest.mark.usefixtures("drawn")
def test_a_long_run_stays_small(tmp_path: Path) -> None:
    page = make_run(tmp_path, steps=5000, eval_steps=10)
    assert len(page) < 400_000
    assert re.search(r"\b13\b.* of 500 evaluations", page)
    assert (" 21 lines" in page, " lines, " in make_run(tmp_path / "short")) == (True, False)


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([-191.02, -191.0, -190.98], ["\u2212191.02", "\u2212191.00", "\u2212190.98"]),
        ([0.0, 0.25, 0.5], ["0.00", "0.25", "0.50"]),
        ([0.0, 5e-5, 1e-4], ["0", "5e\u22125", "1e\u22124"]),
        ([0.0, 2500.0, 5000.0], ["0", "2500", "5000"]),
        ([-2.5e6, 0.0, 2.5e6], ["\u22122.5e6", "0", "2.5e6"]),
        ([0.0], ["0"]),
        ([], []),
    ],
)
def test_each_label_of_an_axis_is_a_whole_number(values: list[float], labels: list[str]) -> None:
    assert charts.tick_labels(values) == labels


@pytest.mark.usefixtures("drawn")
def test_no_axis_is_the_rest_over_an_offset(tmp_path: Path) -> None:
    page = make_run(
        tmp_path, eval_steps=None, change=set_line(logps__chosen=lambda step: -191 - step / 1e5, logps__rejected=-191)
    )
    (chart,) = (part for part in page.split("<figure>") if part.startswith("<figcaption>Log-prob"))
    assert len(re.findall(">\u2212191\\.0\\d+<", chart)) >= 3 and "e2<" not in chart


def test_a_curve_of_many_lines_is_their_means() -> None:
    columns = MetricColumns()
    for step in range(1, 2 * POINTS + 2):
        columns.add({"step": step, "a": None if step in (1, 3, 4) else step, **({"late": 1.0} if step > 9 else {})})
    curve = columns.curve("a")
    assert curve.bin == 3
    np.testing.assert_array_equal(curve.steps[:3], [3, 6, 9])
    np.testing.assert_array_equal(curve.values[:3], [2, 5.5, 8])
    assert curve.steps[-1] == 2 * POINTS + 1
    assert np.isnan(columns.curve("late").values[:3]).all()
    assert columns.curve("late").values[-1] == 1
    assert columns.last("a") == 2 * POINTS + 1


def test_half_a_line_at_the_end_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "eval_loss": null}\n{"step": 3, "lo')
    history = read_history(path)
    assert (history.train.number, history.held_out.number, history.step) == (1, 1, 2)
    assert history.held_out.last("eval_loss") is None


def test_the_accuracy_comes_with_its_uncertainty(tmp_path: Path) -> None:
    assert FINE in make_run(tmp_path)
    text = outcome(read_record(tmp_path))
    error = math.sqrt(0.9 * 0.1 / 100)
    assert re.search(rf"90\.0% of 100 held-out pairs .*\b{error:.1%}", text)
    assert re.search(r"more likely by 0\.4 nats.*less likely by 0\.2 nats", text)
    assert warnings(read_record(tmp_path)) == []


def set_line(**values: float) -> Any:
    """Return what overwrites figures of every line that has them; a number of the step may be given as a function."""

    def change(line: dict[str, Any]) -> None:
        for name, value in values.items():
            name = name.replace("__", "/")
            if name in line:
                line[name] = value(line["step"]) if callable(value) else value

    return change


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"change": set_line(eval_log_ratio__chosen=-0.3)}, "chosen responses less probability"),
        ({"change": set_line(log_ratio__chosen=-0.3), "eval_steps": None}, "-0.3 nats per token (last training steps)"),
        ({"change": set_line(eval_log_ratio__chosen=-1), "loss": "dpo", "form": "pairs"}, "-1 nats per response (held out)"),
        ({"change": set_line(log_ratio__chosen=-1), "eval_steps": None, "loss": "sft"}, "gives the good responses less"),
        (
            {"change": set_line(eval_rewards__accuracies=0.57)},
            "chance: 57.0% of 100 pairs, where chance reaches 60.0%",
        ),
        (
            {"change": set_line(eval_rewards__accuracies=1), "held_out": 3},
            "chance: 100.0% of 3 pairs",
        ),
        ({"change": set_line(eval_loss=lambda step: abs(step - 10) / 40)}, "best at step 10 (0) and has risen to 0.25"),
        (
            {"change": set_line(rewards__accuracies=1, eval_rewards__accuracies=0.7)},
            "differ: 100.0% of the last training pairs against 70.0%",
        ),
        ({"change": set_line(skipped_steps=1)}, "20 of 20 steps were skipped"),
        ({"eval_steps": None}, "There is no held-out data"),
        ({"facts": {"data": []}, "eval_steps": None}, "There is no held-out data"),
    ],
)
def test_a_warning_where_there_is_reason(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    page = make_run(tmp_path, **options)
    assert said in Tags(page).text
    assert said in " ".join(warnings(read_record(tmp_path)))
    assert FINE not in page


@pytest.mark.parametrize("loss", list(OBJECTIVES))
@pytest.mark.parametrize("form", ["pairs", "unpaired", "demonstrations"])
def test_the_advice_for_falling_chosen_answers_is_what_was_measured(loss: str, form: str, tmp_path: Path) -> None:
    """docs/results.md: cpo, slic and sft raised the chosen responses' likelihood, and every other loss lowered it."""
    make_run(tmp_path, loss=loss, form=form, change=set_line(eval_log_ratio__chosen=-1))
    (text,) = (text for text in warnings(read_record(tmp_path)) if "less probability" in text)
    said = text.partition("fewer --epochs")[2]
    named = set(re.findall(r"[a-z-]+", said)) & set(OBJECTIVES)
    own = {"cpo": "--cpo-lambda", "slic": "--slic-lambda"}
    if loss in own:
        assert f"a higher {own[loss]}" in said
    elif loss in ("sft", "sft-occupancy"):
        assert said == "."
    else:
        assert named == ({"sft"} if form == "unpaired" else {"cpo", "slic", "sft"})


def test_what_max_length_cuts_is_said(tmp_path: Path) -> None:
    make_run(tmp_path)
    record = read_record(tmp_path)
    assert not any("--max-length cut" in text for text in warnings(record))
    record.facts["data"][0]["prompts_cut"] = 60
    assert any("--max-length cut 60 prompts" in text for text in warnings(record))


def test_a_sample_prompt_that_was_cut_says_so(tmp_path: Path) -> None:
    blocks = make_run(tmp_path, max_length=900, samples=2).split('<div class="sample">')[-2:]
    said = "cut at its start by --max-length 900: the model saw 1,011 of the prompt&#39;s 1,012 tokens"
    assert [said in block for block in blocks] == [False, True]
    assert blocks[1].index(said) < blocks[1].index("before, 20 tokens")
    path = tmp_path / "report_samples.jsonl"  # of an earlier version, which did not count
    path.write_text(re.sub(r', "(prompt_(tokens|seen)": \d+|digest": "\w+")', "", path.read_text()))
    assert len(read_record(tmp_path).samples) == 2
    assert "the model saw" not in write_report(tmp_path).read_text()


@pytest.mark.parametrize(
    ("rows", "prompts", "shared", "little"),
    [
        (0, 0, "", ""),
        (
            12,
            17,
            "12 of 100 held-out rows are training rows too (the same prompt and responses), 5 more have the prompt",
            "less",
        ),
        (1, 2, "1 of 100 held-out rows is a training row too (the same prompt and responses), 1 more has the prompt", "less"),
        (100, 100, "100 of 100 held-out rows are training rows too (the same prompt and responses)", "nothing"),
        (0, 3, "3 of 100 held-out rows have the prompt of a training row, but not all its responses", "less"),
    ],
)
def test_held_out_rows_that_were_trained_on(rows: int, prompts: int, shared: str, little: str, tmp_path: Path) -> None:
    page = Tags(make_run(tmp_path))
    record = read_record(tmp_path)
    assert warnings(record) == [] and "training row" not in outcome(record) + page.text
    record.facts["data"][1]["in_training"] = {"of": 100, "rows": rows, "prompts": prompts}
    told = warnings(record)
    assert len(told) == bool(shared) and all(text.startswith(shared) for text in told)
    assert all(f"say {little} about new prompts" in text for text in told)
    assert not shared or shared in outcome(record)
    assert ("none of these prompts" in render(record)) == (not shared)


def test_several_rejected_answers_a_prompt_are_not_more_prompts(tmp_path: Path) -> None:
    make_run(tmp_path, form="demonstrations", sample_rejected=4)
    record = read_record(tmp_path)
    assert record.accuracy is None  # the file has none of demonstrations
    make_run(tmp_path, sample_rejected=4)
    assert read_record(tmp_path).accuracy == pytest.approx((0.9, math.sqrt(100 * 0.9 * 0.1 + 0.25) / 101, 400))
    assert "400 held-out pairs" in outcome(read_record(tmp_path))


def test_a_run_that_goes_on_from_an_adapter_says_so(tmp_path: Path) -> None:
    make_run(tmp_path, init_adapter="sft/adapter", reference="initial-adapter")
    assert " from sft/adapter" in what(read_record(tmp_path))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loss": "lsif"}, "rejected responses of similar lengths."),
        ({"loss": "dpo"}, "rejected responses of similar lengths, or --logp-reduction mean."),
        ({"loss": "sft-occupancy", "form": "demonstrations"}, "shorter chosen responses"),
    ],
)
def test_the_advice_for_longer_answers_can_be_taken(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    from lite_dil.reports.samples import Sample, read_samples, write_samples

    make_run(tmp_path, **options)
    path = tmp_path / "report_samples.jsonl"
    write_samples(path, [Sample(**{**vars(sample), "after_tokens": 99}) for sample in read_samples(path)])
    (text,) = (text for text in warnings(read_record(tmp_path)) if "longer" in text)
    assert said in text


def test_longer_answers_are_said(tmp_path: Path) -> None:
    from lite_dil.reports.samples import Sample, read_samples, write_samples

    make_run(tmp_path)
    assert not any("longer" in text for text in warnings(read_record(tmp_path)))  # 20 tokens before, 30 after
    path = tmp_path / "report_samples.jsonl"
    write_samples(path, [Sample(**{**vars(sample), "after_tokens": 31}) for sample in read_samples(path)])
    assert any(re.search(r"longer: 20 .*\b31\b", text) for text in warnings(read_record(tmp_path)))


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("running", "in progress: 20 of 20 steps"),
        ("interrupted", "Ctrl-C after 20 of 20 steps"),
        ("stopped", "was stopped after 20 of 20 steps"),
        ("diverged", "diverged after 20 of 20 steps: why &amp; so"),
        ("failed", "ended with an error after 20 of 20 steps: why &amp; so"),
    ],
)
def test_how_the_run_ended_is_said(state: str, said: str, tmp_path: Path) -> None:
    page = make_run(tmp_path, facts={"state": state, "why": "why & so"})
    assert said in page
    assert FINE not in page


@pytest.mark.usefixtures("drawn")
def test_everything_from_outside_is_escaped(tmp_path: Path) -> None:
    page = make_run(tmp_path, text=HOSTILE)
    tags = Tags(page)
    assert not tags.open
    assert not {"script", "img", "onerror", "link", "iframe", "href"} & tags.seen
    assert page.count("</style>") == page.count("</title>") == 1
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", page)
    assert tags.text.count("<script>window.hit=1</script>") > 20  # as text
    assert "\\x00\\x1b[31m\\x85 \\ud800 https:" in tags.text  # three controls and half a pair


def test_templates_vouch_for_no_text() -> None:
    """No filter lifts the escaping, one function makes markup, and a name that is missing ends the page."""
    folder = Path(html.__file__).parent
    for path in (folder / "templates").iterdir():
        assert not re.search(r"\bsafe\b|autoescape", path.read_text(encoding="utf-8")), path
    sources = chain(folder.parent.rglob("*.py"), (folder.parents[1] / "scripts").rglob("*.py"))
    assert [path.name for path in sources if "Markup(" in path.read_text(encoding="utf-8")] == ["charts.py"]
    with pytest.raises(UndefinedError, match="name"):
        html.render("report.html")


@pytest.mark.usefixtures("drawn")
def test_the_page_holds_no_address_but_names(tmp_path: Path) -> None:
    page = make_run(tmp_path)
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "default-src 'none'" in page


def test_options_that_differ_from_the_defaults_come_first(tmp_path: Path) -> None:
    page = make_run(tmp_path, learning_rate=3e-3)
    first, rest = page[page.index("<h2>Options</h2>") :].split("<details>")
    assert "--learning-rate" in first and "0.003" in first
    assert "--weight-decay" not in first and "--weight-decay" in rest
    assert "--beta" not in first  # the loss's own default


def test_headings_go_down_a_level_at_a_time(tmp_path: Path) -> None:
    page = make_run(tmp_path)
    levels = [int(level) for level in re.findall(r"<h([1-6])\b", page)]
    assert levels[0] == 1 and levels.count(1) == 1 and {2, 3} <= set(levels)
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_what_changed_is_marked_on_its_own_side(tmp_path: Path) -> None:
    make_run(tmp_path)
    path = tmp_path / SAMPLES
    write_samples(path, [replace(sample, before="It is <b>Rome</b>.", after="It is Oslo.") for sample in read_samples(path)])
    page = write_report(tmp_path).read_text()
    assert page.count('dir="auto">It is <del>&lt;b&gt;Rome&lt;/b&gt;</del>.</div>') == 2
    assert page.count('dir="auto">It is <ins>Oslo</ins>.</div>') == 2
    write_samples(path, [replace(sample, before="", after="It is Oslo.") for sample in read_samples(path)])
    page = write_report(tmp_path).read_text()
    assert page.count('dir="auto">(nothing)</div>') == page.count('dir="auto">It is Oslo.</div>') == 2


def held_out(*groups: tuple[int, int, int, int]) -> HeldOutPairs:
    """Pairs in groups of a number, how many of them are right, and the lengths of the chosen and the rejected response."""
    right = [i < good for number, good, _, _ in groups for i in range(number)]
    lengths = [(chosen, rejected) for number, _, chosen, rejected in groups for _ in range(number)]
    margins = [1.0 if each else -2.0 for each in right]
    return HeldOutPairs(3, margins, right, [chosen for chosen, _ in lengths], [rejected for _, rejected in lengths], [])


def test_accuracy_by_length_by_hand() -> None:
    """Relative differences -0.5, 0, 0.1 and 0.9: of the two in the middle 3 of 8 pairs are right."""
    found = held_out((4, 1, 10, 20), (4, 3, 10, 10), (4, 0, 10, 9), (10, 10, 100, 10))
    shares = by_length(found)
    assert [(share.name, share.pairs, share.accuracy, share.margin) for share in shares] == [
        ("shorter by more than a third", 4, 0.25, -1.25),
        ("about as long, within a tenth", 8, 0.375, -0.875),
        ("longer by more than a third", 10, 1.0, 1.0),
    ]
    assert [row[2] for row in page_of(found)["rows"]] == ["25.0% ±\u00a020.0%", "37.5% ±\u00a016.2%", "100.0% ±\u00a04.5%"]


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ([(60, 57, 20, 10), (40, 20, 10, 20)], "95.0% of the 60 held-out pairs whose chosen response is the longer one"),
        ([(60, 30, 20, 10), (40, 39, 10, 20)], "97.5% of the 40 held-out pairs whose chosen response is the shorter one"),
        ([(60, 57, 20, 10), (9, 0, 10, 20)], ""),  # too few
        ([(12, 12, 20, 10), (12, 9, 10, 20)], ""),  # 25 points, which is 1.9 standard errors
        ([(2000, 1800, 20, 10), (2000, 1600, 10, 20)], ""),  # 10 points, though far beyond the error
        ([(60, 57, 20, 10), (60, 20, 10, 10), (40, 38, 10, 20)], ""),  # wrong only where both are as long
    ],
)
def test_a_policy_that_goes_by_length_is_told(groups: list[tuple[int, int, int, int]], said: str, tmp_path: Path) -> None:
    make_run(tmp_path)
    write_pairs(tmp_path / PAIRS, held_out(*groups))
    told = [text for text in warnings(read_record(tmp_path)) if "go by length" in text]
    assert len(told) == bool(said) and all(said in text for text in told)


def test_the_pairs_that_are_wrong_are_shown_and_old_runs_have_none(tmp_path: Path) -> None:
    page = make_run(tmp_path, text="a <b> c")
    assert "10 of 100, the worst first." in page and page.count("margin -0.5, a &lt;b&gt; c") == 10
    assert "Margins of 100 held-out pairs. Between -0.5 and 8.5, median 4; 10 not above 0." in page
    assert "rejected, 15 tokens, log-ratio +0.2" in page
    (tmp_path / PAIRS).write_text('{"step": 1}')
    assert "Held-out pairs" not in write_report(tmp_path).read_text()
    (tmp_path / PAIRS).unlink()
    assert "Held-out pairs" not in write_report(tmp_path).read_text()
    assert "Held-out pairs" not in make_run(tmp_path / "unpaired", loss="kto", form="unpaired")


@pytest.mark.parametrize(
    "values", [[0.0], [1.0], [-1.0, 2.0], [0.0, 3.0], [-0.1, 0.0], [-3e-7, 1e5], [0.1 * i - 0.7 for i in range(24)]]
)
def test_no_margin_is_lost_in_the_chart(values: list[float]) -> None:
    edges, counts = charts.bins(np.array(values))
    assert 0.0 in edges and counts.sum() == len(values)
    assert counts[edges[1:] <= 0].sum() == sum(value <= 0 for value in values)


def test_a_cut_text_says_so() -> None:
    assert (beginning("a" * 700), end("a" * 699 + "?")) == ("a" * 600 + "…", "…" + "a" * 599 + "?")
    assert beginning("a" * 600) == end("a" * 600) == "a" * 600
