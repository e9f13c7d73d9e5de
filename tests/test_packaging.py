"""What is installed: wheel and source archive hold all that the package reads at run time."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DATA = {".css", ".html", ".md", ".safetensors", ".yaml"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wheel and a source archive of this checkout, without kernels, which need a compiler."""
    pytest.importorskip("setuptools", "77.0.3")
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__", "*.so"))
    program = (
        "from setuptools.build_meta import build_sdist, build_wheel\n"
        "import warnings; warnings.simplefilter('ignore')\n"
        "build_wheel('dist'); build_sdist('dist')\n"
    )
    environment = {"SEQUENCER2D_NO_NATIVE": "1", "PATH": ""}
    subprocess.run([sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, check=True)
    return folder / "dist"


@pytest.mark.parametrize("kind", ["wheel", "source archive"])
def test_all_data_files_are_in(kind: str, built: Path) -> None:
    if kind == "wheel":
        (file,) = built.glob("*.whl")
        names = set(zipfile.ZipFile(file).namelist())
    else:
        (file,) = built.glob("*.tar.gz")
        with tarfile.open(file) as archive:
            names = {name.partition("/src/")[2] for name in archive.getnames()}
    wanted = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src" / "sequencer2d").rglob("*")}
    wanted = {name for name in wanted if Path(name).suffix in DATA | {".py"}}
    assert {Path(name).suffix for name in wanted} >= {".css", ".md", ".py", ".safetensors", ".yaml"}
    assert wanted <= names
