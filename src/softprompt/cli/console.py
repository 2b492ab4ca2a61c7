"""The terminal's stderr: where tables and advice go."""

import logging
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from softprompt.cli import speaks

console = Console(stderr=True, highlight=False, markup=False, quiet=not speaks())


def quiet() -> None:
    """Keep other libraries' progress bars and advice off the terminal."""
    import transformers

    from softprompt.backbones.loading import LoadingWarning

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    warnings.simplefilter("always", LoadingWarning)
    shown_by_python = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any, **further: Any) -> None:
        if issubclass(category, LoadingWarning):
            console.print(f"note: {message}")
        else:
            shown_by_python(message, category, *where, **further)

    warnings.showwarning = show


def show_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """A table with a column a key, on stderr."""
    if not rows:
        console.print("none")
        return
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(*names, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*("" if row.get(name) is None else str(row[name]) for name in names))
    console.print(table)
