"""Data distillation: what is kept of a teacher's answers, who reads them, and that a kill changes nothing."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from tests.recipes import killing, tiny
from tinyr2.core.config import Config
from tinyr2.core.errors import DataError, RunError
from tinyr2.core.types import Message, Rollout
from tinyr2.data.problems import DataConfig, load_problems
from tinyr2.eval.suite import EvalConfig
from tinyr2.models.load import ModelConfig, save_model
from tinyr2.recipes import answers as room
from tinyr2.recipes import setup
from tinyr2.recipes.data_distillation import DataDistillationConfig, Writer, distill_data, local_writer
from tinyr2.recipes.inputs import Inputs
from tinyr2.recipes.sft import FineTuning
from tinyr2.report.console import Console
from tinyr2.rewards.grade import RewardConfig, grade, load_rewards
from tinyr2.tokens.build import train_tokenizer
from tinyr2.train.loop import TrainConfig

CPU = torch.device("cpu")


class Settings(Config):
    """The part of a run's config that data distillation reads."""

    student: setup.StudentConfig
    data: DataConfig
    eval_data: DataConfig | None = None
    rewards: tuple[RewardConfig, ...] = ()
    data_distillation: DataDistillationConfig
    train: TrainConfig
    eval: EvalConfig = EvalConfig()
    device: str = "cpu"
    output_dir: str = "o"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A student, and a teacher with a tokenizer of its own; a reward that likes even and long texts."""
    folder = tmp_path_factory.mktemp("world")
    killing.make_world(folder)
    tokenizer = train_tokenizer([f"{i}+{i + 1}-{i + 2}=#" for i in range(99)], vocab_size=24, alphabet="corpus")
    torch.manual_seed(5)
    save_model(Qwen3ForCausalLM(Qwen3Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
        intermediate_size=32, vocab_size=len(tokenizer), max_position_embeddings=128, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None)),
        tokenizer, folder / "teacher")
    (folder / "rewards.py").write_text(
        "def even(completions, **kwargs):\n    texts = [turns[0]['content'] for turns in completions]\n"
        "    return [len(t) / 100 + float(len(t) % 2 == 0) for t in texts]\n")
    return folder


def settings(world: Path, **choices) -> Settings:
    train = choices.pop("train", {})
    rewards = () if choices.pop("blind", False) else (
        RewardConfig(file=str(world / "rewards.py"), function="even"),)
    told = {"num_generations": 4, "max_completion_length": 24, "problems_per_chunk": 5, "temperature": 1.0,
            "examples_per_step": 4, "max_tokens": 30}
    return Settings(student={"path": str(world / "student")}, data={"path": str(world / "data.jsonl"), "limit": 14},
                    rewards=rewards, data_distillation=told | choices,
                    train={"max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, "deterministic": True,
                           "num_threads": 1} | train)


def inputs_of(told: Settings) -> Inputs:
    tokenizer = AutoTokenizer.from_pretrained(told.student.path)
    return Inputs(tokenizer, load_problems(told.data), [], load_rewards(told.rewards), len(tokenizer))


def writer_of(world: Path, told: Settings) -> Writer:
    return local_writer(ModelConfig(path=str(world / "teacher")), told.data_distillation, told.train.seed, CPU)


def go(told: Settings, out: Path, writer: Writer, said: io.StringIO | None = None, **options) -> dict:
    told = told.model_copy(update={"output_dir": str(out)})
    with tiny.torch_as_it_was():
        return distill_data(told, inputs_of(told), writer, Console(plain=True, stream=said or io.StringIO()), **options)


@pytest.fixture(scope="module")
def done(world, tmp_path_factory) -> tuple[dict, Path]:
    told, out = settings(world, prefer="best"), tmp_path_factory.mktemp("runs") / "plain"
    return go(told, out, writer_of(world, told)), out


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "data.jsonl").read_text().splitlines()]


def text_of(row: dict) -> str:
    return row["completion"][0]["content"]


# --- what is kept


def test_the_best_right_answer_of_each_problem_is_kept_and_no_wrong_one(world, done):
    told, (result, out) = settings(world), done
    write, problems = writer_of(world, told).open(), load_problems(told.data)
    best = {}
    for i in range(0, 14, 5):
        for r in grade(write(problems[i:i + 5]), load_rewards(told.rewards)):
            if r.finish == "stop" and r.text.strip() and r.reward >= 1.0:
                before = best.get(r.problem.messages[0].content)
                best[r.problem.messages[0].content] = max(before or r, r, key=lambda x: x.reward)
    found = {row["prompt"][0]["content"]: text_of(row) for row in rows(out)}
    assert 3 < len(found) < 14  # some problems have no right answer
    assert found == {prompt: r.text for prompt, r in best.items()}
    assert result["written"]["kept"] == result["written"]["solved"] == len(found)


def test_the_figures_are_those_of_what_was_written(done):
    written = json.loads((done[1] / "written.json").read_text())
    assert written == done[0]["written"]
    assert (written["problems"], written["answers"], written["undecided"]) == (14, 56, 0)
    assert written["kept_share"] == written["kept"] / 56 and written["right_share"] == written["right"] / 56
    assert 56 < written["num_generated_tokens"] <= 56 * 24
    events = [json.loads(line) for line in (done[1] / "events.jsonl").read_text().splitlines()]
    assert [e["kept"] for e in events if e["event"] == "written"] == [written["kept"]]


def test_the_student_learns_the_teachers_text_in_its_own_tokens(world, done):
    result, out = done
    assert result["ending"] == "finished" and (out / "final/model.safetensors").is_file()
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == [1, 2, 3, 4]
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    own = AutoTokenizer.from_pretrained(world / "student")
    teacher = AutoTokenizer.from_pretrained(world / "teacher")
    assert own.get_vocab() != teacher.get_vocab()
    assert AutoTokenizer.from_pretrained(out / "final").get_vocab() == own.get_vocab()


def said(texts: list[str | None]) -> Writer:
    """A server that knows text alone: the same answers to every problem; None: it failed."""
    def write(problems):
        return [Rollout(problem=p, group=g, sample=i, author="teacher", prompt_ids=(), response_ids=(), text=text or "",
                        finish="stop", error=None if text is not None else "timeout")
                for g, p in enumerate(problems) for i, text in enumerate(texts)]
    return Writer(name="a server", facts={"teacher": "there"}, open=lambda: write)


def test_what_the_student_cannot_read_whole_is_dropped_and_counted_and_never_cut(world, tmp_path):
    told = settings(world, prefer="longest", keep=5, max_tokens=None)
    # 64 tokens are all that the student reads, and "1" is one of its tokens
    result = go(told, tmp_path / "long", said(["11" * 40, "11" * 10, "1", "11"]))
    assert {text_of(row) for row in rows(tmp_path / "long")} == {"11" * 10, "11"}
    assert (result["written"]["too_long"], result["written"]["right"]) == (14, 42)
    result = go(told.model_copy(update={"data_distillation": told.data_distillation.model_copy(
        update={"max_tokens": 20})}), tmp_path / "short", said(["11" * 40, "11" * 10, "1", "11"]))
    assert {text_of(row) for row in rows(tmp_path / "short")} == {"11"}  # 20 tokens and their end are 21
    assert result["written"]["too_long"] == 28


def test_a_failed_answer_is_no_answer_and_without_rewards_all_whole_ones_are_kept(world, tmp_path):
    note = io.StringIO()
    result = go(settings(world, blind=True, keep=9), tmp_path / "run", said(["1", None, "22", " "]), note)
    assert {text_of(row) for row in rows(tmp_path / "run")} == {"1", "22"}
    assert result["written"]["undecided"] == 14 and result["written"]["right_share"] is None
    assert "no rewards" in note.getvalue()


def test_where_nothing_can_be_kept_it_says_who_wrote(world, tmp_path):
    with pytest.raises(DataError, match="a server: among 28 answers to 14 problems no answer was right"):
        go(settings(world), tmp_path / "run", said(["1", "123"]))


# --- resuming


def same(one: Path, two: Path) -> bool:
    return all((one / name).read_bytes() == (two / name).read_bytes()
               for name in ("data.jsonl", "metrics.jsonl", "final/model.safetensors"))


class Killed(BaseException):
    """A kill."""


def test_a_kill_between_chunks_changes_neither_data_nor_student(world, done, tmp_path, monkeypatch):
    told, calls, chunk = settings(world, prefer="best"), [], room._chunk

    def counted(run, work, write, numbered):
        calls.append(numbered[0])
        if calls == [0, 1]:
            raise Killed
        return chunk(run, work, write, numbered)

    monkeypatch.setattr(room, "_chunk", counted)
    with pytest.raises(Killed):
        go(told, tmp_path / "run", writer_of(world, told))
    assert not (tmp_path / "run/data.jsonl").exists()
    go(told, tmp_path / "run", writer_of(world, told), resume=True)
    assert calls == [0, 1, 1, 2] and same(tmp_path / "run", done[1])


def test_a_kill_while_the_student_learns_changes_nothing_and_loads_no_teacher(world, done, tmp_path, monkeypatch):
    told, steps, plain = settings(world, prefer="best"), [], FineTuning.step

    def stopping(self, t):
        steps.append(t)
        if steps == [0, 1, 2, 3]:
            raise Killed
        return plain(self, t)

    monkeypatch.setattr(FineTuning, "step", stopping)
    with pytest.raises(Killed):
        go(told, tmp_path / "run", writer_of(world, told))
    unloaded = replace(writer_of(world, told), open=lambda: pytest.fail("the teacher was loaded again"))
    result = go(told, tmp_path / "run", unloaded, resume=True)
    assert steps == [0, 1, 2, 3, 2, 3] and same(tmp_path / "run", done[1])
    assert result["written"] == done[0]["written"] | {"seconds": result["written"]["seconds"]}


def test_what_another_teacher_wrote_is_not_gone_on_with(world, tmp_path):
    go(settings(world), tmp_path / "run", said(["11"]))
    with pytest.raises(RunError, match="begun with another teacher"):
        go(settings(world), tmp_path / "run", replace(said(["11"]), facts={"teacher": "elsewhere"}), resume=True)


def test_messages_of_kept_rows_are_the_problems_own(world, done):
    asked = {p.messages for p in load_problems(settings(world).data)}
    kept = load_problems(DataConfig(path=str(done[1] / "data.jsonl")))
    assert {p.messages for p in kept} <= asked
    assert all(p.answer is not None and isinstance(p.completion[0], Message) for p in kept)
