"""`tinyr2 distill`: teachers that cannot do what is asked are told apart with a cure, before anything is written."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.fake_server import FakeServer
from tests.recipes import taught, tiny
from tests.recipes.taught import DIGITS, EVALUATED, also, run, teachers
from tinyr2.core.errors import ConfigError, DataError, UserError

HERE = "{path: {world}/teacher}"
OTHER = "teacher.path={world}/other"
WRITES = ("loss.level=sequence", "loss.reward_loss=weighted_nll", "rollout.num_teacher_generations=1", DIGITS)


def server(engine: str, more: str = "") -> str:
    """A server that is not there."""
    where = f"url: 'http://127.0.0.1:9', engine: {engine}, model: m, tokenizer: {{world}}/student"
    return f"{{server: {{{where}}}{', ' * bool(more)}{more}}}"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return taught.make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize(("changes", "message"), [
    (["teacher=null"], "give either teacher, one, or teachers, a list"),
    ([f"teachers=[{HERE}]"], "give either teacher, one, or teachers, a list"),
    (teachers(also(HERE, "name: a"), "{ema: 0, name: a}"), "two teachers share a name (a, a); give each its own"),
    (teachers(HERE, "{ema: 0, name: teacher0}"), "two teachers share a name"),
    (["teacher={}"], "a teacher is a path, a server, "),
    (["teacher.ema=0"], ", not path and ema"),
    (["teacher.ema=1.5", "teacher.path=null"], "less than or equal to 1"),
    ([*teachers(HERE, server("openai")), "panel.combine=average"],
     "panel.combine: average needs whole distributions, which a server does not give; take sum"),
    ([*teachers(HERE, "{ema: 0}"), "panel.combine=product", "loss.estimator=sampled"],
     "it needs loss.estimator: full"),
    ([*teachers(HERE, "{ema: 0, tasks: [data]}"), "panel.combine=average"], "blends teachers of the same"),
    ([f"teacher={server('vllm')}", "rollout.temperature=0.7"],
     "gives prompt log-probs at temperature 1 only, and this run "),
    ([f"teacher={server('sglang')}", "rollout.temperature=0.7"], "set rollout.temperature=1.0"),
    ([f"teacher={server('vllm', 'signal: mapped')}"], "which a server does not give; take chunk or exact"),
    ([*teachers(HERE, "{ema: 0}"), *WRITES], "one teacher with a path writes; give exactly that"),
    (["kd={}"], "kd has hard labels, which only the data's completions give; set rollout.lmbda=0"),
    (["hidden={}", "teacher={ema: 0}"], "give one teacher with a path and without privilege"),
    (["method=data"], "method: data and data_distillation belong together"),
    (["teacher.privilege={shows: [answr]}"], "shows"),
    (["teacher.weight=-1"], "greater than or equal to 0"),
    (["teacher.weight=0"], "every teacher's weight is 0, so nobody teaches"),
    (["teacher.privilege={shows: [success]}", DIGITS], "set rollout.num_generations to 2 or more"),
    (["teacher.privilege={shows: [success]}", "rollout.num_generations=2"], "and give rewards that say what is right"),
    (["teacher.wieght=1"], "did you mean 'weight'"),
])
def test_choices_that_contradict_each_other_are_told_apart_with_a_cure(changes, message, world, tmp_path):
    with pytest.raises(ConfigError) as caught:
        tiny.settings("distill", world, tmp_path / "run", *changes)
    assert message in str(caught.value)


def copied(world, folder, template, name="other") -> str:
    """The teacher `name` with another chat template."""
    folder = Path(shutil.copytree(world / name, folder))
    for file in folder.glob("chat_template*"):
        file.unlink()
    told = json.loads((folder / "tokenizer_config.json").read_text())
    told.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return f"teacher.path={folder}"


REJECTS = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('a system turn is needed') }}{% endif %}"


@pytest.mark.parametrize(("name", "more"), [("other", ()), ("teacher", ("teacher.prompt=own",))])
@pytest.mark.parametrize(("template", "message"), [(None, "teacher.chat_template: "), (
    REJECTS, "teacher.chat_template: ")])
def test_a_teacher_whose_template_is_not_there_or_rejects_the_roles(name, more, template, message, world, tmp_path):
    with pytest.raises(ConfigError) as caught:
        run(world, tmp_path / "run", copied(world, tmp_path / "t", template, name), *more)
    said = str(caught.value)
    assert message in said and ";" in said
    assert ("a system turn is needed" in said) == (template is not None)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("changes", "message"), [
    (["teacher.privilege={shows: [hint], hint_column: none}"], "shows: hint: none of the 40 problems has one; name"),
    (["teacher={ema: 0, privilege: {shows: [answer]}}"], "guard.max_drop watches answers to held-out problems"),
    (["teacher={ema: 0, privilege: {shows: [answer]}}", *EVALUATED, "train.eval_steps=0"],
     "set train.eval_steps=1, or guard.max_drop=null"),
    ([f"teacher={server('vllm').replace('model: m', 'model: m, backoff: 0.001, max_backoff: 0.001')}"],
     "http://127.0.0.1:9"),
])
def test_what_a_teacher_lacks_is_told_before_anything_is_written(changes, message, world, tmp_path):
    with pytest.raises(UserError) as caught:
        run(world, tmp_path / "run", *changes)
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_vocabulary_that_differs_by_padding_alone_is_allowed_and_named(world, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(world / "student")
    taught.save(tokenizer, tmp_path / "padded", seed=8, vocab=len(tokenizer) + 8)
    outcome = run(world, tmp_path / "run", f"teacher.path={tmp_path}/padded")
    assert outcome.result["ending"] == "finished" and "teacher/teacher/kept" not in outcome.rows[0]
    from tinyr2.recipes.checks import check_training
    from tinyr2.recipes.distill import read_setup
    found = [f for f in check_training(read_setup(outcome.config)) if "vocabulary" in f.name]
    assert any(str(len(tokenizer) + 8) in f"{f.line}" and str(len(tokenizer)) in f.line for f in found)


def test_a_teacher_worse_than_the_student_is_told_with_both_numbers_before_the_first_step(world, tmp_path):
    (tmp_path / "rewards.py").write_text(  # the student is the only one whose texts are asked for first
        "from pathlib import Path\n\n\n"
        "def first(completions, **kwargs):\n"
        f"    seen = Path({str(tmp_path / 'seen')!r})\n"
        "    worth = float(seen.exists())\n"
        "    seen.touch()\n"
        "    return [worth for _ in completions]\n")
    outcome = run(world, tmp_path / "run", f"rewards=[{{file: {tmp_path}/rewards.py, function: first}}]",
                  "eval_data={path: {world}/data.jsonl, limit: 4}", "eval={max_completion_length: 6}",
                  "compare_problems=3", "eval_kl_problems=0")
    said = outcome.said
    assert "teacher solves 0.0% of 3 held-out problems, the student 100.0%" in said
    warned = said.index("warning: teacher solves 0.0% of the held-out problems, the student 100.0%")
    assert warned < said.index("loss")


def test_a_server_with_another_tokenizer_is_told_before_anything_is_written(world, tmp_path):
    with FakeServer(AutoTokenizer.from_pretrained(world / "other")) as one:
        told = f"{{url: '{one.url}', engine: vllm, model: m, tokenizer: {world}/student, backoff: 0.01}}"
        with pytest.raises(UserError) as caught:
            run(world, tmp_path / "run", "teacher.path=null", f"teacher.server={told}")
        assert "tokenizer" in str(caught.value) and not (tmp_path / "run").exists()
        told = told.replace("model: m", "model: elsewhere")
        with pytest.raises(UserError, match="elsewhere"):
            run(world, tmp_path / "run", "teacher.path=null", f"teacher.server={told}")


# --- what some teachers cannot do


@pytest.mark.parametrize("changes", [
    pytest.param(["hidden={}", "panel.resident=one"], id="hidden: (loaded,) = hiring.loaded, which is empty"),
    pytest.param(["hidden={}", OTHER], id="hidden: the teacher reads the student's ids as its own"),
    pytest.param([*WRITES, OTHER], id="the teacher writes with the student's tokenizer"),
    pytest.param([*WRITES, "panel.resident=one"], id="writer: hiring.loaded[0] is not there"),
    pytest.param([*teachers(HERE, "{path: {world}/other}"), "panel.combine=average"],
                 id="a blend over two vocabularies is an assert"),
    pytest.param([*teachers(HERE, also(HERE, "privilege: {shows: [success], success_reward: 0.1}")), DIGITS,
                  "panel.combine=average", "rollout.num_generations=2"], id="a blend of whom one skips is an assert"),
    pytest.param(["rollout.lmbda=0", "kd={}", OTHER, "teacher.signal=chunk"], id="kd does not hear a chunk"),
    pytest.param(["rollout.lmbda=0", "kd={by: entropy}", OTHER], id="kd by entropy without a complete teacher"),
    pytest.param(["rollout.lmbda=0", OTHER, "teacher.signal=chunk"],
                 id="the sampled form on tokens that the student did not sample"),
    pytest.param(["loss.divergence.kind=forward_kl", OTHER, "teacher.signal=chunk"],
                 id="spans estimate the reverse KL only"),
])
def test_what_cannot_be_is_refused(changes, world, tmp_path):
    with pytest.raises((ConfigError, DataError)):
        run(world, tmp_path / "run", *changes)


@pytest.mark.parametrize("changes", [
    ["teacher.privilege={shows: [passages], corpus: {world}/none.txt}"],
    [OTHER, "teacher.roles={think_opn: [a, b]}"],
    [OTHER, "teacher.signal=mapped", "loss.estimator=sampled"],
])
def test_what_hiring_finds_leaves_no_run_folder(changes, world, tmp_path):
    with pytest.raises(UserError):
        run(world, tmp_path / "run", *changes)
    assert not (tmp_path / "run").exists()


def test_the_kl_to_the_start_stays_beside_a_blend(world, tmp_path):
    more = (*teachers(HERE, "{path: {world}/second}"), "panel.combine=average", "train.max_steps=1")
    alone = run(world, tmp_path / "alone", *more)
    held = run(world, tmp_path / "held", *more, "guard={max_drop: null, kl_to_start: 0.5}")
    assert held.column("loss")[0] == pytest.approx(alone.column("loss")[0], rel=1e-6)  # the student is its start


def test_a_teacher_whose_weights_are_damaged_leaves_no_run_folder(world, tmp_path):
    broken = Path(shutil.copytree(world / "teacher", tmp_path / "broken"))
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(UserError, match="broken"):
        run(world, tmp_path / "run", f"teacher.path={broken}")
    assert not (tmp_path / "run").exists()
