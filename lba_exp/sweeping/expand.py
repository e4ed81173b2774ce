"""From a ``sweep:`` node and a command line to the overrides of each job."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.core.override_parser.types import Override, Quote, QuotedString

from lba_exp import composing
from lba_exp.errors import ConfigError
from lba_exp.messages import unknown

ROW = "row"  # how exclusions name the variant


@dataclass(frozen=True)
class Choice:
    """One point of an axis: its overrides, and per key (or ``row``) the value that exclusions compare with."""

    overrides: tuple[str, ...]
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Axis:
    """What is varied together; ``where`` names its place in the sweep."""

    where: str
    keys: tuple[str, ...]
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class Draft:
    """The overrides of one job, not yet composed."""

    overrides: tuple[str, ...]
    row: str | None = None
    row_overrides: tuple[str, ...] = ()
    values: Mapping[str, Any] = field(default_factory=dict)

    def all_overrides(self) -> list[str]:
        """With the internal ones that tell a job which row it is."""
        if self.row is None:
            return list(self.overrides)
        name, stands_for = composing.ROW_KEYS
        return [*self.overrides, f"{name}={text(self.row)}", f"{stands_for}={text(list(self.row_overrides))}"]


def text(value: Any) -> str:
    """A value as the right-hand side of an override, quoted only where it must be."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ",".join(text(v) for v in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{text(str(k))}:{text(v)}" for k, v in value.items()) + "}"
    if isinstance(value, str):
        try:
            plain = composing.parse([f"k=[{value}]"])[0].value() == [value] and "\n" not in value
        except ConfigError:
            plain = False
        return value if plain else QuotedString(value, Quote.single).with_quotes()
    return str(value)


def read(override: str) -> Any:
    """The value of an override that is no list of values."""
    return composing.parse([override])[0].value()


def bare(override: Override | str) -> str:
    """The key of an override without the signs of adding and deleting."""
    key = override if isinstance(override, str) else override.get_key_element()
    return key.lstrip("+~").removeprefix("/")


def expand(node: Mapping[str, Any], overrides: Sequence[str] = ()) -> list[Draft]:
    """The jobs of a sweep: the product of its axes without its exclusions, the first axis varying slowest.

    Args:
        node: ``grid``, ``zip``, ``variants``, ``exclude``, ``only`` as of ``SweepSchema``, plain.
        overrides: the command line without ``hydra`` and ``sweep`` keys; a key that it lists or sets replaces that key of the grid.
    Raises:
        ConfigError: one sentence that says what is wrong in the sweep.
    """
    axes = file_axes(node)
    excluded = _exclusions(node.get("exclude") or [])
    all_axes = _with_command_line(axes, composing.parse(overrides))
    jobs = _product(all_axes, excluded)
    everything = [*_product(axes, []), *_product(all_axes, [])]
    known = list(dict.fromkeys(key for job in everything for key in job.values if key != "sweeps"))
    for rule in excluded:
        for key in rule:
            if not any(key in job.values for job in everything):
                raise ConfigError(f"sweep.exclude: {unknown(key, known, 'varied by this sweep')}")
        if not any(_matches(rule, job.values) for job in everything):
            shown = ", ".join(f"{k}: {v if len(v) > 1 else v[0]}" for k, v in rule.items())
            raise ConfigError(f"sweep.exclude: {{{shown}}} leaves nothing out: no job of this sweep is like that.")
    if not jobs:
        raise ConfigError("sweep.exclude leaves no job: every combination is excluded.")
    return jobs


def file_axes(node: Mapping[str, Any]) -> list[Axis]:
    """The axes that a ``sweep:`` node describes: each key of the grid, each zipped group, the variants."""
    axes = [_axis("sweep.grid", {key: values}) for key, values in (node.get("grid") or {}).items()]
    for group in node.get("zip") or []:
        if not isinstance(group, Mapping) or not group:
            raise ConfigError(f"sweep.zip: {group!r} is no group: write {{KEY: [A, B], OTHER: [C, D]}}.")
        axes.append(_axis("sweep.zip", group))
    variants = _variants(node.get("variants") or {}, node.get("only") or [])
    axes += [variants] if variants else []
    place: dict[str, str] = {}
    for axis in axes:
        for key in axis.keys:
            if key in place:
                raise ConfigError(f"{key} stands in {place[key]} and in {axis.where}: vary a key in one place.")
            place[key] = axis.where
    return axes


def _axis(where: str, group: Mapping[str, Any]) -> Axis:
    """Keys whose lists are walked together; one key: an axis of the grid."""
    for key, values in group.items():
        if not isinstance(values, list | tuple):
            shown = str(values).replace(",", ", ")
            raise ConfigError(f"{where}: {key} is {values!r}, no list: write {key}: [{shown}].")
        if not values:
            raise ConfigError(f"{where}: {key} has no values: give at least one, or take the key away.")
    lengths = {key: len(values) for key, values in group.items()}
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{key} has {n}" for key, n in lengths.items())
        raise ConfigError(f"{where}: lists that are walked together need one length, but {shown} values.")
    choices = []
    for point in zip(*group.values(), strict=True):
        overrides = tuple(f"{key}={text(value)}" for key, value in zip(group, point, strict=True))
        choices.append(Choice(overrides, {bare(key): read(o) for key, o in zip(group, overrides, strict=True)}))
    keys = tuple(bare(key) for key in group)
    for key in keys:
        _check_key(where, key)
    return _once(Axis(where, keys, tuple(choices)))


def _check_key(where: str, key: str) -> None:
    if key == "sweeps" or key.split(".")[0] in ("sweep", "hydra", "origin") or key.startswith("hydra/"):
        raise ConfigError(f"{where}: {key} cannot be varied; vary keys of a run (lba_exp/config.py) or groups (model, experiments, ...).")
    if key == "root":
        raise ConfigError(f"{where}: root cannot be varied: a sweep has one root.")


def _once(axis: Axis) -> Axis:
    seen: list[Mapping[str, Any]] = []
    for choice in axis.choices:
        if choice.values in seen:
            raise ConfigError(f"{axis.where}: {', '.join(choice.overrides)} stands there twice.")
        seen.append(choice.values)
    return axis


def _variants(variants: Mapping[str, Any], only: Sequence[str]) -> Axis | None:
    choices, keys = [], []
    for name, overrides in variants.items():
        if not str(name).strip():
            raise ConfigError("sweep.variants: a row has no name.")
        overrides = [] if overrides is None else overrides
        if not isinstance(overrides, list) or not all(isinstance(o, str) for o in overrides):
            raise ConfigError(f"sweep.variants: {name} needs a list of overrides, as on the command line: [model.mixer.gate=none].")
        for override in composing.parse(overrides):
            if override.is_sweep_override():
                raise ConfigError(f"sweep.variants: {name} lists several values ({override.input_line}): a row is one setting.")
            _check_key("sweep.variants", bare(override))
            keys.append(bare(override))
        choices.append(Choice(tuple(overrides), {ROW: str(name)}))
    for name in only:
        if name not in variants:
            raise ConfigError(f"sweep.only: {unknown(str(name), variants, 'a variant of this sweep')}")
    choices = [c for c in choices if not only or c.values[ROW] in only]
    return Axis("sweep.variants", tuple(dict.fromkeys(keys)), tuple(choices)) if choices else None


def _exclusions(rules: Sequence[Any]) -> list[dict[str, list[Any]]]:
    excluded = []
    for rule in rules:
        if not isinstance(rule, Mapping) or not rule:
            raise ConfigError(f"sweep.exclude: {rule!r} is no combination: write {{KEY: VALUE, OTHER: VALUE}}.")
        lists = {bare(k): v if isinstance(v, list) else [v] for k, v in rule.items()}
        excluded.append({k: [str(v) if k == ROW else read(f"k={text(v)}") for v in vs] for k, vs in lists.items()})
    return excluded


def _matches(rule: Mapping[str, list[Any]], values: Mapping[str, Any]) -> bool:
    return all(key in values and values[key] in allowed for key, allowed in rule.items())


def _with_command_line(axes: list[Axis], overrides: Sequence[Override]) -> list[Axis]:
    """The axes with those of the command line, in its order: lists of values, and settings as axes of one point."""
    axes = list(axes)
    for override in overrides:
        key = bare(override)
        held = next((i for i, a in enumerate(axes) if key in a.keys), len(axes))
        if held < len(axes) and axes[held].where not in ("sweep.grid", "the command line"):
            where = axes[held].where
            raise ConfigError(
                f"{override.input_line}: {key} is set by {where}: give a key in one place, or choose rows with sweep.only=[...]."
            )
        if override.is_sweep_override():
            if key in ("sweeps", "root"):
                raise ConfigError(f"{override.input_line}: give one {key.rstrip('s')} at a time, and run lba-train -m once for each.")
            texts = [f"{override.get_key_element()}={v}" for v in composing.values(override)]
            choices = [Choice((t,), {key: read(t)}) for t in texts]
        else:
            choices = [Choice((override.input_line,), {} if override.is_delete() else {key: override.value()})]
        axes[held : held + 1] = [_once(Axis("the command line", (key,), tuple(choices)))]
    return axes


def _product(axes: Sequence[Axis], excluded: Sequence[Mapping[str, list[Any]]]) -> list[Draft]:
    jobs = []
    for point in itertools.product(*(axis.choices for axis in axes)):
        values = {key: value for choice in point for key, value in choice.values.items()}
        if any(_matches(rule, values) for rule in excluded):
            continue
        of_row = next((c.overrides for a, c in zip(axes, point, strict=True) if a.where == "sweep.variants"), ())
        jobs.append(Draft(tuple(o for c in point for o in c.overrides), values.get(ROW), of_row, values))
    return jobs
