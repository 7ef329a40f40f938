"""Requests of made-up clients to a real server, so that its page has something to show."""

from __future__ import annotations

from tests.server_process import ServerProcess

RULES = "You are a careful assistant. Answer the question of the user in a short sentence. "
QUESTIONS = (
    "Tell me a story about dragons.",
    "What is the weather like?",
    "The capital of France is Paris; what is that of Italy?",
    "Once upon a time there was a baker. What did he put on the counter?",
)


def drive(
    server: ServerProcess,
    *,
    number: int = 10,
    dates: tuple[str, str] = ("2026-03-01", "2026-03-02"),
) -> None:
    """A few conversations: of two clients, on two dates, one with another system prompt."""
    talks: dict[int, list[tuple[str, str]]] = {}
    for place in range(number):
        which = place % 4
        date = dates[place >= number // 2]
        system = RULES * 6 + f"Today's date is {date}. " + "Mountains, rivers and forests. " * 10
        if which == 3:
            system = "You review code. " * 20
        talk = talks.setdefault(which, [("system", system), ("user", QUESTIONS[which])])
        talk[0] = ("system", system)
        answer = ask(server, which, place, talk)
        talk += [("assistant", answer), ("user", f"And then? ({place})")]


def ask(server: ServerProcess, which: int, place: int, talk: list[tuple[str, str]]) -> str:
    """Have one conversation answered, by the protocol of its client."""
    turns = [{"role": role, "content": text} for role, text in talk]
    if which:
        client = "opencode/0.9.1" if which % 2 else "codex_cli/0.40"
        said = server.request(
            "POST",
            "/v1/chat/completions",
            json={"messages": turns, "max_tokens": 8},
            headers={"User-Agent": client},
        )
        assert said.status_code == 200, said.text
        return str(said.json()["choices"][0]["message"].get("content") or "Yes.")
    billing = (
        f"x-anthropic-billing-header: cc_version=2.1.{place}; cc_entrypoint=cli; cch={place:05x};"
    )
    system = [{"type": "text", "text": text} for text in (billing, talk[0][1])]
    said = server.request(
        "POST",
        "/v1/messages",
        json={"model": "claude-large", "system": system, "messages": turns[1:], "max_tokens": 8},
        headers={"User-Agent": "claude-cli/2.1 (external)"},
    )
    assert said.status_code == 200, said.text
    return "".join(one.get("text", "") for one in said.json()["content"]) or "Yes."
