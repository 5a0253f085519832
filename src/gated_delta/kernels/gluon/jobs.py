"""What the programs of :mod:`chain` go through: a job is the values of a head that a program keeps, of a sequence or of
a part of one. There are as many programs as processors; all groups of a program go through the same jobs, one behind
the other, so that the chunks of the next one are prepared while the last of this one are gone through.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from gated_delta.kernels.gluon.prepare import narrow, sequence_of, slot_of, wide


@gluon.jit
def part_of(cu_seqlens, cu_stride, slots, slot_stride, null_slot, N, place, size, PARTS: gl.constexpr):
    """What this place stands for, a sequence or with PARTS ``size`` tokens of one: sequence, its slot (negative for
    padding), its first token, its length, the tokens of it that come before this part, and those of the part.
    """
    sequence, before = place, gl.to_tensor(0)
    if PARTS:
        sequence = sequence_of(cu_seqlens, cu_stride, N, place, size)
    begin = gl.load(cu_seqlens + sequence * cu_stride).to(gl.int64)
    length = (gl.load(cu_seqlens + (sequence + 1) * cu_stride).to(gl.int64) - begin).to(gl.int32)
    part = length
    if PARTS:
        # In 32 bits: one of 64 is a call, and the compiler takes what follows from it for different in every thread.
        before = (place - (narrow(begin) // size + sequence)) * size
        part = gl.minimum(length - before, size)
    slot = slot_of(slots, slot_stride, sequence, null_slot)
    return sequence.to(gl.int64), slot, begin, length, before, part


@gluon.jit
def job_of(jobs, job, GROUPS: gl.constexpr, PARTS: gl.constexpr):
    """A job's head, the first of its values, its place, and :func:`part_of` that. Behind the last place are the tokens
    behind the last sequence, which are padding.
    """
    halves, places, at, L, N, cu_seqlens, cu_stride, slots, slot_stride, null_slot, size = jobs[3]
    job = gl.to_tensor(job)
    half, place = job % halves * GROUPS, job // halves
    if PARTS:
        place += at
    if place < places:
        sequence, slot, begin, length, before, part = part_of(
            cu_seqlens, cu_stride, slots, slot_stride, null_slot, N, place, size, PARTS
        )
    else:
        sequence, slot, before = wide(0), wide(-1), gl.to_tensor(0)
        begin = gl.load(cu_seqlens + N * cu_stride).to(gl.int64)
        length = (L - begin).to(gl.int32)
        part = length
    return (half // 2).to(gl.int64), half % 2 * 64, place.to(gl.int64), sequence, slot, begin, length, before, part


@gluon.jit
def tokens_of(jobs, job, GROUPS: gl.constexpr, PARTS: gl.constexpr):
    """A job's head, the first of its values, its sequence, its first token, and its tokens: none of padding."""
    head, values, _, sequence, slot, begin, _, before, part = job_of(jobs, job, GROUPS, PARTS)
    return head, values, sequence, begin + before, gl.where(slot < 0, 0, gl.maximum(part, 0))


@gluon.jit
def sources_of(given, tokens, RATIOS: gl.constexpr):
    """q, k and v, and where their tiles of these tokens begin. RATIOS: state heads to a head of each."""
    q, k, v, q_head, k_head, v_head = given
    head, values, _, first, _ = tokens
    q_column, k_column = narrow(head // RATIOS[0] * q_head), narrow(head // RATIOS[1] * k_head)
    return q, k, v, q_column, k_column, narrow(head // RATIOS[2] * v_head + values), narrow(first)
