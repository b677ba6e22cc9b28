"""The four parts of `teacher_study.py`: their worlds (problems, tokenizers, teachers, cold starts) and their runs."""

import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from reinforce_study import Study
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from tinyr2.core.files import write_atomic
from tinyr2.core.rng import derive
from tinyr2.core.types import Message, Problem
from tinyr2.data.problems import DataConfig, load_problems
from tinyr2.data.tasks import SignedSums, signed_sums
from tinyr2.eval.suite import EvalConfig, evaluate
from tinyr2.models.load import ModelConfig, load_model, load_tokenizer, save_model
from tinyr2.recipes import quickstart, setup
from tinyr2.rewards.grade import RewardConfig, load_reward
from tinyr2.rollouts.sample import sample
from tinyr2.rollouts.sampling import SamplingConfig
from tinyr2.tokens.build import CHATML, train_tokenizer

HELD_OUT = 2048
LEVEL = quickstart.LEVEL
PLAN = quickstart.Plan()
# a policy gradient takes smaller steps, and is the reverse KL's
_SAMPLED = {"train": {"learning_rate": 3e-4}, "loss": {"divergence": {"kind": "reverse_kl"}}}
# by signal, what it has beside the same-tokenizer run's settings
SIGNALS: dict[str, dict[str, Any]] = {
    "marginal": {}, "mapped": {"train": {"learning_rate": 3e-4}}, "chunk": _SAMPLED, "chunk_debiased": _SAMPLED,
    "exact": _SAMPLED}


class Teachers(Study):
    """Every run of this study is a row of its own: who, from what, how right."""

    def once(self, name: str, verb: str, raw: dict[str, Any], held_out: Sequence[Path]) -> dict[str, Any]:
        """Run a verb and measure its model on each held-out file, unless it is done."""
        if name not in self.rows:
            result = self.run(verb, raw)
            self.keep(name, facts(result) | judged(Path(result["model"]), held_out))
        return self.rows[name]


def facts(result: dict[str, Any]) -> dict[str, Any]:
    """Steps, seconds and tokens of a finished run."""
    from tinyr2.report.jsonl import read_jsonl

    clocks = read_jsonl(Path(result["run"]) / "timing.jsonl")
    return {"steps": result["step"], "tokens": result["num_tokens"],
            "seconds": round(sum(c.get("step_s", 0.0) for c in clocks), 1)}


def judged(model_path: Path, held_out: Sequence[Path], length: int = 96) -> dict[str, Any]:
    """Greedy pass@1 on each file, with its interval."""
    torch.set_num_threads(1)
    config = ModelConfig(path=str(model_path))
    model, tokenizer = load_model(config, torch.device("cpu")), load_tokenizer(config)
    policy = setup.policy_of(model, tokenizer, len(tokenizer))
    out: dict[str, Any] = {}
    for path in held_out:
        result = evaluate(policy, load_problems(DataConfig(path=str(path))),
                          [load_reward(RewardConfig(name="exact_answer"))], EvalConfig(max_completion_length=length))
        found = result.pass_at[1]
        out[path.stem] = {"pass_at_1": found.value, "low": found.low, "high": found.high, "n": found.n,
                          "correct": "".join("1" if c else "0" for c in result.correct), **result.figures()}
    return out


def write_problems(path: Path, problems: Sequence[Any], *, solved: bool) -> None:
    """One problem a line."""
    lines = []
    for p in problems:
        row = {"prompt": [{"role": m.role, "content": m.content} for m in p.messages], "answer": p.answer,
               "task": p.task}
        if solved:
            row["completion"] = [{"role": m.role, "content": m.content} for m in p.completion]
        lines.append(json.dumps(row))
    write_atomic(path, "\n".join(lines) + "\n")


# another tokenizer


def merged_tokenizer(texts: Sequence[str], size: int = 400) -> PreTrainedTokenizerFast:
    """Byte-level BPE that merges digits, as GPT-2's does, with ChatML."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|endoftext|>", eos_token="<|im_end|>",
                                        clean_up_tokenization_spaces=False)
    tokenizer.chat_template = CHATML
    return tokenizer


def qwen3(tokenizer: PreTrainedTokenizerFast, shape: quickstart.Shape, seed: int) -> Qwen3ForCausalLM:
    """A model with random weights."""
    torch.manual_seed(derive(seed, "init", shape.hidden))
    return Qwen3ForCausalLM(Qwen3Config(
        hidden_size=shape.hidden, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads, head_dim=shape.hidden // shape.heads, intermediate_size=shape.ffn,
        vocab_size=len(tokenizer), max_position_embeddings=256, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None))


def cross_world(study: Teachers, seed: int) -> Path:
    """The quickstart's problems and cold student, and two teachers that differ in vocabulary and template."""
    world = study.out / f"cross-{seed}"
    if not (world / "init/foreign").is_dir():
        shutil.rmtree(world, ignore_errors=True)
        world.mkdir()
        quickstart.prepare(world, seed, LEVEL)
        write_problems(world / "data/held_out.jsonl", signed_sums(LEVEL, "held_out", HELD_OUT, seed), solved=False)
        solved = load_problems(DataConfig(path=str(world / "data/teacher_solutions.jsonl"), limit=2000))
        tokenizer = merged_tokenizer([m.content for p in solved for m in (*p.messages, *p.completion)])
        save_model(qwen3(tokenizer, quickstart.TEACHER, seed), tokenizer, world / "init/foreign")
    held_out = [world / "data/held_out.jsonl"]
    teacher = quickstart.teacher_config(world, seed, PLAN).model_dump(mode="json")
    study.once(f"{world.name}/teacher", "sft", teacher, held_out)
    foreign = teacher | {"model": {"path": str(world / "init/foreign")}, "output_dir": str(world / "foreign")}
    foreign["train"] = teacher["train"] | {"max_steps": 600}
    study.once(f"{world.name}/foreign", "sft", foreign, held_out)
    study.once(f"{world.name}/cold", "sft", quickstart.cold_config(world, seed, PLAN).model_dump(mode="json"), held_out)
    return world


def cross(study: Teachers, seed: int) -> None:
    """Part `cross`: the cold student learns from either teacher, by each signal, with equal generated tokens."""
    world = cross_world(study, seed)
    same = quickstart.opd_config(world, seed, PLAN, LEVEL).model_dump(mode="json")
    same["train"] |= {"log_completions_steps": 0}
    held_out = [world / "data/held_out.jsonl"]
    study.once(f"{world.name}/same", "distill", same | {"output_dir": str(world / "same")}, held_out)
    sampled = same | {"output_dir": str(world / "same_sampled"), "train": same["train"] | {"learning_rate": 1e-3},
                      "loss": same["loss"] | {"estimator": "sampled", "divergence": {"kind": "reverse_kl"}}}
    study.once(f"{world.name}/same_sampled", "distill", sampled, held_out)
    for signal, change in SIGNALS.items():
        raw = same | {"output_dir": str(world / signal), "train": same["train"] | change.get("train", {}),
                      "teacher": {"path": str(world / "foreign/final"), "signal": signal},
                      "loss": same["loss"] | change.get("loss", {})}
        study.once(f"{world.name}/{signal}", "distill", raw, held_out)


# several specialists

SPECIALIST = quickstart.Shape(hidden=96, layers=2, heads=4, ffn=288)
TASKS = ("sums", "sorting")


def sorting(n: int, seed: int, split: str) -> list[Problem]:
    """Digits to be put in order, one pass of an insertion at a time; no multiset of digits is in both splits."""
    rng, found = random.Random(derive(seed, "sorting", split)), {}
    while len(found) < n:
        digits = [rng.randrange(10) for _ in range(rng.randint(4, 8))]
        text, key = "".join(map(str, digits)), "".join(map(str, sorted(digits)))
        if (derive(0, "split", key) % 8 == 0) == (split == "held_out"):
            passes = ["".join(map(str, sorted(digits[:i]))) for i in range(2, len(digits) + 1)]
            found[text] = Problem(id=text, task="sorting", messages=(Message("user", f"#{text}="),), answer=key,
                                  completion=(Message("assistant", ";".join(passes) + f"####{key}"),))
    return list(found.values())


def merge_world(study: Teachers, seed: int) -> Path:
    """Two tasks, a base that has seen a little of both, and a specialist in each."""
    world = study.out / f"merge-{seed}"
    if not (world / "init").is_dir():
        shutil.rmtree(world, ignore_errors=True)
        world.mkdir()
        made = {"sums": (signed_sums(LEVEL, "train", 20_000, seed), signed_sums(LEVEL, "held_out", HELD_OUT, seed)),
                "sorting": (sorting(20_000, seed, "train"), sorting(HELD_OUT, seed, "held_out"))}
        for task, (train, held_out) in made.items():
            write_problems(world / f"{task}.jsonl", train, solved=True)
            write_problems(world / f"held_out_{task}.jsonl", held_out, solved=False)
        write_problems(world / "few.jsonl", [p for train, _ in made.values() for p in train[:1000]], solved=True)
        write_problems(world / "both.jsonl", [p for train, _ in made.values() for p in train], solved=True)
        texts = [m.content for train, _ in made.values() for p in train[:1000] for m in (*p.messages, *p.completion)]
        tokenizer = train_tokenizer(texts, vocab_size=32, alphabet="corpus")
        save_model(qwen3(tokenizer, SPECIALIST, seed), tokenizer, world / "init")
    for who, model, data, steps in (("base", "init", "few", 150), ("sums", "base/final", "sums", 500),
                                    ("sorting", "base/final", "sorting", 500)):
        study.once(f"{world.name}/{who}", "sft", tuned(world, who, model, data, steps, seed), on_tasks(world))
    return world


def tuned(world: Path, who: str, model: str, data: str, steps: int, seed: int) -> dict[str, Any]:
    """Fine-tuning on worked solutions."""
    return {"model": {"path": str(world / model)}, "data": {"path": str(world / f"{data}.jsonl")},
            "examples_per_step": 64, "output_dir": str(world / who), "device": "cpu", "train": settings(seed, steps)}


def settings(seed: int, steps: int, rate: float = 5e-3, **more: Any) -> dict[str, Any]:
    """What all runs of a part have in common."""
    return {"optim": "muon", "learning_rate": rate, "max_steps": steps, "seed": seed, "num_threads": 1,
            "warmup_steps": 20, "save_steps": 10_000, "log_completions_steps": 0} | more


def on_tasks(world: Path) -> list[Path]:
    """The held-out problems of both tasks."""
    return [world / f"held_out_{task}.jsonl" for task in TASKS]


def merge(study: Teachers, seed: int) -> None:
    """Part `merge`: one student of two specialists, three ways."""
    world = merge_world(study, seed)
    teachers = [{"name": task, "path": str(world / task / "final"), "tasks": [NAMES[task]]} for task in TASKS]
    raw = {"student": {"path": str(world / "base/final")}, "teachers": teachers, "device": "cpu",
           "data": {"path": str(world / "both.jsonl")}, "output_dir": str(world / "merged"),
           "rollout": {"prompts_per_step": 64, "max_completion_length": 72},
           "loss": {"divergence": {"kind": "forward_kl"}}, "train": settings(seed, 800, 8e-3)}
    done = study.once(f"{world.name}/merged", "distill", raw, on_tasks(world))
    # as many tokens as the merged student read; solutions and answers are equally long
    study.once(f"{world.name}/sft_both", "sft", tuned(world, "sft_both", "base/final", "both", done["steps"], seed),
               on_tasks(world))
    if f"{world.name}/average" not in study.rows:
        study.keep(f"{world.name}/average", judged(averaged(world), on_tasks(world)))


NAMES = {"sums": "signed_sums", "sorting": "sorting"}  # tasks, as the problems call them


def averaged(world: Path) -> Path:
    """The mean of the specialists' weights, as a model folder."""
    out = world / "average"
    shutil.copytree(world / "sums/final", out, dirs_exist_ok=True)
    one, other = (load_file(world / task / "final/model.safetensors") for task in TASKS)
    save_file({name: (one[name] + other[name]) / 2 for name in one}, out / "model.safetensors", {"format": "pt"})
    return out


# one who knows more

BUDGET = 33 * 512  # answers that GRPO writes
PUPIL = quickstart.Shape(hidden=64, layers=2, heads=4, ffn=192)


def privileged_world(study: Teachers, seed: int) -> Path:
    """A student that has read a careless author, and that repeats a solution which stands in its prompt."""
    world, level = study.out / f"privileged-{seed}", SignedSums(terms=3, min_terms=3, digits=3)
    if not (world / "init").is_dir():
        shutil.rmtree(world, ignore_errors=True)
        world.mkdir()
        careful = signed_sums(level, "train", 20_000, seed)
        careless = signed_sums(level.model_copy(update={"careless": 0.9}), "train", 20_000, seed)
        shown = [replace(p, messages=(Message("user", shown_with(p)),)) for p in careful]
        write_problems(world / "problems.jsonl", careful, solved=False)
        write_problems(world / "read.jsonl", [p for pair in zip(careless, shown, strict=True) for p in pair],
                       solved=True)
        write_problems(world / "held_out.jsonl", signed_sums(level, "held_out", HELD_OUT, seed), solved=False)
        texts = [m.content for p in careless[:2000] for m in (*p.messages, *p.completion)]
        tokenizer = train_tokenizer(texts, vocab_size=32, alphabet="corpus")
        save_model(qwen3(tokenizer, PUPIL, seed), tokenizer, world / "init")
    raw = tuned(world, "cold", "init", "read", 1200, seed)
    study.once(f"{world.name}/cold", "sft", raw | {"train": settings(seed, 1200, 6e-3)}, [world / "held_out.jsonl"])
    return world


def shown_with(p: Problem) -> str:
    """The prompt of a problem with its solution behind it."""
    return f"{p.messages[-1].content}#{p.completion[0].content}"


def privileged(study: Teachers, seed: int) -> None:
    """Part `privileged`: GRPO, and a self-teacher that sees a right answer of the same group, at an eighth."""
    world = privileged_world(study, seed)
    held_out = [world / "held_out.jsonl"]
    common = {"data": {"path": str(world / "problems.jsonl")}, "device": "cpu", "rewards": [{"name": "exact_answer"}]}
    grpo = common | {
        "algorithm": "grpo", "model": {"path": str(world / "cold/final")}, "output_dir": str(world / "grpo"),
        "rollout": {"prompts_per_step": 64, "num_generations": 8, "max_completion_length": 96},
        "train": settings(seed, 33, 1e-3, warmup_steps=3, lr_scheduler_type="constant")}
    study.once(f"{world.name}/grpo", "reinforce", grpo, held_out)
    eighth = grpo | {"output_dir": str(world / "grpo_eighth"), "rollout": grpo["rollout"] | {"prompts_per_step": 8}}
    study.once(f"{world.name}/grpo_eighth", "reinforce", eighth, held_out)
    for name, ema in (("self", 0.0), ("self_start", 1.0)):
        raw = common | {
            "student": {"path": str(world / "cold/final")}, "output_dir": str(world / name),
            "teacher": {"ema": ema, "privilege": {"shows": ["success"], "template": "{prompt}#{knowledge}",
                                                  "labels": {"success": ""}}},
            "rollout": {"prompts_per_step": 8, "num_generations": 8, "max_completion_length": 96},
            "eval_data": {"path": str(world / "held_out.jsonl"), "limit": 256},
            "eval": {"max_completion_length": 96}, "eval_kl_problems": 0,
            "train": settings(seed, BUDGET // 8 // 64, 1e-3, warmup_steps=3, eval_steps=11)}
        study.once(f"{world.name}/{name}", "distill", raw, held_out)


# long beside short

LEARNER = quickstart.Shape(hidden=40, layers=2, heads=4, ffn=120)
RATIOS = {"long": {"long": 1}, "short": {"short": 1}, "mixed": {"long": 1, "short": 4}}
READ = 1_200_000  # tokens of solutions that each model reads


def mixture_world(study: Teachers, seed: int) -> Path:
    """Sums whose columns are worked in words (long), and as plain figures (short)."""
    world = study.out / f"mixture-{seed}"
    if not (world / "init").is_dir():
        shutil.rmtree(world, ignore_errors=True)
        world.mkdir()
        made = {"long": signed_sums(LEVEL.model_copy(update={"words": "en"}), "train", 20_000, seed),
                "short": signed_sums(LEVEL, "train", 20_000, seed)}
        for name, problems in made.items():
            write_problems(world / f"{name}.jsonl", problems, solved=True)
        write_problems(world / "held_out.jsonl", signed_sums(LEVEL, "held_out", HELD_OUT, seed), solved=False)
        texts = [m.content for problems in made.values() for p in problems[:1000] for m in (*p.messages, *p.completion)]
        tokenizer = train_tokenizer(texts, vocab_size=28, alphabet="corpus")
        save_model(qwen3(tokenizer, LEARNER, seed), tokenizer, world / "init")
    return world


def mixture(study: Teachers, seed: int) -> None:
    """Part `mixture`: long chains, short ones, or one in five; each reads as many tokens of solutions."""
    world = mixture_world(study, seed)
    tokenizer = load_tokenizer(ModelConfig(path=str(world / "init")))
    length = {name: fmean(len(tokenizer.encode(p.completion[0].content)) + 1 for p in load_problems(
        DataConfig(path=str(world / f"{name}.jsonl"), limit=1000))) for name in ("long", "short")}
    for name, ratio in RATIOS.items():
        mean = sum(length[k] * n for k, n in ratio.items()) / sum(ratio.values())
        raw = tuned(world, name, "init", "long", round(READ / 64 / mean), seed) | {"mixture": {
            "sources": {k: {"path": str(world / f"{k}.jsonl")} for k in ratio}, "ratio": ratio}}
        study.once(f"{world.name}/{name}", "sft", {k: v for k, v in raw.items() if k != "data"},
                   [world / "held_out.jsonl"])
        if "loops" not in study.rows[f"{world.name}/{name}"]:
            study.keep(f"{world.name}/{name}", study.rows[f"{world.name}/{name}"] | endings(world / name / "final"))


def endings(model_path: Path, length: int = 128) -> dict[str, float]:
    """The shares of greedy answers that repeat themselves to the limit, and that come to no end."""
    torch.set_num_threads(1)
    config = ModelConfig(path=str(model_path))
    model, tokenizer = load_model(config, torch.device("cpu")), load_tokenizer(config)
    problems = load_problems(DataConfig(path=str(model_path.parents[1] / "held_out.jsonl")))
    rollouts = sample(setup.policy_of(model, tokenizer, len(tokenizer)), problems, n=1, seed=0,
                      sampling=SamplingConfig(temperature=0.0, max_completion_length=length))
    cut = [r.text for r in rollouts if r.finish == "length"]
    loops = [text for text in cut if any(text.endswith(text[-n:] * (36 // n)) for n in range(1, 13))]
    return {"no_end": len(cut) / len(rollouts), "loops": len(loops) / len(rollouts),
            "length": fmean(len(r.response_ids) for r in rollouts)}


PARTS: dict[str, Callable[[Teachers, int], None]] = {
    "cross": cross, "merge": merge, "privileged": privileged, "mixture": mixture}
WORLDS = {"cross": cross_world, "merge": merge_world, "privileged": privileged_world, "mixture": mixture_world}
