"""Lines of an instruction that evolution keeps, and the whole run that a reflection is shown."""

from dspy_fst.fast.reflective_dataset import REST
from dspy_fst.rollout.components import lost_lines
from dspy_fst.run.search_journal import Journal
from tests.fast.test_evolve import Searcher

LINE = "Never mention the weather."


def written():
    searcher = Searcher()
    second = searcher.program.second
    second.signature = second.signature.with_instructions(f"Answer.\n{LINE}\nStay polite.")
    return searcher


def test_a_proposal_that_lost_a_protected_line_gets_it_back_and_it_is_counted():
    searcher = written()
    searcher.propose = lambda candidate, reflective_dataset, components_to_update: dict.fromkeys(
        components_to_update, "even odd"
    )
    search = searcher.evolve(protected={"second": ("Answer.", LINE)})
    texts = {candidate.texts["second"] for candidate in search.candidates}
    assert texts == {f"Answer.\n{LINE}\nStay polite.", f"even odd\nAnswer.\n{LINE}"}
    assert search.counts["lines_restored"] >= 2
    assert search.counts["lines_restored"] % 2 == 0


def test_a_proposal_that_keeps_its_lines_is_left_as_it_is():
    search = written().evolve(protected={"second": (LINE,)})
    assert len(search.candidates) > 1
    assert "lines_restored" not in search.counts
    assert all(LINE in candidate.texts["second"].splitlines() for candidate in search.candidates)


def test_a_line_inside_another_is_lost():
    assert lost_lines(f"Please: {LINE}", [LINE]) == [LINE]
    assert lost_lines(f"  {LINE} ", [LINE]) == []


def test_a_reflection_sees_the_other_calls_of_the_run_and_the_metric_its_whole_trace():
    searcher, traces = Searcher(), []
    searcher.feedback = lambda example, pred, trace, name, own: traces.append((name, len(trace))) or "told"
    searcher.evolve()
    shown = {name: record for data in searcher.seen for name, records in data.items() for record in records}
    assert shown["first"][REST].startswith("second: question=")
    assert shown["second"][REST].startswith("first: question=")
    assert {count for _, count in traces} == {2}


def test_what_a_reflection_is_shown_is_within_the_budget():
    searcher = Searcher()
    searcher.evolve(reflection_tokens=100, budget=12)
    for data in searcher.seen:
        for record in (record for records in data.values() for record in records):
            assert len(str(record)) < 600  # 400 characters of text, and what holds them


def test_a_search_repeated_from_its_journal_restores_and_counts_the_same_lines(tmp_path):
    def drop(candidate, reflective_dataset, components_to_update):
        return dict.fromkeys(components_to_update, f"even {len(candidate['second'])}")

    path = tmp_path / "search.jsonl"
    first = written()
    first.propose = drop
    before = first.evolve(protected={"second": ("Answer.", LINE)}, budget=24, journal=Journal(path, {}))
    again = written()
    after = again.evolve(protected={"second": ("Answer.", LINE)}, budget=24, journal=Journal(path, {}))
    assert (after.candidates, after.scores, after.counts) == (before.candidates, before.scores, before.counts)
    assert before.counts["lines_restored"] > 0
    assert (again.asked, again.seen) == ([], [])
