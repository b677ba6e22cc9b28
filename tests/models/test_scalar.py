"""Models that give one number per token: what they are made from, what they give, and that stock code agrees."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedTokenizerFast,
)

from tests.models.test_packed import SHAPE, make, pack
from tests.train.tiny import qwen3
from tinyr2.core.errors import DataError
from tinyr2.models import packed
from tinyr2.models.load import ModelConfig, save_model
from tinyr2.models.scalar import load_scalar, pooling_pad, save_scalar, scalars
from tinyr2.tokens.build import train_tokenizer

CPU = torch.device("cpu")
KINDS = ["llama", "mistral", "qwen2", "qwen3", "deepseek_v2", "deepseek_v3"]


@pytest.fixture(scope="module")
def tokenizer():
    """Its padding token is the one that ends an answer."""
    found = train_tokenizer(["1+2=3", "4+5=9"], vocab_size=22, alphabet="corpus")
    found.pad_token = found.eos_token
    return found


@pytest.fixture(scope="module")
def causal(tmp_path_factory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("causal") / "m"
    save_model(qwen3(), tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def reward_model(causal, tmp_path_factory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("reward") / "m"
    save_scalar(scored(load(causal)), tokenizer, folder)
    return folder


def load(folder: Path, **more) -> torch.nn.Module:
    return load_scalar(ModelConfig(path=str(folder), **more), CPU)


def scored(model: torch.nn.Module) -> torch.nn.Module:
    """With a `score` that tells tokens apart."""
    torch.manual_seed(3)
    torch.nn.init.normal_(model.score.weight)
    return model


def rows_of(tokenizer, lengths: list[int]) -> list[torch.Tensor]:
    """Rows that end with the token that ends an answer, which stands inside the longer ones too."""
    rng = torch.Generator().manual_seed(1)
    rows = [torch.randint(4, 20, (n,), generator=rng) for n in lengths]
    for row in rows:
        row[len(row) // 2] = row[-1] = tokenizer.eos_token_id
    return rows


def packed_scores(model: torch.nn.Module, rows: list[torch.Tensor]) -> torch.Tensor:
    """One number per row, at its last token."""
    last = torch.tensor([len(r) for r in rows]).cumsum(0) - 1
    with torch.no_grad():
        return scalars(model, packed.hidden_states(model, *pack(rows)))[last]


@pytest.mark.parametrize("kind", KINDS)
def test_a_causal_lms_folder_gives_its_body_and_a_value_of_zero_everywhere(kind, tokenizer, tmp_path):
    model = make(kind)
    save_model(model, tokenizer, tmp_path / "m")
    scalar = load(tmp_path / "m")
    rows = rows_of(tokenizer, [5, 12, 1])
    with torch.no_grad():
        found = packed.hidden_states(scalar, *pack(rows))
        assert torch.equal(found, packed.hidden_states(model, *pack(rows)))
    assert scalars(scalar, found).tolist() == [0.0] * 18
    assert not scalar.training and scalar.config.num_labels == 1
    assert all(p.requires_grad and not p.is_meta for p in scalar.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_packed_numbers_are_those_of_the_stock_forward_on_each_row_alone(kind, tokenizer, tmp_path):
    save_model(make(kind), tokenizer, tmp_path / "causal")
    model = scored(load(tmp_path / "causal"))
    save_scalar(model, tokenizer, tmp_path / "m")
    rows = rows_of(tokenizer, [5, 23, 1, 9])
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m")
    with torch.no_grad():
        alone = torch.cat([stock(r[None]).logits[:, 0] for r in rows])
    torch.testing.assert_close(packed_scores(model, rows), alone, rtol=0, atol=1e-5)
    assert alone.std() > 1e-2


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_stock_batch_reads_the_last_real_token_also_where_pad_was_eos(side, reward_model, tokenizer):
    rows = rows_of(tokenizer, [5, 23, 2, 9])
    stock = AutoModelForSequenceClassification.from_pretrained(reward_model)
    padding = AutoTokenizer.from_pretrained(reward_model, padding_side=side)
    batch = padding.pad({"input_ids": [r.tolist() for r in rows]}, return_tensors="pt")
    with torch.no_grad():
        found = stock(**batch).logits[:, 0]
    torch.testing.assert_close(found, packed_scores(load(reward_model), rows), rtol=0, atol=1e-5)
    assert stock.config.pad_token_id == padding.pad_token_id != tokenizer.eos_token_id


def test_saving_leaves_the_tokenizer_as_it_was_and_a_folder_that_loads_as_saved(reward_model, tokenizer):
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    again = load(reward_model)
    written = load_file(reward_model / "model.safetensors")
    named = dict(again.named_parameters())
    assert written.keys() == named.keys()
    assert all(torch.equal(written[n], named[n]) for n in written)
    assert json.loads((reward_model / "config.json").read_text())["architectures"] == ["Qwen3ForSequenceClassification"]
    assert {p.dtype for p in load(reward_model, dtype="bfloat16").parameters()} == {torch.bfloat16}


def test_the_numbers_gradients_are_those_of_the_product(reward_model):
    model = load(reward_model).double()
    hidden = torch.randn(7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weight = torch.arange(1.0, 8.0, dtype=torch.float64)
    (scalars(model, hidden) * weight).sum().backward()
    torch.testing.assert_close(hidden.grad, weight[:, None] * model.score.weight, rtol=1e-12, atol=0)
    torch.testing.assert_close(model.score.weight.grad[0], (weight[:, None] * hidden).sum(0), rtol=1e-12, atol=1e-12)


def test_half_precision_states_give_float32_numbers(reward_model):
    model = load(reward_model, dtype="bfloat16")
    hidden = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = scalars(model, hidden)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, hidden.float() @ model.score.weight.float()[0])


# --- refused


def spoiled(folder: Path, to: Path, **changes) -> Path:
    """A copy whose config says something else."""
    shutil.copytree(folder, to)
    said = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(said | changes))
    return to


def test_a_reward_model_that_lacks_its_score_is_refused(reward_model, tmp_path):
    folder = spoiled(reward_model, tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match="lack 1 tensors that config.json asks for, e.g. score.weight"):
        load(folder)


@pytest.mark.parametrize("name", ["causal", "reward_model"])
def test_weights_that_are_lacking_or_damaged_are_refused(name, request, tmp_path):
    folder = spoiled(request.getfixturevalue(name), tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match="lack 1 tensors that config.json asks for, e.g. model.layers.1.mlp.up_proj"):
        load(folder)
    (folder / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="cannot load its weights"):
        load(folder)


def test_a_classifier_with_more_than_one_label_is_refused(reward_model, tmp_path):
    folder = spoiled(reward_model, tmp_path / "m", id2label={"0": "no", "1": "yes"}, label2id={"no": 0, "yes": 1})
    with pytest.raises(DataError, match="a classifier with 2 labels; .* num_labels=1"):
        load(folder)


def test_a_class_without_a_sequence_classifier_is_refused(tokenizer, tmp_path):
    save_model(OlmoeForCausalLM(OlmoeConfig(**SHAPE, num_experts=4, num_experts_per_tok=2)), tokenizer, tmp_path / "m")
    with pytest.raises(DataError, match="no sequence classifier for olmoe models"):
        load(tmp_path / "m")


def test_a_tokenizer_whose_every_special_token_ends_an_answer_is_refused(tokenizer):
    lone = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<|end|>": 0, "1": 1}, unk_token="1")),
                                   eos_token="<|end|>", pad_token="<|end|>")
    lone.chat_template = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
    with pytest.raises(DataError, match="its only special tokens end an answer"):
        pooling_pad(lone)
    lone.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    assert lone.convert_ids_to_tokens(pooling_pad(lone)) == "<|user|>"
