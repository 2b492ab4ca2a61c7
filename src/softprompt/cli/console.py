"""Tables and notes on stderr."""

import logging
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from softprompt.cli import is_main_process
from softprompt.types import LoadingWarning, TruncationWarning

console = Console(stderr=True, highlight=False, markup=False, quiet=not is_main_process())
_NOTES = (LoadingWarning, TruncationWarning)


def quiet() -> None:
    """Suppress other libraries' progress bars and warnings; show our own as notes."""
    # Read by transformers when it is imported, which takes seconds and which not every command needs.
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    if "transformers" in sys.modules:
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    for category in _NOTES:
        warnings.simplefilter("always", category)
    default_showwarning = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any) -> None:
        if issubclass(category, _NOTES):
            console.print(f"note: {message}")
        else:
            default_showwarning(message, category, *args, **kwargs)

    warnings.showwarning = show


def show_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a table with a column per key on stderr."""
    if not rows:
        console.print("none")
        return
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(*names, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*("" if row.get(name) is None else str(row[name]) for name in names))
    console.print(table)
