"""The quickstart without running it: sizes, data, budgets and the config of each stage."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM

from tests.recipes import tiny
from tinyr2.core.errors import RunError
from tinyr2.data.tasks import SignedSums, Sum
from tinyr2.models.load import ModelConfig, count_parameters, load_model
from tinyr2.recipes import quickstart as q
from tinyr2.recipes.checks import check_training
from tinyr2.recipes.distill import read_setup as read_distill
from tinyr2.recipes.distill_config import DistillConfig
from tinyr2.recipes.sft import read_setup as read_sft
from tinyr2.tokens.chat import render_example

PLAN = q.Plan(teacher=5, cold=4, opd=3)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Problems, tokenizer and the two models with random weights, as every quickstart begins."""
    out = tmp_path_factory.mktemp("quickstart")
    with tiny.torch_as_it_was():
        q.prepare(out, 0, q.LEVEL)
    return out


def rows(out: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (out / "data" / f"{name}.jsonl").read_text().splitlines()]


def canonical(row: dict) -> tuple[int, ...]:
    """Equal for one problem in any order of its operands, by a reading of the question alone."""
    return tuple(sorted(int(t) for t in re.findall(r"[+-]?\d+", row["prompt"][0]["content"])))


# --- budgets


def test_a_plan_grows_with_the_minutes_and_never_vanishes():
    assert q.Plan().scaled(q.BASE_MINUTES) == q.Plan()
    assert q.Plan(teacher=100, cold=30, opd=11).scaled(1.5) == q.Plan(teacher=50, cold=15, opd=6)
    assert q.Plan(teacher=100, cold=30, opd=11).scaled(6) == q.Plan(teacher=200, cold=60, opd=22)
    assert q.Plan().scaled(0.001) == q.Plan(teacher=2, cold=2, opd=2)


def test_sft_gets_the_steps_that_fit_in_the_seconds_at_the_rate_of_the_cold_start(tmp_path):
    (tmp_path / "student_cold").mkdir()
    clocks = [{"step": i + 1, "step_s": s, "eval_s": 7.0} for i, s in enumerate((9.0, 0.02, 0.02, 0.021, 0.019))]
    (tmp_path / "student_cold/timing.jsonl").write_text("".join(json.dumps(c) + "\n" for c in clocks))
    assert q._equal_steps(tmp_path, 10.0) == 500  # the first step's start-up does not count, nor does evaluation
    assert q._equal_steps(tmp_path, 0.001) == 8


# --- data and sizes


def test_the_student_has_at_most_an_eighteenth_of_the_teachers_parameters_however_counted(prepared):
    (teacher, teacher_inner), (student, student_inner) = (
        count_parameters(load_model(ModelConfig(path=str(prepared / "init" / name)), torch.device("cpu")))
        for name in ("teacher", "student"))
    assert teacher / student >= 18
    assert teacher_inner / student_inner >= 18


def test_no_problem_stands_on_two_sides(prepared):
    train, validation, held_out = ([canonical(row) for row in rows(prepared, name)]
                                   for name in ("problems", "validation", "held_out"))
    assert (len(train), len(validation), len(held_out)) == (30_000, q.VALIDATION, q.HELD_OUT)
    assert q.HELD_OUT >= 1024
    for part in (train, validation, held_out):
        assert len(set(part)) == len(part)
    assert not set(train) & set(held_out)
    assert not set(train) & set(validation)
    assert not set(validation) & set(held_out)


def test_only_the_teacher_has_all_solutions_and_the_student_a_few_of_them(prepared):
    problems, solved, few = (rows(prepared, name) for name in ("problems", "teacher_solutions", "student_solutions"))
    assert [r["prompt"] for r in solved] == [r["prompt"] for r in problems]
    assert few == solved[:q.SOLUTIONS] and len(few) < len(solved) / 30
    for name in ("problems", "validation", "held_out"):
        assert {tuple(r) for r in rows(prepared, name)} == {("prompt", "answer")}


def test_answers_and_solutions_are_right(prepared):
    for row in rows(prepared, "teacher_solutions")[:300] + rows(prepared, "held_out")[:300]:
        terms = tuple(int(t) for t in re.findall(r"[+-]?\d+", row["prompt"][0]["content"]))
        assert row["answer"] == str(sum(terms))
        if "completion" in row:
            assert row["completion"][0]["content"] == Sum(terms).solution()
            assert row["completion"][0]["content"].endswith(f"####{row['answer']}")


def test_another_seed_gives_other_problems_and_weights_and_the_same_split(prepared, tmp_path):
    q.prepare(tmp_path, 1, q.LEVEL)
    assert rows(tmp_path, "problems") != rows(prepared, "problems")
    weights = [(out / "init/student/model.safetensors").read_bytes() for out in (prepared, tmp_path)]
    assert weights[0] != weights[1]
    seen = {canonical(row) for row in rows(prepared, "problems")}
    assert not seen & {canonical(row) for row in rows(tmp_path, "held_out")}


@pytest.mark.parametrize("level", [q.LEVEL, SignedSums(terms=3, digits=3)], ids=str)
def test_every_solution_fits_where_answers_are_cut_and_in_the_context(level, prepared, tmp_path):
    from tinyr2.data.tasks import signed_sums

    tokenizer = AutoTokenizer.from_pretrained(prepared / "init/student")
    limit = q.opd_config(tmp_path, 0, PLAN, level).rollout.max_completion_length
    assert limit == q.sft_config(tmp_path, 0, 8, level).eval.max_completion_length
    sizes = [[len(part) for part in render_example(tokenizer, p.messages, p.completion)]
             for p in signed_sums(level, "train", 500, 0)]
    assert max(response for _, response in sizes) <= limit
    assert max(prompt for prompt, _ in sizes) + limit <= 256


def test_tokenizer_and_models_belong_together_and_every_digit_is_a_token(prepared):
    tokenizer = AutoTokenizer.from_pretrained(prepared / "init/student")
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(prepared / "init/teacher").get_vocab()
    assert len(tokenizer.encode("8790")) == 4
    for name, shape in (("teacher", q.TEACHER), ("student", q.STUDENT)):
        model = load_model(ModelConfig(path=str(prepared / "init" / name)), torch.device("cpu"))
        assert isinstance(model, Qwen3ForCausalLM)
        assert (model.config.vocab_size, model.config.hidden_size) == (len(tokenizer), shape.hidden)
        assert model.config.eos_token_id == tokenizer.eos_token_id


# --- stages


def stages(out: Path) -> dict:
    return {"teacher": q.teacher_config(out, 3, PLAN), "student_cold": q.cold_config(out, 3, PLAN),
            "student_opd": q.opd_config(out, 3, PLAN, q.LEVEL), "student_sft": q.sft_config(out, 3, 16, q.LEVEL)}


def test_every_stage_writes_where_the_next_one_reads_with_its_own_steps_and_the_seed(tmp_path):
    found = stages(tmp_path)
    assert {name: config.output_dir for name, config in found.items()} == {n: str(tmp_path / n) for n in found}
    assert [config.train.max_steps for config in found.values()] == [5, 4, 3, 16]
    assert {config.train.seed for config in found.values()} == {3}
    opd, sft = found["student_opd"], found["student_sft"]
    assert isinstance(opd, DistillConfig)
    assert opd.teacher.path == str(tmp_path / "teacher/final")
    assert opd.student.path == sft.model.path == str(tmp_path / "student_cold/final")


def test_the_student_distills_on_policy_without_solutions_and_the_other_reads_the_cold_starts(tmp_path):
    found = stages(tmp_path)
    opd, sft, cold = found["student_opd"], found["student_sft"], found["student_cold"]
    assert opd.rollout.lmbda == 1.0 and opd.loss.level == "token"
    assert opd.data.path == str(tmp_path / "data/problems.jsonl")
    assert sft.data == cold.data and sft.data.path == str(tmp_path / "data/student_solutions.jsonl")
    assert (sft.examples_per_step, sft.train.learning_rate) == (cold.examples_per_step, cold.train.learning_rate)
    assert sft.train.load_best_model_at_end and sft.eval_data.path == str(tmp_path / "data/validation.jsonl")
    assert sft.train.eval_steps == 2


def test_nothing_is_wrong_with_any_stage(prepared):
    for name in ("teacher", "student_cold"):
        config = stages(prepared)[name]
        assert [f.line for f in check_training(read_sft(config)) if f.level != "ok"] == []
    # as if the stages before had finished
    opd = stages(prepared)["student_opd"]
    paths = {"student": {"path": str(prepared / "init/student")}, "teacher": {"path": str(prepared / "init/teacher")}}
    opd = DistillConfig.model_validate(opd.model_dump() | paths)
    assert [f.line for f in check_training(read_distill(opd)) if f.level != "ok"] == []


# --- the folder and the table


def test_an_earlier_quickstart_is_replaced_when_asked_for_and_nothing_else_ever_is(tmp_path):
    q._claim(tmp_path / "new", overwrite=False)
    assert (tmp_path / "new" / q.MARKER).read_text() == "{}\n"
    (tmp_path / "new/data").mkdir()
    with pytest.raises(RunError, match="already holds something; --overwrite replaces an earlier quickstart"):
        q._claim(tmp_path / "new", overwrite=False)
    q._claim(tmp_path / "new", overwrite=True)
    assert {p.name for p in (tmp_path / "new").iterdir()} == {q.MARKER}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("kept")
    for name in ("mine", "file"):
        with pytest.raises(RunError, match="not a quickstart folder"):
            q._claim(tmp_path / name, overwrite=True)
    assert (tmp_path / "mine/thesis.tex").exists() and (tmp_path / "file").read_text() == "kept"


def test_a_row_of_the_table_has_what_was_promised():
    row = {"params": 1, "params_without_embeddings": 1, "pass_at_1": 0.5, "low": 0.4, "high": 0.6, "n": 1024,
           "tokens_per_s": 9, "peak_mib": 10, "seconds": 2.5, "steps": 8}
    assert list(q._shown(row)) == ["params", "pass_at_1", "low", "high", "n", "tokens_per_s", "peak_mib", "seconds"]
