"""``python -m bench.triton_aot``: compile every Triton configuration ahead of time, for GPUs that need not be here.

The launchers run on meta tensors of real shapes; what they would launch is recorded and compiled. The table
``bench/results/triton_aot.csv`` holds registers, spilled bytes and shared memory of each, and a digest of the source
that was compiled, so that a test notices when it is out of date. Rows of the same source, compiler and launch are kept
as they are; ``--all`` compiles those again too.
"""

import ast
import csv
import functools
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from bench.cases import triton_launches

TABLE = Path(__file__).parent / "results" / "triton_aot.csv"
KERNELS = Path(__file__).parents[1] / "kernels"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory one program may have.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
# What a row is of.
ABOUT = ("arch", "launch", "source", "triton")
# The kernels leave fusing a product and a sum to the compiler, as Triton does by default up to 3.9.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


class Launch(NamedTuple):
    """One kernel with the types, constants and options it is launched with."""

    kernel: JITFunction
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int], list]
    options: dict[str, int]

    @property
    def name(self) -> str:
        """Kernel and what distinguishes its configurations."""
        params = self.kernel.params
        told = [f"{p.name}={self.constants[p.name]}" for p in params if p.is_constexpr]
        types = sorted({t for t in self.signature.values() if t.startswith("*")} - {"*i32"})
        options = [f"{name}={value}" for name, value in self.options.items()]
        return " ".join([self.kernel.__name__, "/".join(types), *told, *options])


@contextmanager
def recorded(launches: list[Launch], hip: bool) -> Iterator[None]:
    """Record launches instead of making them."""

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(_specialise(kernel, args, kwargs))

    with mock.patch.object(JITFunction, "run", run), mock.patch.object(torch.version, "hip", "6" if hip else None):
        yield


def _specialise(kernel: JITFunction, args: tuple, kwargs: dict[str, Any]) -> Launch:
    """Types as Triton derives them: 1 and None are constants, addresses and multiples of 16 are aligned."""
    values = dict(zip(kernel.arg_names, args, strict=False))
    values.update({name: value for name, value in kwargs.items() if name in kernel.arg_names})
    launch = Launch(kernel, {}, {}, {}, {k: v for k, v in kwargs.items() if k not in kernel.arg_names})
    for place, param in enumerate(kernel.params):
        value = values[param.name]
        if param.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            launch.signature[param.name] = "constexpr"
            launch.constants[param.name] = value
            continue
        if isinstance(value, torch.Tensor):
            launch.signature[param.name] = "*" + triton.runtime.jit.type_canonicalisation_dict[str(value.dtype)[6:]]
        elif isinstance(value, float):
            launch.signature[param.name] = "fp32"
        else:
            launch.signature[param.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            launch.attributes[(place,)] = [["tt.divisibility", 16]]
    return launch


def all_launches(arch: str, calls: dict[str, Callable[[], Any]] | None = None) -> dict[str, Launch]:
    """Every configuration ``arch`` can be asked for, by name, in the order of the cases."""
    hip, found = arch.startswith("gfx"), []
    for call in (calls or triton_launches.calls(hip)).values():
        with recorded(found, hip):
            call()
    return {launch.name: launch for launch in found}


def compile_for(launch: Launch, arch: str) -> Any:
    """The compiled kernel, with its intermediate forms in ``asm``."""
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    return triton.compile(source, target=TARGETS[arch], options=launch.options)


def usage(compiled: Any) -> dict[str, Any]:
    """Registers per thread, spilled bytes per thread (words on AMD), shared memory per program, what multiplies."""
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        registers, spills = (int(re.search(rf"\.vgpr_{n}:\s+(\d+)", text)[1]) for n in ("count", "spill_count"))
        units = "mfma" if "v_mfma" in text else "vector"
    else:
        registers, spills = _resources(compiled.asm["cubin"])
        ptx = compiled.asm["ptx"]
        units = next((name for name in ("tcgen05.mma", "wgmma", "mma.sync") if name in ptx), "vector")
    return {"registers": registers, "spills": spills, "shared": compiled.metadata.shared, "units": units}


def _resources(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return int(found[1]), int(found[2])


def digest(kernel: JITFunction) -> str:
    """Of the device code of the kernel's file and of what all kernels share; comments and docstrings do not count."""
    files = [KERNELS / "dot.py", Path(kernel.fn.__code__.co_filename)]
    return hashlib.sha256("".join(_code(file) for file in files).encode()).hexdigest()[:12]


@functools.cache
def _code(file: Path) -> str:
    functions = [node for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)]
    compiled = [node for node in functions if "triton.jit" in map(ast.unparse, node.decorator_list)]
    for node in compiled:
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return "\n".join(map(ast.unparse, compiled))


def row(launch: Launch, arch: str) -> dict[str, str]:
    """A row of the table, as the file holds it."""
    about = {"source": digest(launch.kernel), "triton": triton.__version__}
    return {key: str(value) for key, value in {"arch": arch, "launch": launch.name, **about}.items()}


def table() -> list[dict[str, str]]:
    """The committed rows."""
    with TABLE.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def main() -> None:
    rows = []
    kept = {} if "--all" in sys.argv[1:] else {tuple(map(known.get, ABOUT)): known for known in table()}
    for arch in TARGETS:
        launches = all_launches(arch)
        for place, launch in enumerate(launches.values(), 1):
            about = row(launch, arch)
            known = kept.get(tuple(map(about.get, ABOUT)))
            rows.append(known or {**about, **usage(compile_for(launch, arch))})
            print(f"{arch} {place}/{len(launches)} {rows[-1]}", file=sys.stderr)
    with TABLE.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
