"""Builds fastcircuit._C with ninja: one object per source and instruction set, in parallel, only what changed."""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
NOTE = "build_note.txt"
COMMON = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", "-Wno-psabi"]
VARIANTS = {"portable": (16, []), "avx2": (32, ["-mavx2", "-mfma"])}
VARIANTS["avx512"] = (64, ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"])
# What not every compiler knows: bfloat16 products, their sources and flags by instruction set.
BF16 = {"avx512_bf16": (["masked_read_bf16", "peak_bf16"], [*VARIANTS["avx512"][1], "-mavx512bf16"])}
BF16["amx"] = (["masked_read_amx"], [*BF16["avx512_bf16"][1], "-mamx-tile", "-mamx-bf16"])
BF16["amx"][1].extend(["-Wno-uninitialized", "-Wno-maybe-uninitialized"])  # GCC 12 warns of its own intrinsics


def compiler() -> list[str]:
    """The C++ compiler: $CXX, or the first one on the path."""
    found = next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), "c++")
    return shlex.split(os.environ.get("CXX") or found)


def compiles(cxx: list[str], flags: list[str], work: Path) -> str | None:
    """Why the compiler cannot build a small shared library with these flags, or None if it can."""
    source = work / "probe.cpp"
    source.write_text("#include <vector>\nint probe() { return (int)std::vector<int>(1).size(); }\n")
    command = [*cxx, *COMMON, *flags, "-shared", str(source), "-o", str(work / "probe.so")]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        return f"no C++ compiler: {error}"
    return None if done.returncode == 0 else f"{shlex.join(command)} failed: {done.stderr.strip()[-500:]}"


def ninja_rules(cxx: list[str], openmp: list[str], bf16: list[str], target: Path) -> str:
    """The build.ninja text: kernels once per instruction set, the rest once, one link."""
    import pybind11

    link = ["-shared"] if sys.platform != "darwin" else ["-bundle", "-undefined", "dynamic_lookup"]
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    variants = VARIANTS if x86 else {"portable": VARIANTS["portable"]}
    include = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    jobs = {"bindings": ("bindings", include)}
    for op in ("masked_read", "norm", "norm_projection", "packed_attention", "mlp", "peak"):
        jobs[op] = (op, [])
        for name, (size, flags) in variants.items():
            jobs[f"{op}_{name}"] = (f"{op}_kernels", [f"-DFC_ISA={name}", f"-DFC_VECTOR_BYTES={size}", *flags])
    for name in bf16:
        sources, flags = BF16[name]
        jobs.update({s: (s, [f"-DFC_ISA={name}", "-DFC_VECTOR_BYTES=64", *flags]) for s in sources})
    shared = [*COMMON, *openmp, *(["-DFC_X86_VARIANTS"] if x86 else []), *(f"-DFC_{name.upper()}" for name in bf16)]
    lines = ["ninja_required_version = 1.5"]
    lines += [f"rule cc\n  command = {shlex.join([*cxx, *shared])} $flags -MMD -MF $out.d -c $in -o $out"]
    lines[-1] += "\n  depfile = $out.d\n  deps = gcc"
    lines += [f"rule link\n  command = {shlex.join([*cxx, *link])} $in {shlex.join(openmp)} -o $out"]
    for job, (source, flags) in jobs.items():
        path = str(ROOT / "csrc" / f"{source}.cpp").replace(":", "$:").replace(" ", "$ ")
        lines += [f"build {job}.o: cc {path}\n  flags = {shlex.join(flags)}"]
    output = str(target).replace(":", "$:").replace(" ", "$ ")
    return "\n".join([*lines, f"build {output}: link {' '.join(f'{job}.o' for job in jobs)}", ""])


def ninja_fails(work: Path) -> str | None:
    """Why ninja cannot build what is in ``work``, or None if it can; its output is printed."""
    import ninja

    command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(work)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, end="", flush=True)
    if done.returncode == 0:
        return None
    error = next((line.strip() for line in done.stdout.splitlines() if "error:" in line), done.stdout.strip()[-500:])
    return f"building it failed: {error} (it needs Python's headers, and on x86 a compiler that knows AVX-512)"


class NinjaBuild(build_ext):
    """The extension is optional: where it cannot be built the package installs, and a note says what is missing."""

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        work = Path(self.build_temp).resolve() / extension.name
        work.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        cxx = compiler()
        note = failure = compiles(cxx, [], work)
        if failure is None:
            missing_openmp = compiles(cxx, ["-fopenmp"], work)
            openmp = [] if missing_openmp else ["-fopenmp"]
            bf16 = [name for name, (_, flags) in BF16.items() if compiles(cxx, flags, work) is None]
            if sys.platform != "linux" and "amx" in bf16:  # whose kernel is asked for them
                bf16.remove("amx")
            (work / "build.ninja").write_text(ninja_rules(cxx, openmp, bf16, target))
            failure = ninja_fails(work)
            note = failure or (f"no OpenMP, so one thread only: {missing_openmp}" if missing_openmp else "")
        if failure is not None:
            target.unlink(missing_ok=True)
        (target.parent / NOTE).write_text(note)
        self.announce(f"fastcircuit: {note or 'native kernels built'}", level=2)

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        for name in (self.get_ext_filename(extension.name) for extension in self.extensions):
            if not (Path(self.build_lib) / name).exists():
                (ROOT / name).unlink(missing_ok=True)  # of an earlier build, whose kernels these are no longer
        shutil.copy(Path(self.build_lib) / "fastcircuit" / NOTE, ROOT / "fastcircuit" / NOTE)

    def get_outputs(self) -> list[str]:
        built = [Path(self.get_ext_fullpath(e.name)) for e in self.extensions]
        return [str(p) for b in built for p in (b, b.with_name(NOTE)) if p.exists()]


setup(
    # kernels/ has no __init__.py on purpose: a package named "kernels" on the path would break transformers.
    packages=[*find_packages(include=["fastcircuit*"]), "fastcircuit_kernels"],
    package_dir={"fastcircuit_kernels": "kernels"},
    ext_modules=[Extension("fastcircuit._C", sources=[], optional=True)],
    cmdclass={"build_ext": NinjaBuild},
)
