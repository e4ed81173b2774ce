"""One sentence for a mistake in a configuration: the key, what is valid, and the nearest match."""

from __future__ import annotations

import re
import shlex
import types
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf.errors import ConfigAttributeError, ConfigKeyError

from lba_exp.errors import ConfigError


def as_typed(value: Any) -> str:
    """A value as one writes it in YAML."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def unknown(word: str, valid: Iterable[Any], what: str) -> str:
    """``word`` is not ``what``, with the nearest match and all valid names."""
    names = [as_typed(v) for v in valid]
    near = get_close_matches(word, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else "."
    choose = f" Valid: {', '.join(names)}." if names else " There are none."
    return f"{word!r} is not {what}{hint}{choose}"


def no_override(text: str) -> str:
    """The sentence for a text that Hydra's grammar of overrides does not take; quoting the value is what most of them lack."""
    key, sign, value = text.partition("=")
    if sign and re.fullmatch(r"[+~]*[\w./@]+", key) and value and not set(value) & set("'\"{}[]"):
        shown = f"{key}='{value}'"
        quoted = shlex.quote(shown) if set(shown) & set('$`\\!"') else f'"{shown}"'
        return f"{text} holds a character that Hydra does not take bare: quote the value, and all of it once more for the shell, {quoted}."
    return f"{text!r} is no override: write key=value, group=option or +key=value; a value with brackets, commas or quotes in quotes."


def all_keys(node: Any, prefix: str = "") -> list[str]:
    """Every dotted key below a schema instance, nested schemas included."""
    keys = []
    for member in fields(node):
        value = getattr(node, member.name)
        keys.append(prefix + member.name)
        if is_dataclass(value):
            keys += all_keys(value, f"{prefix}{member.name}.")
    return [k for k in keys if k.split(".")[0] != "origin"]


def _walk(key: str, schema: Any) -> tuple[Any, str, str | None]:
    """The deepest known level on a key's path: (schema there, its prefix, first unknown part or None)."""
    node, prefix = schema, ""
    for part in key.split("."):
        if not is_dataclass(node):
            return node, prefix, None  # a free dictionary: any key
        if part not in {f.name for f in fields(node)}:
            return node, prefix, part
        node, prefix = getattr(node, part), f"{prefix}{part}."
    return node, prefix, None


def check_key(key: str, schema: Any, groups: Iterable[str] = ()) -> None:
    """Raises ConfigError where a dotted key is not one of the schema's."""
    node, prefix, bad = _walk(key, schema)
    if bad is not None:
        raise ConfigError(unknown_key(key, node, prefix, schema, groups))
    if not prefix.startswith("origin."):
        parent, _, last = key.rpartition(".")
        holder = _walk(parent, schema)[0] if parent else schema
        if is_dataclass(holder) or isinstance(holder, dict):
            return
        raise ConfigError(f"{key} is not a key: {parent} holds a value, and has no {last}.")
    raise ConfigError(f"{key} is filled in by the program and cannot be set.")


def unknown_key(key: str, node: Any, prefix: str, schema: Any, groups: Iterable[str] = (), where: str = "") -> str:
    """The sentence for a key that does not exist; near matches are sought beside it first, then everywhere."""
    siblings = [prefix + f.name for f in fields(node) if prefix + f.name != "origin"]
    if not prefix:
        siblings += [g for g in groups if g not in siblings]
    near = get_close_matches(key, siblings, n=1, cutoff=0.7)
    if not near:
        last = key.rpartition(".")[2]
        by_last = {k.rpartition(".")[2]: k for k in reversed(all_keys(schema))}
        near = [by_last[m] for m in get_close_matches(last, list(by_last), n=1, cutoff=0.75)]
    hint = f"; did you mean {near[0]}?" if near else "."
    level = f"under {prefix[:-1]}" if prefix else "at the top level"
    return f"{key} is not a key of a run{where}{hint} Valid {level}: {', '.join(s.removeprefix(prefix) for s in siblings)}."


def _member(key: str, schema: Any):
    parent, _, last = key.rpartition(".")
    node = _walk(parent, schema)[0] if parent else schema
    if not is_dataclass(node):
        return None, None
    member = next((f for f in fields(node) if f.name == last), None)
    if member is None:
        return None, None
    kind = member.type if not isinstance(member.type, str) else get_type_hints(type(node)).get(last, Any)
    return member, kind


def _type_words(kind: Any) -> str:
    simple = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    if kind in simple:
        return simple[kind]
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        words = [_type_words(k) for k in get_args(kind)]
        if "an integer" in words and "a number" in words:
            words.remove("an integer")
        return " or ".join(words)
    if origin is list:
        return f"a list ([..., ...]) of {_type_words(get_args(kind)[0]).removeprefix('a ').removeprefix('an ')}s"
    if origin is dict or is_dataclass(kind):
        return "a group of keys"
    return "a value"


def bounds_words(metadata: Any) -> str:
    """The bounds of a setting in words, with a leading space; empty where there are none."""
    if "choices" in metadata:
        return f": one of {', '.join(map(as_typed, metadata['choices']))}"
    if "names" in metadata:
        return f": one of {', '.join(metadata['names'].names)}"
    words = [f"{sign} {metadata[bound]}" for bound, sign in (("low", ">="), ("above", ">"), ("high", "<=")) if bound in metadata]
    return f" {' and '.join(words)}" if words else ""


def describe(key: str, schema: Any) -> str:
    """What a key may hold: ``give an integer >= 1 (features per token).``"""
    member, kind = _member(key, schema)
    if member is None:
        return "see lba_exp/config.py."
    about = f" ({member.metadata['about']})" if "about" in member.metadata else ""
    words, choices = bounds_words(member.metadata), member.metadata.get("choices", ())
    if not all(isinstance(choice, str) for choice in choices):  # of several types
        return f"give{words.removeprefix(':')}{about}."
    return f"give {_type_words(kind)}{words}{about}."


def from_hydra(error: Exception, schema: Any, global_groups: Iterable[str]) -> str:
    """One sentence out of an exception of Hydra's or OmegaConf's."""
    causes = [error]
    while causes[-1].__cause__ is not None and len(causes) < 8:
        causes.append(causes[-1].__cause__)
    text = " ".join(str(c) for c in causes)
    inside = re.search(r"In '([^']+)'", text)
    where = f" (in {inside.group(1)}.yaml)" if inside and not inside.group(1).startswith("train") else ""
    key = next((c.full_key for c in causes if getattr(c, "full_key", None)), None)
    if key is None and (match := re.search(r"full_key: (\S+)", text)):
        key = match.group(1)
    key = re.sub(r"\[\d+\]", "", key) if key else key  # an entry of a list: speak of the list
    lacks = next((g for g in global_groups if key and key.split(".")[0] == g), None)
    if lacks is None and (match := re.search(r"Key '(\w+)' (?:is )?not in", text)) and match.group(1) in global_groups:
        lacks = match.group(1)
    if lacks:
        return f"a file of {lacks}/{where} must begin with the line '# @package _global_': add it."
    if refers := re.search(r"Interpolation key '([^']+)' not found|Environment variable '([^']+)' not found", text):
        return f"{key or 'a value'}{where} refers to {refers.group(1) or refers.group(2)}, which does not exist."
    if key and key.split(".")[0] == "hydra":
        return f"{key}{where} is not a key of Hydra's own configuration: `lba-train --cfg hydra` lists them."
    if key:
        node, prefix, bad = _walk(key, schema)
        if not is_dataclass(node) and "not in" in text:
            return f"{key}{where} is a new key of {prefix[:-1]}: write +{key}=VALUE."
        if bad is not None or any(isinstance(c, ConfigKeyError | ConfigAttributeError) and "not in" in str(c) for c in causes):
            return unknown_key(key, node, prefix, schema, where=where)
        value = re.search(r"Value '(.*?)' of type|Cannot convert '(.*?)' to|Invalid value assigned: (\S+)", text)
        got = next((v for v in value.groups() if v is not None), "") if value else ""
        got = "" if got == "AnyNode" else got  # OmegaConf's own word for a value where a list belongs
        shown = f"{key}={got}" if got else key
        return f"{shown}{where} does not fit: {describe(key, schema)}"
    first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return f"the configuration cannot be composed: {first.rstrip('.')}."
