"""Comparisons: paired tests against scipy, Holm's correction, and a summary in which nothing without a score wins."""

from __future__ import annotations

from typing import Any

import pytest
from scipy import stats

from dovetail.studies.comparison import compare, holm, interval, paired_test
from dovetail.studies.standing import boards
from dovetail.studies.summary import summary
from dovetail.studies.tables import tables
from study_reports import line, study_of

DIFFERENCES = [0.03, 0.01, 0.02, 0.05]


def test_the_paired_test_is_students():
    expected: Any = stats.ttest_1samp(DIFFERENCES, 0.0)
    assert paired_test(DIFFERENCES) == pytest.approx(expected.pvalue)
    assert interval(DIFFERENCES) == pytest.approx(expected.confidence_interval(0.95))
    assert paired_test([0.1]) is None
    assert interval([0.1]) is None


def test_equal_differences_are_no_certainty():
    assert paired_test([0.25, 0.25]) == 0.5
    assert paired_test([0.1 + 0.2, 0.3, 0.3]) == 0.25  # equal but for rounding
    assert paired_test([0.0, 0.0, 0.0]) == 1.0
    assert interval([0.25, 0.25]) is None
    assert interval([0.1 + 0.2, 0.3, 0.3]) is None


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, None, 0.9]) == [1.0, None, 1.0]
    assert holm([]) == []


A, B, C = line("A", [0.8, 0.81, 0.82]), line("B", [0.5, 0.52, 0.51], nbytes=50), line("C", [0.79, 0.83, 0.8])


def test_differences_have_their_test():
    results = [A[0], B[0], C[0]]
    found = compare(results, [("A", "B"), ("C", "B"), ("A", "C")])
    assert [(one.row, one.minus) for one in found] == [("A", "B"), ("C", "B"), ("A", "C")]
    for one in found:
        expected: Any = stats.ttest_1samp(one.figure.values, 0)
        assert one.p == pytest.approx(expected.pvalue)
    assert [one.p_holm for one in found] == holm([one.p for one in found])
    assert found[0].p_holm is not None
    assert found[0].p_holm < 0.05
    assert found[0].interval == interval(found[0].figure.values)


def test_one_seed_has_no_p_value():
    (found,) = compare([line("A", [0.8])[0], line("B", [0.5])[0]], [("A", "B")])
    assert (found.p, found.p_holm, found.interval) == (None, None, None)
    points = [line(row, [score], point={"r": r})[0] for row, score in (("A", 0.8), ("B", 0.5)) for r in (1, 2, 4)]
    assert [one.p for one in compare(points, [("A", "B")])] == [None] * 4


def test_points_one_by_one_and_together():
    points = [
        line(row, [at + 0.1 * r, at + 0.12 * r], point={"r": r, "kind": "k"})[0]
        for row, at in (("A", 0.4), ("B", 0.2))
        for r in (1, 2)
    ]
    found = compare(points, [("A", "B")])
    assert [one.point for one in found] == [{"r": 1, "kind": "k"}, {"r": 2, "kind": "k"}, {"r": "all", "kind": "k"}]
    assert found[2].figure.values == found[0].figure.values + found[1].figure.values


def test_values_of_an_axis_against_one():
    points = [line("A", [score, score + 0.1], point={"q": q, "adapter": adapter})[0]
              for q in ("nf4", "int4") for adapter, score in (("lora", 0.5), ("dora", 0.6), ("ia3", 0.3))]  # fmt: skip
    found = compare(points, {"adapter": "lora"})
    assert [(one.minus, one.point["q"], one.point["adapter"]) for one in found] == [
        ("adapter lora", "nf4", "dora"), ("adapter lora", "nf4", "ia3"),
        ("adapter lora", "int4", "dora"), ("adapter lora", "int4", "ia3"),
        ("adapter lora", "all", "dora"), ("adapter lora", "all", "ia3"),
    ]  # fmt: skip
    assert found[1].figure.mean == pytest.approx(-0.2)


def test_lines_without_the_axis_are_not_compared():
    results = [line("A", [0.5, 0.6], point=point)[0] for point in ({}, {"q": "a"}, {"q": "b"})]
    (found,) = compare(results, {"q": "a"})
    assert found.point == {"q": "b"}


def test_a_row_with_a_failure_is_not_compared():
    bad = line("D", [0.9, None, 0.9])
    gone = line("E", [0.9, 0.9], failed=(2,))
    assert compare([A[0], bad[0], gone[0]], [("D", "A"), ("E", "A")]) == []


def test_the_summary():
    said = summary(study_of(A, B, C))
    assert said[0] == "Best accuracy: A, 81.0 ± 1.0 % (3 seeds)."
    assert "It cannot be told apart from C." in said
    assert "It differs from B (p at most 0.05, corrected)." in said
    assert "Smallest model in memory: B, 50 bytes, with 51.0 ± 1.0 %." in said
    assert "Best accuracy at each size in memory: 50 bytes B (51.0 ± 1.0 %); 100 bytes A (81.0 ± 1.0 %)." in said
    assert not any(sentence.startswith("Least memory") for sentence in said)  # all take the same


def test_nothing_without_a_score_wins():
    nan = line("D", [0.99, None, 0.99], nbytes=1)
    failed = line("E", [0.99, 0.99], nbytes=1, failed=(2,))
    said = summary(study_of(A, B, nan, failed))
    assert said[0].startswith("Best accuracy: A")
    assert said[-1] == "Without a score for every seed, and therefore in no comparison: D and E."
    assert not any(" D," in sentence for sentence in said[:-1])
    assert summary(study_of(nan))[0] == "No line has a score."


def test_one_seed_claims_nothing():
    said = summary(study_of(line("A", [0.8]), line("B", [0.8], nbytes=10), line("C", [0.2])))
    assert "With one seed no test is possible, so no difference to the other lines is claimed." in said
    assert "The same score has B." in said


def test_a_smaller_perplexity_is_better():
    report = study_of(line("A", [9.0, 9.1, 9.2]), line("B", [5.0, 5.2, 5.1], nbytes=500), metric="perplexity")
    assert summary(report)[0] == "Best perplexity: B, 5.100 ± 0.100 (3 seeds)."
    (board,) = boards(report)
    assert [found.name for found in board.front("nbytes")] == ["A", "B"]


def test_the_average_over_tasks():
    lines = [
        line("A", [0.8, 0.6, 0.7], task="one", point={"data": "x"}),
        line("A", [0.4, 0.4, 0.1], task="two", point={"data": "y"}),
        line("B", [0.5, 0.5, 0.5], task="one", point={"data": "x"}),
        line("B", [0.2, None, 0.2], task="two", point={"data": "y"}),
        line("C", [0.5, 0.5, 0.5], task="one", point={"data": "x"}),
    ]
    one, two, average = boards(study_of(*lines))
    assert (one.task, two.task, average.task) == ("one", "two", "average")
    assert [(found.name, found.score) for found in average.lines] == [("A", pytest.approx(0.5)), ("B", None)]
    assert list(average.lines[0].scores.values()) == pytest.approx([0.6, 0.5, 0.4])
    assert len(boards(study_of(*lines, metrics={"two": "perplexity"}))) == 2
    assert summary(study_of(*lines))[0] == "Best accuracy on the average of 2 tasks: A, 50.0 ± 10.0 % (3 seeds)."


def test_an_average_over_several_metrics_has_the_name_of_none():
    lines = [line("A", [0.8, 0.6], task="one"), line("A", [0.4, 0.4], task="two")]
    report = study_of(*lines, metrics={"one": "accuracy", "two": "exact_match"})
    assert [board.title for board in boards(report)] == ["accuracy", "exact match", "score"]
    assert summary(report)[0] == "Best score on the average of 2 tasks: A, 55.0 ± 7.1 % (2 seeds)."


def test_a_reason_is_told_once_for_all_its_lines():
    def unmergeable(name, why):
        result, cells = line(name, [0.5])
        return result.model_copy(update={"mergeable": False, "why": why}), cells

    lines = [unmergeable(name, "lora does not keep the grid") for name in "ABCDEG"]
    quality, *_ = tables(study_of(*lines, unmergeable("F", "another")))
    assert quality.remarks == [
        "A, B, C, D and 2 more are not mergeable: lora does not keep the grid.", "F is not mergeable: another."
    ]  # fmt: skip
