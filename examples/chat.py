"""Stream an answer from a running cluster.

python examples/chat.py [NAME]
"""

from __future__ import annotations

import sys

import moesaic


def main(name: str = "local") -> None:
    cluster = moesaic.connect(name)
    with moesaic.Client(cluster.url) as client:
        model = client.models()[0].id
        for chunk in client.stream_chat("What is a mosaic?", model=model, max_tokens=40):
            print(chunk.text, end="", flush=True)
    print()


if __name__ == "__main__":
    main(*sys.argv[1:])
