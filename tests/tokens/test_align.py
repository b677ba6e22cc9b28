import numpy as np
import pytest

from tests.tokens import makers
from tinyr2.core.types import Message
from tinyr2.tokens.align import Spans, tile
from tinyr2.tokens.translate import Translator


def ends(*at):
    return np.array(at, dtype=np.int64)


def told(spans):
    return spans.student.tolist(), spans.teacher.tolist(), spans.count


def test_twelve_tokens_by_hand():
    student = makers.of_pieces("12", "+", "34", "5", "=", "3", "57", ".", " ", "ok", "!")
    teacher = makers.of_pieces("1", "2", "+3", "45", "=", "357", ". ", "ok!", *"3457+o.k! ")
    ids = [*range(5, 16), student.convert_tokens_to_ids("<|im_end|>")]  # "12+345=357. ok!" and the end
    said = Translator(student, teacher).translate((Message("user", "12"),), ids)
    assert said.response_ids == (*range(5, 13), teacher.convert_tokens_to_ids("<|im_end|>"))
    spans = said.spans
    assert told(spans) == ([0, 1, 1, 1, 2, 3, 3, 4, 4, 5, 5, 6], [0, 0, 1, 1, 2, 3, 4, 5, 6], 7)
    assert spans.one_to_one.tolist() == [False, False, True, False, False, False, True]
    assert spans.kept("exact").nonzero()[0].tolist() == [4, 11]
    assert spans.kept("chunk").all()
    # Log-probs of the teacher less those of the student, span by span.
    theirs = np.array([-1.0, -0.5, -2.0, -0.25, -0.5, -3.0, -0.75, -1.25, -0.125])
    ours = np.array([-1.0, -0.5, -0.5, -1.0, -0.25, -2.0, -0.5, -0.125, -0.125, -1.0, -1.0, -0.5])
    gap = np.bincount(spans.teacher, theirs) - np.bincount(spans.student, ours)
    assert gap.tolist() == [-0.5, -0.25, -0.25, -0.5, -0.5, 0.75, 0.375]
    assert gap.sum() == theirs.sum() - ours.sum() == -0.875


def test_spans_end_where_both_sides_cut():
    assert told(tile(ends(2, 3, 4), ends(1, 2, 4))) == ([0, 1, 1], [0, 0, 1], 2)
    assert told(tile(ends(4), ends(1, 2, 3, 4))) == ([0], [0, 0, 0, 0], 1)
    assert told(tile(ends(), ends())) == ([], [], 0)


def test_a_token_of_zero_bytes_goes_with_its_place():
    assert told(tile(ends(0, 1), ends(1))) == ([0, 0], [0], 1)
    assert told(tile(ends(0, 1), ends(0, 1))) == ([0, 1], [0, 1], 2)
    assert told(tile(ends(0, 0, 1), ends(0, 1))) == ([0, 0, 1], [0, 1], 2)
    assert told(tile(ends(1, -1, 2), ends(1, 2))) == ([0, -1, 1], [0, 1], 2)


def test_what_touches_lost_bytes_is_in_no_span_and_its_neighbors_are():
    assert told(tile(ends(5, 6, 12), ends(5, 6, 12), lost=[(5, 6)])) == ([0, -1, 1], [0, -1, 1], 2)
    assert told(tile(ends(6, 12), ends(5, 6, 12), lost=[(5, 6)])) == ([-1, 0], [-1, -1, 0], 1)
    assert told(tile(ends(3, 5), ends(3), lost=[(3, 5)])) == ([0, -1], [0], 1)
    assert told(tile(ends(3), ends(), lost=[(0, 3)])) == ([-1], [], 0)


def test_a_stop_is_a_cut_that_no_merging_joins():
    spans = tile(ends(1, 2, 3, 4), ends(1, 2, 3, 4), stops=[2, 4])
    assert spans.sealed.tolist() == [False, True, False, True]
    assert told(spans.merged(np.zeros(4, dtype=bool))) == ([0, 0, 1, 1], [0, 0, 1, 1], 2)
    assert told(tile(ends(2, 4), ends(1, 3), stops=[2, 4])) == ([0, 1], [0, 1], 2)


def test_merging_joins_a_span_that_does_not_close_with_the_next():
    spans = Spans(student=ends(0, -1, 1, 2, 3), teacher=ends(0, 1, 2, 2, 3), count=4)
    closes = np.array([True, False, True, False])
    merged = spans.merged(closes)
    assert told(merged) == ([0, -1, 1, 1, 2], [0, 1, 1, 1, 2], 3)
    assert told(spans.merged(~closes, ends=np.array([False, False, True, True]))) == ([0, -1, 0, 1, 2],
                                                                                     [0, 0, 1, 1, 2], 3)
    assert told(merged.merged(np.ones(3, dtype=bool))) == told(merged)


def test_merging_does_not_reach_over_lost_bytes():
    spans = tile(ends(1, 2, 3, 4, 5), ends(1, 2, 3, 4, 5), lost=[(2, 3)])
    assert told(spans.merged(np.zeros(4, dtype=bool))) == ([0, 0, -1, 1, 1], [0, 0, -1, 1, 1], 2)


@pytest.mark.parametrize("seed", range(20))
def test_spans_are_the_smallest_that_there_are(seed):
    rng = np.random.default_rng(seed)
    ours, theirs = (np.append(np.sort(rng.integers(1, 200, size=80)), 200) for _ in range(2))
    lost = sorted({(int(a), int(a) + 3) for a in rng.integers(0, 49, size=3) * 4})
    both = sorted(set(ours.tolist()) & set(theirs.tolist()))
    student, teacher, count = [-1] * 81, [-1] * 81, 0
    for start, stop in zip([0, *both], both, strict=False):
        if any(a < stop and b > start for a, b in lost):
            continue
        for side, out in ((ours, student), (theirs, teacher)):
            for i, end in enumerate(side):
                if start < end <= stop:
                    out[i] = count
        count += 1
    assert told(tile(ours, theirs, lost=lost)) == (student, teacher, count)
