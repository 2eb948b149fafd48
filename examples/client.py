"""Score candidates against a running server. In another terminal: `mtserve serve --model tiny`."""

from __future__ import annotations

import argparse

import numpy as np

from mtserve.server.client import Client, Scores


def show(title: str, answer: Scores) -> None:
    print(
        f"{title}: {answer.encoded_tokens} of {answer.prefix_tokens} prefix tokens encoded, {answer.position} behaviours"
    )
    for row, scores in enumerate(answer.scores):
        print(f"  candidate {row}: " + ", ".join(f"{t} {s:.4f}" for t, s in zip(answer.tasks, scores, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="127.0.0.1:50051", help="HOST:PORT of the server")
    target = parser.parse_args().target
    rng = np.random.default_rng(0)
    history = {
        "time_ms": 1_700_000_000_000 + np.arange(120) * 60_000,
        "item": rng.integers(0, 100_000, 120),
        "category": rng.integers(0, 1000, 120),
        "action": rng.integers(0, 8, 120),
        "dwell": rng.random((120, 1)),
    }
    candidates = {
        "item": rng.integers(0, 100_000, 5),
        "category": rng.integers(0, 1000, 5),
        "affinity": rng.random((5, 4)),
    }
    click = {"time_ms": [1_700_010_000_000], "item": candidates["item"][:1], "action": [1], "dwell": [[0.9]]}

    with Client(target) as client:
        client.put_user("alice", {"segment": 7, "country": 49, "activity": [0.3, 1.2]}, history)
        show("first request", client.score("alice", candidates, context={"surface": 2}))
        show("same user again", client.score("alice", candidates, context={"surface": 2}))
        show("after one click", client.score("alice", candidates, context={"surface": 2}, append=click))


if __name__ == "__main__":
    main()
