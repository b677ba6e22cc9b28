"""Models: stock Hugging Face folders in and out, and what is computed from their hidden states."""
