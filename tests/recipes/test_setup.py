"""What the training verbs share: the device, the models' identity, the way back from a checkpoint and to the end."""

import io
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from tests.recipes.tiny import torch_as_it_was
from tests.train.tiny import qwen3
from tinyr2.core.config import Config
from tinyr2.core.errors import ConfigError, RunError
from tinyr2.models.load import save_model, weights_hash
from tinyr2.recipes import setup
from tinyr2.recipes.run import open_run
from tinyr2.report.console import Console
from tinyr2.report.jsonl import read_jsonl
from tinyr2.tokens.build import train_tokenizer
from tinyr2.train import state as checkpoint
from tinyr2.train.loop import Job, StepResult, TrainConfig

CPU = torch.device("cpu")


class Settings(Config):
    output_dir: str


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["1+2=3", "4+5=9"], vocab_size=22, alphabet="corpus")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer) -> Path:
    path = tmp_path_factory.mktemp("model") / "m"
    save_model(qwen3(), tokenizer, path)
    return path


def opened(path: Path, stream=None, **options):
    return open_run(Settings(output_dir=str(path)), "sft", Console(plain=True, stream=stream or io.StringIO()), total=4,
                    **{"resume": False, "overwrite": False} | options)


# --- device


def test_threads_and_exact_kernels_are_chosen_where_they_are_asked_for(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with torch_as_it_was():
        before = torch.get_num_threads()
        torch.use_deterministic_algorithms(False)
        assert setup.choose_device("cpu", TrainConfig()) == CPU
        assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == (before, False)
        setup.choose_device("cpu", TrainConfig(deterministic=True, num_threads=before + 1))
        assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == (before + 1, True)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.filterwarnings("ignore:User provided device_type", "ignore:CUDA is not available")
def test_products_are_bfloat16_on_cuda_and_where_they_are_asked_for():
    with setup.autocast(CPU)():
        assert not torch.is_autocast_enabled("cpu")
    with setup.autocast(torch.device("mps"))():
        assert not torch.is_autocast_enabled("cpu")
    context = setup.autocast(torch.device("cuda"))()
    assert (context.device, context.fast_dtype) == ("cuda", torch.bfloat16)
    with setup.autocast(CPU, bf16=True)():
        assert torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    assert not hasattr(setup.autocast(torch.device("cuda"), bf16=False)(), "fast_dtype")


@pytest.fixture
def processor(monkeypatch):
    """Sets what this machine's processor is taken for."""
    def be(name: str, avx512_bf16: bool = False, amx: bool = False) -> None:
        monkeypatch.setattr("platform.machine", lambda: name)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)

    return be


def test_bfloat16_is_refused_on_a_processor_that_would_emulate_it(processor):
    processor("x86_64")
    message = "train.bf16=true: this processor has no instructions for bfloat16 .* set train.bf16=false"
    with pytest.raises(ConfigError, match=message):
        setup.choose_device("cpu", TrainConfig(bf16=True))
    setup.require_bfloat16("x", torch.device("cuda"), "y")
    for change in ({"avx512_bf16": True}, {"amx": True}):
        processor("x86_64", **change)
        assert setup.choose_device("cpu", TrainConfig(bf16=True)) == CPU
    processor("arm64")
    assert setup.choose_device("cpu", TrainConfig(bf16=True)) == CPU


def test_an_optimizer_is_not_moved_to_the_cpu_from_there():
    with pytest.raises(ConfigError, match="train.optim_offload: the model is on the CPU already.* set it to false"):
        setup.choose_device("cpu", TrainConfig(optim_offload=True))


def learner(model, **train):
    return setup.learner_of(model, 23, CPU, TrainConfig(**train))


def test_a_learner_is_what_its_settings_say():
    found = learner(qwen3(), gradient_checkpointing=True, tokens_per_micro_batch=77, bf16=True)
    assert (found.gradient_checkpointing, found.tokens_per_micro_batch, found.dtype) == (True, 77, torch.bfloat16)
    assert (learner(qwen3()).gradient_checkpointing, learner(qwen3()).dtype) == (False, torch.float32)


def test_decoding_is_float32_on_a_cpu_unless_asked_for_otherwise(processor):
    processor("x86_64", avx512_bf16=True)
    exact, rounded = learner(qwen3()), learner(qwen3(), bf16=True)
    assert setup.decode_dtype("auto", exact) == setup.decode_dtype("auto", rounded) == torch.float32
    assert setup.decode_dtype("bfloat16", exact) == setup.decode_dtype("bfloat16", rounded) == torch.bfloat16
    assert setup.decode_dtype("float32", rounded) == torch.float32
    processor("x86_64")
    with pytest.raises(ConfigError, match="rollout.dtype=bfloat16: .* set rollout.dtype=auto"):
        setup.decode_dtype("bfloat16", exact)


def test_a_class_without_a_decode_copy_writes_in_the_precision_it_learns_in():
    other = GPT2LMHeadModel(GPT2Config(vocab_size=23, n_embd=8, n_layer=1, n_head=1, n_positions=16))
    for train, dtype, wrong in (({}, "float32", "bfloat16"), ({"bf16": True}, "bfloat16", "float32")):
        assert setup.decode_dtype("auto", learner(other, **train)) == getattr(torch, dtype)
        assert setup.decode_dtype(dtype, learner(other, **train)) == getattr(torch, dtype)
        with pytest.raises(ConfigError, match=f"rollout.dtype {wrong}: GPT2LMHeadModel .* writes in {dtype}, in which"):
            setup.decode_dtype(wrong, learner(other, **train))


# --- models


def test_a_student_trains_all_or_its_adapters_alone(folder):
    full = setup.load_student(setup.StudentConfig(path=str(folder)), CPU, seed=0)
    assert all(p.requires_grad for p in full.parameters())
    config = setup.StudentConfig(path=str(folder), lora={"r": 2})
    adapted = setup.load_student(config, CPU, seed=0)
    assert {"lora_" in name for name, p in adapted.named_parameters() if p.requires_grad} == {True}
    assert weights_hash(setup.load_student(config, CPU, seed=0)) == weights_hash(adapted)
    assert weights_hash(setup.load_student(config, CPU, seed=1)) != weights_hash(adapted)


def test_a_policy_stops_at_every_end_that_model_or_template_name(tokenizer):
    model = qwen3()
    model.generation_config.eos_token_id = [1, 2]
    policy = setup.policy_of(model, tokenizer, len(tokenizer), version=3)
    assert policy.stop == (tokenizer.eos_token_id, 1, 2)
    assert (policy.vocab, policy.context, policy.version) == (len(tokenizer), 64, 3)
    assert (policy.dtype, policy.exact) == (None, False)
    other = setup.policy_of(model, tokenizer, len(tokenizer), dtype=torch.bfloat16, exact=True)
    assert (other.dtype, other.exact, other.version) == (torch.bfloat16, True, 0)


def test_the_shared_vocabulary_is_the_smaller_models_and_holds_the_tokenizer(tokenizer):
    n = len(tokenizer)
    assert setup.shared_vocabulary(n, n + 8, tokenizer) == n
    assert setup.shared_vocabulary(n + 16, n + 8, tokenizer) == n + 8
    with pytest.raises(ConfigError, match=f"the tokenizer has {n} ids, the models hold {n} and {n - 1}"):
        setup.shared_vocabulary(n, n - 1, tokenizer)


def test_a_models_fingerprint_changes_with_its_config_and_its_weights_and_with_nothing_else(folder, tmp_path):
    first = setup.model_fingerprint(str(folder))
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    assert setup.model_fingerprint(str(copy)) == first
    (copy / "README.md").write_text("hello")
    assert setup.model_fingerprint(str(copy)) == first
    config = (copy / "config.json").read_bytes()
    (copy / "config.json").write_bytes(config + b"\n")
    assert setup.model_fingerprint(str(copy)) != first
    (copy / "config.json").write_bytes(config)
    weights = bytearray((copy / "model.safetensors").read_bytes())
    for at in (100, -1):
        weights[at] ^= 1
        (copy / "model.safetensors").write_bytes(bytes(weights))
        assert setup.model_fingerprint(str(copy)) != first
        weights[at] ^= 1
    big = copy / "other.safetensors"
    big.write_bytes(bytes(3 * 2**20))
    before = setup.model_fingerprint(str(copy))
    big.write_bytes(bytes(3 * 2**20 - 1) + b"1")
    assert before != setup.model_fingerprint(str(copy)) != first
    assert setup.model_fingerprint("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"


# --- there and back


def job_of(run, model, config: TrainConfig, **more) -> Job:
    def compute(step: int) -> StepResult:
        loss = model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss
        loss.backward()
        return StepResult(metrics={"loss": float(loss.detach())}, num_tokens=8)

    return Job(config=config, compute=compute, recorder=run, checkpoints=run.checkpoints, **more)


def test_a_fresh_state_begins_at_step_0_and_in_exact_mode_names_torch_and_threads(tmp_path):
    with opened(tmp_path / "run") as run:
        state = setup.restore(run, qwen3(), TrainConfig(), {"config": "a"}, resume=False)
        exact = setup.restore(run, qwen3(), TrainConfig(deterministic=True), {"config": "a"}, resume=False)
    assert (state.step, state.identity) == (0, {"config": "a"})
    assert exact.identity == {"config": "a", "torch": torch.__version__, "threads": str(torch.get_num_threads()),
                              "device": "cpu"}


def test_a_resumed_state_is_the_checkpoints_and_later_rows_are_forgotten(tmp_path, tokenizer):
    config = TrainConfig(max_steps=4, save_steps=2)
    with opened(tmp_path / "run") as run:
        model = qwen3()
        state = setup.restore(run, model, config, {"config": "a"}, resume=False)
        save = partial(save_model, model, tokenizer)
        assert setup.train_to_end(run, state, job_of(run, model, config), save) == "finished"
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000004")
    stream = io.StringIO()
    with opened(tmp_path / "run", stream, resume=True) as run:
        state = setup.restore(run, qwen3(seed=3), config, {"config": "a"}, resume=True)
        assert (state.step, state.num_tokens) == (2, 16)
        assert [row["step"] for row in read_jsonl(run.folder / "metrics.jsonl")] == [1, 2]
    assert "resuming from step-00000002" in stream.getvalue()
    with opened(tmp_path / "run", resume=True) as run, pytest.raises(RunError, match="config: 'a' in the checkpoint"):
        setup.restore(run, qwen3(), config, {"config": "b"}, resume=True)


def test_a_damaged_checkpoint_is_an_event_and_without_another_the_run_begins_anew(tmp_path):
    config = TrainConfig(max_steps=2, save_steps=2)
    with opened(tmp_path / "run") as run:
        state = setup.restore(run, qwen3(), config, {}, resume=False)
        run.record({"step": 1}, {"step": 1}, [])
        state.logs = run.cursors()
        checkpoint.save(run.checkpoints, state)
    (tmp_path / "run/checkpoints/step-00000000/model.safetensors").write_bytes(b"")
    stream = io.StringIO()
    with opened(tmp_path / "run", stream, resume=True) as run:
        assert setup.restore(run, qwen3(), config, {}, resume=True).step == 0
        assert read_jsonl(run.folder / "metrics.jsonl") == []
    events = read_jsonl(tmp_path / "run/events.jsonl")
    assert [(e["name"], e.get("level")) for e in events] == [
        ("checkpoint_set_aside", "critical"), ("checkpoint_set_aside", "critical"), ("resumed", None)]
    assert "step-00000000 is damaged" in events[0]["evidence"]
    assert "no checkpoint yet; starting from the beginning" in stream.getvalue()


def test_final_is_the_last_model_or_the_best_one_and_not_there_before_the_end(tmp_path, tokenizer):
    best = qwen3(seed=7)
    for name, expected in (("last", None), ("best", weights_hash(best))):
        config = TrainConfig(max_steps=2, load_best_model_at_end=name == "best")
        with opened(tmp_path / name) as run:
            model = qwen3()
            state = setup.restore(run, model, config, {}, resume=False)
            job = job_of(run, model, config, evaluate=lambda step: {"eval_loss": 1.0},
                         keep_best=lambda run=run: run.commit("best", lambda f: save_model(best, tokenizer, f)))
            assert setup.train_to_end(run, state, job, partial(save_model, model, tokenizer)) == "finished"
            found = weights_hash(AutoModelForCausalLM.from_pretrained(run.folder / "final"))
            assert found == (expected or weights_hash(model))


def test_a_run_that_was_halted_has_no_final_model(tmp_path, tokenizer):
    config = TrainConfig(max_steps=9)
    with opened(tmp_path / "run") as run:
        model = qwen3()
        job = Job(config=config, recorder=run, checkpoints=run.checkpoints,
                  compute=lambda step: StepResult(metrics={"loss": float("nan")}, num_tokens=0))
        state = setup.restore(run, model, config, {}, resume=False)
        assert setup.train_to_end(run, state, job, partial(save_model, model, tokenizer)) == "halted"
        assert not (run.folder / "final").exists()
