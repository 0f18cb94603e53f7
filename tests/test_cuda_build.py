"""Every csrc/*.cu compiles for sm_80 and sm_90 with warnings as errors, links against this torch, and spills no register."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "csrc").glob("*.cu"))
ARCHS = (80, 90)
TORCH = Path(torch.__file__).parent
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"


def find_nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which(str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc"))


def find_cuobjdump() -> str | None:
    """The toolkit's, else the one in triton's wheel."""
    nvcc = find_nvcc()
    places = [] if nvcc is None else [Path(nvcc).resolve().parent]
    spec = importlib.util.find_spec("triton")
    places += [] if spec is None or spec.origin is None else [Path(spec.origin).parent / "backends" / "nvidia" / "bin"]
    return next((found for place in places if (found := shutil.which(str(place / "cuobjdump")))), None)


NVCC = find_nvcc()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed (looked on PATH and in CUDA_HOME)")


def call(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}{result.stderr}"
    return result.stdout


def compile_source(source: Path, folder: Path) -> Path:
    """Device code is compiled as setup.py does; -O1 is for the launchers, which only the host's compiler sees."""
    assert NVCC is not None
    output = folder / f"{source.stem}.o"
    flags = ["-O1", "-std=c++17", "-DUSE_CUDA", STABLE_ABI, "-isystem", str(TORCH / "include")]
    assert not re.search(r"__CUDA_ARCH__ *[<>=]", source.read_text())  # no code for one architecture, so one PTX serves them all
    flags += [f"-gencode=arch=compute_{min(ARCHS)},code=[{','.join(f'sm_{arch}' for arch in ARCHS)}]"]
    flags += ["-Werror", "all-warnings", "-Xcompiler", "-fPIC,-Wall,-Wextra,-Werror"]
    call(NVCC, *flags, "-c", str(source), "-o", str(output))
    return output


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, start = tmp_path_factory.mktemp("cuda"), time.perf_counter()
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        built = list(pool.map(lambda source: compile_source(source, folder), SOURCES))
    print(f"nvcc: {len(built)} files for {len(ARCHS)} architectures in {time.perf_counter() - start:.1f} s")
    return built


@needs_nvcc
def test_every_cuda_source_compiles_and_links(objects: list[Path], tmp_path: Path) -> None:
    assert NVCC is not None
    assert {source.stem for source in SOURCES} >= {"linear_lrelu", "gan_loss"}
    library = tmp_path / "_cuda.so"
    call(NVCC, "-shared", "-o", str(library), *map(str, objects), "-L", str(TORCH / "lib"), "-ltorch", "-ltorch_cpu", "-lc10")
    symbols = call("nm", "-D", "--undefined-only", str(library))
    assert "aoti_torch_get_current_cuda_stream" in symbols
    classic = [line for line in symbols.splitlines() if re.search(r"_ZN(K?)(2at|3c10|5torch)", line)]
    assert not classic, f"only the stable ABI is to be used, got {classic}"


@needs_nvcc
@pytest.mark.skipif(find_cuobjdump() is None, reason="cuobjdump is in neither the CUDA toolkit nor triton's wheel")
def test_no_kernel_spills(objects: list[Path]) -> None:
    cuobjdump = find_cuobjdump()
    assert cuobjdump is not None
    for built in objects:
        usage = call(cuobjdump, "--dump-resource-usage", str(built))
        kernels = re.findall(r"Function (\S+):\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
        assert kernels
        assert usage.count("Function ") == len(kernels)
        assert {int(arch) for arch in re.findall(r"arch = sm_(\d+)", usage)} == set(ARCHS)
        for name, registers, stack, shared, local in kernels:
            assert int(stack) == int(local) == 0, (
                f"{built.name}: {name} must not spill, got {stack} bytes of stack, {local} of local memory"
            )
            assert int(registers) <= 128, f"{built.name}: {name} must leave registers for 512 threads a block, got {registers}"
            assert int(shared) <= 48 * 1024, f"{built.name}: {name} must fit in 48 KiB of shared memory, got {shared}"
