"""Programs that use a client library as its own documentation does, run in its environment.

Each is called with the server's address, the model, a file for the conversation, and a question.
"""

from __future__ import annotations

_SYSTEM = "You are a careful clock. " + "You tell the time of any city when you are asked. " * 40

PYDANTIC_AI = f"""
import sys
from pathlib import Path
from pydantic_ai import Agent
from pydantic_ai.messages import ModelMessagesTypeAdapter
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

url, model, kept, question = sys.argv[1:]
provider = OpenAIProvider(base_url=f"{{url}}/v1", api_key="none")
agent = Agent(OpenAIChatModel(model, provider=provider), system_prompt={_SYSTEM!r})


@agent.tool_plain
def clock(city: str) -> str:
    "Tell the time of a city."
    return f"It is six in {{city}}."


file = Path(kept)
earlier = ModelMessagesTypeAdapter.validate_json(file.read_bytes()) if file.exists() else None
done = agent.run_sync(question, message_history=earlier)
file.write_bytes(done.all_messages_json())
print(done.output)
"""

LITELLM = f"""
import json, os, sys
from pathlib import Path
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
import litellm

litellm.telemetry = False
url, model, kept, question = sys.argv[1:]
where = f"{{url}}/v1" if model.startswith("openai/") else url
parameters = {{"type": "object", "properties": {{"city": {{"type": "string"}}}}}}
function = {{"name": "clock", "description": "Tell the time of a city.", "parameters": parameters}}
file = Path(kept)
if file.exists():
    messages = json.loads(file.read_text())
else:
    messages = [{{"role": "system", "content": {_SYSTEM!r}}}]
messages.append({{"role": "user", "content": question}})
while True:
    answer = litellm.completion(
        model=model,
        messages=messages,
        tools=[{{"type": "function", "function": function}}],
        api_base=where,
        api_key="none",
        max_tokens=200,
    )
    said = answer.choices[0].message
    messages.append(said.model_dump(exclude_none=True))
    if not said.tool_calls:
        break
    for call in said.tool_calls:
        city = json.loads(call.function.arguments)["city"]
        result = {{"role": "tool", "tool_call_id": call.id, "content": f"It is six in {{city}}."}}
        messages.append(result)
file.write_text(json.dumps(messages))
print(said.content)
"""

CLOCK = """
def clock(city: str) -> str:
    "Tell the time of a city."
    return f"It is six in {city}."
"""
"""A tool for `llm`."""
SYSTEM = _SYSTEM
