"""Builds gankern._C (C++ for the CPU) and, where nvcc and a CUDA build of torch are found, gankern/_cuda.so.

Without a C++ compiler, or without torch at build time, it installs pure Python and Triton, and says so. Environment:
    GANKERN_BUILD=auto|require|skip     require: fail where the C++ library cannot be built; skip: do not try
    GANKERN_CUDA_ARCHS="80;90"          CUDA architectures; default: those of the GPUs found, else 80;90
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CSRC = Path("csrc")
DEFINES = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]  # the stable ABI of torch 2.10: one binary for every later torch


def cxx() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which(str(Path(home) / "bin" / "nvcc"))


def cuda_archs() -> list[str]:
    listed = os.environ.get("GANKERN_CUDA_ARCHS")
    if listed:
        return listed.replace(",", ";").split(";")
    import torch

    found = {f"{major}{minor}" for major, minor in map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))}
    return sorted(found) or ["80", "90"]


def torch_paths() -> tuple[Path, Path]:
    import torch

    root = Path(torch.__file__).parent
    return root / "include", root / "lib"


def run(command: list[str]) -> None:
    print(" ".join(command), flush=True)
    subprocess.run(command, check=True)


def build_cuda_library(output: Path, work: Path, archs: list[str]) -> None:
    """Compile every csrc/*.cu and link them into one library that torch.ops.load_library can load. Needs no GPU."""
    compiler = nvcc()
    assert compiler is not None
    include, lib = torch_paths()
    work.mkdir(parents=True, exist_ok=True)
    flags = ["-O3", "-std=c++17", "-DUSE_CUDA", *DEFINES, "-isystem", str(include)]
    flags += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs] + [
        "-Werror",
        "all-warnings",
        "-Xcompiler",
        "-fPIC,-Wall,-Wextra",
    ]
    sources = sorted(CSRC.glob("*.cu"))
    objects = [work / f"{s.stem}.o" for s in sources]
    newest_header = max(h.stat().st_mtime for h in CSRC.glob("*.h"))
    stale = [
        (s, o)
        for s, o in zip(sources, objects, strict=True)
        if not o.exists() or o.stat().st_mtime < max(s.stat().st_mtime, newest_header)
    ]
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        list(pool.map(lambda pair: run([compiler, *flags, "-c", str(pair[0]), "-o", str(pair[1])]), stale))
    libraries = ["-L", str(lib), "-ltorch", "-ltorch_cpu", "-lc10"]
    if (lib / "libtorch_cuda.so").exists():
        libraries += ["-ltorch_cuda", "-lc10_cuda"]
    run([compiler, "-shared", "-cudart", "shared", "-o", str(output), *map(str, objects), *libraries])


class Build(build_ext):
    """build_ext that treats the compiler as optional, and builds the CUDA library beside the extension."""

    def run(self) -> None:
        mode = os.environ.get("GANKERN_BUILD", "auto")
        missing = self._missing()
        if mode == "skip" or (missing and mode != "require"):
            reason = missing or "GANKERN_BUILD=skip"
            print(
                f"gankern: installing without compiled ops ({reason}): plain PyTorch and Triton remain.",
                file=sys.stderr,
                flush=True,
            )
            self.extensions = []
            return
        if missing:
            raise SystemExit(f"gankern: GANKERN_BUILD=require, but {missing}")
        self._configure()
        super().run()
        import torch

        if torch.version.cuda is not None and nvcc() is not None:
            target = Path(self.get_ext_fullpath("gankern._C")).with_name("_cuda.so")
            build_cuda_library(target, Path(self.build_temp) / "cuda", cuda_archs())

    def _missing(self) -> str:
        if cxx() is None:
            return "no C++ compiler was found: install g++ or clang++"
        if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
            return "Python.h was not found: install the headers of this Python (Debian: python3-dev)"
        for module in ("torch", "pybind11"):
            if importlib.util.find_spec(module) is None:
                return f"{module} is not importable while building: install it first and use pip install --no-build-isolation"
        return ""

    def _configure(self) -> None:
        import pybind11
        import torch
        from pybind11.setup_helpers import ParallelCompile

        ParallelCompile("GANKERN_BUILD_JOBS").install()  # a file a core; GANKERN_BUILD_JOBS=1 where memory is short
        include, lib = torch_paths()
        archs = ";".join(cuda_archs()) if torch.version.cuda is not None and nvcc() is not None else ""
        (extension,) = self.extensions
        extension.library_dirs += [str(lib)]
        extension.libraries += ["torch", "torch_cpu", "c10"]
        extension.extra_compile_args += [
            "-O3",
            "-std=c++17",
            "-Wall",
            "-Wextra",
            "-Wconversion",  # an index of 64 bits that lands in 32
            "-Wno-sign-conversion",
            "-Wno-float-conversion",
            "-Werror",
            "-fno-math-errno",
            "-fno-trapping-math",
            *DEFINES,
        ]
        # Python's own flags bring -fwrapv, which keeps gcc from vectorising the loss (4 times slower)
        extension.extra_compile_args += ["-fno-wrapv"]
        extension.extra_compile_args += ["-isystem", str(include), "-isystem", pybind11.get_include(), "-fvisibility=hidden", "-g0"]
        extension.define_macros += [("GK_BUILT_WITH_TORCH", f'"{torch.__version__}"'), ("GK_CUDA_ARCH_LIST", f'"{archs}"')]
        extension.extra_compile_args += os.environ.get("GANKERN_CXXFLAGS", "").split()


if __name__ == "__main__":
    os.chdir(ROOT)
    sources = sorted(map(str, CSRC.glob("*.cpp")))
    headers = sorted(map(str, CSRC.glob("*.h")))
    setup(ext_modules=[Extension("gankern._C", sources, depends=headers, language="c++")], cmdclass={"build_ext": Build})
