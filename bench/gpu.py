"""What a CUDA machine shows: its tests, its copy and product rates, decoding beside the bandwidth floor, and one
distillation step with a large teacher.

    python bench/gpu.py          writes bench/results/gpu.json; exit code 3 without CUDA
    python bench/gpu.py --tiny   the same code on the CPU with toy shapes, nothing written

Prints one JSON object as its last line. All weights are random. Decoding's floor is the time to read the weights once
and the cache once for each step, at the measured copy rate.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from distill_step import character_tokenizer, prompts
from engine_share import Meter, summary
from sides import HERE
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3Config

from tinyr2.core.types import Message, Problem
from tinyr2.models.decode import Decoder
from tinyr2.recipes.machine import describe_machine
from tinyr2.recipes.setup import autocast
from tinyr2.rollouts.engine import decode_all
from tinyr2.rollouts.request import Request
from tinyr2.rollouts.sample import Policy, Resident, sample
from tinyr2.rollouts.sampling import SamplingConfig
from tinyr2.teachers.local import Teacher, hire, judge_of
from tinyr2.train.loss import LossConfig, count, token_distillation
from tinyr2.train.optim import OptimConfig, make_optimizer
from tinyr2.train.step import Learner, Reading, accumulate

QWEN_06B = {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
            "head_dim": 128, "intermediate_size": 3072, "vocab_size": 151936, "tie_word_embeddings": True}
TEACHER_8B = QWEN_06B | {"hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32,
                         "intermediate_size": 12288, "tie_word_embeddings": False}
TOY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
       "intermediate_size": 64, "vocab_size": 512, "tie_word_embeddings": True}


@dataclass(frozen=True)
class Sizes:
    """What is run where."""

    device: torch.device
    student: dict
    teacher: dict
    batches: tuple[int, ...]  # rows decoded side by side
    context: int  # tokens of a row when it ends
    decoded: int  # of them, new ones
    prompts: int  # of a distillation step
    prompt_tokens: int
    new_tokens: int
    steps: int
    copied: int  # bytes
    product: int  # side of the square matrices


FULL = Sizes(torch.device("cuda"), QWEN_06B, TEACHER_8B, batches=(64, 256), context=1024, decoded=256, prompts=64,
             prompt_tokens=128, new_tokens=512, steps=7, copied=2**32, product=8192)
TINY = Sizes(torch.device("cpu"), TOY, TOY | {"hidden_size": 64, "tie_word_embeddings": False}, batches=(2, 4),
             context=24, decoded=8, prompts=4, prompt_tokens=8, new_tokens=8, steps=4, copied=2**20, product=64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="toy shapes on the CPU; writes no results")
    tiny = parser.parse_args().tiny
    if not tiny and not torch.cuda.is_available():
        print("bench/gpu.py: torch sees no CUDA device here; --tiny tries the code on the CPU", file=sys.stderr)
        sys.exit(3)
    sizes = TINY if tiny else FULL
    torch.manual_seed(0)
    copy = copy_rate(sizes)
    result = {"id": "gpu", "device": "cpu, toy shapes" if tiny else torch.cuda.get_device_name(),
              "tests": cuda_tests(collect_only=tiny), "copy_gb_s": copy / 1e9,
              "product_tflop_s": product_rate(sizes) / 1e12}
    student = random_model(sizes, sizes.student, torch.bfloat16)
    result["decode"] = [decoding(sizes, student, rows, copy) for rows in sizes.batches]
    del student
    result |= {"distill": distillation(sizes), "machine": describe_machine(HERE)}
    if not tiny:
        (HERE / "results" / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def cuda_tests(collect_only: bool) -> dict:
    """The tests that are marked as needing CUDA."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *(["--collect-only"] if collect_only else [])]
    done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True)
    return {"exit_code": done.returncode, "says": done.stdout.strip().splitlines()[-1:]}


def wait(sizes: Sizes) -> None:
    """Until the device has done what it was given."""
    if sizes.device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(sizes: Sizes, call: Callable[[], object], repeats: int) -> float:
    """Median seconds of `call`, after one that is not counted."""
    taken = []
    for _ in range(repeats + 1):
        wait(sizes)
        start = time.perf_counter()
        call()
        wait(sizes)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def copy_rate(sizes: Sizes) -> float:
    """Bytes a second, read and written, of a copy inside the device's memory."""
    source = torch.empty(sizes.copied, dtype=torch.uint8, device=sizes.device)
    target = torch.empty_like(source)
    return 2 * sizes.copied / seconds_of(sizes, lambda: target.copy_(source), 20)


def product_rate(sizes: Sizes) -> float:
    """Operations a second of a bfloat16 matrix product."""
    a, b = (torch.randn(sizes.product, sizes.product, device=sizes.device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * sizes.product**3 / seconds_of(sizes, lambda: a @ b, 20)


def random_model(sizes: Sizes, shape: dict, dtype: torch.dtype) -> nn.Module:
    """Made on the device, where filling billions of weights takes no time."""
    config = Qwen3Config(**shape, max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    with sizes.device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def decoding(sizes: Sizes, model: nn.Module, rows: int, copy: float) -> dict:
    """Tokens a second at `rows` rows, prompts not counted, and the floor's share of that time."""
    vocab, before = sizes.student["vocab_size"], sizes.context - sizes.decoded
    # on the CPU nothing can be captured, so a captured step is run again: the way to it is the same
    decoder = Decoder(model, capture=(lambda body: body) if sizes.device.type == "cpu" else None)
    ids = torch.randint(3, vocab, (rows, before)).tolist()
    sampling = SamplingConfig(temperature=1.0, max_completion_length=sizes.decoded)

    def answer(new: int) -> None:
        requests = [Request(prompt_ids=tuple(row), seed=i, max_new=new) for i, row in enumerate(ids)]
        decode_all(decoder, requests, sampling, stop=(), max_rows=rows)

    first = seconds_of(sizes, lambda: answer(1), 3)  # the prompts, and the token that follows each
    seconds = seconds_of(sizes, lambda: answer(sizes.decoded), 3) - first
    steps = sizes.decoded - 1
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    config = model.config
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    cache = rows * token * sum(before + i for i in range(1, sizes.decoded))
    floor = (weights * steps + cache) / copy
    return {"rows": rows, "context": sizes.context, "new_tokens": sizes.decoded, "tokens_per_s": rows * steps / seconds,
            "step_ms": 1e3 * seconds / steps, "floor_ms": 1e3 * floor / steps, "share_of_floor": floor / seconds,
            "prompts_s": first}


def distillation(sizes: Sizes) -> dict:
    """Steps of on-policy distillation: medians, each part's share, and the share that is the engine's."""
    net = random_model(sizes, sizes.student, torch.float32).train()
    teacher = hire(random_model(sizes, sizes.teacher, torch.bfloat16), sizes.student["vocab_size"])
    learner = Learner(model=net, vocab=sizes.student["vocab_size"], tokens_per_micro_batch=16384,
                      autocast=autocast(sizes.device))
    optimizer = make_optimizer(net, OptimConfig(learning_rate=1e-4))
    problems = [Problem(id=str(i), task="benchmark", messages=(Message("user", text),))
                for i, text in enumerate(prompts(sizes.prompts * sizes.steps, sizes.prompt_tokens, 0))]
    meter = Meter(lambda: wait(sizes))
    meter.watch_step()
    tokenizer = character_tokenizer()
    policy = Policy(model=net, tokenizer=tokenizer, stop=(tokenizer.eos_token_id,), vocab=learner.vocab, context=4096,
                    resident=Resident())
    ends, parts = [time.perf_counter()], []
    for t in range(sizes.steps):
        own = problems[t * sizes.prompts:(t + 1) * sizes.prompts]
        step(sizes, learner, teacher, own, replace(policy, version=t))
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        wait(sizes)
        ends.append(time.perf_counter())
        parts.append(meter.take())
    seconds = [b - a for a, b in zip(ends, ends[1:], strict=False)]
    return {"prompts": sizes.prompts, "new_tokens": sizes.new_tokens, **summary(seconds[2:], parts[2:])}


def step(sizes: Sizes, learner: Learner, teacher: Teacher, problems: list[Problem], policy: Policy) -> None:
    """Write, judge, and leave the gradient on the student."""
    loss = LossConfig()
    sampling = SamplingConfig(temperature=1.0, max_completion_length=sizes.new_tokens)
    with learner.autocast():
        rollouts = sample(policy, problems, n=1, sampling=sampling, seed=0, step=policy.version)
    accumulate(learner, rollouts, lambda batch: token_distillation(loss, batch, count(rollouts)),
               Reading(divergence=loss.divergence, judge=judge_of(teacher)))


if __name__ == "__main__":
    main()
