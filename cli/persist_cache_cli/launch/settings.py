"""Settings of Claude Code that win over the environment it is started in: they are read, no more.

Its files are merged in the order of `_files`; the `env` of each replaces variables of the process.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_MANAGED = (
    Path("/etc/claude-code/managed-settings.json"),
    Path("/Library/Application Support/ClaudeCode/managed-settings.json"),
)


def overruled(
    wanted: Mapping[str, str], unset: tuple[str, ...], environment: Mapping[str, str], folder: Path
) -> list[str]:
    """Say which of the user's settings of Claude Code win over what it is to be told.

    Args:
        wanted: Variables as it is to have them.
        unset: Those that it is not to have.
        environment: That it is started in.
        folder: In which it is started.

    Returns:
        A sentence for each file that has some.
    """
    found = []
    for path in _files(environment, folder):
        env = _env_of(path)
        names = [name for name, value in env.items() if wanted.get(name, value) != value]
        names += [name for name in unset if env.get(name)]
        if names:
            found.append(
                f"{path} sets {', '.join(sorted(names))} in its `env`, which wins over what this "
                "command sets; take that out if Claude Code does not reach the server."
            )
    return found


def _files(environment: Mapping[str, str], folder: Path) -> Iterator[Path]:
    own = environment.get("CLAUDE_CONFIG_DIR")
    home = Path(environment.get("HOME") or Path.home())
    yield (Path(own) if own else home / ".claude") / "settings.json"
    yield folder / ".claude" / "settings.json"
    yield folder / ".claude" / "settings.local.json"
    yield from _MANAGED


def _env_of(path: Path) -> dict[str, str]:
    """The variables that a file sets; none where it is not there or cannot be read."""
    try:
        said: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    env = said.get("env") if isinstance(said, dict) else None
    if not isinstance(env, dict):
        return {}
    return {name: str(value) for name, value in env.items() if value is not None}
