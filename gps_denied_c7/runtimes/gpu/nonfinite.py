"""A kernel that finds NaN and infinity, as PTX: the driver compiles it for whatever GPU there is."""

from __future__ import annotations

__all__ = ['FINITE_KERNEL', 'FINITE_KERNEL_NAME', 'FINITE_MASKS', 'QUAD_BYTES']

FINITE_KERNEL_NAME = b'find_non_finite'

# A thread reads four words of 32 bits at a time.
QUAD_BYTES = 16

# IEEE 754: a value is NaN or infinite where every bit of its exponent is set, and only there. A word holds one
# float32, or two float16 with a mask for each half.
FINITE_MASKS = {'float32': (0x7F800000, 0x7F800000), 'float16': (0x00007C00, 0x7C000000)}

_WORD = b"""
    and.b32 %%t, %%w%(word)d, %%low;
    setp.eq.u32 %%p, %%t, %%low;
    @%%p mov.u32 %%found, 1;
    and.b32 %%t, %%w%(word)d, %%high;
    setp.eq.u32 %%p, %%t, %%high;
    @%%p mov.u32 %%found, 1;"""

# Each thread walks over every n-th quad, n being the number of threads, and writes the flag only where it found
# something, so that a good frame costs no traffic over the bus. All who write, write the same.
FINITE_KERNEL = b"""\
.version 6.0
.target sm_50
.address_size 64

.visible .entry find_non_finite(
    .param .u64 data,
    .param .u32 quads,
    .param .u32 low,
    .param .u32 high,
    .param .u64 flag)
{
    .reg .pred %%p;
    .reg .b32 %%i, %%stride, %%quads, %%low, %%high, %%found, %%t, %%w<4>;
    .reg .b64 %%data, %%flag, %%at;

    ld.param.u64 %%data, [data];
    ld.param.u32 %%quads, [quads];
    ld.param.u32 %%low, [low];
    ld.param.u32 %%high, [high];
    ld.param.u64 %%flag, [flag];
    cvta.to.global.u64 %%data, %%data;
    cvta.to.global.u64 %%flag, %%flag;
    mov.u32 %%i, %%ctaid.x;
    mov.u32 %%stride, %%ntid.x;
    mov.u32 %%t, %%tid.x;
    mad.lo.u32 %%i, %%i, %%stride, %%t;
    mov.u32 %%t, %%nctaid.x;
    mul.lo.u32 %%stride, %%stride, %%t;
    mov.u32 %%found, 0;
next:
    setp.ge.u32 %%p, %%i, %%quads;
    @%%p bra done;
    mul.wide.u32 %%at, %%i, 16;
    add.u64 %%at, %%data, %%at;
    ld.global.v4.u32 {%%w0, %%w1, %%w2, %%w3}, [%%at];%(words)s
    add.u32 %%i, %%i, %%stride;
    bra.uni next;
done:
    setp.eq.u32 %%p, %%found, 0;
    @%%p ret;
    st.global.u32 [%%flag], 1;
    ret;
}
""" % {b'words': b''.join(_WORD % {b'word': word} for word in range(4))}
