"""The ``verify`` view: a report as a page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from lbi_compile.ablation import Ablation
from lbi_compile.report import Check, Report

from .text import bar, facts, layers, plain

_WORDS = {True: ("ok", "green"), False: ("FAILED", "bold red"), None: ("n/a", "dim")}
_BAR = 20


def page(report: Report, width: int | None = None) -> str:
    """The report as plain text, ``width`` columns wide; by default as wide as the terminal, or 80 where there is none.

    Example:
        >>> print(page(lbi_compile.verify(bounded, x), width=80))  # doctest: +SKIP
    """
    return plain(ReportView(report), width)


class ReportView:
    """A report as something rich can print, fitted to the width of the console."""

    def __init__(self, report: Report) -> None:
        self.report = report

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        report = self.report
        word, style = _WORDS[report.ok]
        yield Text.assemble(("verify: ", "bold"), (word, style))
        yield facts(_header(report))
        yield Text("\nchecks", style="bold")
        yield _checks(report.checks)
        if report.worst:
            yield Text("\nlargest relative gradient errors", style="bold")
            yield facts((f"{error:.1e}", name) for name, error in report.worst)
        if report.jacobian_norms:
            yield Text("\ninterface Jacobians, spectral norm", style="bold")
            yield _norms(
                report.first_boundary, report.jacobian_norms, report.product_norms, ascii_only=options.ascii_only
            )
        for more in report.more_norms:
            yield Text(f"\nJacobians of the {more.latent} latent, spectral norm", style="bold")
            yield _norms(more.first, more.norms, more.products, ascii_only=options.ascii_only)
        if report.ablations:
            yield Text("\nchange of the outputs, relative, where latents are spoiled", style="bold")
            yield _ablations(report.ablations)


def _header(report: Report) -> Iterator[tuple[str, RenderableType]]:
    yield "engine", f"{report.engine}, compared with plain autograd in float64"
    yield "gradients", f"largest relative error {report.max_rel_error:.1e}, at most {report.tolerance:.1e} allowed"
    yield (
        "leak",
        {None: "no position axis", False: "none: no position sees later inputs", True: "FUTURE LEAK"}[report.leak],
    )
    yield (
        "batch",
        {None: "not asked for", False: "SAMPLES MIX", True: "samples are independent"}[report.batch_independent],
    )
    if report.lanes:
        numbers = sorted({number for _, number in report.lanes})
        grouped = (
            f"{number} at {layers(name for name, lanes in report.lanes if lanes == number)}" for number in numbers
        )
        yield "lanes", "; ".join(grouped)


def _checks(checks: tuple[Check, ...]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in checks:
        word, style = _WORDS[check.ok]
        table.add_row(Text(f"  {word:<6}", style=style), Text(check.name), Text(check.detail))
    return table


def _ablations(found: Sequence[Ablation]) -> Table:
    ways = list(dict.fromkeys(one.way for one in found))
    table = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
    table.add_row(*(Text(head, style="dim") for head in ("   k", *(f"{way:>9}" for way in ways))))
    for boundary in dict.fromkeys(one.boundary for one in found):
        changes = {one.way: one.change for one in found if one.boundary == boundary}
        table.add_row(f"{'all' if boundary is None else boundary:>4}", *(f"{changes[way]:9.3g}" for way in ways))
    return table


def _norms(first: int, norms: Sequence[float], products: Sequence[float], *, ascii_only: bool) -> Table:
    top = max(filter(math.isfinite, (*norms, *products)), default=0.0) or 1.0
    table = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
    table.add_row(
        *(Text(head, style="dim") for head in ("   k", f"{'J_k':>9}", f"{'product from the last on':<{_BAR + 11}}"))
    )
    for k, (norm, product) in enumerate(zip(norms, reversed(products), strict=True), start=first):
        drawn = bar(min(product / top, 1.0) if product == product else 0.0, _BAR, ascii_only=ascii_only)
        table.add_row(f"{k:>4}", f"{norm:9.3g}", Text.assemble(f"{product:9.3g}  ", (drawn, "cyan")))
    return table
