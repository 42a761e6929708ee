"""How strongly a trained module acts, by site and by step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from hookctl.address.clock import Clock
from hookctl.address.sites import Site, matcher, select
from hookctl.errors import InputError


class Strength:
    """A scale at every site, times a factor at every step.

    scale: of all sites, or {site selector: scale}, whose first that holds counts, and 0 elsewhere.
    schedule: factors at equal distances from the first step to the last, with straight lines
    between; None for 1 throughout. name: of the editor, for errors.
    """

    def __init__(
        self, scale: float | Mapping[str, float], schedule: Sequence[float] | None, name: str
    ) -> None:
        if schedule is not None and not schedule:
            raise InputError(f"{name}: schedule=[]; give one factor or more")
        if isinstance(scale, Mapping) and not scale:
            raise InputError(f"{name}: scale={{}}; give a number, or one site selector or more")
        scales = scale if isinstance(scale, Mapping) else {"all": scale}
        self._scales = [(matcher(sites), float(value)) for sites, value in scales.items()]
        self._selectors, self._name = list(scales), name
        self._schedule = None if schedule is None else [float(factor) for factor in schedule]

    def check(self, sites: Iterable[Site]) -> None:
        """Raise SelectorError if a selector matches none of the sites where the module can act."""
        every = tuple(sites)
        for selector in self._selectors:
            select(every, selector, who=f"{self._name}: scale")

    @property
    def is_zero(self) -> bool:
        """Whether it is 0 everywhere and always."""
        return not any(scale for _, scale in self._scales) or not any(self._schedule or [1.0])

    def at(self, site: Site, clock: Clock) -> float:
        """At a site and step."""
        scale = next((value for holds, value in self._scales if holds(site)), 0.0)
        return scale * self.factor(clock)

    def factor(self, clock: Clock) -> float:
        """What the schedule makes of the scale at a step."""
        if self._schedule is None:
            return 1.0
        last = len(self._schedule) - 1
        at = clock.step / max(1, clock.steps - 1) * last
        low = min(int(at), last)
        before, after = self._schedule[low], self._schedule[min(low + 1, last)]
        return before + (at - low) * (after - before)
