"""What a whole answer is worth: the answer it gives, and the functions that grade it."""
