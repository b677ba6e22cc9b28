"""Presets: the shapes of small dense models, by name.

In: a name. Out: the fields of a `transformers` config. The vocabulary is not among them: it follows the tokenizer.
"""

from typing import Any

Shape = dict[str, Any]


def _rope(theta: float) -> Shape:
    return {"rope_type": "default", "rope_theta": theta}


def _qwen3(hidden: int, layers: int, heads: tuple[int, int, int], ffn: int, context: int) -> Shape:
    """A Qwen3-style shape; heads: (of queries, of keys and values, width of one)."""
    return {"model_type": "qwen3", "hidden_size": hidden, "num_hidden_layers": layers,
            "num_attention_heads": heads[0], "num_key_value_heads": heads[1], "head_dim": heads[2],
            "intermediate_size": ffn, "max_position_embeddings": context, "rms_norm_eps": 1e-6,
            # Qwen's base is made for tens of thousands of tokens; a short context keeps the classic one.
            "rope_parameters": _rope(1e6 if context > 8192 else 1e4), "tie_word_embeddings": True}


# The names count parameters outside the embeddings, the published ones all of them.
PRESETS: dict[str, Shape] = {
    "qwen3-tiny": _qwen3(32, 2, (4, 2, 16), 96, 1024),  # 31 thousand: a test's model
    "qwen3-1m": _qwen3(128, 5, (4, 2, 32), 384, 2048),
    "qwen3-5m": _qwen3(256, 6, (4, 2, 64), 768, 4096),
    "qwen3-30m": _qwen3(512, 10, (8, 4, 64), 1536, 8192),
    "qwen3-150m": _qwen3(1024, 12, (16, 8, 64), 3072, 32768),
    # As Qwen published them, in a vocabulary of 151,936: the tokenizer's 151,669 tokens, padded (vocab_size=151936).
    "qwen3-0.6b": _qwen3(1024, 28, (16, 8, 128), 3072, 40960),
    "qwen3-1.7b": _qwen3(2048, 28, (16, 8, 128), 6144, 40960),
    # SmolLM2-135M as published, in a vocabulary of 49,152.
    "smollm2-135m": {"model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
                     "num_key_value_heads": 3, "head_dim": 64, "intermediate_size": 1536,
                     "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_parameters": _rope(1e5),
                     "tie_word_embeddings": True},
}
