"""Use the `openai` library with a cluster's endpoint.

pip install openai
python examples/openai_client.py [NAME]
"""

from __future__ import annotations

import sys

from openai import OpenAI

import moesaic


def main(name: str = "local") -> None:
    cluster = moesaic.connect(name)
    # The endpoint asks for no key; the library insists on one.
    client = OpenAI(base_url=f"{cluster.url}/v1", api_key="none")
    model = next(iter(client.models.list())).id
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "What is a mosaic?"}],
        max_tokens=40,
    )
    print(answer.choices[0].message.content)
    print(f"{answer.usage.completion_tokens if answer.usage else 0} tokens")


if __name__ == "__main__":
    main(*sys.argv[1:])
