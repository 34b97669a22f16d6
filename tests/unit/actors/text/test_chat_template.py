"""Templates that fail, that leave something out, that are several; and what they are handed."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from moesaic.actors.engine.engine import RequestLimits
from moesaic.actors.engine.served_model import ServedModel
from moesaic.actors.text.template_source import TemplateSource
from moesaic.actors.text.thinking import Thinking
from moesaic.proto.errors import RequestError
from tests.helpers.endpoint.templates import FAMILIES, chat_template, tokenizer_with
from tests.helpers.models.versions import newest_transformers

USER: dict[str, Any] = {"role": "user", "content": "Hello you."}
AGAIN: dict[str, Any] = {"role": "user", "content": "And now?"}
SAID: dict[str, Any] = {"role": "assistant", "content": "Good day."}
SYSTEM: dict[str, Any] = {"role": "system", "content": "Be kind."}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "weather"}}
CHATML, QWEN = FAMILIES["chatml"], FAMILIES["qwen2_5"]
assert isinstance(CHATML, str)
assert isinstance(QWEN, str)


def history(arguments: Any) -> list[dict[str, Any]]:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "rain"},
    ]


def written(arguments: str) -> str:
    """A template that writes a call's arguments (``a``) and answers."""
    return (
        "{% for m in messages %}{{ m.content }}|"
        "{% for c in m.tool_calls or [] %}{% set a = c.function.arguments %}"
        f"{arguments}|{{% endfor %}}{{% endfor %}}"
    )


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}{{ m.content + 1 }}{% endfor %}", "TypeError: can only concat"),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{{ messages[5].content }}", "UndefinedError: list object has no element 5"),
        ("{{ messages[0].content.pop() }}", "UndefinedError: 'str object' has no attribute 'pop'"),
        ("{{ messages[0].content.__class__.__mro__ }}", "SecurityError: access to attribute"),
        ("{{ [].pop() }}", "SecurityError"),
        ("{{ messages[0].content.index('zzz') }}", "ValueError: substring not found"),
        ("{{ [] | first + 'x' }}", "UndefinedError: No first item, sequence was empty"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "OverflowError: Range too big"),
        ("{% set x = 'x' * 10 ** 18 %}", "MemoryError"),
        ("{% set x = 'x' * 10 ** 19 %}", "OverflowError"),
        ("{{ 'x' * (2 ** 26 + 1) }}", "the chat template writes 67108865 characters"),
        ("{% include 'other' %}", "TypeError: no loader"),
        ("{% if x %", "the chat template has a syntax error in line 1: unexpected"),
        ("a\n{% endfor %}", "the chat template has a syntax error in line 2: Encountered unknown"),
        ("{{ messages | nonsense }}", "a syntax error in line 1: No filter named 'nonsense'"),
        ("{{ raise_exception('Roles must alternate!') }}", "refuses the messages: Roles must alt"),
        ("{{ raise_exception('') }}", "the chat template refuses the messages: it gives no reason"),
        ("{{ raise_exception(nothing) }}", "refuses the messages: it gives no reason"),
        ("{% set _ = messages.append(1) %}", "SecurityError"),
        ("{{ {}['a']['b'] }}", "UndefinedError: 'dict object' has no attribute 'a'"),
        ("{{ raise_exception | tojson }}", "TypeError: Object of type function"),
        pytest.param("{{ namespace(__x=1) }}", "SecurityError", marks=newest_transformers),
        (7, "is not a text (got 7)"),
        ({"default": None}, "is not a text (got None)"),
        ("", "has no chat template"),
        ({}, "has no chat template"),
        (None, "has no chat template"),
    ],
)  # fmt: skip
def test_a_template_that_fails_is_a_request_that_cannot_be_served(template: Any, said: str) -> None:
    for tools in ([], [TOOL]):
        with pytest.raises(RequestError) as caught:
            chat_template(template).render([USER], tools)
        assert said in str(caught.value)
        assert caught.value.param == "messages"
    with pytest.raises(RequestError, match=r"chat template"):
        chat_template(template).probe()


def test_the_probe_of_a_template() -> None:
    for name, template in FAMILIES.items():
        assert chat_template(template).exists, name
        chat_template(template).probe()
    assert not chat_template(None).exists
    with pytest.raises(RequestError, match="leaves out"):
        chat_template("{{ 'always the same' }}").probe()


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ a | tojson }}", '{"n": [true, null], "s": "x\'y"}'),
        ("{{ a }}", '{"n": [true, null], "s": "x\'y"}'),
        ("{{ 'f' + a }}", 'f{"n": [true, null], "s": "x\'y"}'),
        ("{{ a if a is string else a | tojson }}", '{"n": [true, null], "s": "x\'y"}'),
        ("{{ 'f' ~ a ~ 'g' }}", 'f{"n": [true, null], "s": "x\'y"}g'),
        ("{% for k, v in a | items %}{{ k }}={{ v | tojson }};{% endfor %}",
         'n=[true, null];s="x\'y";'),
        ("{% for k, v in a.items() %}{{ k }}={{ v }};{% endfor %}", "n=[true, null];s=x'y;"),
        ("{% for k, v in a.items() %}{{ k + '=' + v + ';' }}{% endfor %}",
         "n=[true, null];s=x'y;"),
        ("{% for k in a %}{{ k }}: {{ a[k] if a[k] is string else a[k] | tojson }}\n{% endfor %}",
         "n: [true, null]\ns: x'y\n"),
        ("{% if a is mapping %}{{ a | tojson }}{% else %}{{ raise_exception('no') }}{% endif %}",
         '{"n": [true, null], "s": "x\'y"}'),
        ("{% if a is string %}{{ a }}{% else %}{{ raise_exception('no') }}{% endif %}",
         '{"n": [true, null], "s": "x\'y"}'),
    ],
)  # fmt: skip
def test_arguments_are_neither_python_nor_encoded_twice(template: str, expected: str) -> None:
    arguments = '{"n": [true, null], "s": "x\'y"}'
    for given in (arguments, json.loads(arguments)):
        text = chat_template(written(template)).render(history(given)).text
        assert f"|{expected}|" in text


@pytest.mark.parametrize("blank", ["is none", "is not defined", "== ''"])
def test_the_content_beside_calls_is_what_the_template_asks_for(blank: str) -> None:
    template = written("{{ a | tojson }}").replace(
        "{{ m.content }}", f"{{% if m.tool_calls and not m.content {blank} %}}{{{{ 1 / 0 }}}}"
        "{% endif %}{{ m.content or '' }}"
    )  # fmt: skip
    assert '|{"k": "v"}|' in chat_template(template).render(history('{"k": "v"}')).text


def test_none_is_not_written_where_text_is_empty() -> None:
    text = chat_template(written("{{ a | tojson }}")).render(history("{}")).text
    assert "None" not in text


@pytest.mark.parametrize("value", ['"\\ud83d"', "1e400", "[-1e999]"])
def test_arguments_that_json_alone_can_hold(value: str) -> None:
    """Half a character, as of an answer that was cut within an emoji; numbers beyond all floats."""
    given = f'{{"k": {value}}}'
    assert f"|f{given}|" in chat_template(written("{{ 'f' + a }}")).render(history(given)).text
    with pytest.raises(RequestError, match="is not a JSON object"):
        chat_template(written("{{ a | tojson }}")).render(history(given))


@pytest.mark.parametrize("depth", [pytest.param(900, marks=newest_transformers), 100_000])
def test_arguments_of_great_depth(depth: int) -> None:
    given = '{"k": ' * depth + "1" + "}" * depth
    with pytest.raises(RequestError, match=r"is not a JSON object|RecursionError"):
        chat_template(written("{{ a | tojson }}")).render(history(given))


SEQUENCE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.mark.parametrize(
    ("template", "messages", "lost"),
    [
        # The last messages only.
        ("{% for m in messages[-2:] %}{{ m.content }}{% endfor %}", [USER, SAID, AGAIN], 0),
        # A system message that is the first only.
        ("{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
         "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}",
         [SYSTEM, USER, SYSTEM], 2),
        # Of several users in a row the last one.
        ("{% for m in messages %}{% if loop.last or loop.nextitem.role != m.role %}"
         "{{ m.content }}{% endif %}{% endfor %}", [USER, AGAIN], 0),
        # Answers of tools.
        ("{% for m in messages if m.role != 'tool' %}{{ m.content }}{% endfor %}",
         [USER, {"role": "tool", "content": "rain", "tool_call_id": "a"}], 1),
        # Thinking of what is no answer.
        ("{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}",
         [SYSTEM, {"role": "user", "content": "What is </think>?"}], 1),
        # How long a text is tells nothing of it.
        ("{% for m in messages %}{{ m.content | length }}{% endfor %}", [USER], 0),
        # Nothing at all.
        ("Hello!", [USER], 0),
    ],
)  # fmt: skip
def test_a_message_that_is_left_out_is_named(template: str, messages: Any, lost: int) -> None:
    known = chat_template(template)
    for _ in range(2):  # found, and known
        with pytest.raises(RequestError) as caught:
            known.render(messages)
        assert caught.value.param == f"messages[{lost}]"
        assert f"role {messages[lost]['role']!r}" in str(caught.value)
        assert "leaves out" in str(caught.value)


@pytest.mark.parametrize(
    "change", ["upper", "trim", "tojson", "replace('a', '<a>')", "reverse", "urlencode", "title"]
)
def test_a_text_that_is_changed_has_reached_the_prompt(change: str) -> None:
    template = SEQUENCE.replace("m.content", f"m.content | {change}")
    assert chat_template(template).render([SYSTEM, USER, SAID, AGAIN]).text


def test_long_conversations_of_a_template_that_changes_texts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rendered = 0
    real = TemplateSource.render

    def counted(self: TemplateSource, *args: Any) -> str:
        nonlocal rendered
        rendered += 1
        return real(self, *args)

    monkeypatch.setattr(TemplateSource, "render", counted)
    template = "{% for m in messages[FROM:] %}{{ m.content | upper }}{% endfor %}"
    chat_template(template.replace("FROM", "0")).render([USER, SAID] * 500)
    assert rendered < 50
    for start, lost in (("1", 0), ("-990", 0)):
        with pytest.raises(RequestError) as caught:
            chat_template(template.replace("FROM", start)).render([USER, SAID] * 500)
        assert caught.value.param == f"messages[{lost}]"


def test_a_template_that_reads_what_is_said() -> None:
    """What it makes of other texts says nothing, so that the very messages are tried."""
    only = "{% if messages[0].content != 'ping' %}{{ raise_exception('no ping') }}{% endif %}"
    ping = {"role": "user", "content": "ping"}
    assert chat_template(only + SEQUENCE).render([ping, SAID]).text.endswith("Good day.\n")
    with pytest.raises(RequestError) as caught:
        chat_template(only + "{{ messages[0].content }}").render([ping, SAID])
    assert caught.value.param == "messages[1]"


def test_a_kind_of_conversation_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    known = chat_template(QWEN)
    known.render([SYSTEM, USER, SAID, AGAIN], [TOOL])
    rendered = 0
    real = TemplateSource.render

    def counted(self: TemplateSource, *args: Any) -> str:
        nonlocal rendered
        rendered += 1
        return real(self, *args)

    monkeypatch.setattr(TemplateSource, "render", counted)
    for text in ("one", "two", "three"):
        known.render([SYSTEM, {**USER, "content": text}, SAID, AGAIN], [TOOL, TOOL])
    assert rendered == 3
    known.render([SYSTEM, USER], [TOOL])  # another kind
    assert rendered == 5


def test_text_and_calls_that_a_template_writes_only_apart() -> None:
    one = written("{{ a | tojson }}").replace(
        "{{ m.content }}", "{{ m.content if not m.tool_calls else '' }}"
    )
    messages = history('{"k": "v"}')
    messages[1]["content"] = "I look."
    assert '|I look.||{"k": "v"}|rain|' in chat_template(one).render(messages).text
    lost = one.replace(
        "{{ m.content", "{{ raise_exception('twice') if loop.index > 3 }}{{ m.content"
    )
    with pytest.raises(RequestError) as caught:
        chat_template(lost).render(messages)
    assert caught.value.param == "messages[1]"
    assert "beside tool_calls" in str(caught.value)


@pytest.mark.parametrize("role", ["developer", "system"])
def test_a_developer_that_the_template_only_mentions(role: str) -> None:
    """One that raises, or leaves it out, does not know it."""
    raising = (
        "{% if messages[0].role == 'developer' %}{{ raise_exception('no developer') }}{% endif %}"
    )
    dropping = (
        "{% for m in messages if m.role != 'developer' %}{{ m.role }}: {{ m.content }}{% endfor %}"
    )
    for template in (raising + SEQUENCE, dropping):
        text = chat_template(template).render([{"role": role, "content": "Be kind."}, USER]).text
        assert "system: Be kind." in text


def test_content_as_parts_where_text_is_not_taken() -> None:
    parts = SEQUENCE.replace("{{ m.content }}", "{% for p in m.content %}{{ p.text }}{% endfor %}")
    assert "user: Hello you." in chat_template(parts).render([USER]).text
    strict = SEQUENCE.replace("{{ m.content }}", "{{ m.content[0]['text'] }}")
    assert "user: Hello you.\n" in chat_template(strict).render([USER]).text


TELLING = "{% if tools %}TOOLS{% endif %}"


@pytest.mark.parametrize(
    "template",
    [
        CHATML,
        CHATML + "{# tools #}",
        TELLING + CHATML,  # it is told that there are some, and not which
        {"default": CHATML, "rag": "{{ tools }}"},
        {"tool_use": CHATML, "default": QWEN},
    ],
)
def test_tools_that_do_not_reach_the_prompt_are_refused(template: Any) -> None:
    with pytest.raises(RequestError, match="does not support tools") as caught:
        chat_template(template).render([USER], [TOOL])
    assert caught.value.param == "tools"


def test_tools_that_are_told_of_in_some_conversations_only() -> None:
    template = SEQUENCE + "{% if messages[-1].role == 'user' %}{{ tools | tojson }}{% endif %}"
    assert "weather" in chat_template(template).render([USER], [TOOL]).text
    with pytest.raises(RequestError, match="does not tell the model about tools") as caught:
        chat_template(template).render([USER, SAID], [TOOL])
    assert caught.value.param == "tools"


@pytest.mark.parametrize(
    ("names", "without", "with_tools"),
    [
        (("default", "tool_use", "rag"), "default", "tool_use"),
        (("default", "rag"), "default", "default"),
        (("tool_use", "rag"), "tool_use", "tool_use"),
        (("rag",), "rag", "rag"),
    ],
)
def test_which_of_several_templates_is_taken(
    names: tuple[str, ...], without: str, with_tools: str
) -> None:
    several = chat_template({name: name + SEQUENCE + "{{ tools }}" for name in names})
    assert several.render([USER]).text.startswith(without)
    assert several.render([USER], [TOOL]).text.startswith(with_tools)


def test_several_templates_of_which_none_fits() -> None:
    with pytest.raises(RequestError, match=r"has the chat templates \['rag', 'summary'\]"):
        chat_template({"summary": SEQUENCE, "rag": SEQUENCE}).render([USER])


@pytest.mark.parametrize("jinja_files", [True, False])
@pytest.mark.parametrize("names", [("default", "tool_use"), ("tool_use", "rag"), ("tool_use",)])
def test_several_templates_of_a_folder(
    tmp_path: Path, names: tuple[str, ...], jinja_files: bool
) -> None:
    """As files of their own, and as a list in tokenizer_config.json."""
    tokenizer = tokenizer_with({name: name + SEQUENCE + "{{ tools }}" for name in names})
    tokenizer.save_pretrained(tmp_path, save_jinja_files=jinja_files)
    assert (tmp_path / "additional_chat_templates" / "tool_use.jinja").exists() is jinja_files
    loaded = chat_template(AutoTokenizer.from_pretrained(tmp_path).chat_template)
    assert loaded.render([USER]).text.startswith(names[0])
    assert loaded.render([USER], [TOOL]).text.startswith("tool_use")


@pytest.mark.parametrize(
    ("template", "thinking"),
    [
        ("{{ '<think>' }}", Thinking(opened=True)),
        ("{{ '<think>\n\n</think>' }}", Thinking()),
        ("{{ '[THINK]' if deep else '' }}{# [/THINK] #}", Thinking("[THINK]", "[/THINK]")),
        ("<|START_THINKING|>{# <|END_THINKING|> #}",
         Thinking("<|START_THINKING|>", "<|END_THINKING|>", opened=True)),
        ("assistant", None),
    ],
)  # fmt: skip
def test_the_marks_of_thinking(template: str, thinking: Thinking | None) -> None:
    ends = "{# </think> #}" if "think>" in template else ""
    assert chat_template(SEQUENCE + ends + template).render([USER]).thinking == thinking


def test_thinking_that_is_opened_by_what_a_message_says() -> None:
    """As Nemotron's templates do; requests of one kind differ in it."""
    ends = "{{ '<think></think>' if '/no_think' in messages[0].content else '<think>\n' }}"
    template = chat_template(SEQUENCE + ends)
    for text, opened in (("Hi.", True), ("Hi. /no_think", False), ("What is <think>?", True)):
        found = template.render([{"role": "user", "content": text}])
        assert found.thinking == Thinking(opened=opened), found.text


def served(template: str, prompt_tokens: int = 50) -> ServedModel:
    limits = RequestLimits(
        max_prompt_tokens=prompt_tokens, max_total_tokens=64, max_requests=1, vocab_size=320
    )

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError

    return ServedModel("m", tokenizer_with(template), limits, never)


def test_a_prompt_that_is_far_too_long_is_not_encoded() -> None:
    model = served("{{ messages[0].content * 100000 }}")
    with pytest.raises(RequestError, match=r"messages has 1000000 characters"):
        asyncio.run(model.encode_chat([USER]))


def test_options_and_thinking_pass_through_the_served_model() -> None:
    model = served(SEQUENCE + "{{ '<think>' if deep else '</think>' }}")
    assert asyncio.run(model.encode_chat([USER])).thinking == Thinking()
    deep = asyncio.run(model.encode_chat([USER], options={"deep": True}))
    assert deep.thinking == Thinking(opened=True)
