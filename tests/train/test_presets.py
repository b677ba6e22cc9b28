"""Presets through the config that reads them: the papers' values, and what a user's key does to them."""

import copy

import pytest
import yaml

from tests.train.reinforced import config_of
from tinyr2.core.config import build, dump
from tinyr2.core.errors import ConfigError
from tinyr2.recipes.reinforce import ReinforceConfig
from tinyr2.train.presets import PRESETS, with_preset

# what each paper says; a key that is not here has its default, which every preset shares
PAPERS = {
    "ppo": {"rollout.num_generations": 1, "advantage.baseline": "value", "advantage.scale": "whiten",
            "advantage.lam": 0.95, "kl.place": "token_reward", "kl.estimator": "k1", "kl.beta": 0.02,
            "value.clip": 0.2, "value.num_iterations": 4, "updates.num_iterations": 4},
    "orz": {"rollout.num_generations": 16, "advantage.baseline": "value", "advantage.scale": "whiten",
            "advantage.lam": 1.0, "value.clip": None, "value.num_mini_batches": 12,
            "value.learning_rate_factor": 5.0},
    "vapo": {"rollout.num_generations": 16, "advantage.baseline": "value", "advantage.scale": "whiten",
             "advantage.lam_alpha": 0.05, "advantage.lam_floor": 0.95, "loss.epsilon_high": 0.28,
             "loss.positive_nll": 0.1, "value.pretrain_steps": 50, "value.learning_rate_factor": 2.0,
             "value.num_mini_batches": 16, "updates.num_mini_batches": 16},
    "grpo": {"advantage.scale": "group_std", "kl.place": "loss", "kl.beta": 0.04, "loss.aggregation": "sequence"},
    "r1_zero": {"rollout.num_generations": 16, "advantage.scale": "group_std", "kl.place": "loss", "kl.beta": 0.001,
                "loss.aggregation": "sequence", "loss.epsilon": 10.0, "updates.num_mini_batches": 16},
    "dr_grpo": {"loss.aggregation": "constant"},
    "dapo": {"rollout.num_generations": 16, "advantage.scale": "group_std", "loss.epsilon_high": 0.28,
             "loss.mask_truncated_completions": True, "sampling.equal_groups": "refill",
             "updates.num_mini_batches": 16},
    "gspo": {"advantage.scale": "group_std", "loss.ratio": "sequence_mean", "loss.aggregation": "sequence",
             "loss.epsilon": 3e-4, "loss.epsilon_high": 4e-4, "updates.num_mini_batches": 4},
    "rloo": {"rollout.num_generations": 4, "advantage.baseline": "leave_one_out", "kl.place": "sequence_reward",
             "kl.estimator": "k1", "kl.beta": 0.03, "loss.ratio": "sequence", "loss.aggregation": "sequence"},
    "reinforce_pp": {"rollout.num_generations": 1, "advantage.baseline": "none", "advantage.scale": "whiten",
                     "kl.place": "token_reward", "kl.estimator": "k1", "kl.beta": 0.01},
    "reinforce_pp_baseline": {"advantage.scale": "whiten", "kl.place": "loss", "kl.estimator": "k2", "kl.beta": 0.01},
}


def flat(value, name=""):
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in flat(inner, f"{name}.{key}" if name else key).items()}
    return {name: value}


def of(config):
    found = flat(config.model_dump(mode="json"))
    return {name: value for name, value in found.items() if not name.startswith(("data", "rewards", "algorithm"))}


@pytest.mark.parametrize("algorithm", PRESETS)
def test_a_preset_resolves_to_what_its_paper_says_and_to_the_defaults_elsewhere(algorithm):
    found, plain = of(config_of(algorithm)), of(config_of())
    if algorithm in ("ppo", "orz", "vapo"):
        del plain["value"]
        plain |= of(config_of(value={}, advantage={"baseline": "value"}))
    assert found == plain | PAPERS[algorithm]


def test_every_preset_is_among_the_papers():
    assert PAPERS.keys() == PRESETS.keys()


@pytest.mark.parametrize("algorithm", PRESETS)
def test_a_key_beside_a_preset_wins_and_leaves_its_neighbors(algorithm):
    config, plain = config_of(algorithm, loss={"epsilon": 0.125}), config_of(algorithm)
    assert config.loss == plain.loss.model_copy(update={"epsilon": 0.125})
    assert config.advantage == plain.advantage and config.kl == plain.kl and config.rollout == plain.rollout


@pytest.mark.parametrize("algorithm", ["ppo", "orz", "vapo"])
def test_no_critic_beside_a_preset_that_asks_one_is_an_error_that_says_so(algorithm):
    with pytest.raises(ConfigError, match="advantage.baseline: value needs a critic; add value: {}, or set another"):
        config_of(algorithm, value=None)
    without = config_of(algorithm, value=None, advantage={"baseline": "none"} | (
        {"lam_alpha": None} if algorithm == "vapo" else {}))
    assert without.value is None and without.advantage.scale == "whiten"


@pytest.mark.parametrize("algorithm", [None, *PRESETS])
def test_a_resolved_config_that_is_read_again_is_the_same(algorithm):
    config = config_of(algorithm, train={"learning_rate": 3e-4})
    assert build(ReinforceConfig, yaml.safe_load(dump(config)), "again") == config


def test_reading_a_preset_changes_neither_the_preset_nor_what_was_given():
    before, raw = copy.deepcopy(PRESETS), {"algorithm": "vapo", "loss": {"epsilon": 0.1}}
    merged = with_preset(raw)
    merged["loss"]["epsilon"] = 9.0
    assert before == PRESETS and raw == {"algorithm": "vapo", "loss": {"epsilon": 0.1}}


def test_without_an_algorithm_each_choice_has_its_own_default():
    assert with_preset({"loss": {"epsilon": 0.1}}) == {"loss": {"epsilon": 0.1}}
    assert config_of(algorithm=None).advantage.baseline == "group_mean"
