"""What a slice costs: hours x chips x price. The price is the user's; none is known here."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from webssl_jax.config import UserError, suggest
from webssl_jax.files import write_json
from webssl_jax.launch.gcloud import TIERS, Request, Resource

PRICE_HELP = "cloud.google.com/tpu/pricing says it for your region"


def read_price(request: Request, price: float | None, file: str | None) -> float:
    """Dollars a chip and hour: ``price``, or from a JSON file {"v5p": {"spot": 1.0, ...}, ...}.

    Raises:
      UserError: when neither is given, or the file does not have it.
    """
    if price is not None and file is None:
        if not 0 < price < 1e6:  # NaN neither
            raise UserError(f"--price {price}: give dollars a chip and hour, more than 0")
        return price
    if file is None or price is not None:
        raise UserError(
            "give either --price DOLLARS, of one chip for one hour, or --prices FILE.json; "
            f"{PRICE_HELP}"
        )
    try:
        with open(file, encoding="utf-8") as opened:
            prices = json.load(opened)[request.slice.generation]
        value = prices[request.tier]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--prices {file}: cannot be read ({error})") from None
    except KeyError as error:
        raise UserError(
            f"--prices {file}: has no {error}; it must hold "
            f'{{"{request.slice.generation}": {{"{request.tier}": DOLLARS}}}}'
        ) from None
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value < 1e6:
        raise UserError(
            f"--prices {file}: {request.slice.generation} {request.tier} = {value} is not a price"
        )
    unknown = [tier for tier in prices if tier not in TIERS]
    if unknown:
        raise UserError(f"--prices {file}: {unknown[0]}: {suggest(unknown[0], TIERS)}")
    return float(value)


@dataclasses.dataclass(frozen=True)
class Cost:
    """A request at a price (dollars a chip and hour)."""

    request: Request
    price: float

    @property
    def per_hour(self) -> float:
        return self.request.chips * self.price

    def line(self, hours: float | None = None) -> str:
        """For people, before anything is created. ``hours``: of the budget."""
        request = self.request
        what = (
            request.slice.name
            if request.slices == 1
            else (f"{request.slices} x {request.slice.name}")
        )
        text = (
            f"cost: {what} {request.tier} = {request.chips:,} chips x ${self.price:,.6g} an hour = "
            f"${self.per_hour:,.2f} an hour"
        )
        if hours is None:
            return f"{text}, until it is deleted"
        return f"{text}; the budget of {hours:,.4g} hours is at most ${hours * self.per_hour:,.2f}"


class Meter:
    """Hours that machines existed, ``hours`` of them before, as far as was seen. Between two looks
    they count whole if there were machines at either.

    Args:
      file: keeps the count, so that the next one goes on with it; the time between counts whole if
        there were machines at the last look.

    Raises:
      UserError: if the file cannot be read.
    """

    def __init__(self, now: float, hours: float = 0.0, file: Path | None = None):
        self._seconds, self._seen, self._costs, self._file = 3600 * hours, now, False, file
        if file is None or not file.exists():
            return
        try:
            known = json.loads(file.read_text())
            self._seconds += 3600 * float(known["hours"])
            self._seen, self._costs = float(known["at"]), bool(known["machines"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"--meter {file}: cannot be read ({error})") from None

    def look(self, now: float, resource: Resource | None) -> None:
        """``resource`` is what exists at ``now`` (seconds)."""
        costs = resource is not None and resource.costs
        if costs or self._costs:
            self._seconds += now - self._seen
        self._seen, self._costs = now, costs
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            row = {"hours": self._seconds / 3600, "at": now, "machines": costs}
            write_json(self._file, row)

    def hours(self, now: float) -> float:
        """Up to now, if nothing has changed since the last look."""
        return (self._seconds + (now - self._seen if self._costs else 0.0)) / 3600
