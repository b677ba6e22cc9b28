"""Text in and out: chat templates, training and trimming of tokenizers."""
