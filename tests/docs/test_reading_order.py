"""The reading order for contributors names files that exist, and follows a rollout from its task to the gradient."""

import re

from tests.docs.pages import DOCS, ROOT

PAGE = (DOCS / "reading-order.md").read_text()
PATH = re.compile(r"`((?:[\w-]+/)*[\w-]+\.(?:py|md|yaml))`")


def test_every_file_that_the_reading_order_names_exists():
    named = PATH.findall(PAGE)
    assert len(named) > 40
    assert [name for name in named if not any((place / name).is_file() for place in (ROOT, ROOT / "dspy_fst"))] == []


def test_the_reading_order_goes_from_the_loop_to_the_gradient_and_names_no_file_twice_on_the_way():
    way = PAGE.partition("## One rollout")[2].partition("\n## ")[0]
    files = [name for line in way.splitlines() if line.startswith("| `") for name in PATH.findall(line.split("|")[1])]
    order = ["optimizer.py", "rollout/rollouter.py", "policy_lm.py", "rollout/reward.py", "slow/credit.py"]
    order += ["slow/trainer.py", "slow/losses/cispo.py", "engine/verification.py"]
    assert [files.index(name) for name in order] == sorted(files.index(name) for name in order)
    assert len(files) == len(set(files))
