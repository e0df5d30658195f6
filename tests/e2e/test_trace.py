"""--trace-file: a line per finished request, and `baton trace` on it."""

import asyncio
import json
import re
import signal
import subprocess

import pytest

from cluster import BATON, gather, stream, wait

CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "What is a secret dog?"}], "temperature": 0, "stream": True,
       "chat_template_kwargs": {"enable_thinking": False}}
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
ORDER = ["queued", "placed", "prefill_start", "prefill_end", "first_token", "handoff", "last_token", "end"]


def read(path):
    return [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []


def wait_lines(path, n, cluster):
    return wait(lambda: len(read(path)) >= n and read(path), 5, f"{n} lines in {path}", cluster.log)


def test_trace(start, tmp_path):
    path = tmp_path / "trace.jsonl"
    c = start("--trace-file", path, "--mtp-step", 2, "--access-log", "on", "--log-level", "debug")
    a, = gather(c, CHAT, [ASK], headers={"X-Request-Id": "find-me", "traceparent": f"00-{TRACE}-{PARENT}-01"})
    version, trace, span, flags = a.headers["traceparent"].split("-")
    assert (version, trace, flags) == ("00", TRACE, "01") and re.fullmatch("[0-9a-f]{16}", span) and span != PARENT
    line, = wait_lines(path, 1, c)
    assert (line["request"], line["trace"], line["parent"], line["span"]) == ("find-me", TRACE, PARENT, span)
    assert (line["prefill"], line["decode"], line["finish"]) == ("prefill/0", "decode/0", "stop")
    assert (line["choice"], line["n"], line["attempts"], line["prompt"]) == (0, 1, 1, 13)
    assert line["output"] == line["accepted"] + line["steps"] + 1  # the first token is the prefill worker's
    assert line["accepted"] > 0
    times = [line["at_us"][k] for k in ORDER]
    assert times == sorted(times) and list(line["at_us"]) == ORDER
    # The same names in the logs, and in no place what was said.
    log = wait(lambda: f"trace={TRACE}" in c.log() and c.log(), 5, "the access log has the trace", c.log)
    assert re.search(rf"req=find-me gen={line['gen']} trace={TRACE} choice=0 started", log)
    assert re.search(rf"access req=find-me .* ms=\d+ trace={TRACE}$", log, re.M)
    assert f"req={line['gen']} " in log
    assert "secret" not in path.read_text() and "genus" not in path.read_text()

    # A client that leaves, two choices, and a traceparent that is none.
    asyncio.run(stream(c, CHAT, {**ASK, "ignore_eos": True, "max_tokens": 3000}, leave_after=3))
    b, = gather(c, CHAT, [{**ASK, "n": 2}], headers={"traceparent": "00-no-no-01"})
    assert b.error is None and "traceparent" not in b.headers
    lines = wait_lines(path, 4, c)
    left = next(x for x in lines if x["finish"] == "abort")
    assert left["output"] > 0 and left["at_us"]["first_token"] <= left["at_us"]["end"] and "trace" not in left
    assert sorted((x["choice"], x["n"]) for x in lines[1:] if x is not left) == [(0, 2), (1, 2)]

    # Rotation, as logrotate does it.
    path.rename(tmp_path / "old")
    c.kill("router", signal.SIGHUP)
    wait(path.exists, 5, "the file is there again", c.log)
    gather(c, CHAT, [ASK])
    wait_lines(path, 1, c)
    assert len(read(tmp_path / "old")) == 4

    out = tmp_path / "out.json"
    r = subprocess.run([BATON, "trace", tmp_path / "old", out], capture_output=True, text=True)
    assert r.returncode == 0 and r.stderr == "4 requests in 3 processes\n"
    events = json.loads(out.read_text())["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    assert sorted(names.values()) == ["decode/0", "prefill/0", "router"]
    spans = [e for e in events if e["ph"] == "X"]
    for stage, where in [("parse", "router"), ("queue", "router"), ("stream", "router"), ("prefill", "prefill/0"),
                         ("handoff", "decode/0"), ("decode", "decode/0")]:
        assert [names[e["pid"]] for e in spans if e["name"] == stage] == [where] * 4, stage
    # On one track, spans follow each other or lie within each other.
    for track in {(e["pid"], e["tid"]) for e in spans}:
        stack = []
        for e in sorted((e for e in spans if (e["pid"], e["tid"]) == track), key=lambda e: (e["ts"], -e["dur"])):
            while stack and stack[-1] <= e["ts"]:
                stack.pop()
            assert not stack or e["ts"] + e["dur"] <= stack[-1], e
            stack.append(e["ts"] + e["dur"])


def test_a_request_that_moved(start, tmp_path):
    """Its line is of the attempt that ended it, except for the first token, which came once."""
    path = tmp_path / "trace.jsonl"
    c = start("--trace-file", path, decode=2)
    died = []

    def on_event(a):
        if len(a.events) == 20:
            name = next(x for x in ("decode-0", "decode-1") if any(c.accounting(x)["requests"].values()))
            died.append(name.replace("-", "/"))
            c.kill(name)

    a = asyncio.run(stream(c, CHAT, {**ASK, "ignore_eos": True, "max_tokens": 400}, on_event=on_event))
    assert a.error is None and died
    line, = wait_lines(path, 1, c)
    assert line["attempts"] == 2 and line["output"] == 400 and line["decode"] not in died
    assert line["at_us"]["first_token"] < line["at_us"]["placed"] < line["at_us"]["handoff"]
    r = subprocess.run([BATON, "trace", path], capture_output=True, text=True)
    assert r.returncode == 0 and json.loads(r.stdout)["traceEvents"]


@pytest.mark.parametrize("arguments, code, says", [
    ((), 2, "usage: baton trace"), (("a", "b", "c"), 2, "usage"), (("--help",), 2, "usage"),
    (("/nonexistent",), 1, "/nonexistent"), (("/dev/null", "/nonexistent/out"), 1, "/nonexistent/out"),
    (("/proc/version",), 1, "/proc/version:1"), (("/dev/null",), 0, "0 requests"),
])
def test_command(arguments, code, says):
    r = subprocess.run([BATON, "trace", *arguments], capture_output=True, text=True)
    assert r.returncode == code and says in r.stderr


def test_a_file_that_cannot_be(start):
    c = start("--trace-file", "/nonexistent/trace", wait=False)
    wait(lambda: c.process.poll() is not None or "/nonexistent/trace" in c.log(), 10, "the start fails", c.log)
    assert "--trace-file /nonexistent/trace: No such file" in c.log()
