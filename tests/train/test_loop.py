import signal

import pytest
import torch

from tests.train.tiny import qwen3
from tinyr2.train import state as checkpoint
from tinyr2.train.loop import Job, StepResult, TrainConfig, run
from tinyr2.train.optim import make_optimizer


class Notes:
    """A recorder that remembers."""

    def __init__(self):
        self.rows, self.clocks, self.alarms, self.events, self.shown = [], [], [], [], []

    def record(self, metrics, timing, alarms):
        self.rows.append(metrics)
        self.clocks.append(timing)
        self.alarms += alarms

    def completions(self, step, result):
        self.shown.append(step)

    def event(self, name, **facts):
        self.events.append((name, facts))

    def cursors(self):
        return {"metrics.jsonl": len(self.rows)}


class World:
    """A model that learns one sentence, and what its loop did."""

    def __init__(self, folder, spoil=lambda step, model: None, evaluate=None, **settings):
        self.config = TrainConfig(**({"max_steps": 6, "save_steps": 2, "learning_rate": 1e-2} | settings))
        self.model, self.notes, self.kept, self.seen = qwen3(), Notes(), [], []
        self.state = checkpoint.TrainState(model=self.model, optimizer=make_optimizer(self.model, self.config))
        self.spoil = spoil
        self.job = Job(config=self.config, compute=self.compute, recorder=self.notes,
                       checkpoints=folder / "checkpoints", evaluate=evaluate,
                       keep_best=lambda: self.kept.append(self.state.step))

    def compute(self, step):
        self.seen.append(step)
        loss = self.model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss
        loss.backward()
        self.spoil(step, self.model)
        return StepResult(metrics={"loss": float(loss.detach())}, num_tokens=8)

    def saved(self):
        return sorted(int(p.name[5:]) for p in self.job.checkpoints.glob("step-*"))


def test_a_loop_counts_steps_and_tokens_lowers_the_loss_and_saves(tmp_path):
    world = World(tmp_path)
    assert run(world.state, world.job) == "finished"
    assert world.seen == [0, 1, 2, 3, 4, 5]
    assert [r["step"] for r in world.notes.rows] == [1, 2, 3, 4, 5, 6]
    assert [r["num_tokens"] for r in world.notes.rows] == [8, 16, 24, 32, 40, 48]
    assert world.notes.rows[-1]["loss"] < world.notes.rows[0]["loss"]
    assert world.notes.rows[0]["learning_rate"] == 1e-2
    assert world.saved() == [4, 6]


def test_a_step_that_is_not_finite_leaves_the_weights_alone_and_three_of_them_halt(tmp_path):
    def spoil(step, model):
        if step >= 2:
            model.model.norm.weight.grad[0] = float("nan")

    world = World(tmp_path, spoil, max_steps=20)
    before = {}

    def compute(step, inner=world.compute):
        if step == 2:
            before.update({n: p.detach().clone() for n, p in world.model.named_parameters()})
        return inner(step)

    world.job = Job(config=world.config, compute=compute, recorder=world.notes, checkpoints=tmp_path / "checkpoints")
    assert run(world.state, world.job) == "halted"
    assert all(torch.equal(p, before[n]) for n, p in world.model.named_parameters())
    assert [a.level for a in world.notes.alarms if a.stop] == ["critical"]
    assert world.state.step == 5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_takes_a_checkpoint_at_the_next_step_boundary_and_stops(tmp_path, number):
    world = World(tmp_path, lambda step, model: signal.raise_signal(number) if step == 2 else None, max_steps=20,
                  save_steps=100)
    before = signal.getsignal(number)
    assert run(world.state, world.job) == "stopped"
    assert world.saved() == [3]
    assert signal.getsignal(number) == before


def test_a_disk_that_does_not_take_a_checkpoint_raises_an_alarm_and_training_goes_on(tmp_path, monkeypatch):
    world = World(tmp_path)
    save, failed = checkpoint.save, []

    def full(*args, **more):
        if not failed:
            failed.append(True)
            raise checkpoint.CheckpointSkipped("no space left on device")
        return save(*args, **more)

    monkeypatch.setattr(checkpoint, "save", full)
    assert run(world.state, world.job) == "finished"
    assert [(n, f["level"], f["step"]) for n, f in world.notes.events] == [("checkpoint_skipped", "critical", 2)]
    assert world.saved() == [4, 6]


def test_evaluations_are_part_of_their_step_and_the_best_is_kept(tmp_path):
    scores = {0: 0.1, 2: 0.5, 4: 0.3, 6: 0.5}
    world = World(tmp_path, evaluate=lambda step: {"eval_pass@1": scores[step]}, eval_steps=2, eval_on_start=True,
                  load_best_model_at_end=True)
    assert run(world.state, world.job) == "finished"
    assert [(r["step"], r["eval_pass@1"]) for r in world.notes.rows if "eval_pass@1" in r] == list(scores.items())
    assert world.kept == [0, 2]
    assert world.state.monitor["best"] == {"step": 2, "value": 0.5}


def test_without_a_pass_rate_the_lowest_divergence_is_the_best(tmp_path):
    scores = {2: 0.5, 4: 0.3, 6: 0.4}
    world = World(tmp_path, evaluate=lambda step: {"eval_kl": scores[step]}, eval_steps=2, load_best_model_at_end=True)
    run(world.state, world.job)
    assert world.kept == [2, 4]


def test_completions_are_shown_at_the_first_step_and_every_so_many(tmp_path):
    world = World(tmp_path, log_completions_steps=3)
    run(world.state, world.job)
    assert world.notes.shown == [1, 3, 6]
