"""What the recipes on pairs share: resuming, several sources of pairs, and bad input."""

import io
import json
import shutil
from pathlib import Path

import pytest

from tests.recipes import paired
from tests.train.tiny import qwen3
from tinyr2.core.config import load
from tinyr2.core.errors import ConfigError, RunError
from tinyr2.data.pairs import load_pairs
from tinyr2.models.load import load_tokenizer, save_model
from tinyr2.recipes import preference
from tinyr2.recipes.preference import answers, remembered
from tinyr2.report.console import Console
from tinyr2.tokens.build import train_tokenizer

KINDS = ["dpo", "rm"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return paired.make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_that_is_resumed_ends_as_one_that_was_not(kind, world, tmp_path):
    options = ("train.max_steps=8", "train.deterministic=true", "train.eval_steps=4", "pairs_per_step=50")
    whole = paired.settings(kind, world, tmp_path / "whole", *options)
    paired.go(whole)
    stopped = paired.settings(kind, world, tmp_path / "stopped", *options)
    assert paired.go(stopped, stop_after=5)["ending"] == "stopped"
    assert paired.go(stopped, resume=True)["ending"] == "finished"
    assert paired.outcome(stopped) == paired.outcome(whole)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_not_resumed_on_other_pairs(kind, world, tmp_path):
    own = Path(shutil.copytree(world, tmp_path / "world"))
    config = paired.settings(kind, own, tmp_path / "run")
    paired.go(config, stop_after=1)
    text = (own / "train.jsonl").read_text()
    (own / "train.jsonl").write_text(text.replace('"margin": 2', '"margin": 1', 1))
    with pytest.raises(RunError, match="data: "):
        paired.go(config, resume=True)


@pytest.mark.parametrize("kind", KINDS)
def test_the_run_folder_explains_itself(kind, world, tmp_path):
    config = paired.settings(kind, world, tmp_path / "run", "train.load_best_model_at_end=true", "train.eval_steps=1")
    result = paired.go(config)
    assert load(type(config), tmp_path / "run/config.resolved.yaml") == config
    assert json.loads((tmp_path / "run/env.json").read_text())["verb"] == kind
    assert result["num_tokens"] == paired.rows_of(config)[-1]["num_tokens"]
    assert [row["eval_accuracy_n"] for row in paired.rows_of(config)] == [60, 60, 60]
    assert (tmp_path / "run/best/model.safetensors").read_bytes() \
        == (tmp_path / "run/final/model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_pairs_of_a_file_with_the_same_name_are_read_as_what_they_are(kind, world, tmp_path):
    shutil.copy(world / "held_out.jsonl", tmp_path / "train.jsonl")  # ids train:0 and so on, like the training data's
    rows = []
    for name, path in (("a", world / "held_out.jsonl"), ("b", tmp_path / "train.jsonl")):
        config = paired.settings(kind, world, tmp_path / name, f"eval_data.path={path}", "pairs_per_step=120",
                                 "train.max_steps=2")
        paired.go(config)
        rows.append(paired.rows_of(config))
    assert rows[0] == rows[1]


def test_answers_are_made_once_and_pairs_that_are_drawn_twice_in_a_step_stay_apart(world):
    config = paired.settings("rm", world, world / "none")
    pairs, tokenizer, asked = load_pairs(config.data)[:3], load_tokenizer(config.model), []

    def make(new):
        asked.append([p.problem.id for p in new])
        return answers(new, tokenizer)

    known = {}
    found = remembered(known, [pairs[1], pairs[0], pairs[1]], make)
    assert [(r.group, r.sample) for r in found] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert [r.problem.id for r in found[::2]] == ["train:1:chosen", "train:0:chosen", "train:1:chosen"]
    assert found[0].response_ids == found[4].response_ids
    remembered(known, pairs, make)
    assert asked == [["train:1", "train:0"], ["train:2"]]


def pairs_file(folder: Path, *rows: dict) -> str:
    (folder / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return f"data.path={folder}/pairs.jsonl"


GOOD = {"prompt": "1+1", "chosen": "2", "rejected": "3"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("row", "message"), [
    ({"prompt": "1+1", "chosen": "2"}, "no column 'rejected'; it has 'prompt', 'chosen'"),
    ({"prompt": "1+1", "chosen": "2" * 80, "rejected": "3"}, "data.examples: 1 of 4 examples, prompt and completion, "
                                                             "do not fit the context of the model"),
    ({"chosen": "2", "rejected": "3"}, "answers without a prompt"),
])
def test_bad_data_is_refused_before_a_folder_is_made(kind, row, message, world, tmp_path):
    config = paired.settings(kind, world, tmp_path / "run", pairs_file(tmp_path, GOOD, row))
    with pytest.raises(ConfigError, match=message):
        paired.go(config)
    assert not (tmp_path / "run").exists()


def test_equal_answers_are_told_of_on_the_console(world, tmp_path):
    stream = io.StringIO()
    config = paired.settings("rm", world, tmp_path / "run",
                             pairs_file(tmp_path, GOOD, {"prompt": "1+1", "chosen": "2", "rejected": "2"}))
    inputs = preference.checked(preference.read(config), Console(plain=True, stream=stream))
    assert len(inputs.pairs) == 1
    assert "warning: data.pairs: " in stream.getvalue()
    assert "1 of 2 pairs have equal answers and are left out" in stream.getvalue()


def test_a_best_model_without_held_out_pairs_is_refused(world, tmp_path):
    config = paired.settings("rm", world, tmp_path / "run", "eval_data=null", "train.load_best_model_at_end=true")
    with pytest.raises(ConfigError, match="nothing would say which model is best"):
        paired.go(config)


def test_a_reference_of_another_vocabulary_is_refused(world, tmp_path):
    save_model(qwen3(), train_tokenizer(["abcdefghij"], vocab_size=23, alphabet="corpus"), tmp_path / "other")
    config = paired.settings("dpo", world, tmp_path / "run", f"reference={{path: {tmp_path}/other}}")
    with pytest.raises(ConfigError, match="reference.tokenizer: .*; take a reference with the tokenizer of "):
        paired.go(config)


@pytest.mark.parametrize("kind", KINDS)
def test_overwriting_never_deletes_what_the_run_reads(kind, world, tmp_path):
    paired.go(paired.settings(kind, world, tmp_path / "run"))
    shutil.copy(world / "held_out.jsonl", tmp_path / "run/held_out.jsonl")
    config = paired.settings(kind, world, tmp_path / "run", f"eval_data.path={tmp_path}/run/held_out.jsonl")
    with pytest.raises(RunError, match="--overwrite would delete"):
        paired.go(config, overwrite=True)
    assert (tmp_path / "run/held_out.jsonl").is_file()


@pytest.mark.parametrize(("override", "message"), [
    ("beta=0", "greater than 0"), ("label_smoothing=0.5", "less than 0.5"), ("pairs_per_step=0", "greater than or"),
    ("bta=0.1", "bta: unknown key; did you mean 'beta'"), ("algorithm=rm", "'dpo'"),
])
def test_a_setting_that_makes_no_sense_is_refused(override, message, world, tmp_path):
    with pytest.raises(ConfigError, match=message):
        paired.settings("dpo", world, tmp_path / "run", override)


@pytest.mark.parametrize(("file", "kind"), [("dpo.yaml", "dpo"), ("reward_model.yaml", "rm")])
def test_the_example_is_a_config_of_its_kind(file, kind):
    config = load(paired.RECIPES[kind][0], Path(__file__).parents[2] / "examples" / file)
    assert config.algorithm == kind and config.eval_data is not None
