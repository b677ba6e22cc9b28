"""Evaluation: how often a policy is right on held-out problems, and how sure that figure is."""
