"""Human names of classes whose folders are called otherwise, as with WordNet ids: `classes.json` beside the splits."""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from sequencer2d.files import write_atomic

CLASSES_FILE = "classes.json"

logger = logging.getLogger(__name__)


def distinct_names(synonyms: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """The first synonym of each class; where classes share it, the next one or the id tells them apart.

    "boa constrictor, Constrictor constrictor" is "boa constrictor"; the two cranes are "crane (n02012849)", the bird,
    whose only word this is, and "crane (n03126707)".

    Args:
        synonyms: One or more names for each id.

    Example: `distinct_names({"n1": ["crane"], "n2": ["crane"], "n3": ["ox"]})["n1"] == "crane (n1)"`
    """
    names = {key: words[0] for key, words in synonyms.items()}
    for add in (lambda key: [*synonyms[key], key][1], lambda key: key):
        counts = Counter(names.values())
        shared = [key for key, name in names.items() if counts[name] > 1]
        names |= {key: f"{synonyms[key][0]} ({add(key)})" for key in shared}
    return names


def write_class_names(root: Path, names: Mapping[str, str]) -> None:
    """Writes `classes.json`: the name of each class folder, in class order."""
    write_atomic(root / CLASSES_FILE, json.dumps(names, indent=2, ensure_ascii=False) + "\n")


def read_class_names(root: Path, folders: Sequence[str]) -> tuple[str, ...]:
    """The names of class folders from `classes.json`; without a file that names them all, the folders' own.

    A file of this name that is something else is left alone, with a warning in the log.
    """
    path = root / CLASSES_FILE
    if not path.is_file():
        return tuple(folders)
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        names = None
    given = [names.get(folder) if isinstance(names, dict) else None for folder in folders]
    known = {folder: [name] for folder, name in zip(folders, given, strict=True) if isinstance(name, str) and name}
    if len(known) < len(folders):
        logger.warning("%s does not name every class folder; the folders' names are used", path)
        return tuple(folders)
    return tuple(distinct_names(known).values())
