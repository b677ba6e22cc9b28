from tinyr2.report.table import Row, Table, format_value, result_table, to_text

ROWS = {"teacher": {"params": 1002960, "pass_at_1": 0.9734, "low": 0.9619, "high": 0.9815, "n": 1024,
                    "tokens_per_s": 5210.4, "peak_mib": 312.44, "seconds": 41.23},
        "student_opd": {"params": 54321, "pass_at_1": 0.5, "low": 0.4694, "high": 0.5306, "n": 1024,
                        "tokens_per_s": 910.26, "peak_mib": None, "seconds": 7.0}}


def test_a_result_row_reads_as_percent_interval_and_counts():
    table = result_table(ROWS)
    assert table.columns == ("params", "pass@1", "95% interval", "n", "tokens/s", "peak MiB", "seconds")
    assert table.rows[0] == Row("teacher", ("1,002,960", "97.3%", "96.2% – 98.2%", "1,024", "5,210", "312.4", "41.2"))
    assert table.rows[1].cells == ("54,321", "50.0%", "46.9% – 53.1%", "1,024", "910.3", "–", "7.0")


def test_rows_with_different_columns_leave_gaps():
    table = result_table({"a": {"x": 1}, "b": {"y": 0.00123456}})
    assert table.columns == ("x", "y")
    assert [row.cells for row in table.rows] == [("1", "–"), ("–", "0.001235")]


def test_a_low_without_a_high_keeps_columns_of_their_own():
    table = result_table({"a": {"low": 0.1, "high": 0.3}, "b": {"low": 0.2}})
    assert table.columns == ("low", "high") and table.rows[1].cells == ("20.0%", "–")


def test_plain_text_is_aligned_with_names_left_and_values_right():
    table = Table(("n", "pass@1"), (Row("teacher", ("1,024", "97.3%")), Row("cold", ("8", "0.1%"))), "Result")
    assert to_text(table) == ("Result\n"
                              "             n  pass@1\n"
                              "-------  -----  ------\n"
                              "teacher  1,024   97.3%\n"
                              "cold         8    0.1%")


def test_lists_of_single_verdicts_are_no_column():
    table = result_table({"a": {"n": 2, "correct": [True, False]}, "b": {"n": 2, "correct": [True, True]}})
    assert table.columns == ("n",)


def test_names_cannot_carry_control_sequences():
    assert result_table({"\x1b[31mred": {"\x07x": "\x1b[2Jv"}}) == Table(("x",), (Row("red", ("v",)),))


def test_values_keep_four_figures_and_booleans_are_words():
    assert [format_value("x", v) for v in (0.123456, 12345.6, True, -0.5)] == ["0.1235", "12,346", "True", "-0.5"]
