"""Labels of samples, which tars by others keep in different places."""

import json
import re
from typing import Any

from naign.errors import InputError


def label_text(sample: dict[str, Any], rule: str, where: str) -> str | None:
    """A sample's label as it is written, None without one. InputError for .json that cannot be read.

    The rule is "" for .cls, `json:FIELD`, or `name:REGEX` for what the expression's first group matches in the key.
    """
    kind, _, argument = rule.partition(":")
    if kind == "json":
        return _json_field(sample.get("json", b"{}"), argument, where)
    if kind == "name":
        match = re.search(argument, sample["__key__"])
        return match.group(1) if match else None
    if "cls" not in sample:
        return None
    return str(sample["cls"], "ascii", "replace").strip()


def _json_field(data: bytes, field: str, where: str) -> str | None:
    try:
        value = json.loads(data).get(field)
    except (ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{where}: the .json cannot be read ({error}): repack the data set") from None
    if value is None or isinstance(value, (dict, list)):
        return None
    return str(value)


def parse_number(text: str) -> int:
    """The number that a label is; -1 for another text, and for 19 digits, which may be more than an int64."""
    if text.isdecimal() and len(text) < 19:
        return int(text)
    return -1


def check_label_rule(rule: str) -> None:
    """Raise InputError for a rule that `label_text` cannot follow."""
    kind, _, argument = rule.partition(":")
    if rule and (kind not in ("json", "name") or not argument):
        raise InputError(f"--label {rule!r}: give json:FIELD, or name:REGEX with one group, as in 'name:^([a-z]+)_'")
    if kind != "name":
        return
    try:
        groups = re.compile(argument).groups
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(f"--label {rule!r}: not a regular expression ({error})") from None
    if groups != 1:
        raise InputError(f"--label {rule!r}: {groups} groups in brackets, and one must be the label")
