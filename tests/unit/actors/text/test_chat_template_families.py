"""Templates of many families, times conversations: what is accepted reaches the prompt, in the form
that the template wants; everything else is refused with a reason."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.actors.text.chat_template import ChatTemplate
from moesaic.actors.text.thinking import Thinking
from moesaic.proto.errors import RequestError
from tests.helpers.endpoint.templates import FAMILIES, family

Message = dict[str, Any]

WEATHER: Message = {"type": "function", "function": {"name": "weather"}}
CITY: Message = {
    "type": "function",
    "function": {
        "name": "city",
        "description": "Where it is",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
    },
}
ARGUMENTS = {"town": "Oslo", "hot": True, "why": None, "area": {"size": [1, "km"]}}
EMPTY = ("", " ", "{}", "null", "{ }")
WRONG = ('{"town": "Os', '"Oslo"', '["Oslo"]', "7", "NaN", "{town: 1}", '{"town": NaN}')


def say(role: str, content: str | None, **more: Any) -> Message:
    return {"role": role, "content": content, **more}


def call(arguments: str, *, name: str = "weather", identity: str = "call_a1") -> Message:
    function = {"name": name, "arguments": arguments}
    return {"id": identity, "type": "function", "function": function}


def calling(*calls: Message, content: str = "", **more: Any) -> Message:
    return say("assistant", content, tool_calls=list(calls), **more)


def answer(content: str = "rain and wind", identity: str = "call_a1") -> Message:
    return say("tool", content, tool_call_id=identity)


SYSTEM, DEVELOPER = say("system", "Be kind."), say("developer", "Be brief.")
USER, AGAIN = say("user", "Hello you."), say("user", "And tomorrow?")
SAID = say("assistant", "Good day.")

CONVERSATIONS: dict[str, Sequence[Message]] = {
    "user": [USER],
    "turns": [USER, SAID, AGAIN],
    "system": [SYSTEM, USER, SAID, AGAIN],
    "developer": [DEVELOPER, USER, SAID, AGAIN],
    "system late": [USER, SAID, SYSTEM, AGAIN],
    "two systems": [SYSTEM, DEVELOPER, USER],
    "two users": [USER, AGAIN],
    "assistant last": [USER, SAID],
    "thought": [USER, say("assistant", "<think>\nhm\n</think>\n\nGood day."), AGAIN],
    "only thought": [USER, say("assistant", "<think>\nhm\n</think>"), AGAIN],
    "reasoning": [USER, say("assistant", "Good day.", reasoning_content="hm"), AGAIN],
    "empty texts": [say("system", ""), say("user", " "), say("assistant", ""), AGAIN],
    "call": [USER, calling(call(json.dumps(ARGUMENTS)))],
    "empty call": [USER, calling(call("")), answer()],
    "answered": [USER, calling(call(json.dumps(ARGUMENTS))), answer()],
    "asked on": [USER, calling(call(json.dumps(ARGUMENTS))), answer(), AGAIN],
    "system and call": [SYSTEM, USER, calling(call(json.dumps(ARGUMENTS))), answer()],
    "two calls": [
        USER,
        calling(call(json.dumps(ARGUMENTS)), call('{"town": "Bergen"}', identity="call_b2")),
        answer(),
        answer("sun", identity="call_b2"),
    ],
    "call with text": [USER, calling(call(json.dumps(ARGUMENTS)), content="I look."), answer()],
    "call with thinking and text": [
        USER,
        calling(call(json.dumps(ARGUMENTS)), content="I look.", reasoning_content="hm"),
        answer(),
    ],
    "call with thinking": [
        USER,
        calling(call(json.dumps(ARGUMENTS)), reasoning_content="hm"),
        answer(),
    ],
}  # fmt: skip

CALLS = {
    name for name, messages in CONVERSATIONS.items() if any("tool_calls" in m for m in messages)
}
# Templates that know no calls at all; Hermes' and Command R's for requests without tools.
NO_CALLS = {"chatml", "command_r", "gemma2", "gemma3", "hermes", "olmo", "phi3", "phi4", "smolvlm",
            "zephyr"}  # fmt: skip
NO_TOOLS = (NO_CALLS | {"deepseek_r1"}) - {"command_r", "hermes"}
TURNS = "roles must alternate"
NO_SYSTEM = "refuses the messages: System role not supported"
DISORDER = {"system late": TURNS, "two systems": TURNS, "two users": TURNS}
ANSWERS = dict.fromkeys(CALLS - {"call"}, TURNS)
# What else is not served: in the template's words, or since it leaves something out.
REFUSED: dict[str, dict[str, str]] = {
    "command_r": DISORDER | ANSWERS,
    "deepseek_r1": {"two systems": "messages[0]"},
    "gemma2": DISORDER | ANSWERS | dict.fromkeys(
        ("system", "developer", "two systems", "empty texts", "system and call"), NO_SYSTEM
    ),
    "gemma3": DISORDER | ANSWERS,
    "gpt_oss": {
        "system late": "messages[2]", "two systems": "messages[1]",
        "two calls": "messages[1].tool_calls[1]",
    },
    "llama3_1": {"two calls": "only supports single tool-calls"},
    "minimax_m2": {"system late": "messages[2]", "two systems": "messages[1]"},
    "mistral_v3": DISORDER | {"asked on": TURNS, "system and call": "messages[0]"},
}  # fmt: skip


@cache
def the(name: str) -> ChatTemplate:
    return family(name)


def texts_of(message: Message) -> list[str]:
    """What has to be found of a message."""
    content = (message["content"] or "").rpartition("</think>")[2].strip()
    found = [content] if content else []
    for one in message.get("tool_calls", ()):
        try:
            arguments = json.loads(one["function"]["arguments"].strip() or "{}")
        except ValueError:
            found.append(one["function"]["arguments"])
            continue
        if isinstance(arguments, dict):
            found += [word for word in ("Oslo", "Bergen") if word in arguments.values()]
    return found


def reached(name: str, messages: Sequence[Message], tools: Sequence[Message] = ()) -> str:
    """The prompt, in which everything was found and nothing is Python's or encoded twice."""
    prompt = the(name).render(messages, tools).text
    for message in messages:
        for text in texts_of(message):
            assert text in prompt, (name, message, prompt)
    assert "{'" not in prompt and "'town'" not in prompt, (name, prompt)
    assert '\\"town' not in prompt, (name, prompt)
    for tool in tools:
        assert tool["function"]["name"] in prompt, (name, prompt)
    return prompt


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_said_reaches_the_prompt_or_is_refused(name: str, conversation: str) -> None:
    messages = CONVERSATIONS[conversation]
    why = REFUSED.get(name, {}).get(conversation)
    if why is None and name in NO_CALLS and conversation in CALLS:
        why = "tool_calls[0]"
    if why is None:
        reached(name, messages)
        return
    with pytest.raises(RequestError) as caught:
        the(name).render(messages)
    assert why in str(caught.value)
    assert (caught.value.param or "").startswith("messages")


@pytest.mark.parametrize("name", FAMILIES)
def test_tools_reach_the_prompt_or_are_refused(name: str) -> None:
    if name in NO_TOOLS:
        with pytest.raises(RequestError, match="does not support tools") as caught:
            the(name).render([USER], [WEATHER])
        assert caught.value.param == "tools"
        return
    reached(name, [USER], [WEATHER])  # without description and parameters
    reached(name, [USER, SAID, AGAIN], [CITY, WEATHER])
    reached(name, CONVERSATIONS["answered"], [CITY, WEATHER])


CALLING = sorted((set(FAMILIES) - NO_CALLS) | {"command_r", "hermes"})


def tools_for(name: str) -> list[Message]:
    return [] if name in NO_TOOLS else [CITY, WEATHER]


# How each family writes a call of weather with ARGUMENTS.
AS_JSON = '{"town": "Oslo", "hot": true, "why": null, "area": {"size": [1, "km"]}}'
WRITTEN = {
    "command_r": f'"parameters": {json.dumps(ARGUMENTS, indent=4)}',
    "deepseek_r1": f"function<｜tool▁sep｜>weather\n```json\n{AS_JSON}\n```",
    "deepseek_v3_1": f"weather<｜tool▁sep｜>{AS_JSON}<｜tool▁call▁end｜>",
    "glm4_5": '<arg_value>Oslo</arg_value>\n<arg_key>hot</arg_key>\n<arg_value>true</arg_value>\n'
    '<arg_key>why</arg_key>\n<arg_value>null</arg_value>\n<arg_key>area</arg_key>\n'
    '<arg_value>{"size": [1, "km"]}</arg_value>',
    "gpt_oss": f"to=functions.weather<|channel|>commentary json<|message|>{AS_JSON}<|call|>",
    "granite3": f'[{{"name": "weather", "arguments": {AS_JSON}}}]',
    "hermes": f'{{"name": "weather", "arguments": {AS_JSON}}}',
    "kimi_k2": f"call_a1<|tool_call_argument_begin|>{AS_JSON}<|tool_call_end|>",
    "llama3_1": f'{{"name": "weather", "parameters": {AS_JSON}}}',
    "minimax_m2": '<parameter name="town">Oslo</parameter><parameter name="hot">true</parameter>'
    '<parameter name="why">null</parameter><parameter name="area">{"size": [1, "km"]}</parameter>',
    "mistral_v3": f'[{{"name": "weather", "arguments": {AS_JSON}, "id": "',
    "qwen2_5": f'{{"name": "weather", "arguments": {AS_JSON}}}',
    "qwen3": f'{{"name": "weather", "arguments": {AS_JSON}}}',
    "qwen3_coder": "<parameter=town>\nOslo\n</parameter>\n<parameter=hot>\ntrue\n</parameter>\n"
    '<parameter=why>\nnull\n</parameter>\n<parameter=area>\n{"size": [1, "km"]}\n</parameter>',
}  # fmt: skip
# How it writes one without arguments.
WITHOUT = {
    "glm4_5": "<tool_call>weather\n</tool_call>",
    "minimax_m2": '<invoke name="weather"></invoke>',
    "qwen3_coder": "<function=weather>\n</function>",
}
TAKES_TEXT = {"deepseek_r1", "deepseek_v3_1", "kimi_k2", "qwen3"}


def test_every_family_with_calls_has_its_form() -> None:
    assert sorted(WRITTEN) == CALLING


@pytest.mark.parametrize("name", CALLING)
def test_arguments_are_written_once_in_the_form_of_the_template(name: str) -> None:
    messages = [USER, calling(call(json.dumps(ARGUMENTS))), answer()]
    prompt = reached(name, messages, tools_for(name))
    assert prompt.count(WRITTEN[name]) == 1, prompt
    assert prompt.count("Oslo") == 1


@pytest.mark.parametrize("arguments", EMPTY)
@pytest.mark.parametrize("name", CALLING)
def test_empty_arguments_are_an_empty_object(name: str, arguments: str) -> None:
    prompt = reached(name, [USER, calling(call(arguments)), answer()], tools_for(name))
    empty = WITHOUT.get(name) or WRITTEN[name].replace(AS_JSON, "{}")
    if name == "command_r":
        empty = '"parameters": {}'
    text = prompt.replace("{ }", "{}")  # where the template takes text, it is the client's
    assert text.count(empty) == 1, prompt


@pytest.mark.parametrize("arguments", WRONG)
@pytest.mark.parametrize("name", CALLING)
def test_arguments_that_are_no_object_are_text_or_refused(name: str, arguments: str) -> None:
    messages = [USER, calling(call("{}"), content="I look."), answer(), SAID, AGAIN]
    messages = [*messages, calling(call("{}"), call(arguments, identity="call_b2"))]
    if name == "llama3_1":
        messages[-1] = calling(call(arguments))
    if name in TAKES_TEXT:
        prompt = the(name).render(messages, tools_for(name)).text
        assert prompt.count(arguments) == 1
        return
    nth = len(messages[-1]["tool_calls"]) - 1
    path = f"messages[5].tool_calls[{nth}].function.arguments"
    with pytest.raises(RequestError) as caught:
        the(name).render(messages, tools_for(name))
    assert str(caught.value).startswith(f"{path} is not a JSON object")
    assert caught.value.param == path


def test_thinking_of_earlier_answers() -> None:
    asked = [USER, calling(call("{}"), reasoning_content="I wonder."), answer()]
    for name in ("qwen3", "glm4_5", "minimax_m2", "gpt_oss"):
        assert "I wonder." in the(name).render(asked, [CITY]).text
    for name in ("qwen2_5", "llama3_1", "deepseek_r1"):
        assert "I wonder." not in the(name).render(asked).text


@pytest.mark.parametrize(
    ("name", "options", "opened"),
    [
        ("qwen3", {}, False),
        ("qwen3", {"enable_thinking": False}, False),
        ("qwen3", {"enable_thinking": True}, False),
        ("glm4_5", {"enable_thinking": False}, False),
        ("deepseek_r1", {}, True),
        ("minimax_m2", {}, True),
        ("deepseek_v3_1", {}, False),
        ("deepseek_v3_1", {"thinking": True}, True),
    ],
)
def test_where_the_answer_begins(name: str, options: dict[str, Any], opened: bool) -> None:
    trap = [say("user", "What is <think>?")]
    for messages in ([USER], [SYSTEM, USER, SAID, AGAIN], CONVERSATIONS["thought"], trap):
        found = the(name).render(messages, options=options)
        assert found.thinking == Thinking(opened=opened), found.text


def test_options_reach_the_template() -> None:
    off = the("qwen3").render([USER], options={"enable_thinking": False}).text
    assert off.endswith("<think>\n\n</think>\n\n")
    assert (
        the("qwen3").render([USER], options={"enable_thinking": True}).text.endswith("assistant\n")
    )
    strong = the("gpt_oss").render([USER], options={"reasoning_effort": "high"}).text
    assert "Reasoning: high" in strong


@pytest.mark.parametrize("name", ["chatml", "gemma2", "gpt_oss", "llama3_1", "qwen2_5"])
def test_models_that_do_not_think(name: str) -> None:
    assert the(name).render([USER]).thinking is None


def test_a_developer_is_the_system_unless_the_template_knows_one() -> None:
    for name in set(FAMILIES) - {"gpt_oss", "gemma2"}:
        known = the(name).render([say("system", "Be brief."), USER]).text
        assert the(name).render([DEVELOPER, USER]).text == known
        assert "developer" not in known
    assert "# Instructions\n\nBe brief." in the("gpt_oss").render([DEVELOPER, USER]).text


def test_ids_are_shortened_alike_where_the_template_counts_them() -> None:
    prompt = the("mistral_v3").render(CONVERSATIONS["two calls"]).text
    first, second = (part[:9] for part in prompt.split('"id": "')[1:])
    assert first != second
    assert f'"call_id": "{first}"' in prompt
    assert f'"call_id": "{second}"' in prompt
    kept = [USER, calling(call("{}", identity="abcDEF123")), answer(identity="abcDEF123")]
    assert the("mistral_v3").render(kept).text.count("abcDEF123") == 2


_texts = st.sampled_from(["", " ", "Fine words", "<think>\nso\n</think>\n\nIndeed", "{{ 7 }} 'x'"])
_arguments = st.sampled_from([json.dumps(ARGUMENTS), *EMPTY, *WRONG])
_turns = st.one_of(
    st.builds(say, st.sampled_from(["system", "developer", "user"]), _texts),
    st.builds(lambda text, why: say("assistant", text, reasoning_content=why), _texts, _texts),
    st.builds(
        lambda text, many: calling(
            *(call(one, identity=f"call_{n}") for n, one in enumerate(many)), content=text
        ),
        _texts,
        st.lists(_arguments, min_size=1, max_size=2),
    ),
    st.builds(lambda text, n: answer(text, f"call_{n}"), _texts, st.integers(0, 1)),
)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(FAMILIES)), st.lists(_turns, min_size=1, max_size=6), st.booleans())
def test_any_conversation_reaches_the_prompt_or_is_refused(
    name: str, messages: list[Message], with_tools: bool
) -> None:
    try:
        reached(name, messages, [CITY, WEATHER] if with_tools else [])
    except RequestError as error:
        assert str(error).strip()
        assert error.param
