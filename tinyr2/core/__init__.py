"""The cellar: values, configuration, randomness, errors and files. Knows nothing above it."""
