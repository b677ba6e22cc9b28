"""W8: the share of a distillation step that neither decodes, nor asks the teacher, nor runs the learner.

    python bench/engine_share.py --steps 7

Three shapes; a step goes from step end to step end, and the first two are not counted. What is left when decoding, the
teacher's forward, the learner's forward, the head and the backward are taken away: rendering, grading, packing, the
optimizer, text, metrics, journals. Prints one JSON line; `share` is that of the first shape.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable

import torch
from distill_step import SHAPE, Clock, steps
from sides import peak_mib

import tinyr2.rollouts.sample as writing
import tinyr2.train.step as learning

SHAPES = {
    "W1": {"new_tokens": 64},
    "W2": {"new_tokens": 512},
    "27M student, 61M teacher": {"hidden": 512, "layers": 8, "teacher_hidden": 768, "teacher_layers": 8,
                                 "new_tokens": 256},
}


class Meter:
    """Seconds in watched calls; a watched call inside another belongs to the outer one."""

    def __init__(self, wait: Callable[[], None] = lambda: None) -> None:
        self.wait = wait  # until the device has done what it was given
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside = False

    def watch(self, owner: object, name: str, part: str) -> None:
        """From now on, time spent in `owner.name` is `part`'s."""
        call = getattr(owner, name)

        def timed(*args, **kwargs):
            if self._inside:
                return call(*args, **kwargs)
            self._inside = True
            self.wait()
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.wait()
                self.seconds[part] += time.perf_counter() - start
                self._inside = False

        setattr(owner, name, timed)

    def watch_step(self) -> None:
        """Everything that is not the engine, by the names under which a step calls it."""
        self.watch(writing, "decode_all", "decode")
        self.watch(learning, "consult", "teacher")
        self.watch(learning, "hidden_states", "forward")
        self.watch(learning, "run", "head")
        self.watch(torch.Tensor, "backward", "backward")

    def take(self) -> dict[str, float]:
        """The seconds since the last call, by part."""
        taken = dict(self.seconds)
        self.seconds.clear()
        return taken


class PartClock(Clock):
    """Notes with each step's end what its parts took."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self.meter = meter
        self.parts: list[dict[str, float]] = []

    def progress(self, step, total, metrics, name="step") -> None:
        super().progress(step, total, metrics, name)
        self.parts.append(self.meter.take())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=SHAPES, help="one shape instead of all")
    a = parser.parse_args()
    meter = Meter()
    meter.watch_step()
    found = {}
    for name in [a.only] if a.only else SHAPES:
        clock = PartClock(meter)
        meter.take()
        steps(SHAPE | SHAPES[name] | {"steps": a.steps, "threads": a.threads}, clock)
        ends = [b - a for a, b in zip(clock.ends, clock.ends[1:], strict=False)]
        found[name] = summary(ends[1:], clock.parts[2:])
    print(json.dumps({"side": "tinyr2", **vars(a), "share": next(iter(found.values()))["share"], "shapes": found,
                      "peak_mib": peak_mib()}))


def summary(seconds: list[float], parts: list[dict[str, float]]) -> dict:
    """Medians over steps: the step, the share left over, and each part's share."""
    left = [1 - sum(p.values()) / s for s, p in zip(seconds, parts, strict=True)]
    return {"step_s": round(statistics.median(seconds), 4), "share": round(statistics.median(left), 4),
            "shares": [round(x, 4) for x in left],
            "parts": {name: round(statistics.median(p[name] / s for s, p in zip(seconds, parts, strict=True)), 4)
                      for name in parts[0]}}


if __name__ == "__main__":
    main()
