"""A GPU in numpy: PTX, the assembly that Triton emits, is executed on the CPU with every access to memory checked.

    python -m pytest --ptx sm_90 tests/kernels

Read parse.py (what PTX is), translate.py (how it becomes numpy), cta.py (threads, warps, barriers, mma), memory.py
(bounds, alignment and races), then launch.py (how Triton's launches get here).
"""
