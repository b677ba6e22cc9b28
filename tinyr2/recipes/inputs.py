"""What a run reads before any weight is loaded, after every check that needs no compute."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from tinyr2.core.types import Problem
from tinyr2.recipes import setup
from tinyr2.recipes.checks import check_training
from tinyr2.recipes.findings import Setup, raise_faults
from tinyr2.report.console import Console
from tinyr2.rewards.grade import RewardFunction


@dataclass(frozen=True)
class Inputs:
    """What a run reads, before any weight is loaded."""

    tokenizer: PreTrainedTokenizerBase
    problems: list[Problem]
    held_out: list[Problem]
    rewards: list[RewardFunction]
    vocab: int

    @classmethod
    def of(cls, found: Setup) -> "Inputs":
        """What a setup without faults holds."""
        tokenizer = found.student.tokenizer
        student, *others = (m.config.get_text_config().vocab_size for m in (found.student, *found.teachers)
                            if m.config is not None and not m.translated)
        vocab = setup.shared_vocabulary(student, min(others, default=student), tokenizer)
        held_out = [p for part in found.parts[1:] for p in part.problems]
        return cls(tokenizer, list(found.parts[0].problems), held_out, list(found.rewards), vocab)


def checked_inputs(found: Setup, console: Console) -> Inputs:
    """What `found` holds, after every check that needs no compute; a ConfigError names all faults."""
    for warning in raise_faults(check_training(found)):
        console.note(f"warning: {warning.line}")
    return Inputs.of(found)
