import json
import math
import random

import pytest

from tinyr2.train.health import Alarm, HealthConfig, Monitor

HEALTHY = {"loss": 0.5, "grad_norm": 1.0, "entropy": 0.5, "kl": 0.3, "reward": 0.5, "frac_reward_zero_std": 0.2,
           "completions/mean_length": 40.0, "completions/max_length": 64.0, "completions/clipped_ratio": 0.05,
           "sampling/sampling_logp_difference/mean": 1e-6, "rollouts/errored_ratio": 0.0}
SETTLED = 60  # healthy steps before a fault


def watch(rows, monitor=None, start=1):
    monitor = monitor or Monitor()
    return [alarm for step, row in enumerate(rows, start) for alarm in monitor.check(step, row)]


def after_health(*faulty):
    return watch([HEALTHY] * SETTLED + [{**HEALTHY, **row} for row in faulty])


def brief(alarms: list[Alarm]):
    return [(alarm.name, alarm.level, alarm.step - SETTLED) for alarm in alarms]


def test_one_nan_warns_at_once_and_three_in_a_row_stop():
    alarms = after_health(*[{"loss": math.nan}] * 3)
    assert brief(alarms) == [("non_finite", "warn", 1), ("non_finite", "critical", 3)]
    assert [alarm.stop for alarm in alarms] == [False, True]
    assert "loss is nan" in alarms[0].evidence and "learning_rate" in alarms[0].action


def test_three_nans_apart_do_not_stop_and_are_one_warning():
    alarms = after_health({"grad_norm": math.inf}, {}, {"grad_norm": math.inf}, {}, {"grad_norm": math.inf})
    assert brief(alarms) == [("non_finite", "warn", 1)] and not alarms[0].stop


def test_a_nan_in_the_first_step_is_not_excused_by_warm_up():
    assert [alarm.name for alarm in watch([{**HEALTHY, "loss": -math.inf}])] == ["non_finite"]


@pytest.mark.parametrize(("norm", "expected"), [
    (4.9, []), (6.0, [("grad_norm", "warn", 2)]), (11.0, [("grad_norm", "critical", 2)])])
def test_gradient_norm_is_judged_by_its_ratio_to_the_running_median(norm, expected):
    assert brief(after_health(*[{"grad_norm": norm}] * 2)) == expected


def test_a_single_gradient_spike_is_no_alarm():
    assert after_health({"grad_norm": 50.0}, {}, {"grad_norm": 50.0}) == []


def test_gradient_evidence_names_value_ratio_and_median():
    (alarm,) = after_health(*[{"grad_norm": 12.0}] * 2)
    assert alarm.evidence == "grad_norm 12, 12 × the median 1 of the last 50 steps"


def test_gradient_norms_of_steps_without_signal_do_not_lower_the_median():
    rows = [{"loss": 0.0, "grad_norm": 0.3 if step % 5 < 2 else 0.0} for step in range(90)]
    assert watch(rows) == []


def test_a_gradient_norm_over_100_warns_even_where_it_is_usual():
    assert [(a.name, a.level) for a in watch([{**HEALTHY, "grad_norm": 150.0}] * 30)] == [("grad_norm", "warn")]


@pytest.mark.parametrize(("entropy", "level"), [(0.09, "warn"), (0.009, "critical")])
def test_entropy_collapse_far_from_the_teacher_is_seen_after_20_steps(entropy, level):
    assert brief(after_health(*[{"entropy": entropy, "kl": 0.4}] * 30)) == [("entropy_collapse", level, 20)]


def test_low_entropy_near_the_teacher_is_shared_certainty():
    assert after_health(*[{"entropy": 0.001, "kl": 0.04}] * 100) == []
    assert after_health(*[{"entropy": 0.05, "kl": 0.14}] * 100) == []  # the distance more than halved
    assert watch([{"entropy": 0.02, "kl": 0.07}] * 30 + [{"entropy": 0.002, "kl": 0.045}] * 60) == []


def test_low_entropy_without_a_teacher_is_excused_by_reward_and_only_by_reward():
    def run(reward):
        rows = [{"entropy": 0.5, "reward": 0.2, "loss": 0.0}] * 10 + [{"entropy": 0.05, "reward": reward, "loss": 0.0}]
        return [alarm.name for alarm in watch(rows + rows[-1:] * 60)]
    assert run(reward=0.9) == []
    assert run(reward=0.3) == ["entropy_collapse"]


def test_a_kl_that_began_at_zero_is_a_reference_and_leaves_the_verdict_to_the_reward():
    def run(reward):
        first = {"entropy": 0.5, "kl": 0.0, "reward": 0.2}
        return [a.name for a in watch([first] * 10 + [{"entropy": 0.05, "kl": 0.3, "reward": reward}] * 60)]
    assert run(reward=0.9) == []
    assert run(reward=0.2) == ["entropy_collapse"]


def test_length_that_doubles_within_50_steps_warns():
    alarms = after_health(*[{"completions/mean_length": 40.0 + 4 * i, "completions/max_length": 400.0}
                            for i in range(1, 30)])
    # The mean of the last five is over 2 × 40 from step 13 on.
    assert brief(alarms) == [("length_explosion", "warn", 15)]
    assert "40.0" in alarms[0].evidence


def test_length_that_doubles_in_200_steps_is_growth_not_explosion():
    assert after_health(*[{"completions/mean_length": 40.0 + 0.2 * i, "completions/max_length": 400.0}
                          for i in range(200)]) == []


def test_short_answers_may_double():
    rows = [{"completions/mean_length": 4.0}] * 40 + [{"completions/mean_length": 12.0}] * 40
    assert watch(rows) == []


def test_length_found_during_warm_up_is_no_explosion():
    lengths = [10.0] * 20 + [40.0] * 60
    assert watch([{**HEALTHY, "completions/mean_length": length} for length in lengths]) == []


def test_mean_length_at_the_cap_is_critical():
    alarms = after_health(*[{"completions/mean_length": 62.0, "completions/clipped_ratio": 0.4}] * 3)
    assert brief(alarms) == [("length_explosion", "critical", 3)]
    assert "cap of 64" in alarms[0].evidence


def test_equal_lengths_that_nothing_cut_are_not_at_the_cap():
    assert after_health(*[{"completions/mean_length": 64.0, "completions/clipped_ratio": 0.0}] * 20) == []


def test_truncation_warns_over_half_and_grows_critical_over_four_fifths():
    alarms = after_health(*[{"completions/clipped_ratio": 0.6}] * 5, *[{"completions/clipped_ratio": 0.9}] * 5)
    assert brief(alarms) == [("truncation", "warn", 3), ("truncation", "critical", 8)]
    assert "60%" in alarms[0].evidence and "max_completion_length" in alarms[0].action


def test_truncation_during_warm_up_is_no_alarm():
    assert watch([{**HEALTHY, "completions/clipped_ratio": 1.0}] * 20 + [HEALTHY] * 30) == []


@pytest.mark.parametrize(("reward", "cause", "levels"), [
    (0.0, "all wrong", ["warn", "critical"]), (0.4, "constant", ["warn", "critical"]), (1.0, "all right", ["warn"])])
def test_equal_rewards_name_their_cause(reward, cause, levels):
    alarms = after_health(*[{"frac_reward_zero_std": 1.0, "reward": reward}] * 40)
    assert [(alarm.name, alarm.level) for alarm in alarms] == [("equal_rewards", level) for level in levels]
    assert [alarm.step - SETTLED for alarm in alarms] == [3, 20][:len(levels)]
    assert all(cause in alarm.evidence for alarm in alarms)


def test_the_causes_of_equal_rewards_follow_the_range_of_the_reward():
    monitor = Monitor(HealthConfig(reward_worst=-1.0, reward_best=1.0))
    (alarm,) = watch([{"frac_reward_zero_std": 0.9, "reward": -1.0}] * 30, monitor)
    assert "all wrong" in alarm.evidence


def test_the_log_prob_gap_warns_and_grows_critical_also_in_the_first_steps():
    gap = "sampling/sampling_logp_difference/mean"
    alarms = watch([{gap: 0.15}] * 3 + [{gap: 0.25}] * 3)
    assert [(a.name, a.level, a.step) for a in alarms] == [("logp_gap", "warn", 3), ("logp_gap", "critical", 6)]
    assert "0.15" in alarms[0].evidence


def test_errored_rollouts_over_5_percent_warn():
    assert brief(after_health(*[{"rollouts/errored_ratio": 0.06}] * 3)) == [("errored_rollouts", "warn", 3)]
    assert after_health(*[{"rollouts/errored_ratio": 0.05}] * 9) == []


@pytest.mark.parametrize(("metrics", "expected"), [
    ({"teacher/far/failed": 0.06}, [("unheard_teacher", "warn", 3)]),
    ({"teacher/far/failed": 0.05}, []),
    ({"teacher/near/failed": 0.0, "teacher/far/failed": 0.99}, [("unheard_teacher", "critical", 3)]),
    ({"teacher/near/unread": 1.0}, [("unheard_teacher", "warn", 3)]),
    ({"teacher/near/unread": 0.9}, []),  # a privileged teacher whom there is mostly nothing to show
])
def test_a_teacher_that_cannot_be_heard_is_told_of(metrics, expected):
    found = after_health(*[metrics] * 5)
    assert brief(found) == expected and not any(a.stop for a in found)


def test_an_alarm_is_silent_while_it_lasts_and_returns_only_after_it_cleared():
    bad = {"completions/clipped_ratio": 0.6}
    assert brief(after_health(*[bad] * 9, {}, {}, *[bad] * 9)) == [("truncation", "warn", 3)]  # two good: not cleared
    assert brief(after_health(*[bad] * 9, {}, {}, {}, *[bad] * 3)) == [("truncation", "warn", 3),
                                                                      ("truncation", "warn", 15)]


def test_absent_metrics_raise_nothing_and_break_no_row_of_hits():
    bad = {"completions/clipped_ratio": 0.6}
    alarms = watch([HEALTHY] * SETTLED + [bad, {"eval_pass_at_1": 0.5}, bad, {}, bad])
    assert [(a.name, a.step - SETTLED) for a in alarms] == [("truncation", 5)]


def healthy_distillation(seed, steps=400):
    """A tiny student nears its teacher: entropy 1.2 → 0.05, gradient norm 3 → 0.2, length steady, noise on all."""
    draw = random.Random(seed)
    for step in range(steps):
        far = math.exp(-step / 60)
        yield {"loss": 1.1 * far + 0.03 + draw.gauss(0, 0.01),
               "grad_norm": (2.8 * far + 0.2) * draw.lognormvariate(0, 0.3),
               "entropy": (1.15 * far + 0.05) * draw.lognormvariate(0, 0.1),
               "kl": (1.1 * far + 0.03) * draw.lognormvariate(0, 0.15),
               "completions/mean_length": 40 + draw.gauss(0, 3), "completions/max_length": 64.0,
               "completions/clipped_ratio": max(0.0, 0.3 * far + draw.gauss(0, 0.02)),
               "reward": 0.95 - 0.6 * far + draw.gauss(0, 0.03), "frac_reward_zero_std": 0.6 - 0.4 * far,
               "sampling/sampling_logp_difference/mean": 1e-6, "rollouts/errored_ratio": 0.0}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("hidden", [(), ("kl",), ("kl", "reward")], ids=["all", "no kl", "loss alone"])
def test_a_healthy_distillation_raises_no_alarm_whatever_it_measures(seed, hidden):
    rows = [{key: value for key, value in row.items() if key not in hidden} for row in healthy_distillation(seed)]
    assert watch(rows) == []


@pytest.mark.parametrize("cut", [0, 5, 30, 62, 75, 81, 95])
def test_a_monitor_restored_through_json_raises_the_same_later_alarms(cut):
    rows = list(healthy_distillation(1, 60)) + [
        {**row, "grad_norm": 90.0 if 60 <= step < 64 else row["grad_norm"], "entropy": 0.004, "kl": 0.9,
         "completions/clipped_ratio": 0.7 if step % 9 else 0.1, "completions/mean_length": 40.0 + 3 * step,
         "completions/max_length": 900.0, "loss": math.nan if step in (80, 81, 82) else 0.2}
        for step, row in enumerate(healthy_distillation(2, 60), 60)]
    whole = Monitor()
    expected = watch(rows, whole)
    first, second = Monitor(), Monitor()
    before = watch(rows[:cut], first)
    second.restore(json.loads(json.dumps(first.state(), allow_nan=False)))
    assert before + watch(rows[cut:], second, start=cut + 1) == expected
    assert second.state() == whole.state()
    assert {a.name for a in expected} == {"grad_norm", "entropy_collapse", "truncation", "length_explosion",
                                          "non_finite"}


def test_state_is_a_copy_that_later_steps_do_not_change():
    monitor = Monitor()
    watch([HEALTHY] * 3, monitor)
    state = monitor.state()
    copy = json.loads(json.dumps(state))
    watch([HEALTHY] * 30, monitor, start=4)
    other = Monitor()
    other.restore(state)
    watch([HEALTHY] * 5, other, start=4)
    assert state == copy


def test_an_alarm_row_is_an_event_with_evidence_and_action():
    (alarm,) = watch([{"loss": math.nan}])
    assert alarm.row() == {"event": "alarm", "step": 1, "name": "non_finite", "level": "warn",
                           "evidence": alarm.evidence, "action": alarm.action, "stop": False}


def guarded(**more):
    return Monitor(HealthConfig(**({"max_drop": 0.1} | more)))


def evaluations(*values):
    """A step with each value, and two without an evaluation after it."""
    return [row for v in values for row in ({**HEALTHY, "eval_pass@1": v}, HEALTHY, HEALTHY)]


def test_a_student_that_unlearns_is_halted_at_the_first_evaluation_below_its_best():
    (alarm,) = watch(evaluations(0.50, 0.63, 0.54, 0.52), guarded())
    assert (alarm.name, alarm.level, alarm.step, alarm.stop) == ("held_out_drop", "critical", 10, True)
    assert alarm.evidence == "eval_pass@1 0.52, 0.11 below its best, 0.63 at step 4"
    assert alarm.action.startswith("the best model so far is in best/, take that one; for a new run, give a KL to the")


def test_a_drop_of_just_the_bound_is_allowed_and_an_unguarded_run_may_fall_freely():
    assert watch(evaluations(0.5, 0.375, 0.5), guarded(max_drop=0.125)) == []
    assert watch(evaluations(0.9, 0.0, 0.0)) == []


def test_steps_without_an_evaluation_neither_count_nor_clear():
    alarms = watch(evaluations(0.6, 0.4, 0.4, 0.4), guarded(drop_patience=3))
    assert [(a.level, a.step, a.stop) for a in alarms] == [("warn", 4, False), ("critical", 10, True)]


def test_a_student_that_recovers_within_the_patience_is_not_halted():
    alarms = watch(evaluations(0.6, 0.4, 0.55, 0.4, 0.6, 0.61), guarded(drop_patience=2))
    assert [(a.level, a.stop) for a in alarms] == [("warn", False)]


def test_the_best_of_the_start_counts():
    monitor = guarded()
    monitor.note(0, {"eval_pass@1": 0.63})
    (alarm,) = watch(evaluations(0.01), monitor)
    assert alarm.stop and alarm.evidence == "eval_pass@1 0.01, 0.62 below its best, 0.63 at step 0"
    assert alarm.action.startswith("the best model so far is in best/, take that one")


def test_the_guard_watches_the_metric_that_it_is_told_to():
    rows = [{"eval_maj@4": 0.8, "eval_pass@1": 0.1}, {"eval_maj@4": 0.79, "eval_pass@1": 0.0}, {"eval_maj@4": 0.6}]
    (alarm,) = watch(rows, guarded(drop_metric="eval_maj@4"))
    assert alarm.step == 3 and alarm.evidence.startswith("eval_maj@4 0.6, 0.2 below")


def test_an_evaluation_that_is_no_number_is_not_the_best():
    assert [a.step for a in watch(evaluations(0.6, math.nan, 0.4), guarded())] == [7]


@pytest.mark.parametrize("name", ["eval_kl", "eval_loss", "reward"])
def test_a_metric_of_which_less_is_better_cannot_be_guarded(name):
    with pytest.raises(ValueError, match="of which more is better; take eval_pass@1"):
        HealthConfig(drop_metric=name)


@pytest.mark.parametrize("cut", range(0, 13, 3))
def test_a_guard_restored_through_json_halts_where_the_undisturbed_one_does(cut):
    rows, whole = evaluations(0.6, 0.45, 0.6, 0.45, 0.44), guarded(drop_patience=2)
    expected = watch(rows, whole)
    first, second = guarded(drop_patience=2), guarded(drop_patience=2)
    before = watch(rows[:cut], first)
    second.restore(json.loads(json.dumps(first.state(), allow_nan=False)))
    assert before + watch(rows[cut:], second, start=cut + 1) == expected
    assert second.state() == whole.state() and expected[-1].stop and expected[-1].step == 13


def test_a_monitor_that_forgets_keeps_the_best_and_halts_again():
    monitor = guarded()
    assert [a.stop for a in watch(evaluations(0.6, 0.1), monitor)] == [True]
    monitor.forget()
    (alarm,) = watch(evaluations(0.2), monitor, start=7)
    assert alarm.stop and "0.6 at step 1" in alarm.evidence


def test_a_checkpoint_from_before_the_guard_restores():
    old = Monitor().state()
    del old["tracks"]["held_out_drop"], old["best"], old["best_step"]
    monitor = guarded()
    monitor.restore(old)
    assert [a.name for a in watch(evaluations(0.6, 0.1), monitor)] == ["held_out_drop"]
