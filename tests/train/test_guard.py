"""What a guard asks of training, and that a loop obeys it."""

import pytest

from tests.train.test_loop import World
from tinyr2.core.errors import ConfigError
from tinyr2.train import state as checkpoint
from tinyr2.train.guard import GuardConfig, guarded
from tinyr2.train.health import HealthConfig
from tinyr2.train.loop import TrainConfig, run


def test_a_guarded_run_evaluates_its_start_and_halts_on_a_drop():
    config = TrainConfig(eval_steps=5, health=HealthConfig(patience=4))
    found = guarded(config, GuardConfig(max_drop=0.2, patience=2, metric="eval_maj@8"), evaluates=True)
    assert found.eval_on_start and found.eval_steps == 5
    assert found.health == HealthConfig(patience=4, max_drop=0.2, drop_patience=2, drop_metric="eval_maj@8")
    assert TrainConfig.model_validate(found.model_dump()) == found


def test_a_guard_that_is_switched_off_changes_nothing():
    config = TrainConfig()
    assert guarded(config, GuardConfig(max_drop=None), evaluates=False) is config


@pytest.mark.parametrize(("evaluates", "message"), [(True, "set train.eval_steps=10"), (False, "give eval_data")])
def test_a_guard_with_nothing_to_watch_is_refused_with_the_cure(evaluates, message):
    with pytest.raises(ConfigError, match=message):
        guarded(TrainConfig(), GuardConfig(), evaluates=evaluates)


def test_a_bound_without_evaluations_is_no_training_config():
    with pytest.raises(ValueError, match="set eval_steps to 1 or more"):
        TrainConfig(health=HealthConfig(max_drop=0.1))


@pytest.mark.parametrize("name", ["eval_kl", "loss"])
def test_a_guard_of_a_metric_that_should_fall_is_refused(name):
    with pytest.raises(ValueError, match="of which more is better"):
        GuardConfig(metric=name)


def guarded_world(folder, scores, name="eval_pass@1", **more):
    health = HealthConfig(max_drop=0.1, **more)
    return World(folder, evaluate=lambda step: {name: scores[step]}, eval_steps=2, eval_on_start=True, max_steps=20,
                 save_steps=100, health=health)


def test_a_loop_halts_where_the_student_unlearns_with_a_checkpoint_and_the_best_model_kept(tmp_path):
    world = guarded_world(tmp_path, {0: 0.3, 2: 0.5, 4: 0.45, 6: 0.2})
    assert run(world.state, world.job) == "halted"
    assert world.state.step == 6 and world.saved() == [6] and world.kept == [0, 2]
    (alarm,) = world.notes.alarms
    assert alarm.name == "held_out_drop" and "best/" in alarm.action


def test_the_start_is_the_best_where_the_first_evaluation_is_far_below_it(tmp_path):
    world = guarded_world(tmp_path, {0: 0.63, 2: 0.008})
    assert run(world.state, world.job) == "halted"
    assert world.notes.alarms[0].evidence == "eval_pass@1 0.008, 0.622 below its best, 0.63 at step 0"


def test_a_halted_run_that_is_resumed_still_knows_its_best(tmp_path):
    scores = {0: 0.3, 2: 0.5, 4: 0.2, 6: 0.21}
    first = guarded_world(tmp_path, scores)
    run(first.state, first.job)
    second = guarded_world(tmp_path, scores)
    checkpoint.load(second.job.checkpoints, second.state, say=print)
    assert run(second.state, second.job) == "halted" and second.state.step == 6
    assert "0.5 at step 2" in second.notes.alarms[0].evidence


def test_an_evaluation_without_the_guarded_metric_stops_before_the_first_step(tmp_path):
    world = guarded_world(tmp_path, {0: 0.3}, name="eval_kl")
    with pytest.raises(ConfigError, match="watches eval_pass@1, and the evaluation gave eval_kl; give eval_data"):
        run(world.state, world.job)
    assert world.seen == []
