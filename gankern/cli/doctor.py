"""gankern doctor: versions, devices, what is built, and which backend each op would run on and why."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

import gankern
from gankern import backend
from gankern.cli.common import Parser, refusing
from gankern.cli.probes import PROBES


def command(arguments: list[str]) -> int:
    """Prints the report; 1 if something is built but broken, else 0."""
    description = "Versions, devices, what is built, and what each op would run on and why."
    Parser("gankern doctor", description=description, epilog="Exit status 1: something is built but broken.").parse_args(arguments)
    with refusing():
        forced = backend.forced()
    broken = [
        f"{what}: {why}"
        for what, why in (("C++ for the CPU", backend.CPU_PROBLEM), ("CUDA", backend.CUDA_PROBLEM))
        if "broken" in why
    ]
    print("versions")
    print(f"  gankern {gankern.__version__}, python {platform.python_version()}, torch {torch.__version__}")
    for name in ("triton", "numpy", "tyro", "rich", "pillow", "safetensors", "tensorboard", "matplotlib"):
        print(f"  {name:<12} {_version(name)}")
    print("\ndevices")
    print(f"  cpu          {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, {platform.machine()}")
    devices = [torch.device("cpu")]
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        p = torch.cuda.get_device_properties(i)
        print(f"  cuda:{i:<7} {p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB")
        devices.append(torch.device("cuda", i))
    if len(devices) == 1:
        print(f"  cuda         none (torch is built for CUDA: {torch.version.cuda or 'no'})")
    print("\nbuilt")
    print(f"  C++ for CPU  {backend.CPU_PROBLEM or _build_facts()}")
    library = backend.cuda_library()
    print(f"  CUDA         {backend.CUDA_PROBLEM or (library.name if library else '')}")
    print(f"  Triton       {backend.triton_problem('cuda' if len(devices) > 1 else 'cpu') or _triton_facts()}")
    print(f"  forced       {forced or 'nothing (GANKERN_BACKEND and use_backend are unset)'}")
    for device in devices:
        print(f"\nops on {device}")
        for name in backend.NAMES:
            if why := backend.problem(name, device.type):
                print(f"  ({name} cannot run here: {why})")
        for op, name, why in backends(device):
            print(f"  {op:<22} {name}: {why}")
        broken += check(device)
    for line in broken:
        print(f"\nbroken: {line}")
    print("\n" + ("something is built but broken" if broken else "all that is built works"))
    return 1 if broken else 0


def backends(device: torch.device) -> list[tuple[str, str, str]]:
    """(op, what it runs on, why)."""
    forced = backend.forced()
    if forced is not None:
        why = backend.problem(forced, device.type)
        return [(op, forced, f"but it cannot run: {why}" if why else "forced") for op, probe in PROBES.items() if probe.run]
    reasons = {
        "reference": "plain PyTorch calls, measured as the fastest",
        "torch": "the automatic choice: one pass of plain PyTorch calls",
    }
    chosen = {op: probe.chosen(device) for op, probe in PROBES.items()}
    return [(op, name, reasons.get(name, "the automatic choice")) for op, name in chosen.items()]


def check(device: torch.device) -> list[str]:
    """Run every op and its gradient on each backend that can run here, against the reference; returns what is wrong, in words."""
    wrong = []
    for name in backend.NAMES[1:]:
        if backend.problem(name, device.type):
            continue
        for op, probe in PROBES.items():
            if probe.run is None:
                continue
            try:
                with gankern.use_backend(name):
                    got = probe.run(device)
                with gankern.use_backend("reference"):
                    want = probe.run(device)
                if not all(torch.allclose(a, b, rtol=1e-2, atol=1e-3) for a, b in zip(got, want, strict=True)):
                    wrong.append(f"{op} on {device} with backend {name} differs from the reference")
            except Exception as error:  # whatever a broken build raises is the finding
                wrong.append(f"{op} on {device} with backend {name}: {type(error).__name__}: {' '.join(str(error).split())}")
    return wrong


def _build_facts() -> str:
    from gankern import _C

    target = int(_C.torch_target_version, 16)  # 0x020a000000000000 is 2.10
    abi, arches = f"{target >> 56}.{target >> 48 & 255}", _C.cuda_arch_list or "none"
    return f"{_C.compiler}, built with torch {_C.built_with_torch}, stable ABI of torch {abi}, CUDA arch list: {arches}"


def _triton_facts() -> str:
    return (
        "kernels run under its interpreter (TRITON_INTERPRET)" if backend.triton_interpreted() else "compiles kernels at first use"
    )


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
