"""Builds the C++ core, `mtserve._core`, with the compiler alone: no CMake. Ships the CUDA sources as text."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

SOURCES = sorted(path.as_posix() for path in Path("csrc").glob("*/*.cpp"))
HEADERS = sorted(path.as_posix() for path in Path("csrc").glob("**/*.h"))
# Compiled where they run; a checkout reads them in place, a wheel carries them inside the package.
CUDA_SOURCES = sorted(path.as_posix() for path in Path("csrc/cuda").glob("*.cu*"))
CUDA_TARGET = Path("mtserve/kernels/cuda/src")
FLAGS = ["-std=c++17", "-O3", "-fvisibility=hidden", "-ffunction-sections", "-fdata-sections", "-DNDEBUG"]
OUR_FLAGS = ["-Wall", "-Wextra"]
BINDING_FLAGS = ["-fno-strict-aliasing", "-DNB_COMPACT_ASSERTIONS"]
LINK_FLAGS = ["-Wl,--gc-sections", "-Wl,-s"] if os.uname().sysname == "Linux" else []


class BuildPackage(build_py):
    """Adds the CUDA sources to what a wheel contains."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for source, target in zip(CUDA_SOURCES, self._cuda_targets(), strict=True):
                self.mkpath(str(Path(target).parent))
                self.copy_file(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), *(() if self.editable_mode else self._cuda_targets())]

    def _cuda_targets(self) -> list[str]:
        return [str(Path(self.build_lib) / CUDA_TARGET / Path(source).name) for source in CUDA_SOURCES]


class BuildCore(build_ext):
    """Compiles our sources and nanobind's one, in parallel, skipping what is newer than its inputs."""

    def build_extension(self, ext: Extension) -> None:
        import nanobind

        package = Path(nanobind.include_dir()).parent
        includes = [nanobind.include_dir(), str(package / "ext" / "robin_map" / "include")]
        binding = Path(nanobind.source_dir()) / "nb_combined.cpp"
        newest_header = max(Path(path).stat().st_mtime for path in (*HEADERS, __file__))

        def compile_one(source: str) -> str:
            ours = source in ext.sources
            flags = FLAGS + (OUR_FLAGS if ours else BINDING_FLAGS)
            return self._object(source, includes, flags, newest_header if ours else binding.stat().st_mtime)

        sources = [str(binding), *ext.sources]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, sources))
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(ext.name), extra_postargs=LINK_FLAGS, target_lang="c++"
        )

    def _object(self, source: str, includes: list[str], flags: list[str], newest_input: float) -> str:
        compiler: Any = self.compiler
        (target,) = compiler.object_filenames([source], output_dir=self.build_temp)
        built = Path(target)
        if self.force or not built.exists() or built.stat().st_mtime < max(newest_input, Path(source).stat().st_mtime):
            compiler.compile([source], output_dir=self.build_temp, include_dirs=includes, extra_preargs=flags)
        return str(target)


setup(
    ext_modules=[Extension("mtserve._core", SOURCES, depends=[*HEADERS, *CUDA_SOURCES], language="c++")],
    cmdclass={"build_ext": BuildCore, "build_py": BuildPackage},
)
