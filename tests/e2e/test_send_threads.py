"""`--send-threads`: steps of many streams, sent by several threads of the router. Each client gets its own text, whatever
the others do."""

import asyncio
import json
import pathlib
import random
import socket

from cluster import SLOWER, stream
from test_mock import token

N = 160 if SLOWER == 1 else 100  # a step of 64 is what wakes the threads
TOKENS = 120
SEED = 5
FLAGS = ("--device", "mock", "--running-max-req-size", "256", "--max-client-buffer", 16 << 20)


def body(i):
    return {"inputs": "Tell me a story.", "parameters": {"max_new_tokens": TOKENS, "seed": 1000 + i, "ignore_eos": True}}


def long_body(i):
    """Events of kilobytes."""
    return {"messages": [{"role": "user", "content": "Tell me a story."}], "stream": True, "seed": i, "max_tokens": TOKENS,
            "ignore_eos": True, "logprobs": True, "top_logprobs": 20}


def senders_cpu_ns(c):
    tasks = pathlib.Path(f"/proc/{c.pid('router')}/task").iterdir()
    return {name: int((t / "schedstat").read_text().split()[0]) for t in tasks
            if (name := (t / "comm").read_text().strip()).startswith("send/")}


class Sleepy:
    """A client that asks and then reads nothing until it is told to, through a small window."""

    def __init__(self, c, i):
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.connect((c.host, c.port))
        data = json.dumps(long_body(i)).encode()
        self.socket.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                            b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(data) + data)

    def read(self):
        """The text, without checking HTTP: what is in order and whole parses."""
        self.socket.settimeout(60 * SLOWER)
        answer = b""
        while part := self.socket.recv(1 << 20):
            answer += part
        self.socket.close()
        head, chunks = answer.split(b"\r\n\r\n", 1)
        assert b" 200 " in head.splitlines()[0] and answer.endswith(b"\r\n0\r\n\r\n")
        text = b""
        while chunks != b"0\r\n\r\n":
            size, rest = chunks.split(b"\r\n", 1)
            n = int(size, 16)
            assert rest[n:n + 2] == b"\r\n"
            text, chunks = text + rest[:n], rest[n + 2:]
        events = [e.removeprefix(b"data: ") for e in text.split(b"\n\n")]
        assert events[-2:] == [b"[DONE]", b""]
        return said([json.loads(e) for e in events[:-2]])


def said(events):
    return "".join(c["delta"].get("content") or c["delta"].get("reasoning_content") or ""
                   for e in events for c in e["choices"])


def test_each_client_gets_its_own(start, tmp_path):
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    costs = tmp_path / "costs.json"
    costs.write_text(json.dumps({"decode_ms": [[1, 20 * SLOWER]], "verify_row_ms": [[1, 0]], "prefill_chunk_ms": 5}))
    c = start(*FLAGS, "--send-threads", 3, "--mock-costs", costs)
    before = senders_cpu_ns(c)
    assert sorted(before) == ["send/1", "send/2"]
    sleepy = [Sleepy(c, i) for i in range(10)]
    leave = [rng.randrange(1, TOKENS) if i % 4 == 0 else None for i in range(N)]

    async def run():
        return await asyncio.gather(*(stream(c, "/generate_stream", body(i), leave_after=leave[i]) for i in range(N)),
                                    stream(c, "/v1/chat/completions", long_body(0)))

    *answers, reference = asyncio.run(run())
    first = c.post("/generate", body(0))[2]["prompt_tokens"]
    for i, a in enumerate(answers):
        want = [token(1000 + i, first + k) for k in range(TOKENS)]
        assert a.error is None, a.error
        assert a.ids == (want if leave[i] is None else want[:len(a.ids)]), i
        assert a.left if leave[i] is not None else a.whole
    texts = [s.read() for s in sleepy]
    assert reference.whole and reference.done and texts[0] == said(reference.events) and len(texts[0]) > TOKENS
    assert len(set(texts)) == len(texts)
    after = senders_cpu_ns(c)
    assert all(after[name] > before[name] + 100_000 for name in before), (before, after)
    c.wait_idle(5)
    c.wait_connections_closed(5)
    c.broken = True  # no admin sockets from here on
    assert c.stop() == 0
