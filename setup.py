"""Compiles the CPU kernels, once for each kind of vectors. Everything else is in pyproject.toml."""

import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("modeling_videomamba/csrc")
FLAGS = ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=fast"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math"]
AVX512 = ["-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
SCAN, PRODUCT = ["causal_conv1d.cpp", "residual_stream.cpp", "selective_scan.cpp"], ["matrix_product.cpp"]
VARIANTS = {"baseline": (SCAN, [])}  # SSE2, NEON
if platform.machine().lower() in ("x86_64", "amd64"):
    VARIANTS["avx2"] = (SCAN, ["-mavx2", "-mfma"])
    VARIANTS["avx512"] = (SCAN, AVX512)
    if platform.system() == "Linux":  # which has to be asked for the matrix units
        VARIANTS["amx"] = (PRODUCT, [*AVX512, "-mamx-tile", "-mamx-bf16"])


class BuildKernel(build_ext):
    """A variant that can't be compiled is left out: the package runs without it."""

    def run(self) -> None:
        self.failures: dict[str, Exception] = {}
        super().run()
        if len(self.failures) == len(self.extensions):
            self.warn(
                "modeling-videomamba is installed WITHOUT its CPU kernel, which needs GCC or Clang with C++20: "
                "scans on a CPU run in PyTorch, many times slower. "
                f"The first error: {next(iter(self.failures.values()))}"
            )

    def build_extension(self, ext: Extension) -> None:
        build_temp = self.build_temp
        self.build_temp = str(Path(build_temp) / ext.name)  # the same sources with other flags
        try:
            super().build_extension(ext)
        except Exception as error:
            self.failures[ext.name] = error
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)  # of an earlier build
        finally:
            self.build_temp = build_temp


setup(
    ext_modules=[
        Extension(
            f"modeling_videomamba._cpu_{name}",
            sources=[str(CSRC / source) for source in sources],
            depends=[str(path) for path in sorted(CSRC.glob("*.h"))],
            extra_compile_args=[*FLAGS, *flags],
            language="c++",
            optional=True,
            py_limited_api=True,  # nothing of Python is used: one wheel serves all versions
        )
        for name, (sources, flags) in VARIANTS.items()
    ],
    cmdclass={"build_ext": BuildKernel},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
