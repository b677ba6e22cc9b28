"""The faults that are the user's to mend. Ours are asserts; a grader's are data.

Each message says what is wrong, where, and how to fix it. The command line prints it without a traceback and exits 2.
"""


class UserError(Exception):
    """Base of every error that the person at the keyboard can cure."""


class ConfigError(UserError, ValueError):
    """A setting that cannot work: a misspelt key, a wrong type, a contradiction."""


class DataError(UserError, ValueError):
    """Input that cannot be used: a malformed row, a missing file, a model folder without a tokenizer."""


class RunError(UserError, RuntimeError):
    """A run folder that cannot be used now: it exists, is locked, or its state does not fit the request."""
