"""`tinyr2 sft`: what it learns, what its folder holds, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.recipes import tiny
from tinyr2.core.config import load
from tinyr2.core.errors import ConfigError, DataError
from tinyr2.data.problems import DataConfig, load_problems
from tinyr2.recipes.sft import FineTuning, SftConfig
from tinyr2.tokens.chat import render_example

GREEDY = ("eval_data={path: {world}/data.jsonl, limit: 8}", "rewards=[{name: exact_answer}]",
          "eval={max_completion_length: 12}")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return tiny.make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def done(world, tmp_path_factory) -> tiny.Outcome:
    """Three plain steps."""
    out = tmp_path_factory.mktemp("runs") / "plain"
    return tiny.go(tiny.settings("sft", world, out, "train.eval_steps=2", *GREEDY))


def stock(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder)


def naive_loss(model, tokenizer, problems) -> float:
    """Mean negative log-likelihood of the response tokens, row by row through the stock forward."""
    total, count = 0.0, 0
    for p in problems:
        prompt, response = render_example(tokenizer, p.messages, p.completion)
        with torch.no_grad():
            logp = torch.log_softmax(model(torch.tensor([[*prompt, *response]])).logits[0].double(), -1)
        total -= sum(float(logp[len(prompt) - 1 + j, token]) for j, token in enumerate(response))
        count += len(response)
    return total / count


def test_the_first_loss_is_the_likelihood_of_the_drawn_answers_and_nothing_else(world, done):
    drawn = [r.problem for r in done.steps[0].scores.rollouts]
    assert len({p.id for p in drawn}) == 6
    expected = naive_loss(stock(world / "student"), AutoTokenizer.from_pretrained(world / "student"), drawn)
    assert done.column("loss")[0] == pytest.approx(expected, rel=1e-5)


def test_the_folder_is_complete_and_explains_itself(done):
    assert {p.name for p in done.folder.iterdir()} == {
        "config.resolved.yaml", "env.json", "metrics.jsonl", "timing.jsonl", "events.jsonl", "checkpoints", "final",
        "report.html", "lock"}
    assert load(SftConfig, done.folder / "config.resolved.yaml") == done.config
    assert [p.name for p in (done.folder / "checkpoints").iterdir()] == ["step-00000003"]
    assert done.result == {"ending": "finished", "step": 3, "num_tokens": done.column("num_tokens")[-1],
                           "run": str(done.folder), "model": str(done.folder / "final"),
                           "report": str(done.folder / "report.html")}


def test_a_step_has_these_metrics_and_an_evaluation_its_own(done):
    plain = {"step", "loss", "entropy", "grad_norm", "learning_rate", "num_tokens"}
    assert done.rows[0].keys() == plain
    evaluated = {"eval_pass@1", "eval_pass@1_low", "eval_pass@1_high", "eval_pass@1_n", "eval_loss",
                 "eval_completions/mean_length", "eval_completions/clipped_ratio"}
    assert [bool(evaluated & row.keys()) for row in done.rows] == [False, True, True]
    assert done.rows[1].keys() >= plain | evaluated


def test_the_held_out_loss_is_the_final_models_and_the_final_model_is_the_last_checkpoints(world, done):
    from safetensors.torch import load_file

    final = stock(done.folder / "final")
    held_out = load_problems(DataConfig(path=str(world / "data.jsonl"), limit=8))
    expected = naive_loss(final, AutoTokenizer.from_pretrained(done.folder / "final"), held_out)
    assert done.rows[-1]["eval_loss"] == pytest.approx(expected, rel=1e-5)
    saved = load_file(done.folder / "checkpoints/step-00000003/model.safetensors")
    named = dict(final.named_parameters())
    assert saved.keys() == named.keys()
    assert all(torch.equal(saved[name], named[name]) for name in saved)


def test_training_lowers_the_loss(world, tmp_path):
    losses = tiny.go(tiny.settings("sft", world, tmp_path / "run", "train.max_steps=30", "train.learning_rate=1e-2",
                                   "train.save_steps=100")).column("loss")
    assert losses[-1] < losses[0] - 0.5


def test_the_best_evaluated_model_is_final_where_that_is_asked_for(world, tmp_path):
    # one example is soon learned by heart, and the others are then worse than before: the last is not the best
    config = tiny.settings("sft", world, tmp_path / "run", "eval_data={path: {world}/data.jsonl, limit: 8}",
                           "data.limit=1", "train.learning_rate=0.1", "train.max_steps=6",
                           "train.eval_steps=1", "train.eval_on_start=true", "train.load_best_model_at_end=true")
    outcome = tiny.go(config)
    losses = {row["step"]: row["eval_loss"] for row in outcome.rows if row["step"] > 0}
    best = min(losses, key=losses.get)
    assert best < 6
    held_out = load_problems(DataConfig(path=str(world / "data.jsonl"), limit=8))
    tokenizer = AutoTokenizer.from_pretrained(outcome.folder / "final")
    assert naive_loss(stock(outcome.folder / "final"), tokenizer, held_out) == pytest.approx(losses[best], rel=1e-5)
    assert [row["step"] for row in outcome.rows] == [0, 1, 2, 3, 4, 5, 6]


def test_the_end_of_an_answer_is_learned_where_padding_is_the_same_token(world, tmp_path):
    folder = Path(shutil.copytree(world / "student", tmp_path / "student"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    end = tokenizer.eos_token_id
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": end}))
    (tmp_path / "one.jsonl").write_text('{"prompt": "1+1=", "completion": "####2", "answer": "2"}\n')
    outcome = tiny.go(tiny.settings(
        "sft", world, tmp_path / "run", f"model.path={folder}", f"data.path={tmp_path}/one.jsonl",
        "examples_per_step=2", f"eval_data={{path: {tmp_path}/one.jsonl}}", "rewards=[{name: exact_answer}]",
        "eval.max_completion_length=8", "train.max_steps=30", "train.learning_rate=3e-2", "train.save_steps=100"))
    scores = outcome.steps[0].scores
    assert [r.response_ids[-1] for r in scores.rollouts] == [end, end]
    assert len(scores.learner_logp) == sum(len(r.response_ids) for r in scores.rollouts)
    ends = [float(step.scores.learner_logp[-1]) for step in outcome.steps]
    assert ends[0] < -2.0 and ends[-1] > -0.1
    assert outcome.rows[-1]["eval_completions/clipped_ratio"] == 0.0
    assert outcome.rows[-1]["eval_pass@1"] == 1.0


def test_adapters_train_alone_and_leave_a_plain_model(world, tmp_path):
    outcome = tiny.go(tiny.settings("sft", world, tmp_path / "run", "model.lora={r: 4, lora_dropout: 0.1}"))
    before, after = dict(stock(world / "student").named_parameters()), dict(stock(outcome.folder / "final")
                                                                            .named_parameters())
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "_proj" in name}


def test_twenty_steps_follow_the_golden_curve(world, tmp_path):
    outcome = tiny.go(tiny.settings("sft", world, tmp_path / "run", "train.deterministic=true", "train.max_steps=20",
                                    "train.save_steps=100", "train.warmup_steps=5", "train.log_completions_steps=0"))
    tiny.compare_with_golden("sft", outcome.column("loss"))


# --- bad input


def world_file(name: str, text: str):
    def make(folder: Path) -> str:
        (folder / name).write_text(text)
        return f"data.path={folder / name}"
    return make


def without_tokenizer(world: Path):
    def make(folder: Path) -> str:
        model = Path(shutil.copytree(world / "student", folder / "bare"))
        for path in model.glob("tokenizer*"):
            path.unlink()
        return f"model.path={model}"
    return make


ROW = '{"prompt": "1+1=", "completion": "2"}\n'
BAD_DATA = {
    "missing": (lambda folder: f"data.path={folder}/none.jsonl", "none.jsonl: no such file"),
    "malformed": (world_file("a.jsonl", ROW + '{"prompt": \n'), "a.jsonl, line 2: not valid JSON"),
    "no object": (world_file("a.jsonl", ROW * 2 + "3\n"), "a.jsonl, line 3: a int"),
    "empty": (world_file("a.jsonl", "\n"), "a.jsonl: the dataset is empty"),
    "no user": (world_file("a.jsonl", '{"prompt": [{"role": "system", "content": "1"}], "completion": "2"}\n'),
                "a.jsonl, line 1: the prompt has no user turn"),
    "unsolved": (world_file("a.jsonl", ROW + '{"prompt": "1+1="}\n'), "1 of 2 problems have no completion"),
    "too long": (world_file("a.jsonl", '{"prompt": "%s", "completion": "2"}\n' % ("1" * 70)),
                 "1 of 1 prompts leave no room for an answer in the context of the model (64 tokens)"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_is_told_before_anything_is_written(world, tmp_path, name):
    make, message = BAD_DATA[name]
    config = tiny.settings("sft", world, tmp_path / "out", make(tmp_path))
    with pytest.raises((ConfigError, DataError)) as caught:
        tiny.go(config)
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_bad_model_is_told_before_anything_is_written(world, tmp_path):
    cut = Path(shutil.copytree(world / "student", tmp_path / "cut"))
    data = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(data[:-100])
    for change, message in ((without_tokenizer(world)(tmp_path), "a model folder without a tokenizer"),
                            (f"model.path={cut}", "cannot load its weights"),
                            (f"model.path={tmp_path}/none", "no such model folder"),
                            ("model.lora={target_modules: nonsense}", "Target modules nonsense not found"),
                            ("device=tpu", "device"),
                            ("train.load_best_model_at_end=true", "nothing would say which model is best")):
        with pytest.raises((ConfigError, DataError)) as caught:
            tiny.go(tiny.settings("sft", world, tmp_path / "out", change))
        assert message in str(caught.value)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("change", "message"), [
    ("examples_per_stp=2", "examples_per_stp: unknown key; did you mean 'examples_per_step'"),
    ("train.max_step=3", "train.max_step: unknown key; did you mean 'max_steps'"),
    ("train.max_steps=0", "train.max_steps: Input should be greater than or equal to 1 (got 0)"),
    ("train.learning_rate=fast", "train.learning_rate: Input should be a valid number"),
    ("model.dtype=float16", "model.dtype: Input should be"),
    ("rewards=[{file: r.py}]", "rewards.0: a reward is either `name: exact_answer`, or `file: my.py` with"),
])
def test_a_setting_that_cannot_be_is_named(world, tmp_path, change, message):
    with pytest.raises(ConfigError) as caught:
        tiny.settings("sft", world, tmp_path / "out", change)
    assert message in str(caught.value)


# --- mixtures


@pytest.fixture(scope="module")
def chains(tmp_path_factory) -> Path:
    """Long and short answers to the same problems, in files of one name; two long ones are too long."""
    folder = tmp_path_factory.mktemp("chains")
    for name, repeats in (("long", 3), ("short", 1)):
        (folder / name).mkdir()
        rows = [{"prompt": f"{i}+1=", "completion": f"#{i + 1}" * (repeats if i < 6 or name == "short" else 9)}
                for i in range(8)]
        (folder / name / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def mixed(world: Path, chains: Path, out: Path, *overrides: str) -> SftConfig:
    sources = ", ".join(f"{name}: {{path: {chains}/{name}/data.jsonl}}" for name in ("long", "short"))
    mixture = f"mixture={{sources: {{{sources}}}, max_completion_length: 12}}"
    return tiny.settings("sft", world, out, "data=null", mixture, "examples_per_step=6", "train.max_steps=5",
                         *overrides)


@pytest.fixture(scope="module")
def blend(world, chains, tmp_path_factory) -> tiny.Outcome:
    return tiny.go(mixed(world, chains, tmp_path_factory.mktemp("runs") / "mixed", "train.save_steps=2"))


def test_a_mixture_deals_one_long_chain_to_four_short_ones_and_says_so(blend):
    drawn = [r.problem.id.partition("/")[0] for step in blend.steps for r in step.scores.rollouts]
    assert (drawn.count("long"), drawn.count("short")) == (6, 24)
    for row, step in zip(blend.rows, blend.steps, strict=True):
        own = [r for r in step.scores.rollouts if r.problem.id.startswith("long/")]
        assert row["mixture/long"] == len(own) / 6 and row["mixture/short"] == (6 - len(own)) / 6
        tokens = [sum(r.learned for r in some) for some in (own, step.scores.rollouts)]
        assert row["mixture/long_tokens"] == tokens[0] / tokens[1]


def test_over_long_rows_are_dropped_told_and_never_cut(blend):
    written = {r.problem.id: r for step in blend.steps for r in step.scores.rollouts}
    assert not {"long/data:6", "long/data:7"} & written.keys()
    assert all(len(r.response_ids) == 7 for name, r in written.items() if name.startswith("long/"))
    assert "warning: mixture.long: 2 over-long rows of" in blend.said
    events = [json.loads(line) for line in (blend.folder / "events.jsonl").read_text().splitlines()]
    assert [e["source"] for e in events if e["event"] == "dropped"] == ["mixture.long"]


def test_a_resumed_mixture_goes_on_where_it_stood(world, chains, blend, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    plain, steps = FineTuning.step, []

    def stopping(self, t):
        steps.append(t)
        if steps == [0, 1, 2]:
            raise Killed
        return plain(self, t)

    monkeypatch.setattr(FineTuning, "step", stopping)
    config = mixed(world, chains, tmp_path / "run", "train.save_steps=2")
    with pytest.raises(Killed):
        tiny.go(config)
    assert tiny.go(config, resume=True).rows == blend.rows
    assert steps == [0, 1, 2, 2, 3, 4]


@pytest.mark.parametrize(("change", "message"), [
    ("data={path: {world}/data.jsonl}", "data and mixture: both"),
    ("mixture=null", "data: missing; give data=…, or a mixture"),
    ("mixture.ratio={long: 1}", "ratio: short has no place in it"),
    ("mixture.max_completion_length=1", "mixture.sources.long: each of its 8 rows is longer than 1 tokens"),
    ("mixture.sources.long.path={world}/none.jsonl", "mixture: .*none.jsonl")])
def test_a_mixture_that_cannot_be_dealt_is_told_before_anything_is_written(world, chains, tmp_path, change, message):
    with pytest.raises((ConfigError, DataError), match=message):
        tiny.go(mixed(world, chains, tmp_path / "run", change))
    assert not (tmp_path / "run").exists()
