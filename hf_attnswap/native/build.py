"""Build the library of CPU kernels beside this file with the system's C++ compiler; imports the standard library only.

Run by the build hook of the package (`hatch_build.py`) and by `python -m hf_attnswap.native`. Each source is compiled
once per instruction set and type of number, and linked into one library that needs neither torch nor OpenMP.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = HERE / "src"
LIBRARY = HERE / "kernels.so"

# Instruction sets from the fastest to the one that every processor of its kind has, with the compiler's flags.
_X86 = {
    "avx512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
    "avx2": ["-mavx2", "-mfma"],
    "plain": [],
}
KERNELS = ("delta", "linear", "row", "scores", "step", "window")
REALS = {"f32": "float", "f64": "double"}
# Without fast-math: NaN and inf go through as the definitions say.
FLAGS = "-O3 -std=c++17 -fPIC -fvisibility=hidden -fno-exceptions -ffp-contract=fast -Wall -Wno-psabi".split()

SANITIZERS = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


def instruction_sets() -> dict[str, list[str]]:
    """Return the instruction sets that are compiled on this machine, the fastest first, with the compiler's flags."""
    return _X86 if platform.machine().lower() in ("x86_64", "amd64") else {"plain": []}


def fingerprint() -> str:
    """Return a checksum of the sources and of this file: what the library must have been built from."""
    digest = hashlib.sha256()
    for path in sorted([*SOURCES.iterdir(), Path(__file__)]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def compiler() -> list[str] | None:
    """Return the command of the C++ compiler: that of CXX, or the first of c++, g++ and clang++ on the PATH."""
    given = shlex.split(os.environ.get("CXX", ""))
    if given:
        return given if shutil.which(given[0]) else None
    return next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def build(flags: Sequence[str] = ()) -> str | None:
    """Build the library, unless it is there and was built like this; return why it was not, in words, or None.

    It appears whole.

    Args:
        flags: more flags for the compiler.
    """
    if sys.platform == "win32":
        return "there are no CPU kernels for Windows"
    command = compiler()
    if command is None:
        return "no C++ compiler was found (CXX, c++, g++, clang++)"
    mark = " ".join([fingerprint(), *flags])
    if LIBRARY.exists() and f"{mark}\n".encode() in LIBRARY.read_bytes():
        return None
    more = [*FLAGS, *flags]
    with tempfile.TemporaryDirectory() as folder:
        jobs = {"threads": [*more, f'-DFINGERPRINT="{mark}\\n"', str(SOURCES / "threads.cpp")]}
        for name, own in instruction_sets().items():
            for suffix, real in REALS.items():
                given = [*more, *own, f"-DREAL={real}", f"-DTARGET={name}_{suffix}"]
                for kernel in KERNELS:
                    jobs[f"{kernel}_{name}_{suffix}"] = [*given, str(SOURCES / f"{kernel}.cpp")]
        objects = [f"{folder}/{name}.o" for name in jobs]
        commands = [[*command, *job, "-c", "-o", to] for job, to in zip(jobs.values(), objects, strict=True)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            runs = list(pool.map(_run, commands))
        runs.append(_run([*command, *flags, "-shared", "-pthread", "-o", f"{folder}/whole.so", *objects]))
        failed = next((run for run in runs if run.returncode), None)
        if failed is not None:
            return f"{shlex.join(failed.args)} failed:\n{failed.stderr.strip()}"
        appears = LIBRARY.with_suffix(f".{os.getpid()}.so")
        shutil.copy(f"{folder}/whole.so", appears)
        os.replace(appears, LIBRARY)
    return None


def _run(command: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True)
