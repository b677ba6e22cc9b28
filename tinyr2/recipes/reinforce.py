"""`tinyr2 reinforce`: the policy writes, rewards judge, the policy learns.

In: a config. Out: a run folder whose `final/` is the policy as a plain Hugging Face folder, and `final_critic/` its
critic, where it had one of its own.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import nn

from tinyr2.core.config import Config
from tinyr2.core.errors import ConfigError
from tinyr2.core.types import Problem
from tinyr2.data.adaptation import check_mix
from tinyr2.data.problems import DataConfig
from tinyr2.data.problems import fingerprint as data_fingerprint
from tinyr2.eval.suite import EvalConfig
from tinyr2.models.load import ModelConfig, load_model, save_model
from tinyr2.models.scalar import load_scalar, pooling_pad, save_scalar
from tinyr2.recipes import setup
from tinyr2.recipes.distill import Inputs, checked_inputs
from tinyr2.recipes.findings import ModelFiles, Part, Reader, Setup
from tinyr2.recipes.mix import Sources
from tinyr2.recipes.reinforcement import Company, Reinforcement
from tinyr2.recipes.run import identity, open_run, refuse_own_input, refuse_taken
from tinyr2.recipes.show import completions_of
from tinyr2.report.console import Console
from tinyr2.rewards.grade import RewardConfig, load_rewards
from tinyr2.teachers.local import hire
from tinyr2.tokens.chat import fingerprint
from tinyr2.train.agent import Agent, optimizer_of
from tinyr2.train.collect import SamplingPlan
from tinyr2.train.credit import AdvantageConfig, KlConfig
from tinyr2.train.critic import Critic, ValueConfig, ValueHead
from tinyr2.train.loop import TrainConfig
from tinyr2.train.policy_loss import OpdConfig, PolicyLossConfig
from tinyr2.train.presets import Algorithm, with_preset
from tinyr2.train.step import Learner


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
    rewards: tuple[RewardConfig, ...] = Field(min_length=1)  # the first is the verdict: an answer is right from 1 on
    eval_rewards: tuple[RewardConfig, ...] | None = None  # None: the verdict alone
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
        return with_preset(raw) if isinstance(raw, dict) else raw

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
            (self.kl.place == "none" and self.kl.beta > 0, f"kl: beta {self.kl.beta} with place: none; set kl.beta to "
             "0, or give it a place"),
            (self.reference is not None and self.kl.beta == 0, "reference: no KL asks for it; set kl.beta and "
             "kl.place, or leave it out"),
            (self.kl.place == "loss" and self.kl.estimator == "k1" and not self.kl.ratio, "kl: k1 in the loss has an "
             "expected gradient of zero; set kl.estimator to k2 or k3, kl.ratio to true, or kl.place to token_reward"),
            (self.kl.ratio and self.kl.place != "loss", "kl.ratio weighs a KL in the loss; set kl.place to loss"),
            ((self.opd is None) != (self.teacher is None), "opd and teacher belong together: one says how, the other "
             "who; give both, or neither"),
            (self.advantage.lam_alpha is not None and not by_value, "advantage.lam_alpha is of generalized advantages; "
             "set advantage.baseline to value"),
            (self.advantage.bootstrap_truncated and not by_value, "advantage.bootstrap_truncated asks a critic; set "
             "advantage.baseline to value"),
            (self.advantage.bootstrap_truncated and self.loss.mask_truncated, "advantage.bootstrap_truncated learns "
             "from answers that loss.mask_truncated leaves out; set one of them to false"),
            (shared and (self.value.num_iterations, self.value.num_mini_batches) != (1, 1), "value: a shared trunk "
             "learns with the policy; set updates.num_iterations and num_mini_batches in place of the value's"),
            (shared and self.value.pretrain_steps > 0, "value.pretrain_steps would move the policy's own body; set "
             "value.trunk to separate"),
            (shared and self.value.path is not None, "value.path is where a separate trunk begins; set value.trunk to "
             "separate"),
        )


def read_setup(config: ReinforceConfig) -> Setup:
    """Tokenizers, model configs, data and rewards; what cannot be read is a fault in the setup."""
    reader = Reader()
    model = reader.model("model", config.model)
    teacher = reader.model("teacher", config.teacher) if config.teacher is not None else None
    limit = config.rollout.max_completion_length
    rewards = reader.read("rewards", lambda: load_rewards(config.rewards, max_completion_length=limit)) or []
    parts = [_part(reader, "data", config.data, config.rewards, ("rollout.max_completion_length", limit))]
    mix = config.sampling.adapt.mix if config.sampling.adapt is not None else None
    if mix is not None and parts[0].problems:
        reader.read("sampling.adapt", lambda: check_mix(mix, [p.task for p in parts[0].problems]))
    if config.eval_data:
        limit, graders = config.eval.max_completion_length, config.eval_rewards or config.rewards[:1]
        if config.eval_rewards:
            reader.read("eval_rewards", lambda: load_rewards(graders, max_completion_length=limit))
        parts.append(replace(_part(reader, "eval_data", config.eval_data, graders, (
            "eval.max_completion_length", limit)), wanted=config.eval.num_problems))
    reference = config.reference and reader.model("reference", config.reference)
    return Setup(student=model, teacher=teacher, reference=reference, critic=_read_critic(reader, config, model),
                 parts=tuple(parts), rewards=tuple(rewards), train=config.train, evaluates=bool(config.eval_data),
                 device=config.device, output_dir=config.output_dir, unread=tuple(reader.faults))


def _read_critic(reader: Reader, config: ReinforceConfig, model: ModelFiles) -> ModelFiles | None:
    """The critic that has a body of its own, and whether it can be saved beside the model's tokenizer."""
    if config.value is None or config.value.trunk == "shared":
        return None
    if model.tokenizer is not None:
        reader.read("model.pad", lambda: pooling_pad(model.tokenizer))
    if config.value.path is None:
        return replace(model, key="value")
    return reader.model("value", _critic_source(config))


def _part(reader: Reader, key: str, sources: Sequence[DataConfig], rewards: Sequence[RewardConfig],
          limit: tuple[str, int]) -> Part:
    problems: list[Problem] = []
    for source in sources:
        problems += reader.problems(key, source)
    return Part(key=key, path=", ".join(s.source for s in sources), problems=problems, answer_limit=limit,
                rewards=tuple(rewards))


def reinforce(config: ReinforceConfig, console: Console, *, resume: bool = False, overwrite: bool = False) -> dict:
    """Run it; returns what `--json` prints."""
    refuse_taken(Path(config.output_dir), resume=resume, overwrite=overwrite)
    if overwrite:
        refuse_own_input(Path(config.output_dir), _inputs_of(config))
    inputs = checked_inputs(read_setup(config), console)
    device = setup.choose_device(config.device, config.train)
    # before the folder is made: weights that cannot be read, or adapters that fit nothing, leave no run behind
    policy = setup.load_student(config.model, device, config.train.seed)
    learner = setup.learner_of(policy, inputs.vocab, device, config.train)
    agent = Agent(policy, _critic_module(config, policy, device), len(inputs.problems)).train()
    company = Company(agent=agent, learner=learner, critic=_critic(config, agent, learner),
                      reference=_reference(config, learner, device), teacher=None if config.teacher is None else
                      hire(load_model(config.teacher, device), inputs.vocab))
    graders = load_rewards(config.eval_rewards or config.rewards[:1],
                           max_completion_length=config.eval.max_completion_length)
    writer = setup.policy_of(policy, inputs.tokenizer, inputs.vocab, exact=config.train.deterministic,
                             dtype=setup.decode_dtype(config.rollout.dtype, learner))
    optimizer = optimizer_of(agent, config.train, config.value)
    with open_run(config, "reinforce", console, total=config.train.max_steps, resume=resume, overwrite=overwrite,
                  show=lambda step, result: completions_of(step, result, inputs.tokenizer)) as run:
        state = setup.restore(run, agent, config.train, _identity(config, inputs), resume, optimizer)
        work = Reinforcement(config, inputs, company, writer, optimizer, graders)
        result = setup.carry_out(run, work, state, train_config=config.train, evaluates=bool(inputs.held_out),
                                 save=partial(save_model, policy, inputs.tokenizer))
        if result["ending"] == "finished" and agent.critic is not None and config.value.trunk == "separate":
            run.commit("final_critic", partial(save_scalar, agent.critic, inputs.tokenizer))
        return result


def _inputs_of(config: ReinforceConfig) -> list[str]:
    models = [m.path for m in (config.model, config.reference, config.teacher) if m is not None]
    critic = [config.value.path] if config.value is not None and config.value.path is not None else []
    return [*models, *critic, *(file for s in (*config.data, *(config.eval_data or ())) for file in s.files)]


def _critic_module(config: ReinforceConfig, policy: nn.Module, device: torch.device) -> nn.Module | None:
    if config.value is None:
        return None
    if config.value.trunk == "shared":
        return ValueHead(policy.config.get_text_config().hidden_size).to(device)
    return load_scalar(_critic_source(config), device).requires_grad_(True)


def _critic_source(config: ReinforceConfig) -> ModelConfig:
    return config.model.model_copy(update={"path": config.value.path or config.model.path})


def _critic(config: ReinforceConfig, agent: Agent, learner: Learner) -> Critic | None:
    if agent.critic is None:
        return None
    body = learner if config.value.trunk == "shared" else setup.learner_of(
        agent.critic, learner.vocab, next(agent.critic.parameters()).device, config.train)
    return Critic(body=body, head=agent.critic)


def _reference(config: ReinforceConfig, learner: Learner, device: torch.device) -> Learner | None:
    """The model of the KL, frozen; None where no KL is asked for."""
    if config.kl.beta == 0:
        return None
    source = config.reference or ModelConfig(path=config.model.path, revision=config.model.revision,
                                             dtype=config.model.dtype)
    model = load_model(source, device).requires_grad_(False)
    size = model.config.get_text_config().vocab_size
    if size < learner.vocab:
        raise ConfigError(f"reference: {source.path} holds {size} ids, the policy {learner.vocab}; give a reference "
                          "with the policy's tokenizer")
    return setup.learner_of(model, learner.vocab, device, config.train)


def _identity(config: ReinforceConfig, inputs: Inputs) -> dict[str, str]:
    models = {"model": config.model, "reference": config.reference, "teacher": config.teacher}
    rewards = (*config.rewards, *(config.eval_rewards or ()))
    return {"config": identity(config), "data": data_fingerprint(inputs.problems),
            "eval_data": data_fingerprint(inputs.held_out), "tokenizer": fingerprint(inputs.tokenizer),
            "rewards": setup.code_fingerprint([r.file for r in rewards if r.file]),
            **{name: setup.model_fingerprint(m.path) for name, m in models.items() if m is not None}}
