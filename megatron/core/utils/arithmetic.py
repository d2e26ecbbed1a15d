"""Integer arithmetic that insists on exact results."""

from megatron.core.errors import ConfigError


def ensure_divisibility(numerator: int, denominator: int) -> None:
    """Raises ConfigError unless ``denominator`` divides ``numerator``."""
    if numerator % denominator != 0:
        raise ConfigError(f"{numerator} is not divisible by {denominator}")


def divide(numerator: int, denominator: int) -> int:
    """Exact quotient of two integers; ConfigError if there is a remainder."""
    ensure_divisibility(numerator, denominator)
    return numerator // denominator
