"""Rollouts: the student, or a teacher, writes. One decoder for training, evaluation and search."""
