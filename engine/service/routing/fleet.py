"""The engines as the router counts them: numbers, speeds and loads, in arrays by number."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


def _floats() -> Floats:
    return np.zeros(0)


@dataclass(slots=True)
class Fleet:
    """here: which numbers are engines now. speeds: relative to others, 1 for a number that is none.

    loads: work under way, in tokens of service at speed 1; 0 for a number that is none. mask: ``here``, as bits.
    """

    here: Flags = field(default_factory=lambda: np.zeros(0, np.bool_))
    speeds: Floats = field(default_factory=_floats)
    loads: Floats = field(default_factory=_floats)
    mask: int = 0
    power: float = 0.0  # all speeds

    def __len__(self) -> int:
        """Numbers there are, or were."""
        return len(self.here)

    def add(self, speed: float) -> int:
        """A new engine's number, the least that is free."""
        free = np.flatnonzero(~self.here)
        number = int(free[0]) if len(free) else len(self)
        if number == len(self):
            self.here = np.append(self.here, False)
            self.speeds, self.loads = np.append(self.speeds, 1.0), np.append(self.loads, 0.0)
        self.here[number], self.speeds[number] = True, speed
        self.mask |= 1 << number
        self.power += speed
        return number

    def remove(self, number: int) -> None:
        """The engine is gone, and with it what it had under way."""
        self.mask &= ~(1 << number)
        self.here[number], self.speeds[number], self.loads[number] = False, 1.0, 0.0
        self.power = float(self.speeds[self.here].sum())
