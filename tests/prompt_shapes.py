"""Prompts of clients in their shapes, made up, and texts that only look like them."""

from __future__ import annotations

import random
from typing import Any

DATES = [
    "Today's date is 2026-11-25",
    "Today's date: Wed Nov 25 2026",
    "Current time is 09:15:00. Today's date is 2026-11-25.",
    "Current date: 2026-11-25T09:00:00Z",
    "- Current date: 2026-11-25",
    "**Current date:** November 25, 2026",
    "The current date is Wednesday, November 25, 2026.",
    "The current date is 2026-05-14 12:34:56.",
    "The time is 2026-11-25 17:26:16.087243",
    "It is currently 2025-12-15 17:28:20",
    "Current date and time: Wednesday, November 26, 2025 at 09:00:00 AM GMT+1",
    "Today's date is Wednesday, November 25, 2026 (formatted for the user).",
    "Today is 25 November 2026.",
    "<current_date>2026-11-25</current_date>",
    "2026-11-25T09:00:00.123Z",
    "Current Time: 11/26/2026, 9:00:00 AM",
    "Today's date: Thu Nov 26 2026 09:00:00 GMT+0100 (Central European Standard Time)",
    "The current time is Wed Nov 25 09:00:00 2026",
    "Current date (UTC): 2026-11-25",
]

OPENCODE = """\
You are a coding agent.

Here is what is known of where you run:
<env>
  Working directory: {folder}
  Workspace root folder: {folder}
  Is directory a git repo: yes
  Platform: linux
  Today's date: {day}
</env>
Skills follow."""

CLAUDE_CODE = """\
You are an agent for the command line.

# Environment
You have been invoked in the following environment:
 - Primary working directory: {folder}
 - Is a git repository: true
 - Additional working directories:
   - /tmp/{file}
 - Platform: linux
 - Shell: bash
 - You are powered by a model.

# auto memory
You have a memory at `/home/u/.claude/projects/-{file}/memory/`. Write to it.

# Tone
Be brief.
Today's date is {iso}.

gitStatus: This is the git status at the start of the conversation.
Current branch: main

Main branch (you will usually use this for PRs): main

Status:
 M src/{file}.py
?? {file}.txt

Recent commits:
abc1234 Mend {file}
def5678 Begin"""

CLAUDE_CODE_ENV = """\
You are an agent for the command line.
<env>
Working directory: {folder}
Is directory a git repo: Yes
Platform: darwin
OS Version: Darwin 24.6.0
Today's date: {iso}
</env>
You are powered by a model."""

CRUSH = """\
You are an agent.
<env>
Working directory: {folder}
Is directory a git repo: yes
Platform: linux
Today's date: {iso}

Git status (snapshot at conversation start - may be outdated):
Current branch: {file}
Status: clean
</env>
<memory>
Use tabs.
</memory>"""

CODEX = """\
You are an agent.
<environment_context>
  <cwd>{folder}</cwd>
  <shell>bash</shell>
  <current_date>{iso}</current_date>
</environment_context>
Be brief."""

PI = """\
You are an assistant.

Guidelines:
- Be brief.

Current date: {iso}
Current working directory: {folder}"""

CLINE = """\
You are an engineer.

====

SYSTEM INFORMATION

Operating System: Linux 6.1
Default Shell: /bin/bash
Home Directory: {folder}
Current Working Directory: {folder}

====

RULES

- Your current working directory is: {folder}
- Be brief.
Current Time: {iso}"""

SENTENCES = """\
You are an agent.

My system is: linux
I'm currently working in the directory: {folder}
The writable root is `{folder}`.

The current project contains the following root directories:

- `{folder}`

Current date: {iso}
Runtime: agent=main | host=here | repo={folder} | os=Linux
Be brief."""

GOOSE = """\
You are an agent.
The current date is {iso} 12:34:56.
<info>
Tools are below.
</info>
Working directory: {folder}"""

QWEN_CODE = """\
You are an agent.

# auto memory

You have a memory at `/home/u/.qwen/projects/-home-{file}/memory`. Write to it.

## Types of memory
Some.

---
Today's date is {day}.
"""

HOME_ASSISTANT = """\
Current time is 09:15:00. Today's date is 2026-11-25.
You are a voice assistant for a home.
Answer in plain text."""

ENVIRONMENTS = {
    "opencode": OPENCODE,
    "claude-code": CLAUDE_CODE,
    "claude-code-env": CLAUDE_CODE_ENV,
    "crush": CRUSH,
    "codex": CODEX,
    "pi": PI,
    "cline": CLINE,
    "goose": GOOSE,
    "sentences": SENTENCES,
    "qwen-code": QWEN_CODE,
}

_BLOCKS = [
    "Today's date is 2026-11-25",
    "<env>\nWorking directory: /home/u/x\nIs directory a git repo: yes\n</env>",
    "Current working directory: /home/u/x\nPlatform: linux",
    "gitStatus: as it is\nCurrent branch: main\nStatus:\n M a.py",
    "x-anthropic-billing-header: cc_version=1.2.3; cc_entrypoint=cli;",
    "See `/home/u/.qwen/projects/-home-u-x/memory`.",
    "[Old tool result content cleared at 2026-11-25T09:00:00Z]",
    "<system-reminder>\n- b\n- a\n</system-reminder>",
]

LOOKALIKES = [
    "Say: Today's date is 2026-11-25.",
    'If asked, answer "Today\'s date is 2026-11-25." and no more.',
    "Today's date is important to the user.",
    "Today's date is 2026-11-25 in this example, so count from there.",
    "`Today's date: 2026-11-25`",
    "> Today's date is 2026-11-25",
    "1. Current date: 2026-11-25",
    "| Current date: | 2026-11-25 |",
    "    Today's date is 2026-11-25",
    "Release date: 2026-11-25",
    "2026-11-25",
    "The working directory is where commands run.",
    "Pass the path: it is relative to the working directory /home/u/x or absolute.",
    "Log directory: /var/log",
    "You are in the working directory of the user.",
    "I'm working in the directory /home/u/x now, so say so when you run a command there.",
    "Use these tools in the project directory:\n\n- read: reads a file\n- /clear clears",
    "The paths are:\n\n- `/etc/hosts`\n- `/etc/passwd`",
    "<env>\nFOO=bar\n</env>",
    "<env> holds Working directory: /home/u/x </env>",
    "Git status: use it before you commit.",
    "Run `git status` and read it.",
    "Platform: linux",
    "Is a git repository needed? Ask.",
    *(f"```\n{block}\n```" for block in _BLOCKS),
    *(f"<example>\n{block}\n</example>" for block in _BLOCKS),
]


def prompts(number: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A made-up conversation full of lookalikes, of one of twenty kinds, and its tools."""
    drawn = random.Random(number)
    prose = ["Read the file.", "Héllo 🙂", "- one\n- two", "a\n\nb", "def f():\n    pass"]

    def text(*blocks: str) -> str:
        said = [*drawn.choices(prose, k=2), *blocks]
        drawn.shuffle(said)
        return "\n\n".join(said)

    fenced = [f"{fence}\n{block}\n{fence}" for block in _BLOCKS for fence in ("```", "~~~")]
    plain = [block for block in _BLOCKS if "system-reminder" not in block]
    messages: list[dict[str, Any]] = []
    if number % 4:
        lines = drawn.sample(LOOKALIKES, 6)
        messages.append({"role": "system", "content": text(*lines, *drawn.sample(fenced, 3))})
    for turn in range(1 + number % 3):
        said: Any = text(*drawn.sample(plain, 3), *drawn.sample(fenced, 2))
        if number % 5 == 2:
            said = [{"type": "text", "text": said}, {"type": "text", "text": text(plain[0])}]
        messages.append({"role": "user", "content": said})
        if number % 2:
            call = {"name": "read", "arguments": {"b": 1, "a": text(plain[0])}}
            calls = [{"id": f"c{turn}", "type": "function", "function": call}]
            messages.append({"role": "assistant", "content": "", "tool_calls": calls})
            result = text(*_BLOCKS)
            messages.append({"role": "tool", "tool_call_id": f"c{turn}", "content": result})
        messages.append({"role": "assistant", "content": text(*_BLOCKS)})
    if number % 3 == 0:
        messages.append({"role": "system", "content": text(*plain[:4], plain[5])})
    messages.append({"role": "user", "content": text(*plain)})
    description = "\n".join(_BLOCKS)
    function = {"name": "read", "description": description, "parameters": {"type": "object"}}
    return messages, [{"type": "function", "function": function}]
