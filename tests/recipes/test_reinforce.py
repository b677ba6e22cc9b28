"""`tinyr2 reinforce`: runs of a few steps in a small world; what they count, learn, leave behind and refuse."""

import json
import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.recipes import tiny
from tests.recipes.killing import REINFORCED
from tinyr2.core.errors import ConfigError, DataError
from tinyr2.core.types import Rollout
from tinyr2.data.adaptation import update as moved
from tinyr2.recipes import reinforcement, setup
from tinyr2.recipes.reinforcement import Reinforcement
from tinyr2.recipes.run import Run
from tinyr2.train.collect import Collection
from tinyr2.train.presets import PRESETS

OPD = ("teacher={path: '{world}/teacher'}",)
ONE_UPDATE = ("updates={num_iterations: 1, num_mini_batches: 1}",)
REWARDS = '''
def coin(completion_ids, **kwargs):
    return [float(sum(ids) % 2) for ids in completion_ids]

def same(completion_ids, **kwargs):
    return [1.0 for _ in completion_ids]

def some_nan(completion_ids, **kwargs):
    return [float("nan") if sum(ids) % 5 == 0 else float(sum(ids) % 2) for ids in completion_ids]

def some_undecided(completion_ids, **kwargs):
    return [None if sum(ids) % 5 == 0 else float(sum(ids) % 2) for ids in completion_ids]

def never(completion_ids, **kwargs):
    return [None for _ in completion_ids]

def length(completion_ids, **kwargs):
    return [len(ids) / 12 for ids in completion_ids]
'''


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tiny.make_world(tmp_path_factory.mktemp("world"))
    (folder / "more.py").write_text(REWARDS)
    rows = (folder / "data.jsonl").read_text().splitlines(keepends=True)
    (folder / "few.jsonl").write_text("".join(rows[:3]))
    (folder / "left.jsonl").write_text("".join(rows[:2]))
    (folder / "right.jsonl").write_text("".join(rows[2:30]))
    return folder


def reward(name: str) -> str:
    return f"rewards=[{{file: '{{world}}/more.py', function: {name}}}]"


@dataclass
class Watched:
    """A run, and what its steps had in their hands."""

    outcome: tiny.Outcome
    collections: list[Collection] = field(default_factory=list)
    work: list[Reinforcement] = field(default_factory=list)
    learned: list[Sequence[Rollout]] = field(default_factory=list)  # of each update
    losses: list[dict] = field(default_factory=list)  # the metrics of each step's updates, one after another

    @property
    def agent(self):
        return self.work[0].company.agent


def watch(world: Path, folder: Path, *overrides: str, first=None) -> Watched:
    """Run with `overrides`; `first` is called with the agent before the first step."""
    seen = Watched(None)
    collect, step, add = reinforcement.collect, Reinforcement.step, reinforcement.UpdateMetrics.add

    def collected(*args):
        seen.collections.append(collect(*args))
        return seen.collections[-1]

    def stepped(self, t):
        seen.work.append(self)
        if t == 0 and first is not None:
            first(self.company.agent)
        return step(self, t)

    def added(self, scores, loss):
        alone = reinforcement.UpdateMetrics()
        add(alone, scores, loss)
        seen.losses.append(alone.means())
        seen.learned.append(scores.rollouts)
        add(self, scores, loss)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reinforcement, "collect", collected)
        patch.setattr(Reinforcement, "step", stepped)
        patch.setattr(reinforcement.UpdateMetrics, "add", added)
        seen.outcome = tiny.go(tiny.settings("reinforce", world, folder, *overrides))
    return seen


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def events(outcome: tiny.Outcome, name: str) -> list[dict]:
    lines = (outcome.folder / "events.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if e["name"] == name]


# --- every preset


@pytest.mark.parametrize("algorithm", PRESETS)
def test_a_presets_run_moves_the_policy_and_leaves_finite_numbers(algorithm, world, tmp_path):
    waits = ["value.pretrain_steps=1"] if algorithm == "vapo" else []
    outcome = tiny.go(tiny.settings("reinforce", world, tmp_path / "run", f"algorithm={algorithm}",
                                    "rollout.num_generations=4", *waits))
    assert outcome.result["ending"] == "finished"
    assert not same_weights(weights(outcome.folder / "final"), weights(world / "student"))
    for row in outcome.rows:
        assert all(isinstance(v, float | int) and abs(v) < 1e9 for v in row.values()), row
    assert (outcome.folder / "final_critic").exists() == (algorithm in ("ppo", "orz", "vapo"))


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("algorithm", ["grpo", "gspo", "rloo", "vapo", "reinforce_pp_baseline"])
def test_the_learner_scores_what_the_actor_sampled_after_every_step(algorithm, temperature, world, tmp_path):
    outcome = tiny.go(tiny.settings("reinforce", world, tmp_path / "run", f"algorithm={algorithm}", *ONE_UPDATE,
                                    f"rollout.temperature={temperature}", "rollout.num_generations=4",
                                    "train.learning_rate=3e-2", *(["value.pretrain_steps=0"] * (algorithm == "vapo"))))
    assert max(outcome.column("sampling/sampling_logp_difference/max")) < 1e-5
    assert outcome.column("clip_ratio/region_mean") == [0.0] * 3
    assert [{r.policy_version for r in s.rollouts} for s in outcome.steps] == [{0}, {1}, {2}]


@pytest.mark.parametrize("changes, corrects", [
    (["rollout.dtype=bfloat16"], True), (["train.bf16=true", "rollout.dtype=bfloat16"], True), ([], False),
    (["loss.importance.mode=truncate"], True), (["rollout.dtype=bfloat16", "loss.importance.mode=none"], False)])
@pytest.mark.parametrize("updates", [1, 3])
def test_an_actor_that_rounds_is_corrected_for_and_its_weights_are_reported(
        updates, changes, corrects, world, tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "require_bfloat16", lambda *_: None)  # also where it is emulated
    seen = watch(world, tmp_path / "run", "algorithm=gspo", "rollout.num_generations=4", *changes,
                 f"updates={{num_iterations: {updates}, num_mini_batches: 1}}", "train.learning_rate=3e-2")
    for row in seen.outcome.rows:
        assert row.get("sampling/importance_sampling_ratio/mean") == (
            pytest.approx(1, abs=0.01) if corrects else None)
        assert row["sampling/sampling_logp_difference/max"] < 0.05
    rounds = "rollout.dtype=bfloat16" in changes
    first = seen.losses[::updates]
    if corrects or not rounds:  # the learner is its own old policy, so that rounding is not taken for a change
        assert all(m["clip_ratio/region_mean"] == 0 for m in first)
    else:
        assert any(m["clip_ratio/region_mean"] > 0 for m in first)
    scored = corrects and updates > 1
    assert all((r.old_logp is not None) == scored for some in seen.learned for r in some)


def test_the_gap_between_actor_and_learner_is_that_before_the_first_update(world, tmp_path):
    outcome = tiny.go(tiny.settings("reinforce", world, tmp_path / "run", "algorithm=dr_grpo",
                                    "updates={num_mini_batches: 8}", "train.learning_rate=3e-2"))
    assert max(outcome.column("sampling/sampling_logp_difference/max")) < 1e-5
    s = outcome.steps[0].scores
    assert float((s.learner_logp - s.actor_logp).abs().max()) > 0.01


# --- sampling


def test_dropped_groups_are_refilled_to_a_full_batch_and_all_that_was_written_is_counted(world, tmp_path):
    seen = watch(world, tmp_path / "run", "algorithm=dapo", "rollout.num_generations=2", reward("coin"),
                 "loss.mask_truncated_completions=false", "sampling.max_rounds=8", "train.max_steps=4")
    written = 0
    for found, row in zip(seen.collections, seen.outcome.rows, strict=True):
        assert Counter(r.group for r in found.kept) == dict.fromkeys(range(4), 2)
        assert all({r.reward for r in found.kept if r.group == g} == {0.0, 1.0} for g in range(4))
        assert 1 <= found.rounds <= 8
        assert len({r.problem.id for r in found.written}) == found.groups  # nothing is asked twice in a step
        written += sum(len(r.response_ids) for r in found.written)
        assert row["num_generated_tokens"] == written
        assert row["sampling/kept_groups_ratio"] == 4 / found.groups
        assert row["rollouts/learned"] == 8
        assert row["completions/mean_length"] == pytest.approx(
            sum(len(r.response_ids) for r in found.written) / len(found.written))
    assert max(f.rounds for f in seen.collections) > 1
    assert seen.outcome.rows[-1]["num_tokens"] < sum(len(r.prompt_ids) + len(r.response_ids)
                                                     for f in seen.collections for r in f.written)


@pytest.mark.parametrize("plan, groups", [("keep", 4), ("drop", 0), ("refill", 0)])
def test_where_all_rewards_are_equal_nothing_is_learned_and_a_refill_ends(plan, groups, world, tmp_path):
    seen = watch(world, tmp_path / "run", "algorithm=dr_grpo", reward("same"), f"sampling.equal_groups={plan}",
                 "sampling.max_rounds=3")
    assert {len({r.group for r in f.kept}) for f in seen.collections} == {groups}
    assert {f.rounds for f in seen.collections} == {3 if plan == "refill" else 1}
    assert seen.outcome.column("loss") == [0.0] * 3 and seen.outcome.column("grad_norm") == [0.0] * 3
    assert seen.outcome.column("frac_reward_zero_std") == [1.0] * 3
    assert same_weights(weights(seen.outcome.folder / "final"), weights(world / "student"))


def test_groups_of_equal_rewards_are_still_pulled_to_a_reference_unless_they_are_dropped(world, tmp_path):
    pulled = ("algorithm=grpo", reward("same"), "kl.beta=1.0", "reference={path: '{world}/other'}")
    if not (world / "other").exists():
        tiny.go(tiny.settings("sft", world, tmp_path / "sft", "train.max_steps=2", "train.learning_rate=1e-2"))
        (tmp_path / "sft" / "final").rename(world / "other")
    for plan, moves in (("keep", True), ("drop", False)):
        outcome = tiny.go(tiny.settings("reinforce", world, tmp_path / plan, *pulled, f"sampling.equal_groups={plan}"))
        assert same_weights(weights(outcome.folder / "final"), weights(world / "student")) != moves


def test_pass_rates_are_moving_means_of_the_verdicts_of_all_that_was_written(world, tmp_path):
    seen = watch(world, tmp_path / "run", "algorithm=dapo", "rollout.num_generations=3", reward("coin"),
                 "sampling.adapt={ema: 0.25}")
    problems = seen.work[0].inputs.problems
    rates = torch.full((len(problems),), float("nan")).numpy()
    place = {p.id: i for i, p in enumerate(problems)}
    for found in seen.collections:
        shares = {}
        for r in found.written:
            shares.setdefault(place[r.problem.id], []).append(r.reward >= 1.0)
        rates = moved(rates, list(shares), [sum(v) / len(v) for v in shares.values()], 0.25)
    torch.testing.assert_close(seen.agent.pass_rate, torch.tensor(rates), equal_nan=True)
    assert 0 < int((~seen.agent.pass_rate.isnan()).sum()) <= len(problems)


def test_problems_that_are_sometimes_solved_are_drawn_before_all_others(world, tmp_path):
    def known(agent):
        agent.pass_rate.fill_(1.0)
        agent.pass_rate[::2] = 0.0
        agent.pass_rate[[3, 8, 21, 34]] = 0.5
    seen = watch(world, tmp_path / "run", "algorithm=dr_grpo", reward("coin"), "sampling.adapt={floor: 1e-12}",
                 "train.max_steps=1", first=known)
    problems = seen.work[0].inputs.problems
    assert {r.problem.id for r in seen.collections[0].written} == {problems[i].id for i in (3, 8, 21, 34)}


@pytest.mark.parametrize("adapt", [None, "{}", "{mix: {few: 1.0}}"])
def test_a_refill_that_has_asked_everything_asks_again_and_gets_other_answers(adapt, world, tmp_path):
    more = [] if adapt is None else [f"sampling.adapt={adapt}"]
    seen = watch(world, tmp_path / "run", "data.path={world}/few.jsonl", "algorithm=dapo", reward("same"),
                 "sampling.max_rounds=3", "rollout.num_generations=2", "rollout.prompts_per_step=3", *more)
    for found in seen.collections:
        assert (found.rounds, found.groups) == (3, 9)
        answers = Counter((r.problem.id, r.sample, r.response_ids) for r in found.written)
        assert len(answers) > 9


def test_a_domain_that_runs_out_in_a_refill_keeps_its_share_of_the_mix(world, tmp_path):
    seen = watch(world, tmp_path / "run", "data=[{path: '{world}/left.jsonl'}, {path: '{world}/right.jsonl'}]",
                 "algorithm=dapo", reward("same"), "sampling={max_rounds: 2, adapt: {mix: {left: 0.5, right: 0.5}}}",
                 "rollout.num_generations=2")
    for found in seen.collections:
        assert Counter(r.problem.task for r in found.written) == {"left": 8, "right": 8}


# --- what fails


@pytest.mark.parametrize("name, errored", [("some_nan", True), ("some_undecided", False)])
def test_answers_without_a_verdict_are_dropped_counted_and_alarming_above_5_percent(name, errored, world, tmp_path):
    seen = watch(world, tmp_path / "run", "algorithm=dr_grpo", reward(name), "train.max_steps=4",
                 "rollout.prompts_per_step=8", "train.health.patience=2")
    for found, row, learned in zip(seen.collections, seen.outcome.rows, seen.learned, strict=True):
        lost = [r for r in found.written if sum(r.response_ids) % 5 == 0]
        assert row["rollouts/dropped_ratio"] == pytest.approx(len(lost) / len(found.written))
        assert row["rollouts/errored_ratio"] == pytest.approx(errored * len(lost) / len(found.written))
        assert row["rollouts/learned"] == len(learned) <= len(found.written) - len(lost)
        assert all(r.reward is not None and r.error is None for r in learned)
        groups = {}
        for r in learned:
            groups.setdefault(r.group, []).append(r)
        for group in groups.values():
            mean = sum(r.reward for r in group) / len(group)
            assert [r.advantage for r in group] == pytest.approx([r.reward - mean for r in group])
    assert any(len(found.written) > len(learned) for found, learned in zip(seen.collections, seen.learned, strict=True))
    (alarm,) = events(seen.outcome, "dropped_rollouts")[:1]
    assert "have no verdict and teach nothing" in alarm["evidence"] and alarm["action"]


def test_a_run_whose_every_answer_is_decided_raises_no_such_alarm(world, tmp_path):
    outcome = tiny.go(tiny.settings("reinforce", world, tmp_path / "run", "algorithm=dr_grpo", reward("coin"),
                                    "train.max_steps=4", "train.health.patience=2"))
    assert outcome.column("rollouts/dropped_ratio") == [0.0] * 4
    assert events(outcome, "dropped_rollouts") == []


def test_a_reward_that_fails_on_every_answer_ends_the_run_with_its_own_words(world, tmp_path):
    config = tiny.settings("reinforce", world, tmp_path / "run", "algorithm=grpo",
                           "rewards=[{file: '{world}/rewards.py', function: broken}]")
    with pytest.raises(DataError, match=r"no answer of step 1 could be graded: reward broken: ValueError: no verdict"):
        tiny.go(config)


@pytest.mark.parametrize("algorithm", ["dr_grpo", "ppo", "dapo"])
def test_where_nothing_can_be_decided_nothing_is_learned_and_the_run_goes_on(algorithm, world, tmp_path):
    outcome = tiny.go(tiny.settings("reinforce", world, tmp_path / "run", f"algorithm={algorithm}", reward("never"),
                                    "rollout.num_generations=2", "train.health.patience=2"))
    assert outcome.column("loss") == [0.0] * 3 and outcome.column("rollouts/dropped_ratio") == [1.0] * 3
    assert same_weights(weights(outcome.folder / "final"), weights(world / "student"))
    assert events(outcome, "dropped_rollouts")[0]["level"] == "critical"


# --- updates


@pytest.mark.parametrize("iterations, parts", [(1, 1), (3, 1), (1, 4), (2, 3), (2, 64)])
def test_each_pass_learns_from_every_rollout_once_and_old_log_probs_stay_with_their_rollouts(
        iterations, parts, world, tmp_path):
    seen = watch(world, tmp_path / "run", "algorithm=dr_grpo", "train.max_steps=2", "train.learning_rate=3e-2",
                 f"updates={{num_iterations: {iterations}, num_mini_batches: {parts}}}",
                 "loss.importance={mode: truncate}", "rollout.temperature=0.7")
    each = min(parts, 16)
    assert len(seen.learned) == 2 * iterations * each
    for t, found in enumerate(seen.collections):
        updates = seen.learned[t * iterations * each:(t + 1) * iterations * each]
        for i in range(iterations):
            part = [r for some in updates[i * each:(i + 1) * each] for r in some]
            assert sorted((r.group, r.sample) for r in part) == [(r.group, r.sample) for r in found.kept]
        sizes = {len(some) for some in updates}
        assert max(sizes) - min(sizes) <= 1
        for r in (r for some in updates for r in some):
            if iterations * parts > 1:
                assert r.old_logp == pytest.approx(r.actor_logp, abs=1e-5)
        scores = seen.outcome.steps[t].scores
        assert len(scores.rollouts) == 16  # the first pass alone


def test_nothing_is_clipped_at_the_first_update_and_something_later(world, tmp_path):
    seen = watch(world, tmp_path / "run", "algorithm=dr_grpo", "updates={num_iterations: 4}", "loss.epsilon=0.05",
                 "train.learning_rate=3e-2", "train.lr_scheduler_type=constant")
    for t in range(3):
        clipped = [m["clip_ratio/region_mean"] for m in seen.losses[4 * t:4 * t + 4]]
        assert clipped[0] == 0.0 and max(clipped[1:]) > 0
        assert seen.outcome.rows[t]["clip_ratio/region_mean"] == pytest.approx(sum(clipped) / 4)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_with_a_kl_the_policy_starts_at_its_reference_and_leaves_it(temperature, world, tmp_path):
    outcome = tiny.go(tiny.settings("reinforce", world, tmp_path / "run", "algorithm=grpo",
                                    "train.learning_rate=3e-2", f"rollout.temperature={temperature}"))
    first, *later = outcome.column("kl")
    assert abs(first) < 1e-9 and min(later) > 1e-5


def test_a_teachers_word_as_advantage_is_added_to_each_tokens_credit(world, tmp_path):
    outcome = tiny.go(tiny.settings("reinforce", world, tmp_path / "run", "algorithm=dr_grpo", *OPD,
                                    "opd={place: advantage, weight: 0.5}", "rollout.temperature=0.7"))
    teacher = AutoModelForCausalLM.from_pretrained(world / "teacher")
    for r in outcome.steps[0].rollouts:
        ids = torch.tensor([[*r.prompt_ids, *r.response_ids]])
        with torch.no_grad():
            logp = (teacher(ids).logits[0] / 0.7).log_softmax(-1)[len(r.prompt_ids) - 1:-1]
        for t, token in enumerate(r.response_ids):
            told = 0.5 * (float(logp[t, token]) - r.actor_logp[t])
            assert r.credit[t] == pytest.approx(r.advantage + told, abs=1e-4)


def test_a_teachers_divergence_as_loss_falls(world, tmp_path):
    outcome = tiny.go(tiny.settings("reinforce", world, tmp_path / "run", "algorithm=dr_grpo", *OPD, reward("same"),
                                    "opd={place: loss}", "train.max_steps=8", "train.learning_rate=1e-2"))
    kl = outcome.column("kl")
    assert kl[-1] < 0.9 * kl[0]
    assert outcome.column("loss")[0] == pytest.approx(kl[0] * sum(
        len(r.response_ids) for r in outcome.steps[0].rollouts) / 16 / 12, rel=1e-5)  # over the constant: 12 tokens


def test_adapters_learn_beside_a_reference_that_is_the_model_as_it_began(world, tmp_path):
    outcome = tiny.go(tiny.settings("reinforce", world, tmp_path / "run", "algorithm=grpo", "model.lora={r: 4}",
                                    "train.learning_rate=3e-2", "kl.beta=0.1"))
    first, *later = outcome.column("kl")
    assert abs(first) < 1e-9 and min(later) > 1e-6
    assert max(outcome.column("sampling/sampling_logp_difference/max")) < 1e-5
    final = AutoModelForCausalLM.from_pretrained(outcome.folder / "final")
    assert not [name for name, _ in final.named_parameters() if "lora" in name]


# --- the critic


ONCE = ("updates.num_mini_batches=1", "value.num_mini_batches=1")  # where a preset makes many updates of few answers
PRETRAINED = ("algorithm=vapo", "rollout.num_generations=4", *ONCE, reward("length"))


def test_while_the_critic_is_pretrained_the_policy_stays_bit_for_bit_where_it_was(world, tmp_path):
    outcome = tiny.go(tiny.settings("reinforce", world, tmp_path / "run", *PRETRAINED, "value.pretrain_until=1.0",
                                    "train.max_steps=6", "train.weight_decay=0.1", "train.learning_rate=1e-2"))
    assert same_weights(weights(outcome.folder / "final"), weights(world / "student"))
    assert outcome.column("value/pretraining") == [1.0] * 6
    assert outcome.column("value/loss")[-1] < 0.5 * outcome.column("value/loss")[0]
    assert outcome.column("loss") == outcome.column("value/loss")
    assert min(outcome.column("value/grad_norm")) > 0


def test_pretraining_ends_for_good_when_the_explained_variance_of_fresh_answers_passes(world, tmp_path, monkeypatch):
    said = iter([0.1, 0.49, 0.5, -1.0])
    monkeypatch.setattr(reinforcement, "fit", lambda rollouts: next(said))
    outcome = tiny.go(tiny.settings("reinforce", world, tmp_path / "run", *PRETRAINED, "train.max_steps=4"))
    assert outcome.column("value/explained_variance") == [0.1, 0.49, 0.5, -1.0]
    assert outcome.column("value/pretraining") == [1.0, 1.0, 0.0, 0.0]
    assert [row["grad_norm"] > 0 for row in outcome.rows] == [False, False, True, True]


def test_pretraining_ends_after_its_steps_in_any_case(world, tmp_path):
    outcome = tiny.go(tiny.settings("reinforce", world, tmp_path / "run", *PRETRAINED, "value.pretrain_steps=2",
                                    "value.pretrain_until=1.0"))
    assert outcome.column("value/pretraining") == [1.0, 1.0, 0.0]


def test_a_critic_of_its_own_learns_what_is_still_to_come_and_is_left_as_a_stock_model(world, tmp_path):
    seen = watch(world, tmp_path / "run", "algorithm=orz", "rollout.num_generations=4", reward("length"),
                 "train.max_steps=8", "train.learning_rate=2e-3")
    first, last = ([v for r in seen.outcome.steps[i].rollouts for v in r.values] for i in (0, -1))
    assert set(first) == {0.0}
    assert sum(last) / len(last) == pytest.approx(sum(seen.outcome.column("reward")) / 8, rel=0.25)
    assert seen.outcome.rows[0]["value/explained_variance"] == 0.0
    assert seen.outcome.column("value/loss")[-1] < 0.5 * seen.outcome.column("value/loss")[0]
    assert min(seen.outcome.column("value/grad_norm")) > 0
    critic = AutoModelForSequenceClassification.from_pretrained(seen.outcome.folder / "final_critic")
    assert critic.config.num_labels == 1 and critic.score.weight.any()
    for name, p in critic.state_dict().items():
        assert torch.equal(p, seen.agent.critic.state_dict()[name])


def test_a_shared_trunk_is_moved_by_policy_and_critic(world, tmp_path):
    shared = "value={trunk: shared, num_mini_batches: 1, learning_rate_factor: 1.0}"
    seen = watch(world, tmp_path / "run", "algorithm=orz", shared, "rollout.num_generations=4", reward("length"),
                 "train.max_steps=2")
    assert seen.agent.critic.score.weight.any()
    assert not same_weights(weights(seen.outcome.folder / "final"), weights(world / "student"))
    assert not (seen.outcome.folder / "final_critic").exists()
    assert seen.outcome.rows[1]["value/explained_variance"] != 0.0
    # equal rewards leave the policy without a gradient: what moves the body then is the critic
    same = watch(world, tmp_path / "same", "algorithm=orz", shared, "rollout.num_generations=4", reward("same"),
                 "train.max_steps=3")
    assert same.agent.critic.score.weight.any()
    assert not same_weights(weights(same.outcome.folder / "final"), weights(world / "student"))


def test_a_critic_may_begin_as_another_model(world, tmp_path):
    first = tiny.go(tiny.settings("reinforce", world, tmp_path / "first", "algorithm=orz", "train.max_steps=1",
                                  "rollout.num_generations=4", reward("length")))
    seen = watch(world, tmp_path / "second", "algorithm=orz", "train.max_steps=1", "rollout.num_generations=4",
                 reward("length"), f"value.path={first.folder}/final_critic")
    assert seen.outcome.rows[0]["value/explained_variance"] != 0.0


# --- resuming, and what is left


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("trunk", ["separate", "shared"])
def test_a_resumed_run_remembers_critic_pass_rates_and_token_counts_to_the_bit(
        trunk, adapters, world, tmp_path, monkeypatch):
    raw = [f"{key}={json.dumps(value)}" for key, value in REINFORCED.items() if "rewards" not in key]
    exact = (*raw, reward("coin"), "rollout.num_generations=3", "train.deterministic=true", "train.max_steps=6",
             "train.optim=muon", "train.save_steps=100", "value.pretrain_steps=2",
             *["value={trunk: shared, num_iterations: 1}"] * (trunk == "shared"), *["model.lora={r: 2}"] * adapters)
    whole = tiny.go(tiny.settings("reinforce", world, tmp_path / "whole", *exact))
    config, record = tiny.settings("reinforce", world, tmp_path / "stopped", *exact), Run.record

    def stop(self, metrics, timing, alarms):
        record(self, metrics, timing, alarms)
        if metrics["step"] == 3:
            signal.raise_signal(signal.SIGTERM)
    monkeypatch.setattr(Run, "record", stop)
    assert tiny.go(config).result["ending"] == "stopped"
    monkeypatch.undo()
    tiny.go(config, resume=True)
    assert (tmp_path / "stopped/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    a, b = (load_file(tmp_path / name / "checkpoints/step-00000006/model.safetensors") for name in ("whole", "stopped"))
    assert not a.keys() ^ b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0, equal_nan=True)
    assert int(a["num_generated"]) == whole.rows[-1]["num_generated_tokens"]
    assert int((~a["pass_rate"].isnan()).sum()) > 0


def test_held_out_problems_are_judged_by_the_verdict_or_by_rewards_of_their_own(world, tmp_path):
    held_out = "eval_data={path: '{world}/data.jsonl', limit: 8}"
    for name, more in (("verdict", reward("same")),
                       ("own", "eval_rewards=[{file: '{world}/more.py', function: same}]")):
        outcome = tiny.go(tiny.settings("reinforce", world, tmp_path / name, "algorithm=dr_grpo", held_out, more,
                                        "train.max_steps=1", "eval.max_completion_length=8"))
        assert outcome.rows[-1]["eval_pass@1"] == 1.0


@pytest.mark.parametrize("name, overrides", [
    ("reinforce", ("algorithm=grpo", "kl.beta=0.5", "updates={num_iterations: 2, num_mini_batches: 2}")),
    ("reinforce_value", ("algorithm=vapo", "rollout.num_generations=4", *ONCE, "value.pretrain_steps=5",
                         "kl.beta=0.1", "kl.place=token_reward",
                         "sampling={equal_groups: refill, max_rounds: 2, adapt: {}}"))])
def test_twenty_steps_follow_the_golden_curve(name, overrides, world, tmp_path):
    outcome = tiny.go(tiny.settings("reinforce", world, tmp_path / "run", *overrides, "train.deterministic=true",
                                    "train.max_steps=20", "train.save_steps=100", "train.log_completions_steps=0"))
    # centered advantages leave a loss near zero, in which only the KL can be read; the norm tells of all the rest
    tiny.compare_with_golden(name, [row["loss"] + row["grad_norm"] for row in outcome.rows])


# --- bad input

VALUE = ("advantage.baseline=value", "value={}")
SHARED = ("advantage.baseline=value", "value={trunk: shared}")
CONTRADICTIONS = {
    "a group of one": (("rollout.num_generations=1",), "advantage.baseline: group_mean is the mean of a group; set "
                       "rollout.num_generations to 2 or more, or another baseline"),
    "a leave-one-out of one": (("algorithm=rloo", "rollout.num_generations=1"), "advantage.baseline: leave_one_out is"),
    "no critic": (("advantage.baseline=value",), "advantage.baseline: value needs a critic; add value: {}"),
    "an idle critic": (("value={}",), "value: a critic that advantage.baseline: group_mean would never ask"),
    "a spread without groups": (("advantage={baseline: none, scale: group_std}",),
                                "advantage.scale: group_std needs a group's baseline, not none"),
    "a spread beside a critic": ((*VALUE, "advantage.scale=batch_std"), "scale: batch_std is that of rewards"),
    "a comparison of one": (("advantage.baseline=none", "rollout.num_generations=1", "sampling.equal_groups=drop"),
                            "sampling.equal_groups: drop compares the answers of a group"),
    "two places": (("kl={place: [loss, token_reward], beta: 0.1}",), "kl.place: loss and token_reward: a KL in several "
                   "places counts several times"),
    "a place without a weight": (("kl.place=loss",), "kl: beta 0.0 with place: loss; give both, or neither"),
    "a constant that divides nothing": (("loss.constant=8",), "loss.constant is what aggregation: constant divides by"),
    "a weight without a place": (("kl.beta=0.1",), "kl: beta 0.1 with place: none; give both, or neither"),
    "a reference without a KL": (("reference={path: ref}",), "reference: no KL asks for it"),
    "k1 in the loss": (("kl={place: loss, estimator: k1, beta: 0.1}",), "kl: k1 in the loss has an expected gradient "
                       "of zero"),
    "a ratio in the reward": (("kl={place: token_reward, beta: 0.1, ratio: true}",),
                              "kl.ratio weighs a KL in the loss; set kl.place to loss"),
    "no teacher": (("opd={}",), "opd and teacher belong together"),
    "an idle teacher": (OPD, "opd and teacher belong together"),
    "a lambda without a critic": (("advantage.lam_alpha=0.1",), "advantage.lam_alpha is of generalized advantages"),
    "a bootstrap without a critic": (("advantage.bootstrap_truncated=true",),
                                     "advantage.bootstrap_truncated asks a critic"),
    "a bootstrap of what is left out": (
        (*VALUE, "advantage.bootstrap_truncated=true", "loss.mask_truncated_completions=true"),
        "advantage.bootstrap_truncated learns from answers that loss.mask_truncated_completions"),
    "updates of a shared trunk": ((*SHARED, "value.num_iterations=2"), "value: a shared trunk learns with the policy"),
    "mini-batches of a shared trunk": ((*SHARED, "value.num_mini_batches=2"), "value: a shared trunk learns with the"),
    "pretraining of a shared trunk": ((*SHARED, "value.pretrain_steps=2"), "value.pretrain_steps would move the"),
    "a body of its own for a shared trunk": ((*SHARED, "value.path=x"), "value.path is where a separate trunk begins"),
    "truncated sampling": (("rollout.top_p=0.9",), "training samples from the whole distribution"),
    "no reward": (("rewards=[]",), "rewards: "),
    "a misspelt preset": (("algorithm=grop",), "algorithm 'grop': unknown; did you mean 'grpo'?"),
    "a misspelt key": (("advantage.basline=none",), "advantage.basline: unknown key; did you mean 'baseline'?"),
    "a misspelt key at the top": (("samplin={}",), "samplin: unknown key; did you mean 'sampling'?"),
    "a misspelt key in a critic": (("value.pretrain_step=2", "advantage.baseline=value"),
                                   "value.pretrain_step: unknown key; did you mean 'pretrain_steps'?"),
    "a misspelt key below": (("loss.importance.capp=2",), "loss.importance.capp: unknown key; did you mean 'cap'?"),
    "a misspelt key of adaptation": (("sampling.adapt.emma=0.1",), "sampling.adapt.emma: unknown key; did you mean"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_choices_that_contradict_each_other_are_told_apart_with_a_cure(name, world, tmp_path):
    overrides, message = CONTRADICTIONS[name]
    with pytest.raises(ConfigError) as caught:
        tiny.settings("reinforce", world, tmp_path / "run", *overrides)
    assert message in str(caught.value)


def test_every_contradiction_that_a_config_looks_for_is_among_these(world, tmp_path):
    config = tiny.settings("reinforce", world, tmp_path / "run")
    told = [why for _, why in config._contradictions()]
    for why in told:
        opening = why.split(";")[0].split(": ")[0].split(" ")[0]
        assert any(opening in message for _, message in CONTRADICTIONS.values()), why
    assert len(told) <= len(CONTRADICTIONS)


@pytest.mark.parametrize("overrides, message", [
    (("rewards=[{file: nowhere.py, function: f}]",), "no such file"),
    (("sampling.adapt={mix: {dta: 1.0}}",), "no problem is of 'dta'; did you mean 'data'?"),
    (("data=[{path: '{world}/left.jsonl'}, {path: '{world}/right.jsonl'}]", "sampling.adapt={mix: {left: 1.0}}"),
     "mix: no share for right; give one, 0 to leave it out"),
    (("data.path={world}/nothing.jsonl",), "nothing.jsonl"),
    (("model.path={world}/nobody",), "nobody"),
    (("algorithm=grpo", "reference={path: '{world}/nobody'}"), "nobody"),
    (("algorithm=orz", "value.path={world}/nobody", "rollout.num_generations=2"), "nobody"),
])
def test_what_cannot_be_read_is_told_before_anything_is_written(overrides, message, world, tmp_path):
    with pytest.raises((ConfigError, DataError)) as caught:
        tiny.go(tiny.settings("reinforce", world, tmp_path / "run", *overrides))
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_without_a_verdict_there_is_no_reward_whatever_else_the_answer_earns(world, tmp_path):
    named = "file: '{world}/more.py', function"
    shaped = f"rewards=[{{{named}: some_undecided}}, {{{named}: length}}]"
    seen = watch(world, tmp_path / "run", shaped, "algorithm=dr_grpo", "train.max_steps=1")
    undecided = [r for r in seen.collections[0].written if r.reward_parts["some_undecided"] is None]
    assert undecided and all((r.reward, r.right) == (None, None) and r.reward_parts["length"] > 0 for r in undecided)
    row = seen.outcome.rows[0]
    assert row["rollouts/dropped_ratio"] == len(undecided) / len(seen.collections[0].written)
    assert not {id(r.problem) for r in seen.learned[0] if r.reward is None}


def test_each_task_has_the_first_reward_that_grades_it_for_its_verdict(world, tmp_path):
    rows = [json.loads(line) for line in (world / "data.jsonl").read_text().splitlines()]
    path = tmp_path / "two.jsonl"
    path.write_text("".join(json.dumps(r | {"task": "ab"[i % 2]}) + "\n" for i, r in enumerate(rows)))
    named = "file: '{world}/more.py', function"
    rewards = (f"rewards=[{{{named}: never, tasks: [a]}}, {{{named}: length, weight: 0.1}}, {{{named}: same, "
               "tasks: [b], weight: 5}]")
    seen = watch(world, tmp_path / "run", rewards, f"data={{path: '{path}'}}", "algorithm=dr_grpo",
                 f"eval_data={{path: '{path}', limit: 8}}", "train.max_steps=1", "eval.max_completion_length=12",
                 "eval.threshold=0.0")
    by_task = {task: [r for r in seen.collections[0].written if r.problem.task == task] for task in "ab"}
    assert all(r.right is None and r.reward is None for r in by_task["a"])
    assert all(r.right == (len(r.response_ids) >= 12) and r.reward > 5 for r in by_task["b"])
    graders = [(g.name, g.weight, g.tasks) for g in seen.work[0].graders]
    assert graders == [("never", 1.0, ("a",)), ("length", 1.0, ("b",))]
    assert seen.outcome.rows[0]["eval_undecided"] == 4 and seen.outcome.rows[0]["eval_pass@1"] == 1.0


def test_a_step_of_several_updates_tells_of_one_that_was_skipped(world, tmp_path, monkeypatch):
    learn, calls = Reinforcement._accumulate, []

    def broken(self, rollouts, loss, metrics):
        calls.append(len(rollouts))
        scores = learn(self, rollouts, loss, metrics)
        if len(calls) == 1:
            next(p for p in self.learner.model.parameters() if p.grad is not None).grad.fill_(float("inf"))
        return scores

    monkeypatch.setattr(Reinforcement, "_accumulate", broken)
    outcome = tiny.go(tiny.settings("reinforce", world, tmp_path / "run", reward("length"), "algorithm=dr_grpo",
                                    "updates.num_mini_batches=2", "train.max_steps=2"))
    assert outcome.column("loss")[0] == "NaN" and abs(outcome.column("loss")[1]) < 1e3
    events = [json.loads(line) for line in (outcome.folder / "events.jsonl").read_text().splitlines()]
    assert "non_finite" in [e["name"] for e in events]


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_a_teacher_in_the_advantage_tells_how_far_it_is(who, world, tmp_path):
    outcome = tiny.go(tiny.settings("reinforce", world, tmp_path / "run", reward("length"), "algorithm=dr_grpo",
                                    f"teacher={{path: '{{world}}/{who}'}}", "opd={place: advantage, weight: 0.5}",
                                    "train.max_steps=1"))
    assert (abs(outcome.column("teacher_kl")[0]) > 1e-4) == (who == "teacher")


def test_a_run_is_called_finished_only_when_its_critic_stands(world, tmp_path, monkeypatch):
    seen, finish = [], Run.finish

    def note(self, ending):
        seen.append(((self.folder / "final").is_dir(), (self.folder / "final_critic").is_dir()))
        return finish(self, ending)

    monkeypatch.setattr(Run, "finish", note)
    tiny.go(tiny.settings("reinforce", world, tmp_path / "run", *PRETRAINED, "train.max_steps=1"))
    assert seen == [(True, True)]
