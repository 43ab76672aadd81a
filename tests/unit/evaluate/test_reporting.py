"""What the reader of a report is told: the first line, the figures, the answers, the worst errors."""

from __future__ import annotations

import dataclasses
import json
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markdown_it import MarkdownIt
from sample_reports import HOSTILE, SECRET_PROMPT, SECRET_REASON, examples_of, full_report, judged_by, minimal_report

from guardtrain.errors import DataError
from guardtrain.evaluate.bootstrap import compare, with_intervals
from guardtrain.evaluate.calibration import calibrate_without_rows
from guardtrain.evaluate.reporting.comparison import Comparison, compare_judges
from guardtrain.evaluate.reporting.data import Report, SetReport
from guardtrain.evaluate.reporting.findings import set_warnings, shares_by_source, status, worst_mistakes
from guardtrain.evaluate.reporting.set_sections import MEASURES, RATES
from guardtrain.evaluate.reporting.text import markdown, shortened, visible
from guardtrain.evaluate.reporting.write import model_card_section, write_report
from guardtrain.evaluate.scores import Judged, measures_of
from guardtrain.types import GuardExample, Label, Turn


class Page(HTMLParser):
    """A page as a browser reads it: tags with attributes, rows of cells, and the text outside of style and title."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "br"}:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in {"td", "th"}:
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data
        elif not {"style", "title", "svg"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        """Without tables."""
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def report() -> Report:
    return full_report()


@pytest.fixture(scope="module")
def folder(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "new" / "folder"
    write_report(report, folder)
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tree(folder: Path) -> Any:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def lines(folder: Path) -> list[str]:
    return (folder / "report.md").read_text(encoding="utf-8").splitlines()


def cells_of(line: str) -> list[str]:
    return [" ".join(unescape(cell).split()) for cell in line.strip("| ").split(" | ")]


def expected_rows(each: SetReport) -> list[list[str]]:
    """The table of a set, from measures that are taken anew."""
    rows = []
    for key, title in MEASURES.items():
        row = [title]
        for judged in each.judges.values():
            measures = with_intervals(judged)
            value, ends = getattr(measures, key), measures.intervals.get(key)
            if value is None:
                row.append("–")
            elif key in RATES:
                assert ends
                row.append(f"{100 * value:.1f} % ({100 * ends[0]:.1f} to {100 * ends[1]:.1f})")
            else:
                assert (ends is None) == (key == "ece")
                interval = f" ({ends[0]:.3f} to {ends[1]:.3f})" if ends else ""
                row.append(f"{value:.3f}{interval}".replace("-", "−"))
        rows.append(row)
    return rows


def test_every_format_shows_the_figures_that_were_measured(report: Report, page: Page, tree: Any, lines: list[str]) -> None:
    html_rows = [[" ".join(cell.split()) for cell in row] for row in page.rows]
    md_rows = [cells_of(line) for line in lines if line.startswith("|")]
    card_rows = [cells_of(line) for line in model_card_section(report).splitlines() if line.startswith("|")]
    for each, each_tree in zip(report.sets, tree["sets"], strict=True):
        assert each_tree["name"] == each.name
        for row in expected_rows(each):
            assert row in html_rows
            assert row in md_rows
            assert row in card_rows
        for name, judged in each.judges.items():
            found = each_tree["modes" if name in each.judged else "controls"][name]
            assert found == json.loads(json.dumps(with_intervals(judged).to_json()))


def test_figures_of_a_set_stand_in_the_column_of_their_mode(page: Page, report: Report) -> None:
    header = next(row for row in page.rows if row[0] == "measure")
    assert header[1:] == ["off", "on", "both", "cascade", "TF-IDF + logistic regression", "label-only guard"]
    assert header[1:] == list(report.sets[0].judges)


def test_comparisons_are_those_of_the_bootstrap(report: Report, tree: Any, page: Page) -> None:
    first = report.sets[0]
    expected = compare(first.judged["both"], first.judged["off"])["recall_at_1_fpr"]
    found = tree["reasoning"][0]
    assert (found["set"], found["one"], found["other"], found["decided_by"]) == (first.name, "both", "off", "recall_at_1_fpr")
    assert found["differences"]["recall_at_1_fpr"] == json.loads(json.dumps(expected.to_json()))
    row = next(row for row in page.rows if row[:2] == [first.name, "recall at 1 % FPR".replace(" %", "\N{NO-BREAK SPACE}%")])
    low, high = expected.interval
    said = f"{100 * expected.value:+.1f} ({100 * low:+.1f} to {100 * high:+.1f}), p = {expected.p_value:.3f}"
    assert " ".join(row[2].split()) == said.replace("-", "−")
    assert len(tree["against_controls"]) == 2 * len(report.sets)


def told_apart(one_shift: float, other_shift: float, rows: int, own_noise: float, malicious: bool = True) -> Comparison:
    is_malicious_N = (np.arange(rows) % 2 == 0) & malicious
    shared_N, own_N = np.random.default_rng(0).normal(size=(2, rows))
    one, other = (
        Judged(scores_N=shift * is_malicious_N + shared_N + noise * own_N, is_malicious_N=is_malicious_N, threshold=1.0)
        for shift, noise in ((one_shift, own_noise), (other_shift, 0.0))
    )
    return compare_judges("set", ("both", one), ("off", other))


def test_answers_are_plain_and_only_as_sure_as_the_rows_allow() -> None:
    assert told_apart(3.0, 1.0, 2000, 0.3).is_one_better == "yes"
    assert told_apart(1.0, 3.0, 2000, 0.3).is_one_better == "no"
    assert told_apart(1.2, 1.0, 60, 0.5).is_one_better == "unknown"
    assert told_apart(1.0, 1.0, 60, 0.0).is_one_better == "unknown"


def test_of_harmless_rows_the_one_with_fewer_false_alarms_is_better() -> None:
    rows = np.zeros(400, dtype=bool)
    few, many = (Judged(scores_N=np.where(np.arange(400) < alarms, 1.0, -1.0), is_malicious_N=rows) for alarms in (10, 90))
    assert compare_judges("set", ("both", few), ("off", many)).measure == "false_positive_rate"
    assert compare_judges("set", ("both", few), ("off", many)).is_one_better == "yes"
    assert compare_judges("set", ("both", many), ("off", few)).is_one_better == "no"


def test_the_summary_answers_in_words(page: Page, report: Report) -> None:
    assert "At the threshold that this guard will run with (mode both" in page.text
    for question in ("Did reasoning pay?", "Is the guard better than TF-IDF + logistic regression?"):
        assert question in page.text
    paid = [each.set_name for each in report.reasoning if each.is_one_better == "yes"]
    assert f"Did reasoning pay? Reasoning paid ({', '.join(paid)})" in page.text
    pooled = measures_of(report.sets[0].judged["both"])  # the other set of that axis is the calibration set
    assert f"{100 * (pooled.recall or 0):.1f} % of malicious texts" in page.text


def first_lines(report: Report, folder: Path) -> set[str]:
    """The first line of each format, as its reader sees it."""
    write_report(report, folder)
    tree = json.loads((folder / "report.json").read_text())
    html = Page((folder / "report.html").read_text()).text
    md = (folder / "report.md").read_text().splitlines()[0]
    card = model_card_section(report).splitlines()[0]
    assert next(iter(tree)) == "status"
    said = tree["status"]
    assert html.startswith(said)
    return {said, unescape(md).strip("*"), unescape(card).strip("*")}


def test_the_first_line_says_what_thresholds_rest_on(tmp_path: Path) -> None:
    (uncalibrated,) = first_lines(minimal_report(), tmp_path)
    assert uncalibrated.startswith("uncalibrated")
    contextual = calibrate_without_rows({"off": np.array([0.1])})
    (without_data,) = first_lines(minimal_report(calibration=contextual), tmp_path)
    assert without_data.startswith("calibrated without data")


def test_the_first_line_names_the_calibration_set(report: Report, lines: list[str]) -> None:
    said = status(report)
    assert unescape(lines[0]) == f"**{said}**"
    assert said.startswith("calibrated on ")
    assert "held_out.jsonl" in said
    assert "held_out is the calibration set itself" in said
    others = dataclasses.replace(report, sets=[each for each in report.sets if not each.is_calibration_set])
    assert status(others).endswith("no set of this report is the calibration set")


def test_the_headline_leaves_the_calibration_set_out(report: Report, tree: Any) -> None:
    assert tree["axes"]["injection"]["rows"] == len(report.sets[0].examples)
    alone = dataclasses.replace(report, sets=[report.sets[-1]])
    assert alone.pooled["injection"].rows == len(report.sets[-1].examples)


def test_axes_are_pooled_each_by_itself(report: Report) -> None:
    other = dataclasses.replace(report.sets[1], name="more", examples=report.sets[1].examples)
    pooled = dataclasses.replace(report, sets=[report.sets[1], other, report.sets[3]]).pooled
    assert {axis: each.rows for axis, each in pooled.items()} == {"harm": 500, "mixed": 65}
    assert pooled["harm"].recall == pytest.approx(report.pooled["harm"].recall)
    assert pooled["harm"].ece == pytest.approx(report.pooled["harm"].ece)


def test_the_worst_errors_are_the_farthest_beyond_the_threshold() -> None:
    scores_N = np.array([5.0, -4.0, 0.5, 3.0, -9.0, 2.0, np.nan])
    is_malicious_N = np.array([False, True, False, True, False, False, True])
    labels = [Label.MALICIOUS if each else Label.BENIGN for each in is_malicious_N]
    examples = [GuardExample(prompt=(Turn("user", f"text {n}"),), label=each, id=f"row-{n}") for n, each in enumerate(labels)]
    is_parsed_N = np.array([True] * 5 + [False] * 2)  # rows without a verdict are errors of another kind
    judged = Judged(scores_N=scores_N, is_malicious_N=is_malicious_N, threshold=1.0, is_parsed_N=is_parsed_N)
    reasons = [f"reason {n}" for n in range(7)]
    only = SetReport(name="rows", axis="harm", examples=examples, judged={"off": judged}, reasons=reasons)
    found = worst_mistakes(minimal_report(sets=[only]))
    assert [(each.example.id, each.margin, each.reason) for each in found] == [
        ("row-1", 5.0, "reason 1"),
        ("row-0", 4.0, "reason 0"),
    ]


def test_at_most_twenty_errors_of_all_sets_are_shown(report: Report, tree: Any, page: Page) -> None:
    wrong = []
    for each in report.sets:
        judged = each.judged["both"]
        wrong += [abs(judged.scores_N[row] - judged.threshold) for row in np.flatnonzero(~judged.is_correct_N)]
    assert len(wrong) > 20
    assert [error["margin"] for error in tree["worst_errors"]] == pytest.approx(sorted(wrong, reverse=True)[:20], abs=1e-5)
    assert page.text.count("Missed: malicious, not flagged") + page.text.count("False alarm: harmless, flagged") == 20


def test_a_rate_by_source_counts_what_the_measures_count(report: Report) -> None:
    """Rows without a verdict are wrong, whatever their score."""
    each = report.sets[2]
    for name, measures in each.measures.items():
        shares = [of_class[Label.BENIGN] for of_class in shares_by_source(each, name).values()]
        assert sum(found.count for found in shares) / each.benign == pytest.approx(measures.false_positive_rate)
    assert each.measures["on"].parse_failures == 3


def test_over_refusal_lists_benign_only_sources_and_no_others(tree: Any) -> None:
    found = {(row["set"], row["source"]) for row in tree["over_refusal"]}
    traps = {("agent-injections", "benign tools"), ("harmful-requests", "instructions")}
    assert found == traps | {("trigger-words", "homonyms"), ("trigger-words", "security questions")}


def test_warnings_tell_what_a_figure_rests_on(report: Report) -> None:
    sets = {each.name: " | ".join(set_warnings(each)) for each in report.sets}
    assert "25 benign rows, 300 are needed" in sets["red-team-week"]
    assert "on: no verdict of its own on 3 rows" in sets["agent-injections"]
    assert "thresholds were chosen on these rows" in sets["held_out"]
    assert "benign rows" not in sets["agent-injections"]
    silent = judged_by(list(examples_of({"a": (20, 30)})), "off", 0, None)
    quiet = dataclasses.replace(silent, scores_N=np.full(50, -9.0))
    only = SetReport(name="rows", axis="harm", examples=examples_of({"a": (20, 30)}), judged={"off": quiet})
    said = " | ".join(set_warnings(only))
    assert "no false alarm in 30 rows; the true rate may still be 10.0 % away" in said
    assert "nothing found in 20 rows; the true rate may still be 15.0 % away" in said


def test_contaminated_rows_are_listed_by_id(page: Page, tree: Any) -> None:
    assert ["agent-injections", "tool-0", "exact", "1.000"] in page.rows
    assert tree["sets"][0]["contaminated"][1] == {"id": "tool-1", "kind": "n-gram", "similarity": round(1 / 1.05, 6)}


def test_attacks_are_shown_by_family_and_defence(report: Report, page: Page, tree: Any) -> None:
    assert report.attacks
    rate = report.attacks[3]["evasion"]["encoding"]["evaded"]
    row = next(row for row in page.rows if row[0] == "encoding")
    said = f"{100 * rate['value']:.1f}\N{NO-BREAK SPACE}% {rate['count']} of {rate['of']}"
    assert row[4] == said
    assert tree["attacks"] == json.loads(json.dumps(list(report.attacks)))


def test_the_page_loads_and_runs_nothing(page: Page, folder: Path) -> None:
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in {"href", "src", "xlink:href", "srcset"}:
                assert value, tag
                assert value.startswith("#"), (tag, value)
    styles = re.findall(r"<style>.*?</style>|style=\"[^\"]*\"", (folder / "report.html").read_text(), flags=re.DOTALL)
    assert not [style for style in styles if re.search(r"@import|url\((?!#)|https?:", style)]
    policy = next(attributes["content"] for tag, attributes in page.tags if attributes.get("http-equiv"))
    assert policy
    assert policy.startswith("default-src 'none'")


def test_links_within_the_page_have_one_target(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {str(attributes["href"])[1:] for _, attributes in page.tags if "href" in attributes} <= set(ids)
    assert all("href" in attributes for tag, attributes in page.tags if tag == "use")


def test_a_model_card_has_the_figures_and_nothing_else(report: Report) -> None:
    headings = re.findall(r"^#+ .*", model_card_section(report), flags=re.MULTILINE)
    sets = [f"#### {each.name}" for each in report.sets]
    axes = ["### Prompt injection", "### Harmful requests", "### Mixed sets", "### Over-refusal"]
    assert sorted(headings) == sorted(["## Evaluation", "### Summary", *axes, *sets, "### Costs"])


def test_figures_and_tables_can_be_read_aloud(page: Page) -> None:
    pictures = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(pictures) == 4 + 4 + 2 + 3 + 4 + 1  # four figures a set; less for one class or one source; attacks
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in pictures)
    assert all(attributes["scope"] in {"row", "col"} for tag, attributes in page.tags if tag == "th")
    assert sum(tag == "caption" for tag, _ in page.tags) == sum(tag == "table" for tag, _ in page.tags)


def test_machines_and_cards_get_no_text(report: Report, folder: Path, tmp_path: Path) -> None:
    write_report(report, tmp_path, show_prompts=False)
    html, md = ((tmp_path / name).read_text() for name in ("report.html", "report.md"))
    silent = (html, md, (folder / "report.json").read_text(), model_card_section(report))
    for secret in (SECRET_PROMPT, SECRET_REASON, "alert(1)", "تجاهل"):
        assert not [secret for text in silent if secret in text]
    mistake = worst_mistakes(report)[0]
    assert mistake.example.id in unescape(md)
    assert mistake.example.id in html
    assert SECRET_REASON in (folder / "report.html").read_text()


def hostile_report() -> Report:
    """Hostile in every place that another person writes."""
    prompt = (Turn("user", HOSTILE),)
    examples = [GuardExample(prompt=prompt, label=label, id=HOSTILE, source=f"{HOSTILE}{n}") for n, label in enumerate(Label)]
    wrong = Judged(scores_N=np.array([-1.0, 1.0]), is_malicious_N=np.array([True, False]))
    only = SetReport(
        name=f"$x$ {HOSTILE}", axis="mixed", examples=examples, judged={"off": wrong}, controls={HOSTILE: wrong},
        reasons=[HOSTILE] * 2, licence=HOSTILE, note=HOSTILE,
    )  # fmt: skip
    words = dict.fromkeys(("model", "base_model", "policy", "command"), HOSTILE + "\ud800")
    return minimal_report(sets=[only], notes=[HOSTILE], environment={HOSTILE: {HOSTILE: HOSTILE}}, **words)


def test_hostile_text_is_shown_and_does_nothing_in_html(tmp_path: Path) -> None:
    write_report(hostile_report(), tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in {tag for tag, _ in page.tags}
    assert [tag for tag, _ in page.tags].count("style") == 1
    assert "<script>alert(1)</script>" in page.text
    assert "⟨U+202E⟩reversed⟨U+202C⟩ zero⟨U+200B⟩width ⟨U+0000⟩null ⏎ # heading" in page.text
    assert not [character for character in text if character in "\u202e\u202c\u200b\x00"]


def test_hostile_text_is_shown_and_does_nothing_in_markdown(tmp_path: Path) -> None:
    """By another reader of Markdown, with tables, bare links and raw HTML switched on."""
    write_report(hostile_report(), tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    plain = Path(tmp_path / "plain")
    write_report(minimal_report(), plain)
    for source in (text, model_card_section(hostile_report())):
        tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(source)
        kinds = {token.type for token in tokens} | {child.type for token in tokens for child in token.children or []}
        assert not kinds & {"html_block", "html_inline", "link_open", "image", "code_inline", "fence", "code_block"}
        assert not re.search(r"https?://|www\.", source)
    headings = re.findall(r"^#+ (?=heading)", text, flags=re.MULTILINE)
    assert not headings
    for table in re.findall(r"(?:^\|.*\|\n)+", text, flags=re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1
    shown = "".join(
        child.content for token in MarkdownIt("gfm-like", {"linkify": False}).parse(text) for child in token.children or []
    )
    assert visible(HOSTILE) in shown


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("a\u200bb", "a⟨U+200B⟩b"),
        ("a\u00adb\u00a0c\u3000d", "a⟨U+00AD⟩b⟨U+00A0⟩c⟨U+3000⟩d"),
        ("one\r\ntwo\nthree", "one ⏎ two ⏎ three"),
        ("tab\there\x1b[31m", "tab⟨U+0009⟩here⟨U+001B⟩[31m"),
        ("\U000e0041tag", "⟨U+E0041⟩tag"),
        ("\u3164\u2800\ufe0f", "⟨U+3164⟩⟨U+2800⟩⟨U+FE0F⟩"),
        ("\ud800", "⟨U+D800⟩"),
        ("e\u0301 z" + "\u0336" * 5, "e\u0301 z" + "\u0336" * 3 + "⟨U+0336⟩" * 2),
        ("日本語 ≥ “ok” – fine", "日本語 ≥ “ok” – fine"),
    ],
)
def test_what_does_not_show_is_spelled_out(raw: str, shown: str) -> None:
    assert visible(raw) == shown
    assert visible(shown) == shown


def test_a_long_text_keeps_its_beginning_and_its_end() -> None:
    text = "a" * 250 + "b" * 1000 + "c" * 150
    assert shortened(text) == f"{'a' * 200} […1,100 characters…] {'c' * 100}"
    assert shortened("a" * 300) == "a" * 300


def test_markdown_escapes_read_as_the_text() -> None:
    assert unescape(markdown(HOSTILE)) == visible(HOSTILE)
    assert "|" not in markdown(HOSTILE)
    assert markdown("held_out") == "held_out"
    for text in ("_all_ of __this__", "a_", "*a* _ _b_", "x__y__"):
        (_, inline, _) = MarkdownIt("commonmark").parse(markdown(text))
        assert inline.children
        assert "".join(child.content for child in inline.children) == text
        assert {child.type for child in inline.children} <= {"text", "text_special"}


def test_a_minimal_report_has_no_empty_part(tmp_path: Path) -> None:
    report = minimal_report()
    write_report(report, tmp_path)
    md = (tmp_path / "report.md").read_text()
    assert not re.findall(r"^(#+) .*\n+(?=\1 |\Z)", md, flags=re.MULTILINE)
    for absent in ("Attacks", "Contamination", "Costs", "Did reasoning pay", "None", "nan", "False alarms where"):
        assert absent not in md
    page = Page((tmp_path / "report.html").read_text())
    assert all("".join(row).strip() for row in page.rows)
    assert json.loads((tmp_path / "report.json").read_text())["attacks"] is None


def test_a_set_of_one_class_has_dashes(report: Report, page: Page) -> None:
    assert ["AUROC", *["–"] * 6] in page.rows
    assert ["recall at 1\N{NO-BREAK SPACE}% FPR", *["–"] * 6] in page.rows


def test_parts_of_other_rows_are_refused(report: Report) -> None:
    first = report.sets[0]
    for change, words in (
        ({"examples": first.examples[1:]}, "did not judge the examples"),
        ({"reasons": ["one"]}, "reasons of other rows"),
        ({"controls": {"off": first.judged["off"]}}, "named like a mode"),
        ({"judged": {}}, "nothing was judged"),
    ):
        with pytest.raises(DataError, match=words):
            dataclasses.replace(first, **change)


def test_a_report_has_one_mode_and_one_threshold(report: Report) -> None:
    only = minimal_report().sets[0]
    moved = dataclasses.replace(only, name="other", judged={"off": dataclasses.replace(only.judged["off"], threshold=1.0)})
    for sets, words in (([only, moved], "several thresholds"), ([only, only], "two sets of one name"), ([], "nothing to report")):
        with pytest.raises(DataError, match=words):
            minimal_report(sets=sets)
    with pytest.raises(DataError, match="without the mode"):
        minimal_report(mode="both")
