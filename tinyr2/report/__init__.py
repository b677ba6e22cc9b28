"""What a run shows: journals, completions, the console and a one-file page. Reads run folders; starts nothing."""
