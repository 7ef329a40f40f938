"""A release's notes: its section of the changelog."""

from __future__ import annotations

import re

UNRELEASED = "Unreleased"


def notes_of(changelog: str, version: str) -> str:
    """The section of CHANGELOG.md about a version, without its heading.

    Args:
        changelog: The file's text.
        version: Such as `1.2.0`, or `Unreleased`.

    Raises:
        LookupError: There is none, or it says nothing.
    """
    parts = re.split(r"^## \[([^\]]+)\].*$", changelog, flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    if version not in sections:
        raise LookupError(
            f"CHANGELOG.md has no section [{version}]: rename [Unreleased], or use --draft."
        )
    text = sections[version].strip()
    if not text:
        raise LookupError(f"The section [{version}] of CHANGELOG.md is empty.")
    return text + "\n"
