"""The loop: gradient, clip, step, record, watch, save; again.

In: a state and a function that computes one step's gradient. Out: how it ended. Everything that a step needs is derived
from its number, so a loop that starts from a checkpoint goes on as if nothing had happened.
"""

import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import torch
from pydantic import Field, model_validator

from tinyr2.core.errors import ConfigError
from tinyr2.core.rng import derive
from tinyr2.core.types import Rollout
from tinyr2.train import state as checkpoint
from tinyr2.train.health import Alarm, HealthConfig, Monitor
from tinyr2.train.optim import Offloaded, OptimConfig, Optimizer, clip, learning_rate
from tinyr2.train.step import Scores

Ending = Literal["finished", "stopped", "halted"]


class TrainConfig(OptimConfig):
    """How long, how often, from which seed; names are TRL's."""

    max_steps: int = Field(100, ge=1)
    seed: int = 0
    deterministic: bool = False  # bit-exact resume: deterministic kernels, fixed threads
    tokens_per_micro_batch: int = Field(8192, ge=1)
    bf16: bool | None = None  # bfloat16 products over float32 weights; None: on CUDA only
    gradient_checkpointing: bool = False  # the backward pass computes each layer again: less memory, more time
    save_steps: int = Field(50, ge=1)
    save_total_limit: int = Field(2, ge=2)
    eval_steps: int = Field(0, ge=0)  # 0: only at the end
    eval_on_start: bool = False  # a row of step 0 says where the student began
    load_best_model_at_end: bool = False  # final/ is the best evaluated model, not the last
    log_completions_steps: int = Field(10, ge=0)  # 0: never
    num_threads: int = Field(0, ge=0)  # CPU threads; 0: torch's own choice
    health: HealthConfig = HealthConfig()

    @model_validator(mode="after")
    def _something_to_watch(self) -> "TrainConfig":
        if self.health.max_drop is not None and not self.eval_steps:
            raise ValueError("health.max_drop watches evaluations, and eval_steps: 0 has none before the end; set "
                             "eval_steps to 1 or more, or max_drop to null")
        return self


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step did before the optimizer moved."""

    metrics: Mapping[str, float]
    num_tokens: int  # tokens of this step, prompts included
    rollouts: Sequence[Rollout] = ()
    scores: Scores | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)  # of its phases


class Recorder(Protocol):
    """Where a loop writes; the report room has one."""

    def record(self, metrics: dict, timing: dict, alarms: Sequence[Alarm]) -> None: ...
    def completions(self, step: int, result: StepResult) -> None: ...
    def event(self, name: str, **facts) -> None: ...
    def cursors(self) -> dict[str, int]: ...


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the recipe hands to the loop."""

    config: TrainConfig
    compute: Callable[[int], StepResult]  # leaves gradients on the parameters
    recorder: Recorder
    checkpoints: Path
    evaluate: Callable[[int], dict[str, float]] | None = None  # after this many steps; names start with eval_
    keep_best: Callable[[], None] | None = None  # called where an evaluation is the best so far


def run(state: checkpoint.TrainState, job: Job) -> Ending:
    """Train from `state.step` to `max_steps`, or to a signal or a critical alarm."""
    monitor = Monitor(job.config.health)
    if "health" in state.monitor:
        monitor.restore(state.monitor["health"])
    state.monitor.setdefault("best", None)
    if state.step == 0 and job.config.eval_on_start and job.evaluate is not None:
        start = time.perf_counter()
        found = _measured(state, job)
        _keep_if_best(state, job, found)
        monitor.note(0, found)
        job.recorder.record({"step": 0, **found}, {"step": 0, "eval_s": time.perf_counter() - start}, [])
    with _signals() as asked:
        while state.step < job.config.max_steps:
            alarms = _one_step(state, job, monitor)
            done = state.step == job.config.max_steps
            halt = any(a.stop for a in alarms)
            if halt:
                monitor.forget()  # a resumed run is judged anew, and may halt again
            state.monitor["health"] = monitor.state()
            if done or halt or asked or state.step % job.config.save_steps == 0:
                _save(state, job)
            if halt:
                return "halted"
            if asked and not done:
                return "stopped"
    return "finished"


def _one_step(state: checkpoint.TrainState, job: Job, monitor: Monitor) -> list[Alarm]:
    start = time.perf_counter()
    config = job.config
    torch.manual_seed(derive(config.seed, "torch", state.step))  # dropout's only source
    rate = learning_rate(config, state.step, config.max_steps)
    for group in state.optimizer.param_groups:
        group["lr"] = rate * group.get("rate_factor", 1.0)
    state.optimizer.zero_grad()
    result = job.compute(state.step)
    norms = update(state.optimizer, config.max_grad_norm, result.metrics["loss"])
    state.step += 1
    state.num_tokens += result.num_tokens
    row = {"step": state.step, **result.metrics, **norms, "learning_rate": rate, "num_tokens": state.num_tokens}
    trained_s = time.perf_counter() - start
    row |= _evaluate(state, job)
    alarms = monitor.check(state.step, row)
    every = config.log_completions_steps
    if every and (state.step % every == 0 or state.step in (1, config.max_steps)):
        job.recorder.completions(state.step, result)
    timing = {"step": state.step, "step_s": trained_s, **result.seconds,
              "eval_s": time.perf_counter() - start - trained_s}
    job.recorder.record(row, timing, alarms)
    return alarms


def update(optimizer: Optimizer | Offloaded, max_grad_norm: float, loss: float) -> dict[str, float]:
    """Clip, step, and drop the gradients; returns the norms that they had.

    Parameters whose group names a `part` (a critic, beside the policy) are clipped on their own, and have no norm where
    none of them has a gradient. A step whose loss or norm is not finite is skipped; the monitor raises its alarm.
    """
    parts: dict[str, list[torch.Tensor]] = {}
    for group in optimizer.param_groups:
        parts.setdefault(group.get("part", ""), []).extend(group["params"])
    norms = {f"{part}/grad_norm" if part else "grad_norm": clip(params, max_grad_norm)
             for part, params in parts.items() if not part or any(p.grad is not None for p in params)}
    if all(map(math.isfinite, (loss, *norms.values()))):
        optimizer.step()
    optimizer.zero_grad()
    return norms


def _evaluate(state: checkpoint.TrainState, job: Job) -> dict[str, float]:
    every, last = job.config.eval_steps, state.step == job.config.max_steps
    if job.evaluate is None or not (last or (every and state.step % every == 0)):
        return {}
    metrics = _measured(state, job)
    _keep_if_best(state, job, metrics)
    return metrics


def _keep_if_best(state: checkpoint.TrainState, job: Job, metrics: Mapping[str, float]) -> None:
    """Note the best evaluation so far, and keep its model where one is to be kept."""
    guarded = job.config.health.max_drop is not None
    if not metrics or not (guarded or job.config.load_best_model_at_end):
        return
    value = metrics[job.config.health.drop_metric] if guarded else _metric_for_best_model(metrics)
    best = state.monitor["best"]
    if best is None or value > best["value"]:
        state.monitor["best"] = {"step": state.step, "value": value}
        job.keep_best()


def _measured(state: checkpoint.TrainState, job: Job) -> dict[str, float]:
    """One evaluation, without dropout."""
    state.model.eval()
    found = job.evaluate(state.step)
    state.model.train()
    health = job.config.health
    if health.max_drop is not None and health.drop_metric not in found:
        raise ConfigError(f"health.max_drop watches {health.drop_metric}, and the evaluation gave "
                          f"{', '.join(found) or 'nothing'}; give eval_data, rewards and 1 among eval.k, name another "
                          "health.drop_metric, or set max_drop to null")
    return found


def _metric_for_best_model(metrics: Mapping[str, float]) -> float:
    """What the best model has most of: pass@1 where it was measured, else a low divergence or loss."""
    for name, sign in (("eval_pass@1", 1.0), ("eval_kl", -1.0), ("eval_loss", -1.0)):
        if name in metrics:
            return sign * metrics[name]
    raise ConfigError(f"load_best_model_at_end: the evaluation gave {', '.join(metrics)}, none of them eval_pass@1, "
                      "eval_kl or eval_loss; put 1 among eval.k, give those problems answers, or set it to false")


def _save(state: checkpoint.TrainState, job: Job) -> None:
    state.logs = job.recorder.cursors()
    try:
        checkpoint.save(job.checkpoints, state, keep=job.config.save_total_limit)
    except checkpoint.CheckpointSkipped as error:
        job.recorder.event("checkpoint_skipped", step=state.step, level="critical", evidence=str(error),
                           action="free some disk space; the last good checkpoint is untouched and training goes on")


@contextmanager
def _signals() -> Iterator[list[int]]:
    """First SIGTERM or SIGINT: noted, to stop after a checkpoint. Second: the default, at once."""
    asked: list[int] = []
    names = (signal.SIGTERM, signal.SIGINT)
    before = {s: signal.getsignal(s) for s in names}

    def note(number: int, _frame) -> None:
        asked.append(number)
        signal.signal(number, signal.SIG_DFL)
        print(f"{signal.Signals(number).name}: stopping after this step, with a checkpoint; once more stops at once",
              file=sys.stderr)

    for s in names:
        signal.signal(s, note)
    try:
        yield asked
    finally:
        for s in names:
            signal.signal(s, before[s])
