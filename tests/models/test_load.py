"""Models in and out of folders: what is read, what is refused, and what a merged adapter leaves behind."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tests.train.tiny import qwen3
from tinyr2.core.errors import ConfigError, DataError
from tinyr2.models import load
from tinyr2.models.load import LoraConfig, ModelConfig, add_lora, load_model, load_tokenizer, save_model, weights_hash
from tinyr2.tokens.build import train_tokenizer

CPU = torch.device("cpu")
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["1+2=3", "4+5=9"], vocab_size=22, alphabet="corpus")


@pytest.fixture(scope="module")
def sound(tmp_path_factory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("model") / "sound"
    save_model(qwen3(), tokenizer, folder)
    return folder


@pytest.fixture
def broken(sound, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(sound, tmp_path / "broken"))


def edit(folder: Path, **changes) -> ModelConfig:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return ModelConfig(path=str(folder))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


# --- in


def test_a_loaded_model_is_the_saved_one_in_eval_mode(sound):
    model = load_model(ModelConfig(path=str(sound)), CPU)
    assert not model.training
    assert next(model.parameters()).dtype == torch.float32
    assert torch.equal(logits(model), logits(qwen3()))
    assert weights_hash(model) == weights_hash(qwen3())
    assert weights_hash(qwen3()) != weights_hash(qwen3(seed=1))


def test_the_dtype_is_that_of_the_config_and_auto_is_float32_off_cuda(sound):
    model = load_model(ModelConfig(path=str(sound), dtype="bfloat16"), CPU)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert load.pick_dtype("auto", CPU) == load.pick_dtype("float32", CPU) == torch.float32
    assert load.pick_dtype("auto", torch.device("cuda")) == torch.bfloat16


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/model", "~/nowhere", "a/b/c"])
def test_a_path_that_is_no_folder_is_not_taken_for_a_hub_name(path):
    for read in (load.load_config, load_tokenizer, lambda c: load_model(c, CPU)):
        with pytest.raises(DataError, match=f"{path}: no such model folder"):
            read(ModelConfig(path=path))


def test_a_folder_without_config_weights_or_tokenizer_says_what_is_lacking(broken):
    config = ModelConfig(path=str(broken))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (broken / name).unlink()
    with pytest.raises(DataError, match="a model folder without a tokenizer; save the tokenizer it was trained with"):
        load_tokenizer(config)
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    with pytest.raises(DataError, match="cannot load its weights"):
        load_model(config, CPU)
    (broken / "config.json").unlink()
    with pytest.raises(DataError, match="a folder without config.json is not a model"):
        load_model(config, CPU)


def test_a_pickle_is_never_read(broken):
    weights = load_model(ModelConfig(path=str(broken)), CPU).state_dict()
    (broken / "model.safetensors").unlink()
    torch.save(weights, broken / "pytorch_model.bin")
    with pytest.raises(DataError, match="cannot load its weights"):
        load_model(ModelConfig(path=str(broken)), CPU)


def test_weights_that_do_not_fill_the_model_are_refused_and_not_made_up(broken):
    with pytest.raises(DataError, match=r"lack 11 tensors that config.json asks for, e.g. model.layers.2"):
        load_model(edit(broken, num_hidden_layers=3, layer_types=None), CPU)


def test_weights_of_another_shape_and_damaged_ones_are_refused(broken):
    with pytest.raises(DataError, match="cannot load its weights"):
        load_model(edit(broken, vocab_size=99), CPU)
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[:len(data) // 2])
    with pytest.raises(DataError, match="cannot load its weights: .*; a model folder holds config.json and"):
        load_model(edit(broken, vocab_size=23), CPU)


def test_a_config_of_an_unknown_class_is_refused(broken):
    with pytest.raises(DataError, match="not a model that transformers knows"):
        load_model(edit(broken, model_type="qwen99"), CPU)


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_refused_with_those_that_are(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert load.pick_device() == load.pick_device("cpu") == CPU
    with pytest.raises(ConfigError, match=f"device {name}: .*device=cpu"):
        load.pick_device(name)


def test_auto_takes_cuda_before_mps_before_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert load.pick_device().type == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert load.pick_device().type == "mps"


def test_tied_embeddings_count_once():
    # 2 layers of 16·16 for q, 2·16·8 for k and v, 16·16 for o, 3·16·24 for the ffn, 2·16+2·8 for norms; last norm 16
    inner = 2 * (256 + 256 + 256 + 1152 + 48) + 16
    assert load.count_parameters(qwen3()) == (inner + 23 * 16, inner)
    loose = AutoModelForCausalLM.from_config(type(qwen3().config).from_dict(
        qwen3().config.to_dict() | {"tie_word_embeddings": False}))
    assert load.count_parameters(loose) == (inner + 2 * 23 * 16, inner)


# --- adapters


def adapted(seed: int = 0, **settings):
    """A model whose adapters have moved: a fresh one changes nothing."""
    model = add_lora(qwen3(), LoraConfig(**{"r": 3, "lora_alpha": 6} | settings), seed)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def test_adapters_alone_are_trained_and_begin_as_nothing():
    model = add_lora(qwen3(), LoraConfig(r=3), seed=0)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert len(trained) == 2 * 2 * 7  # A and B for each of 7 linear layers in 2 blocks
    assert torch.equal(logits(model), logits(qwen3()))


def test_a_seed_gives_the_same_adapters_whatever_was_drawn_before():
    first = weights_hash(add_lora(qwen3(), LoraConfig(r=3), seed=0))
    torch.rand(5)
    assert weights_hash(add_lora(qwen3(), LoraConfig(r=3), seed=0)) == first
    assert weights_hash(add_lora(qwen3(), LoraConfig(r=3), seed=1)) != first


@pytest.mark.parametrize("modules", ["all-linear", ("q_proj", "down_proj")])
def test_a_saved_adapter_is_a_plain_merged_folder_and_the_model_goes_on_unmerged(modules, tmp_path, tokenizer):
    model = adapted(target_modules=modules)
    before, digest = logits(model), weights_hash(model)
    save_model(model, tokenizer, tmp_path / "m")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert isinstance(merged, PreTrainedModel) and type(merged).__name__ == "Qwen3ForCausalLM"
    assert not list((tmp_path / "m").glob("adapter*"))
    assert sorted(merged.state_dict()) == sorted(qwen3().state_dict())
    torch.testing.assert_close(logits(merged), before, rtol=0, atol=1e-5)
    assert float((before - logits(qwen3())).abs().max()) > 1e-3
    assert weights_hash(model) == digest
    assert AutoTokenizer.from_pretrained(tmp_path / "m").get_vocab() == tokenizer.get_vocab()


def test_a_bfloat16_model_is_merged_in_float32_and_rounded_once(tmp_path, tokenizer):
    model = adapted().to(torch.bfloat16)
    name = "model.layers.0.mlp.up_proj"
    wrapped = model.get_base_model().get_submodule(name)
    down, up = wrapped.lora_A["default"].weight.float(), wrapped.lora_B["default"].weight.float()
    expected = (wrapped.base_layer.weight.float() + 2.0 * (up @ down)).to(torch.bfloat16)  # alpha / r = 2
    save_model(model, tokenizer, tmp_path / "m")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "m").get_submodule(name).weight
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("modules", "message"), [
    ("nonsense", "lora.target_modules: Target modules nonsense not found"),
    (("q_proj", "lm_head"), "takes in the output head"),
    (("q_proj", "embed_tokens"), "takes in the embeddings, which are the output head too"),
])
def test_adapters_where_they_cannot_be_are_refused(modules, message):
    with pytest.raises(ConfigError, match=message):
        add_lora(qwen3(), LoraConfig(target_modules=modules), 0)


@pytest.mark.parametrize("setting", [{"r": 0}, {"lora_alpha": 0}, {"lora_dropout": 1.0}])
def test_settings_that_make_no_adapter_are_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        LoraConfig(**setting)
