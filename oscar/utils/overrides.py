"""Overrides on the command line whose values are not in Hydra's syntax, as paths often are not: `images=/a (1)/b=c`.

Hydra reads `= ( ) , [ ] { }`, quotes, some numbers and words, and all letters beyond ASCII as syntax or not at all.
Here a value is quoted before Hydra sees it:

- a path that exists, unless it reads as itself. With `--multirun` commas are those of a sweep if one of the parts
  exists or the whole does not;
- text that Hydra cannot read, unless it begins as a list, a mapping or something quoted: the mistake may be another;
- the value of `output` and `save_to`, new folders, also where commas or digits would make something else of it;
- each entry of a list likewise: `data.train=[/数据,/a, b]` has two entries if `/a, b` exists.

`${...}` stays an interpolation, but in a path that exists under this very name. A leading `~/` is the home folder.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence

_KEY = re.compile(r"(\+{0,2})([A-Za-z_$][\w.$/-]*(?:@[\w.:-]*)?)=(.*)", re.DOTALL)
_NEW_PATHS = ("output", "save_to")  # keys of folders that need not exist
_WITH_VALUE = (
    "--config-path",
    "-cp",
    "--config-name",
    "-cn",
    "--config-dir",
    "-cd",
    "--package",
    "-p",
    "--experimental-rerun",
    "--info",
    "-i",
)
_UNREADABLE = object()


def quote_overrides(arguments: Sequence[str]) -> list[str]:
    """The arguments of a Hydra script, values quoted where that is needed; see the module."""
    sweeps = any(argument in ("--multirun", "-m") for argument in arguments)
    before = ["", *arguments]
    return [
        argument if argument.startswith("-") or previous in _WITH_VALUE else _quote_override(argument, sweeps)
        for previous, argument in zip(before, arguments, strict=False)
    ]


def explain(override: str, reason: str) -> str:
    """In one line what is wrong with an override that Hydra cannot read, and how text is quoted in it."""
    key, equals, value = override.partition("=")
    if not equals:
        return f"{override!r}: {reason}; allowed: KEY=VALUE, quoted for the shell where there are spaces"
    example = {"[": '["...","..."]', "{": '{name:"..."}'}.get(value[:1], _quoted(value))
    return f"override {override}: {reason}; allowed: text with special characters is quoted, {_shell(key, example)}"


def explain_commas(override: str) -> str:
    """In one line what commas in a value can mean."""
    key, _, value = override.partition("=")
    return (
        f"override {override} has commas; allowed: {_shell(key, f'[{value}]')} for a list, "
        f"{_shell(key, _quoted(value))} for text, --multirun for a sweep"
    )


def _shell(key: str, value: str) -> str:
    return shlex.quote(f"{key}={value}")


def _quote_override(argument: str, sweeps: bool) -> str:
    match = _KEY.fullmatch(argument)
    if match is None or not match[3]:
        return argument
    plus, key, value = match.groups()
    is_new = key.rpartition(".")[2] in _NEW_PATHS
    return f"{plus}{key}={_quote_value(value, is_new, sweeps)}"


def _quote_value(value: str, is_new: bool, sweeps: bool) -> str:
    parsed = _parse(value)
    parts = _split(value) if sweeps else [value]
    if sweeps and _is_sweep(parsed) and (not _exists(value) or any(map(_exists, set(parts) - {value}))):
        return value
    if _exists(value) and (not _reads_as_itself(value, parsed) or "${" in value):
        return _quoted(value, is_literal=True)
    if _reads_as_itself(value, parsed):
        return value
    if parsed is _UNREADABLE and len(parts) > 1:
        return ",".join(_quote_value(part.strip(), is_new, False) for part in parts)
    if is_new:
        return _quoted(value)
    if value[0] == "[" and value[-1] == "]":
        return _quote_list(value)
    return _quoted(value) if parsed is _UNREADABLE and value[0] not in "[{\"'" else value


def _quote_list(value: str) -> str:
    """A list with its entries quoted where that is needed; as it was, if they cannot be told apart."""
    parts, entries = value[1:-1].split(","), []
    while parts:
        joins = (",".join(parts[:count]).strip() for count in range(1, len(parts) + 1))
        entry = next((join for join in joins if join and _exists(join)), parts[0].strip())
        del parts[: entry.count(",") + 1]
        parsed = _parse(entry) if entry else _UNREADABLE
        if _exists(entry):
            is_plain = _reads_as_itself(entry, parsed) and "${" not in entry
            entry = entry if is_plain else _quoted(entry, is_literal=True)
        elif parsed is _UNREADABLE:
            if not entry or any(bracket in entry for bracket in "[]{}\"'"):
                return value
            entry = _quoted(entry)
        entries.append(entry)
    return f"[{','.join(entries)}]"


def _parse(value: str) -> object:
    """What Hydra reads in a value, `_UNREADABLE` if nothing."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_rule(f"key={value}", "override").value()
    except HydraException:
        return _UNREADABLE


def _reads_as_itself(value: str, parsed: object) -> bool:
    """Whether nothing is lost in what Hydra reads: words, plain numbers, whatever the user has quoted."""
    if isinstance(parsed, str):
        return parsed == value or value[0] in "\"'"
    return parsed is None or isinstance(parsed, bool) or (isinstance(parsed, (int, float)) and str(parsed) == value)


def _is_sweep(parsed: object) -> bool:
    from hydra.core.override_parser.types import Sweep

    return isinstance(parsed, Sweep)


def _exists(value: str) -> bool:
    try:
        return bool(value) and os.path.lexists(os.path.expanduser(value))
    except ValueError:  # a null byte
        return False


def _quoted(value: str, is_literal: bool = False) -> str:
    """A value in Hydra's quotes; if it is literal, without interpolation."""
    from hydra.core.override_parser.types import Quote, QuotedString

    text = os.path.expanduser(value) if value.startswith("~/") else value
    return QuotedString(text.replace("${", r"\${") if is_literal else text, Quote.double).with_quotes()


def _split(value: str) -> list[str]:
    """Parts between the commas that stand in no brackets and no quotes."""
    parts, depth, quote = [""], 0, ""
    for character in value:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        depth += (character in "[{(") - (character in ")}]")
        if character == "," and not quote and depth <= 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts
