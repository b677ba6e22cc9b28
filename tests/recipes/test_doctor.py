import io
import json
import os
import shutil
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import BertConfig, GPT2Config, Qwen3Config, Qwen3ForCausalLM, T5Config

from tinyr2 import cli
from tinyr2.core.config import build
from tinyr2.core.errors import ConfigError, DataError
from tinyr2.core.types import Message, Problem
from tinyr2.models.load import ModelConfig, save_model
from tinyr2.recipes import check_data, checks, distill, sft
from tinyr2.recipes.checks import check_training
from tinyr2.recipes.doctor import as_line, doctor, examine, machine_lines, read_config, verb_of
from tinyr2.recipes.findings import Finding, ModelFiles, Part, Reader, Setup, fault_of, raise_faults
from tinyr2.recipes.inputs import checked_inputs
from tinyr2.recipes.machine import describe_machine
from tinyr2.recipes.setup import StudentConfig
from tinyr2.report.console import Console
from tinyr2.rewards.grade import RewardConfig, RewardFunction
from tinyr2.rewards.learned import RewardModel, RewardModelOptions
from tinyr2.tokens.build import CHATML, COMPACT, train_tokenizer
from tinyr2.train.loop import TrainConfig

EXACT = RewardConfig(name="exact_answer")
VERBS = cli._recipes()
TEXTS = [f"what is {a} + {b}? it is {a + b}." for a in range(12) for b in range(12)]


def tokenizer_of(**more):
    return train_tokenizer(TEXTS, **{"vocab_size": 64, "alphabet": "corpus"} | more)


def config_of(vocab: int, **more) -> Qwen3Config:
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
             "head_dim": 8, "intermediate_size": 16, "max_position_embeddings": 64, "tie_word_embeddings": True}
    return Qwen3Config(vocab_size=vocab, **shape | more)


def problem(i: int, text: str | None = None, completion: str | None = "it is 4.", answer: str | None = "4") -> Problem:
    return Problem(id=f"data:{i}", task="data", messages=(Message("user", text or f"what is {i} + 2?"),), answer=answer,
                   completion=None if completion is None else (Message("assistant", completion),))


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_of()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer) -> Path:
    """A sound model folder."""
    path = tmp_path_factory.mktemp("models") / "sound"
    eos = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    save_model(Qwen3ForCausalLM(config_of(len(tokenizer), **eos)), tokenizer, path)
    return path


@pytest.fixture(scope="module")
def sound(folder, tokenizer, tmp_path_factory) -> Setup:
    """A distillation in which nothing is wrong."""
    config = config_of(len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    student = ModelFiles(key="student", source=StudentConfig(path=str(folder)), config=config, tokenizer=tokenizer)
    part = Part(key="data", path="data.jsonl", problems=[problem(i) for i in range(5)], completions="read",
                answer_limit=("rollout.max_completion_length", 16))
    return Setup(student=student, teachers=(replace(student, key="teacher", source=ModelConfig(path=str(folder))),),
                 parts=(part,), train=TrainConfig(max_steps=10), evaluates=False, device="cpu",
                 output_dir=str(tmp_path_factory.mktemp("runs") / "run"))


def student(setup: Setup, **changes) -> Setup:
    return replace(setup, student=replace(setup.student, **changes))


def teacher(setup: Setup, **changes) -> Setup:
    return replace(setup, teachers=(replace(setup.teachers[0], **changes),))


def data(setup: Setup, **changes) -> Setup:
    return replace(setup, parts=(replace(setup.parts[0], **changes), *setup.parts[1:]))


def only(setup: Setup, level: str, name: str) -> Finding:
    """The one finding of that level; nothing else may be wrong."""
    found = [f for f in check_training(setup) if f.level == level or f.level == "fault"]
    assert [(f.level, f.name) for f in found] == [(level, name)], "\n".join(f"{f.level} {f.line}" for f in found)
    return found[0]


def well(setup: Setup, name: str) -> str:
    """What the check says of `name` where nothing is wrong anywhere."""
    found = check_training(setup)
    assert {f.level for f in found} == {"ok"}, [f.line for f in found if f.level != "ok"]
    return next(f.what for f in found if f.name == name)


# --- models and tokenizers


def test_nothing_is_wrong_with_a_sound_setup(sound):
    findings = check_training(sound)
    assert {f.level for f in findings} == {"ok"}
    assert {f.name for f in findings} == {"device", "output_dir", "disk", "vocabulary", "tokenizers", "student.eos",
                                          "data"}
    assert raise_faults(findings) == []


def test_a_teacher_with_another_tokenizer_is_a_fault_where_nothing_translates(sound):
    other = tokenizer_of(vocab_size=32)
    fault = only(teacher(sound, tokenizer=other, source=ModelConfig(path="models/other")), "fault", "tokenizers")
    assert "the teacher's ids mean other tokens than the student's" in fault.what
    assert "tokens are the student's alone" in fault.what
    assert not [f for f in check_training(teacher(sound, tokenizer=other)) if f.name == "teacher.prompts"]
    assert sound.student.source.path in fault.cure and "`tinyr2 distill`, which translates" in fault.cure


@pytest.mark.parametrize("key, change", [("student", student), ("teacher", teacher)])
def test_a_model_with_fewer_ids_than_the_tokenizer_is_a_fault(sound, tokenizer, key, change):
    n = len(tokenizer)
    fault = only(change(sound, config=config_of(n - 1, eos_token_id=tokenizer.eos_token_id)), "fault",
                 f"{key}.vocabulary")
    assert f"the model has {n - 1} ids" in fault.what and f"writes {n}" in fault.what
    assert key in fault.cure and f"resize_token_embeddings({n})" in fault.cure


def test_padded_vocabularies_of_different_size_are_well_and_cropped_to_the_shared_ids(sound, tokenizer):
    n, eos = len(tokenizer), tokenizer.eos_token_id
    padded = teacher(student(sound, config=config_of(151_936, eos_token_id=eos)), config=config_of(152_064))
    assert well(padded, "vocabulary") == (
        f"ids: student 151,936, teacher 152,064, cropped to the 151,936 that they share; the tokenizer writes {n}")


def test_a_tokenizer_without_a_chat_template_is_a_fault_named_once(sound):
    bare = tokenizer_of()
    bare.chat_template = None
    fault = only(student(sound, tokenizer=bare), "fault", "student.chat_template")
    assert "no chat template" in fault.what and "chat_template.jinja" in fault.cure


def test_a_template_that_rejects_a_role_names_the_first_such_problem_and_how_many(sound):
    odd = Problem(id="data:odd", task="data", messages=(Message("tool", "4"), Message("user", "so?")))
    odder = replace(odd, id="data:odder")
    fault = only(data(sound, problems=[problem(0), odd, odder]), "fault", "data.template")
    assert fault.what.startswith("2 of 3 problems cannot be written as a chat, the first is data:odd: ")
    assert "['tool', 'user']" in fault.what and "chat_template.jinja" in fault.cure


def test_a_teacher_that_would_read_prompts_in_another_form_is_a_warning(sound):
    other = tokenizer_of()
    other.chat_template = COMPACT.replace("'<|user|>' +", "'<|user|> ' +")
    warning = only(teacher(sound, tokenizer=other), "warn", "teacher.prompts")
    assert "first: data:0" in warning.what and "chat_template.jinja" in warning.cure


def test_a_teacher_without_a_chat_template_is_no_mistake(sound):
    bare = tokenizer_of()
    bare.chat_template = None
    assert well(teacher(sound, tokenizer=bare), "tokenizers").startswith("student and teacher give the same tokens")


def test_pad_equal_to_eos_is_well_because_nothing_is_masked_by_id(sound):
    same = tokenizer_of()
    same.pad_token = same.eos_token
    assert well(student(sound, tokenizer=same), "student.pad") == (
        f"{same.eos_token!r} pads and ends answers: nothing is masked by its id, so the end of an answer is still "
        "trained")


PLAIN = ("{% for m in messages %}{{ m['content'] + '. ' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ 'it is ' }}{% endif %}")


def test_a_template_without_an_end_token_ends_answers_with_eos_and_without_eos_is_a_fault(sound):
    plain = tokenizer_of()
    plain.chat_template = PLAIN
    assert well(teacher(student(sound, tokenizer=plain), tokenizer=plain), "student.eos") == (
        "the chat template writes no end token; answers end with EOS '<|end|>'")
    plain.eos_token = None
    endless = student(sound, tokenizer=plain, config=config_of(len(plain)), source=StudentConfig(path="nowhere"))
    fault = next(f for f in check_training(endless) if f.level == "fault")
    assert fault.name == "student.eos" and "nothing ends an answer" in fault.what
    assert "eos_token in tokenizer_config.json" in fault.cure


def test_an_eos_that_the_template_never_writes_is_a_warning_that_names_the_token_to_declare(sound):
    wrong = tokenizer_of()
    end = wrong.eos_token_id
    wrong.eos_token = wrong.pad_token
    undeclared = student(sound, tokenizer=wrong, config=config_of(len(wrong)), source=StudentConfig(path="nowhere"))
    warning = only(undeclared, "warn", "student.eos")
    assert "EOS '<|endoftext|>' is never trained" in warning.what and "'<|end|>'" in warning.what
    assert "set eos_token to '<|end|>' in tokenizer_config.json" in warning.cure and f"to {end} in" in warning.cure
    declared = student(undeclared, config=config_of(len(wrong), eos_token_id=[3, end]))
    assert well(declared, "student.eos") == "answers end with '<|end|>'"


def test_a_class_that_cannot_be_packed_is_a_warning_and_one_that_writes_no_text_a_fault(sound, tokenizer):
    shape = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    gpt2 = GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=64, **shape)
    warning = only(teacher(sound, config=gpt2), "warn", "teacher.packing")
    assert "gpt2" in warning.what and "padded" in warning.what and "qwen3" in warning.cure
    fault = only(teacher(sound, config=T5Config(d_model=16, **shape)), "fault", "teacher.class")
    assert "t5 is not a causal language model" in fault.what and "teacher.path" in fault.cure


def test_a_config_of_which_no_model_can_be_made_is_a_fault_with_the_reason(sound, tokenizer):
    odd = config_of(len(tokenizer), hidden_act="zzz", eos_token_id=tokenizer.eos_token_id)
    fault = only(student(sound, config=odd), "fault", "student.config")
    assert "config.json: KeyError: 'zzz'" in fault.what and "mend config.json" in fault.cure


def test_a_folder_without_safetensors_is_a_fault_that_says_pickles_are_not_read(sound, tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    bare = student(sound, source=StudentConfig(path=str(tmp_path)))
    fault = only(bare, "fault", "student.weights")
    assert str(tmp_path) in fault.what and "save_pretrained" in fault.cure and "*.bin" in fault.cure


# --- data


def test_a_prompt_that_fills_the_context_is_a_fault_with_count_longest_and_ids(sound):
    problems = [problem(0), *(problem(i, "1" * n, None) for i, n in ((1, 61), (2, 62), (3, 80)))]
    fault = only(data(sound, problems=problems, answer_limit=("rollout.max_completion_length", 1)), "fault",
                 "data.prompts")
    # two tokens of the template more than digits: 63 of 64 leave room for one
    assert fault.what == ("2 of 4 prompts leave no room for an answer in the context of the student (64 tokens); the "
                          "longest, data:3, has 82 (data:2, data:3)")
    assert "data.jsonl" in fault.cure and "longer context" in fault.cure


def test_the_shorter_context_of_the_two_models_decides(sound, tokenizer):
    short = teacher(sound, config=config_of(len(tokenizer), max_position_embeddings=24))
    fault = only(data(short, problems=[problem(0, "1" * 30)]), "fault", "data.prompts")
    assert "the context of the teacher (24 tokens)" in fault.what and "take a teacher with" in fault.cure
    warning = only(data(short, problems=[problem(0, "1" * 10)]), "warn", "data.room")
    assert warning.what.startswith("the teacher would read past the context of the teacher (24 tokens)")


def test_an_answer_that_will_be_cut_is_a_warning_with_the_length_that_fits(sound):
    assert only(data(sound, problems=[problem(0, "1" * 46), problem(1, "1" * 47)]), "warn", "data.room") == Finding(
        "warn", "data.room", "answers will be cut at the context of the student (64 tokens) for 1 of 2 prompts "
        "(data:1): the longest has 49 and rollout.max_completion_length is 16",
        "set rollout.max_completion_length to 15 or less, or take a student with a longer context")


def test_an_example_longer_than_the_context_is_a_fault_where_completions_are_read(sound):
    # prompt 2 + 30, response 31 digits and the end: 64 fit, 65 do not
    rows = [problem(0, "1" * 30, "1" * 31), problem(1, "1" * 30, "1" * 32)]
    fault = only(data(sound, problems=rows), "fault", "data.examples")
    assert "1 of 2 examples" in fault.what and "the longest, data:1, has 65 (data:1)" in fault.what
    assert "data.jsonl" in fault.cure
    assert well(data(sound, problems=rows, completions="ignored"), "data").startswith("2 problems")


def test_problems_without_a_completion_are_a_fault_where_completions_are_needed(sound):
    rows = [problem(0), *(problem(i, completion=None) for i in range(1, 6))]
    fault = only(data(sound, problems=rows, completions="needed"), "fault", "data.completions")
    assert fault.what == "5 of 6 problems have no completion to learn from (data:1, data:2, data:3 and 2 more)"
    assert "data.jsonl" in fault.cure and "data.columns={completion: its_name}" in fault.cure
    assert well(data(sound, problems=rows), "data").startswith("6 problems")


def test_a_completion_that_renders_to_nothing_is_an_empty_loss_mask(sound):
    strips = tokenizer_of(chat_template=COMPACT.replace("m['content'] + '<|end|>'", "m['content'].strip() + '<|end|>'"))
    empty = teacher(student(sound, tokenizer=strips), tokenizer=strips)
    fault = only(data(empty, problems=[problem(0), problem(1, completion="  ")]), "fault", "data.completions")
    assert "the loss mask is empty: 1 of 2 completions" in fault.what and "(data:1)" in fault.what
    assert "data.jsonl" in fault.cure


def test_characters_that_the_tokenizer_lacks_are_a_warning(sound):
    warning = only(data(sound, problems=[problem(0), problem(1, "wie groß?")]), "warn", "data.unknown")
    assert "1 of 2 problems" in warning.what and "<unk> (data:1)" in warning.what and "`bytes`" in warning.cure


def test_answers_that_a_built_in_reward_needs_are_a_fault_if_all_lack_and_a_warning_if_some(sound):
    lacking = [problem(i, answer=None) for i in range(3)]
    fault = only(data(sound, problems=lacking, rewards=(EXACT,)), "fault", "data.answers")
    assert "3 of 3 problems have no answer" in fault.what and "data.columns={answer: its_name}" in fault.cure
    warning = only(data(sound, problems=[*lacking, problem(3)], rewards=(EXACT,)), "warn", "data.answers")
    assert "3 of 4" in warning.what


def test_problem_ids_that_stand_twice_are_a_warning(sound):
    warning = only(data(sound, problems=[problem(0), problem(1), problem(1, "what is 9 + 9?")]), "warn", "data.ids")
    assert "more than once: 1 (first: data:1)" in warning.what and "data.jsonl" in warning.cure


def test_held_out_prompts_that_are_trained_on_are_a_warning_whatever_their_system_turn(sound):
    twin = replace(problem(0), id="eval:0", messages=(Message("system", "it is."), Message("user", "what is  3 + 2?")))
    held_out = Part(key="eval_data", path="eval.jsonl", problems=[twin, problem(77)])
    warning = only(replace(sound, parts=(*sound.parts, held_out)), "warn", "eval_data.overlap")
    assert "1 of 2 held-out prompts are also in data (eval:0)" in warning.what
    assert "eval.jsonl" in warning.cure and "data.jsonl" in warning.cure


def test_asking_for_more_held_out_problems_than_there_are_is_a_fault(sound):
    held_out = Part(key="eval_data", path="eval.jsonl", problems=[problem(77)], wanted=2)
    fault = only(replace(sound, parts=(*sound.parts, held_out)), "fault", "eval_data.size")
    assert "asks for 2 problems, eval.jsonl has 1" in fault.what and "eval.num_problems to 1" in fault.cure


def test_of_many_problems_a_sample_and_the_longest_are_looked_at_and_the_number_is_said(sound, monkeypatch):
    monkeypatch.setattr(check_data, "SAMPLE", 20)
    monkeypatch.setattr(check_data, "LONGEST", 2)
    rows = [problem(i) for i in range(300)]
    rows[123] = problem(123, "1" * 100)
    many = data(sound, problems=rows)
    chosen = check_data.looked_at(many.parts[0])
    assert len(chosen) in (21, 22) and chosen == check_data.looked_at(many.parts[0])  # the longest may be drawn too
    assert [p.id for p in chosen] == [p.id for p in rows if p in chosen]
    fault = only(many, "fault", "data.prompts")
    assert f"1 of {len(chosen)} prompts looked at (300 in all)" in fault.what and "data:123" in fault.what


# --- device, folder, disk


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_a_fault_that_names_those_that_are(sound, device):
    fault = only(replace(sound, device=device), "fault", "device")
    assert device in fault.what and "auto" in fault.cure and "cpu" in fault.cure


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_cuda_is_a_fault_that_names_the_cpu(sound):
    assert "device=cpu" in only(replace(sound, device="cuda"), "fault", "device").cure


def test_training_bfloat16_weights_is_a_warning(sound, monkeypatch):
    monkeypatch.setattr(checks, "describe_machine", lambda: {"cpu": {"instructions": ["amx_bf16"]}})
    coarse = student(sound, source=StudentConfig(path=sound.student.source.path, dtype="bfloat16"))
    assert "set student.dtype to float32" in only(coarse, "warn", "student.dtype").cure


def test_a_bfloat16_model_on_a_processor_without_it_is_a_warning(sound, monkeypatch):
    slow = teacher(sound, source=ModelConfig(path=sound.student.source.path, dtype="bfloat16"))
    monkeypatch.setattr(checks, "describe_machine", lambda: {"cpu": {"instructions": ["avx2"]}})
    assert "float32" in only(slow, "warn", "device").cure
    monkeypatch.setattr(checks, "describe_machine", lambda: {"cpu": {"instructions": None}})
    assert well(slow, "device") == "cpu, products in float32"


def test_a_file_in_the_way_of_the_run_folder_is_a_fault(sound, tmp_path):
    (tmp_path / "file").write_text("")
    fault = only(replace(sound, output_dir=str(tmp_path / "file" / "runs" / "a")), "fault", "output_dir")
    assert f"{tmp_path / 'file'} is a file" in fault.what and "output_dir" in fault.cure


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that nobody can write to")
def test_a_folder_that_cannot_be_written_to_is_a_fault(sound):
    fault = only(replace(sound, output_dir="/proc/self/runs/a"), "fault", "output_dir")
    assert "/proc/self cannot be written to" in fault.what and "output_dir" in fault.cure


@pytest.mark.skipif(os.geteuid() == 0, reason="permission bits do not bind root")
def test_a_folder_without_permission_is_a_fault(sound, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    assert str(closed) in only(replace(sound, output_dir=str(closed / "run")), "fault", "output_dir").what


def test_the_check_of_the_folder_leaves_nothing_behind(sound, tmp_path):
    check_training(replace(sound, output_dir=str(tmp_path / "a" / "b")))
    assert list(tmp_path.iterdir()) == []


def test_the_disk_must_hold_checkpoints_of_weights_and_two_moments_and_the_finished_model(sound, monkeypatch):
    parameters = sum(p.numel() for p in Qwen3ForCausalLM(sound.student.config).parameters())
    # 100 steps, saved each 10th, newest 2 kept: 3 stand at the worst moment; a best model beside the final one
    long = replace(sound, evaluates=True, train=TrainConfig(max_steps=100, save_steps=10, load_best_model_at_end=True))
    need = 1.2 * 4 * parameters * (3 * 3 + 2)
    monkeypatch.setattr(checks, "free_bytes", lambda path: need + 1)
    assert f"checkpoints: 3 x {parameters:,} trained parameters" in well(long, "disk")
    assert f"finished models: 2 x {parameters:,}" in well(long, "disk")
    monkeypatch.setattr(checks, "free_bytes", lambda path: need - 1)
    fault = only(long, "fault", "disk")
    assert "output_dir" in fault.cure and "train.save_total_limit" in fault.cure
    # saved once, nothing to compare: 3 + 1 of 11 parts
    monkeypatch.setattr(checks, "free_bytes", lambda path: need * 4 / 11 + 1)
    assert f"finished models: 1 x {parameters:,}" in well(sound, "disk")


def test_weights_that_a_resumed_run_replaces_count_as_free(sound, monkeypatch, tmp_path):
    monkeypatch.setattr(checks, "free_bytes", lambda path: 0)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "model.safetensors").write_bytes(bytes(2**20))
    assert well(replace(sound, output_dir=str(tmp_path)), "disk").endswith("1 MiB are there")
    (tmp_path / "checkpoints" / "model.safetensors").unlink()
    assert only(replace(sound, output_dir=str(tmp_path)), "fault", "disk").what.endswith("0 MiB are there")


def test_with_adapters_only_they_are_in_the_checkpoints(sound):
    lora = student(sound, source=StudentConfig(path=sound.student.source.path, lora={"r": 3}))
    # hidden 16, 2 heads of 8, 1 for keys and values, intermediate 16: in + out of q, k, v, o, gate, up, down
    adapters = 3 * (32 + 24 + 24 + 32 + 32 + 32 + 32)
    assert f"checkpoints: 1 x {adapters:,} trained parameters" in well(lora, "disk")


def test_a_best_model_without_an_evaluation_is_a_fault_and_a_rhythm_without_one_a_warning(sound):
    best = replace(sound, train=TrainConfig(load_best_model_at_end=True))
    assert "eval_data" in only(best, "fault", "train.load_best_model_at_end").cure
    assert "set it to 0" in only(replace(sound, train=TrainConfig(eval_steps=5)), "warn", "train.eval_steps").cure


# --- reference and critic


def reference(setup: Setup, **changes) -> Setup:
    files = replace(setup.teachers[0], key="reference", source=ModelConfig(path="ref"), **changes)
    return replace(setup, reference=files)


def critic(setup: Setup, **changes) -> Setup:
    changes = {"key": "value", "source": ModelConfig(path="judge")} | changes
    return replace(setup, critic=replace(setup.teachers[0], **changes))


@pytest.mark.parametrize("add, key, role", [(reference, "reference", "reference"), (critic, "value", "critic")])
def test_a_reference_or_critic_with_another_tokenizer_is_a_fault(sound, add, key, role):
    assert {f.level for f in check_training(add(sound))} == {"ok"}
    fault = only(add(sound, tokenizer=tokenizer_of(vocab_size=32)), "fault", f"{key}.tokenizer")
    assert f"the {role} reads the policy's ids" in fault.what and "tokens are the policy's alone" in fault.what
    assert f"take a {role} with the tokenizer of {sound.student.source.path}" == fault.cure


@pytest.mark.parametrize("add, key", [(reference, "reference"), (critic, "value")])
def test_a_reference_or_critic_must_have_every_id_that_the_policy_writes_padding_too(sound, tokenizer, add, key):
    n, eos = len(tokenizer), tokenizer.eos_token_id
    wide = teacher(student(sound, config=config_of(n + 8, eos_token_id=eos)), config=config_of(n + 8))
    fault = only(add(wide, config=config_of(n + 7)), "fault", f"{key}.vocabulary")
    assert f"has {n + 7} ids, the policy writes {n + 8}" in fault.what
    assert f"resize_token_embeddings({n + 8})" in fault.cure
    assert {f.level for f in check_training(add(wide, config=config_of(n + 8)))} == {"ok"}
    # student and teacher are cropped to n, and nothing beyond it is read
    assert {f.level for f in check_training(add(teacher(wide, config=config_of(n)), config=config_of(n)))} == {"ok"}


def test_the_window_of_a_critic_counts(sound, tokenizer):
    warning = only(data(critic(sound, config=config_of(len(tokenizer), max_position_embeddings=24)),
                        problems=[problem(0, "1" * 10)]), "warn", "data.room")
    assert warning.what.startswith("the critic would read past the context of the critic (24 tokens)")


def test_a_critic_of_a_class_that_gives_no_single_number_is_a_fault(sound, tokenizer):
    three = config_of(len(tokenizer), architectures=["Qwen3ForSequenceClassification"], num_labels=3)
    fault = only(critic(sound, config=three), "fault", "value.class")
    assert "3 labels" in fault.what and "reward model, or null" in fault.cure
    three.num_labels = 1
    assert {f.level for f in check_training(critic(sound, config=three))} == {"ok"}
    bert = BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                      intermediate_size=16, max_position_embeddings=64)
    fault = next(f for f in check_training(critic(sound, config=bert)) if f.level == "fault")
    assert fault.name == "value.class" and "no plain linear `score`" in fault.what and "qwen3" in fault.cure


def test_a_critic_is_in_every_checkpoint_with_its_moments_and_finished_once(sound, monkeypatch):
    parameters = sum(p.numel() for p in Qwen3ForCausalLM(sound.student.config).parameters())
    judge = parameters + 16  # the head is tied; a score reads 16 states
    own = critic(sound, source=sound.student.source)  # begins as the policy
    need = 1.2 * 4 * (3 * (parameters + judge) + parameters + judge)
    monkeypatch.setattr(checks, "free_bytes", lambda path: need + 1)
    assert f"trained parameters and the critic's {judge:,} and their moments" in well(own, "disk")
    monkeypatch.setattr(checks, "free_bytes", lambda path: need - 1)
    assert only(own, "fault", "disk").cure.startswith("free 0 MiB")


# --- rewards


def rewarded(setup: Setup, *rewards: dict, problems: list[Problem] | None = None, **more) -> Setup:
    changes = {"problems": problems} if problems is not None else {}
    return data(setup, rewards=tuple(RewardConfig(**r) for r in rewards), **changes, **more)


COUNT = problem(0, answer=None)
NUMBERS = replace(COUNT, columns={"numbers": [1, 2], "target": 3})


@pytest.mark.parametrize("name, options", [("accuracy", {}), ("cosine", {"max_length": 9}), ("exact_answer", {}),
                                           ("cosine", {"max_length": 9, "verdict": "accuracy"})])
def test_a_reward_that_compares_needs_answers_whatever_stands_beside_it(sound, name, options):
    own = {"file": "g.py", "function": "f"}
    blind = rewarded(sound, own, {"name": name, "options": options}, problems=[COUNT])
    assert f"which {name} needs" in only(blind, "fault", "data.answers").what


@pytest.mark.parametrize("name", ["think_format", "language", "repetition"])
def test_a_reward_that_compares_with_nothing_needs_no_answers(sound, name):
    assert well(rewarded(sound, {"name": name}, problems=[COUNT]), "data").startswith("1 problems")


@pytest.mark.parametrize("reward", [{"name": "countdown"},
                                    {"name": "cosine", "options": {"max_length": 9, "verdict": "countdown"}}])
def test_countdown_needs_its_numbers_and_a_target_or_an_answer(sound, reward):
    assert well(rewarded(sound, reward, problems=[NUMBERS]), "data")
    answered = replace(NUMBERS, answer="3", columns={"numbers": [1, 2]})
    assert well(rewarded(sound, reward, problems=[answered]), "data")
    fault = only(rewarded(sound, reward, problems=[replace(answered, columns={})]), "fault", "data.numbers")
    assert "1 of 1 problems have no column `numbers`" in fault.what and "column `numbers` of data.jsonl" in fault.cure
    text = replace(answered, columns={"numbers": "1 2"})
    assert "2 problems" in only(rewarded(sound, reward, problems=[text, replace(answered, id="x")]), "warn",
                                "data.numbers").what
    blind = replace(NUMBERS, columns={"numbers": [1, 2]})
    assert "`target` (or an answer in its place)" in only(rewarded(sound, reward, problems=[blind]), "fault",
                                                          "data.target").what


def test_only_the_problems_of_a_rewards_tasks_need_what_it_compares_with(sound):
    other = replace(COUNT, id="o", task="chat")
    setup = rewarded(sound, {"name": "exact_answer", "tasks": ["data"]}, {"name": "think_format", "tasks": ["chat"]},
                     problems=[problem(0), other])
    assert {f.level for f in check_training(setup)} == {"ok"}


def test_a_rewards_task_that_no_problem_has_is_a_fault_with_the_nearest(sound):
    fault = only(rewarded(sound, {"name": "exact_answer", "tasks": ["dta"]}), "fault", "rewards.tasks")
    assert fault.what == "exact_answer: no problem is of the task 'dta'"
    assert fault.cure == "did you mean 'data'? the data has data"


def test_problems_whose_task_no_reward_is_for_are_a_warning_and_a_fault_where_it_is_all(sound):
    reward = {"name": "think_format", "tasks": ["data"]}
    other = replace(problem(9), id="o", task="chat")
    warning = only(rewarded(sound, reward, problems=[problem(0), other]), "warn", "data.rewards")
    assert "1 of 2 problems are of a task that no reward is for, chat (o)" in warning.what and "`tasks`" in warning.cure
    held_out = Part(key="eval_data", path="eval.jsonl", problems=[other], rewards=(RewardConfig(**reward),))
    setup = rewarded(sound, reward)
    fault = only(replace(setup, parts=(*setup.parts, held_out)), "fault", "eval_data.rewards")
    assert "1 of 1" in fault.what and "eval.jsonl" in fault.cure


def test_a_column_that_a_users_function_asks_for_and_no_row_has_is_a_fault(sound):
    def score(completions, difficulty, scale=2, **kwargs):
        return []

    asking = replace(sound, rewards=(RewardFunction(name="score", weight=1.0, call=score),))
    fault = only(asking, "fault", "rewards.score")
    assert "the column 'difficulty', which no row of data.jsonl has" in fault.what
    near = data(asking, problems=[replace(problem(0), columns={"dificulty": 1})])
    assert "did you mean 'dificulty'?" in only(near, "fault", "rewards.score").cure
    assert well(data(asking, problems=[replace(problem(0), columns={"difficulty": 1})]), "data")


def judged_by(setup: Setup, tokenizer) -> Setup:
    """With a reward model that has this tokenizer."""
    model = RewardModel(RewardModelOptions(path="judge"), config_of(len(tokenizer)), tokenizer)
    return replace(setup, rewards=(RewardFunction(name="reward_model", weight=1.0, call=model),))


def test_a_reward_model_reads_text_and_its_differences_are_told_but_are_no_fault(sound):
    assert well(judged_by(sound, sound.student.tokenizer), "rewards.reward_model") == (
        "reads text through its own tokenizer and chat template, which are the student's too")
    told = well(judged_by(sound, tokenizer_of(vocab_size=300, alphabet="bytes")), "rewards.reward_model")
    assert told.startswith("reads text through its own tokenizer and chat template, which differ from the student's: ")
    assert "vocabulary alone" in told


def test_characters_that_a_reward_models_tokenizer_lacks_are_a_warning(sound):
    digits = train_tokenizer(["0123456789"], vocab_size=32, alphabet="corpus")
    warning = only(judged_by(sound, digits), "warn", "rewards.reward_model.unknown")
    assert "5 of 5 prompts" in warning.what and "<unk>" in warning.what and "`bytes`" in warning.cure


def test_a_reward_model_whose_template_cannot_write_the_problems_is_a_fault_and_some_of_them_a_warning(sound):
    system = (Message("system", "it is."), Message("user", "what is 1 + 2?"))
    strict = tokenizer_of(chat_template="{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}"
                                        "{% endif %}" + COMPACT)
    odd = replace(problem(7), messages=system)
    some = only(judged_by(data(sound, problems=[problem(0), odd]), strict), "warn", "rewards.reward_model.template")
    assert "cannot write 1 of 2 problems" in some.what and "first is data:7" in some.what and some.cure
    every = only(judged_by(data(sound, problems=[odd]), strict), "fault", "rewards.reward_model.template")
    assert "1 of 1" in every.what


# --- how faults are told


def test_all_faults_are_raised_at_once_a_line_each_with_its_cure():
    findings = [Finding("fault", "a", "broken", "mend a"), Finding("warn", "b", "odd", "look"),
                Finding("ok", "c", "fine"), Finding("fault", "d", "gone", "find d")]
    with pytest.raises(ConfigError) as raised:
        raise_faults(findings)
    assert str(raised.value).split("\n") == ["2 faults, found before any compute:", "  a: broken; mend a",
                                             "  d: gone; find d"]
    with pytest.raises(ConfigError, match="^a: broken; mend a$"):
        raise_faults(findings[:3])
    assert raise_faults(findings[1:3]) == [findings[1]]


def test_an_error_is_split_into_what_and_cure():
    error = DataError("data: x.jsonl, line 3:\nnot JSON; write objects; one per line")
    assert fault_of("data", error) == Finding("fault", "data", "x.jsonl, line 3: not JSON",
                                              "write objects; one per line")
    assert fault_of("data", DataError("gone")) == Finding("fault", "data", "gone", "")


def test_a_folder_that_is_not_there_is_one_fault_and_not_one_for_config_and_one_for_tokenizer():
    reader = Reader()
    files = reader.model("teacher", ModelConfig(path="/no/such/folder"))
    assert (files.config, files.tokenizer) == (None, None)
    assert [(f.name, f.what) for f in reader.faults] == [("teacher", "/no/such/folder: no such model folder")]


# --- the verb


@pytest.fixture
def files(folder, tmp_path) -> SimpleNamespace:
    """A distill config and an sft config that work, as raw mappings."""
    rows = [{"prompt": f"what is {i} + 2?", "completion": "it is 4.", "answer": "4"} for i in range(4)]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {"data": {"path": str(path)}, "device": "cpu", "output_dir": str(tmp_path / "run")}
    return SimpleNamespace(
        folder=tmp_path, data=path,
        distill=shared | {"student": {"path": str(folder)}, "teacher": {"path": str(folder)},
                          "rollout": {"max_completion_length": 16}},
        sft=shared | {"model": {"path": str(folder)}},
        reinforce=shared | {"algorithm": "grpo", "model": {"path": str(folder)}, "rewards": [{"name": "exact_answer"}],
                            "rollout": {"max_completion_length": 16}},
        dpo={"algorithm": "dpo"} | shared | {"model": {"path": str(folder)}})


def write(files: SimpleNamespace, raw: dict) -> Path:
    path = files.folder / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def consult(files: SimpleNamespace, raw: dict, *overrides: str) -> tuple[dict, str]:
    """(result, printed text) of the verb."""
    stream = io.StringIO()
    with Console(plain=True, stream=stream) as console:
        return doctor(write(files, raw), overrides, console, VERBS), stream.getvalue()


@pytest.mark.parametrize("verb, overrides", [
    ("distill", ()), ("sft", ()), ("reinforce", ()), ("reinforce", ("algorithm=ppo",)),
    ("reinforce", ("algorithm=vapo", "value.trunk=shared", "value.pretrain_steps=0",
                   "value.num_mini_batches=1")), ("dpo", ()),
    ("dpo", ("algorithm=rm",))])
def test_a_config_that_works_has_no_faults_and_nothing_is_written(files, verb, overrides):
    if verb == "dpo":
        files.data.write_text('{"prompt": "what is 1 + 2?", "chosen": "it is 3.", "rejected": "it is 4."}\n')
    raw = getattr(files, verb)
    result, printed = consult(files, raw, *overrides)
    assert (result["faults"], result["warnings"]) == (0, 0)
    assert json.loads(json.dumps(result))["machine"]["versions"]["torch"] == metadata.version("torch")
    assert "ok    disk: about" in printed and "config.yaml: faults 0, warnings 0" in printed
    assert sorted(p.name for p in files.folder.iterdir()) == ["config.yaml", "data.jsonl"]


def test_what_cannot_be_read_is_a_fault_each_and_the_other_checks_still_run(files):
    files.data.write_text('{"prompt": "what is 1 + 2?"}\n{"prompt": \n')
    result, printed = consult(files, files.distill, "teacher.path=/no/such/teacher", "eval_data={path: gone.jsonl}",
                              "rewards=[{file: no_such.py, function: score}]", "output_dir=/proc/self/run")
    faults = {f["name"]: f for f in result["findings"] if f["level"] == "fault"}
    assert set(faults) == {"teacher", "rewards", "data", "eval_data", "output_dir"}
    assert faults["teacher"]["what"] == "/no/such/teacher: no such model folder"
    assert f"{files.data}, line 2: not valid JSON" in faults["data"]["what"]
    assert faults["data"]["cure"] == "write one JSON object per line"
    assert result["faults"] == 5 and "FAULT teacher: /no/such/teacher: no such model folder -> give a" in printed
    assert {"vocabulary", "student.eos"} <= {f["name"] for f in result["findings"] if f["level"] == "ok"}


def test_a_model_folder_without_a_tokenizer_is_a_fault_that_says_how_to_save_one(files, folder):
    bare = files.folder / "bare"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    result, _ = consult(files, files.sft, f"model.path={bare}")
    assert [(f["name"], f["level"]) for f in result["findings"] if f["level"] != "ok"] == [("model.tokenizer", "fault")]
    assert f"save_pretrained('{bare}')" in next(f["cure"] for f in result["findings"] if f["level"] == "fault")


def test_an_sft_run_needs_a_completion_for_every_problem(files):
    files.data.write_text('{"prompt": "what is 1 + 2?"}\n')
    result, _ = consult(files, files.sft)
    assert [f["name"] for f in result["findings"] if f["level"] == "fault"] == ["data.completions"]


def test_distillation_needs_completions_only_where_lmbda_mixes_them_in(files):
    files.data.write_text('{"prompt": "what is 1 + 2?"}\n')
    assert consult(files, files.distill)[0]["faults"] == 0
    result, _ = consult(files, files.distill, "rollout.lmbda=0.5")
    assert [f["name"] for f in result["findings"] if f["level"] == "fault"] == ["data.completions"]


def test_a_run_folder_that_is_taken_is_a_warning_naming_resume_and_overwrite(files):
    (files.folder / "run").mkdir()
    (files.folder / "run" / "config.resolved.yaml").write_text("")
    result, printed = consult(files, files.sft)
    assert (result["faults"], result["warnings"]) == (0, 1)
    assert "warn  output_dir:" in printed and "--resume" in printed and "--overwrite" in printed


def test_a_config_of_no_verb_is_an_error_that_names_the_keys(files):
    with pytest.raises(ConfigError, match="no key `student`.*no key `model`.*no key `stages`.*it has data, teacher; "
                                          "give the file that `tinyr2 sft`, `tinyr2 distill`, `tinyr2 reinforce` or "
                                          "`tinyr2 pipeline`"):
        read_config(write(files, {"data": {"path": "x"}, "teacher": {"path": "y"}}), (), VERBS)
    with pytest.raises(ConfigError, match="no such config file"):
        read_config(files.folder / "gone.yaml", (), VERBS)
    with pytest.raises(ConfigError, match="studnt.*|student.pth: unknown key; did you mean 'path'"):
        read_config(write(files, files.distill | {"student": {"pth": "x"}}), (), VERBS)


@pytest.mark.parametrize("keys, verb", [
    ({"student", "teacher", "data", "rewards", "rollout"}, "distill"), ({"model", "data"}, "sft"),
    ({"model", "data", "eval_data", "rewards", "train", "eval"}, "sft"), ({"model", "rewards", "rollout"}, "reinforce"),
    ({"model", "rewards", "teacher", "opd"}, "reinforce"), ({"algorithm"}, "reinforce"), ({"stages"}, "pipeline"),
    ({"stages", "model"}, "pipeline"), ({"data", "teacher"}, None), (set(), None)])
def test_the_keys_of_a_config_tell_its_verb(keys, verb):
    assert verb_of(dict.fromkeys(keys)) == verb


def test_an_algorithm_that_learns_from_pairs_is_a_verb_of_its_own():
    assert [verb_of({"model": {}, "algorithm": name}) for name in ("dpo", "rm", "grpo")] == ["dpo", "rm", "reinforce"]


@pytest.mark.parametrize("overrides, name, what", [
    (("reference.path=/gone",), "reference", "no such model folder"),
    (("algorithm=ppo", "value.path=/gone"), "value", "no such model folder"),
    (("sampling.adapt={mix: {dta: 1.0}}",), "sampling.adapt", "no problem is of 'dta'"),
    (("rewards=[{name: exact_answer, tasks: [dat]}]",), "rewards.tasks", "no problem is of the task 'dat'"),
    (("rewards=[{name: countdown}]",), "data.numbers", "no column `numbers`"),
])
def test_what_is_wrong_with_a_reinforcement_is_known_before_any_compute(files, overrides, name, what):
    result, _ = consult(files, files.reinforce, *overrides)
    (fault,) = [f for f in result["findings"] if f["level"] == "fault"]
    assert fault["name"] == name and what in fault["what"] and fault["cure"]


def test_rewards_to_measure_by_are_read_too(files):
    missing = (f"eval_data={{path: {files.data}}}", "eval_rewards=[{file: gone.py, function: f}]")
    result, _ = consult(files, files.reinforce, *missing)
    assert [f["name"] for f in result["findings"] if f["level"] == "fault"] == ["eval_rewards"]


def pipeline_of(files) -> dict:
    sft_stage = {k: v for k, v in files.sft.items() if k != "output_dir"}
    later = sft_stage | {"model": {"path": "stage:cold"}}
    return {"output_dir": files.sft["output_dir"], "stages": [
        {"name": "cold", "verb": "sft", "config": sft_stage}, {"name": "more", "verb": "sft", "config": later}]}


def test_a_pipelines_stages_are_checked_as_far_as_what_they_read_is_there(files, folder):
    result, printed = consult(files, pipeline_of(files))
    assert result["faults"] == 0
    assert "ok    stage cold: student.eos" not in printed and "ok    stage cold: model.eos: answers end with" in printed
    assert "ok    stage more: the settings of sft fit; the rest is checked once stage:cold is there" in printed
    shutil.copytree(folder, files.folder / "run/cold/final")
    assert "ok    stage more: model.eos: answers end with" in consult(files, pipeline_of(files))[1]


@pytest.mark.parametrize("override, name, what", [
    ("stages.1.config.model.path=stage:cld", "stage more (sft)", "stage:cld: no stage of that name comes before"),
    ("stages.1.config.modl=1", "stage more (sft)", "modl: unknown key"),
    ("stages.1.verb=sfd", "stage more", "no verb 'sfd'"),
    ("stages.1.config.data.path=gone.jsonl", "stage more", "gone.jsonl: no such file"),
    ("stages.0.config.data.path=gone.jsonl", "stage cold: data", "gone.jsonl: no such file"),
    ("compare={data: {path: gone.jsonl}}", "compare", "gone.jsonl: no such file"),
])
def test_what_is_wrong_with_a_stage_is_a_fault_that_names_it(files, override, name, what):
    result, _ = consult(files, pipeline_of(files), override)
    (fault,) = [f for f in result["findings"] if f["level"] == "fault"]
    assert fault["name"] == name and fault["what"].startswith(what) and fault["cure"]


def test_without_a_config_the_machine_is_described(capsys):
    with Console(plain=True) as console:
        result = doctor(None, (), console, VERBS)
    assert (result["findings"], result["faults"], result["config"]) == ([], 0, None)
    printed = capsys.readouterr().out
    assert f"torch {torch.__version__.partition('+')[0]}" in printed and "MiB free" in printed
    assert "accelerator: " in printed and "processor: " in printed


def test_what_a_machine_does_not_tell_is_left_out_and_gpus_are_listed():
    gpu = {"name": "H200", "memory_mib": 143_360, "capability": "9.0"}
    machine = describe_machine() | {"threads": 2, "cuda": [gpu],
                                    "memory": {"total_mib": None, "available_mib": None, "limit_mib": None}}
    lines = machine_lines(machine)
    assert "accelerator: H200 (143,360 MiB, compute capability 9.0)" in lines
    assert not any(line.startswith("memory") for line in lines)
    assert "accelerator: none" in machine_lines(machine | {"cuda": [], "mps": False})


def test_a_finding_is_one_line_with_an_arrow_to_its_cure():
    assert as_line(Finding("fault", "disk", "full", "free some")) == "FAULT disk: full -> free some"
    assert as_line(Finding("ok", "disk", "fine")) == "ok    disk: fine"


# --- the training verbs


@pytest.mark.parametrize("verb", ["distill", "sft"])
def test_a_training_verb_stops_at_all_faults_before_it_writes_anything(files, verb):
    raw = getattr(files, verb) | {"train": {"load_best_model_at_end": True}, "data": {"path": "gone.jsonl"}}
    config = build(distill.DistillConfig if verb == "distill" else sft.SftConfig, raw, "test")
    with Console(plain=True, stream=io.StringIO()) as console, pytest.raises(ConfigError) as raised:
        (distill.distill if verb == "distill" else sft.sft)(config, console)
    lines = str(raised.value).split("\n")
    assert lines[0] == "2 faults, found before any compute:"
    assert lines[1].startswith("  data: gone.jsonl: no such file")
    assert lines[2].startswith("  train.load_best_model_at_end:")
    assert not Path(config.output_dir).exists()


@pytest.mark.parametrize("recipe, config_class", [(distill, distill.DistillConfig), (sft, sft.SftConfig)])
def test_a_training_verb_tells_each_warning_once_and_goes_on(files, recipe, config_class):
    raw = files.distill if recipe is distill else files.sft
    config = build(config_class, raw | {"train": {"eval_steps": 5}}, "test")
    stream = io.StringIO()
    with Console(plain=True, stream=stream) as console:
        inputs = checked_inputs(recipe.read_setup(config), console)
    assert len(inputs.problems) == 4 and inputs.held_out == [] and inputs.vocab == len(inputs.tokenizer)
    assert stream.getvalue().count("warning: train.eval_steps: no evaluation of this run gives a figure; add") == 1
    assert stream.getvalue().count("\n") == 1


def test_what_the_doctor_examines_is_what_the_verb_checks(files):
    config = read_config(write(files, files.sft), ["data.path=gone.jsonl"], VERBS)
    assert [f.line for f in examine(config, VERBS) if f.level == "fault"] == [
        f.line for f in check_training(sft.read_setup(config)) if f.level == "fault"]


def test_the_byte_level_template_of_build_has_nothing_wrong_with_it(sound):
    chatml = tokenizer_of(vocab_size=300, alphabet="bytes")
    assert chatml.chat_template == CHATML
    config = config_of(len(chatml), eos_token_id=chatml.eos_token_id)
    both = teacher(student(sound, tokenizer=chatml, config=config), tokenizer=chatml, config=config)
    assert well(both, "student.eos") == "answers end with '<|im_end|>'"


def test_a_masked_language_model_is_no_student(sound, tokenizer):
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=16, max_position_embeddings=64, eos_token_id=tokenizer.eos_token_id)
    assert "bert" in only(student(sound, config=config), "warn", "student.packing").what
