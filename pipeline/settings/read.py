"""Values of configuration files as the types of the settings."""

from typing import Any

from pipeline.errors import InputError, shown


def convert(target: Any, value: Any, where: str) -> Any:
    """Convert a value of YAML, which reads 1e-3 as text and 1 as an integer. All other types must match."""
    try:
        if target is float and not isinstance(value, bool):
            return float(value)
        if target is int and isinstance(value, (float, str)) and float(value) == int(float(value)):
            return int(float(value))
        if isinstance(value, target) and isinstance(value, bool) == (target is bool):
            return value
        if target is str and type(value) is int:
            return str(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise InputError(f"{where} is {shown(value)}: it must be {target.__name__}")
