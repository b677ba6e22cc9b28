import math

import pytest

from tinyr2.report.charts import BOTTOM, LEFT, RIGHT, TOP, draw, short


def pixels(path):
    return [tuple(map(float, pair.split(","))) for pair in path.split()]


def test_the_corners_of_a_curve_are_the_corners_of_the_plot():
    chart = draw("loss", {"loss": [(0, 2.0), (5, 3.0), (10, 1.0)]}, (0, 10))
    assert pixels(chart.lines[0].paths[0]) == [(LEFT, (TOP + BOTTOM) / 2), ((LEFT + RIGHT) / 2, TOP), (RIGHT, BOTTOM)]
    assert chart.lines[0].last == "1" and not chart.logarithmic


def test_evaluations_share_the_step_axis_and_get_dots():
    series = {"kl": [(0, 1.0), (100, 0.5)], "eval_kl": [(50, 0.75)]}
    chart = draw("KL", series, (0, 100), dotted={"eval_kl"})
    assert chart.lines[0].dots == ()
    assert chart.lines[1].dots == ((f"{(LEFT + RIGHT) / 2:.1f}", f"{(TOP + BOTTOM) / 2:.1f}", "step 50: 0.75"),)


def test_a_curve_breaks_where_it_is_not_finite_and_says_how_often():
    chart = draw("loss", {"loss": [(0, 1.0), (1, 2.0), (2, math.nan), (3, 1.0), (4, 2.0), (5, math.inf)]}, (0, 5))
    assert [len(pixels(path)) for path in chart.lines[0].paths] == [2, 2]
    assert (chart.lines[0].missing, chart.lines[0].last) == (2, "2")


def test_a_curve_without_finite_values_is_no_chart():
    assert draw("loss", {"loss": [(0, math.nan)]}, (0, 1)) is None and draw("x", {}, (0, 1)) is None


def test_a_long_curve_keeps_its_spike_and_stays_small():
    points = [(step, 1.0) for step in range(100_000)]
    points[54_321] = (54_321, 9.0)
    (path,) = draw("norm", {"norm": points}, (0, 99_999)).lines[0].paths
    assert len(pixels(path)) < 450
    assert min(y for _, y in pixels(path)) == TOP


def test_a_wide_positive_span_is_logarithmic_with_ticks_at_powers_of_ten():
    chart = draw("lr", {"lr": [(0, 1e-4), (1, 1.0)]}, (0, 1))
    assert chart.logarithmic
    assert [label for _, label in chart.y_ticks] == ["0.0001", "0.001", "0.01", "0.1", "1"]
    assert [float(y) for y, _ in chart.y_ticks] == [BOTTOM, 127.0, 88.0, 49.0, TOP]


@pytest.mark.parametrize("steps", [(1, 1), (1, 2), (1, 7), (0, 1234567), (3, 40)])
def test_step_ticks_are_whole_numbers_inside_the_axis(steps):
    chart = draw("x", {"x": [(steps[0], 1.0), (steps[1], 2.0)]}, steps)
    labels = [int(label.replace(",", "")) for _, label in chart.x_ticks]
    assert labels and len(labels) <= 6 and len(set(labels)) == len(labels)
    assert all(steps[0] <= label <= steps[1] for label in labels)


def test_a_flat_curve_lies_in_the_middle():
    chart = draw("x", {"x": [(0, 0.0), (1, 0.0)]}, (0, 1))
    assert [y for _, y in pixels(chart.lines[0].paths[0])] == [(TOP + BOTTOM) / 2] * 2


def test_marks_outside_the_axis_are_left_out():
    assert draw("x", {"x": [(0, 1.0), (10, 2.0)]}, (0, 10), marks=[5, 11]).marks == ("199.0",)


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (0.03125, "0.0312"), (1234.5, "1234"), (12345, "12.3k"),
                                             (2.5e6, "2.5M"), (3.1e-7, "3.1e-07"), (-0.5, "-0.5"), (1e13, "1e+13")])
def test_numbers_are_short(value, text):
    assert short(value) == text
