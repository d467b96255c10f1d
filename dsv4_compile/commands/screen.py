"""What a run shows: progress on stderr, the text and the table on stdout."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table


class Step:
    """Progress of one step of a run; without a known total only its time is shown."""

    def __init__(self, bar: Progress, what: str):
        self.bar, self.task = bar, bar.add_task(what, total=None)

    def at(self, name: str, done: int, total: int) -> None:
        """`done` of `total` things, the next being `name`."""
        self.bar.update(self.task, completed=done, total=total)

    def tick(self) -> None:
        self.bar.advance(self.task)


class Screen:
    """Terminal output of a run; files and pipes get one plain line a step."""

    def __init__(self) -> None:
        self.out, self.notes = Console(highlight=False), Console(stderr=True, highlight=False)

    @contextmanager
    def step(self, what: str) -> Iterator[Step]:
        """Show that something goes on, and afterwards how long it took."""
        start = perf_counter()
        columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn()
        with Progress(*columns, console=self.notes, transient=True, disable=not self.notes.is_terminal) as bar:
            yield Step(bar, what)
        self.notes.print(f"{what}: {perf_counter() - start:.1f} s", style="dim", markup=False)

    def note(self, text: str) -> None:
        self.notes.print(text, style="dim", markup=False)

    def write(self, text: str) -> None:
        """A piece of the generated text, at once and as it is."""
        sys.stdout.write(text)
        sys.stdout.flush()

    def table(self, result: Mapping[str, Any]) -> None:
        """The result of a run, one row a measurement."""
        names = [name for name in ("compiled", "eager", "inductor") if result["decode_tok_s"].get(name) is not None]
        table = Table("", *names)
        for column in table.columns[1:]:
            column.justify = "right"

        def row(what: str, values: Mapping[str, Any] | Any, form: str) -> None:
            values = values if isinstance(values, Mapping) else {"compiled": values}
            shown = [values.get(name) for name in names]
            table.add_row(what, *("" if value is None else format(value, form) for value in shown))

        for fusion, count in result["counts"].items():
            found = result["sites"].get(fusion)
            table.add_row(f"fuse.{fusion}, sites", f"{count}" if found is None else f"{count} of {found}")
        table.add_section()
        row("compile, s", result["compile_s"], ".1f")
        row("first token, s", result["first_token_s"], ".1f")
        row("recompiles while decoding", result["recompiles"], "d")
        memory = result["memory_mb"]
        row("weights, MB", memory["weights"], ".1f")
        row("state, MB", memory["state"], ".1f")
        if memory["beside"] is not None:
            row("most memory beside them, MB", memory["beside"], ".1f")
        table.add_section()
        row("prefill, tokens/s", result["prefill_tok_s"], ".1f")
        row("decode, tokens/s", result["decode_tok_s"], ".1f")
        table.add_section()
        row("max logit error, same choices", result["max_logit_error"], ".1e")
        row("median, decoding", result["median_logit_error"], ".1e")
        row("99th percentile, decoding", result["p99_logit_error"], ".1e")
        row("other experts chosen", result["choices_changed"], ".2%")
        row("bits per byte", result["bits_per_byte"], ".4f")
        self.out.print(table)
