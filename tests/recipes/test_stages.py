"""The stages of a pipeline before any of them runs: references, names, settings, sources."""

from pathlib import Path

import pytest

from tests.recipes import tiny
from tinyr2.cli import _recipes
from tinyr2.core.config import build, load
from tinyr2.core.errors import ConfigError, RunError
from tinyr2.recipes.pipeline import PipelineConfig
from tinyr2.recipes.sft import SftConfig, sft
from tinyr2.recipes.stages import Stage, check_sources, fingerprint, plan

VERBS = {"sft": (SftConfig, sft)}
BUILD = {"name": "base", "verb": "build", "config": {"preset": "qwen3-tiny", "tokenizer": {"path": "t"}}}
DATA = {"name": "sums", "verb": "data", "config": {"sources": {"task": "signed_sums", "limit": 9}}}
SFT = {"name": "cold", "verb": "sft", "config": {"model": {"path": "stage:base"}, "data": {"path": "stage:sums"}}}
REJECT = {"name": "kept", "verb": "reject", "config": {
    "model": {"path": "stage:cold"}, "data": [{"path": "stage:sums", "limit": 3}], "pairs": True}}


def planned(*stages: dict, out: str = "runs/p", **more) -> list[Stage]:
    config = build(PipelineConfig, {"output_dir": out, "stages": stages} | more, "test")
    return plan(config.stages, Path(out), config.seed, VERBS)


def test_a_reference_becomes_the_product_of_its_stage():
    last = {"name": "again", "verb": "sft", "config": {"model": {"path": "stage:cold"}, "data": {"path": "stage:kept"},
                                                       "eval_data": {"path": "stage:kept/pairs.jsonl"}}}
    base, _, cold, kept, again = planned(BUILD, DATA, SFT, REJECT, last)
    assert base.config.output_dir == "runs/p/base"
    assert cold.config.model.path == "runs/p/base"
    assert cold.config.data.path == "runs/p/sums/data.jsonl"
    assert kept.config.model.path == again.config.model.path == "runs/p/cold/final"
    assert kept.config.data[0].path == "runs/p/sums/data.jsonl"
    assert again.config.data.path == "runs/p/kept/data.jsonl"
    assert again.config.eval_data.path == "runs/p/kept/pairs.jsonl"
    assert again.inputs == {"stage:cold": Path("runs/p/cold/final"), "stage:kept": Path("runs/p/kept/data.jsonl"),
                            "stage:kept/pairs.jsonl": Path("runs/p/kept/pairs.jsonl")}
    inside = {"name": "x", "verb": "build", "config": {"preset": "qwen3-tiny",
                                                       "tokenizer": {"path": "stage:cold/tokenizer.json"}}}
    assert planned(BUILD, DATA, SFT, inside)[-1].config.tokenizer.path == "runs/p/cold/final/tokenizer.json"


def test_the_settings_on_record_have_references_as_they_were_written_and_no_folder():
    stage = planned(BUILD, DATA, SFT)[-1]
    assert stage.settings["model"]["path"] == "stage:base"
    assert "output_dir" not in stage.settings
    assert stage.settings == planned(BUILD, DATA, SFT, out="elsewhere")[-1].settings


def test_a_stage_has_the_pipelines_seed_where_it_names_none():
    own = SFT | {"name": "own", "config": SFT["config"] | {"train": {"seed": 3}}}
    base, _, cold, given = planned(BUILD, DATA, SFT, own, seed=7)
    assert (base.config.seed, cold.config.train.seed, given.config.train.seed) == (7, 7, 3)


def test_files_and_model_folders_from_elsewhere_count_as_inputs(tmp_path):
    (tmp_path / "own.jsonl").write_text('{"prompt": "1", "completion": "2"}\n')
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    stage = SFT | {"config": {"model": {"path": str(tmp_path / "model")}, "device": "cpu",
                              "data": {"path": str(tmp_path / "own.jsonl"), "system": "x" * 5000}}}
    assert set(planned(stage)[0].inputs.values()) == {tmp_path / "model", tmp_path / "own.jsonl"}


@pytest.mark.parametrize(("stages", "message"), [
    ([SFT], r"stage cold \(sft\): stage:base: no stage of that name comes before; there are none"),
    ([BUILD, DATA, {**SFT, "config": {**SFT["config"], "model": {"path": "stage:bsae"}}}],
     r"stage:bsae: no stage of that name comes before; did you mean 'base'"),
    ([DATA, SFT, BUILD], r"stage:base: no stage of that name comes before"),
    ([BUILD | {"verb": "biuld"}], r"stage base: no verb 'biuld'; did you mean 'build'"),
    ([{**DATA, "config": {"sorces": []}}], r"stage sums \(data\):\n  sources: missing.*\n.*sorces: unknown key"),
    ([{**DATA, "config": {**DATA["config"], "output_dir": "x"}}], "stage sums: output_dir is the pipeline's to set"),
    ([DATA, DATA], "two are called 'sums'"),
    ([DATA, DATA | {"name": "SUMS"}], "two are called 'sums'"),
    ([DATA | {"name": "a/b"}], "stages.0.name"),
    ([DATA | {"name": "final"}], "belong to runs; take another name"),
    ([], "stages"),
])
def test_what_cannot_work_is_refused_by_name(stages, message):
    with pytest.raises(ConfigError, match=message):
        planned(*stages)


def test_all_faults_come_at_once():
    with pytest.raises(ConfigError) as caught:
        planned(BUILD | {"verb": "x"}, {**DATA, "config": {}}, {**SFT, "config": {**SFT["config"], "trian": {}}})
    assert all(word in str(caught.value) for word in ("stage base: no verb", "sources: missing", "trian: unknown key"))


def check(*stages: dict) -> None:
    check_sources({f"stage {s.name}": s.config for s in planned(*stages)}, Path("runs/p"))


def test_sources_from_elsewhere_are_looked_at_before_anything_runs(tmp_path):
    world = tiny.make_world(tmp_path)
    good = SFT | {"config": {"model": {"path": str(world / "student")}, "data": {"path": str(world / "data.jsonl")},
                             "rewards": [{"file": str(world / "rewards.py"), "function": "digits"}]}}
    check(good)
    bad = {"name": "bad", "verb": "sft", "config": {
        "model": {"path": str(world / "stduent")}, "data": {"path": "stage:sums"}}}
    worse = SFT | {"config": {**good["config"], "rewards": [{"file": str(world / "rewards.py"), "function": "dgits"}]}}
    few = DATA | {"name": "few", "config": {"sources": {"task": "signed_sums", "limit": 99,
                                                        "options": {"terms": 2, "digits": 1}, "split": "held_out"}}}
    with pytest.raises(ConfigError) as caught:
        check(DATA, bad, worse, few)
    assert "stage bad: " in str(caught.value) and "stduent" in str(caught.value)
    assert "stage few: 99 different held_out sums" in str(caught.value)
    assert "stage cold: " in str(caught.value) and "did you mean 'digits'" in str(caught.value)


def test_the_sources_of_a_mixture_may_be_stages_and_are_looked_at_where_they_are_not(tmp_path):
    world = tiny.make_world(tmp_path)

    def mixed(path: str) -> dict:
        return SFT | {"config": {"model": {"path": str(world / "student")}, "mixture": {"sources": {
            "long": {"path": f"stage:{DATA['name']}"}, "short": {"path": path}}}}}

    check(DATA, mixed(str(world / "data.jsonl")))
    stage = planned(DATA, mixed(str(world / "data.jsonl")))[1]
    assert stage.config.mixture.sources["long"].path.endswith(f"{DATA['name']}/data.jsonl")
    with pytest.raises(ConfigError, match="none.jsonl"):
        check(DATA, mixed(str(world / "none.jsonl")))


def test_reinforce_by_an_algorithm_that_learns_from_pairs_is_that_verb():
    stage = {"name": "judge", "verb": "reinforce", "config": {
        "algorithm": "rm", "model": {"path": "m"}, "data": {"path": "pairs.jsonl"}}}
    config = build(PipelineConfig, {"output_dir": "p", "stages": [stage]}, "test")
    assert plan(config.stages, Path("p"), 0, _recipes())[0].verb == "rm"


EXAMPLES = sorted((Path(__file__).parents[2] / "examples/pipelines").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_have_no_fault(path):
    config = load(PipelineConfig, path)
    stages = plan(config.stages, Path(config.output_dir), config.seed, _recipes())
    check_sources({s.name: s.config for s in stages} | {"compare": config.compare}, Path(config.output_dir))
    assert len(stages) >= 4


def test_a_fingerprint_changes_with_what_is_there(tmp_path):
    file, model = tmp_path / "a.jsonl", tmp_path / "model"
    assert fingerprint(file) is None
    model.mkdir()
    found = []
    for text in ("{}", '{"a": 1}'):
        file.write_text(text)
        (model / "config.json").write_text(text)
        found.append((fingerprint(file), fingerprint(model)))
    assert found[0][0] != found[1][0] and found[0][1] != found[1][1]
    with pytest.raises(RunError, match="neither a file nor a model folder"):
        fingerprint(tmp_path)


