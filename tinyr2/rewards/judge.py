"""The program of a verifier's worker: whether two LaTeX answers are equal, by math-verify and by their values.

In, on stdin: after 4 bytes with its length, the JSON [gold, given, seconds]. Out, on stdout: likewise true, false, or
null where they cannot be read or the two judges differ; first of all a null, once everything is imported. It ends with
its input, and imports nothing of this library.
"""

import json
import logging
import os
import resource
import signal
import struct
import sys
from collections.abc import Iterable, Sequence
from typing import IO, Any

import sympy
from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify

_MEMORY = 2 << 30  # bytes of address space; a tower of powers would take all there is
_DIGITS = 40  # of the numbers that are compared
_CLOSE = sympy.Float("1e-25", _DIGITS)  # relative
# Positive, so that sqrt(1/n) and 1/sqrt(n) agree; of no special value to any function.
_POINTS = tuple(sympy.Rational(*pair) for pair in ((37, 29), (11, 47), (271, 83), (53, 31), (7, 61), (199, 45)))
# Units stay: 5 cm is not 5 m. \frac12 and \sqrt2 are mended.
_LATEX = LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False,
                               normalization_config=NormalizationConfig(units=False, malformed_operators=True))


def equal(gold: str, given: str) -> bool | None:
    """Whether two answers in LaTeX are equal; None where one cannot be read whole, or where the judges differ.

    True: math-verify says so both ways, and the values agree to 25 digits at several points. False: both deny it.
    """
    a, b = _read(gold), _read(given)
    if a is None or b is None:
        return None
    # Without their timeouts, which would take over SIGALRM: it is this process's own end.
    claims = {bool(verify([x], [y], timeout_seconds=None)) for x, y in ((a, b), (b, a))}
    ours = alike(a, b)
    return ours if claims == {ours} else None


def alike(a: Any, b: Any) -> bool | None:
    """Whether two sympy objects have the same form and, part for part, the same values; None where unknown."""
    if isinstance(a, sympy.MatrixBase) and isinstance(b, sympy.MatrixBase):
        return a.shape == b.shape and _all_alike(list(a), list(b))
    if isinstance(a, sympy.Expr) or isinstance(b, sympy.Expr):
        return isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr) and _same_values(a, b)
    if isinstance(a, sympy.Interval) and isinstance(b, sympy.Interval):
        return (a.left_open, a.right_open) == (b.left_open, b.right_open) and _all_alike(a.args[:2], b.args[:2])
    if isinstance(a, sympy.Tuple) and isinstance(b, sympy.Tuple):
        return _all_alike(a.args, b.args)
    if isinstance(a, sympy.FiniteSet) and isinstance(b, sympy.FiniteSet):
        return len(a) == len(b) and all(any(alike(x, y) for y in b) for x in a)
    if isinstance(a, sympy.Equality) and isinstance(b, sympy.Equality):
        return _is_constant((a.lhs - a.rhs) / (b.lhs - b.rhs))
    return True if a == b and isinstance(a, sympy.Set | sympy.core.relational.Relational) else None


def main() -> None:
    """Answer questions until the input ends."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    logging.disable()
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no verdict
    equal("x+1", "1+x")  # the first of all takes longer: grammars are built
    _send(out, None)
    while header := sys.stdin.buffer.read(4):
        gold, given, seconds = json.loads(sys.stdin.buffer.read(struct.unpack(">I", header)[0]))
        # The kernel ends this process even where Python no longer runs, and where nobody is left to kill it.
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            verdict = equal(gold, given)
        except (Exception, RecursionError):  # the border: whatever the model wrote may break sympy
            verdict = None
        signal.setitimer(signal.ITIMER_REAL, 0)
        _send(out, verdict)


def _read(text: str) -> Any:
    """The sympy object of a whole LaTeX answer; None where a part of it would be left unread."""
    found = parse(rf"\boxed{{{text}}}", [_LATEX], fallback_mode="no_fallback", extraction_mode="first_match",
                  parsing_timeout=None)
    return found[0] if len(found) == 1 and not isinstance(found[0], str) else None


def _all_alike(xs: Sequence, ys: Sequence) -> bool:
    return len(xs) == len(ys) and all(alike(x, y) for x, y in zip(xs, ys, strict=True))


def _same_values(a: sympy.Expr, b: sympy.Expr) -> bool | None:
    """Whether a equals b at every point, in the same symbols; None where a value is no finite number."""
    return a.free_symbols == b.free_symbols and _close(zip(_values(a), _values(b), strict=True))


def _is_constant(a: sympy.Expr) -> bool | None:
    first, *others = _values(a)
    return _close((first, other) for other in others)


def _values(a: sympy.Expr) -> list[sympy.Expr]:
    a = a.doit()  # as it was read, 1 - 1 is still to be worked out, and numerically no exact 0
    symbols = sorted(a.free_symbols, key=str)
    points = [{s: _POINTS[(start + 2 * i) % len(_POINTS)] + i for i, s in enumerate(symbols)} for start in range(3)]
    return [sympy.N(a.subs(point), _DIGITS) for point in points]


def _close(pairs: Iterable[tuple[sympy.Expr, sympy.Expr]]) -> bool | None:
    pairs = list(pairs)
    if not all(value.is_number and value.is_finite for pair in pairs for value in pair):
        return None
    return all(abs(x - y) <= _CLOSE * max(abs(x), abs(y)) for x, y in pairs)


def _send(out: IO[bytes], verdict: bool | None) -> None:
    data = json.dumps(verdict).encode()
    out.write(struct.pack(">I", len(data)) + data)
    out.flush()


if __name__ == "__main__":
    main()
