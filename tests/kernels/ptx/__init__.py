"""A GPU in numpy: PTX, the assembly that Triton emits, is executed on the CPU with every access to memory checked.

    python -m pytest --ptx sm_90 tests/kernels

One statement of PTX is `@guard op.modifiers to, sources;`: `@%p3 ld.global.v2.b32 {%r1, %r2}, [%rd4+16];` lets the
threads whose %p3 is set load 8 bytes from %rd4 + 16. A Triton program is a *CTA*: with num_warps=4 it has 128 threads,
and 32 neighbours are a *warp*, for which a GPU issues one instruction. Where threads branch apart, those at the lowest
place of the text go on, until all meet again. A *barrier*, `bar.sync`, waits for all threads of the CTA; what was done
before it, all see after it. Nothing else is promised: two accesses of different threads to one byte, one of them a
write and no barrier between them, are a *race*, whose result is a matter of luck. Warps talk without memory: a
*shuffle* hands each lane another lane's register, `redux` and `vote` combine 32 lanes, and an *mma* multiplies two
small matrices that are spread over the registers of the warp. Read kernel.py, cta.py, then launch.py.
"""
