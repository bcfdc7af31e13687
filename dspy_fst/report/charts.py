"""Charts -> SVG for a page, in the page's own colours, or image files for a paper. The only user of matplotlib."""

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

try:
    from matplotlib import rc_context
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator
except ImportError as error:
    raise ImportError(NEEDS_EXTRA) from error

INK, MUTED, RULE, PAPER = "#1d2127", "#59616c", "#d3d8df", "#fffffe"
SERIES = ("#1f63ad", "#b8480b", "#16793c", "#8a35c9", "#0b7285", "#b3195f", "#6e5d00", "#5a5350")
"""Each is readable on white (4.5:1); the page replaces them by its own, which follow light and dark."""
STACKED = (SERIES[0], "#8b939e", *SERIES[1:7])
COLORS = {
    INK: "currentColor",
    MUTED: "var(--muted)",
    RULE: "var(--rule)",
    PAPER: "var(--paper)",
    STACKED[1]: "var(--quiet)",
} | {color: f"var(--series-{i})" for i, color in enumerate(SERIES, start=1)}
MARKERS, DASHES = "os^Dvp*", ("-", "--", "-.", (0, (5, 1, 1, 1)), (0, (1, 1)))
WIDTH, HEIGHT, LEGEND_ROW, RESOLUTION = 5.0, 3.3, 0.2, 200
"""Inches, and dots an inch of images; at 72 points an inch the text has its size on a phone's screen."""
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
    "text.parse_math": False,  # a dollar sign in a reason is a dollar sign
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 11,
    "pdf.fonttype": 42,
    "svg.hashsalt": "dspy_fst",  # the same chart gets the same ids
}
IN_PAGE = STYLE | {
    "svg.fonttype": "none",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
"""Text stays text, and the page's ground shows through."""
SVG, XLINK_HREF = "http://www.w3.org/2000/svg", "{http://www.w3.org/1999/xlink}href"
ElementTree.register_namespace("", SVG)


def save_plots(run_dirs: Sequence[Path], folder: Path, formats: Sequence[str] = ("svg", "png")) -> list[Path]:
    """Write every chart of a run, or of several over one another, as files.

    Args:
        formats: What matplotlib writes, e.g. ``"svg"``, ``"png"``, ``"pdf"``.

    Returns:
        The files, ``<chart>.<format>`` each; lineages of several runs are numbered in the order given.

    Raises:
        RunDirectoryError: one is not the directory of a run.
    """
    records = read_records(run_dirs)
    folder.mkdir(parents=True, exist_ok=True)
    charts = [*learning_charts(records), *health_charts(records), *lost_charts(records), *predictor_charts(records)]
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
    """What keeps the time of writing out of a file."""
    return {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)


# ---- in a page ---------------------------------------------------------------------------------


def chart_svg(chart: Chart, key: str) -> str:
    """The chart as an SVG element in the page's colours. Ids start with ``key``, which is unique in the page."""
    with rc_context(IN_PAGE):
        return _inline(draw(chart), key, chart.title, chart.summary)


def lineage_svg(record: RunRecord, key: str, link: Callable[[Node], str]) -> str | None:
    """The lineage as an SVG element whose candidates lead to ``link(node)``; None when no candidate was scored."""
    if not _scored(record):
        return None
    with rc_context(IN_PAGE):
        labels = {link(node): _name(node) for node in _scored(record)}
        return _inline(draw_lineage(record, link), key, "Lineage of the candidates", LINEAGE, labels)


def _inline(figure: Figure, key: str, title: str, summary: str, links: Mapping[str, str] | None = None) -> str:
    """The figure as an element of a page, with a name for those who do not see it.

    Args:
        links: Target -> name, of the links in the figure.
    """
    root = _parsed(figure)
    _make_local(root, key)
    for element in root.iter():
        if name := (links or {}).get(element.get("href", "")):
            element.set("aria-label", name)
    root.attrib |= {
        "style": f"--natural: {root.attrib.pop('width').removesuffix('pt')}px",
        "role": "group" if links else "img",  # inside an image nobody looks for links
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
    """The figure's SVG without its style, which would hold for the whole page, and what it says of itself."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(file.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):
                parent.remove(child)
    return root


def _make_local(root: ElementTree.Element, key: str) -> None:
    """Use the page's colours and font, ids that are unique in the page, and links that browsers tell of as such."""
    own = {f"#{element.get('id')}": f"#{key}-{element.get('id')}" for element in root.iter() if element.get("id")}
    for element in root.iter():
        if "id" in element.attrib:
            element.set("id", f"{key}-{element.attrib['id']}")
        if target := element.attrib.pop(XLINK_HREF, None):
            element.set("href", own.get(target, target))
            element.attrib.pop("target", None)  # matplotlib would have links open another page
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
    for one, color, marker, dash in zip(series, cycle(SERIES), cycle(MARKERS), cycle(DASHES), strict=False):
        axes.plot(one.x, one.y, color=color, linestyle=dash, linewidth=1.6, **_dots(one, marker), label=_label(one))


def _frontier(axes: Axes, series: Sequence[Series]) -> None:
    for one, color, marker in zip(series, cycle(SERIES), cycle(MARKERS), strict=False):
        axes.plot(one.x, one.y, color=color, linestyle="", marker=marker, markersize=4, alpha=0.55, label=_label(one))
        edge = frontier(one)
        axes.plot(edge.x, edge.y, color=color, linewidth=1.6, drawstyle="steps-post", marker=marker, markersize=5)


def _stack(axes: Axes, series: Sequence[Series]) -> None:
    below = [0.0] * len(series[0].x)
    width = 0.82 if len(below) <= 60 else 1.0  # gaps between many bars are all that one would see
    for one, color in zip(series, cycle(STACKED), strict=False):
        axes.bar(one.x, one.y, bottom=below, color=color, width=width, label=_label(one))
        below = [height + more for height, more in zip(below, one.y, strict=True)]
    axes.grid(axis="x", visible=False)


def _dots(series: Series, marker: str) -> dict[str, Any]:
    """Marks at the points, about thirty of them."""
    return {"marker": marker, "markersize": 4, "markevery": max(1, len(series.x) // 30)}


def _columns(series: Sequence[Series]) -> int:
    longest = max(len(_label(one)) for one in series)
    return max(1, min(len(series), 48 // (longest + 6)))


def _label(series: Series, longest: int = 46) -> str:
    """A legend's text: short, and not one that matplotlib would hide."""
    text = _drawable(series.label)
    text = text if len(text) <= longest else f"{text[: longest - 1]}…"
    return f" {text}" if text.startswith("_") else text


def _drawable(text: str) -> str:
    """The text without what an image file cannot hold: control characters, halves of letters."""
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
    """Candidates by order of birth and first score, with lines to their parents; members of populations are filled."""
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
        above: Any = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center", "fontsize": 9, "color": MUTED}
        axes.annotate(str(node.number), place[node.digest], **above)
    for label, (of, edge, face, size) in _kinds(nodes).items():
        x, y = [place[node.digest][0] for node in of], [place[node.digest][1] for node in of]
        dots = axes.scatter(x, y, s=size, c=face, edgecolors=edge, linewidths=1.6, zorder=2, label=label)
        if link:
            dots.set_urls([link(node) for node in of])
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
    """A rule where each cycle's own candidates begin, and the cycle's number."""
    births = {node.number: node.born for node in reversed(nodes)}
    first = {born: number for number, born in births.items()}
    for born, number in first.items():
        if born is not None:
            axes.axvline(number - 0.5, color=RULE, linewidth=1.2, linestyle=":", zorder=0)
            top = axes.get_xaxis_transform()
            axes.text(number - 0.4, 1.0, f"cycle {born}", transform=top, color=MUTED, fontsize=11, va="bottom")
