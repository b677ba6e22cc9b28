"""Presets: their parameter counts, taken on the meta device, are those worked out by hand."""

import re

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tinyr2.models.load import count_parameters
from tinyr2.models.presets import PRESETS

# Without embeddings. qwen3-tiny: 2 layers × (2 · 32·64 for q and o, 2 · 32·32 for k and v, 3 · 32·96 for the ffn,
# 2·32 + 2·16 for four norms) + 32 for the last norm = 2 · 15,456 + 32.
INNER = {"qwen3-tiny": 30_944, "qwen3-1m": 984_768, "qwen3-5m": 4_722_688, "qwen3-30m": 31_469_312,
         "qwen3-150m": 151_022_080, "qwen3-0.6b": 440_467_456, "qwen3-1.7b": 1_409_410_048,
         "smollm2-135m": 106_203_456}
# With the vocabulary they were published with; the model cards' figures.
PUBLISHED = {"qwen3-0.6b": (151_936, 596_049_920), "qwen3-1.7b": (151_936, 1_720_574_976),
             "smollm2-135m": (49_152, 134_515_008)}


def counts(name: str, vocab: int) -> tuple[int, int]:
    with torch.device("meta"):
        return count_parameters(AutoModelForCausalLM.from_config(AutoConfig.for_model(**PRESETS[name],
                                                                                      vocab_size=vocab)))


def test_every_preset_has_a_count_worked_out_by_hand():
    assert INNER.keys() == PRESETS.keys()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_parameters_worked_out_by_hand(name):
    total, inner = counts(name, 100)
    assert (total, inner) == (INNER[name] + 100 * PRESETS[name]["hidden_size"], INNER[name])


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_shape_has_the_published_size(name):
    vocab, total = PUBLISHED[name]
    assert counts(name, vocab)[0] == total


@pytest.mark.parametrize("name", sorted(PRESETS.keys() - PUBLISHED.keys() - {"qwen3-tiny"}))
def test_a_name_tells_the_size_without_embeddings_to_a_tenth(name):
    millions = float(re.search(r"(\d+)m$", name)[1])
    assert INNER[name] / 1e6 == pytest.approx(millions, rel=0.1)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_leaves_the_vocabulary_to_the_tokenizer(name):
    assert not {"vocab_size", "pad_token_id", "eos_token_id", "bos_token_id"} & PRESETS[name].keys()
