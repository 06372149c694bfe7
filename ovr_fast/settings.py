"""How settings are declared, read, checked and written. Knows none of them: they are in ``config``.

A settings class is a frozen dataclass whose fields are made by ``setting``, or are such classes, or
tuples of such classes (TOML's arrays of tables).
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import textwrap
import tomllib
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ovr_fast.errors import OVRFastError


class ConfigError(OVRFastError, ValueError):
    """A setting that cannot be used. The message names it and how to mend it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What a setting means and may be. Of a list, every item is held to the range."""

    meaning: str
    unit: str = ""
    at_least: float | None = None
    over: float | None = None
    at_most: float | None = None
    under: float | None = None
    choices: tuple[str, ...] = ()
    check: Callable[[str], str] | None = None  # what is wrong with a value; empty if nothing is
    may_change: bool = False  # by a resumed run; any other change would make it another run

    @property
    def range(self) -> str:
        """The range in words; empty where everything of the type is allowed."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        bounds = (
            ("at least", self.at_least), ("over", self.over),
            ("at most", self.at_most), ("under", self.under),
        )  # fmt: skip
        return " and ".join(f"{words} {bound}" for words, bound in bounds if bound is not None)

    def problem(self, value: Any) -> str:
        """What is wrong with a value of the right type; empty if nothing is."""
        if isinstance(value, tuple):
            return next(filter(None, map(self.problem, value)), "")
        if isinstance(value, str):
            if self.choices and value not in self.choices:
                return f"is not {self.range}"
            return self.check(value) if self.check else ""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return ""
        if not math.isfinite(value):
            return "must be a finite number"
        outside = (
            (self.at_least is not None and value < self.at_least)
            or (self.over is not None and value <= self.over)
            or (self.at_most is not None and value > self.at_most)
            or (self.under is not None and value >= self.under)
        )
        return f"must be {self.range}" if outside else ""


def setting(default: Any, meaning: str, **rule: Any) -> Any:
    """A field of a settings dataclass. ``rule``: see ``Rule``."""
    return field(default=default, metadata={"rule": Rule(meaning=meaning, **rule)})


@dataclass(frozen=True, slots=True)
class Setting:
    """One field of a ``Config``, with its value."""

    name: str  # section.key
    value: Any
    rule: Rule


def settings_of(node: Any, where: str = "") -> Iterator[Setting]:
    """Every setting below a settings dataclass, those of the items of a list among them."""
    for item in dataclasses.fields(node):
        name, value = f"{where}{item.name}", getattr(node, item.name)
        if dataclasses.is_dataclass(value):
            yield from settings_of(value, f"{name}.")
            continue
        if "rule" in item.metadata:
            yield Setting(name, value, item.metadata["rule"])
        if isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            for number, part in enumerate(value):
                yield from settings_of(part, f"{name}[{number}].")


def read_settings(kind: type, path: str | Path, overrides: list[str]) -> Any:
    """An instance of ``kind`` from a TOML file and ``section.key=value`` overrides.

    Raises:
        ConfigError: the file is missing or malformed, a key is unknown, or a value has the wrong
            type.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")  # with or without a byte-order mark
        tree = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 ({error}); save it as UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error
    for override in overrides:
        key, separator, given = override.partition("=")
        if not separator:
            raise ConfigError(f"{override!r} is not of the form section.key=value")
        try:
            value = tomllib.loads(f"value = {given}")["value"]
        except tomllib.TOMLDecodeError:
            value = given  # a bare word is a string
        node = tree
        *sections, last = key.strip().split(".")
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{key}: {section} is not a section")
        node[last] = value
    return _build(kind, kind, tree, "")


def _build(root: type, kind: type, tree: dict[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(kind)
    values = {}
    for key, value in tree.items():
        name = f"{where}{key}"
        if key not in hints:
            raise ConfigError(f"unknown setting {name}{_nearest(root, name, kind, where)}")
        values[key] = _convert(root, hints[key], value, name)
    # Sections keep their own defaults where the file says nothing about a part of them.
    for item in dataclasses.fields(kind):
        given = tree.get(item.name)
        if isinstance(given, dict) and item.default_factory is not dataclasses.MISSING:
            default = item.default_factory()
            values[item.name] = dataclasses.replace(
                default, **{key: getattr(values[item.name], key) for key in given}
            )
    return kind(**values)


def _nearest(root: type, name: str, kind: type, where: str) -> str:
    """The most similar setting: in the same section first, then anywhere."""
    here = [f"{where}{item.name}" for item in dataclasses.fields(kind)]
    close = difflib.get_close_matches(name, here, n=1, cutoff=0.6)
    if not close:
        close = difflib.get_close_matches(name, list(_all_names(root, "")), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; {where or 'the file'} has {here}"


def _all_names(kind: type, where: str) -> Iterator[str]:
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from _all_names(hint, f"{where}{name}.")  # type: ignore[arg-type]
        else:
            yield f"{where}{name}"


def _convert(root: type, hint: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ConfigError(f"{name} is a section, not a value")
        return _build(root, hint, value, f"{name}.")  # type: ignore[arg-type]
    if typing.get_origin(hint) is tuple:
        (item,) = typing.get_args(hint)[:1]
        if isinstance(value, str) and item is str:
            value = [value]
        if not isinstance(value, list):
            raise ConfigError(f"{name}={value!r} must be a list")
        return tuple(_convert(root, item, part, f"{name}[{i}]") for i, part in enumerate(value))
    if isinstance(hint, types.UnionType):
        raise ConfigError(f"{name}: settings have one type")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not hint:
        raise ConfigError(f"{name}={value!r} must be a {hint.__name__}")
    return value


def to_toml(config: Any, *, described: bool = False) -> str:
    """The resolved settings as a TOML file that ``read_settings`` reads back.

    Args:
        described: with each setting's meaning and range as a comment.
    """
    lines: list[str] = []

    def value(item: Any) -> str:
        if isinstance(item, bool):
            return str(item).lower()
        if isinstance(item, str):
            escaped = item.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
            return f'"{escaped}"'
        if isinstance(item, tuple):
            return "[" + ", ".join(map(value, item)) + "]"
        return repr(item)

    def section(node: Any, where: str) -> None:
        plain: list[str] = []
        nested, tables = [], []
        for item in dataclasses.fields(node):
            current = getattr(node, item.name)
            if dataclasses.is_dataclass(current):
                nested.append((item.name, current))
            elif isinstance(current, tuple) and current and dataclasses.is_dataclass(current[0]):
                tables.append((item.name, current))
            else:
                if described and "rule" in item.metadata:
                    plain.extend(f"# {line}" for line in _comment(item.metadata["rule"]))
                plain.append(f"{item.name} = {value(current)}")
        if where and plain:
            lines.extend([f"[{where}]", *plain, ""])
        prefix = f"{where}." if where else ""
        for name, current in nested:
            section(current, prefix + name)
        for name, rows in tables:
            for row in rows:
                body = [
                    f"{item.name} = {value(getattr(row, item.name))}"
                    for item in dataclasses.fields(row)
                ]
                lines.extend([f"[[{prefix}{name}]]", *body, ""])

    section(config, "")
    return "\n".join(lines)


def _comment(rule: Rule) -> list[str]:
    extra = ", ".join(filter(None, [rule.unit, rule.range]))
    return textwrap.wrap(rule.meaning + (f" ({extra})" if extra else ""), width=98)


def _rows(kind: type, where: str, values: Any = None) -> Iterator[tuple[str, str, str, Rule]]:
    """Name, type, default and rule of every setting of a section, whose defaults may be its own
    (``values``)."""
    hints = typing.get_type_hints(kind)
    for item in dataclasses.fields(kind):
        name, hint = f"{where}{item.name}", hints[item.name]
        if item.default is not dataclasses.MISSING:
            value = item.default
        else:
            value = typing.cast(Callable[[], Any], item.default_factory)()
        if values is not None:
            value = getattr(values, item.name)
        if dataclasses.is_dataclass(hint):
            yield from _rows(typing.cast(type, hint), f"{name}.", value)
        elif "rule" in item.metadata:
            default = "" if _is_table(hint) else _default(value)
            yield name, _type_name(hint), default, item.metadata["rule"]
        if _is_table(hint):
            yield from _rows(typing.get_args(hint)[0], f"{name}[].")


def _is_table(hint: Any) -> bool:
    parts = typing.get_args(hint)
    return bool(parts) and dataclasses.is_dataclass(parts[0])


def _type_name(hint: Any) -> str:
    parts = typing.get_args(hint)
    if _is_table(hint):
        return "list of tables"
    return f"list of {parts[0].__name__}" if parts else hint.__name__


def _default(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_default, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def describe_settings(root: type) -> str:
    """Every setting, for ``--help``."""
    lines = ["settings (section.key=value; values are TOML, bare words are strings):", ""]
    for name, kind, default, rule in _rows(root, ""):
        facts = ", ".join(filter(None, [kind, rule.unit, rule.range, f"default {default or '-'}"]))
        lines.append(f"  {name}: {facts}")
        lines += textwrap.wrap(
            rule.meaning, 94, initial_indent="      ", subsequent_indent="      "
        )
    return "\n".join(lines)


def settings_table(root: type) -> str:
    """Every setting as a Markdown page."""
    lines = [
        "# Settings",
        "",
        "Made by `python -m ovr_fast.config` from `ovr_fast/config.py`. *resume*: a resumed run "
        "may change it. `[]` stands for each item of a list (`[[rl.sources]]` in TOML).",
        "",
        "| setting | type | default | range | resume | meaning |",
        "|---|---|---|---|---|---|",
    ]
    for name, kind, default, rule in _rows(root, ""):
        unit = f", {rule.unit}" if rule.unit else ""
        cells = [
            f"`{name}`", kind + unit, f"`{default}`" if default else "", rule.range,
            "yes" if rule.may_change else "", rule.meaning,
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
