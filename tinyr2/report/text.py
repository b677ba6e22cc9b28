"""Text of unknown origin made safe to show.

In: model text, which may try to steer a terminal or a browser. Out: the same text without control sequences.
"""

import re

# Sequences go whole, so that no half of one is left to read: OSC, DCS, SOS, PM and APC strings with their terminator,
# then CSI, then the two- and three-character escapes.
_SEQUENCES = re.compile(
    r"(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f])[^\x07\x1b\x90\x98\x9c-\x9f]*(?:\x07|\x1b\\|\x9c)"
    r"|(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|\x1b[ -/]*[0-~]")
# What is left of C0 and C1 but tab and newline; line separators and the marks that turn text around; lone surrogates,
# which no stream can encode.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def clean(text: str) -> str:
    """`text` without terminal sequences, control characters (tab and newline stay) and direction marks."""
    return _CONTROLS.sub("", _SEQUENCES.sub("", text))
