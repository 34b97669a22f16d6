"""Requests in OpenAI's form, with what a test adds to the least that is needed."""

from __future__ import annotations

import json
from typing import Any

from moesaic.actors.endpoint.openai.requests import ChatRequest, CompletionRequest, parse_request

COMPLETION = {"model": "m", "prompt": "x"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
CACHED = {"cache_control": {"type": "ephemeral"}}
CALLS = [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}]


def completion(**more: Any) -> CompletionRequest:
    return parse_request(CompletionRequest, json.dumps({**COMPLETION, **more}).encode())


def chat(**more: Any) -> ChatRequest:
    return parse_request(ChatRequest, json.dumps({**CHAT, **more}).encode())
