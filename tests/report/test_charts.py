"""Drawings: in a page's own colours, and as files."""

import importlib
import re
import sys
from xml.etree import ElementTree

import pytest

from dspy_fst.report import charts, page
from dspy_fst.report.charts import COLORS, SVG, chart_svg, draw, lineage_svg, save_plots
from dspy_fst.report.from_events import record_of
from dspy_fst.report.measures import Chart, Series, learning_charts
from tests.report.happenings import CHILD, SEED, cycle, digest, whole_run
from tests.report.test_record import written


def chart(*labels, kind="line", x=(0.0, 1.0), y=(0.25, 0.5)):
    series = tuple(Series(label, x, y) for label in labels)
    return Chart("name", "A title & more", "Note.", "update", "reward", series, kind)


def drawn(chart, key="chart"):
    return ElementTree.fromstring(chart_svg(chart, key))


def test_a_drawing_in_a_page_has_a_name_a_description_and_ids_of_its_own():
    svg = drawn(chart("one", "other"), "first")
    assert (svg.get("role"), svg.get("aria-labelledby")) == ("img", "first-title")
    assert svg.find(f"{{{SVG}}}title").text == "A title & more"
    assert svg.find(f"{{{SVG}}}desc").text.startswith("reward against update. one: from 0.25 at 0")
    ids = [element.get("id") for element in svg.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    assert all(name.startswith("first-") for name in ids)
    text = chart_svg(chart("one", "other"), "first")
    referred = set(re.findall(r'(?:url\(|href=")#([\w-]+)', text))
    assert referred
    assert referred <= set(ids)


@pytest.mark.parametrize("kind", ["line", "stack", "frontier"])
def test_a_drawing_in_a_page_has_only_the_page_s_colours_and_fonts(kind):
    text = chart_svg(chart("one", "other", "third", kind=kind), "chart")
    assert not re.search("#[0-9a-fA-F]{6}", text)
    assert "font-family" not in text
    assert "<style" not in text
    assert "<metadata" not in text
    assert "var(--series-2)" in text
    assert "currentColor" in text


def test_the_style_sheet_has_every_colour_in_light_and_dark_with_enough_contrast():
    light, dark = palettes()
    wanted = {name[4:-1] for name in COLORS.values() if name.startswith("var(")}
    for palette in (light, dark):
        assert wanted <= palette.keys()
        for name in ("--ink", "--muted", "--accent", "--series-2", *(f"--series-{i}" for i in range(1, 9))):
            for ground in ("--paper", "--ground"):
                assert contrast(palette[name], palette[ground]) >= 4.5, (name, ground)
        for name in ("--new", "--gone", "--warn"):
            assert contrast(palette[name], palette[f"{name}-ground"]) >= 4.5, name
        assert contrast(palette["--ink"], palette["--warn-ground"]) >= 4.5
        assert contrast(palette["--quiet"], palette["--paper"]) >= 3


def palettes():
    """The style sheet's custom properties in light, and what they are in dark."""
    style = (importlib.resources.files("dspy_fst.report") / "templates" / "style.css").read_text()
    blocks = re.findall(r":root \{([^}]*)\}", style)
    light, dark = (dict(re.findall(r"(--[\w-]+): (#\w{6});", block)) for block in blocks[:2])
    assert light.keys() == dark.keys()
    return light, dark


def contrast(one, other):
    """The ratio of WCAG 2."""
    bright, dim = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def luminance(color):
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_the_contrast_is_computed_as_it_is_known():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


LABELS = {
    "costs $5 and $6": "costs $5 and $6",
    "half \udc00 a letter": "half   a letter",
    "bell \x07": "bell",
    "_hidden": "_hidden",
    "<script>": "<script>",
    "x" * 99: "x" * 45 + "…",
}


@pytest.mark.parametrize("label", LABELS)
def test_any_label_can_be_drawn(label):
    shown = [text.strip() for text in drawn(chart(label, "other")).itertext()]
    assert LABELS[label] in shown


def test_the_same_chart_is_drawn_the_same():
    assert chart_svg(chart("one", "other"), "chart") == chart_svg(chart("one", "other"), "chart")


def test_a_single_point_stands_over_its_own_number():
    figure = draw(chart("one", x=(3.0,), y=(0.5,)))
    figure.draw_without_rendering()
    low, high = figure.axes[0].get_xlim()
    ticks = zip(figure.axes[0].get_xticks(), figure.axes[0].get_xticklabels(), strict=True)
    assert [label.get_text() for at, label in ticks if low <= at <= high] == ["3"]


def test_values_that_hardly_differ_are_told_whole():
    shown = "".join(drawn(chart("one", y=(1000.25, 1000.26))).itertext())
    assert "+1.00" not in shown


def test_each_candidate_of_the_lineage_leads_to_its_place_and_says_what_it_is():
    record = record_of(whole_run())
    svg = ElementTree.fromstring(lineage_svg(record, "lineage", lambda node: f"#to-{node.digest}"))
    assert svg.get("role") == "group"
    links = {a.get("href"): a.get("aria-label") for a in svg.iter(f"{{{SVG}}}a")}
    assert links.keys() == {f"#to-{node.digest}" for node in record.nodes}
    assert not [a for a in svg.iter(f"{{{SVG}}}a") if a.get("target")]
    assert links[f"#to-{digest(CHILD)}"] == "candidate 1, score 0.500"


def test_a_lineage_of_candidates_that_were_not_scored_is_not_drawn():
    record = record_of([cycle(0, {SEED: None, CHILD: None}, {CHILD: [SEED]}, [CHILD])])
    assert lineage_svg(record, "lineage", lambda node: "#") is None


def test_plots_are_saved_for_papers_the_same_each_time(tmp_path):
    run = written(tmp_path / "run", whole_run())
    files = save_plots([run], tmp_path / "plots", formats=("svg", "png", "pdf"))
    again = save_plots([run], tmp_path / "again", formats=("svg", "png", "pdf"))
    names = {file.name for file in files}
    assert {"reward-by-update.svg", "reward-by-kl.png", "groups.pdf", "lost-in-searches.svg", "lineage.png"} <= names
    assert [file.read_bytes() for file in files] == [file.read_bytes() for file in again]
    svg = (tmp_path / "plots" / "reward-by-update.svg").read_text()
    assert "var(--" not in svg
    assert "<text" not in svg  # letters are outlines: they look the same everywhere


def test_plots_of_several_runs_have_one_lineage_each(tmp_path):
    runs = [written(tmp_path / name, whole_run()) for name in ("one", "other")]
    names = {file.name for file in save_plots(runs, tmp_path / "plots", formats=("svg",))}
    assert {"reward-by-update.svg", "live-groups.svg", "lineage-1.svg", "lineage-2.svg"} <= names


def test_a_figure_has_the_axes_that_the_chart_names():
    (reward, *_) = learning_charts([record_of(whole_run())])
    (axes,) = draw(reward).axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("update", "mean training reward")
    (line,) = axes.lines
    assert list(line.get_xdata()) == [0, 1, 3]


@pytest.mark.parametrize(("module", "missing"), [(charts, "matplotlib"), (page, "jinja2")])
def test_without_the_extra_the_error_says_what_to_install(module, missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=re.escape("pip install 'dspy-fst[report]'")):
        importlib.reload(module)
