"""`tinyr2 report`: a run's page, written again.

In: a run folder. Out: its report.html, and what it shows as one JSON object.
"""

import webbrowser
from pathlib import Path

from tinyr2.report.console import Console
from tinyr2.report.html import report_data, write_report


def report(run: Path, console: Console, *, show: bool = False) -> dict:
    """Write the page, and with `show` open it in a browser; returns what `--json` prints."""
    path = write_report(run)
    console.note(str(path))
    if show and not webbrowser.open(path.resolve().as_uri()):
        console.note("no browser could be started; open the file yourself")
    return report_data(run) | {"report": str(path)}
