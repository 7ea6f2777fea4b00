"""Device functions of the attention kernels: what happens inside one tile of (query row, key row) pairs.

Legend: A query/key width, V value width, M query rows and N key rows of a tile, n rows of the user's sequence,
``i`` positions of query rows, ``j`` positions of key rows in the sequence. Tiles come as [M, N] or as [N, M]: ``i``
and ``j`` carry the broadcasting shape, and the functions do not care.
"""

# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl

FURTHEST = tl.constexpr(2**31 - 1)
"""Beyond every age in s."""
FEW_BUCKETS = tl.constexpr(4)
"""Buckets crossed in a tile up to which each is compared on its own. A guess, not measured."""
FEW_SUMS = tl.constexpr(2)
"""The same for the gradient of the time table, where each costs a sum over the tile. A guess, not measured."""
ESTIMATE_MARGIN = tl.constexpr(0.02)
"""In buckets: how far the float32 estimate of a bucket may be off; one comparison more than needed, never fewer."""


@triton.jit
def user_bounds(Offsets, KeyStarts, KeyLengths, NumTargets, user, DELTA: tl.constexpr, TARGETS: tl.constexpr):
    """First query row (int64), number of query rows, first key row (int64), n, rows of the history."""
    first_row = tl.load(Offsets + user).to(tl.int64)
    num_rows = (tl.load(Offsets + user + 1) - first_row).to(tl.int32)
    first_key, n = first_row, num_rows
    if DELTA:
        first_key = tl.load(KeyStarts + user).to(tl.int64)
        n = tl.load(KeyLengths + user).to(tl.int32)
    history = n
    if TARGETS:
        history = n - tl.load(NumTargets + user).to(tl.int32)
    return first_row, num_rows, first_key, n, history


@triton.jit
def load_rows(Base, start, num_rows, stride, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
              MASKED: tl.constexpr, ALIGN: tl.constexpr):  # fmt: skip
    """Tile [ROWS, BLOCK] of a matrix whose last stride is 1, from row ``start`` (int64) on.

    Zero beyond WIDTH and, where MASKED, beyond ``num_rows`` rows. ALIGN: rows start at multiples of so many elements.
    """
    rows, columns = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    stride = stride // ALIGN * ALIGN  # the same number, and now the compiler knows what it is a multiple of
    first = tl.multiple_of(Base + start * stride, ALIGN * (Base.dtype.element_ty.primitive_bitwidth // 8))
    pointers = first + (rows[:, None] * stride + columns[None, :])
    if MASKED:
        mask = (rows < num_rows)[:, None]
        if WIDTH != BLOCK:
            mask &= (columns < WIDTH)[None, :]
        return tl.load(pointers, mask=mask, other=0.0)
    elif WIDTH != BLOCK:
        return tl.load(pointers, mask=(columns < WIDTH)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def store_rows(Base, value, start, num_rows, stride, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Counterpart of :func:`load_rows`."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    mask = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
    pointers = Base + start * stride + (rows[:, None] * stride + columns[None, :])
    tl.store(pointers, value.to(Base.dtype.element_ty), mask=mask)


@triton.jit
def sigmoid(x, FAST: tl.constexpr):
    """1 / (1 + exp(-x)); FAST: from one hardware tanh (absolute error about 2^-12), no exponential, no division."""
    if FAST:
        tanh = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [0.5 * x], dtype=tl.float32, is_pure=True, pack=1
        )
        return 0.5 + 0.5 * tanh
    else:
        return tl.sigmoid(x)


@triton.jit
def visible(i, j, history, CAUSAL: tl.constexpr, TARGETS: tl.constexpr, CONTEXTUAL: tl.constexpr,
            WINDOW: tl.constexpr, FULL_ROWS: tl.constexpr):  # fmt: skip
    """The mask rule of reference.py for rows inside the sequence; i and j broadcast."""
    at = i
    if TARGETS:
        at = tl.minimum(i, history)
    if CAUSAL:
        sees = j <= at
    else:
        sees = (j < history) & (at >= 0)
    if WINDOW > 0:
        near = at - j < WINDOW
        if not CAUSAL:
            near &= j - at < WINDOW
        if FULL_ROWS > 0:
            near |= at >= history - FULL_ROWS
        sees &= near
    if CONTEXTUAL > 0:
        sees |= i < CONTEXTUAL
        if WINDOW > 0:
            sees |= j < CONTEXTUAL
    sees &= j < history
    if TARGETS:
        sees |= i == j
    return sees


@triton.jit
def age_range(ages, valid):
    """Smallest and largest of the valid ages, s."""
    least = tl.min(tl.where(valid, ages, FURTHEST), 0)
    most = tl.max(tl.where(valid, ages, -FURTHEST), 0)
    return least, most


@triton.jit
def bucket_range(q_least, q_most, k_least, k_most, buckets_per_octave, last_bucket):
    """First and last bucket that gaps of these ages can fall in; a little wide at most."""
    nearest = k_least - q_most
    furthest = k_most - q_least
    shortest = tl.maximum(tl.maximum(nearest, -furthest), 1).to(tl.float32)
    longest = tl.maximum(tl.maximum(furthest, -nearest), 1).to(tl.float32)
    low = (tl.log2(shortest) * buckets_per_octave * (1 - 1e-5) - ESTIMATE_MARGIN).to(tl.int32)  # toward zero
    high = (tl.log2(longest) * buckets_per_octave * (1 + 1e-5) + ESTIMATE_MARGIN).to(tl.int32)
    return tl.minimum(tl.maximum(low, 0), last_bucket), tl.minimum(high, last_bucket)


@triton.jit
def reaches(q_age, k_age, threshold):
    """Whether the gap, of either sign, is at least ``threshold`` s: no tile of gaps, only shifted vectors."""
    return (k_age - threshold >= q_age) | (q_age - threshold >= k_age)


@triton.jit
def bucket_of(Thresholds, q_age, k_age, buckets_per_octave, last_bucket):
    """Tile of buckets: a float32 estimate from below, at most one short, made exact by one integer threshold."""
    gap = tl.abs(k_age - q_age)
    octaves = tl.log2(tl.maximum(gap, 1).to(tl.float32))
    estimate = (octaves * buckets_per_octave * (1 - 1e-5) - ESTIMATE_MARGIN).to(tl.int32)  # toward zero
    estimate = tl.minimum(estimate, last_bucket)
    return tl.minimum(estimate + (gap >= tl.load(Thresholds + estimate + 1)).to(tl.int32), last_bucket)


@triton.jit
def time_bias(Table, Thresholds, q_age, k_age, first, last, buckets_per_octave, last_bucket, FEW: tl.constexpr,
              SHAPE_0: tl.constexpr, SHAPE_1: tl.constexpr):  # fmt: skip
    """Tile of ``w_time[bucket(gap)]`` where only buckets first .. last occur; q_age and k_age broadcast to it.

    Where FEW or fewer are crossed, as in all tiles but those near the diagonal, each costs a comparison and a
    selection; elsewhere every pair looks its bucket up. No loop, so that the loop around can be pipelined.
    """
    if last - first <= FEW:
        bias = tl.zeros([SHAPE_0, SHAPE_1], tl.float32) + tl.load(Table + first).to(tl.float32)
        if last > first:
            for step in tl.static_range(1, FEW + 1):
                bucket = tl.minimum(first + step, last)
                weight = tl.load(Table + bucket).to(tl.float32)
                bias = tl.where(reaches(q_age, k_age, tl.load(Thresholds + bucket)), weight, bias)
    else:
        bucket = bucket_of(Thresholds, q_age, k_age, buckets_per_octave, last_bucket)
        bias = tl.load(Table + bucket).to(tl.float32)
    return bias


@triton.jit
def add_time_grad(total, d_score, Grad, Thresholds, q_age, k_age, k_next, first, last, buckets_per_octave,
                  last_bucket, factor, FEW: tl.constexpr, ORDERED: tl.constexpr, BLOCK_T: tl.constexpr,
                  COLUMNS: tl.constexpr):  # fmt: skip
    """Sums d_score [M, N] by bucket, where only buckets first .. last occur: into total [BLOCK_T] float32, or, times
    ``factor``, into the table Grad.

    Where FEW or fewer buckets are crossed, and always if ORDERED: bucket b gets the sum over gaps that reach its
    threshold, minus that of bucket b + 1. Elsewhere, as times are sorted, a row's buckets are runs: sums along each
    run, and one atomic add where it ends. ``k_next``: ages of the keys one further. Times in another order only make
    more runs.
    """
    slots = tl.arange(0, BLOCK_T)
    if ORDERED:
        total += tl.where(slots == first, tl.sum(tl.sum(d_score, 1), 0), 0.0)
        for bucket in range(first + 1, last + 1):
            total = _move_to_bucket(total, d_score, Thresholds, q_age, k_age, bucket, slots)
    else:
        if last - first <= FEW:
            total += tl.where(slots == first, tl.sum(tl.sum(d_score, 1), 0), 0.0)
            if last > first:
                for step in tl.static_range(1, FEW + 1):
                    # Beyond the last bucket the threshold is out of reach for the tile.
                    bucket = tl.minimum(first + step, last_bucket + 1)
                    total = _move_to_bucket(total, d_score, Thresholds, q_age, k_age, bucket, slots)
        else:
            here = bucket_of(Thresholds, q_age, k_age, buckets_per_octave, last_bucket)
            after = bucket_of(Thresholds, q_age, k_next, buckets_per_octave, last_bucket)
            columns = tl.arange(0, COLUMNS)[None, :]
            ends = (here != after) | (columns == COLUMNS - 1)
            before = tl.gather(ends.to(tl.int32), tl.maximum(columns - 1, 0) + tl.zeros_like(here), 1)
            starts = tl.where(columns == 0, 1, before)
            run, _ = tl.associative_scan((d_score, starts), 1, _add_within_run)
            tl.atomic_add(Grad + here, run * factor, mask=ends & (run != 0.0), sem="relaxed")
    return total


@triton.jit
def _add_within_run(sum_a, start_a, sum_b, start_b):
    """Combines two stretches of a row: the sum of the run that each ends with, and whether a run starts in it."""
    return tl.where(start_b > 0, sum_b, sum_a + sum_b), start_a | start_b


@triton.jit
def _move_to_bucket(total, d_score, Thresholds, q_age, k_age, bucket, slots):
    """Moves the sum over gaps that reach the bucket's threshold from the bucket before to it."""
    further = reaches(q_age, k_age, tl.load(Thresholds + bucket))
    part = tl.sum(tl.sum(tl.where(further, d_score, 0.0), 1), 0)
    return total + tl.where(slots == bucket, part, 0.0) - tl.where(slots == bucket - 1, part, 0.0)


@triton.jit
def add_diagonals(Grad, d_score, start, size, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Adds a tile's diagonal sums to a table [size]: element (r, c) of d_score belongs to entry ``start + c - r``.

    The rows are rotated against each other so that diagonals become columns; a column c then holds the diagonals
    ``c - w COLUMNS`` for w = 0, 1, ... Every entry is added to at most once per w.
    """
    r, c = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    turned = tl.gather(d_score, (r + c) % COLUMNS, 1)
    columns = tl.arange(0, COLUMNS)
    for w in tl.static_range((ROWS + COLUMNS - 2) // COLUMNS + 1):
        part = tl.sum(tl.where((r + c) // COLUMNS == w, turned, 0.0), 0)
        entry = start + columns - w * COLUMNS
        inside = (entry >= 0) & (entry < size) & (part != 0.0)  # diagonals that the tile does not have are zero
        tl.atomic_add(Grad + entry, part, mask=inside, sem="relaxed")
