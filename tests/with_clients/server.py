"""The endpoint over models that need no pool: a process of its own for the tests of client
libraries, which live in another environment.

    python -m tests.with_clients.server

prints its address, and ends when its standard input does.
"""

from __future__ import annotations

import itertools
import re
import socket
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Sequence

import uvicorn

from moesaic.actors.endpoint.ingress import create_app
from moesaic.actors.endpoint.model_names import ModelNames
from moesaic.actors.engine.engine import Delta, EngineConfig, Generate, RequestLimits, Sampling
from moesaic.actors.engine.served_model import ServedModel
from moesaic.actors.engine.transformers_backend.engine import TransformersEngine
from moesaic.proto.errors import Busy, ExpertUnavailable, MoesaicError
from tests.helpers.endpoint.service import BODIES, tool_tokenizer
from tests.helpers.models.tiny import tiny_mixtral

TOKENIZER = tool_tokenizer()
END = 2  # <|im_end|>
LIMITS = RequestLimits(
    max_prompt_tokens=3000, max_total_tokens=4000, max_requests=16, vocab_size=320
)


def calls(*cities: str) -> str:
    return "\n".join(
        f'<tool_call>\n{{"name": "get_weather", "arguments": {{"city": "{city}"}}}}\n</tool_call>'
        for city in cities
    )


# What the last message says, and what is answered.
SCRIPT: list[tuple[str, Callable[[re.Match[str]], str]]] = [
    (r"^tool\n(.*)", lambda said: f"The tool says: {said[1]}"),
    (r"weather in (\w+) and (\w+)", lambda said: "Both. " + calls(said[1], said[2])),
    (r"weather in (\w+)", lambda said: "Let me look. " + calls(said[1])),
    (r"describe (\w+)", lambda said: f'{{"name": "{said[1]}", "people": 1086000}}'),
    (r"repeat (.*)", lambda said: said[1]),
    (r"", lambda said: "Grüße 🙂, this is the script. 日本語 too."),
]


def answer_to(prompt: str) -> str:
    # The template's last part begins the answer; a prompt without a template is the message.
    parts = prompt.split("<|im_start|>")
    said = (parts[-2] if len(parts) > 1 else prompt).removesuffix("\n").removesuffix("<|im_end|>")
    for pattern, answer in SCRIPT:
        found = re.search(pattern, said, re.DOTALL)
        if found is not None:
            return answer(found)
    raise AssertionError("the last pattern is found everywhere")


async def scripted(
    request_id: str,
    prompt_ids: Sequence[int],
    sampling: Sampling,
    already: Sequence[int] = (),
) -> AsyncGenerator[Delta, None]:
    """The script as a model: knows no grammar, and gives no log-probabilities."""
    prompt = str(TOKENIZER.decode(list(prompt_ids), skip_special_tokens=False))
    ids = TOKENIZER(answer_to(prompt)).input_ids
    for n, token_id in enumerate(ids):
        if n + 1 == sampling.max_tokens:
            yield Delta((token_id,), "length")
            return
        yield Delta((token_id,))
        if "then break" in prompt and n == 5:
            raise ExpertUnavailable("expert org/broken/1/2 has no replica")
    yield Delta((), "stop")


def refusing(error: MoesaicError) -> Generate:
    async def generate(
        request_id: str,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        already: Sequence[int] = (),
    ) -> AsyncGenerator[Delta, None]:
        raise error
        yield

    return generate


BUSY = refusing(Busy("256 requests wait"))
LOST = refusing(ExpertUnavailable("expert org/lost/1/2 has no replica"))


def busy_at_first() -> Generate:
    """Every other request is refused: what is sent again is answered."""
    turns = itertools.cycle((BUSY, scripted))

    def generate(
        request_id: str,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        already: Sequence[int] = (),
    ) -> AsyncGenerator[Delta, None]:
        return next(turns)(request_id, prompt_ids, sampling, already)

    return generate


def main() -> None:
    engine = TransformersEngine(
        tiny_mixtral(max_positions=4096, eos_token_id=END),
        config=EngineConfig(num_blocks=256),
        tokenizer=tool_tokenizer,
    )
    engine.start()
    served = {
        # Random, and keeps to grammars.
        "org/tiny": ServedModel(
            "org/tiny", TOKENIZER, engine.limits, engine.generate, engine.embed
        ),
        "org/scripted": ServedModel("org/scripted", TOKENIZER, LIMITS, scripted),
        "busy": ServedModel("busy", TOKENIZER, LIMITS, BUSY),
        "busy-at-first": ServedModel("busy-at-first", TOKENIZER, LIMITS, busy_at_first()),
        "lost": ServedModel("lost", TOKENIZER, LIMITS, LOST),
    }
    app = create_app(
        models=ModelNames(served, {"org/scripted": ["scripted"], "org/tiny": ["tiny"]}),
        bodies=BODIES,
    )
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()  # what connects from now on waits for the server
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
        sys.stdin.read()
        server.should_exit = True
        thread.join()
    engine.close()


if __name__ == "__main__":
    main()
