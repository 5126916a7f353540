"""A chain of LangChain at a gateway, run in LangChain's own environment: what it saw, as JSON. The address and the key
come from OPENAI_BASE_URL and OPENAI_API_KEY, as LangChain reads them."""

from __future__ import annotations

import json

from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class Forecast(BaseModel):
    """What the weather will be."""

    rain: bool


def weather(rain: bool) -> str:
    """Say whether it rains."""
    return f"rain is {rain}"


model = ChatOpenAI(model="default", max_tokens=100, max_retries=0, extra_body={"best_of": 4})
asked = HumanMessage("rain?")
reply = model.invoke([asked])
called = model.bind_tools([weather], tool_choice="any", parallel_tool_calls=False).invoke([asked])
[call] = called.tool_calls
history = [asked, AIMessage("", tool_calls=[call]), ToolMessage(weather(**call["args"]), tool_call_id=call["id"])]
chunks = list(model.stream([asked]))
seen = {
    "tokens": reply.usage_metadata["output_tokens"],
    "policy": reply.response_metadata["model_name"],
    "call": [call["name"], call["args"]],
    "after_the_call": model.bind_tools([weather], tool_choice="none")
    .invoke(history)
    .response_metadata["finish_reason"],
    "forecast": type(model.with_structured_output(Forecast).invoke([asked]).rain).__name__,
    "streamed": [sum(bool(chunk.content) for chunk in chunks), chunks[-1].chunk_position],
    "batch": len(model.batch([[asked]] * 3)),
}
print(json.dumps(seen))
