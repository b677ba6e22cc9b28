"""What a distillation run asks of its teachers and some cannot do, as the checks before a run tell it: no weights."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.recipes import taught, tiny
from tests.recipes.taught import EVALUATED, also, run, teachers
from tinyr2.core.errors import ConfigError, RunError
from tinyr2.data.retrieval import Retriever
from tinyr2.recipes.checks import check_training
from tinyr2.recipes.distill import read_setup
from tinyr2.recipes.findings import Finding, Reader
from tinyr2.recipes.hiring import retriever_of
from tinyr2.teachers.privileged import PrivilegeConfig
from tinyr2.tokens.chat import render_prompt
from tinyr2.train.guard import GuardConfig

HERE, FOREIGN = "{path: {world}/teacher}", "{path: {world}/other}"
OTHER = "teacher.path={world}/other"
PASSAGES = "teacher.privilege={shows: [passages], corpus: %s/notes.txt, passages: 1%s}"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return taught.make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def look(world, tmp_path):
    """The findings that are no good news, by name."""

    def found(*changes: str) -> dict[str, Finding]:
        setup = read_setup(tiny.settings("distill", world, tmp_path / "run", *changes))
        return {f.name: f for f in check_training(setup) if f.level != "ok"}

    return found


def copied(folder: Path, to: Path, name: str, **changes) -> Path:
    """A model folder with other values in one of its JSON files."""
    to = Path(shutil.copytree(folder, to))
    told = json.loads((to / name).read_text()) | changes
    (to / name).write_text(json.dumps({k: v for k, v in told.items() if v is not None}))
    return to


def problems(world: Path, tmp_path: Path):
    return read_setup(tiny.settings("distill", world, tmp_path / "read")).parts[0].problems


# --- tasks


def test_a_task_that_no_problem_has_is_a_fault_with_the_nearest(look):
    fault = look(*teachers(also(HERE, "tasks: [dato, data]"), "{ema: 0}"))["teacher0.tasks"]
    assert fault.level == "fault" and "'dato'" in fault.what
    assert fault.cure == "did you mean 'data'? the tasks there: data"


def test_problems_that_no_teacher_judges_are_counted(world, look, tmp_path):
    rows = [json.loads(line) for line in (world / "data.jsonl").read_text().splitlines()]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r | {"task": "abc"[i % 3]}) + "\n"
                                              for i, r in enumerate(rows)))
    data = f"data.path={tmp_path}/d.jsonl"
    warned = look(data, *teachers(also(HERE, "tasks: [a]"), also(FOREIGN, "tasks: [c]")))["teachers.tasks"]
    assert warned.level == "warn" and warned.what.startswith("no teacher judges 13 of 40 problems (b)")
    assert "teachers.tasks" not in look(data, *teachers(also(HERE, "tasks: [a]"), FOREIGN))
    assert "teachers.tasks" not in look(data, *teachers(also(HERE, "tasks: [a, b]"), also(FOREIGN, "tasks: [c]")))


# --- whether it fits


@pytest.mark.parametrize("more", [(), ("teacher.privilege={shows: [hint], labels: {hint: 'see what stands here: '}}",)])
def test_the_prompts_that_the_teacher_reads_are_measured_in_its_own_tokens(more, world, look, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(world / "other")
    sizes = []
    for p in problems(world, tmp_path):
        last = p.messages[-1]
        shown = f"{last.content}\n\nsee what stands here: {p.columns['hint']}" if more else last.content
        sizes.append(len(render_prompt(tokenizer, (*p.messages[:-1], replace(last, content=shown)))))
    short = copied(world / "other", tmp_path / "t", "config.json", max_position_embeddings=max(sizes))
    found = look(f"teacher.path={short}", *more)
    over = sum(n == max(sizes) for n in sizes)
    assert found["teacher.prompts"].level == "fault"
    assert found["teacher.prompts"].what.startswith(f"{over} of 40 prompts, as the teacher reads them, leave no room")
    assert f"the longest has {max(sizes)}" in found["teacher.prompts"].what
    wide = copied(world / "other", tmp_path / "w", "config.json", max_position_embeddings=max(sizes) + 11)
    found = look(f"teacher.path={wide}", *more)
    assert "teacher.prompts" not in found and found["teacher.room"].level == "warn"
    assert found["teacher.room"].what.startswith(f"{over} of 40 prompts")
    assert "rollout.max_completion_length (12)" in found["teacher.room"].what
    assert found["teacher.room"].cure.startswith("set rollout.max_completion_length to 11 or less")
    assert not look(f"teacher.path={wide}", *more, "rollout.max_completion_length=11").keys() & {
        "teacher.prompts", "teacher.room"}


def test_a_student_that_teaches_itself_has_its_own_context(look):
    found = look("teacher={ema: 0, privilege: {shows: [answer], labels: {answer: '" + 70 * "1" + "'}}}",
                 *EVALUATED, "guard={max_drop: null}")
    assert found["teacher.prompts"].what.startswith("40 of 40 ") and "(64 tokens)" in found["teacher.prompts"].what


def test_passages_are_measured_too(look, tmp_path):
    (tmp_path / "notes.txt").write_text(" ".join(map(str, range(100))))
    assert look(OTHER, PASSAGES % (tmp_path, ""))["teacher.prompts"].level == "fault"
    (tmp_path / "notes.txt").write_text("1 2 3 4 5 6 7 8 9")
    assert "teacher.prompts" not in look(OTHER, PASSAGES % (tmp_path, ""))


def test_a_teacher_without_an_end_would_teach_never_to_stop(world, look, tmp_path):
    folder = copied(world / "other", tmp_path / "t", "tokenizer_config.json", eos_token=None, pad_token=None)
    for file in folder.glob("special_tokens_map*"):
        file.unlink()
    template = "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '.' }}{% endfor %}{{ '[assistant]' }}"
    (folder / "chat_template.jinja").write_text(template)
    fault = look(f"teacher.path={folder}")["teacher.tokenizer"]
    assert fault.level == "fault" and fault.what.endswith("would be taught never to stop")
    assert fault.cure == "set eos_token in its tokenizer_config.json"


# --- settings that cannot be, or would change nothing


def server(name: str, more: str) -> str:
    return f"{{url: 'http://127.0.0.1:9', engine: vllm, model: m, tokenizer: {{world}}/{name}{more}}}"


@pytest.mark.parametrize(("changes", "name", "message"), [
    (["teacher.signal=chunk"], "teacher.signal", "chunk would be ignored: the teacher has the student's own vocab"),
    (["teacher.path=null", "teacher.ema=0", "teacher.signal=mapped"], "teacher.signal", "mapped would be ignored"),
    (["teacher.roles={think_open: [a, b]}"], "teacher.roles", "they would be ignored"),
    (["teacher.tail=none"], "teacher.tail", "none would be ignored"),
    ([f"teacher={{server: {server('student', '')}, tail: none}}"], "teacher.tail", "none would be ignored"),
    ([f"teacher={{server: {server('other', ', top_k: 3')}}}"], "teacher.tokenizer",
     "server.top_k lists tokens of that vocabulary"),
    ([PASSAGES % ("{world}", ", embedder: {world}/none")], "teacher.privilege.embedder", "{world}/none"),
])
def test_what_would_be_ignored_or_cannot_be_is_a_fault_before_any_server_is_asked(changes, name, message, world, look):
    (world / "notes.txt").write_text("1 2 3")
    fault = look(*changes)[name]
    assert fault.level == "fault" and fault.cure and message.replace("{world}", str(world)) in fault.what


@pytest.mark.parametrize("changes", [
    [OTHER, "teacher.signal=chunk", "teacher.roles={think_open: [a, b]}"],
    [f"teacher={{server: {server('student', ', top_k: 3')}, tail: none}}"],
])
def test_the_same_settings_where_they_count_are_none(changes, look):
    assert all(f.level == "warn" for f in look(*changes).values())


@pytest.mark.parametrize(("changes", "message"), [
    (["teacher.name=a/b"], "'a/b' becomes a file's name; use letters"),
    (["teacher.name=.a"], "a letter or digit first"),
    (["teacher.name='a\n'"], "becomes a file's name"),
    (["rollout.lmbda=0", "kd={by: entropy}", "teacher.tasks=[data]"], "kd.by: entropy asks how sure one teacher is of"),
    (["rollout.lmbda=0", "kd={by: entropy}", "teacher.prompt=own"], "take kd.by: fixed or linear"),
    (["rollout.lmbda=0", "kd={by: entropy}", "teacher.privilege={shows: [hint]}"], "leave out tasks, privilege"),
    (["hidden={}", "teacher.tasks=[data]"], "without privilege, tasks or prompt: own"),
    (["hidden={}", "teacher.prompt=own"], "without privilege, tasks or prompt: own"),
    (["teacher.privilege={shows: [hint], embedder: x}"], "show passages of a corpus, or leave embedder out"),
    ([PASSAGES % ("x", ", dense_weight: 0.3")], "give an embedder, or leave it out"),
])
def test_choices_that_contradict_each_other_are_told_with_a_cure(changes, message, world, tmp_path):
    with pytest.raises(ConfigError) as caught:
        tiny.settings("distill", world, tmp_path / "run", *changes)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["a", "4-bit_b.v2", None])
def test_a_name_may_be_what_a_file_is_called(name, world, tmp_path):
    (one,) = tiny.settings("distill", world, tmp_path, f"teacher.name={json.dumps(name)}").staff
    assert one.name == (name or "teacher")


def test_a_privileged_teacher_in_the_students_folder_is_guarded(world, tmp_path):
    hint = "teacher.privilege={shows: [hint]}"
    for path in ("student", "teacher/../student"):
        assert tiny.settings("distill", world, tmp_path, hint, f"teacher.path={world}/{path}").guarding == GuardConfig()
        assert tiny.settings("distill", world, tmp_path, f"teacher.path={world}/{path}").guarding is None
    assert tiny.settings("distill", world, tmp_path, hint).guarding is None


def test_teachers_are_compared_at_the_temperature_that_the_way_names(world, tmp_path):
    assert tiny.settings("distill", world, tmp_path, "rollout.temperature=0.7").teaching_temperature == 0.7
    soft = tiny.settings("distill", world, tmp_path, "rollout.lmbda=0", "kd={temperature: 3.0}")
    assert soft.teaching_temperature == 3.0 != soft.rollout.temperature


# --- what a run makes of them


def test_who_cannot_be_compared_is_named_and_all_others_answer_greedily(world, tmp_path, monkeypatch):
    from tinyr2.recipes import distill as recipe
    asked, evaluate = [], recipe.evaluate
    monkeypatch.setattr(recipe, "evaluate", lambda policy, problems, rewards, config: (
        asked.append(config.temperature), evaluate(policy, problems, rewards, config))[1])
    outcome = run(world, tmp_path / "run", *teachers(
        HERE, also(FOREIGN, "name: told, privilege: {shows: [hint]}"), "{ema: 1, name: past}"), *EVALUATED,
        "compare_problems=2", "eval.temperature=1.0", "train.max_steps=1", "eval_kl_problems=0",
        "guard={max_drop: null}")
    assert "teacher0 solves" in outcome.said and "told solves" not in outcome.said
    assert ("not compared with the student before the first step: told (it judges by what the problems do not say), "
            "past (the student itself)") in outcome.said
    assert asked[:2] == [0.0, 0.0]


def test_data_distillation_says_that_it_compares_nobody(world, tmp_path):
    outcome = run(world, tmp_path / "run", "method=data", *EVALUATED, "compare_problems=2",
                  "rewards=[{file: {world}/written.py, function: short}]", "train.max_steps=1",
                  "data_distillation={num_generations: 2, max_completion_length: 8, examples_per_step: 4}")
    assert "teacher is not compared with the student before the first step" in outcome.said


def test_a_run_does_not_go_on_with_another_template_or_another_corpus(world, tmp_path):
    shutil.copytree(world / "other", tmp_path / "t")
    (tmp_path / "notes.txt").write_text("1 2 3 4 5 6 7 8 9")
    more = (f"teacher.path={tmp_path}/t", PASSAGES % (tmp_path, ""), "train.max_steps=1")
    run(world, tmp_path / "run", *more)
    run(world, tmp_path / "run", *more, resume=True)
    (tmp_path / "notes.txt").write_text("1 2 3 4 5 6 7 8")
    with pytest.raises(RunError, match="corpora"):
        run(world, tmp_path / "run", *more, resume=True)
    (tmp_path / "notes.txt").write_text("1 2 3 4 5 6 7 8 9")
    (tmp_path / "t/chat_template.jinja").write_text(taught.TEMPLATE.replace("'['", "'<'"))
    with pytest.raises(RunError, match="teacher_tokenizers"):
        run(world, tmp_path / "run", *more, resume=True)


def test_an_embedder_finds_what_shares_no_word(world, tmp_path):
    (tmp_path / "notes.txt").write_text("\n\n".join(f"{c}= {c}+{c}" for c in "abcdefgh"))
    shares = {}
    for name, embedder in (("words", ""), ("dense", ", embedder: {world}/other, dense_weight: 1.0")):
        outcome = run(world, tmp_path / name, OTHER, PASSAGES % (tmp_path, embedder), "train.max_steps=1")
        shares[name] = outcome.column("privilege/passages")
    assert shares == {"words": [0.0], "dense": [1.0]}


def test_one_question_is_looked_up_once(tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("one two\n\ntwo three")
    asked, texts = [], Retriever.texts
    monkeypatch.setattr(Retriever, "texts", lambda self, query, k: (asked.append(query), texts(self, query, k))[1])
    find = retriever_of(PrivilegeConfig(shows=("passages",), corpus=str(tmp_path / "notes.txt")))
    assert [list(find("three", 1)), list(find("three", 1)), list(find("one", 1))] == [["two three"]] * 2 + [["one two"]]
    assert asked == ["three", "one"]


def test_a_servers_tokenizer_needs_no_model_beside_it(world, tmp_path):
    AutoTokenizer.from_pretrained(world / "student").save_pretrained(tmp_path / "alone")
    reader = Reader()
    assert not (tmp_path / "alone/config.json").exists()
    found = reader.tokenizer("teacher", str(tmp_path / "alone"))
    assert found.get_vocab() == AutoTokenizer.from_pretrained(world / "student").get_vocab() and reader.faults == []
    assert reader.tokenizer("teacher", str(tmp_path / "none")) is None and "none" in reader.faults[0].line
