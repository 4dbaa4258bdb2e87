"""nvcc and the architectures that it compiles for; setup.py asks here."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

CUDA_ARCHS = "7.5;8.0;9.0;10.0;12.0+PTX"  # those of them that nvcc knows; 8.0 runs on 8.x too


def stop(reason: str):
    sys.exit(f"LORA_MOE_BUILD_CUDA=1: {reason}")


def find_nvcc() -> Path:
    """nvcc of CUDA_HOME or of the PATH, as the file in its toolkit."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if found is None:
        stop(f"no nvcc in {home + '/bin' if home else 'PATH'}; set CUDA_HOME to a CUDA toolkit")
    said = subprocess.run(
        [found, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True
    )
    top = re.search(r"^#\$ TOP=(.*)$", said.stderr, re.M)  # `found` may be a script elsewhere
    return Path(top[1]).resolve() / "bin/nvcc" if top else Path(found).resolve()


def release(nvcc: Path) -> str:
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    return re.search(r"release (\d+\.\d+)", said)[1]


def archs(nvcc: Path) -> list[str]:
    """Names such as 8.0 or 9.0+PTX, a bad one refused."""
    said = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    known = set(re.findall(r"compute_(\w+)", said))
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    wanted = [a for a in re.split("[; ]+", asked or CUDA_ARCHS) if a]
    for arch in wanted if asked else ():
        if not re.fullmatch(r"\d+\.\d[a-z]?(\+PTX)?", arch) or arch_number(arch) not in known:
            stop(f"TORCH_CUDA_ARCH_LIST: nvcc {release(nvcc)} has no architecture {arch!r}")
    return [a for a in wanted if arch_number(a) in known]


def arch_number(arch: str) -> str:
    return arch.removesuffix("+PTX").replace(".", "")


def code_flags(arch: str) -> list[str]:
    number = arch_number(arch)
    ptx = [f"-gencode=arch=compute_{number},code=compute_{number}"]
    return [
        f"-gencode=arch=compute_{number},code=sm_{number}",
        *(ptx if arch.endswith("+PTX") else []),
    ]
