"""How far a measured figure may be from the true one: intervals of a share of samples, and of a mean over seeds. Pure Python."""

import math
import statistics
from collections.abc import Sequence


def wilson(hits: int, samples: int, confidence: float = 0.95) -> tuple[float, float]:
    """Bounds of a share of which `hits` of `samples` independent ones were seen: Wilson's score interval (JASA 22, 1927).

    Never outside [0, 1], and of use at 0 and at all. What it covers is another draw of samples, not another training.
    """
    if not 0 <= hits <= samples or samples < 1:
        raise ValueError(f"hits={hits} of samples={samples} is no share: 0 <= hits <= samples and samples >= 1")
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    share = hits / samples
    centre = (share + z * z / (2 * samples)) / (1 + z * z / samples)
    reach = z / (1 + z * z / samples) * math.sqrt(share * (1 - share) / samples + z * z / (4 * samples * samples))
    # At either end the bound is the end itself, which rounding would miss
    return 0.0 if hits == 0 else centre - reach, 1.0 if hits == samples else centre + reach


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean of at least two values (of seeds, say) and the bounds of Student's t interval around it."""
    if len(values) < 2:
        raise ValueError(f"{len(values)} values say nothing of their spread; at least 2 do")
    mean = statistics.fmean(values)
    reach = t_quantile((1 + confidence) / 2, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - reach, mean + reach


def t_quantile(probability: float, freedom: int) -> float:
    """Below which a t-distributed number of so many degrees of freedom lies with a probability in (0, 1).

    The closed form of the distribution for a whole number of degrees (Abramowitz and Stegun 26.7.3 and 26.7.4), inverted by bisection over
    the angle arctan(t / sqrt(freedom)).
    """
    if not 0 < probability < 1 or freedom < 1:
        raise ValueError(f"probability={probability:g} must lie between 0 and 1, and freedom={freedom} be at least 1")
    if probability < 0.5:
        return -t_quantile(1 - probability, freedom)
    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:  # until no number lies between
        low, high = (middle, high) if _within(middle, freedom) < 2 * probability - 1 else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _within(angle: float, freedom: int) -> float:
    """How likely a t-distributed number lies within +- sqrt(freedom) tan(angle)."""
    cosine, sine = math.cos(angle), math.sin(angle)
    odd = freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= cosine * cosine * (power + 1) / (power + 2)
    return (angle + sine * total) * 2 / math.pi if odd else sine * total
