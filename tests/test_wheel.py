"""Wheels work where only they were installed: the one of `make wheel` with its kernels, and one without any."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ("src", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py")

PROGRAM = """
import json, torch, sequencer2d
from sequencer2d.native import library
native = next(backend for backend in sequencer2d.backends() if backend.name == "native")
model = sequencer2d.create_model("sequencer2d_s", layers=(1, 1, 1, 1), num_classes=5).eval()
with torch.inference_mode():
    shape = model(torch.zeros(1, 3, 28, 28)).shape
found = {"package": sequencer2d.__file__, "kernels": str(library.PATH), "detail": native.detail}
print(json.dumps(found | {"native": native.available, "shape": list(shape)}))
"""


@pytest.fixture
def built_wheel() -> Path:
    """What `make wheel` left in dist/, if it is of these sources."""
    wheels = sorted((ROOT / "dist").glob("sequencer2d-*.whl"), key=lambda path: path.stat().st_mtime)
    sources = [path for end in ("py", "yaml", "css", "cpp", "h") for path in (ROOT / "src").rglob(f"*.{end}")]
    sources += [ROOT / "setup.py", ROOT / "pyproject.toml"]
    if not wheels or wheels[-1].stat().st_mtime < max(path.stat().st_mtime for path in sources):
        pytest.skip("there is no wheel of these sources in dist/: make wheel")
    return wheels[-1]


def answers_of(wheel: Path, folder: Path) -> dict[str, Any]:
    """What PROGRAM prints in a new environment with this wheel and, behind it, the dependencies of this one."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin/python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "SEQUENCER2D"))}
    subprocess.run([*pip, str(wheel)], env=env, check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    done = subprocess.run(
        [str(python), "-c", PROGRAM], cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    assert Path(answers["package"]).is_relative_to(site)
    assert Path(answers["kernels"]).is_relative_to(site)
    assert answers["shape"] == [1, 5]
    return answers


def test_the_wheel_of_make_has_kernels_and_fits_every_python(built_wheel: Path, tmp_path: Path) -> None:
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert built_wheel.name.endswith(f"-py3-none-{platform}.whl")
    answers = answers_of(built_wheel, tmp_path)
    assert answers["native"], answers["detail"]


def test_a_wheel_without_kernels_fits_everything_and_runs_on_pytorch(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77.0.3")
    source = tmp_path / "source"
    source.mkdir()
    for name in PACKAGE:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__")
            shutil.copytree(ROOT / name, source / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    env = {**os.environ, "SEQUENCER2D_NO_NATIVE": "1"}
    subprocess.run([*pip, "--wheel-dir", str(tmp_path / "dist"), str(source)], env=env, check=True)
    (wheel,) = (tmp_path / "dist").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    answers = answers_of(wheel, tmp_path / "environment")
    assert not answers["native"]
    assert "SEQUENCER2D_NO_NATIVE" in answers["detail"]
