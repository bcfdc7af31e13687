"""The README's film and the report's pictures: made by one command, light enough to load, and of nobody's machine."""

import re
import struct
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from docs import film
from tests.docs.pages import DOCS, ROOT
from tests.docs.test_snippets import _fault

FILM = DOCS / "images" / "film.svg"
PICTURES = sorted((DOCS / "images").glob("*.png"))


def shown() -> str:
    """Every text of the film; the terminal's cells are joined."""
    words = [text.text or "" for text in ElementTree.parse(FILM).iter("{http://www.w3.org/2000/svg}text")]
    return "\n".join(words)


def test_the_film_shows_the_whole_path_and_no_failure():
    text = shown()
    for command in ("init", "check", "run", "show", "eval", "serve"):
        assert f"dspy-fst {command}" in text
    assert '"answer"' in text, "the served program's reply"
    assert "Traceback" not in text


@pytest.mark.parametrize("path", [FILM, *PICTURES], ids=lambda path: path.name)
def test_what_the_film_s_command_made_passes_its_own_check(path):
    film.check(path)


def test_the_wait_for_the_service_has_an_end():
    (scene,) = [scene for scene in film.SCENES if "/ready" in scene]
    assert "--retry-max-time 60" in scene
    assert "until" not in scene


def test_a_film_that_tells_of_a_machine_is_refused(tmp_path):
    for told in (str(ROOT), str(Path.home() / ".cache")):
        (tmp_path / "film.svg").write_text(f"<svg><text>{told}</text></svg>")
        with pytest.raises(AssertionError, match="shows"):
            film.check(tmp_path / "film.svg")


def test_a_viewer_without_animation_sees_the_last_screen():
    text = FILM.read_text()
    frames = re.findall(r"%\{transform:(translateY\([^)]*\))\}", text)
    assert len(frames) > 20
    assert f"transform: {frames[-1]};" in text
    assert "prefers-reduced-motion" in text


def test_the_pictures_are_two_and_of_a_size_that_can_be_read():
    assert [path.name for path in PICTURES] == ["report-instructions.png", "report-learning.png"]
    for path in PICTURES:
        head = path.read_bytes()[:24]
        assert head.startswith(b"\x89PNG")
        assert struct.unpack(">II", head[16:]) == (1200, 860)


def test_the_film_s_commands_are_those_that_can_be_given():
    given = re.findall(r"say (dspy-fst .*?)(?: '&')?$", "\n".join(film.SCENES), re.MULTILINE)
    assert len(given) == 6
    assert [f"{line}: {fault}" for line in given if (fault := _fault(line))] == []


def test_the_pages_show_what_was_made_and_name_the_command():
    readme = (ROOT / "README.md").read_text()
    assert "docs/images/film.svg" in readme
    assert "make film" in readme
    assert len(re.findall(r"docs/images/report-[a-z]+\.png", readme)) <= 1
    pages = readme + "".join(path.read_text() for path in DOCS.glob("*.md"))
    assert all(path.name in pages for path in PICTURES)
