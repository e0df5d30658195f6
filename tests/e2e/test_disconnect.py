"""Clients leave at any moment; the others must not notice and nothing may stay behind."""

import asyncio
import json
import random
import time

from cluster import SLOWER, stream

N = 300 if SLOWER == 1 else 100  # sanitized builds have to end, too
SEED = 20


def body(i):
    return {"model": "demo-model", "stream": True, "temperature": 1.0, "seed": i, "max_tokens": 24 + i % 40,
            "ignore_eos": True, "prompt": f"[gMASK]<sop><|user|>Tell me a story about a fox. {i}<|assistant|></think>"}


def test_half_of_many_leave(start):
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    cluster = start("--mtp-step", "2", "--max-total-token-num", "131072")

    async def run():
        leave = [rng.choice([0, 0, 1, 2, 3, 5, 8, 13]) if i % 2 else None for i in range(N)]
        return await asyncio.gather(*(stream(cluster, "/v1/completions", body(i), leave_after=leave[i],
                                             timeout=150) for i in range(N)))

    answers = asyncio.run(run())
    ended = time.monotonic()
    stayed = [a for i, a in enumerate(answers) if i % 2 == 0]
    for a in stayed:
        assert a.error is None and a.done and a.whole, (a.status, a.error, a.body[-300:])
        assert a.finish_reason == "length"
    assert all(a.left for i, a in enumerate(answers) if i % 2)
    cluster.wait_idle(2)
    cluster.wait_connections_closed(2)
    print(f"idle {time.monotonic() - ended:.2f} s after the last answer")


def test_leaving_frees_at_once(start):
    """A long stream, left after its third token: its pages are free within half a second, although
    it had thousands of tokens to go."""
    cluster = start("--mtp-step", "2")
    long = {**body(1), "max_tokens": 3000}

    async def run():
        return await stream(cluster, "/v1/completions", long, leave_after=3)

    for _ in range(5):
        assert asyncio.run(run()).left
        cluster.wait_idle(0.5 * SLOWER)


def test_leaving_a_whole_answer(start):
    """The same for a client that did not ask for a stream: it hangs up while waiting."""
    cluster = start("--mtp-step", "2")
    long = {**body(1), "max_tokens": 3000, "stream": False}

    async def run():
        reader, writer = await asyncio.open_connection(cluster.host, cluster.port)
        data = json.dumps(long).encode()
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                     b"Content-Length: %d\r\n\r\n" % len(data) + data)
        await writer.drain()
        deadline = time.monotonic() + 5 * SLOWER
        while not cluster.not_idle() and time.monotonic() < deadline:
            await asyncio.sleep(0.002)
        writer.close()

    asyncio.run(run())
    cluster.wait_idle(0.5 * SLOWER)
