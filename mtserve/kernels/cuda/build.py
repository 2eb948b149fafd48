"""From a CUDA text to a cubin: by nvcc where there is one, else by NVRTC through CuPy; kept in the user's cache.

The cache is `$XDG_CACHE_HOME/mtserve/cubin` (`~/.cache/mtserve/cubin`): one file a (text, options, compiler).
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from mtserve.errors import FailedPrecondition

ARCH = "sm_90a"
TIMEOUT_S = 300
_OPTIONS = ("-std=c++17",)
_INCLUDE = re.compile(r'^#include "(\w+\.cuh)"$', re.MULTILINE)
_log = logging.getLogger(__name__)


class BuildFailed(FailedPrecondition):
    """A kernel could not be built: no compiler, or its message."""


def source(name: str) -> str:
    """The text of `name`.cu with the headers of ours that it includes in their place: one text, for either compiler."""
    return _INCLUDE.sub(lambda line: _read(line[1]), _read(f"{name}.cu"))


def _read(name: str) -> str:
    """A CUDA file: inside an installed package, or of the checkout that the package is used from."""
    here = Path(__file__).resolve()
    folders = (here.parent / "src", here.parents[3] / "csrc" / "cuda")
    for folder in folders:
        path = folder / name
        if path.is_file():
            return path.read_text(encoding="utf-8")
    raise BuildFailed(f"{name} is neither in the package nor in a checkout around it", field="source")


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mtserve" / "cubin"


def build(name: str, macros: dict[str, int]) -> bytes:
    """The cubin of `name`.cu under `macros`. Raises BuildFailed."""
    text = source(name)
    options = [*_OPTIONS, *(f"-D{key}={value}" for key, value in sorted(macros.items()))]
    nvcc = shutil.which("nvcc")
    compiler = _nvcc_version(nvcc) if nvcc else _nvrtc_version()
    key = hashlib.sha256("\0".join([text, *options, ARCH, compiler]).encode()).hexdigest()[:32]
    path = cache_folder() / f"{name}-{key}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        image = _by_nvcc(nvcc, text, options) if nvcc else _by_nvrtc(name, text, options)
    _keep(path, image)
    return image


def _keep(path: Path, image: bytes) -> None:
    """Write whole or not at all; several processes may build the same."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, written = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(image)
            os.replace(written, path)
        except BaseException:
            os.unlink(written)
            raise
    except OSError as error:
        _log.warning("built kernels are not kept, the next start builds them again: %s", error)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildFailed(str(error), field="nvcc") from None
    output = done.stdout + done.stderr
    if done.returncode:
        raise BuildFailed(f"exit status {done.returncode}: {output[-2000:]}", field="nvcc")
    return output


def _nvcc_version(nvcc: str) -> str:
    return _run([nvcc, "--version"])


def _by_nvcc(nvcc: str, text: str, options: list[str]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path, target = Path(folder) / "kernel.cu", Path(folder) / "kernel.cubin"
        path.write_text(text, encoding="utf-8")
        code = f"-gencode=arch=compute_{ARCH.removeprefix('sm_')},code={ARCH}"
        _run([nvcc, code, "--cubin", *options, "-o", str(target), str(path)])
        return target.read_bytes()


def _nvrtc_version() -> str:
    try:
        from cupy.cuda import nvrtc
    except ImportError:
        message = "no nvcc on the PATH, and CuPy (pip install mtserve[cuda12] or [cuda13]) is not installed"
        raise BuildFailed(message, field="compiler") from None
    return f"nvrtc {nvrtc.getVersion()}"


def _by_nvrtc(name: str, text: str, options: list[str]) -> bytes:
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(text, f"{name}.cu", (), ())
    try:
        nvrtc.compileProgram(program, (f"-arch={ARCH}", *options))
        image: bytes = nvrtc.getCUBIN(program)
        return image
    except nvrtc.NVRTCError as error:
        raise BuildFailed(f"{error}: {nvrtc.getProgramLog(program)[-2000:]}", field="nvrtc") from None
    finally:
        nvrtc.destroyProgram(program)
