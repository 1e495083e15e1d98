"""YAML that may come from a stranger: values written out, and no more."""

from __future__ import annotations

import yaml

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is five times as fast
MAX_NESTING = 64


def check_plain(text: str) -> None:
    """See whether a text may be loaded.

    Raises:
        ValueError: aliases (a kilobyte can unfold into gigabytes), tags (they can make objects),
            or deeper nesting than `MAX_NESTING`, of which loaders run out of stack.
        yaml.YAMLError: it is no YAML.
    """
    depth = 0
    for event in yaml.parse(text, LOADER):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("aliases (*name) are not allowed; write the value out")
        if getattr(event, "tag", None) is not None:
            raise ValueError("tags (!name) are not allowed; write the value out")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_NESTING:
            raise ValueError(f"nested too deeply; {MAX_NESTING} levels are the most")
