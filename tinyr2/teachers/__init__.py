"""Teachers: models that judge what the student wrote, or write themselves."""
