"""The user's own configuration files, looked at before Hydra composes them: its messages for these mistakes name no key and no option."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from lba_exp.checks import check_reserved
from lba_exp.errors import ConfigError
from lba_exp.messages import describe, unknown

Options = Callable[[str], Mapping[str, Path]]


def check_file(path: Path, group: str, groups: tuple[str, ...], options: Options, schema: Any) -> None:
    """Checks the shape of one entry of a group whose files are whole runs (experiments, sweeps, debug), and of those that it builds on.

    Args:
        path: the file.
        group: the group that it belongs to.
        groups: all groups; ``options`` gives the entries of one, name -> file.
        schema: an instance of the run's schema.
    Raises:
        ConfigError: it is no mapping; its defaults list names no group or no entry; a group is given one value or a list; a key of the
            Trainer's that another part of the run owns.
    """
    _check(path, group, groups, options, schema, ())


def _check(path: Path, group: str, groups: tuple[str, ...], options: Options, schema: Any, seen: tuple[Path, ...]) -> None:
    where = f"{group}/{path.name}"
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError):
        return  # said better where Hydra reads it
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ConfigError(f"{where} holds {_kind(content)}: write keys and values (seed: 1).")
    for key, value in content.items():
        if key in groups and not isinstance(value, dict):
            if isinstance(value, str) and value in options(key):
                raise ConfigError(f"{key}: {value} in {where} gives one value to a group: write defaults: [override /{key}: {value}].")
            give = f"give its keys ({key}: {{...}}), or defaults: [override /{key}: NAME]"
            raise ConfigError(f"{key} in {where} holds {_kind(value)}: {give}.")
        if key in groups and is_dataclass(getattr(schema, key, None)):
            for name in value:
                check_reserved(f"{key}.{name}", f" (in {where})")
    _check_shapes(content, schema, schema, "", where)
    for entry in _defaults(content, where):
        _check_default(entry, where, group, groups, options, schema, (*seen, path))


def _check_shapes(content: dict, node: Any, schema: Any, prefix: str, where: str) -> None:
    """A list where keys belong, or keys where a list belongs: Hydra says of them neither the key nor what is valid."""
    for member in fields(node):
        value, default = content.get(member.name), getattr(node, member.name)
        key = prefix + member.name
        groups = is_dataclass(default) or isinstance(default, dict)
        if (groups and isinstance(value, list)) or (isinstance(default, list) and isinstance(value, dict)):
            raise ConfigError(f"{key} in {where} holds {_kind(value)}: {describe(key, schema)}")
        if is_dataclass(default) and isinstance(value, dict):
            _check_shapes(value, default, schema, f"{key}.", where)


def _defaults(content: dict, where: str) -> list:
    defaults = content.get("defaults", [])
    if not isinstance(defaults, list):
        raise ConfigError(f"defaults in {where} holds {_kind(defaults)}: give a list (defaults: [override /model: lion_d]).")
    return defaults


def _check_default(entry: Any, where: str, group: str, groups: tuple[str, ...], options: Options, schema: Any, seen: tuple) -> None:
    if isinstance(entry, str):  # another file, of the same group unless it begins with /
        target, _, name = entry.removeprefix("/").rpartition("/") if entry.startswith("/") else (group, "", entry)
        if entry == "_self_":
            return
        if "@" in entry or target not in groups:
            return  # a package of the user's own making: left to Hydra
    elif isinstance(entry, dict) and len(entry) == 1:
        ((words, name),) = entry.items()
        *kinds, target = str(words).split()
        if "@" in target or target.removeprefix("/").split("/")[0] == "hydra":
            return
        if not target.startswith("/"):
            named = target if target in groups else next(iter(groups))
            raise ConfigError(f"{words}: {name} in the defaults of {where} is looked for in {group}/: write override /{named}: {name}.")
        target = target.removeprefix("/")
        if target not in groups:
            raise ConfigError(f"{target} in the defaults of {where}: {unknown(target, groups, 'a group')}")
        if "override" not in kinds and target not in ("experiments", "sweeps", "debug"):
            raise ConfigError(f"/{target}: {name} in the defaults of {where} would be a second one: write override /{target}: {name}.")
        if name is None:
            return
    else:
        raise ConfigError(f"{entry} in the defaults of {where} is no entry: write override /model: lion_d, or the name of a file.")
    known = options(target)
    for single in name if isinstance(name, list) else [name]:
        if str(single) not in known:
            raise ConfigError(f"{target}: {single} in the defaults of {where}: {unknown(str(single), known, f'an entry of {target}')}")
        following = known[str(single)]
        if target in ("experiments", "sweeps", "debug") and following not in seen:
            _check(following, target, groups, options, schema, seen)


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    return {list: "a list", dict: "keys"}.get(type(value), f"the one value {value}")
