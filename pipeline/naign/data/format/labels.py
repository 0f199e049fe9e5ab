"""Labels of samples, which tars by others keep in different places."""

import json
import re
from typing import Any

from naign.errors import InputError, require


def label_text(sample: dict[str, Any], rule: str, where: str) -> str | None:
    """A sample's label as it is written, None without one. InputError for .json that cannot be read.

    The rule is "" for .cls, `json:FIELD`, or `name:REGEX` for what the expression's first group matches in the key.
    """
    kind, _, argument = rule.partition(":")
    if kind == "json":
        if "json" not in sample:
            return None
        try:
            value = json.loads(sample["json"]).get(argument)
        except (ValueError, AttributeError, RecursionError) as error:
            raise InputError(f"{where}: the .json cannot be read ({error}): repack the data set") from None
        return None if value is None or isinstance(value, (dict, list)) else str(value)
    if kind == "name":
        match = re.search(argument, sample["__key__"])
        return match and match.group(1)
    return sample["cls"].decode("ascii", errors="replace").strip() if "cls" in sample else None


def parse_number(text: str) -> int:
    """The number that a label is; -1 for another text, and for 19 digits, which may be more than an int64."""
    return int(text) if text.isdecimal() and len(text) < 19 else -1


def check_label_rule(rule: str) -> None:
    """Raise InputError for a rule that `label_text` cannot follow."""
    kind, _, argument = rule.partition(":")
    if rule and (kind not in ("json", "name") or not argument):
        raise InputError(f"--label {rule!r}: give json:FIELD, or name:REGEX with one group, as in 'name:^([a-z]+)_'")
    if kind == "name":
        try:
            groups = re.compile(argument).groups
        except (re.error, OverflowError, RecursionError) as error:
            raise InputError(f"--label {rule!r}: no regular expression ({error})") from None
        require((groups == 1, f"--label {rule!r}: {groups} groups in brackets, and one must be the label"))
