"""Charts as SVG for a page, in the page's colours, or as image files. The only user of matplotlib."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from dspy_fst.report import NEEDS_EXTRA
from dspy_fst.report.from_directory import read_records
from dspy_fst.report.lineage import Node
from dspy_fst.report.measures import (
    Chart,
    Series,
    frontier,
    health_charts,
    learning_charts,
    lost_charts,
    predictor_charts,
)
from dspy_fst.report.run_record import RunRecord
from dspy_fst.report.step_options import option_charts

try:
    from matplotlib import rc_context
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator
except ImportError as error:
    raise ImportError(NEEDS_EXTRA) from error

INK, MUTED, RULE, PAPER = "#1d2127", "#59616c", "#d3d8df", "#fffffe"
SERIES = ("#1f63ad", "#b8480b", "#16793c", "#8a35c9", "#0b7285", "#b3195f", "#6e5d00", "#5a5350")
"""Each has a contrast of 4.5:1 on white. The page replaces them by its own colours, which follow light and dark."""
STACKED = (SERIES[0], "#8b939e", *SERIES[1:7])
COLORS = {
    INK: "currentColor",
    MUTED: "var(--muted)",
    RULE: "var(--rule)",
    PAPER: "var(--paper)",
    STACKED[1]: "var(--quiet)",
} | {color: f"var(--series-{i})" for i, color in enumerate(SERIES, start=1)}
MARKERS, DASHES = "os^Dvp*", ("-", "--", "-.", (0, (5, 1, 1, 1)), (0, (1, 1)))
MARKS = 30
"""About how many points of a line are marked (ours)."""
WIDTH, HEIGHT, LEGEND_ROW, RESOLUTION = 5.0, 3.3, 0.2, 200
"""Inches, and the dots per inch of images. At 72 points an inch the text is readable on a phone."""
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 12,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-3, 4),
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "text.parse_math": False,  # show a dollar sign in a reason as it is
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 11,
    "pdf.fonttype": 42,
    "svg.hashsalt": "dspy_fst",  # ids are the same for the same chart
}
IN_PAGE = STYLE | {
    "svg.fonttype": "none",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
"""Text stays text, and the background is transparent."""
SVG, XLINK_HREF = "http://www.w3.org/2000/svg", "{http://www.w3.org/1999/xlink}href"
ElementTree.register_namespace("", SVG)


def save_plots(run_dirs: Sequence[Path], folder: Path, formats: Sequence[str] = ("svg", "png")) -> list[Path]:
    """Write every chart of a run as files, or charts that show several runs together.

    Args:
        formats: File formats of matplotlib, e.g. ``"svg"``, ``"png"``, ``"pdf"``.

    Returns:
        The files, named ``<chart>.<format>``. Lineages of several runs are numbered in the order given.

    Raises:
        RunDirectoryError: a folder is not the directory of a run.
    """
    records = read_records(run_dirs)
    folder.mkdir(parents=True, exist_ok=True)
    charts = [
        *learning_charts(records),
        *health_charts(records),
        *option_charts(records),
        *lost_charts(records),
        *predictor_charts(records),
    ]
    drawings: dict[str, Callable[[], Figure]] = {chart.name: lambda chart=chart: draw(chart) for chart in charts}  # type: ignore[misc]
    for i, record in enumerate(records, start=1):
        if _scored(record):
            name = "lineage" if len(records) == 1 else f"lineage-{i}"
            drawings[name] = lambda record=record: draw_lineage(record)  # type: ignore[misc]
    written = []
    with rc_context(STYLE):
        for name, drawing in drawings.items():
            figure = drawing()
            for kind in formats:
                written.append(folder / f"{name}.{kind}")
                figure.savefig(written[-1], dpi=RESOLUTION, metadata=_undated(kind))
    return written


def _undated(kind: str) -> dict[str, None] | None:
    """Metadata that keep the time of writing out of a file."""
    return {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)


# ---- in a page ---------------------------------------------------------------------------------


def chart_svg(chart: Chart, key: str) -> str:
    """The chart as an SVG element in the page's colours.

    Args:
        key: Prefix of all ids; unique in the page.
    """
    with rc_context(IN_PAGE):
        return _inline(draw(chart), key, chart.title, chart.summary)


def lineage_svg(record: RunRecord, key: str, link: Callable[[Node], str]) -> str | None:
    """The lineage as an SVG element. Each candidate links to ``link(node)``. None when no candidate was scored."""
    if not _scored(record):
        return None
    with rc_context(IN_PAGE):
        labels = {link(node): _name(node) for node in _scored(record)}
        return _inline(draw_lineage(record, link), key, "Lineage of the candidates", LINEAGE, labels)


def _inline(figure: Figure, key: str, title: str, summary: str, links: Mapping[str, str] | None = None) -> str:
    """The figure as an element of a page, with a title and a description for screen readers.

    Args:
        links: Target of each link in the figure -> its name.
    """
    root = _parsed(figure)
    _make_local(root, key)
    for element in root.iter():
        if name := (links or {}).get(element.get("href", "")):
            element.set("aria-label", name)
    root.attrib |= {
        "style": f"--natural: {root.attrib.pop('width').removesuffix('pt')}px",
        "role": "group" if links else "img",  # screen readers skip links inside an image
        "aria-labelledby": f"{key}-title",
        "aria-describedby": f"{key}-desc",
    }
    del root.attrib["height"]
    for tag, text in (("desc", summary), ("title", title)):
        element = ElementTree.Element(f"{{{SVG}}}{tag}", {"id": f"{key}-{tag}"})
        element.text = _drawable(text)
        root.insert(0, element)
    return ElementTree.tostring(root, encoding="unicode")


def _parsed(figure: Figure) -> ElementTree.Element:
    """The figure's SVG without metadata and without its style, which would apply to the whole page."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(file.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):
                parent.remove(child)
    return root


def _make_local(root: ElementTree.Element, key: str) -> None:
    """Use the page's colours and font, ids that are unique in the page, and plain ``href`` links."""
    renamed = {f"#{element.get('id')}": f"#{key}-{element.get('id')}" for element in root.iter() if element.get("id")}
    for element in root.iter():
        if "id" in element.attrib:
            element.set("id", f"{key}-{element.attrib['id']}")
        if target := element.attrib.pop(XLINK_HREF, None):
            element.set("href", renamed.get(target, target))
            element.attrib.pop("target", None)  # matplotlib's links would open another page
        for name, value in element.attrib.items():
            element.set(name, re.sub(r"url\(#([^)]*)\)", rf"url(#{key}-\1)", value))
        if style := element.get("style"):
            style = re.sub(r"\s*font-family: [^;]*;?", "", style)
            element.set("style", re.sub("#[0-9a-f]{6}", lambda match: COLORS.get(match[0], match[0]), style))


# ---- drawing -----------------------------------------------------------------------------------


def draw(chart: Chart) -> Figure:
    """The chart as a figure."""
    columns = _columns(chart.series)
    more_rows = (len(chart.series) - 1) // columns
    figure = Figure(figsize=(WIDTH, HEIGHT + LEGEND_ROW * more_rows), layout="constrained")
    axes = figure.subplots()
    {"line": _lines, "stack": _stack, "frontier": _frontier}[chart.kind](axes, chart.series)
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    if chart.span:
        axes.set_ylim(*chart.span)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=chart.kind != "frontier", min_n_ticks=1))
    if chart.kind != "frontier":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if chart.kind == "stack":
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    if len(chart.series) > 1 or chart.kind == "stack":
        figure.legend(loc="outside lower center", ncols=columns)
    return figure


def _lines(axes: Axes, series: Sequence[Series]) -> None:
    for line, color, marker, dash in zip(series, cycle(SERIES), cycle(MARKERS), cycle(DASHES), strict=False):
        axes.plot(
            line.x,
            line.y,
            color=color,
            linestyle=dash,
            linewidth=1.6,
            marker=marker,
            markersize=4,
            markevery=max(1, len(line.x) // MARKS),
            label=_label(line),
        )


def _frontier(axes: Axes, series: Sequence[Series]) -> None:
    for points, color, marker in zip(series, cycle(SERIES), cycle(MARKERS), strict=False):
        axes.plot(
            points.x, points.y, color=color, linestyle="", marker=marker, markersize=4, alpha=0.55, label=_label(points)
        )
        edge = frontier(points)
        axes.plot(edge.x, edge.y, color=color, linewidth=1.6, drawstyle="steps-post", marker=marker, markersize=5)


def _stack(axes: Axes, series: Sequence[Series]) -> None:
    below = [0.0] * len(series[0].x)
    width = 0.82 if len(below) <= 60 else 1.0  # with gaps, many narrow bars would hardly be visible
    for layer, color in zip(series, cycle(STACKED), strict=False):
        axes.bar(layer.x, layer.y, bottom=below, color=color, width=width, label=_label(layer))
        below = [height + more for height, more in zip(below, layer.y, strict=True)]
    axes.grid(axis="x", visible=False)


def _columns(series: Sequence[Series]) -> int:
    longest = max(len(_label(each)) for each in series)
    return max(1, min(len(series), 48 // (longest + 6)))


def _label(series: Series, longest: int = 46) -> str:
    """The text of a legend: short, and without a leading underscore, which would hide it in matplotlib."""
    text = _drawable(series.label)
    text = text if len(text) <= longest else f"{text[: longest - 1]}…"
    return f" {text}" if text.startswith("_") else text


def _drawable(text: str) -> str:
    """The text without control characters and lone surrogates, which an image file cannot hold."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


# ---- lineage -----------------------------------------------------------------------------------

LINEAGE = (
    "Each point is a candidate, in the order of birth, at its first anchor score; a line leads from a parent to its "
    "child. The list below holds the same."
)


def _scored(record: RunRecord) -> list[Node]:
    return [node for node in record.nodes if node.birth_score is not None]


def _name(node: Node) -> str:
    return f"candidate {node.number}, score {node.birth_score:.3f}"


def draw_lineage(record: RunRecord, link: Callable[[Node], str] | None = None) -> Figure:
    """Candidates by order of birth and first score, with lines to their parents. Members of populations are filled."""
    nodes = _scored(record)
    place = {node.digest: (node.number, node.birth_score or 0.0) for node in nodes}
    width = max(1.3 * WIDTH, min(2.4 * WIDTH, 0.4 * len(nodes)), 0.25 * len(nodes))
    figure = Figure(figsize=(width, HEIGHT), layout="constrained")
    axes = figure.subplots()
    _cycle_bands(axes, nodes)
    for node in nodes:
        for parent in node.parents:
            if parent in place:
                axes.plot(*zip(place[parent], place[node.digest], strict=True), color=MUTED, linewidth=0.9, zorder=1)
        axes.annotate(
            str(node.number),
            place[node.digest],
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            color=MUTED,
        )
    for label, (members, edge, face, size) in _kinds(nodes).items():
        x, y = [place[node.digest][0] for node in members], [place[node.digest][1] for node in members]
        dots = axes.scatter(x, y, s=size, c=face, edgecolors=edge, linewidths=1.6, zorder=2, label=label)
        if link:
            dots.set_urls([link(node) for node in members])
    axes.set_xlabel("candidates, in the order of birth")
    axes.set_ylabel("first anchor score")
    axes.set_xticks([])
    axes.set_xlim(-1, nodes[-1].number + 1)
    axes.margins(y=0.12)
    figure.legend(loc="outside lower left", ncols=3)
    return figure


def _kinds(nodes: Sequence[Node]) -> dict[str, tuple[list[Node], str, str, float]]:
    """Label -> its candidates, and the edge, face and size of their points."""
    final = [node for node in nodes if node.final]
    chosen = [node for node in nodes if node.populations and not node.final]
    tried = [node for node in nodes if not node.populations and not node.final]
    return {
        "tried": (tried, MUTED, PAPER, 40.0),
        "in a population": (chosen, SERIES[0], SERIES[0], 55.0),
        "in the final population": (final, SERIES[1], SERIES[1], 100.0),
    }


def _cycle_bands(axes: Axes, nodes: Sequence[Node]) -> None:
    """A vertical line where the candidates of each cycle begin, with the number of the cycle."""
    births = {node.number: node.born for node in reversed(nodes)}
    first = {born: number for number, born in births.items()}
    for born, number in first.items():
        if born is not None:
            axes.axvline(number - 0.5, color=RULE, linewidth=1.2, linestyle=":", zorder=0)
            top = axes.get_xaxis_transform()
            axes.text(number - 0.4, 1.0, f"cycle {born}", transform=top, color=MUTED, fontsize=11, va="bottom")
