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


def drive(server: ServerProcess, *, number: int = 10) -> None:
    """A few conversations: of two clients, on two dates, one with another system prompt."""
    talks: dict[int, list[tuple[str, str]]] = {}
    for place in range(number):
        which = place % 4
        date = "2026-03-01" if place < number // 2 else "2026-03-02"
        system = RULES * 6 + f"Today's date is {date}. " + "Mountains, rivers and forests. " * 10
        if which == 3:
            system = "You review code. " * 20
        talk = talks.setdefault(which, [("system", system), ("user", QUESTIONS[which])])
        talk[0] = ("system", system)
        said = server.request(
            "POST",
            "/v1/chat/completions",
            json={
                "messages": [{"role": role, "content": text} for role, text in talk],
                "max_tokens": 8,
            },
            headers={"User-Agent": "opencode/0.9.1" if which % 2 else "claude-cli/2.1 (external)"},
        )
        assert said.status_code == 200, said.text
        answer = said.json()["choices"][0]["message"].get("content") or "Yes."
        talk += [("assistant", answer), ("user", f"And then? ({place})")]
