"""Where problems come from: files and hub datasets, generated tasks, and the packing of rollouts into batches."""
