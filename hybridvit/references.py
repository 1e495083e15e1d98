"""What a config may refer to: its own keys, and HYBRIDVIT_* variables of the environment."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

MAX_REFERENCES = 8  # if each of some holds two others, they double line by line
# Whole, and without others inside: whatever else has a ${ is refused.
ALLOWED = re.compile(r"\$\{(oc\.env:HYBRIDVIT_\w*(,[^${}]*)?|[\w.\[\]-]+)\}")


def check_references(content: Any) -> None:
    """References to other keys and HYBRIDVIT_* variables are all that a config may resolve,
    because everything resolved is written to the run's record.

    Raises:
        ValueError: anything else in ${...}, or over `MAX_REFERENCES` of them.
    """
    references = 0
    for text in _strings(content):
        rest, found = text, 1
        while found:  # from the inside: one may stand in another's default
            references += sum(not m[1].startswith("oc.env:") for m in ALLOWED.finditer(rest))
            rest, found = ALLOWED.subn("\0", rest)
        if "${" in rest:
            raise ValueError(
                f"config: {text!r} is not allowed; only ${{key.path}} and "
                "${oc.env:HYBRIDVIT_...} are, because resolved values are written to the "
                "run's record"
            )
    if references > MAX_REFERENCES:
        raise ValueError(
            f"config: {references} references to other keys, over {MAX_REFERENCES}; write some "
            "of them out"
        )


def unresolved(error: OmegaConfBaseException) -> ValueError:
    """Which value refers to nothing, and what it may refer to."""
    problem = str(error).splitlines()[0]
    if error.parent_node is None:
        return ValueError(f"config: {problem}")
    siblings: Any = OmegaConf.to_container(error.parent_node, resolve=False)
    remedy = "give the whole path of another key that the config sets, such as ${data.name}"
    if variable := re.search("Environment variable .* not found", problem):
        problem, remedy = variable[0], "set it"
    return ValueError(
        f"config: {error.full_key}={siblings[error.key]!r}: {problem}; {remedy}, or write the "
        "value out"
    )


def _strings(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict | list):
        for child in node.values() if isinstance(node, dict) else node:
            yield from _strings(child)
