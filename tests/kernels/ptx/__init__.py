"""A GPU in numpy: PTX, the assembly that Triton emits, executed on the CPU with every access checked."""
