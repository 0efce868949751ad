"""The machine that runs PTX: what it refuses, what it computes, and a part of the kernels' tests on it.

All of them: python -m pytest --ptx sm_90 tests/kernels
"""

from __future__ import annotations

import re
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.ptx.cta import PtxError
from tests.kernels.ptx.kernel import Kernel
from tests.kernels.ptx.launch import Launch, launch

ROOT = Path(__file__).resolve().parents[2]
THREADS = 64
PTX = f"""
.visible .entry kernel(.param .u64 .ptr .global .align 1 kernel_param_0, .param .u64 kernel_param_1,
    .param .u32 kernel_param_2)
.reqntid {THREADS}
{{
    .reg .pred %p<9>;
    .reg .b32 %r<20>;
    .reg .b64 %rd<9>;
    ld.param.b64 %rd1, [kernel_param_0];
    ld.param.b64 %rd2, [kernel_param_1];
    ld.param.b32 %r0, [kernel_param_2];
    mov.u32 %r1, %tid.x;
    shl.b32 %r2, %r1, 2;
    mad.wide.u32 %rd3, %r1, 4, %rd1;
    mad.wide.u32 %rd4, %r1, 4, %rd2;
    BODY
    ret;
}}
"""
OUT = "st.global.b32 [%rd4], %r9;"


def run(body: str, x: Tensor | None = None, number: int = 0, grid: int = 1) -> tuple[list[int], Launch]:
    """Run a body in which %r1 is the thread, %r2 four times that, %rd3 and %rd4 its places in x and in the result."""
    out = torch.zeros(THREADS, dtype=torch.int32)
    x = torch.arange(THREADS, dtype=torch.int32) if x is None else x
    arguments = {"x": x, "out": out, "number": number}
    done = launch(Kernel(PTX.replace("BODY", body)), arguments, (grid,), shared_bytes=1024)
    return out.tolist(), done


NEIGHBOUR = "xor.b32 %r3, %r2, 128; ld.shared.b32 %r9, [%r3];"  # of the other warp
STORE = "mul.lo.s32 %r4, %r1, 3; st.shared.b32 [%r2], %r4;"
COPY = "cp.async.ca.shared.global [ %r2 + 0 ], [ %rd3 + 0 ], 0x4; cp.async.commit_group;"
BARRIER = "bar.sync 0;"


def test_a_barrier_makes_what_others_wrote_visible_and_without_one_it_is_a_race() -> None:
    assert run(STORE + BARRIER + NEIGHBOUR + OUT)[0] == [3 * (t ^ 32) for t in range(THREADS)]
    for body in (
        STORE + NEIGHBOUR + OUT,
        STORE + BARRIER + NEIGHBOUR + STORE,  # written again before all have read
        "st.shared.b32 [global_smem], %r1;",
        "ld.global.b32 %r3, [%rd1]; st.global.b32 [%rd3], %r3;",  # thread 0 writes what the others read
    ):
        with pytest.raises(PtxError, match="race"):
            run(body)


def test_a_copy_arrives_when_it_is_waited_for() -> None:
    arrived = COPY + "cp.async.wait_group 0;" + BARRIER + NEIGHBOUR + OUT
    assert run(arrived)[0] == [t ^ 32 for t in range(THREADS)]
    for wait in ("", "cp.async.wait_group 1;"):
        with pytest.raises(PtxError, match="not yet waited for"):
            run(COPY + wait + BARRIER + NEIGHBOUR)
    with pytest.raises(PtxError, match="race"):
        run(COPY + "cp.async.wait_group 0;" + NEIGHBOUR)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.shared.b32 %r9, [%r2];", "nobody wrote"),
        ("ld.global.b32 %r9, [%rd3+4];", "byte 256 of x, which has 256"),
        ("st.global.b32 [%rd4+-4], %r1;", "byte -4 of out"),
        ("st.shared.b32 [%r2+1024], %r1;", "shared memory, which has 1024"),
        ("ld.global.b32 %r9, [%rd3+2];", "not aligned"),
        ("ld.global.v2.b32 {%r9, %r8}, [%rd3];", "8 bytes is not aligned"),
        ("setp.lt.s32 %p1, %r1, 5; @%p1 bra $L1; bar.sync 0; $L1: mov.b32 %r9, 0;", "others are not at"),
        ("setp.lt.s32 %p1, %r1, 5; @%p1 bra $L1; shfl.sync.bfly.b32 %r9, %r1, 1, 31, -1; $L1:", "branched apart"),
    ],
)
def test_what_a_gpu_would_punish_is_refused(body: str, message: str) -> None:
    with pytest.raises(PtxError, match=message) as refused:
        run(body)
    assert "  # " in "".join(traceback.format_exception(refused.value))  # the instruction


def test_threads_that_branch_apart_meet_again() -> None:
    """Each thread adds 1 + 2 + ... + (t % 5) in a loop of its own length."""
    body = """
        rem.u32 %r3, %r1, 5; mov.b32 %r9, 0;
        $L1: setp.eq.s32 %p1, %r3, 0; @%p1 bra $L2;
        add.s32 %r9, %r9, %r3; sub.s32 %r3, %r3, 1; bra.uni $L1;
        $L2: bar.sync 0;
    """
    assert run(body + OUT)[0] == [sum(range(t % 5 + 1)) for t in range(THREADS)]


@pytest.mark.parametrize(
    ("body", "want"),
    [
        ("shfl.sync.bfly.b32 %r9, %r1, 3, 31, -1;", lambda t: t ^ 3),
        ("shfl.sync.up.b32 %r9, %r1, 2, 0, -1;", lambda t: t - 2 if t % 32 >= 2 else t),
        ("shfl.sync.idx.b32 %r9, %r1, 7, 31, -1;", lambda t: t // 32 * 32 + 7),
        ("redux.sync.add.s32 %r9, %r1, -1;", lambda t: sum(range(t // 32 * 32, t // 32 * 32 + 32))),
        ("setp.lt.u32 %p1, %r1, 5; vote.sync.ballot.b32 %r9, %p1, -1;", lambda t: 31 if t < 32 else 0),
        ("mov.b32 %r3, 0f40200000; mov.b32 %r4, 0fC0200000; cvt.rni.s32.f32 %r9, %r3;", lambda t: 2),
        ("mov.b32 %r3, 0f7F800000; cvt.rzi.s32.f32 %r9, %r3;", lambda t: 2**31 - 1),
        ("sub.s32 %r3, %r1, 40; div.s32 %r9, %r3, 7;", lambda t: int((t - 40) / 7)),
        ("sub.s32 %r3, %r1, 40; shr.s32 %r9, %r3, 2;", lambda t: (t - 40) >> 2),
        ("mul.lo.s32 %r3, %r1, 17; bfe.u32 %r9, %r3, 3, 4;", lambda t: (17 * t >> 3) & 15),
        ("mov.b32 %r3, 1000000; mul.hi.u32 %r9, %r3, 1000000;", lambda t: 10**12 >> 32),
        ("popc.b32 %r9, %r1;", lambda t: t.bit_count()),
    ],
)
def test_arithmetic_and_warps(body: str, want: Any) -> None:
    assert run(body + OUT)[0] == [want(t) for t in range(THREADS)]


def test_bf16_rounds_to_nearest_even_and_a_nan_fails_every_ordered_comparison() -> None:
    x = torch.randn(THREADS, generator=torch.Generator().manual_seed(0))
    x[:4] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, float("nan"), float("inf")])
    body = ".reg .b16 %rs<2>; ld.global.b32 %r3, [%rd3]; cvt.rn.bf16.f32 %rs1, %r3; cvt.f32.bf16 %r9, %rs1;"
    got = torch.tensor(run(body + OUT, x)[0], dtype=torch.int32).view(torch.float32)
    assert torch.equal(got.nan_to_num(9), x.bfloat16().float().nan_to_num(9))
    for name, holds in (("lt", False), ("geu", True), ("ne", False), ("neu", True), ("nan", True), ("eq", False)):
        body = f"ld.global.b32 %r3, [%rd3]; setp.{name}.f32 %p1, %r3, 0f3F800000; selp.b32 %r9, 1, 0, %p1;"
        assert run(body + OUT, x)[0][2] == holds, name


def test_an_mma_is_a_product_of_matrices() -> None:
    """16 x 16 and 16 x 8 in bf16: each lane loads the fragments that PTX's tables give it."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, generator=generator).bfloat16() for size in ((16, 16), (16, 8)))
    x, out = torch.cat([a.flatten(), b.t().flatten()]), torch.zeros(16, 8)
    row = "shr.u32 %r3, %r4, 2; and.b32 %r5, %r4, 3; shl.b32 %r5, %r5, 2; "  # g, and 2 q halves in bytes
    body = f"""
        and.b32 %r4, %r1, 31; {row} mad.lo.s32 %r6, %r3, 32, %r5; cvt.u64.u32 %rd5, %r6; add.s64 %rd5, %rd5, %rd1;
        ld.global.b32 %r10, [%rd5]; ld.global.b32 %r11, [%rd5+256]; ld.global.b32 %r12, [%rd5+16];
        ld.global.b32 %r13, [%rd5+272]; ld.global.b32 %r14, [%rd5+512]; ld.global.b32 %r15, [%rd5+528];
        mov.b32 %r0, 0f00000000; mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{ %r16, %r17, %r18, %r19 }},
        {{ %r10, %r11, %r12, %r13 }}, {{ %r14, %r15 }}, {{ %r0, %r0, %r0, %r0 }};
        mad.lo.s32 %r6, %r3, 32, 0; shl.b32 %r5, %r5, 1; add.s32 %r6, %r6, %r5; cvt.u64.u32 %rd5, %r6;
        add.s64 %rd5, %rd5, %rd2; setp.lt.u32 %p1, %r1, 32;
        @%p1 st.global.v2.b32 [%rd5], {{%r16, %r17}}; @%p1 st.global.v2.b32 [%rd5+256], {{%r18, %r19}};
    """
    launch(Kernel(PTX.replace("BODY", body)), {"x": x, "out": out, "number": 0}, (1,))
    torch.testing.assert_close(out, a.float() @ b.float())


def test_atomics_count_in_shared_and_in_global_memory_and_the_last_cta_knows_that_it_is() -> None:
    zero = "mov.b32 %r4, 0; st.shared.b32 [%r2], %r4; bar.sync 0; "
    histogram = "rem.u32 %r5, %r1, 7; shl.b32 %r5, %r5, 2; atom.shared.add.u32 %r6, [%r5], 1; bar.sync 0; "
    each = run(zero + histogram + "ld.shared.b32 %r9, [%r2];" + OUT)[0]
    assert each[:8] == [len(range(i, THREADS, 7)) for i in range(7)] + [0]
    with pytest.raises(PtxError, match="race"):
        run(zero + histogram.replace("bar.sync 0;", "") + "ld.shared.b32 %r9, [%r2];")
    counter = """
        setp.eq.s32 %p1, %r1, 0; @%p1 atom.add.acq_rel.gpu.global.u32 %r5, [%rd1], 1;
        setp.eq.s32 %p2, %r5, 2; and.pred %p1, %p1, %p2; mov.b32 %r9, 5; @%p1 st.global.b32 [%rd2], %r9;
    """
    x = torch.zeros(THREADS, dtype=torch.int32)
    out, done = run(counter, x, grid=3)
    assert (out[0], x[0].item(), done.ctas, done.idle_ctas) == (5, 3, 3, 0)
    run(OUT + BARRIER + counter, x)
    with pytest.raises(PtxError, match="other warps may not have done"):
        run(OUT + counter, x)


def test_counts() -> None:
    _, done = run(OUT, grid=4)
    assert done.warp_instructions == 4 * 2 * 9  # CTAs, warps, instructions
    assert (done.bytes_read, done.bytes_written, done.idle_ctas) == (0, 4 * 4 * THREADS, 0)
    _, done = run("setp.lt.s32 %p1, %r1, 32; @%p1 bra $L1; bra.uni $L2; $L1: ld.global.b32 %r3, [%rd3]; $L2:")
    assert done.warp_instructions == 2 * (7 + 2) + 1 + 1 + 2  # then both branch, one loads, both return
    assert (done.bytes_read, done.idle_ctas) == (32 * 4, 1)


def on_ptx(target: str, *arguments: str) -> str:
    """The last lines of pytest on the PTX for the target, in a process of its own: triton is the interpreter here."""
    command = [sys.executable, "-m", "pytest", "--ptx", target, "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    ran = re.search(rf"PTX of {target}: (\d+) tests ran (\d+) kernels in (\d+) variants", done.stdout)
    assert ran is not None, done.stdout
    assert all(int(number) > 0 for number in ran.groups())
    return ran[0]


QUICK = {
    "test_gating.py": "error_at_most and dtype0",
    "test_norm.py": "error_at_most and dtype0",
    "test_rope.py": "reach_their_places and dtype1",
    "test_cross_entropy.py": "equal_the_definition and 11 and None",
    "test_attention.py": "error_at_most and dtype0",
    "test_arguments.py": "drawing_needs_no_gradients and triton",
}


def test_each_operation_on_the_ptx_of_sm_90() -> None:
    files = [f"tests/kernels/{name}" for name in QUICK]
    on_ptx("sm_90", *files, "-m", "not slow and not gpu", "-k", " or ".join(f"({each})" for each in QUICK.values()))


@pytest.mark.slow
def test_a_few_faults_in_the_kernels_are_caught() -> None:
    """That the machine sees what it is for: no quick test breaks a kernel. All faults: tests/kernels/faults.py."""
    for about in ("gating: no mask", "loss: a barrier", "norm: one row"):
        command = [sys.executable, "tests/kernels/faults.py", about]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found = re.search(r"caught on PTX: (\d+) of (\d+)", done.stdout)
        assert found is not None
        assert found[1] == found[2] != "0"
