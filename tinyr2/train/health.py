"""Alarms: what a training step's metrics say about the run's health.

In: one mapping of metric names to floats per step. Out: alarms, each with its evidence and what to do. No clocks and no
randomness, and the whole memory is JSON, so a resumed run raises the alarms that the undisturbed one would have raised.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tinyr2.train import symptoms
from tinyr2.train.symptoms import Finding, HealthConfig, Level, Memory, Metrics


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """One alarm, at the step that raised it.

    Alarm(step=40, name="truncation", level="warn", evidence="completions/clipped_ratio 0.62 …", action="raise …")
    """

    step: int
    name: str
    level: Level
    evidence: str  # the numbers
    action: str  # what to do
    stop: bool = False  # going on can only do harm: checkpointed state is good, this step's is not

    def row(self) -> dict[str, Any]:
        """The alarm as a row of events.jsonl."""
        return {"event": "alarm", **asdict(self)}


@dataclass
class _Track:
    """How far one alarm has come."""

    hits: int = 0
    critical_hits: int = 0
    calm: int = 0
    level: Level | None = None


@dataclass(frozen=True)
class _Rule:
    """A rule (None: the metric is not there), and the hits in a row that raise its two levels."""

    find: Callable[[HealthConfig, Metrics, Memory], Finding | None]
    warn_after: int
    critical_after: int
    warms_up: bool = True
    stops: bool = False


class Monitor:
    """Watches a run. An alarm is raised when it begins, again when it grows critical, and anew after it cleared."""

    def __init__(self, config: HealthConfig | None = None):
        self.config = c = config or HealthConfig()
        same = (c.patience, c.patience)
        self._rules = {
            "non_finite": _Rule(symptoms.non_finite, 1, c.non_finite_stop, warms_up=False, stops=True),
            "grad_norm": _Rule(symptoms.grad_norm, c.grad_norm_patience, c.grad_norm_patience),
            "entropy_collapse": _Rule(symptoms.entropy, c.entropy_patience, c.entropy_patience),
            "length_explosion": _Rule(symptoms.length, *same),
            "truncation": _Rule(symptoms.truncation, *same),
            "equal_rewards": _Rule(symptoms.equal_rewards, c.patience, c.zero_std_patience),
            "logp_gap": _Rule(symptoms.logp_gap, *same, warms_up=False),
            "errored_rollouts": _Rule(symptoms.errored, *same, warms_up=False),
            "unheard_teacher": _Rule(symptoms.unheard, *same, warms_up=False),
            "dropped_rollouts": _Rule(symptoms.dropped, *same, warms_up=False),
            "held_out_drop": _Rule(symptoms.held_out_drop, 1, c.drop_patience, warms_up=False, stops=True),
        }
        self._memory = Memory()
        self._tracks = {name: _Track() for name in self._rules}

    def check(self, step: int, metrics: Metrics) -> list[Alarm]:
        """The alarms that this step raises; call it once per optimizer step. Absent metrics are not judged."""
        memory = self._memory
        if memory.first_step is None:
            memory.first_step = step
        warm = step - memory.first_step >= self.config.warmup_steps
        alarms = []
        for name, rule in self._rules.items():
            found = rule.find(self.config, metrics, memory) if warm or not rule.warms_up else None
            level = _follow(self._tracks[name], rule, found, max(rule.warn_after, self.config.patience))
            if found is not None and level is not None:
                stop = rule.stops and level == "critical"
                alarms.append(Alarm(step=step, name=name, level=level, evidence=found.evidence, action=found.action,
                                    stop=stop))
        self._remember(metrics, warm)
        self.note(step, metrics)
        return alarms

    def note(self, step: int, metrics: Metrics) -> None:
        """Keep what is the best so far; by itself for an evaluation that belongs to no step, as that of the start."""
        now, memory = symptoms.value(metrics, self.config.drop_metric), self._memory
        if now is not None and (memory.best is None or now > memory.best):
            memory.best, memory.best_step = now, step

    def forget(self) -> None:
        """Judge anew, as a run does that is resumed after a halt; what was the best so far stays the best."""
        self._memory = Memory(best=self._memory.best, best_step=self._memory.best_step)
        self._tracks = {name: _Track() for name in self._rules}

    def state(self) -> dict[str, Any]:
        """Everything that `check` remembers, as strict JSON."""
        return {**asdict(self._memory), "tracks": {name: asdict(track) for name, track in self._tracks.items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` gave, also after a round trip through JSON."""
        memory = copy.deepcopy(dict(state))
        tracks = memory.pop("tracks")
        self._memory = Memory(**memory)
        # a checkpoint from before a rule was written says nothing of it
        self._tracks = {name: _Track(**tracks.get(name, {})) for name in self._rules}

    def _remember(self, metrics: Metrics, warm: bool) -> None:
        memory, config = self._memory, self.config
        norm, length = symptoms.value(metrics, "grad_norm"), symptoms.value(metrics, "completions/mean_length")
        if norm:  # exactly 0 is a step without signal (all rewards equal): it says nothing of the scale
            memory.grad_norms = [*memory.grad_norms, norm][-config.grad_norm_window:]
        if length is not None and warm:
            memory.lengths = [*memory.lengths, length][-config.length_window:]
        for name in ("entropy", "kl", "reward", "loss"):
            value, seen = symptoms.value(metrics, name), memory.baselines.setdefault(name, [])
            if value is not None and len(seen) < config.baseline_steps:
                seen.append(value)


def _follow(track: _Track, rule: _Rule, found: Finding | None, clear_after: int) -> Level | None:
    """Count the finding; the level to raise now, if any."""
    if found is None:
        return None
    track.hits = track.hits + 1 if found.level else 0
    track.critical_hits = track.critical_hits + 1 if found.level == "critical" else 0
    track.calm = 0 if found.level else track.calm + 1
    if track.calm >= clear_after:
        track.level = None
    if track.critical_hits >= rule.critical_after and track.level != "critical":
        track.level = "critical"
        return "critical"
    if track.hits >= rule.warn_after and track.level is None:
        track.level = "warn"
        return "warn"
    return None
