"""The guard of a student that teaches itself: what keeps it near its start, and what halts it when it unlearns.

In: a guard's config and a training config. Out: the training config whose alarms and evaluations are what it asks for.
A teacher made of the student's own weights has no truth of its own: what it is shown that the student cannot know moves
both, and a loss that falls says nothing about answers. Only held-out problems do.
"""

from pydantic import Field, field_validator

from tinyr2.core.config import Config
from tinyr2.core.errors import ConfigError
from tinyr2.train.loop import TrainConfig
from tinyr2.train.symptoms import HealthConfig


class GuardConfig(Config):
    """On by default for a self-teacher; `max_drop: null` and `kl_to_start: 0` switch it off."""

    kl_to_start: float = Field(0.0, ge=0)  # weight of a full-vocabulary reverse KL to the model as it began
    max_drop: float | None = Field(0.1, gt=0)  # of `metric` below its best so far: the run halts
    patience: int = Field(1, ge=1)  # evaluations in a row that are so low
    metric: str = "eval_pass@1"  # of which more is better

    @field_validator("metric")
    @classmethod
    def _grows(cls, name: str) -> str:
        return HealthConfig(drop_metric=name).drop_metric


def guarded(config: TrainConfig, guard: GuardConfig, *, evaluates: bool) -> TrainConfig:
    """`config` with the guard's alarm, which an evaluation of the start gives its first best.

    evaluates: whether there are held-out problems and a verdict on answers to them
    ConfigError where nothing would be watched: no held-out verdict, or none before the end.
    """
    if guard.max_drop is None:
        return config
    if not evaluates:
        raise ConfigError("guard.max_drop watches answers to held-out problems, and there are none with a verdict; "
                          "give eval_data and rewards, or set guard.max_drop=null")
    if not config.eval_steps:
        raise ConfigError(f"guard.max_drop watches evaluations, and train.eval_steps=0 has none before the end; set "
                          f"train.eval_steps={max(1, config.max_steps // 10)}, or guard.max_drop=null")
    health = {"max_drop": guard.max_drop, "drop_patience": guard.patience, "drop_metric": guard.metric}
    return config.model_copy(update={"eval_on_start": True, "health": config.health.model_copy(update=health)})
