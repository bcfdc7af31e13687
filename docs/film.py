"""Makes the README's film and two screenshots of the report, all from one real run of the laboratory: `make film`.

The commands of `SCENES` are given in a terminal of their own, in a copy of the package below `PLACE`, so that no path
of this machine is seen. Long scenes are played faster. termtosvg draws what the terminal showed.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from getpass import getuser
from pathlib import Path

from playwright.sync_api import Page, sync_playwright
from termtosvg import anim, config, term
from termtosvg.asciicast import AsciiCastV2Event, AsciiCastV2Header

ROOT = Path(__file__).parent.parent
IMAGES = Path(__file__).with_name("images")
PLACE = Path("/tmp/demo")
COLUMNS, LINES = 112, 30
LONGEST_S, PAUSE_S = 9.0, 2.5
"""Of a scene, and after it."""
FRAME_MS = 250
"""Shortest frame; what the terminal showed in between is left out."""
LARGEST = {".svg": 1_500_000, ".png": 300_000}
"""Bytes of a file that people load with a page."""
SCENES = (
    "say dspy-fst init trial --example lab",
    "say dspy-fst check trial/project.yaml",
    "say dspy-fst run trial/project.yaml",
    "say dspy-fst show trial/run",
    "say dspy-fst eval trial/run --two-by-two",
    """
    export KEY=a-key-of-your-own-choice
    say dspy-fst serve trial/run --port 8765 --api-key-env KEY '&'
    curl -sf -m 5 --retry 300 --retry-connrefused --retry-delay 1 --retry-max-time 60 127.0.0.1:8765/ready \\
      > /dev/null || { echo unready; kill %1; exit 1; }
    sleep 1
    say curl 127.0.0.1:8765/v1/program -H '"Authorization: Bearer $KEY"' -H '"Content-Type: application/json"' \\
      -d "'{\\"inputs\\": {\\"numbers\\": \\"3 1 4 1 5\\"}}'"
    echo; sleep 1
    say kill %1
    wait
    """,
)
SAY = r"""
say() {  # a prompt, the command as if it were typed, and the command
    printf '\e[32m$\e[0m '
    for word in "$@"; do printf '%s ' "$word"; sleep 0.3; done
    echo; sleep 0.3
    eval "$@"
}
set -m  # job control, for kill %1
printf '\e[H\e[2J'  # each scene begins on an empty screen
"""
REPORT = ["report", "trial/run", "--out", "report.html"]


def main() -> None:
    """Record, draw and photograph; nothing of what is there is replaced before all is well."""
    PLACE.mkdir()  # refuses to touch what somebody else left there
    try:
        for package in ("dspy_fst", "programs"):
            shutil.copytree(ROOT / package, PLACE / "dspy_fst" / package)
        made = PLACE / "images"
        made.mkdir()
        draw(records(), made)
        subprocess.run(["dspy-fst", *REPORT], cwd=PLACE, env=environment(), check=True)
        photograph(PLACE / "report.html", made)
        for file in made.iterdir():
            check(file)
        shutil.copytree(made, IMAGES, dirs_exist_ok=True)
    finally:
        shutil.rmtree(PLACE)


def environment() -> dict[str, str]:
    """A user's without a past, and this environment's commands first."""
    return {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(PLACE / "dspy_fst"),
        "HOME": str(PLACE),
        "LANG": "C.UTF-8",
        "TERM": "xterm-256color",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


# ---- the film ----------------------------------------------------------------------------------


def records() -> Iterator[AsciiCastV2Header | AsciiCastV2Event]:
    """What the terminal was sent, scene after scene, at the film's pace."""
    yield AsciiCastV2Header(version=2, width=COLUMNS, height=LINES, theme=None)
    began = 0.0
    for scene in SCENES:
        events = list(played(scene))
        lasted = events[-1].time
        pace = max(1.0, lasted / LONGEST_S)
        for event in events:
            yield event._replace(time=began + event.time / pace)
        began += lasted / pace + PAUSE_S


def played(scene: str) -> Iterator[AsciiCastV2Event]:
    """The terminal's output while a scene is played."""
    command = ["env", "-i", *(f"{name}={value}" for name, value in environment().items())]
    script = f"cd {PLACE}\n{SAY}\n{scene}"
    nobody, _ = os.pipe()  # nobody types
    with open(os.devnull, "wb") as nowhere:
        shown = term.record([*command, "bash", "-c", script], COLUMNS, LINES, nobody, nowhere.fileno())
        next(shown)  # its header
        yield from shown


def draw(recorded: Iterator[AsciiCastV2Header | AsciiCastV2Event], folder: Path) -> None:
    """The film, and its last screen as a picture for those who see no animation."""
    geometry, frames = term.timed_frames(recorded, FRAME_MS, None, int(1000 * PAUSE_S))
    shown = list(frames)
    template = config.default_templates()["window_frame"]
    film = folder / "film.svg"
    anim.render_animation(shown, geometry, str(film), template)
    still(film)


def still(film: Path) -> None:
    """Have a viewer that plays no animation, or is asked for less motion, show the last screen."""
    text = film.read_text(encoding="utf-8")
    last = re.findall(r"100\.000%\{transform:(translateY\([^)]*\))\}", text)[-1]
    text = text.replace("#screen_view {", f"#screen_view {{\n                transform: {last};", 1)
    quiet = "@media (prefers-reduced-motion: reduce) { #screen_view { animation: none !important; } }"
    film.write_text(text.replace("]]></style>", f"{quiet}\n]]></style>", 1), encoding="utf-8")


# ---- the report --------------------------------------------------------------------------------


def photograph(report: Path, folder: Path) -> None:
    """Two parts of the page, in a real browser."""
    browser_path = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1200, "height": 860}, color_scheme="light")
        page.goto(report.as_uri())
        _shot(page, "learning", folder / "report-learning.png")
        _shot(page, "instructions", folder / "report-instructions.png")
        browser.close()


def _shot(page: Page, section: str, path: Path) -> None:
    page.locator(f"#{section}").scroll_into_view_if_needed()
    page.evaluate(f"document.getElementById('{section}').scrollIntoView()")
    page.screenshot(path=path)


def check(file: Path) -> None:
    """Refuse a file that is too large, or tells of this machine."""
    size = file.stat().st_size
    assert size <= LARGEST[file.suffix], f"{file.name} takes {size} bytes"
    if file.suffix == ".svg":
        text = file.read_text(encoding="utf-8")
        for own in (str(ROOT), str(Path.home()), sys.prefix, socket.gethostname(), f"{getuser()}@"):
            assert own not in text, f"{file.name} shows {own}"
        assert "Traceback" not in text
        assert "unready" not in text, f"{file.name} shows a service that did not come up"


if __name__ == "__main__":
    main()
