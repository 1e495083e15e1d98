"""New packages for plug-in authors."""

from __future__ import annotations

import importlib.util
import keyword
import re
from pathlib import Path
from string import Template

from hybridvit.stems import STEMS

TEMPLATES = Path(__file__).parent / "templates" / "stem"
FILES = {
    "pyproject.toml.txt": "pyproject.toml",
    "README.md.txt": "README.md",
    "config.yaml.txt": "$name.yaml",
    "stem.py.txt": "$name.py",
    "test.py.txt": "tests/test_$name.py",
}


def new_stem(name: str, out: Path) -> Path:
    """Write an installable package `out/name` with a stem, a passing test and a config.

    Raises:
        ValueError: a name that is no module's, or is taken; a folder that exists.
    """
    if keyword.iskeyword(name):
        raise ValueError(
            f"{name!r} is a Python keyword; choose another name, such as my_{name.lower()}"
        )
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(
            f"{name!r} cannot name a stem and its module: use lower-case letters, digits and _, "
            "such as my_stem"
        )
    folder = out / name
    if folder.exists() or folder.is_symlink():
        raise ValueError(f"{folder} exists; choose another name or --out=FOLDER")
    if name in STEMS:
        raise ValueError(f"{name!r} is a built-in stem; choose another name, such as my_{name}")
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.origin is not None:  # a folder beside us has no origin
        raise ValueError(
            f"{name!r} is a Python module already ({spec.origin}); choose another name"
        )
    words = {"name": name, "class_name": _class_name(name)}
    for template, path in FILES.items():
        target = folder / Template(path).substitute(words)
        target.parent.mkdir(parents=True, exist_ok=True)
        text = (TEMPLATES / template).read_text(encoding="utf-8")
        target.write_text(Template(text).substitute(words), encoding="utf-8")
    return folder


def _class_name(name: str) -> str:
    camel = "".join(word.capitalize() for word in name.split("_"))
    return camel if camel.endswith("Stem") else f"{camel}Stem"
