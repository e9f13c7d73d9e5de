"""Builds the CPU kernels where there is a compiler for them; without one, the package is pure Python and complete.

Everything else about the package stands in pyproject.toml. `SEQUENCER2D_NO_NATIVE=1` leaves the kernels out.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

KERNELS = "src/sequencer2d/native/kernels"
NAME = "sequencer2d.native._kernels"
FLAGS = ["-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-Wall", "-Wextra"]
AVX512 = ["-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
INSTRUCTION_SETS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16", "-mavx512vnni"],
}
"""Files that are left out where the compiler, or the processor it compiles for, does not know their flags."""


class BuildKernels(build_ext):
    """Compiles each instruction set with flags of its own; a failure is one line, not the end."""

    built = False

    def run(self) -> None:
        if os.environ.get("SEQUENCER2D_NO_NATIVE"):
            print("sequencer2d: without CPU kernels, as SEQUENCER2D_NO_NATIVE says")
            return
        try:
            super().run()
        except Exception as error:  # no compiler, or one that cannot: whatever it was, the package installs
            print(f"sequencer2d: without CPU kernels, PyTorch's LSTMs run instead ({' '.join(str(error).split())})")
            self.extensions.clear()

    def build_extension(self, ext: Extension) -> None:
        if self.compiler.compiler_type != "unix":
            raise RuntimeError(f"no flags are known for compilers of type {self.compiler.compiler_type}")
        known = {name: flags for name, flags in INSTRUCTION_SETS.items() if self._compiles(flags)}
        defines: list[Any] = [(f"SEQUENCER2D_HAS_{name.upper()}", "1") for name in known]
        objects = []
        for source in ext.sources:
            flags = known.get(Path(source).stem)
            if flags is not None or Path(source).stem not in INSTRUCTION_SETS:
                arguments = [*FLAGS, *(flags or [])]
                objects += self.compiler.compile(
                    [source], self.build_temp, defines, extra_postargs=arguments, depends=ext.depends
                )
        self.compiler.link_shared_object(objects, self.get_ext_fullpath(ext.name))
        BuildKernels.built = True

    def _compiles(self, flags: list[str]) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "nothing.cpp")
            source.write_text("#include <immintrin.h>\nint nothing;\n")
            try:
                self.compiler.compile([str(source)], folder, extra_postargs=flags)
            except Exception:
                return False
            return True

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))  # not a Python module: ctypes loads it

    def get_outputs(self) -> list[str]:
        return super().get_outputs() if BuildKernels.built else []


class PlatformWheel(bdist_wheel):
    """A wheel with kernels fits one platform and every Python; one without fits everything."""

    def run(self) -> None:
        self.run_command("build_ext")  # first, because whether it succeeds is in the wheel's name
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        platform = super().get_tag()[2] if BuildKernels.built else "any"
        return "py3", "none", platform


setup(
    ext_modules=[
        Extension(
            NAME,
            sources=sorted(str(path) for path in Path(KERNELS).glob("*.cpp")),
            depends=sorted(str(path) for path in Path(KERNELS).glob("*.h")),
        )
    ],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)
