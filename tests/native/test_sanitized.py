"""The kernels touch no memory that is not theirs and do nothing undefined: run on their own, built with sanitizers, and
under valgrind, which has no AVX-512 and finds what was never written."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "src/sequencer2d/native/kernels"
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def build(folder: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The library as setup.py builds it, with more flags."""
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-lib",
        str(folder),
        "--build-temp",
        str(folder / "temp"),
    ]
    settings = {**os.environ, "CFLAGS": " ".join(flags), "LDFLAGS": " ".join(flags), **environment}
    return subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, check=False)


def compile_driver(folder: Path, compiler: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """The program that calls every kernel."""
    source = Path(__file__).with_name("sanitized.cpp")
    command = [
        compiler,
        "-std=c++17",
        "-g",
        *flags,
        "-I",
        str(KERNELS),
        str(source),
        "-o",
        str(folder / "driver"),
        "-ldl",
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_sanitizers_find_nothing(compiler: str, tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    if not shutil.which(compiler):
        pytest.skip(f"there is no {compiler} here")
    compiled = compile_driver(tmp_path, compiler, *SANITIZE)
    if compiled.returncode:
        pytest.skip(f"{compiler} has no sanitizers here: {compiled.stderr.splitlines()[-1]}")
    done = build(tmp_path, *SANITIZE, CC=compiler, CXX=compiler)
    library = tmp_path / "sequencer2d/native/_kernels.so"
    assert library.exists(), done.stdout + done.stderr
    assert "warning:" not in done.stderr
    command = [str(tmp_path / "driver"), str(library)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.stdout.endswith("as they should be\n"), run.stdout + run.stderr
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
def test_valgrind_finds_nothing(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    if not shutil.which("valgrind") or not shutil.which("g++"):
        pytest.skip("there is no valgrind or no g++ here")
    assert compile_driver(tmp_path, "g++").returncode == 0
    build(tmp_path, "-g", CC="g++", CXX="g++")
    valgrind = ["valgrind", "--error-exitcode=9", "--quiet", "--leak-check=full"]
    command = [*valgrind, str(tmp_path / "driver"), str(tmp_path / "sequencer2d/native/_kernels.so")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.startswith("portable ")


@pytest.mark.slow
def test_without_a_compiler_the_package_is_still_built(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    done = build(tmp_path, CC="no-such-compiler", CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("without CPU kernels, PyTorch's LSTMs run instead") == 1
    assert not [*tmp_path.rglob("*.so")]
    done = build(tmp_path, SEQUENCER2D_NO_NATIVE="1")
    assert "without CPU kernels, as SEQUENCER2D_NO_NATIVE says" in done.stdout
    assert not [*tmp_path.rglob("*.so")]
