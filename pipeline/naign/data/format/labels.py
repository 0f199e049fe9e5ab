"""Labels of samples, which tars by others keep in different places."""

import json
from typing import Any

from naign.errors import InputError

JSON = "json:"  # begins a rule: the label is a field of the .json


def label_text(sample: dict[str, Any], rule: str, where: str) -> str | None:
    """A sample's label as it is written, None without one. InputError for .json that cannot be read.

    The rule is "" for .cls, or `json:FIELD`.
    """
    if not rule:
        if "cls" not in sample:
            return None
        return str(sample["cls"], "ascii", "replace").strip()
    try:
        value = json.loads(sample.get("json", b"{}")).get(rule.removeprefix(JSON))
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
    if rule and (not rule.startswith(JSON) or rule == JSON):
        raise InputError(f"--label {rule!r}: give json:FIELD, as in json:class")
