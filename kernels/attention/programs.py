"""Triton kernels of the attention.

Forward and the deterministic gradient of q walk a block of query rows over key rows; the gradient of k, v and both
tables walks a block of key rows over query rows. Only the inputs are kept: scores are computed again.

Legend: B users, L query rows in all, K key rows in all, H heads, A query/key width, V value width, M query rows and
N key rows of a tile, n rows of a user's sequence.
"""

# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl

from kernels.attention.tile import (
    FEW_BUCKETS,
    FEW_SUMS,
    add_diagonals,
    add_time_grad,
    age_range,
    bucket_range,
    load_rows,
    sigmoid,
    store_rows,
    time_bias,
    user_bounds,
    visible,
)


@triton.jit
def _scores(product, i, j, q_age, k_age, q_least, q_most, k_least, k_most, Position, Time, Thresholds, scale, center,
            history, n, buckets_per_octave, last_bucket, TARGETS: tl.constexpr, POSITION: tl.constexpr,
            TIME: tl.constexpr, SHAPE_0: tl.constexpr, SHAPE_1: tl.constexpr):  # fmt: skip
    """Scores of a tile from its products q.k; rows and keys beyond the sequence get some finite value."""
    score = product * scale
    if POSITION:
        i_at, j_at = tl.minimum(i, n - 1), tl.minimum(j, n - 1)
        if TARGETS:
            i_at, j_at = tl.minimum(i_at, history), tl.minimum(j_at, history)
        score += tl.load(Position + (center + j_at - i_at)).to(tl.float32)
    if TIME == 1:
        first, last = bucket_range(q_least, q_most, k_least, k_most, buckets_per_octave, last_bucket)
        score += time_bias(
            Time, Thresholds, q_age, k_age, first, last, buckets_per_octave, last_bucket, FEW_BUCKETS, SHAPE_0, SHAPE_1
        )
    elif TIME == 2:
        gap = tl.abs(k_age - q_age).to(tl.float32)
        score += tl.load(Time + 1).to(tl.float32) - tl.load(Time).to(tl.float32) * tl.log(1.0 + gap)
    return score


@triton.jit
def _key_ranges(i_first, i_last, history, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
                TARGETS: tl.constexpr, CONTEXTUAL: tl.constexpr, WINDOW: tl.constexpr,
                FULL_ROWS: tl.constexpr):  # fmt: skip
    """Keys that query rows i_first .. i_last need: [0, whole) seen by all of them, then three masked stretches.

    Without SPLIT all of them are masked: whole is 0.
    Returns whole, prefix_end, low, high, own_low, own_high: keys [0, prefix_end), [low, high) and [own_low, own_high).
    All but the ends ``high`` and ``own_high`` are such that blocks of BLOCK_N never overlap.
    """
    whole, prefix_end = 0, 0
    if CAUSAL:
        high = tl.minimum(history, i_last + 1)
        if CONTEXTUAL > 0:
            if i_first < CONTEXTUAL:
                high = history
    else:
        high = history
    if WINDOW > 0:
        low = tl.maximum(tl.minimum(i_first, history) - WINDOW + 1, 0)
        if FULL_ROWS > 0:
            if i_last >= history - FULL_ROWS:
                low = 0
        if CONTEXTUAL > 0:
            if i_first < CONTEXTUAL:
                low = 0
        if not CAUSAL and CONTEXTUAL == 0:
            reach = tl.minimum(i_last + WINDOW, history)
            if FULL_ROWS > 0:
                if i_last >= history - FULL_ROWS:
                    reach = history
            high = tl.minimum(high, reach)
        low = low // BLOCK_N * BLOCK_N
        if CONTEXTUAL > 0:
            prefix_end = tl.minimum(tl.cdiv(CONTEXTUAL, BLOCK_N) * BLOCK_N, low)
    elif SPLIT:
        if CAUSAL:
            whole = tl.minimum(i_first + 1, history) // BLOCK_N * BLOCK_N
        else:
            whole = history // BLOCK_N * BLOCK_N
        low = whole
    else:
        low = whole
    own_low, own_high = 0, 0
    if TARGETS:
        covered = low + tl.cdiv(tl.maximum(high - low, 0), BLOCK_N) * BLOCK_N
        own_low = tl.maximum(covered, tl.maximum(history, i_first))
        own_high = tl.maximum(i_last + 1, own_low)
    return whole, prefix_end, low, high, own_low, own_high


@triton.jit
def _attention_rows_kernel(
    Q, K, V, Out, Grad, DPosition, DTime, Offsets, Order, KeyStarts, KeyLengths, NumTargets, QueryAge, KeyAge,
    Thresholds, RowDivisor, Position, Time,
    q_row, q_head, k_row, k_head, v_row, v_head, out_row, out_head, grad_row, grad_head, position_head, time_head,
    table_stride, scale, inverse_divisor, center, position_size, buckets_per_octave, last_bucket, num_heads,
    num_blocks, num_tasks, num_tables,
    BACKWARD: tl.constexpr, PERSISTENT: tl.constexpr, BLOCK_T: tl.constexpr, A: tl.constexpr, V_WIDTH: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, TARGETS: tl.constexpr, CONTEXTUAL: tl.constexpr, WINDOW: tl.constexpr,
    FULL_ROWS: tl.constexpr, DELTA: tl.constexpr, POSITION: tl.constexpr, TIME: tl.constexpr,
    ROW_DIVISOR: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Blocks of query rows: the output [M, V]; or (BACKWARD) the gradient of q [M, A] and a share of both tables'.

    One task a program, tables shared by some programs; or PERSISTENT: program p takes tasks p, p + P, ... one after
    the other and owns table p, so that every sum has one order.
    """
    program = tl.program_id(0)
    table = (program % num_tables).to(tl.int64) * table_stride
    DPosition += table
    DTime += table
    last_task = program + 1
    if PERSISTENT:
        last_task = num_tasks
    for task in range(program, last_task, tl.num_programs(0)):
        _rows_task(
            task, Q, K, V, Out, Grad, DPosition, DTime, Offsets, Order, KeyStarts, KeyLengths, NumTargets, QueryAge,
            KeyAge, Thresholds, RowDivisor, Position, Time, q_row, q_head, k_row, k_head, v_row, v_head, out_row,
            out_head, grad_row, grad_head, position_head, time_head, scale, inverse_divisor, center, position_size,
            buckets_per_octave, last_bucket, num_heads, num_blocks, BACKWARD, PERSISTENT, BLOCK_T, A, V_WIDTH, BLOCK_A,
            BLOCK_V, BLOCK_M, BLOCK_N, CAUSAL, TARGETS, CONTEXTUAL, WINDOW, FULL_ROWS, DELTA, POSITION, TIME,
            ROW_DIVISOR, FAST, PRECISION, ALIGN,
        )  # fmt: skip


@triton.jit
def _rows_task(
    task, Q, K, V, Out, Grad, DPosition, DTime, Offsets, Order, KeyStarts, KeyLengths, NumTargets, QueryAge, KeyAge,
    Thresholds, RowDivisor, Position, Time, q_row, q_head, k_row, k_head, v_row, v_head, out_row, out_head, grad_row,
    grad_head, position_head, time_head, scale, inverse_divisor, center, position_size, buckets_per_octave,
    last_bucket, num_heads, num_blocks, BACKWARD: tl.constexpr, ORDERED: tl.constexpr, BLOCK_T: tl.constexpr,
    A: tl.constexpr, V_WIDTH: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, TARGETS: tl.constexpr, CONTEXTUAL: tl.constexpr,
    WINDOW: tl.constexpr, FULL_ROWS: tl.constexpr, DELTA: tl.constexpr, POSITION: tl.constexpr, TIME: tl.constexpr,
    ROW_DIVISOR: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """One block of query rows of one user and head; the last blocks, which see most, come first."""
    block = num_blocks - 1 - task % num_blocks
    head = (task // num_blocks) % num_heads
    user = tl.load(Order + task // num_blocks // num_heads)
    first_row, num_rows, first_key, n, history = user_bounds(
        Offsets, KeyStarts, KeyLengths, NumTargets, user, DELTA, TARGETS
    )
    row_start = block * BLOCK_M
    if row_start < num_rows:
        shift = n - num_rows
        rows = row_start + tl.arange(0, BLOCK_M)
        i_first = shift + row_start
        i_last = tl.minimum(i_first + BLOCK_M, n) - 1
        i = (shift + rows)[:, None]
        head_offset = head.to(tl.int64)
        block_row = first_row + row_start
        rows_left = num_rows - row_start
        q = load_rows(Q + head_offset * q_head, block_row, rows_left, q_row, A, BLOCK_M, BLOCK_A, True, ALIGN)
        head_k = K + head_offset * k_head
        head_v = V + head_offset * v_head
        position, time = Position + head * position_head, Time + head * time_head
        d_position, d_time_table = DPosition + head * position_head, DTime + head * time_head
        q_age = tl.zeros([BLOCK_M], tl.int32)
        q_least, q_most = 0, 0
        if TIME > 0:
            q_age = tl.load(QueryAge + first_row + rows, mask=rows < num_rows, other=0)
            q_least, q_most = age_range(q_age, rows < num_rows)
        inverse = tl.full([BLOCK_M], 1.0, tl.float32)
        if ROW_DIVISOR:
            inverse = 1.0 / tl.load(RowDivisor + first_row + rows, mask=rows < num_rows, other=1.0)
        d_time = tl.zeros([BLOCK_T], tl.float32)
        if BACKWARD:
            g = load_rows(
                Grad + head_offset * grad_head, block_row, rows_left, grad_row, V_WIDTH, BLOCK_M, BLOCK_V, True, ALIGN
            )
            total = tl.zeros([BLOCK_M, BLOCK_A], tl.float32)
        else:
            g = q
            total = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)

        # The backward step with a time table is long: compiled once, with the mask, not twice.
        whole, prefix_end, low, high, own_low, own_high = _key_ranges(
            i_first, i_last, history, not (BACKWARD and TIME == 1), BLOCK_N, CAUSAL, TARGETS, CONTEXTUAL, WINDOW,
            FULL_ROWS,
        )  # fmt: skip
        if not (BACKWARD and TIME == 1):
            for start in range(0, whole, BLOCK_N):
                total, d_time = _row_step(
                    total, d_time, q, g, inverse, head_k, head_v, KeyAge, i, i_first, start, first_key, n, history,
                    q_age, q_least, q_most, position, time, d_position, d_time_table, Thresholds, k_row, v_row, scale,
                    inverse_divisor, center, position_size, buckets_per_octave, last_bucket, False, BACKWARD, ORDERED,
                    BLOCK_T, A, V_WIDTH, BLOCK_A, BLOCK_V, BLOCK_M, BLOCK_N, CAUSAL, TARGETS, CONTEXTUAL, WINDOW,
                    FULL_ROWS, POSITION, TIME, ROW_DIVISOR, FAST, PRECISION, ALIGN,
                )  # fmt: skip
        num_prefix = prefix_end // BLOCK_N
        num_middle = num_prefix + tl.cdiv(tl.maximum(high - low, 0), BLOCK_N)
        num_steps = num_middle + tl.cdiv(own_high - own_low, BLOCK_N)
        for step in range(0, num_steps):
            start = tl.where(step < num_prefix, step * BLOCK_N, low + (step - num_prefix) * BLOCK_N)
            if TARGETS:
                start = tl.where(step < num_middle, start, own_low + (step - num_middle) * BLOCK_N)
            total, d_time = _row_step(
                total, d_time, q, g, inverse, head_k, head_v, KeyAge, i, i_first, start, first_key, n, history, q_age,
                q_least, q_most, position, time, d_position, d_time_table, Thresholds, k_row, v_row, scale,
                inverse_divisor, center, position_size, buckets_per_octave, last_bucket, True, BACKWARD, ORDERED,
                BLOCK_T, A, V_WIDTH, BLOCK_A, BLOCK_V, BLOCK_M, BLOCK_N, CAUSAL, TARGETS, CONTEXTUAL, WINDOW,
                FULL_ROWS, POSITION, TIME, ROW_DIVISOR, FAST, PRECISION, ALIGN,
            )  # fmt: skip
        head_out = Out + head_offset * out_head
        if BACKWARD:
            total *= scale * inverse_divisor
            store_rows(head_out, total, block_row, rows_left, out_row, A, BLOCK_M, BLOCK_A)
            if TIME > 0:
                slots = tl.arange(0, BLOCK_T)
                tl.atomic_add(d_time_table + slots, d_time * inverse_divisor, mask=d_time != 0.0, sem="relaxed")
            if ORDERED:
                tl.debug_barrier()
        else:
            if ROW_DIVISOR:
                total *= inverse[:, None]
            total *= inverse_divisor
            store_rows(head_out, total, block_row, rows_left, out_row, V_WIDTH, BLOCK_M, BLOCK_V)


@triton.jit
def _row_step(
    total, d_time, q, g, inverse, K, V, KeyAge, i, i_first, start, first_key, n, history, q_age, q_least, q_most,
    Position, Time, DPosition, DTime, Thresholds, k_row, v_row, scale, inverse_divisor, center, position_size,
    buckets_per_octave, last_bucket, MASKED: tl.constexpr, BACKWARD: tl.constexpr, ORDERED: tl.constexpr,
    BLOCK_T: tl.constexpr, A: tl.constexpr, V_WIDTH: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, TARGETS: tl.constexpr,
    CONTEXTUAL: tl.constexpr, WINDOW: tl.constexpr, FULL_ROWS: tl.constexpr, POSITION: tl.constexpr,
    TIME: tl.constexpr, ROW_DIVISOR: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Adds one block of keys to a block of query rows. Tiles are [M, N]."""
    keys = start + tl.arange(0, BLOCK_N)
    k = load_rows(K, first_key + start, n - start, k_row, A, BLOCK_N, BLOCK_A, MASKED, ALIGN)
    v = load_rows(V, first_key + start, n - start, v_row, V_WIDTH, BLOCK_N, BLOCK_V, MASKED, ALIGN)
    k_age = tl.zeros([BLOCK_N], tl.int32)
    k_least, k_most = 0, 0
    if TIME > 0:
        if MASKED:
            k_age = tl.load(KeyAge + first_key + keys, mask=keys < n, other=0)
        else:
            k_age = tl.load(KeyAge + first_key + keys)
        k_least, k_most = age_range(k_age, keys < n)
    j = keys[None, :]
    product = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [M, N]
    score = _scores(
        product, i, j, q_age[:, None], k_age[None, :], q_least, q_most, k_least, k_most, Position, Time, Thresholds,
        scale, center, history, n, buckets_per_octave, last_bucket, TARGETS, POSITION, TIME, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    gate = sigmoid(score, FAST)
    weight = score * gate  # SiLU
    if not BACKWARD:
        if MASKED:
            weight = tl.where(visible(i, j, history, CAUSAL, TARGETS, CONTEXTUAL, WINDOW, FULL_ROWS), weight, 0.0)
        total = tl.dot(weight.to(v.dtype), v, total, input_precision=PRECISION)
    else:
        slope = gate + weight * (1.0 - gate)  # derivative of SiLU
        if MASKED:
            slope = tl.where(visible(i, j, history, CAUSAL, TARGETS, CONTEXTUAL, WINDOW, FULL_ROWS), slope, 0.0)
        d_score = tl.dot(g, tl.trans(v), input_precision=PRECISION) * slope
        if ROW_DIVISOR:
            d_score *= inverse[:, None]
        total = tl.dot(d_score.to(k.dtype), k, total, input_precision=PRECISION)
        if POSITION:
            _add_position_grad(
                DPosition, d_score * inverse_divisor, i, i_first, keys, start, history, center, position_size,
                TARGETS, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            if ORDERED:
                tl.debug_barrier()
        if TIME == 1:
            first, last = bucket_range(q_least, q_most, k_least, k_most, buckets_per_octave, last_bucket)
            k_next = tl.load(KeyAge + first_key + keys + 1, mask=keys + 1 < n, other=0)
            d_time = add_time_grad(
                d_time, d_score, DTime, Thresholds, q_age[:, None], k_age[None, :], k_next[None, :], first, last,
                buckets_per_octave, last_bucket, inverse_divisor, FEW_SUMS, ORDERED, BLOCK_T, BLOCK_N,
            )  # fmt: skip
        elif TIME == 2:
            slots = tl.arange(0, BLOCK_T)
            log_gap = tl.log(1.0 + tl.abs(k_age[None, :] - q_age[:, None]).to(tl.float32))
            d_slope = -tl.sum(tl.sum(d_score * log_gap, 1), 0)
            d_level = tl.sum(tl.sum(d_score, 1), 0)
            d_time += tl.where(slots == 0, d_slope, 0.0) + tl.where(slots == 1, d_level, 0.0)
    return total, d_time


@triton.jit
def _add_position_grad(DPosition, d_score, i, i_first, keys, start, history, center, size, TARGETS: tl.constexpr,
                       BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Adds a tile [M, N] to the gradient of the position table [size]."""
    if TARGETS:
        # Targets all stand at the same position, so their pairs of one key share an entry.
        is_target = i >= history
        by_key = tl.sum(tl.where(is_target, d_score, 0.0), 0)  # [N]
        seen = (by_key != 0.0) & (keys < history)
        tl.atomic_add(DPosition + center + keys - history, by_key, mask=seen, sem="relaxed")
        tl.atomic_add(DPosition + center, tl.sum(tl.where(keys >= history, by_key, 0.0), 0), sem="relaxed")
        d_score = tl.where(is_target, 0.0, d_score)
    add_diagonals(DPosition, d_score, center + start - i_first, size, BLOCK_M, BLOCK_N)


@triton.jit
def _query_ranges(j_first, j_last, shift, n, history, BLOCK_M: tl.constexpr, CAUSAL: tl.constexpr,
                  TARGETS: tl.constexpr, CONTEXTUAL: tl.constexpr, WINDOW: tl.constexpr,
                  FULL_ROWS: tl.constexpr):  # fmt: skip
    """Blocks of query rows that may see keys j_first .. j_last, in units of BLOCK_M rows from position ``shift``.

    Returns prefix_end, low, plain, high, tail_low, tail_high: blocks [0, prefix_end), [low, plain) and
    [tail_low, tail_high) need the mask, blocks [plain, high) do not.
    """
    lowest = j_first
    if not CAUSAL:
        lowest = 0
        if WINDOW > 0:
            lowest = j_first - WINDOW + 1
    highest = n
    prefix_rows, tail_from = 0, n
    if WINDOW > 0:
        highest = j_last + WINDOW
        tail_from = history - FULL_ROWS
        if FULL_ROWS == 0 and j_last <= history - WINDOW:
            tail_from = n  # no key of the block is near enough to the targets
    if CONTEXTUAL > 0:
        prefix_rows = CONTEXTUAL
        if WINDOW > 0:
            if j_first < CONTEXTUAL:
                highest = n
    if TARGETS:
        if j_first >= history:  # only targets: each is seen by itself alone
            lowest, highest, prefix_rows, tail_from = j_first, j_last + 1, 0, n
    num_blocks = tl.cdiv(n - shift, BLOCK_M)
    prefix_end = tl.minimum(tl.cdiv(tl.maximum(prefix_rows - shift, 0), BLOCK_M), num_blocks)
    low = tl.maximum(tl.maximum(lowest - shift, 0) // BLOCK_M, prefix_end)
    high = tl.maximum(tl.minimum(tl.cdiv(tl.maximum(tl.minimum(highest, n) - shift, 0), BLOCK_M), num_blocks), low)
    plain = high
    if WINDOW == 0:
        first_whole = 0
        if CAUSAL:
            first_whole = tl.cdiv(tl.maximum(j_last - shift, 0), BLOCK_M)
        if j_last < history:
            plain = tl.minimum(tl.maximum(first_whole, low), high)
    tail_low, tail_high = high, high
    if WINDOW > 0 and (TARGETS or FULL_ROWS > 0):
        tail_low = tl.maximum(tl.maximum(tail_from - shift, 0) // BLOCK_M, high)
        tail_high = tl.maximum(num_blocks, tail_low)
    return prefix_end, low, plain, high, tail_low, tail_high


@triton.jit
def _attention_keys_kernel(
    Q, K, V, Grad, DK, DV, Offsets, Order, KeyStarts, KeyLengths, NumTargets, QueryAge, KeyAge, Thresholds, RowDivisor,
    Position, Time,
    q_row, q_head, k_row, k_head, v_row, v_head, grad_row, grad_head, dk_row, dk_head, dv_row, dv_head,
    position_head, time_head, scale, inverse_divisor, center, buckets_per_octave, last_bucket, num_heads, num_blocks,
    A: tl.constexpr, V_WIDTH: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, TARGETS: tl.constexpr, CONTEXTUAL: tl.constexpr,
    WINDOW: tl.constexpr, FULL_ROWS: tl.constexpr, DELTA: tl.constexpr, POSITION: tl.constexpr, TIME: tl.constexpr,
    ROW_DIVISOR: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """One block of key rows of one user and head: gradients of k [N, A] and v [N, V]."""
    program = tl.program_id(0)
    block = program % num_blocks  # the first keys, which most rows see, come first
    head = (program // num_blocks) % num_heads
    user = tl.load(Order + program // num_blocks // num_heads)
    first_row, num_rows, first_key, n, history = user_bounds(
        Offsets, KeyStarts, KeyLengths, NumTargets, user, DELTA, TARGETS
    )
    j_first = block * BLOCK_N
    if j_first >= n:
        return
    j_last = tl.minimum(j_first + BLOCK_N, n) - 1
    shift = n - num_rows
    keys = j_first + tl.arange(0, BLOCK_N)
    head_offset = head.to(tl.int64)
    block_key, keys_left = first_key + j_first, n - j_first
    k = load_rows(K + head_offset * k_head, block_key, keys_left, k_row, A, BLOCK_N, BLOCK_A, True, ALIGN)
    v = load_rows(V + head_offset * v_head, block_key, keys_left, v_row, V_WIDTH, BLOCK_N, BLOCK_V, True, ALIGN)
    Q += head_offset * q_head
    Grad += head_offset * grad_head
    Position += head * position_head
    Time += head * time_head
    k_age = tl.zeros([BLOCK_N], tl.int32)
    k_least, k_most = 0, 0
    if TIME > 0:
        k_age = tl.load(KeyAge + first_key + keys, mask=keys < n, other=0)
        k_least, k_most = age_range(k_age, keys < n)
    dk = tl.zeros([BLOCK_N, BLOCK_A], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)

    prefix_end, low, plain, high, tail_low, tail_high = _query_ranges(
        j_first, j_last, shift, n, history, BLOCK_M, CAUSAL, TARGETS, CONTEXTUAL, WINDOW, FULL_ROWS
    )
    num_middle = prefix_end + plain - low
    for step in range(0, num_middle + tail_high - tail_low):
        row_block = tl.where(step < prefix_end, step, low + step - prefix_end)
        if WINDOW > 0:
            row_block = tl.where(step < num_middle, row_block, tail_low + step - num_middle)
        dk, dv = _key_step(
            dk, dv, k, v, k_age, k_least, k_most, keys, row_block, shift, first_row, num_rows, n, history, Q, Grad,
            QueryAge, Thresholds, RowDivisor, Position, Time, q_row, grad_row, scale, center, buckets_per_octave,
            last_bucket, True, A, V_WIDTH, BLOCK_A, BLOCK_V, BLOCK_M, BLOCK_N, CAUSAL, TARGETS, CONTEXTUAL, WINDOW,
            FULL_ROWS, POSITION, TIME, ROW_DIVISOR, FAST, PRECISION, ALIGN,
        )  # fmt: skip
    for row_block in range(plain, high):
        dk, dv = _key_step(
            dk, dv, k, v, k_age, k_least, k_most, keys, row_block, shift, first_row, num_rows, n, history, Q, Grad,
            QueryAge, Thresholds, RowDivisor, Position, Time, q_row, grad_row, scale, center, buckets_per_octave,
            last_bucket, False, A, V_WIDTH, BLOCK_A, BLOCK_V, BLOCK_M, BLOCK_N, CAUSAL, TARGETS, CONTEXTUAL, WINDOW,
            FULL_ROWS, POSITION, TIME, ROW_DIVISOR, FAST, PRECISION, ALIGN,
        )  # fmt: skip
    dk, dv = dk * (scale * inverse_divisor), dv * inverse_divisor
    store_rows(DK + head_offset * dk_head, dk, block_key, keys_left, dk_row, A, BLOCK_N, BLOCK_A)
    store_rows(DV + head_offset * dv_head, dv, block_key, keys_left, dv_row, V_WIDTH, BLOCK_N, BLOCK_V)


@triton.jit
def _key_step(
    dk, dv, k, v, k_age, k_least, k_most, keys, row_block, shift, first_row, num_rows, n, history, Q, Grad, QueryAge,
    Thresholds, RowDivisor, Position, Time, q_row, grad_row, scale, center, buckets_per_octave, last_bucket,
    MASKED: tl.constexpr, A: tl.constexpr, V_WIDTH: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, TARGETS: tl.constexpr,
    CONTEXTUAL: tl.constexpr, WINDOW: tl.constexpr, FULL_ROWS: tl.constexpr, POSITION: tl.constexpr,
    TIME: tl.constexpr, ROW_DIVISOR: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Adds one block of query rows to a block of keys. Tiles are [N, M]."""
    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    i, j = (shift + rows)[None, :], keys[:, None]
    block_row, rows_left = first_row + row_block * BLOCK_M, num_rows - row_block * BLOCK_M
    q = load_rows(Q, block_row, rows_left, q_row, A, BLOCK_M, BLOCK_A, True, ALIGN)
    g = load_rows(Grad, block_row, rows_left, grad_row, V_WIDTH, BLOCK_M, BLOCK_V, True, ALIGN)
    q_age = tl.zeros([BLOCK_M], tl.int32)
    q_least, q_most = 0, 0
    if TIME > 0:
        q_age = tl.load(QueryAge + first_row + rows, mask=rows < num_rows, other=0)
        q_least, q_most = age_range(q_age, rows < num_rows)
    product = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [N, M]
    score = _scores(
        product, i, j, q_age[None, :], k_age[:, None], q_least, q_most, k_least, k_most, Position, Time, Thresholds,
        scale, center, history, n, buckets_per_octave, last_bucket, TARGETS, POSITION, TIME, BLOCK_N, BLOCK_M,
    )  # fmt: skip
    gate = sigmoid(score, FAST)
    weight = score * gate  # SiLU
    slope = gate + weight * (1.0 - gate)  # its derivative
    if MASKED:
        sees = visible(i, j, history, CAUSAL, TARGETS, CONTEXTUAL, WINDOW, FULL_ROWS)
        weight, slope = tl.where(sees, weight, 0.0), tl.where(sees, slope, 0.0)
    if ROW_DIVISOR:
        inverse = (1.0 / tl.load(RowDivisor + first_row + rows, mask=rows < num_rows, other=1.0))[None, :]
        weight, slope = weight * inverse, slope * inverse
    dv = tl.dot(weight.to(g.dtype), g, dv, input_precision=PRECISION)
    d_score = tl.dot(v, tl.trans(g), input_precision=PRECISION) * slope
    dk = tl.dot(d_score.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv
