"""`tinyr2 distill`: every form of the loss, read again naively; what a run leaves behind; what it refuses."""

import json
import math
import os
import shutil
import weakref
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from tests.recipes import tiny
from tinyr2.core.config import load
from tinyr2.core.errors import ConfigError, DataError, RunError, UserError
from tinyr2.core.types import Rollout
from tinyr2.data.problems import DataConfig, draw, load_problems
from tinyr2.models.load import save_model
from tinyr2.recipes import setup
from tinyr2.recipes.distill_config import DistillConfig, RolloutConfig
from tinyr2.recipes.graded import center
from tinyr2.rollouts.sample import sample
from tinyr2.tokens.build import train_tokenizer
from tinyr2.tokens.chat import render_example
from tinyr2.train.loop import TrainConfig
from tinyr2.train.optim import make_optimizer

SHARED = Path(os.environ.get("TINYR2_SHARED", Path(__file__).parents[3] / "shared"))
DIGITS = "rewards=[{file: {world}/rewards.py, function: digits}]"
SEQUENCE = ("loss.level=sequence", "rollout.num_generations=3", DIGITS)
WEIGHTED = ("loss.level=sequence", "loss.reward_loss=weighted_nll", "rollout.num_generations=2", DIGITS)
KINDS = {
    "reverse_kl": (),
    "forward_kl": ("loss.divergence.kind=forward_kl",),
    "jsd": ("loss.divergence={kind: jsd, beta: 0.3}",),
    "sampled": ("loss.estimator=sampled",),
    "reinforce": SEQUENCE,
    "weighted_nll": WEIGHTED,
    "teacher_writes": (*WEIGHTED, "rollout.num_generations=1", "rollout.num_teacher_generations=2"),
    "teacher_alone": (*WEIGHTED, "rollout.num_generations=0", "rollout.num_teacher_generations=2"),
    "half_given": ("rollout.lmbda=0.5", "rollout.prompts_per_step=8", DIGITS),
    "all_given": ("rollout.lmbda=0",),
    "cool": ("rollout.temperature=0.7",),
    "cool_reinforce": (*SEQUENCE, "rollout.temperature=0.7"),
    "lora": ("student.lora={r: 4}", "train.learning_rate=1e-2"),
}
NOBODY_SAMPLES = ("all_given", "teacher_alone")  # no token of the student's own


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return tiny.make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def done(world, tmp_path_factory):
    """One run of each kind, made when it is first asked for."""
    runs, folder = {}, tmp_path_factory.mktemp("runs")

    def run(kind: str) -> tiny.Outcome:
        if kind not in runs:
            runs[kind] = tiny.go(tiny.settings("distill", world, folder / kind, *KINDS[kind]))
        return runs[kind]

    return run


def stock(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder)


@dataclass(frozen=True)
class Reading:
    """The distributions behind one rollout: whole rows of logits from stock forwards, in float64."""

    rollout: Rollout
    student: Tensor  # (n, V) log-probs that predict each response token
    teacher: Tensor

    @classmethod
    def of(cls, rollout: Rollout, student, teacher, vocab: int) -> "Reading":
        ids, first = torch.tensor([[*rollout.prompt_ids, *rollout.response_ids]]), len(rollout.prompt_ids) - 1
        with torch.no_grad():
            logits = [model(ids).logits[0, first:-1, :vocab].double() / rollout.temperature
                      for model in (student, teacher)]
        return cls(rollout, *(torch.log_softmax(x, -1) for x in logits))

    @cached_property
    def tokens(self) -> list[tuple[int, Tensor, Tensor]]:
        return list(zip(self.rollout.response_ids, self.student, self.teacher, strict=True))

    def likelihood(self) -> float:
        return sum(float(s[token]) for token, s, _ in self.tokens)

    def divergence(self, kind: str = "reverse_kl", beta: float = 0.5) -> float:
        total = 0.0
        for _, s, t in self.tokens:
            mix = (beta * t.exp() + (1 - beta) * s.exp()).log()
            reverse, forward = (s.exp() * (s - t)).sum(), (t.exp() * (t - s)).sum()
            jsd = beta * (t.exp() * (t - mix)).sum() + (1 - beta) * (s.exp() * (s - mix)).sum()
            total += float({"reverse_kl": reverse, "forward_kl": forward, "jsd": jsd}[kind])
        return total

    def sampled(self) -> float:
        return sum(float((s[token] - t[token]) * s[token]) for token, s, t in self.tokens)


def naive_loss(config: DistillConfig, readings: list[Reading], kl_weight: float) -> float:
    """The mean over tokens, or over answers, by loops."""
    loss, rollouts = config.loss, [r.rollout for r in readings]
    tokens = sum(len(r.response_ids) for r in rollouts)
    if loss.level == "token" and loss.estimator == "sampled":
        return sum(r.sampled() for r in readings) / tokens
    if loss.level == "token":
        return sum(r.divergence(loss.divergence.kind, loss.divergence.beta) for r in readings) / tokens
    own = [r for r in readings if r.rollout.author == "student"]
    kl = sum(r.divergence() for r in own) / max(1, len(own))
    credits = []
    for r in rollouts:
        others = [x.reward for x in rollouts if x.group == r.group and x.sample != r.sample]
        credits.append(r.reward - sum(others) / len(others) if loss.reward_loss == "reinforce" else r.reward)
    reward = -sum(c * r.likelihood() for c, r in zip(credits, readings, strict=True)) / len(rollouts)
    return 0.8 * reward + kl_weight * kl


def readings_of(outcome: tiny.Outcome, step: int, world: Path, teacher: str = "teacher") -> list[Reading]:
    models = stock(world / "student"), stock(world / teacher)
    vocab = len(AutoTokenizer.from_pretrained(world / "student"))
    return [Reading.of(r, *models, vocab) for r in outcome.steps[step].rollouts]


# --- the loss, and what was learned from


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_loss_is_what_a_naive_reading_of_the_rollouts_gives(kind, world, done):
    outcome = done(kind)
    expected = naive_loss(outcome.config, readings_of(outcome, 0, world), kl_weight=0.2)
    assert outcome.column("loss")[0] == pytest.approx(expected, rel=2e-5, abs=1e-7)
    assert abs(expected) > 1e-4


def test_the_weight_of_the_divergence_goes_down_linearly_with_the_steps(world, tmp_path):
    # a rate that moves no weight, so that every step reads the same two models
    outcome = tiny.go(tiny.settings("distill", world, tmp_path / "run", *SEQUENCE, "train.learning_rate=1e-15",
                                    "train.max_steps=4"))
    for step, weight in enumerate((0.2, 0.15, 0.1, 0.05)):
        expected = naive_loss(outcome.config, readings_of(outcome, step, world), weight)
        assert outcome.column("loss")[step] == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_actor_sampled_is_what_the_learner_scores_at_every_update(kind, done):
    rows = done(kind).rows
    if kind in NOBODY_SAMPLES:
        assert not [name for row in rows for name in row if name.startswith("sampling/")]
    else:
        assert max(row["sampling/sampling_logp_difference/max"] for row in rows) < 1e-5
        assert max(row["sampling/sampling_logp_difference/mean"] for row in rows) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_the_authors_are_those_that_were_asked_for(kind, done):
    authors = {"teacher_writes": {"student", "teacher"}, "teacher_alone": {"teacher"}, "all_given": {"dataset"},
               "half_given": {"student", "dataset"}}
    rollout = done(kind).config.rollout
    for step in done(kind).steps:
        assert {r.author for r in step.rollouts} == authors.get(kind, {"student"})
        each = Counter((r.group, r.author) for r in step.rollouts)
        asked = {"student": rollout.num_generations, "teacher": rollout.num_teacher_generations, "dataset": 1}
        assert all(n == asked[author] for (_, author), n in each.items())
        assert len({group for group, _ in each}) == rollout.prompts_per_step


def test_the_mixture_deals_each_drawn_problem_to_one_side(world, done):
    outcome, tokenizer = done("half_given"), AutoTokenizer.from_pretrained(world / "student")
    problems = load_problems(DataConfig(path=str(world / "data.jsonl")))
    given = 0
    for t, step in enumerate(outcome.steps):
        drawn = draw(problems, 8, t, 0)
        assert sorted(r.problem.id for r in step.rollouts) == sorted(p.id for p in drawn)
        for r in step.rollouts:
            if r.author == "dataset":
                given += 1
                assert (r.prompt_ids, r.response_ids) == render_example(tokenizer, r.problem.messages,
                                                                        r.problem.completion)
    assert 6 <= given <= 18  # of 24


def test_rewards_are_those_of_what_was_sampled_and_not_of_the_datas_answers(done):
    for row, step in zip(done("half_given").rows, done("half_given").steps, strict=True):
        sampled = [r.reward for r in step.rollouts if r.author == "student"]
        assert row["reward"] == pytest.approx(sum(sampled) / len(sampled))
        assert [r.reward for r in step.rollouts if r.author == "dataset"] == [None] * (8 - len(sampled))


def test_advantages_are_centered_over_the_others_of_one_author_and_one_problem():
    base = {"problem": None, "prompt_ids": (1,), "response_ids": (2,), "finish": "stop"}
    rows = [(0, "student", 1.0), (0, "student", 0.0), (0, "student", 0.5), (1, "student", 3.0), (1, "student", None),
            (0, "teacher", 9.0), (0, "teacher", 7.0)]
    found = center([Rollout(group=g, sample=i, author=a, reward=r, **base) for i, (g, a, r) in enumerate(rows)])
    assert [r.advantage for r in found] == [0.75, -0.75, 0.0, None, None, 2.0, -2.0]


def test_sampling_and_scoring_share_the_temperature(world, done):
    for kind, temperature in (("cool", 0.7), ("reverse_kl", 1.0)):
        reading = readings_of(done(kind), 0, world)[0]
        assert reading.rollout.temperature == temperature
        assert reading.rollout.actor_logp == pytest.approx([float(s[token]) for token, s, _ in reading.tokens],
                                                           abs=2e-6)


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd", "sampled"])
def test_a_student_that_is_its_teacher_has_no_loss_and_stays_where_it_is(kind, world, tmp_path):
    outcome = tiny.go(tiny.settings("distill", world, tmp_path / "run", *KINDS[kind], "teacher.path={world}/student"))
    assert abs(outcome.column("loss")[0]) < 1e-7
    before, after = stock(world / "student").state_dict(), stock(outcome.folder / "final").state_dict()
    moved = max(float((before[name] - after[name]).abs().max()) for name in before)
    # Adam takes the rounding errors of the jsd's mixture for gradients; the others are exactly 0
    assert moved <= (3 * 3e-3 if kind == "jsd" else 0.0)
    assert max(outcome.column("kl")) < 1e-6 if kind != "jsd" else max(outcome.column("kl")) < 1e-4


def test_training_closes_the_gap(world, tmp_path):
    outcome = tiny.go(tiny.settings(
        "distill", world, tmp_path / "run", "train.max_steps=40", "train.learning_rate=2e-2", "train.save_steps=100",
        "eval_data={path: {world}/data.jsonl, limit: 16}", "train.eval_on_start=true", "train.log_completions_steps=0"))
    assert outcome.rows[-1]["eval_kl"] < 0.6 * outcome.rows[0]["eval_kl"]


# --- versions of the weights, and their decode copies


@dataclass
class Watched:
    """What a run did with decode copies."""

    made: list  # (model, version, dtype, exact) of each
    alive: list  # weak references
    learned_beside: list  # copies that were there at each call of the learner


@pytest.fixture
def watched(monkeypatch) -> Watched:
    from tinyr2.models.decode import Decoder
    from tinyr2.recipes import distillation as recipe

    seen = Watched([], [], [])
    make, accumulate = Decoder.__init__, recipe.accumulate

    def note(self, model, **more):
        make(self, model, **more)
        seen.made.append((model, self.version, more["dtype"], more["exact"]))
        seen.alive.append(weakref.ref(self))

    def learn(*args, **more):
        seen.learned_beside.append([copy() for copy in seen.alive if copy() is not None])
        return accumulate(*args, **more)

    monkeypatch.setattr(Decoder, "__init__", note)
    monkeypatch.setattr(recipe, "accumulate", learn)
    return seen


def test_a_decode_copy_is_made_once_a_version_and_is_gone_before_the_learner_runs(world, tmp_path, watched):
    tiny.go(tiny.settings("distill", world, tmp_path / "run", "eval_data={path: {world}/data.jsonl, limit: 4}", DIGITS,
                          "compare_problems=0", "train.eval_steps=2"))
    # steps 1 and 2, the evaluation after 2, step 3, and the last evaluation
    assert [version for _, version, _, _ in watched.made] == [0, 1, 2, 2, 3]
    assert {(dtype, exact) for _, _, dtype, exact in watched.made} == {(torch.float32, False)}
    assert watched.learned_beside == [[]] * 5


def test_a_teacher_that_writes_keeps_one_decode_copy_for_the_whole_run(world, tmp_path, watched):
    tiny.go(tiny.settings("distill", world, tmp_path / "run", *KINDS["teacher_writes"]))
    teachers = [model for model, *_ in watched.made if model.config.hidden_size == 32]
    assert (len(teachers), len(watched.made)) == (1, 4)
    assert all(len(copies) == 1 for copies in watched.learned_beside)


def test_rollouts_carry_the_version_that_wrote_them(done):
    for t, step in enumerate(done("teacher_writes").steps):
        assert {(r.author, r.policy_version) for r in step.rollouts} == {("student", t), ("teacher", None)}


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_a_policy_whose_weights_were_stepped_is_refused(optim, world):
    model = stock(world / "student")
    tokenizer = AutoTokenizer.from_pretrained(world / "student")
    policy = setup.policy_of(model, tokenizer, len(tokenizer), version=4)
    problems = load_problems(DataConfig(path=str(world / "data.jsonl"), limit=2))
    assert sample(policy, problems, n=1, sampling=RolloutConfig(), seed=0)
    optimizer = make_optimizer(model, TrainConfig(optim=optim))
    model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    with pytest.raises(RunError, match="stale.*version 4 .*make a new one after each optimizer step"):
        sample(policy, problems, n=1, sampling=RolloutConfig(), seed=0)
    fresh = setup.policy_of(model, tokenizer, len(tokenizer), version=5)
    assert {r.policy_version for r in sample(fresh, problems, n=1, sampling=RolloutConfig(), seed=0)} == {5}


def test_an_exact_policy_writes_the_same_bits_whatever_is_decoded_side_by_side(world):
    model, tokenizer = stock(world / "student"), AutoTokenizer.from_pretrained(world / "student")
    problems = load_problems(DataConfig(path=str(world / "data.jsonl"), limit=12))

    def written(max_rows: int) -> list:
        policy = setup.policy_of(model, tokenizer, len(tokenizer), exact=True)
        found = sample(policy, problems, n=3, sampling=RolloutConfig(max_completion_length=24), seed=0,
                       max_rows=max_rows)
        return [(r.response_ids, r.actor_logp) for r in found]

    whole = written(64)
    assert written(1) == whole
    assert written(3) == whole


def test_a_deterministic_run_is_the_same_to_the_bit_whatever_is_decoded_side_by_side(world, tmp_path, watched):
    curves = [tiny.go(tiny.settings("distill", world, tmp_path / str(rows), "train.deterministic=true",
                                    f"rollout.max_rows={rows}")).rows for rows in (64, 3)]
    assert curves[0] == curves[1]
    assert all(exact for *_, exact in watched.made)


# --- precision

RATIOS = {f"sampling/importance_sampling_ratio/{name}" for name in ("min", "mean", "max")}


@pytest.fixture
def any_processor(monkeypatch):
    """bfloat16 is tested on processors that emulate it, too."""
    monkeypatch.setattr(setup, "require_bfloat16", lambda *_: None)


@pytest.mark.parametrize(("changes", "corrects"), [
    (["rollout.dtype=bfloat16"], True), (["train.bf16=true"], True),
    (["train.bf16=true", "rollout.dtype=bfloat16"], True), (["student.dtype=bfloat16"], True), ([], False)])
def test_where_actor_or_learner_rounds_to_bfloat16_the_weights_are_reported(
        changes, corrects, world, tmp_path, watched, any_processor):
    outcome = tiny.go(tiny.settings("distill", world, tmp_path / "run", *changes))
    asked = torch.bfloat16 if "rollout.dtype=bfloat16" in changes else torch.float32
    assert {dtype for _, _, dtype, _ in watched.made} == {asked}
    for row in outcome.rows:
        assert row.keys() & RATIOS == (RATIOS if corrects else set())
        # 2^-9 of the logits of a tiny model
        assert 0 < row["sampling/sampling_logp_difference/mean"] < 0.02
        if corrects:
            low, mean, high = (row[f"sampling/importance_sampling_ratio/{n}"] for n in ("min", "mean", "max"))
            gap = row["sampling/sampling_logp_difference/max"]
            assert low < mean < high and mean == pytest.approx(1, abs=0.01)
            assert max(-math.log(low), math.log(high)) == pytest.approx(gap, rel=1e-4)


@pytest.mark.parametrize("kind", ["reverse_kl", "sampled", "reinforce"])
def test_the_loss_of_a_rounded_actor_is_weighted_with_the_cap(kind, world, tmp_path, any_processor):
    # a cap far below the ratios, which are near 1: the weight of each token
    outcome = tiny.go(tiny.settings("distill", world, tmp_path / "run", *KINDS[kind], "rollout.dtype=bfloat16",
                                    "rollout.importance_cap=0.5"))
    readings = readings_of(outcome, 0, world)
    kl = sum(r.divergence() for r in readings) / len(readings) if kind == "reinforce" else 0.0
    whole = naive_loss(outcome.config, readings, kl_weight=0.2)
    assert outcome.column("loss")[0] == pytest.approx(0.5 * (whole - 0.2 * kl) + 0.2 * kl, rel=2e-5, abs=1e-7)
    assert all(row[name] == 0.5 for row in outcome.rows for name in RATIOS)


# --- what a run leaves behind


@pytest.mark.parametrize("kind", KINDS)
def test_the_final_folder_is_a_plain_model_that_moved(kind, world, done):
    folder = done(kind).folder / "final"
    before, after = dict(stock(world / "student").named_parameters()), dict(stock(folder).named_parameters())
    assert before.keys() == after.keys()
    assert max(float((before[n] - after[n]).detach().abs().max()) for n in before) > 1e-4
    assert {p.name for p in folder.iterdir()} == {"config.json", "generation_config.json", "model.safetensors",
                                                  "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    text = AutoTokenizer.from_pretrained(folder).apply_chat_template([{"role": "user", "content": "1+1="}],
                                                                     tokenize=False, add_generation_prompt=True)
    assert text == "<|user|>1+1=<|assistant|>"


def test_the_final_model_is_the_last_checkpoints(done):
    folder = done("reverse_kl").folder
    saved = load_file(folder / "checkpoints/step-00000003/model.safetensors")
    named = stock(folder / "final").state_dict()
    assert all(torch.equal(saved[name], named[name]) for name in saved)


def test_merged_adapters_say_what_the_adapted_model_said(world, done):
    outcome = done("lora")
    model = setup.load_student(outcome.config.student, torch.device("cpu"), outcome.config.train.seed)
    adapters = load_file(outcome.folder / "checkpoints/step-00000003/model.safetensors")
    named = dict(model.named_parameters())
    assert adapters.keys() == {name for name, p in named.items() if p.requires_grad}
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    with torch.no_grad():
        start = model(ids).logits
        for name, value in adapters.items():
            named[name].copy_(value)
        adapted = model(ids).logits
        merged = stock(outcome.folder / "final")(ids).logits
    torch.testing.assert_close(merged, adapted, rtol=0, atol=1e-5)
    assert float((adapted - start).abs().max()) > 1e-3


def test_the_run_folder_is_complete(done):
    outcome = done("reinforce")
    assert {p.name for p in outcome.folder.iterdir()} == {
        "config.resolved.yaml", "env.json", "metrics.jsonl", "timing.jsonl", "events.jsonl", "completions",
        "checkpoints", "final", "report.html", "lock"}
    assert load(DistillConfig, outcome.folder / "config.resolved.yaml") == outcome.config
    assert json.loads((outcome.folder / "env.json").read_text())["verb"] == "distill"
    assert [p.name for p in sorted((outcome.folder / "completions").iterdir())] == [
        f"step-0000000{n}.parquet" for n in (1, 2, 3)]
    assert "<html" in (outcome.folder / "report.html").read_text()
    assert outcome.result == {"ending": "finished", "step": 3, "num_tokens": outcome.column("num_tokens")[-1],
                              "run": str(outcome.folder), "model": str(outcome.folder / "final"),
                              "report": str(outcome.folder / "report.html")}


def test_completions_are_kept_with_rewards_and_disagreement(world, done):
    outcome = done("reinforce")
    rows = parquet.read_table(outcome.folder / "completions/step-00000001.parquet").to_pylist()
    readings = readings_of(outcome, 0, world)
    assert len(rows) == len(readings) == 12
    for row, reading in zip(rows, readings, strict=True):
        assert (row["problem_id"], row["completion"]) == (reading.rollout.problem.id, reading.rollout.text)
        assert row["reward"] == sum(c.isdigit() for c in row["completion"]) / 12
        expected = [float(s[token] - t[token]) for token, s, t in reading.tokens]
        assert row["disagreement"] == pytest.approx(expected, abs=2e-6)


SAMPLED = {"completions/mean_length", "completions/min_length", "completions/max_length", "completions/clipped_ratio"}
GAPS = {"sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max"}
REWARDED = {"reward", "reward_std", "frac_reward_zero_std", "rewards/digits/mean", "rewards/digits/std"}
ALWAYS = {"step", "loss", "entropy", "kl", "grad_norm", "learning_rate", "num_tokens", "rollouts/errored_ratio"}


@pytest.mark.parametrize(("kind", "names"), [
    ("reverse_kl", ALWAYS | SAMPLED | GAPS), ("sampled", ALWAYS | SAMPLED | GAPS), ("all_given", ALWAYS),
    ("reinforce", ALWAYS | SAMPLED | GAPS | REWARDED), ("teacher_alone", ALWAYS | SAMPLED | REWARDED),
    ("half_given", ALWAYS | SAMPLED | GAPS | REWARDED - {"frac_reward_zero_std"})])
def test_metrics_have_these_names_and_finite_values(kind, names, done):
    for row in done(kind).rows:
        assert row.keys() - {"completions/mean_terminated_length"} == names
        assert all(math.isfinite(value) for value in row.values())


def test_metrics_are_named_as_trl_names_them():
    trainer = pytest.importorskip("trl.trainer.grpo_trainer")
    text = Path(trainer.__file__).read_text()
    others = {"entropy", "kl", "num_tokens", "completions/mean_terminated_length"}
    for name in SAMPLED | GAPS | RATIOS | REWARDED | others:
        assert f'"{name.replace("/digits/", "/{reward_func_name}/")}"' in text, name


def test_metrics_count_what_the_rollouts_hold(done):
    outcome, tokens = done("reinforce"), 0
    for row, step in zip(outcome.rows, outcome.steps, strict=True):
        lengths = [len(r.response_ids) for r in step.rollouts]
        tokens += sum(lengths) + sum(len(r.prompt_ids) for r in step.rollouts)
        assert row["num_tokens"] == tokens
        assert (row["completions/min_length"], row["completions/max_length"]) == (min(lengths), max(lengths))
        assert row["completions/mean_length"] == pytest.approx(sum(lengths) / 12)
        assert row["completions/clipped_ratio"] == pytest.approx(sum(r.finish == "length" for r in step.rollouts) / 12)
        rewards = [r.reward for r in step.rollouts]
        assert row["reward"] == row["rewards/digits/mean"] == pytest.approx(sum(rewards) / 12)
        groups = [{r.reward for r in step.rollouts if r.group == g} for g in range(4)]
        assert row["frac_reward_zero_std"] == sum(len(g) == 1 for g in groups) / 4


def test_the_held_out_divergence_is_that_of_the_students_own_answers(world, tmp_path):
    outcome = tiny.go(tiny.settings("distill", world, tmp_path / "run", "eval_kl_problems=5",
                                    "eval_data={path: {world}/data.jsonl, limit: 8}", "train.eval_on_start=true"))
    assert [row["step"] for row in outcome.rows if "eval_kl" in row] == [0, 3]
    tokenizer = AutoTokenizer.from_pretrained(world / "student")
    problems = load_problems(DataConfig(path=str(world / "data.jsonl"), limit=5))
    for row, folder in ((outcome.rows[0], world / "student"), (outcome.rows[-1], outcome.folder / "final")):
        student, teacher = stock(folder).eval(), stock(world / "teacher")
        rollouts = sample(setup.policy_of(student, tokenizer, len(tokenizer)), problems, n=1,
                          sampling=outcome.config.rollout, seed=outcome.config.eval.seed)
        readings = [Reading.of(r, student, teacher, len(tokenizer)) for r in rollouts]
        expected = sum(r.divergence() for r in readings) / sum(len(r.rollout.response_ids) for r in readings)
        assert row["eval_kl"] == pytest.approx(expected, rel=1e-4)


# --- vocabularies and ends


@pytest.fixture(scope="module")
def padded(world) -> Path:
    """A teacher whose vocabulary is 8 rows longer than the tokenizer; it likes those rows best."""
    folder = world / "padded"
    model, tokenizer = stock(world / "teacher"), AutoTokenizer.from_pretrained(world / "teacher")
    model.resize_token_embeddings(len(tokenizer) + 8, mean_resizing=False)
    with torch.no_grad():
        model.get_output_embeddings().weight[len(tokenizer):] = 3.0 * torch.randn(
            8, 32, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["reverse_kl", "teacher_writes"])
def test_a_longer_vocabulary_is_cropped_to_the_ids_that_both_have(kind, world, padded, tmp_path):
    outcome = tiny.go(tiny.settings("distill", world, tmp_path / "run", *KINDS[kind], f"teacher.path={padded}"))
    vocab = len(AutoTokenizer.from_pretrained(world / "student"))
    drawn = {token for step in outcome.steps for r in step.rollouts for token in r.response_ids}
    assert max(drawn) < vocab
    expected = naive_loss(outcome.config, readings_of(outcome, 0, world, teacher="padded"), kl_weight=0.2)
    assert outcome.column("loss")[0] == pytest.approx(expected, rel=2e-5)


def test_a_teacher_with_fewer_ids_than_the_tokenizer_is_refused(world, tmp_path):
    model, tokenizer = stock(world / "teacher"), AutoTokenizer.from_pretrained(world / "teacher")
    model.resize_token_embeddings(len(tokenizer) - 1)
    model.save_pretrained(tmp_path / "short")
    tokenizer.save_pretrained(tmp_path / "short")
    with pytest.raises(ConfigError, match=r"teacher.vocabulary: the model has 23 ids, .* writes 24"):
        tiny.go(tiny.settings("distill", world, tmp_path / "run", f"teacher.path={tmp_path}/short"))


def test_the_end_of_an_answer_is_judged_where_padding_is_the_same_token(world, tmp_path):
    for name in ("student", "teacher"):
        folder = Path(shutil.copytree(world / name, tmp_path / name))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": tokenizer.eos_token_id}))
    outcome = tiny.go(tiny.settings(
        "distill", world, tmp_path / "run", f"student.path={tmp_path}/student", f"teacher.path={tmp_path}/teacher",
        "loss.estimator=sampled", "rollout.prompts_per_step=16"))
    rollouts, scores = outcome.steps[0].rollouts, outcome.steps[0].scores
    ended = [r for r in rollouts if r.response_ids[-1] == tokenizer.pad_token_id]
    assert ended and all(r.finish == "stop" for r in ended)
    assert len(scores.learner_logp) == sum(len(r.response_ids) for r in rollouts)
    expected = naive_loss(outcome.config, readings_of(outcome, 0, tmp_path), kl_weight=0.0)
    assert outcome.column("loss")[0] == pytest.approx(expected, rel=2e-5)


# --- graders that fail


def test_a_reward_that_fails_on_every_answer_ends_a_run_that_would_learn_from_it_with_its_own_words(world, tmp_path):
    with pytest.raises(DataError, match=r"no answer of step 1 could be graded: .*no verdict.*rewards.py, line"):
        tiny.go(tiny.settings("distill", world, tmp_path / "run", *SEQUENCE,
                              "rewards=[{file: {world}/rewards.py, function: broken}]"))


def test_a_token_level_loss_goes_on_without_a_reward_that_fails_and_says_so(world, done, tmp_path):
    outcome = tiny.go(tiny.settings("distill", world, tmp_path / "run",
                                    "rewards=[{file: {world}/rewards.py, function: broken}]"))
    assert outcome.column("loss") == done("reverse_kl").column("loss")
    assert outcome.column("rollouts/errored_ratio") == [1.0, 1.0, 1.0]
    rows = parquet.read_table(outcome.folder / "completions").to_pylist()
    assert rows and all("no verdict" in row["error"] for row in rows)


# --- curves


@pytest.mark.parametrize("name", ["token", "sequence"])
def test_twenty_steps_follow_the_golden_curve(name, world, tmp_path):
    # the cooler, the farther apart the two random models are: a divergence near 0 is all rounding
    changes = SEQUENCE if name == "sequence" else ["rollout.temperature=0.3"]
    outcome = tiny.go(tiny.settings(
        "distill", world, tmp_path / "run", *changes, "train.deterministic=true", "train.max_steps=20",
        "train.save_steps=100", "train.warmup_steps=5", "train.log_completions_steps=0"))
    tiny.compare_with_golden(f"distill_{name}", outcome.column("loss"))


# --- what is refused


@pytest.mark.parametrize(("changes", "message"), [
    (["rollout.top_p=0.9"], "rollout: training samples from the whole distribution: top_p must be 1, top_k 0, min_p 0"),
    (["rollout.top_k=20"], "rollout: training samples from the whole distribution"),
    (["rollout.min_p=0.05"], "rollout: training samples from the whole distribution"),
    (["rollout.temperature=0"], "rollout.temperature: Input should be greater than 0"),
    (["loss.level=sequence"], "loss.level: sequence needs a reward; add rewards: [{name: exact_answer}]"),
    ([*SEQUENCE, "rollout.num_generations=1"], "set rollout.num_generations to 2 or more"),
    ([*SEQUENCE, "rollout.num_teacher_generations=1"], "may learn from answers that the teacher wrote"),
    (["rollout.num_teacher_generations=1"], "may learn from answers that the teacher wrote"),
    (["rollout.num_generations=0"], "nobody writes; set num_generations to 1 or more"),
    ([*SEQUENCE, "rollout.lmbda=0.5"], "which only loss.level: token with estimator: full can learn from"),
    (["loss.estimator=sampled", "rollout.lmbda=0.5"], "which only loss.level: token with estimator: full"),
    (["loss.estimator=sampled", "loss.divergence.kind=jsd"], "estimates the reverse KL only; set divergence.kind to"),
    ([*SEQUENCE, "loss.estimator=sampled"], "with level: sequence leave it at full"),
    (["loss.divergence={kind: jsd, beta: 1.0}"], "loss.divergence.beta: Input should be less than 1"),
    (["rollout.lambda=0.5"], "rollout.lambda: unknown key; did you mean 'lmbda'"),
])
def test_choices_that_contradict_each_other_are_told_apart_with_a_cure(changes, message, world, tmp_path):
    with pytest.raises(ConfigError) as caught:
        tiny.settings("distill", world, tmp_path / "run", *changes)
    assert message in str(caught.value)


@pytest.mark.parametrize(("change", "message"), [
    ("teacher.path={world}/none", "teacher: {world}/none: no such model folder"),
    ("student.path={world}/none", "student: {world}/none: no such model folder"),
    ("data.path={world}/none.jsonl", "data: {world}/none.jsonl: no such file"),
    ("rewards=[{file: {world}/none.py, function: f}]", "rewards: {world}/none.py: no such file"),
    ("rewards=[{file: {world}/rewards.py, function: digit}]", "no function 'digit'; did you mean 'digits'"),
    ("student.lora={target_modules: [embed_tokens]}", "takes in the embeddings, which are the output head too"),
])
def test_what_cannot_be_read_is_told_before_anything_is_written(change, message, world, tmp_path):
    with pytest.raises(UserError) as caught:
        tiny.go(tiny.settings("distill", world, tmp_path / "run", change))
    assert message.replace("{world}", str(world)) in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_cannot_spell_the_students_text_is_told_before_anything_is_written(world, tmp_path):
    other = Path(shutil.copytree(world / "teacher", tmp_path / "other"))
    train_tokenizer(["xyz"], vocab_size=20, alphabet="corpus").save_pretrained(other)
    with pytest.raises(ConfigError, match="teacher.tokenizer: no byte of the student's text can be spelled"):
        tiny.go(tiny.settings("distill", world, tmp_path / "run", f"teacher.path={other}"))
    assert not (tmp_path / "run").exists()


def test_bad_data_leaves_the_run_that_was_to_be_overwritten_as_it_was(world, tmp_path):
    tiny.go(tiny.settings("distill", world, tmp_path / "run", "train.max_steps=1"))
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    with pytest.raises((ConfigError, DataError)):
        tiny.go(tiny.settings("distill", world, tmp_path / "run", "data.path={world}/none.jsonl"), overwrite=True)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before


# --- real input


@pytest.mark.skipif(not (SHARED / "data/gsm8k_train.jsonl").is_file(), reason="no shared data here")
def test_gsm8k_with_a_real_tokenizer_and_its_chat_template(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers/minimind")
    for name, hidden in (("student", 16), ("teacher", 24)):
        torch.manual_seed(hidden)
        save_model(Qwen3ForCausalLM(Qwen3Config(
            hidden_size=hidden, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
            intermediate_size=32, vocab_size=len(tokenizer), max_position_embeddings=512, tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)), tokenizer, tmp_path / name)
    columns = "columns: {prompt: question}, answer_after: '####'"
    outcome = tiny.go(tiny.settings(
        "distill", tmp_path, tmp_path / "run", f"data={{path: {SHARED}/data/gsm8k_train.jsonl, limit: 8, {columns}}}",
        f"eval_data={{path: {SHARED}/data/gsm8k_test.jsonl, limit: 2, {columns}}}", "train.max_steps=2"))
    rollout = outcome.steps[0].rollouts[0]
    question = rollout.problem.messages[0].content
    prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant"
    assert tokenizer.decode(rollout.prompt_ids).startswith(prompt)
    expected = naive_loss(outcome.config, readings_of(outcome, 0, tmp_path), 0.0)
    assert outcome.column("loss")[0] == pytest.approx(expected, rel=2e-5)
    assert outcome.rows[-1]["eval_kl"] > 0
