"""What every recorded number needs beside it: device, versions, date and commit. Imported by the other scripts here.

python -c "import sys; sys.path.insert(0, 'bench'); from record import facts; print(facts())"
"""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import minem


def facts(*packages: str, device: str = "cpu") -> dict[str, str]:
    """Device, versions (of minem, torch, Python and the given packages, as far as they are there), date and commit."""
    versions = [f"minem {minem.__version__}", f"torch {torch.__version__}", f"Python {platform.python_version()}"]
    for package in packages:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    cpu = f"{processor()}, {torch.get_num_threads()} thread(s) on {os.cpu_count()} cores"
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "others at work": f"load average {os.getloadavg()[0]:.1f}",
        "versions": ", ".join(versions),
        "date": datetime.date.today().isoformat(),
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown",
    }


def processor() -> str:
    """The CPU's name as Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
