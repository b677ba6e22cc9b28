"""`tinyr2 reinforce`: the policy writes, rewards judge, the policy learns.

In: a config. Out: a run folder whose `final/` is the policy as a plain Hugging Face folder, and `final_critic/` its
critic, where it had one of its own.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from tinyr2.core.errors import ConfigError
from tinyr2.core.types import Problem
from tinyr2.data.adaptation import check_mix
from tinyr2.data.problems import DataConfig
from tinyr2.data.problems import fingerprint as data_fingerprint
from tinyr2.models.load import ModelConfig, load_model, save_model
from tinyr2.models.scalar import load_scalar, pooling_pad, save_scalar
from tinyr2.recipes import setup
from tinyr2.recipes.findings import ModelFiles, Part, Reader, Setup
from tinyr2.recipes.inputs import Inputs, checked_inputs
from tinyr2.recipes.reinforce_config import ReinforceConfig
from tinyr2.recipes.reinforcement import Company, Reinforcement
from tinyr2.recipes.run import identity, open_run, refuse_own_input, refuse_taken
from tinyr2.recipes.show import completions_of
from tinyr2.report.console import Console
from tinyr2.rewards.grade import RewardConfig, load_rewards, verdicts
from tinyr2.teachers.local import hire
from tinyr2.tokens.chat import fingerprint
from tinyr2.train.agent import Agent, optimizer_of
from tinyr2.train.critic import Critic, ValueHead
from tinyr2.train.step import Learner


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
        limit = config.eval.max_completion_length
        part = _part(reader, "eval_data", config.eval_data, (), ("eval.max_completion_length", limit))
        graders = _graders(config, part.problems)
        reader.read("eval_rewards", lambda: load_rewards(graders, max_completion_length=limit))
        parts.append(replace(part, rewards=graders, wanted=config.eval.num_problems))
    reference = config.reference and reader.model("reference", config.reference)
    teachers = () if teacher is None else (teacher,)
    return Setup(student=model, teachers=teachers, reference=reference, critic=_read_critic(reader, config, model),
                 parts=tuple(parts), rewards=tuple(rewards), train=config.train, evaluates=bool(config.eval_data),
                 device=config.device, output_dir=config.output_dir, unread=tuple(reader.faults))


def _graders(config: ReinforceConfig, problems: Sequence[Problem]) -> tuple[RewardConfig, ...]:
    """What held-out answers are judged by."""
    return config.eval_rewards or verdicts(config.rewards, [p.task for p in problems])


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
    graders = load_rewards(_graders(config, inputs.held_out), max_completion_length=config.eval.max_completion_length)
    writer = setup.policy_of(policy, inputs.tokenizer, inputs.vocab, exact=config.train.deterministic,
                             dtype=setup.decode_dtype(config.rollout.dtype, learner))
    optimizer = optimizer_of(agent, config.train, config.value)
    with open_run(config, "reinforce", console, total=config.train.max_steps, resume=resume, overwrite=overwrite,
                  show=lambda step, result: completions_of(step, result, inputs.tokenizer)) as run:
        state = setup.restore(run, agent, config.train, _identity(config, inputs), resume, optimizer)
        work = Reinforcement(config, inputs, company, writer, optimizer, graders)
        alone = agent.critic is not None and config.value.trunk == "separate"
        return setup.carry_out(
            run, work, state, train_config=config.train, evaluates=bool(inputs.held_out),
            save=partial(save_model, policy, inputs.tokenizer),
            beside={"final_critic": partial(save_scalar, agent.critic, inputs.tokenizer)} if alone else None)


def _inputs_of(config: ReinforceConfig) -> list[str]:
    data = [file for s in (*config.data, *(config.eval_data or ())) for file in s.files]
    return [*_models_of(config).values(), *(r.file for r in _rewards_of(config) if r.file), *data]


def _models_of(config: ReinforceConfig) -> dict[str, str]:
    """Every model that the run reads, by what it is to the run."""
    named = {"model": config.model, "reference": config.reference, "teacher": config.teacher}
    paths = {name: m.path for name, m in named.items() if m is not None}
    if config.value is not None and config.value.path is not None:
        paths["critic"] = config.value.path
    learned = [r.options["path"] for r in _rewards_of(config) if r.name == "reward_model"]
    return paths | {f"reward model {path}": path for path in learned}


def _rewards_of(config: ReinforceConfig) -> tuple[RewardConfig, ...]:
    return (*config.rewards, *(config.eval_rewards or ()))


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
    return {"config": identity(config), "data": data_fingerprint(inputs.problems),
            "eval_data": data_fingerprint(inputs.held_out), "tokenizer": fingerprint(inputs.tokenizer),
            "rewards": setup.code_fingerprint([r.file for r in _rewards_of(config) if r.file]),
            **{name: setup.model_fingerprint(path) for name, path in _models_of(config).items()}}
