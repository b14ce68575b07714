import dataclasses
import json
import re
from functools import cache
from html.parser import HTMLParser

import pytest

from iapt_export.contract.errors import BundleError
from tests.validation.fake_report import failing_report, located_report, onnxruntime_target, passing_report, token_rows
from validation.judging.result import Check
from validation.reporting.report import (
    format_figure,
    format_value,
    headline,
    heat_map,
    read_report,
    render_html,
    target_plots,
    write_report,
)

HOSTILE = '<script>alert(1)</script> & "quotes" </pre><img src=x onerror=alert(2)> {{ 7 * 7 }}'


class Page(HTMLParser):
    """Collects what a browser would load, run, or show."""

    VOID = ("meta", "br", "img", "link", "input", "hr")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.ids: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data


@cache
def page_of(verdict):
    """The two pages that most tests look at, drawn once."""
    return render_html({"pass": passing_report, "fail": failing_report}[verdict]())


def with_prompt(text):
    row = dataclasses.replace(token_rows({})[0], prompt=text, reference_text=text, target_text=text, tenant=text)
    target = dataclasses.replace(onnxruntime_target(), tokens=[row], reason=text, name=text)
    return dataclasses.replace(passing_report(), targets=[target], bundle=text, command=text)


def located_report_without_nan():
    report = located_report()
    target = report.targets[0]
    checks = [check for check in target.checks if check.passed]
    return dataclasses.replace(
        report, targets=[dataclasses.replace(target, checks=checks, by_step=[1e-5, float("inf")])]
    )


@pytest.mark.parametrize(
    "report", [passing_report(), located_report_without_nan(), with_prompt("naïve 日本語 \U0001f600 </script>")]
)
def test_reading_gives_what_was_written(report, tmp_path):
    page = write_report(report, tmp_path / "new" / "folder")
    assert page.name == "report.html"
    assert read_report(page.parent) == report
    assert read_report(page.parent / "report.json") == report


def test_figures_that_are_not_finite_survive_as_strict_json(tmp_path):
    write_report(failing_report(), tmp_path)
    text = (tmp_path / "report.json").read_text(encoding="utf-8")
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    again = read_report(tmp_path)
    assert repr(again) == repr(failing_report())  # NaN differs from itself, its text does not


def test_equal_reports_give_equal_bytes(tmp_path):
    for folder in ("first", "second"):
        write_report(failing_report(), tmp_path / folder)
    for name in ("report.json", "report.html"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "first").iterdir()) == ["report.html", "report.json"]


def test_untrusted_text_is_shown_but_never_run():
    html = render_html(with_prompt(HOSTILE))
    page = Page(html)
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert "49" not in re.findall(r"quotes.{0,40}", html)
    assert page.text.count(HOSTILE) >= 4


def test_text_that_utf8_cannot_hold_is_replaced(tmp_path):
    write_report(with_prompt("half a pair: \ud83d"), tmp_path)
    assert "half a pair: ?" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("verdict", ["pass", "fail"])
def test_page_is_well_formed_and_loads_nothing(verdict):
    html = page_of(verdict)
    page = Page(html)
    assert page.open == []
    assert not {"script", "link", "iframe", "object", "embed", "img"} & set(page.tags)
    loaded = [value for _, name, value in page.attributes if name in ("src", "href", "xlink:href", "data", "srcset")]
    assert all(value.startswith("#") for value in loaded), loaded
    assert "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))
    assert len(page.ids) == len(set(page.ids))


def test_verdict_and_its_reasons_are_on_the_page():
    good, bad = Page(page_of("pass")), Page(page_of("fail"))
    assert "PASS" in good.text
    assert "FAIL" not in good.text
    assert "FAIL" in bad.text
    assert "2 checks did not hold" in bad.text
    assert "keys, worst in layer 17" in bad.text
    assert "not finite" in bad.text
    checks = bad.text[bad.text.index("Measured / limit") :]
    assert checks.index("prefill cache") < checks.index("generator")  # what failed stands first
    for text in ("checked, not run", "no NVIDIA GPU", "Tolerances, and why", "summation order differs", "2.13.0"):
        assert text in good.text
    assert passing_report().command in good.text


def test_divergences_are_open_and_say_what_differs():
    html = page_of("fail")
    assert html.count("<details open>") == 3
    text = Page(html).text
    assert "First difference at step 17: PyTorch chose token 115, onnxruntime chose token 7" in text
    assert "led by 3.2, more than the tolerance" in text
    assert "led by 2.1e-5, less than the tolerance: excused" in text


def test_a_row_that_ended_early_is_no_error():
    row = dataclasses.replace(token_rows({0: (2, 0.5, False)})[0], target=[3524, 2731])
    report = dataclasses.replace(
        passing_report(), targets=[dataclasses.replace(onnxruntime_target(), tokens=[row], name="early")]
    )
    assert "early had stopped" in Page(render_html(report)).text


def test_every_plot_is_there_and_only_where_there_are_figures():
    ran, checked = passing_report().targets
    drawn = target_plots(ran)
    titles = ["Error per layer", "Error per step", "Distribution of the error", "Token agreement"]
    assert [plot.title for plot in drawn] == titles
    assert target_plots(checked) == []
    layers, steps, histogram, tokens = (plot.svg for plot in drawn)
    assert all(f">{word}</text>" in layers for word in ("prompt", "key", "value", "layer"))
    assert "limit of keys and values" in layers
    assert ">worst relative error</text>" in steps
    assert ">1e-6</text>" in histogram
    assert "excused tie" in tokens
    assert "differs" not in tokens


def test_the_limit_of_each_step_is_drawn_where_there_is_one():
    check = Check("decode logits", "any", True, {"relative": 1e-5}, {"relative": 1e-3})
    for checks, drawn in (([check], True), ([dataclasses.replace(check, limits={})], False)):
        steps = target_plots(dataclasses.replace(onnxruntime_target(), checks=checks))[1]
        assert ("limit of decode logits" in steps.svg) == drawn


def test_plots_take_the_page_colours():
    for plot in target_plots(failing_report().targets[0]):
        assert "var(--muted)" in plot.svg
        assert not re.search(r"#0[0-9a-f]0[0-9a-f]0[0-9a-f]\b", plot.svg)
        assert not re.search(r"<svg[^>]* (width|height)=", plot.svg)


def test_identical_outputs_plot_without_a_logarithm_of_zero():
    target = dataclasses.replace(onnxruntime_target(), checks=[], by_step=[0.0] * 65, by_layer={"key": [0.0] * 30})
    layers, steps, _, _ = target_plots(target)
    assert ">1e-9</text>" in steps.svg
    assert ">key</text>" in layers.svg


def test_empty_ends_of_the_histogram_are_left_out():
    histogram = {"edges": [-9.0, -8.0, -7.0, -6.0, -5.0], "counts": [0.0, 3.0, 4.0, 0.0]}
    drawn = target_plots(dataclasses.replace(onnxruntime_target(), histogram=histogram))[2].svg
    assert ">1e-7</text>" in drawn
    assert ">1e-9</text>" not in drawn
    nothing = {"edges": [-9.0, -8.0], "counts": [0.0]}
    assert target_plots(dataclasses.replace(onnxruntime_target(), histogram=nothing))


def test_noise_within_one_power_of_ten_still_has_a_labelled_axis():
    steps = target_plots(dataclasses.replace(onnxruntime_target(), by_step=[3e-5, 4e-5, 2e-5]))[1]
    assert len(re.findall(r">1e-\d</text>", steps.svg)) >= 3


def test_headline_names_what_was_not_run():
    assert "1 target could not be run" in headline(passing_report())
    checked = dataclasses.replace(passing_report(), targets=passing_report().targets[1:])
    assert headline(checked).startswith("Nothing could be run here")


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (24, "24"),
        (3.14e-6, "3.1e-6"),
        (1e-3, "1e-3"),
        (0.25, "0.25"),
        (0.99999999, "1-1e-8"),
        (1.5e7, "1.5e7"),
    ],
)
def test_figures_read_well(number, text):
    assert format_figure(number) == text


def test_table_cells_read_well():
    assert format_value({"max_abs": 1e-3, "layers": [1, 2], "exact": True}) == "max_abs 1e-3, layers 1, 2, exact True"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist; 'iapt-export validate' writes it"),
        ("{", "is not JSON"),
        ("[]", "holds a list; expected a JSON object; run"),
        ('{"schema_version": 99}', "schema_version is 99, this version of iapt-export reads 2"),
        ('{"schema_version": 2}', "is not a report: 'targets'"),
        ('{"schema_version": 2, "targets": []}', "is not a report: .*missing"),
        ('{"schema_version": 2, "targets": [3]}', "is not a report"),
    ],
)
def test_damaged_reports_are_refused(content, message, tmp_path):
    if content is not None:
        (tmp_path / "report.json").write_text(content, encoding="utf-8")
    with pytest.raises(BundleError, match=message):
        read_report(tmp_path)


def test_the_first_difference_stands_before_everything_else():
    text = Page(render_html(located_report())).text
    place = text.index("Layer 17, model.layers.17.self_attn.o_proj.input")
    assert text.index("FAIL") < place < text.index("Cases") < text.index("Checks")
    assert "the row's padding is attended to" in text
    assert "Error inside the graph" in text


def test_the_heat_map_shows_how_much_of_each_limit_was_used():
    shown = heat_map(located_report().targets[0])
    cells = {case: dict(zip(shown.stages, row, strict=True)) for case, row in shown.rows}
    assert cells["full-cache"]["decode logits"] == ("near", "80 %")
    assert cells["one-token"]["prefill logits"] == ("under", "<1 %")
    assert cells["one-token"]["generator"] == ("none", "")
    assert cells["batch 8, mixed tenants, left padding"]["prefill cache"] == ("over", "4100×")
    assert cells["batch 1, one row"]["decode logits"] == ("over", "over")
    assert shown.rows[0][0].startswith("batch"), "what failed stands first"


def test_checks_that_hold_or_do_not_show_no_percentage():
    target = onnxruntime_target()
    held = Check("refusal", "refuse-too-long", True, {"refused": 1.0}, {"refused": 1.0}, tenants=["guest"])
    failed = Check("refusal", "refuse-unknown-token", False, {"refused": 0.0}, {"refused": 1.0}, tenants=["guest"])
    half = Check("prefill logits", "one-token", True, {"relative": 4.9e-5}, {"relative": 1e-4}, tenants=["guest"])
    shown = heat_map(dataclasses.replace(target, checks=[held, failed, half]))
    cells = {case: dict(zip(shown.stages, row, strict=True)) for case, row in shown.rows}
    assert cells["refuse-too-long (guest)"]["refusal"] == ("under", "yes")
    assert cells["refuse-unknown-token (guest)"]["refusal"] == ("over", "no")
    assert cells["one-token (guest)"]["prefill logits"] == ("under", "49 %"), "coloured only near the limit"


def test_what_holds_is_folded_and_what_fails_is_not():
    passing, failing = render_html(passing_report()), render_html(failing_report())
    folded = passing.index('<details class="passed">')
    assert passing.index("checks hold</span>") > folded
    assert passing.index("Measured / limit") > folded, "a table before the fold would show what passed"
    first, second = [place.start() for place in re.finditer("Measured / limit", failing)][:2]
    assert first < failing.index('<details class="passed">') < second
    assert failing[first:second].count('<tr class="failed">') == 2


def test_a_case_names_its_tenants():
    check = Check("prefill cache", "largest-batch", True, {}, {}, tenants=["a", "b", "c", "d", "e"])
    assert check.fed == "largest-batch (a, b, c and 2 more)"
    assert dataclasses.replace(check, tenants=["a", "b"]).fed == "largest-batch (a, b)"
    assert dataclasses.replace(check, tenants=[]).fed == "largest-batch"
