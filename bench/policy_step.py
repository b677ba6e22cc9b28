"""Our side of W3: one policy-gradient step on random weights, timed from step end to step end.

    python bench/policy_step.py --hidden 256 --layers 6 --new-tokens 512

A step writes --group answers to each of its prompts, scores them by their length modulo 7, centers the scores in their
group, and moves the student once. Lengths are geometric cut at --new-tokens. Prints one JSON line.
"""

import argparse
import json
import statistics
import time

import torch
from distill_step import character_tokenizer, model, prompts
from sides import peak_mib

from tinyr2.core.types import Batch, Message, Problem
from tinyr2.objectives.policy import weighted_nll
from tinyr2.recipes.graded import center
from tinyr2.rewards.grade import RewardFunction, grade
from tinyr2.rollouts.sample import Policy, sample
from tinyr2.rollouts.sampling import SamplingConfig
from tinyr2.train.loss import Objective, count
from tinyr2.train.optim import OptimConfig, learning_rate, make_optimizer
from tinyr2.train.step import Learner, accumulate


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in {"hidden": 128, "layers": 4, "batch": 64, "group": 8, "prompt_tokens": 16, "new_tokens": 64,
                          "steps": 10, "threads": 2, "seed": 0}.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=default)
    a = parser.parse_args()
    torch.manual_seed(a.seed)
    torch.set_num_threads(a.threads)
    seconds, lengths = steps(a)
    step = statistics.median(seconds[2:] or seconds)
    length = statistics.mean(lengths)
    print(json.dumps({"side": "tinyr2", **vars(a), "step_s": round(step, 4), "steps_s": [round(s, 4) for s in seconds],
                      "mean_length": length, "tokens_per_s": round(a.batch * length / step), "peak_mib": peak_mib()}))


def steps(a: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Seconds and mean answer length of each step."""
    tokenizer = character_tokenizer()
    net = model(a.hidden, a.layers, len(tokenizer)).train()
    config = OptimConfig(learning_rate=1e-4)
    optimizer = make_optimizer(net, config)
    learner = Learner(model=net, vocab=len(tokenizer), tokens_per_micro_batch=8192)
    problems = [Problem(id=str(i), task="benchmark", messages=(Message("user", text),))
                for i, text in enumerate(prompts(4096, a.prompt_tokens, a.seed))]
    sampling = SamplingConfig(temperature=1.0, max_completion_length=a.new_tokens)
    seconds, lengths, last = [], [], time.perf_counter()
    for t in range(a.steps):
        policy = Policy(model=net, tokenizer=tokenizer, stop=(tokenizer.eos_token_id,), vocab=len(tokenizer),
                        context=4096, version=t)
        asked = a.batch // a.group
        rollouts = sample(policy, problems[t * asked:(t + 1) * asked], n=a.group, sampling=sampling, seed=a.seed,
                          step=t)
        rollouts = center(grade(rollouts, [RewardFunction(name="length", weight=1.0, call=score)]))
        tokens = count(rollouts).tokens
        accumulate(learner, rollouts, lambda batch, tokens=tokens: policy_gradient(batch, tokens))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, t, a.steps)
        torch.nn.utils.clip_grad_norm_(net.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        now = time.perf_counter()
        seconds.append(now - last)
        lengths.append(tokens / len(rollouts))
        last = now
    return seconds, lengths


def score(completions: list[list[dict]], **_) -> list[float]:
    """The peer's reward: the number of characters modulo 7."""
    return [float(len(c[0]["content"]) % 7) for c in completions]


def policy_gradient(batch: Batch, tokens: int) -> Objective:
    """REINFORCE with the leave-one-out advantage, summed over tokens and divided by the step's count of them."""
    return lambda s: weighted_nll(s.learner_logp, batch.advantage[s.part], denom=tokens)


if __name__ == "__main__":
    main()
