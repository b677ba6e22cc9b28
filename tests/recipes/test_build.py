"""`tinyr2 build`: the folder it writes, the tokenizers it makes, and the mistakes it names."""

import io
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tinyr2.core import config as configs
from tinyr2.core.errors import ConfigError, DataError, RunError
from tinyr2.models.presets import PRESETS
from tinyr2.recipes.build import BuildConfig, TokenizerConfig, build, make_tokenizer, read_texts
from tinyr2.report.console import Console

TINY = {"model_type": "qwen3", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 24, "max_position_embeddings": 64,
        "tie_word_embeddings": True}


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    rows = [{"prompt": f"{a}+{b}=", "completion": f"{a + b}", "id": "never-read"} for a in range(9) for b in range(9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(out: Path, texts: Path, **settings) -> BuildConfig:
    raw = {"output_dir": str(out), "model": TINY,
           "tokenizer": {"texts": str(texts), "vocab_size": 40, "alphabet": "corpus"}} | settings
    return configs.build(BuildConfig, raw, "test")


def run(settings: BuildConfig, **options) -> dict:
    return build(settings, Console(stream=io.StringIO(), plain=True), **options)


def test_the_folder_is_a_stock_model_whose_vocabulary_and_ids_follow_the_tokenizer(tmp_path, texts):
    out = tmp_path / "m"
    result = run(config(out, texts))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    for owner in (model.config, model.generation_config):
        assert (owner.pad_token_id, owner.bos_token_id, owner.eos_token_id) == (
            tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    assert tokenizer.model_max_length == 64
    # one layer: 16·16 for q, 2·16·8 for k and v, 16·16 for o, 3·16·24 for the ffn, 2·16+2·8 for norms; last norm 16
    inner = 256 + 256 + 256 + 1152 + 48 + 16
    assert result["params_without_embeddings"] == inner
    assert result["params"] == inner + 16 * len(tokenizer)


def test_one_seed_gives_the_same_bytes_whatever_was_drawn_before_and_another_seed_others(tmp_path, texts):
    run(config(tmp_path / "a", texts))
    torch.rand(7)
    before = torch.random.get_rng_state()
    run(config(tmp_path / "b", texts))
    run(config(tmp_path / "c", texts, seed=1))
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= set(names)
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)
    assert (tmp_path / "a/model.safetensors").read_bytes() != (tmp_path / "c/model.safetensors").read_bytes()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_bfloat16_is_the_rounded_float32_model(tmp_path, texts):
    run(config(tmp_path / "a", texts))
    run(config(tmp_path / "b", texts, dtype="bfloat16"))
    full, half = (load_file(tmp_path / n / "model.safetensors") for n in "ab")
    assert full.keys() == half.keys()
    assert all(torch.equal(full[name].bfloat16(), half[name]) for name in full)


def test_the_vocabulary_can_be_padded_or_given_but_not_smaller_than_the_tokenizer(tmp_path, texts):
    tokens = run(config(tmp_path / "a", texts))["vocab_size"]
    assert tokens % 64 != 0
    assert run(config(tmp_path / "b", texts, pad_vocab_to_multiple_of=64))["vocab_size"] == 64
    assert run(config(tmp_path / "c", texts, model=TINY | {"vocab_size": 50}))["vocab_size"] == 50
    with pytest.raises(ConfigError, match=f"vocab_size 5: the tokenizer has {tokens} tokens"):
        run(config(tmp_path / "d", texts, model=TINY | {"vocab_size": 5}))
    with pytest.raises(ConfigError, match="give one of them"):
        config(tmp_path / "d", texts, model=TINY | {"vocab_size": 50}, pad_vocab_to_multiple_of=64)


def test_fields_lie_over_a_preset_key_by_key(tmp_path, texts):
    over = {"num_hidden_layers": 1, "rope_parameters": {"rope_theta": 5.0}}
    run(config(tmp_path / "m", texts, preset="qwen3-tiny", model=over))
    written = json.loads((tmp_path / "m/config.json").read_text())
    assert written["num_hidden_layers"] == 1
    assert written["rope_parameters"] == {"rope_theta": 5.0, "rope_type": "default"}
    assert written["hidden_size"] == PRESETS["qwen3-tiny"]["hidden_size"] == 32
    assert PRESETS["qwen3-tiny"]["rope_parameters"]["rope_theta"] == 1e4  # the preset is as it was


def test_a_config_json_with_the_names_of_older_releases_will_do(tmp_path, texts):
    older = TINY | {"architectures": ["Qwen3ForCausalLM"], "torch_dtype": "bfloat16", "transformers_version": "4.51.0",
                    "rope_theta": 777.0, "rope_scaling": None, "eos_token_id": 11}
    run(config(tmp_path / "m", texts, model=older))
    written = json.loads((tmp_path / "m/config.json").read_text())
    assert written["rope_parameters"]["rope_theta"] == 777.0
    assert written["dtype"] == "float32"
    assert written["eos_token_id"] == AutoTokenizer.from_pretrained(tmp_path / "m").eos_token_id


def test_another_architecture_is_built_under_its_own_names(tmp_path, texts):
    run(config(tmp_path / "m", texts, model={"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2,
                                             "n_positions": 32}))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert (type(model).__name__, model.config.max_position_embeddings) == ("GPT2LMHeadModel", 32)


@pytest.mark.parametrize(("fields", "message"), [
    (TINY | {"hiden_size": 16}, "hiden_size: no field of Qwen3Config; did you mean 'hidden_size'"),
    (TINY | {"model_type": "qwen33"}, "no causal language model 'qwen33'; did you mean 'qwen3"),
    (TINY | {"hidden_size": "wide"}, "'hidden_size' expected int, got str"),
    (TINY | {"num_attention_heads": 4, "num_key_value_heads": 3}, "num_key_value_heads divides"),
    (TINY | {"hidden_act": "sillu"}, "make no qwen3 that runs: KeyError: 'sillu'"),
    (TINY | {"head_dim": 7}, "even rotary dimension"),
    ({"hidden_size": 16}, "no shape: give a preset"),
])
def test_fields_that_make_no_model_are_named_and_nothing_is_written(tmp_path, texts, fields, message):
    with pytest.raises(ConfigError, match=message):
        run(config(tmp_path / "m", texts, model=fields))
    assert [p.name for p in tmp_path.iterdir()] == ["texts.jsonl"]


def test_a_misspelt_preset_names_its_nearest_neighbor(tmp_path, texts):
    with pytest.raises(ConfigError, match="no preset 'qwen3-0.6'; did you mean 'qwen3-0.6b'"):
        config(tmp_path / "m", texts, preset="qwen3-0.6", model={})


def test_an_existing_folder_is_refused_replaced_on_demand_and_only_if_it_is_a_model(tmp_path, texts):
    out = tmp_path / "m"
    run(config(out, texts))
    (out / "stray").write_text("")
    with pytest.raises(RunError, match="--overwrite"):
        run(config(out, texts))
    assert (out / "stray").exists()
    run(config(out, texts), overwrite=True)
    assert not (out / "stray").exists()
    other = tmp_path / "letters"
    other.mkdir()
    (other / "dear").write_text("")
    with pytest.raises(RunError, match="will not delete it"):
        run(config(other, texts), overwrite=True)
    assert (other / "dear").exists()


def test_a_folder_that_cannot_be_written_is_the_users_to_mend(tmp_path, texts):
    with pytest.raises(RunError, match="cannot be written"):
        run(config(texts / "m", texts))


def test_a_trimmed_tokenizer_reads_as_before_and_the_model_has_its_size(tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("reason reason reason reads reads read the these those then than that\n" * 4)
    make_tokenizer(TokenizerConfig(texts=str(words), vocab_size=280)).save_pretrained(tmp_path / "big")
    result = run(config(tmp_path / "m", words, tokenizer={"path": str(tmp_path / "big"), "texts": str(words),
                                                          "vocab_size": 265}))
    assert result["vocab_size"] == 265
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert tokenizer.decode(tokenizer("reason, then 7+8=15 ü")["input_ids"]) == "reason, then 7+8=15 ü"


def test_texts_that_give_fewer_tokens_than_asked_for_are_said_to(tmp_path, texts):
    stream = io.StringIO()
    result = build(config(tmp_path / "m", texts), Console(stream=stream, plain=True))
    assert result["vocab_size"] < 40
    assert f"the texts give {result['vocab_size']} of the 40 tokens asked for" in stream.getvalue()


def test_a_tokenizer_folder_is_taken_as_it_is(tmp_path, texts):
    made = make_tokenizer(TokenizerConfig(texts=str(texts), vocab_size=40, alphabet="corpus"))
    made.save_pretrained(tmp_path / "t")
    run(config(tmp_path / "m", texts, tokenizer={"path": str(tmp_path / "t")}))
    assert AutoTokenizer.from_pretrained(tmp_path / "m").get_vocab() == made.get_vocab()


def test_a_folder_without_a_tokenizer_is_refused(tmp_path, texts):
    with pytest.raises(DataError, match="no tokenizer there"):
        run(config(tmp_path / "m", texts, tokenizer={"path": str(tmp_path)}))


@pytest.mark.parametrize(("settings", "message"), [
    ({}, "a model needs a tokenizer"),
    ({"texts": "t.txt"}, "texts and vocab_size go together"),
    ({"path": "t", "vocab_size": 9}, "texts and vocab_size go together"),
    ({"path": "t", "alphabet": "corpus"}, "alphabet is a choice for a tokenizer that is trained"),
])
def test_a_tokenizer_is_taken_trained_or_trimmed_and_nothing_else(settings, message):
    with pytest.raises(ConfigError, match=message):
        configs.build(TokenizerConfig, settings, "test")


def test_texts_are_trls_columns_without_roles_or_else_every_string(tmp_path):
    path = tmp_path / "t.jsonl"
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "id": "no"},
            {"question": "c", "parts": {"x": ["d", 1, None]}}, {"prompt": "e", "completion": "f", "id": "no"}]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    assert list(read_texts(path)) == ["a", "b", "c", "d", "e", "f"]


def test_a_text_file_is_read_line_by_line_with_its_newlines(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("ä b\n\nc")
    assert list(read_texts(path)) == ["ä b\n", "\n", "c"]


@pytest.mark.parametrize(("content", "message"), [
    (b'{"text": "a"}\n{"text": \n', "t.jsonl, line 2: .*one JSON object per line"),
    (b'{"text": "a"}\n["b"]\n', "t.jsonl, line 2: a list"),
    (b'{"text": "a"}\n\n\xff\n', "t.jsonl, line 3: .*UTF-8"),
])
def test_a_malformed_line_is_named_by_its_number(tmp_path, content, message):
    path = tmp_path / "t.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_texts(path))


def test_a_missing_text_file_names_its_nearest_neighbor(tmp_path, texts):
    with pytest.raises(DataError, match="did you mean texts.jsonl"):
        read_texts(tmp_path / "text.jsonl")
    with pytest.raises(DataError, match="a .txt or a .jsonl file"):
        read_texts(tmp_path / "texts.csv")
