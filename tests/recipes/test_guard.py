"""A self-teacher that is shown a wrong hint teaches its student to be wrong; the guard halts it in time."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.recipes import tiny
from tinyr2.core.types import Message
from tinyr2.models.load import save_model
from tinyr2.tokens.build import train_tokenizer
from tinyr2.tokens.chat import render_example

DIGITS = "0123456789"
# What the teacher reads is the student's digits and one more, so it answers that one: a wrong answer, surely given.
WRONG = "teacher.privilege={shows: [hint], labels: {hint: ''}, template: '{prompt}{knowledge}'}"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A student that names the last of up to three digits, always rightly; problems with a hint that is wrong."""
    folder = tmp_path_factory.mktemp("guard")
    tiny.make_world(folder)
    rows = [{"prompt": f"{i:02d}", "answer": f"{i % 10}", "hint": f"{(i + 1 + i // 10 % 9) % 10}"} for i in range(100)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "right.py").write_text(
        "def right(completions, answer, **kwargs):\n"
        "    return [float(turns[0]['content'] == a) for turns, a in zip(completions, answer)]\n")
    tokenizer = train_tokenizer(list(DIGITS), vocab_size=20, alphabet="corpus")
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=16,
        intermediate_size=64, vocab_size=len(tokenizer), max_position_embeddings=32, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None))
    draw, optimizer = random.Random(0), torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        length = draw.randint(1, 3)
        asked = ["".join(draw.choices(DIGITS, k=length)) for _ in range(32)]
        pairs = [render_example(tokenizer, (Message("user", s),), (Message("assistant", s[-1]),)) for s in asked]
        ids = torch.tensor([prompt + response for prompt, response in pairs])
        labels = ids.clone()
        labels[:, :len(pairs[0][0])] = -100
        model(ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_model(model, tokenizer, folder / "student")
    return folder


def go(world, out, *overrides):
    """The student teaches itself with the wrong hint in view, and is asked the same problems every four steps."""
    return tiny.go(tiny.settings(
        "distill", world, out, "teacher.path=null", "teacher.ema=0", WRONG,
        "rewards=[{file: {world}/right.py, function: right}]",
        "eval_data={path: {world}/data.jsonl}", "eval={max_completion_length: 2}", "eval_kl_problems=0",
        "compare_problems=0", "rollout.prompts_per_step=16", "rollout.max_completion_length=2", "train.max_steps=24",
        "train.learning_rate=3e-3", "train.eval_steps=4", "train.eval_on_start=true", "train.log_completions_steps=0",
        *overrides))


def solved(outcome):
    """Held-out answers that were right, by step."""
    return {row["step"]: row["eval_pass@1"] for row in outcome.rows if "eval_pass@1" in row}


def test_without_a_guard_the_loss_falls_and_the_student_unlearns(world, tmp_path):
    outcome = go(world, tmp_path / "run", "guard={max_drop: null}")
    found, kl = solved(outcome), [row["kl"] for row in outcome.rows if "kl" in row]
    assert outcome.result["ending"] == "finished" and (outcome.folder / "final").is_dir()
    assert found[0] > 0.95 and found[24] < 0.3
    assert kl[-1] < 0.5 * kl[0]  # the loss tells of nothing but success


def test_the_guard_that_stands_by_itself_halts_the_run_and_the_best_model_is_kept(world, tmp_path):
    outcome = go(world, tmp_path / "run", "train.save_steps=1")
    found = solved(outcome)
    assert outcome.result["ending"] == "halted" and outcome.result["step"] in (4, 8)
    assert found[0] > 0.95 and found[outcome.result["step"]] < found[0] - 0.1
    assert not (outcome.folder / "final").exists()  # what it would hold is the worse model
    told = [json.loads(line) for line in (outcome.folder / "events.jsonl").read_text().splitlines()]
    (drop,) = [e for e in told if e.get("name") == "held_out_drop"]
    assert drop["level"] == "critical" and drop["stop"] and drop["step"] == outcome.result["step"]
    assert "below its best, 1 at step 0" in drop["evidence"]
    assert "the best model so far is in best/, take that one" in drop["action"]
    assert "CRITICAL held_out_drop" in outcome.said


def test_a_guarded_run_that_keeps_its_knowledge_comes_to_its_end(world, tmp_path):
    outcome = go(world, tmp_path / "run", "teacher.privilege={shows: [answer], labels: {answer: ''}, "
                 "template: '{prompt}{knowledge}'}", "train.learning_rate=1e-4")
    assert outcome.result["ending"] == "finished" and min(solved(outcome).values()) > 0.9


def test_the_kl_to_the_start_holds_the_student_where_it_was(world, tmp_path):
    outcome = go(world, tmp_path / "run", "guard={kl_to_start: 5.0}")
    found = solved(outcome)
    assert outcome.result["ending"] == "finished" and min(found.values()) > found[0] - 0.1
    kl = [row["teacher/start/kl"] for row in outcome.rows if "teacher/start/kl" in row]
    assert kl[0] == 0.0 and kl[-1] > 1e-6


def test_no_folder_is_called_best_that_is_worse_than_the_start(world, tmp_path):
    outcome = go(world, tmp_path / "run", "train.save_steps=1")
    kept, start = (load_file(f / "model.safetensors") for f in (outcome.folder / "best", world / "student"))
    assert all(torch.equal(kept[n], start[n]) for n in start)
