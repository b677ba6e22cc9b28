"""What `tinyr2 reinforce` can be told, and which choices contradict each other.

In: a mapping. Out: a config in which the algorithm's preset has filled what was left out, or a ValueError that says
what does not go together, and how to mend it.
"""

from collections.abc import Sequence
from typing import Any

from pydantic import Field, model_validator

from tinyr2.core.config import Config
from tinyr2.eval.suite import EvalConfig
from tinyr2.models.load import ModelConfig
from tinyr2.recipes import setup
from tinyr2.recipes.mix import Sources
from tinyr2.rewards.grade import RewardConfig
from tinyr2.train.collect import SamplingPlan
from tinyr2.train.credit import AdvantageConfig, KlConfig
from tinyr2.train.critic import ValueConfig
from tinyr2.train.loop import TrainConfig
from tinyr2.train.policy_loss import OpdConfig, PolicyLossConfig
from tinyr2.train.presets import Algorithm, with_preset


class RolloutConfig(setup.WritingConfig):
    """What a step writes."""

    num_generations: int = Field(8, ge=1)  # answers to each prompt: a group


class UpdateConfig(Config):
    """How often a step's answers are learned from."""

    num_iterations: int = Field(1, ge=1)  # passes over them
    num_mini_batches: int = Field(1, ge=1)  # optimizer steps a pass


class ReinforceConfig(Config):
    """Everything that `tinyr2 reinforce` can be told; the algorithm fills in what is left out."""

    algorithm: Algorithm | None = None  # None: each choice as it is given, or its own default
    model: setup.StudentConfig
    reference: ModelConfig | None = None  # of the KL; None: the model as it begins
    teacher: ModelConfig | None = None  # for opd
    data: Sources
    eval_data: Sources | None = None
    rollout: RolloutConfig = RolloutConfig()
    sampling: SamplingPlan = SamplingPlan()
    # the first that grades a task is its verdict: an answer is right from 1 on, and without a verdict it has no reward
    rewards: tuple[RewardConfig, ...] = Field(min_length=1)
    eval_rewards: tuple[RewardConfig, ...] | None = None  # None: the verdicts alone
    advantage: AdvantageConfig = AdvantageConfig()
    kl: KlConfig = KlConfig()
    loss: PolicyLossConfig = PolicyLossConfig()
    value: ValueConfig | None = None
    updates: UpdateConfig = UpdateConfig()
    opd: OpdConfig | None = None
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    device: str = "auto"
    output_dir: str

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, raw: Any) -> Any:
        return with_preset(_without_kl(raw)) if isinstance(raw, dict) else raw

    @property
    def needs_groups(self) -> bool:
        """Whether answers are compared with others to the same prompt."""
        return self.advantage.baseline in ("group_mean", "leave_one_out")

    @model_validator(mode="after")
    def _choices_fit(self) -> "ReinforceConfig":
        for wrong, why in self._contradictions():
            if wrong:
                raise ValueError(why)
        return self

    def _contradictions(self) -> Sequence[tuple[bool, str]]:
        baseline, scale, n = self.advantage.baseline, self.advantage.scale, self.rollout.num_generations
        grouped, by_value = self.needs_groups, baseline == "value"
        shared = self.value is not None and self.value.trunk == "shared"
        return (
            (grouped and n < 2, f"advantage.baseline: {baseline} is the mean of a group; set rollout.num_generations "
             "to 2 or more, or another baseline"),
            (by_value and self.value is None, "advantage.baseline: value needs a critic; add value: {}, or set another "
             "baseline"),
            (not by_value and self.value is not None, f"value: a critic that advantage.baseline: {baseline} would "
             "never ask; set value: null, or advantage.baseline: value"),
            (scale == "group_std" and not grouped, f"advantage.scale: group_std needs a group's baseline, not "
             f"{baseline}; set baseline to group_mean or leave_one_out, or scale to whiten"),
            (scale == "batch_std" and by_value, "advantage.scale: batch_std is that of rewards, which a critic's "
             "advantages are not; set it to whiten or none"),
            (self.sampling.equal_groups != "keep" and n < 2, f"sampling.equal_groups: {self.sampling.equal_groups} "
             "compares the answers of a group; set rollout.num_generations to 2 or more, or equal_groups to keep"),
            ((self.kl.place == "none") != (self.kl.beta == 0), f"kl: beta {self.kl.beta} with place: "
             f"{self.kl.place}; give both, or neither"),
            (self.reference is not None and self.kl.beta == 0, "reference: no KL asks for it; set kl.beta and "
             "kl.place, or leave it out"),
            (self.kl.place == "loss" and self.kl.estimator == "k1" and not self.kl.ratio, "kl: k1 in the loss has an "
             "expected gradient of zero; set kl.estimator to k2 or k3, kl.ratio to true, or kl.place to token_reward"),
            (self.kl.ratio and self.kl.place != "loss", "kl.ratio weighs a KL in the loss; set kl.place to loss"),
            ((self.opd is None) != (self.teacher is None), "opd and teacher belong together: one says how, the other "
             "who; give both, or neither"),
            (self.loss.constant is not None and self.loss.aggregation != "constant", "loss.constant is what "
             "aggregation: constant divides by; set loss.aggregation to constant"),
            (self.advantage.lam_alpha is not None and not by_value, "advantage.lam_alpha is of generalized advantages; "
             "set advantage.baseline to value"),
            (self.advantage.bootstrap_truncated and not by_value, "advantage.bootstrap_truncated asks a critic; set "
             "advantage.baseline to value"),
            (self.advantage.bootstrap_truncated and self.loss.mask_truncated_completions,
             "advantage.bootstrap_truncated learns from answers that loss.mask_truncated_completions leaves out; set "
             "one of them to false"),
            (shared and (self.value.num_iterations, self.value.num_mini_batches) != (1, 1), "value: a shared trunk "
             "learns with the policy; set updates.num_iterations and num_mini_batches in place of the value's"),
            (shared and self.value.pretrain_steps > 0, "value.pretrain_steps would move the policy's own body; set "
             "value.trunk to separate"),
            (shared and self.value.path is not None, "value.path is where a separate trunk begins; set value.trunk to "
             "separate"),
        )


def _without_kl(raw: dict[str, Any]) -> dict[str, Any]:
    """`kl: {beta: 0}` and `kl: {place: none}` each turn off the KL of a preset."""
    kl = raw.get("kl")
    if not isinstance(kl, dict):
        return raw
    alone = {name: kl[name] for name in ("place", "beta") if name in kl}
    return raw | {"kl": kl | {"place": "none", "beta": 0.0}} if alone in ({"place": "none"}, {"beta": 0}) else raw
