"""Mean, standard deviation and confidence interval of a score over seeds."""

import math
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import final


@final
@dataclass(frozen=True, kw_only=True)
class Interval:
    """A 95 % interval, as fractions."""

    low: float
    high: float


@final
@dataclass(frozen=True)
class Spread:
    """One value per seed."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """The sample standard deviation; None for a single seed."""
        return stdev(self.values) if len(self.values) > 1 else None

    @property
    def interval(self) -> Interval | None:
        """Student's t interval of the mean, `mean ± t(0.975, k - 1) s / sqrt(k)`; None without a spread.

        A single seed has no spread, and neither have equal scores. With few rows or few seeds equal scores are common,
        and an interval of zero width would claim that no other seed could score anything else.

        >>> interval = Spread((0.5, 0.6, 0.7)).interval
        >>> round(interval.low, 3), round(interval.high, 3)
        (0.352, 0.848)
        """
        if not (self.deviation or 0) > 1e-12:  # differences of equal scores may leave a rounding error
            return None
        from scipy.stats import t

        count = len(self.values)
        # Not scipy's t.interval: it rounds its lower quantile differently, so reports would change in the last digit.
        half_width = float(t.ppf(0.975, count - 1)) * stdev(self.values) / math.sqrt(count)
        return Interval(low=self.mean - half_width, high=self.mean + half_width)
