"""Line-ups as tables and drawings: columns stand above each other in a terminal's cells, and nothing steers it."""

import unicodedata

import pytest
from rich.cells import cell_len

from tests.tokens.makers import MADE, of_pieces, tokenizer_of
from tinyr2.report.lineup import WIDTH, lineup_lines, lineup_table, roles_lines, shown, worst_lines
from tinyr2.report.table import to_text
from tinyr2.tokens.lineup import compare, line_up, lost_bytes, roles, vocabulary, worst
from tinyr2.tokens.samples import SAMPLES
from tinyr2.tokens.translate import Translator


def drawn(student, teacher, *texts: str, width: int = WIDTH) -> list[str]:
    translator = Translator(student, teacher)
    return lineup_lines(line_up(translator, [(f"k{i}", text) for i, text in enumerate(texts)]), translator, width)


def test_a_drawing_of_spans_is_that_made_by_hand():
    student, teacher = of_pieces("ab", "c", "d", "x", "漢字"), of_pieces("a", "b", "cd", "x", "漢", "字")
    assert drawn(student, teacher, "xabcdx漢字x")[1:] == [
        "", "k0:",
        "A ┃x┃ab ┃c╎d┃x┃漢字 ┃x┃",
        "B ┃x┃a╎b┃cd ┃x┃漢╎字┃x┃",
        "     ~~~ ~~~   ~~~~~"]


def test_the_line_with_the_most_tokens_outside_exact_spans_is_drawn():
    lines = drawn(of_pieces("a", "b", "x", "\n"), of_pieces("ab", "x", "\n"), "xxxx\nxab\nababx\nx")
    assert lines[3] == "A ┃a╎b┃a╎b┃x┃⏎┃"


@pytest.mark.parametrize(("student", "teacher"), [(a, b) for a in MADE for b in MADE])
def test_both_rows_of_a_drawing_are_equally_wide_and_within_the_width(student, teacher):
    lines = drawn(tokenizer_of(student), tokenizer_of(teacher), *SAMPLES.values(), width=60)
    rows = [line for line in lines if line.startswith(("A ┃", "B ┃"))]
    assert len(rows) >= 2 * len(SAMPLES)
    for ours, theirs in zip(rows[::2], rows[1::2], strict=True):
        assert (ours[0], theirs[0]) == ("A", "B")
        assert cell_len(ours) == cell_len(theirs) <= 60
        # the signs between spans stand in the same cells
        assert ([cell_len(ours[:i]) for i, c in enumerate(ours) if c == "┃"]
                == [cell_len(theirs[:i]) for i, c in enumerate(theirs) if c == "┃"])


def test_characters_without_a_cell_of_their_own_are_escapes():
    assert shown("e\u0301") == r"e\u0301"
    assert shown("👨\u200d👩👍🏽") == "👨\\u200d👩👍\\U0001f3fd"
    assert shown("🇩") == r"\U0001f1e9"
    assert shown("a\x1b[0m\x07") == r"a\x1b[0m\x07"
    assert (shown(" \t\n"), shown("")) == ("·⇥⏎", "∅")


def test_what_is_shown_of_the_samples_joins_nothing():
    for text in SAMPLES.values():
        seen = shown(text)
        assert cell_len(seen) == sum(cell_len(c) for c in seen)
        assert not [c for c in seen if unicodedata.category(c) in ("Mn", "Me", "Mc", "Cf", "Cc")]


def test_the_table_has_a_row_for_each_kind_and_one_for_all():
    translator = Translator(of_pieces("ab", "x"), of_pieces("a", "b", "x"))
    found = compare(line_up(translator, [("one", "abx"), ("two", "xx")]))
    table = lineup_table(found)
    assert [row.name for row in table.rows] == ["one", "two", "all"]
    assert table.columns == ("of A", "of B", "exact", "chunk", "mapped", "marginal")
    assert table.rows[0].cells == ("2", "3", "50.0/33.3", "100/100", "50.0/33.3", "50.0/33.3")
    assert len(lineup_table(compare(line_up(translator, [("one", "abx")]))).rows) == 1


@pytest.mark.parametrize(("student", "teacher"), [("bytes", "bytes"), ("bytes", "wordpiece")])
def test_the_table_of_the_samples_fits_a_terminal_of_80_cells(student, teacher):
    translator = Translator(tokenizer_of(student), tokenizer_of(teacher))
    title, *lines = to_text(lineup_table(compare(line_up(translator, [*SAMPLES.items()])))).splitlines()
    assert cell_len(title) < 80
    assert max(map(cell_len, lines)) <= 76  # drawn with rims it is 4 wider


def test_vocabulary_roles_losses_and_longest_spans_are_told_in_lines():
    translator = Translator(tokenizer_of("bytes"), tokenizer_of("wordpiece"))
    lineups = line_up(translator, [("k", "The hat, the cat")])
    found = {"vocabulary": vocabulary(translator), "roles": roles(translator), "lost": lost_bytes(lineups),
             "worst": worst(lineups, translator)}
    text = "\n".join([*roles_lines(found), *worst_lines(found)])
    assert f"mapped vocabulary: {len(translator.pairs[0])} tokens" in text
    assert "  end          <|im_end|>" in text
    assert "→ <|im_end|>" in text
    assert "  B, k: The" in text
    assert "only B" in text
    nothing = found | {"lost": [], "worst": []}
    assert roles_lines(nothing)[-1] == "lost bytes: none"
    assert worst_lines(nothing) == ["longest spans: none, every span is one token on either side"]
