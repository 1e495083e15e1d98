"""Configs from YAML: files over those that they extend, and overrides over them, by OmegaConf."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hybridvit.plain_yaml import MAX_NESTING, check_plain
from hybridvit.references import check_references, unresolved
from hybridvit.registry import QUOTES, suggest

PARTS = ("data", "stem", "encoder", "objective")
MAX_BYTES = 1 << 20


def find(path: str | Path) -> Path:
    """A config file: as given, or among the configs that come with the package."""
    shipped = shipped_folder()
    candidates = [Path(path), shipped / path, shipped / str(path).removeprefix("configs/")]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    names = sorted(str(p.relative_to(shipped)) for p in shipped.glob("*.yaml"))
    raise ValueError(
        f"no config file {str(path)!r}{suggest(Path(path).name, names)}; "
        f"shipped ones: {', '.join(names)}"
    )


def shipped_folder() -> Path:
    """The configs that come with the package: inside a wheel, beside the package in a checkout."""
    package = Path(__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def compose(path: Path, trail: tuple[Path, ...] = ()) -> DictConfig:
    """A file laid over the files that its `extends` lists, in their order."""
    path = path.resolve()
    if path in trail:
        raise ValueError(
            f"{path.name}: extends itself through {' -> '.join(p.name for p in trail)}"
        )
    own = read_yaml(path)
    bases = own.pop("extends", [])
    if not isinstance(bases, list) or not all(isinstance(b, str) for b in bases):
        raise ValueError(f"{path.name}: extends should be a list of files, not {bases!r}")
    merged = OmegaConf.create({})
    for base in bases:
        found = [p for p in (path.parent / base, shipped_folder() / base) if p.is_file()]
        if not found:
            raise ValueError(
                f"{path.name}: extends {base!r}, which is neither in {path.parent} nor shipped"
            )
        merged = _laid_over(merged, compose(found[0], (*trail, path)))
    return _laid_over(merged, OmegaConf.create(own))


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping from a file that may come from a stranger.

    Raises:
        ValueError: over 1 MiB, not plain (`check_plain`), or no mapping.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"{path}: larger than {MAX_BYTES} bytes; that is no config")
        text = path.read_text(encoding="utf-8")
        try:
            check_plain(text)
        except ValueError as error:
            raise ValueError(f"{path}: YAML {error}") from None
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None and not isinstance(root, yaml.MappingNode):
            raise ValueError(f"{path}: should hold sections such as 'stem:', not a {root.id}")
        content = parse(text) if root is not None else {}
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path}: not valid YAML{where}: {_problem(error)}") from None
    return dict(content)


def parse(text: str) -> Any:
    """YAML by OmegaConf's loader: 1e-3 is a number, and a key that stands twice is an error.

    References are checked before anything follows one, as laying files over each other does.
    """
    try:
        content = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except OmegaConfBaseException as error:
        raise ValueError(f"config: {str(error).splitlines()[0]}") from None
    check_references(content)
    return content


def overlay(base: DictConfig, top: DictConfig) -> DictConfig:
    """Merge `top` over `base`; a part whose `name` changes loses the old part's arguments."""
    renamed = [p for p in PARTS if _name(top, p) not in (None, _name(base, p))]
    if renamed:
        base = OmegaConf.create(base)  # a copy: others lie over the same base
    for part in renamed:
        if isinstance(base.get(part), DictConfig):
            base[part].pop("args", None)
    return _merged(base, top)


def dotlist(overrides: list[str]) -> DictConfig:
    """`key.path=value` arguments as a config; values are read as YAML.

    Raises:
        ValueError: no `=`, or an empty key.
    """
    config = OmegaConf.create({})
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not all(key.split(".")):
            raise ValueError(f"override {item!r} should be key.path=value, such as train.epochs=3")
        if key.count(".") >= MAX_NESTING:
            raise ValueError(f"override {item!r}: {MAX_NESTING} levels are the most")
        try:
            check_plain(text)
            value = parse(f"value: {text}")["value"]
        except (yaml.YAMLError, KeyError, TypeError) as error:
            raise ValueError(
                f"override {item!r}: {text!r} is not valid YAML: {_problem(error)}"
            ) from None
        except ValueError as error:
            raise ValueError(f"override {item!r}: {error}") from None
        own = OmegaConf.create({})
        try:
            OmegaConf.update(own, key, value)
        except (OmegaConfBaseException, TypeError, ValueError) as error:
            raise ValueError(f"override {item!r}: {str(error).splitlines()[0]}") from None
        config = _merged(config, own)
    return config


def to_plain(config: DictConfig) -> dict[str, Any]:
    """All values, with what they refer to.

    Raises:
        ValueError: as `check_references`, or a reference to nothing.
    """
    check_references(OmegaConf.to_container(config, resolve=False))
    try:
        return typing.cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    except OmegaConfBaseException as error:
        raise unresolved(error) from None


def _laid_over(base: DictConfig, top: DictConfig) -> DictConfig:
    """Of files, which together may hold more references than each by itself."""
    check_references([OmegaConf.to_container(each, resolve=False) for each in (base, top)])
    return overlay(base, top)


def _merged(base: DictConfig, top: DictConfig) -> DictConfig:
    try:
        return typing.cast(DictConfig, OmegaConf.merge(base, top))
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        under, over = (OmegaConf.to_container(each, resolve=False) for each in (base, top))
        told = _clash(under, over) or str(error).splitlines()[0]
        raise ValueError(f"config: {told}") from None


def _name(config: DictConfig, part: str) -> Any:
    node: Any = config
    try:
        for key in (part, "name"):  # by [], whose errors tell the key, as those of `get` do not
            node = node[key] if isinstance(node, DictConfig) and key in set(node) else None
        return node
    except OmegaConfBaseException as error:
        raise unresolved(error) from None


def _clash(base: Any, top: Any, path: str = "") -> str | None:
    """Where a list is laid over a section, or a section over a list."""
    for key, over in top.items():
        where, under = f"{path}{key}", base.get(key)
        if isinstance(under, dict) and isinstance(over, dict):
            if found := _clash(under, over, f"{where}."):
                return found
        elif isinstance(under, dict) and isinstance(over, list):
            return f"{where} should be a section, not {over!r}"
        elif isinstance(under, list) and isinstance(over, dict):
            return f"{where}={over!r} is laid over the list {under!r}; write a list here, too"
    return None


def _problem(error: Exception) -> str:
    """What is wrong with YAML, and what to do where that is known."""
    problem = getattr(error, "problem", None) or str(error).split("\n")[0]
    if "duplicate key" in problem:
        return f"{problem}; name it once"
    is_colon = "':'" in problem or "mapping values" in problem
    return f"{problem}; {QUOTES}" if is_colon else str(problem)
