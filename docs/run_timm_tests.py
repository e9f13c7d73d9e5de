"""Runs timm's own model tests on our variants and writes docs/timm.md.

`python docs/run_timm_tests.py path/to/pytorch-image-models` (a checkout of timm).
Its `tests/test_models.py` is taken as it is but for two lines: the models are ours, and our module is among those whose
intermediate features are tested.
"""

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import defaultdict
from pathlib import Path

import timm
import torch

from sequencer2d.zoo import VARIANTS

PAGE = Path(__file__).parent / "timm.md"
HEADER = """import sequencer2d.registry
import timm
_all = timm.list_models
def _ours(*arguments, **options):
    names = _all(*arguments, **options)
    return [name for name in names if timm.models.is_model_in_modules(name.partition(".")[0], {"registry"})]
timm.list_models = _ours
"""
WHY = {
    "test_model_forward_intermediates": "it wants three stages at least; these have two: ",
}


def main(checkout: Path) -> None:
    git = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "an unknown commit"
    source = (checkout / "tests" / "test_models.py").read_text()
    source = source.replace("FEAT_INTER_FILTERS = [", "FEAT_INTER_FILTERS = ['registry',", 1)
    with tempfile.TemporaryDirectory() as folder:
        test_file, report = Path(folder, "test_models.py"), Path(folder, "report.xml")
        test_file.write_text(HEADER + source)
        options = [
            "-q",
            "-p",
            "no:cacheprovider",
            "--rootdir",
            folder,
            f"--junitxml={report}",
            "-k",
            "not inference and not pretrained and not naflex and not gemma and not regnetx",
        ]
        subprocess.run([sys.executable, "-m", "pytest", *options, str(test_file)], cwd=folder, check=False)
        cases = list(ET.parse(report).iter("testcase"))
    outcomes: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for case in cases:
        test, _, parameters = case.attrib["name"].partition("[")
        outcome = next((kind for kind in ("failure", "error", "skipped") if case.find(kind) is not None), "passed")
        outcomes[test][outcome].append(parameters.rstrip("]").partition("-")[2])
    run = sum(map(len, outcomes["test_model_forward"].values()))
    lines = [
        "# timm's model tests",
        "",
        f"`tests/test_models.py` of timm's repository at {commit[:12]} run on {run} of our {len(VARIANTS)} registered "
        f"variants, with timm {timm.__version__} and torch {torch.__version__}, by "
        "`python docs/run_timm_tests.py path/to/pytorch-image-models`.",
        "Left out are the tests that load weights from the hub (`test_model_inference`, `…_load_pretrained`,",
        "`…_features_pretrained`); tests/test_hub.py tests that against a hub of its own.",
        "timm has no tests of `torch.export`: [models.md](models.md) says what it takes, and why no more.",
        "",
        "| test | passed | skipped | failed | why |",
        "| --- | --- | --- | --- | --- |",
    ]
    for test, kinds in outcomes.items():
        failed = kinds["failure"] + kinds["error"]
        if not any(kinds[kind] for kind in ("passed", "failure", "error")) and set(kinds["skipped"]) <= {""}:
            continue
        why = WHY.get(test, "") + ", ".join(failed) if failed else ""
        if kinds["skipped"]:
            why = f"{why} skipped by timm for their size: {', '.join(kinds['skipped'])}".strip()
        lines.append(f"| `{test}` | {len(kinds['passed'])} | {len(kinds['skipped'])} | {len(failed)} | {why} |")
    PAGE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
