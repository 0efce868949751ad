"""The histogram by which `sample` finds a threshold on a GPU: how its bins are numbered, filled and searched.

python -m pytest --ptx sm_90 tests/kernels/test_sampling.py
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from minem.kernels.backend import constexpr, jit, tl

BINS = constexpr(1 << 16)  # of a row's histogram
UNIT = constexpr(38)  # masses are counted in whole numbers, of 2^-UNIT: these sum to the same in any order
# What is known of a row, int64: what is searched for next (0: nothing, 1: top-k, 2: top-p), the place of the upper half
# of the threshold (-1: not found yet), how many logits or how much mass the kept set needs (0: top_p of what is found),
# and counters of the programs that are done.
GOAL, UPPER, NEEDED, COUNTERS, STATE = map(constexpr, (0, 1, 2, 3, 9))
# And fp32: the largest logit and the mass, raw and as drawn from; no logit below `LOW` can be the threshold.
PEAK, TOTAL, Q_PEAK, Q_TOTAL, LOW, THRESHOLD, LOG_MIN_P, NUMBERS = map(constexpr, range(8))


@jit
def bits_of(place, upper):
    """Bins are numbered by the bits of a logit, places by the order of the numbers: the bin of a place, int64.

    The two differ by the sign, and the magnitude of negative numbers is complemented. upper: the place of the upper
    half of a wide number, if this is about its lower half; else -1.
    """
    whole = tl.where(place < BINS // 2, BINS - 1 - place, place - BINS // 2)
    return tl.where(upper < 0, whole, tl.where(upper < BINS // 2, BINS - 1 - place, place)).to(tl.int64)


@jit
def place_of(x, DTYPE: tl.constexpr):
    """The place of a number rounded to DTYPE, or of its upper half if that is wide."""
    if tl.float32 == DTYPE:
        bits = (x.to(tl.int32, bitcast=True) >> 16) & 0xFFFF
    else:
        bits = x.to(DTYPE).to(tl.uint16, bitcast=True).to(tl.int32)
    return tl.where(bits < BINS // 2, bits + BINS // 2, BINS - 1 - bits)


@jit
def places(low, high, DTYPE: tl.constexpr):
    """The places from that of `low`, or one below however it is rounded, to that of `high`."""
    lowest = place_of(tl.minimum(high, -float("inf")), DTYPE)
    high = tl.where(high == 0.0, 0.0, high)  # of -0.0 and 0.0, the upper place
    return tl.maximum(place_of(low, DTYPE) - 1, lowest), place_of(high, DTYPE)


@jit
def number_at(place, upper, DTYPE: tl.constexpr):
    """The number at a place, in fp32."""
    if tl.float32 == DTYPE:
        return ((bits_of(upper, -1) << 16) | bits_of(place, upper)).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        return bits_of(place, -1).to(tl.uint16).to(DTYPE, bitcast=True).to(tl.float32)


@jit
def kth_largest(x, k):
    """The k-th largest of the numbers x, fp32, cut off to 16 bits: as large or smaller."""
    low = 127  # the place of -inf
    high = 65409  # and one above that of inf
    while high - low > 1:
        middle = (low + high) // 2
        enough = tl.sum((x >= number_at(0, middle, tl.float32)).to(tl.int32), 0) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return number_at(0, low, tl.float32)


@jit
def clear(bins_ptr, first, last, CHUNK: tl.constexpr):
    while first <= last:
        place = first + tl.arange(0, CHUNK)
        tl.store(bins_ptr + bits_of(place, -1), 0, mask=place <= last)
        first += CHUNK


@jit
def mass_of(shifted, scale):
    """exp(shifted / divisor) in units of 2^-UNIT, int64."""
    return tl.exp2(shifted * scale + UNIT).to(tl.int64)


@jit
def amounts_in(bins_ptr, place, inside, upper, weigh, q_peak, scale, DTYPE: tl.constexpr):
    """What the bins of these places hold, int64. weigh: the mass of the logits that they count."""
    amounts = tl.load(bins_ptr + bits_of(place, upper), mask=inside, other=0).to(tl.int64)
    if weigh:
        amounts *= tl.where(amounts > 0, mass_of(number_at(place, upper, DTYPE) - q_peak, scale), 0)
    return amounts


@jit
def sum_of(
    bins_ptr, first, last, weigh, q_peak, scale, DTYPE: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    total = tl.zeros((CHUNK,), tl.int64)
    while first <= last:
        place = first + tl.arange(0, CHUNK)
        total += amounts_in(bins_ptr, place, place <= last, -1, weigh, q_peak, scale, DTYPE)
        first += CHUNK
    return tl.sum(total, 0)


@jit
def crossing(
    bins_ptr, upper, first, last, needed, weigh, q_peak, scale, DTYPE: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """The largest place t such that t to `last` hold at least `needed`, or `first`; and what those above t hold."""
    found = first
    above = needed * 0
    while last >= first:
        place = last - tl.arange(0, CHUNK)
        amounts = amounts_in(bins_ptr, place, place >= first, upper, weigh, q_peak, scale, DTYPE)
        enough = (above + tl.cumsum(amounts, 0) >= needed) & (place >= first)
        best = tl.max(tl.where(enough, place, -1), 0)
        above += tl.sum(tl.where(place > best, amounts, 0), 0)
        found = tl.where(best >= 0, best, first)
        last = tl.where(best >= 0, first - 1, last - CHUNK)
    return found, above


@jit
def advance(
    state_ptr, numbers_ptr, bins_ptr, top_p_ptr, goal, upper, low, q_peak, scale,
    DTYPE: tl.constexpr, WIDE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Find the threshold in a row's bins. Of wide logits first its upper half; the next launch finds the lower one."""
    p = tl.load(top_p_ptr).to(tl.float64)
    needed = tl.load(state_ptr + NEEDED)
    first, last = places(low, q_peak, DTYPE)
    if upper >= 0:
        first = 0
        last = BINS - 1
    while goal > 0:
        weigh = (goal == 2) & (not WIDE)
        if needed == 0:
            total = sum_of(bins_ptr, first, last, weigh, q_peak, scale, DTYPE, CHUNK)
            needed = tl.maximum((p * total).to(tl.int64), 1)
        found, above = crossing(bins_ptr, upper, first, last, needed, weigh, q_peak, scale, DTYPE, CHUNK)
        if WIDE & (upper < 0):
            tl.store(state_ptr + UPPER, found)
            tl.store(state_ptr + NEEDED, needed - above)
            clear(bins_ptr, 0 * first, BINS - 1, CHUNK)
            goal = 0 * goal
        else:
            low = number_at(found, upper, DTYPE)
            first = tl.where(found == BINS // 2, found - 1, found)  # -0.0 equals 0.0
            needed = 0 * needed  # of the mass of those that top-k keeps
            goal = tl.where((goal == 1) & (p < 1.0), 2, 0).to(tl.int64)
            tl.store(numbers_ptr + THRESHOLD, low)
            tl.store(state_ptr + GOAL, goal)
            if WIDE:
                tl.store(numbers_ptr + LOW, low)
                tl.store(state_ptr + UPPER, -1)
                tl.store(state_ptr + NEEDED, needed)
                lowest, highest = places(low, q_peak, DTYPE)
                clear(bins_ptr, lowest, highest, CHUNK)
                goal = 0 * goal
