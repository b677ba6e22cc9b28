"""What the training tests share: a tiny model, a tiny teacher, rollouts made by hand."""

import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from tinyr2.core.types import Message, Problem, Rollout

VOCAB = 23
EOS = 2


def qwen3(hidden: int = 16, seed: int = 0, dtype: torch.dtype = torch.float32) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(vocab_size=VOCAB, hidden_size=hidden, intermediate_size=24, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=64,
                         tie_word_embeddings=True, eos_token_id=EOS, pad_token_id=EOS, bos_token_id=None)
    return Qwen3ForCausalLM(config).to(dtype).eval()


class Norm(nn.Module):
    """RMSNorm in the dtype of its input; transformers' own passes through float32."""

    def __init__(self, stock: nn.Module):
        super().__init__()
        self.weight, self.eps = stock.weight, stock.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()


def qwen3_f64(**more) -> Qwen3ForCausalLM:
    """`qwen3` in float64 throughout."""
    model = qwen3(**{"dtype": torch.float64} | more)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__ == "Qwen3RMSNorm":
                setattr(module, name, Norm(child))
    return model


def rollout(prompt: tuple[int, ...], response: tuple[int, ...], **more) -> Rollout:
    problem = Problem(id=str(prompt), task="test", messages=(Message("user", "?"),))
    return Rollout(**({"problem": problem, "group": 0, "sample": 0, "author": "student", "prompt_ids": prompt,
                       "response_ids": response, "finish": "stop"} | more))


ROLLOUTS = [
    rollout((3, 4, 5), (6, 7, EOS), advantage=0.5, reward=1.0, group=0),
    rollout((3, 4, 5), (8, EOS), advantage=-0.5, reward=0.0, group=0, sample=1),
    rollout((9,), (10, 11, 12, 13, EOS), advantage=1.0, reward=1.0, group=1),
    rollout((9,), (14,), advantage=-1.0, reward=0.0, group=1, sample=1, finish="length"),
    rollout((15, 16, 17, 18, 19, 20), (21, 22, 3, EOS), advantage=0.0, reward=0.5, group=2, author="teacher"),
]
