"""What a run shows on the screen: its configuration at the start, a table of its forms at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.segment import Segments
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from lba_exp.results.naming import ONLY

VERDICT_STYLES = {"pass": "green", "fail": "bold red", "skipped": "yellow", "reference": "dim"}


def start_panel(config: Mapping[str, Any], parameters: int, console: Console) -> None:
    """Print the configuration as a tree, settings that are None left out, and the number of parameters.

    Args:
        config: the resolved configuration as a plain dict.
        parameters: number of the model's parameters.
        console: where to.
    """
    tree = Tree(Text("configuration", style="bold"), guide_style="dim")
    _grow(tree, config)
    _print(console, tree)
    console.print(Text.assemble(("parameters ", "dim"), (f"{parameters:,}", "bold")), soft_wrap=True)


def _grow(tree: Tree, node: Mapping[str, Any]) -> None:
    """Settings first, then the groups below."""
    for key, value in node.items():
        if value is not None and not (isinstance(value, Mapping) and value):
            tree.add(Text.assemble((f"{key}: ", "dim"), str(value) if not isinstance(value, Mapping) else "{}"))
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            _grow(tree.add(Text(str(key), style="cyan")), value)


def end_table(record: Mapping[str, Any], console: Console) -> None:
    """Print a run's record (result.json): a row per form, the run's figures, and last the path of the run folder.

    Nothing is cut, whatever the console's width. What the record lacks leaves an empty cell, or no line.

    Args:
        record: the run record; ``parity`` as of ``lba_exp.callbacks.parity.Parity.record``, or None where it was off.
        console: where to.
    """
    parity = record.get("parity") or {}
    _print(console, _forms(record, parity))
    for line in _notes(parity):
        console.print(line)
    console.print()
    _print(console, _facts(record, parity))
    console.print(Text.assemble(("run folder       ", "dim"), str(record.get("folder", ""))), soft_wrap=True)


def _print(console: Console, content: Table | Tree) -> None:
    """Print at the width that the content needs: in a narrow console rich would cut numbers and paths."""
    wide = console.options.update(width=10_000)
    needed = Measurement.get(console, wide, content).maximum
    console.print(Segments(console.render(content, wide.update(width=needed))), soft_wrap=True, end="")


def _forms(record: Mapping[str, Any], parity: Mapping[str, Any]) -> Table:
    split = parity.get("split", "test")
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False, header_style="dim")
    table.add_column("\nform")
    for name in (f"{split}\naccuracy", "agree-\nment", "relative\nerror", "operator\nerror", "\nlatency", "peak\nmemory"):
        table.add_column(name, justify="right")
    table.add_column("\nverdict")
    test = record.get("metrics", {}).get("test", {})
    rows = parity.get("forms") or {ONLY: {}}
    if len(rows) == 1 and not parity.get("reference"):  # not compared with anything: the test's own accuracy
        rows = {form: {"accuracy": test.get("accuracy"), **figures} for form, figures in rows.items()}
    for form, figures in rows.items():
        form = (record.get("form") or record.get("variant") or "") if form == ONLY else form
        verdict = figures.get("verdict") or ""
        latency, peak = figures.get("latency_ms"), figures.get("peak_bytes")
        table.add_row(
            Text(str(form), style="bold"),
            percent(figures.get("accuracy")),
            percent(figures.get("agreement")),
            scientific(figures.get("rel")),
            scientific(figures.get("operator_rel")),
            "" if latency is None else f"{latency:,.{0 if latency >= 1000 else 1}f} ms",
            binary_size(peak),
            Text(verdict, style=VERDICT_STYLES.get(verdict, "")),
        )
    return table


def _notes(parity: Mapping[str, Any]) -> list[RenderableType]:
    """What the table's figures mean, and why a form has none."""
    if parity.get("applicable") is False:
        method = f" Memory of one batch, by {parity['memory_method']}." if parity.get("memory_method") else ""
        return [Text(f"Parity does not apply: {parity['reason']}.{method}", style="dim")]
    forms, notes = parity.get("forms") or {}, []
    measured = [figures for figures in forms.values() if "count" in figures]
    if measured:
        ties = max(figures["near_ties"] for figures in measured)
        near = f"; {ties:,} near {'tie' if ties == 1 else 'ties'} left out of agreement" if ties else ""
        method = f"; memory of one batch, by {parity['memory_method']}" if parity.get("memory_method") else ""
        notes.append(
            f"Accuracy, agreement and error over {measured[0]['count']:,} {parity['split']} samples{near}{method}. "
            f"Errors are relative L2 in float32: logits against {parity['reference']} (at most {parity['tolerance']:g}), "
            f"operator against float64 (at most {parity['operator_tolerance']:g})."
        )
    notes = [Text(note, style="dim") for note in notes]
    for form, figures in forms.items():
        if figures.get("verdict") in ("skipped", "fail"):
            notes.append(Text(f"{form} {'failed' if figures['verdict'] == 'fail' else 'skipped'}: {figures['reason']}.", style="yellow"))
    if parity.get("failed") and not any(figures.get("verdict") == "fail" for figures in forms.values()):
        notes.append(Text(f"Failed earlier in the run, {len(parity['failed'])} times: {parity['failed'][-1]['sentence']}", style="yellow"))
    return notes


def _facts(record: Mapping[str, Any], parity: Mapping[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    metrics, cost, best = record.get("metrics", {}), record.get("efficiency") or {}, record.get("best") or {}
    validation, test = metrics.get("validation", {}), metrics.get("test", {})

    def fact(name: str, *parts: str | None) -> None:
        text = ", ".join(part for part in parts if part)
        if text:
            table.add_row(Text(name, style="dim"), Text(text))

    def part(value: Any, form: str) -> str | None:
        return None if value is None else form.format(value)

    fact("variant", record.get("variant"), part(record.get("seed"), "seed {}"))
    for split, values in (("test", test), ("validation", validation)):
        others = [f"{name} {value:.4f}" for name, value in values.items() if name not in ("accuracy", "loss")]
        fact(split, part(percent(values.get("accuracy")) or None, "accuracy {}"), *others, part(values.get("loss"), "loss {:.4f}"))
    final = str(best.get("monitor", "")).startswith("none")
    fact(
        "final weights" if final else "best weights",
        part(best.get("step"), "step {:,}"),
        None if final or best.get("epoch") is None else f"epoch {best['epoch'] + 1}",
    )
    worst = parity.get("worst") or {}
    fact(
        "parity",
        parity.get("verdict"),
        f"largest error {scientific(worst.get('rel')) or 'not finite'} ({worst['form']}, step {worst['step']:,})" if worst else None,
    )
    fact("parameters", part(record.get("parameters"), "{:,}"))
    fact("state", part(record.get("state_size"), "{:,} numbers per sequence in the recurrent form"))
    fact("training time", seconds(cost.get("train_seconds")), part(seconds(cost.get("wall_seconds")), "{} in all"))
    fact("training speed", part(cost.get("tokens_per_second"), "{:,.0f} tokens/s"), part(cost.get("step_ms"), "{:.1f} ms per step"))
    fact("model FLOPs", part(cost.get("tflops_per_second"), "{:.3g} TFLOP/s"), part(percent(cost.get("mfu")) or None, "{} of the peak"))
    if cost.get("target_accuracy") is not None:
        reached = part(cost.get("steps_to_target"), "step {:,}") or "not reached"
        fact("time to target", f"accuracy {percent(cost['target_accuracy'])}", seconds(cost.get("seconds_to_target")), reached)
    if cost.get("peak_memory_bytes") is not None:
        fact("training memory", f"{binary_size(cost['peak_memory_bytes'])} ({cost.get('peak_memory_method')})")
    return table


def percent(value: float | None) -> str:
    """0.9722 -> 97.22%; a share below one never reads 100%."""
    if value is None:
        return ""
    text = f"{100 * value:.2f}"
    return f"{'99.99' if text == '100.00' and value < 1 else text}%"


def scientific(value: float | None) -> str:
    """Two digits and an exponent; 0 for an exact zero."""
    return "" if value is None else "0" if value == 0 else f"{value:.1e}"


def binary_size(value: float | None) -> str:
    """Bytes with a binary unit."""
    if value is None:
        return ""
    power = 0 if value < 1024 else min(4, int(math.log2(value) / 10))
    return f"{value / 1024**power:.{1 if power else 0}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def seconds(value: float | None) -> str | None:
    """Seconds, or minutes and seconds, or hours and minutes."""
    if value is None:
        return None
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
