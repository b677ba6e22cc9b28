"""Objectives: pure functions of the learned tokens' tensors, and the advantages that weigh them. Torch only."""
