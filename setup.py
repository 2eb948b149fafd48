"""Builds the C++ core of the cache, `mtserve._core`, with the compiler alone: no CMake."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = sorted(path.as_posix() for path in Path("csrc/cache").glob("*.cpp"))
HEADERS = sorted(path.as_posix() for path in Path("csrc/cache").glob("*.h"))
FLAGS = ["-std=c++17", "-O3", "-fvisibility=hidden", "-ffunction-sections", "-fdata-sections", "-DNDEBUG"]
OUR_FLAGS = ["-Wall", "-Wextra"]
BINDING_FLAGS = ["-fno-strict-aliasing", "-DNB_COMPACT_ASSERTIONS"]
LINK_FLAGS = ["-Wl,--gc-sections", "-Wl,-s"] if os.uname().sysname == "Linux" else []


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
    ext_modules=[Extension("mtserve._core", SOURCES, depends=HEADERS, language="c++")],
    cmdclass={"build_ext": BuildCore},
)
