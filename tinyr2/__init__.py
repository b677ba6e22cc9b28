"""tinyr2: build, distill and judge ultra-small reasoning models on one machine.

The rooms, from the ground up: core, tokens and objectives, models, data · rollouts · teachers · rewards, train · eval ·
report, recipes. Import what you call: `from tinyr2.recipes.distill import DistillConfig, distill`.
"""

__version__ = "0.1.0"
