"""The device and the dtype that a run picks by itself: `python -m pytest tests/minem/test_device.py`."""

import pytest
import torch

from minem import device
from minem.device import SMALL, multiplies_bfloat16, pick_dtype


@pytest.mark.parametrize(
    ("flags", "known"),
    [
        ("flags : fpu avx512f avx512_bf16 sse", True),
        ("flags : fpu amx_bf16 amx_tile", True),
        ("Features : fp asimd bf16 i8mm", True),
        ("flags : fpu avx512f avx512_vnni", False),
        ("", False),
    ],
)
def test_a_cpu_multiplies_bfloat16_if_its_flags_have_it(tmp_path, flags, known):
    (tmp_path / "cpuinfo").write_text(flags)
    assert multiplies_bfloat16(tmp_path / "cpuinfo") == known
    assert not multiplies_bfloat16(tmp_path / "none")


def test_auto_is_bfloat16_where_the_hardware_has_it_and_the_model_is_no_toy(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for hardware in (False, True):
        monkeypatch.setattr(device, "multiplies_bfloat16", lambda hardware=hardware: hardware)
        assert pick_dtype("auto", cpu, SMALL) == (torch.bfloat16 if hardware else torch.float32)
        assert pick_dtype("auto", cpu, SMALL - 1) == torch.float32
        assert pick_dtype("auto", gpu, 1) == torch.bfloat16
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
            assert pick_dtype(name, cpu, SMALL) == pick_dtype(name, gpu, 1) == dtype
