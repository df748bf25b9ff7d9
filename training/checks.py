"""Checks of settings that many programs share."""


class Checks:
    """Raise a ValueError that names the first setting out of its range, its value and the range."""

    def _validate_at_least(self, least: int, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ValueError(f"{name} must be at least {least}, got {value}.")

    def _validate_share(self, *names: str, zero: bool = True, one: bool = True) -> None:
        for name in names:
            value = getattr(self, name)
            if not (0 <= value <= 1) or (value == 0 and not zero) or (value == 1 and not one):
                interval = f"{'[' if zero else '('}0, 1{']' if one else ')'}"
                raise ValueError(f"{name} must lie in {interval}, got {value}.")

    def _validate_few_shot(self, shares: list[float]) -> None:
        for share in shares:
            if not 0 < share <= 1:
                raise ValueError(f"few_shot takes shares in (0, 1], got {share}; 1 alone turns it off.")
