"""`tinyr2 distill` with teachers of every kind: what a run of three steps measures, and leaves behind when stopped."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.fake_server import FakeServer
from tests.recipes import taught, tiny
from tests.recipes.taught import DIGITS, EVALUATED, also, left, run, teachers

OTHER = "teacher.path={world}/other"
ITSELF = ("teacher.path=null", DIGITS)
ANSWER = "teacher.privilege={shows: [answer]}"
UNGUARDED = "guard={max_drop: null}"
FIRST, SECOND, THIRD = ("{path: {world}/teacher}", "{path: {world}/second}", "{path: {world}/other}")
KINDS = {
    "exact": (OTHER, "teacher.signal=exact"),
    "chunk": (OTHER, "teacher.signal=chunk"),
    "chunk_debiased": (OTHER, "teacher.signal=chunk_debiased"),
    "mapped": (OTHER, "teacher.signal=mapped"),
    "sampled": (OTHER, "loss.estimator=sampled"),
    "sequence": (OTHER, "loss.level=sequence", "rollout.num_generations=3", DIGITS),
    "sum": teachers(FIRST, also(SECOND, "weight: 0.5, weight_end: 1.0, name: b")),
    "average": (*teachers(FIRST, SECOND), "panel.combine=average"),
    "product": (*teachers(also(FIRST, "weight: 0.3"), SECOND), "panel.combine=product"),
    "marginal": (OTHER, "teacher.signal=marginal"),
    "mixed": teachers(FIRST, also(THIRD, "signal: mapped")),
    "spoken": (*teachers(FIRST, THIRD), "loss.estimator=sampled"),
    "weighted": ("loss.estimator=sampled", "loss.position_weight=0.5"),
    "now": (*ITSELF, "teacher.ema=0", ANSWER, UNGUARDED),
    "average_self": (*ITSELF, "teacher.ema=0.5", ANSWER, UNGUARDED),
    "start": (*ITSELF, "teacher.ema=1", ANSWER, UNGUARDED),
    "success": (*ITSELF, "teacher.ema=0.5", "teacher.privilege={shows: [success], success_reward: 0.05}", UNGUARDED,
                "rollout.num_generations=3"),
    "hint": (OTHER, "teacher.privilege={shows: [hint]}"),
    "anchored": (*ITSELF, "teacher.ema=0.5", ANSWER, "guard={max_drop: null, kl_to_start: 0.5}"),
    "hidden": ("hidden={weight: 0.5}",),
    "kd": ("rollout.lmbda=0", "kd={soft_weight: 0.6}"),
    "kd_linear": ("rollout.lmbda=0", "kd={by: linear}"),
    "kd_entropy": ("rollout.lmbda=0", "kd={by: entropy}"),
    "data": ("method=data", "data_distillation={num_generations: 2, max_completion_length: 8, examples_per_step: 4}",
             "rewards=[{file: {world}/written.py, function: short}]"),
}
OF_ONE = {"kept", "gap", "unknown", "lost_bytes", "unpaired"}  # of a teacher across vocabularies
NAMES = {
    "exact": {f"teacher/teacher/{n}" for n in OF_ONE}, "chunk": {f"teacher/teacher/{n}" for n in OF_ONE},
    "mapped": {f"teacher/teacher/{n}" for n in {*OF_ONE, "kl"}},
    "sum": {"teacher/teacher0/kl", "teacher/b/kl"},
    "mixed": {"teacher/teacher0/kl"} | {f"teacher/teacher1/{n}" for n in OF_ONE},
    "now": {"privilege/answer", "privilege/none"}, "success": {"privilege/success", "privilege/none"},
    "anchored": {"teacher/teacher/kl", "teacher/start/kl"},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return taught.make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def done(world, tmp_path_factory):
    """One run of each kind, made when it is first asked for."""
    runs, folder = {}, tmp_path_factory.mktemp("runs")

    def made(kind: str) -> tiny.Outcome:
        if kind not in runs:
            runs[kind] = run(world, folder / kind, *KINDS[kind])
        return runs[kind]

    return made


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_each_kind_moves_the_student_and_measures_in_numbers(kind, world, done):
    outcome = done(kind)
    assert outcome.result["ending"] == "finished" and len(outcome.rows) == 3
    found = [value for row in outcome.rows for value in row.values() if isinstance(value, float)]
    assert found and all(math.isfinite(x) for x in found)
    assert NAMES.get(kind, set()) <= set(outcome.rows[0])
    before, after = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (
        world / "student", outcome.folder / "final"))
    assert set(before) == set(after)  # of nothing beside the student
    assert max(float((before[n] - after[n]).abs().max()) for n in before) > 1e-4
    if kind not in ("data", "kd", "kd_linear", "kd_entropy"):
        assert all("kl" in row for row in outcome.rows)


@pytest.mark.parametrize("signal", ["exact", "chunk", "chunk_debiased"])
def test_what_a_signal_keeps_is_told(signal, done):
    kept = done(signal).column("teacher/teacher/kept")
    assert all(0.2 < x < 1.0 for x in kept) if signal == "exact" else all(x > 0.9 for x in kept)
    assert done(signal).column("teacher/teacher/unknown") == [0.0] * 3
    assert done(signal).column("teacher/teacher/lost_bytes") == [0.0] * 3


def test_an_estimate_is_as_far_from_nothing_as_the_loss_says(done):
    for row in done("chunk").rows:  # the gap is per token that is spoken of, the kl per learned token
        share = row["teacher/teacher/kept"]
        assert row["kl"] == pytest.approx(row["teacher/teacher/gap"] * share, rel=1e-5)


def test_the_sum_counts_each_teacher_by_its_weight_at_the_step(done):
    for row, weight in zip(done("sum").rows, (0.5, 0.75, 1.0), strict=True):
        expected = row["teacher/teacher0/kl"] + weight * row["teacher/b/kl"]
        assert row["loss"] == pytest.approx(expected, rel=1e-5) and row["kl"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["sum", "average", "mixed", "mapped", "marginal", "hint"])
def test_one_resident_teacher_at_a_time_is_the_same_to_the_bit(kind, world, tmp_path, done):
    one = run(world, tmp_path / "run", *KINDS[kind], "panel.resident=one")
    assert left(one.folder) == left(done(kind).folder)


def test_who_is_taught_by_its_own_weights_of_now_learns_from_the_privilege_alone(world, tmp_path, done):
    told = done("now")
    assert min(told.column("kl")) > 1e-6 and told.column("privilege/answer") == [1.0] * 3
    blind = run(world, tmp_path / "run", *ITSELF, "teacher.ema=0")
    assert max(map(abs, blind.column("kl"))) < 1e-9


def test_averages_lie_between_now_and_the_start(done):
    first = {kind: done(kind).column("loss")[0] for kind in ("now", "average_self", "start")}
    assert len(set(first.values())) == 1  # no step has been made
    last = {kind: done(kind).column("loss")[2] for kind in first}
    assert len(set(last.values())) == 3


def test_a_success_is_shown_where_the_group_has_another(done):
    for row, step in zip(done("success").rows, done("success").steps, strict=True):
        shown = 0
        for r in step.rollouts:
            others = {x.text.strip() for x in step.rollouts if x.group == r.group and x.reward >= 0.05}
            shown += bool(others - {r.text.strip(), ""})
        assert shown > 0 and row["privilege/success"] == pytest.approx(shown / len(step.rollouts))


def test_the_kl_to_the_start_is_a_part_of_the_loss(done):
    assert done("anchored").column("teacher/start/kl")[0] == 0.0
    for row in done("anchored").rows:
        assert row["loss"] == pytest.approx(row["teacher/teacher/kl"] + 0.5 * row["teacher/start/kl"], rel=1e-5)
    assert done("anchored").column("teacher/start/kl")[2] > 1e-7


@pytest.mark.parametrize("kind", ["average_self", "success", "start", "hidden", "chunk", "sum", "kd_linear"])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(kind, world, tmp_path):
    more = (*KINDS[kind], "train.save_steps=1", "train.deterministic=true")
    run(world, tmp_path / "whole", *more)
    taught.stop_and_go_on(world, tmp_path / "cut", 2, *more)
    assert left(tmp_path / "cut") == left(tmp_path / "whole")


def test_a_stop_after_an_evaluation_leaves_the_same_privilege_metrics(world, tmp_path):
    more = (*KINDS["success"], *EVALUATED, "train.eval_steps=2", "train.deterministic=true")
    run(world, tmp_path / "whole", *more)
    taught.stop_and_go_on(world, tmp_path / "cut", 2, *more)
    assert left(tmp_path / "cut") == left(tmp_path / "whole")


def test_checkpoints_hold_an_average_and_no_copy_of_the_start(done):
    def names(kind):
        (folder,) = (done(kind).folder / "checkpoints").iterdir()
        return set(load_file(folder / "model.safetensors"))

    assert any(n.startswith("averages") for n in names("average_self"))
    assert not any(n.startswith("averages") for n in names("start"))
    assert any(n.startswith("projections") for n in names("hidden"))


@pytest.mark.parametrize("kind", ["mapped", "mixed", "spoken", "anchored", "hint"])
def test_the_held_out_divergence_is_measured_with_every_kind(kind, world, tmp_path):
    outcome = run(world, tmp_path / "run", *KINDS[kind], *EVALUATED, "train.eval_on_start=true", "train.max_steps=1")
    assert all(math.isfinite(row["eval_kl"]) for row in outcome.rows if "eval_kl" in row)
    assert "eval_kl" in outcome.rows[0]


def test_the_teachers_are_not_trained(world, done):
    done("sum")
    model = AutoModelForCausalLM.from_pretrained(world / "second")
    torch.manual_seed(5)
    again = type(model)(model.config).state_dict()
    assert all(torch.equal(x, again[n]) for n, x in model.state_dict().items())


def test_a_server_and_a_teacher_of_another_vocabulary_sit_in_one_panel(world, tmp_path):
    with FakeServer(AutoTokenizer.from_pretrained(world / "student")) as server:
        far = f"{{url: '{server.url}', engine: vllm, model: m, tokenizer: {world}/student}}"
        outcome = run(world, tmp_path / "run", *teachers(f"{{server: {far}, name: far, weight: 0.5}}",
                                                         also(THIRD, "name: near, signal: chunk")))
    for row in outcome.rows:
        expected = 0.5 * row["teacher/far/gap"] + row["teacher/near/gap"] * row["teacher/near/kept"]
        assert row["kl"] == pytest.approx(expected, rel=1e-4)
