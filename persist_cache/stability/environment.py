"""Where a client tells its model the folder it works in, and what git says of that.

Blocks in a tag, runs of lines such as `Working directory: PATH`, what git says of a folder, and
sections about a folder that the client keeps for each project. Each is found as a whole: no
sentence is taken apart.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from persist_cache.stability.dates import is_date_line
from persist_cache.stability.lines import Line

_PATH = r"(?:~?[/\\]|[A-Za-z]:[\\/]|~)[^\s,;]*(?: [^\s,;]+){0,3}"
_OF_IT = r"(?:working|workspace|project|repo(?:sitory)?|git|root|primary|current|home)"
_FOLDER = (
    rf"(?:(?:your|the|absolute)\s+){{0,2}}(?:(?:{_OF_IT}\s+)+(?:director(?:y|ies)|dir|folders?|path|root)"
    rf"|(?:{_OF_IT}\s+)*(?:cwd|pwd|worktree|workspace|project|repo(?:sitory)?))(?:\s+(?:root|folder))?"
)
_BULLET = r"\s{0,6}(?:[-*•]\s+)?\*{0,2}"
_SAYS = r"\*{0,2}(?:\s*[:=]|\s+is:?(?=\s))\*{0,2}"
_IN_FOLDER = re.compile(
    rf"{_BULLET}{_FOLDER}(?:\s+\([^()\n]{{1,40}}\))?{_SAYS}\s*[`\"']?{_PATH}[`\"']?\.?\s*",
    re.IGNORECASE,
)
_SAID_TO_BE_IN = re.compile(
    rf"{_BULLET}(?:(?:I(?:'m|\s+am)|you(?:'re|\s+are)|we(?:'re|\s+are)|commands\s+run)\s+(?:\w+\s+){{0,2}}?"
    rf"(?:working\s+)?in\s+(?:the\s+)?(?:{_OF_IT}\s+)*(?:director(?:y|ies)|folders?)"
    rf"|the\s+(?:writable|workspace|project)\s+roots?\s+(?:is|are))\s*:?\s*[`\"']?{_PATH}[`\"']?\.?\s*",
    re.IGNORECASE,
)
_RUNTIME = re.compile(r"\s*Runtime:\s+\w+=[^|\n]*(?:\|\s*\w+=[^|\n]*)+")
_IS_REPOSITORY = re.compile(
    rf"{_BULLET}(?:is\s+)?(?:this\s+|the\s+)?(?:working\s+)?(?:directory\s+|folder\s+)?(?:in\s+|inside\s+)?"
    rf"(?:a\s+)?git\s+repo(?:sitory)?\??{_SAYS}\s*(?:yes|no|true|false)\.?\s*",
    re.IGNORECASE,
)
_FOLDERS_FOLLOW = re.compile(
    rf"{_BULLET}(?:additional|other)\s+working\s+director(?:y|ies){_SAYS}?\s*", re.IGNORECASE
)
_PATH_ITEM = re.compile(rf"\s+[-*•]\s+`?(?:{_PATH})`?\s*")
_FIELD = re.compile(
    r"\s{0,6}(?:[-*•]\s+)?\*{0,2}([A-Za-z][^:=\n.!?]{0,48}?)\*{0,2}\s*:\*{0,2}\s+(\S.*)"
)
_COMPANION = re.compile(
    r"platform|(?:operating\s+)?system|os(?:\s+(?:version|name))?|(?:default\s+)?shell|kernel"
    r"|arch(?:itecture)?|host(?:name)?|user(?:name)?|(?:git\s+|current\s+|main\s+)?branch"
    r"|(?:default\s+)?terminal|home|time\s*zone|locale|language|session(?:\s+id)?",
    re.IGNORECASE,
)
_ABSOLUTE = re.compile(r"[`\"']?(?:~?/|[A-Za-z]:[\\/])\S")
_TAG = re.compile(
    r"\s{0,6}<(env|environment|environment_(?:context|details|info)|env_info|system_info(?:rmation)?"
    r"|workspace(?:_info)?|runtime_information|working_directory|git_?status|context_info)>\s*",
    re.IGNORECASE,
)
_ELEMENT = re.compile(
    r"\s*<(cwd|pwd|working_?directory|workspace_?root|project_?root|git_?root|root)>\s*"
    rf"(?:{_PATH})\s*</\1>\s*",
    re.IGNORECASE,
)
_LINES = (_IN_FOLDER, _SAID_TO_BE_IN, _IS_REPOSITORY, _ELEMENT, _RUNTIME)
_LIST_HEAD = re.compile(
    rf"[^\n]{{0,120}}?\b{_OF_IT}\s+(?:director(?:y|ies)|folders?):\s*", re.IGNORECASE
)
_LISTED = re.compile(r"\s{0,6}[-*•]\s+`?(?:~?/|[A-Za-z]:[\\/])[^`\n]*`?\s*")
"""A folder, in a list that a sentence introduces."""
_GIT_HEAD = re.compile(
    r"\s*(?:#+\s+)?git\s*status(?:\s*\([^()\n]{1,100}\))?\s*:(?:\s.*)?", re.IGNORECASE
)
_GIT_FIELD = re.compile(
    r"\s*(?:(?:current|main)\s+branch\b|git\s+user\s*:|(?:git\s+)?status\s*:"
    r"|(?:recent|last)\s+commits?\b|\(?clean\)?\s*\Z|nothing\s+to\s+commit|on\s+branch\b).*",
    re.IGNORECASE,
)
_GIT_ITEM = re.compile(
    r"\s*[0-9a-f]{7,40}\s+\S.*|[ MADRCTU?!]{2} \S.*|[MADRCTU] \S+|##\s+\S+\.\.\.\S+.*|\.\.\. ?\(.*"
)
"""A commit, or a file with what became of it."""
_OF_PROJECT = re.compile(r"[/\\]\.[\w-]+[/\\]projects[/\\]-[\w.%-]+")
_HEADING = re.compile(r"#{1,6}\s+\S")
_RULE = re.compile(r"(?:-{3,}|\*{3,}|_{3,})\s*")
_MARKS = (":", "=", " is", "?", "<")
"""One of them is in every line that tells something."""
_LONGEST = 1000
"""Characters of a line that may be one of them."""
_HINT = re.compile(
    r"director|folder|cwd|pwd|workspace|project|\broot|git|<env|<runtime|<system_info",
    re.IGNORECASE,
)


def may_tell_environment(text: str) -> bool:
    """Whether it is worth looking for it; quick."""
    return _HINT.search(text) is not None


def blocks(lines: Sequence[Line]) -> list[tuple[int, int]]:
    """The lines that tell it, as ranges of their numbers, in order and apart."""
    taken = [False] * len(lines)
    for find in (_tagged, _of_git, _of_project, _listed, _runs):
        for start, end in find(lines):
            taken[start:end] = [True] * (end - start)
    found, at = [], 0
    while at < len(lines):
        end = at
        while end < len(lines) and taken[end]:
            end += 1
        if end > at:
            found.append((at, end))
        at = max(end, at + 1)
    return found


def is_environment_line(text: str) -> bool:
    """Whether a line by itself tells the folder, or whether git knows it."""
    if not any(mark in text for mark in _MARKS):
        return False
    return any(form.fullmatch(text) for form in _LINES)


def _tagged(lines: Sequence[Line]) -> list[tuple[int, int]]:
    """Blocks in a tag of their own, if they tell the folder or what git says."""
    found, at = [], 0
    while at < len(lines):
        line, at = lines[at], at + 1
        opened = None if line.is_example else _TAG.fullmatch(line.text)
        if opened is None:
            continue
        closed = re.compile(rf"\s*</{re.escape(opened[1])}>\s*", re.IGNORECASE)
        for end in range(at, len(lines)):
            if lines[end].is_example or _TAG.fullmatch(lines[end].text):
                break
            if closed.fullmatch(lines[end].text):
                inner = [one.text for one in lines[at:end]]
                is_git = "git" in opened[1].lower()
                if is_git or any(
                    is_environment_line(one) or _GIT_HEAD.fullmatch(one) for one in inner
                ):
                    found.append((at - 1, end + 1))
                    at = end + 1
                break
    return found


def _of_git(lines: Sequence[Line]) -> list[tuple[int, int]]:
    """What git says: from its first line on, as long as that goes on."""
    found, at = [], 0
    while at < len(lines):
        start, at = at, at + 1
        if lines[start].is_example or not _GIT_HEAD.fullmatch(lines[start].text):
            continue
        end = at
        while at < len(lines) and not lines[at].is_example:
            if _is_git_line(lines[at].text):
                end = at + 1
            elif not lines[at].is_blank:
                break
            at += 1
        if end > start + 1:
            found.append((start, end))
    return found


def _is_git_line(text: str) -> bool:
    return bool(_GIT_ITEM.fullmatch(text) or _GIT_FIELD.fullmatch(text))


def _listed(lines: Sequence[Line]) -> list[tuple[int, int]]:
    """Folders in a list, with the line that introduces it."""
    found = []
    for start, line in enumerate(lines):
        if line.is_example or len(line.text) > _LONGEST or not _LIST_HEAD.fullmatch(line.text):
            continue
        first = start + 1
        while first < len(lines) and first < start + 3 and lines[first].is_blank:
            first += 1
        end = first
        while end < len(lines) and not lines[end].is_example and _LISTED.fullmatch(lines[end].text):
            end += 1
        if end > first:
            found.append((start, end))
    return found


def _of_project(lines: Sequence[Line]) -> list[tuple[int, int]]:
    """Sections that name a folder of the client's for this project, each up to the next heading."""
    found: list[tuple[int, int]] = []
    for place, line in enumerate(lines):
        if line.is_example or not _OF_PROJECT.search(line.text):
            continue
        if found and place < found[-1][1]:
            continue
        start = place
        while start > 0 and not _is_heading(lines[start]) and not _is_rule(lines[start - 1]):
            start -= 1
        if not _is_heading(lines[start]):
            start = place  # no section: the paragraph
            while start > 0 and not lines[start - 1].is_blank:
                start -= 1
            end = place + 1
            while end < len(lines) and not lines[end].is_blank:
                end += 1
        else:
            end = start + 1
            while end < len(lines) and not _is_heading(lines[end]) and not _is_rule(lines[end]):
                end += 1
        found.append((start, end))
    return found


def _is_heading(line: Line) -> bool:
    return not line.is_example and _HEADING.match(line.text) is not None


def _is_rule(line: Line) -> bool:
    return not line.is_example and _RULE.fullmatch(line.text) is not None


def _runs(lines: Sequence[Line]) -> list[tuple[int, int]]:
    """Lines that tell the folder, with the fields of the same run that belong to them."""
    found = []
    at = 0
    while at < len(lines):
        start = at
        while at < len(lines) and _is_of_run(lines, at, start):
            at += 1
        if any(is_environment_line(one.text) for one in lines[start:at]):
            found.append((start, at))
        at = max(at, start + 1)
    return found


def _is_of_run(lines: Sequence[Line], place: int, start: int) -> bool:
    line = lines[place]
    if line.is_example or line.is_blank:
        return False
    text = line.text
    if len(text) > _LONGEST:
        return False
    if is_environment_line(text) or _FOLDERS_FOLLOW.fullmatch(text) or is_date_line(text.strip()):
        return True
    if place > start and _PATH_ITEM.fullmatch(text):
        return True
    field = _FIELD.fullmatch(text)
    return field is not None and bool(
        _COMPANION.fullmatch(field[1].strip()) or _ABSOLUTE.match(field[2])
    )
