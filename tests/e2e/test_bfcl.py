"""tests/bench/bfcl.py against an endpoint that knows which answers are right, with the package's data and
checker."""

import asyncio
import json
import re
import subprocess
import sys

import pytest

from cluster import ROOT, SLOWER
from test_bench import Thread

VERSION = "2026.3.23"
PACKAGE = ROOT / ".cache" / f"bfcl-eval-{VERSION}"
LIMIT = 20


@pytest.fixture(scope="module")
def data():
    """The package without its dependencies, kept between runs."""
    if not (PACKAGE / "bfcl_eval").exists():
        r = subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps",
                            "--target", PACKAGE, f"bfcl-eval=={VERSION}"], capture_output=True, text=True)
        if r.returncode:
            pytest.skip(f"bfcl-eval cannot be installed: {r.stderr[-200:]}")
    return PACKAGE / "bfcl_eval" / "data"


def pick(value):
    """The first of the possible values, all the way down; "" as the first means that it may be left out."""
    if isinstance(value, dict):
        return {k: pick(v[0]) for k, v in value.items() if v[0] != ""}
    if isinstance(value, list):
        return [pick(v) for v in value]
    return value


def right_calls(truth):
    return [(re.sub(r"\.", "_", name), pick(args)) for call in truth for name, args in call.items()]


def as_java(value):
    return value if isinstance(value, str) else json.dumps(value)


class Oracle:
    """Answers by the question: of every four, the first right, then a wrong value, no call, a broken call."""

    def __init__(self, answers, failing):
        self.answers, self.failing, self.in_flight, self.most = answers, failing, 0, 0

    async def start(self):
        self.server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        return self.server.sockets[0].getsockname()[1]

    async def _connection(self, reader, writer):
        line, length = await reader.readline(), 0
        while (header := (await reader.readline()).strip()):
            if header.lower().startswith(b"content-length:"):
                length = int(header.split(b":")[1])
        body = json.loads(await reader.readexactly(length)) if length else None
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        await asyncio.sleep(0)
        status, value = (200, {"data": [{"id": "oracle"}]}) if body is None else self._answer(body)
        data = json.dumps(value).encode()
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
        self.in_flight -= 1
        writer.close()

    def _answer(self, body):
        assert body["model"] == "oracle" and all(re.fullmatch(r"[\w-]+", t["function"]["name"]) and
                                                 t["function"]["parameters"]["type"] == "object"
                                                 for t in body["tools"])
        key = json.dumps(body["messages"])
        if key in self.failing:
            return 500, {"error": {"message": "told to fail"}}
        calls, i = self.answers[key]
        calls = [{"id": "c", "type": "function", "function": {"name": n, "arguments": json.dumps(a)}}
                 for n, a in calls]
        if i % 4 == 1 and calls:
            wrong = json.loads(calls[0]["function"]["arguments"])
            wrong[next(iter(wrong))] = {"no": "such value"}
            calls[0]["function"]["arguments"] = json.dumps(wrong)
        elif i % 4 == 2:
            calls = []
        elif i % 4 == 3 and calls:
            calls[0]["function"]["arguments"] = '{"cut'
        return 200, {"choices": [{"message": {"role": "assistant", "content": None, "tool_calls": calls}}]}


@pytest.mark.parametrize("category", ["simple", "multiple", "parallel", "parallel_multiple", "java", "live_simple",
                                      "sql", "irrelevance"])
def test_right_and_wrong_answers(data, tmp_path, category):
    sys.path[:0] = [str(PACKAGE), str(ROOT / "tests" / "bench")]
    try:
        import bfcl
    finally:
        del sys.path[:2]
    entries = bfcl.load_category(data, category)[:LIMIT]
    answers = {}
    for i, (entry, truth) in enumerate(entries):
        q = entry["question"]
        calls = right_calls(truth) if truth else [("a", {"b": 1})] if i % 4 == 0 else []
        if category == "java":
            calls = [(n, {k: as_java(v) for k, v in a.items()}) for n, a in calls]
        answers[json.dumps(q[0] if isinstance(q[0], list) else q)] = calls, i
    assert len(answers) == LIMIT
    failing = [list(answers)[0]] if category == "simple" else []
    oracle = Oracle(answers, failing)
    out = tmp_path / "out.json"
    with Thread(oracle.start) as t:
        r = subprocess.run([sys.executable, ROOT / "tests/bench/bfcl.py", "--url", t.url, "--categories", category,
                            "--limit", str(LIMIT), "--concurrency", "3", "--out", out], capture_output=True,
                           text=True, env={"PYTHONPATH": str(PACKAGE)}, timeout=60 * SLOWER)
    assert r.returncode == (1 if failing else 0), r.stdout + r.stderr
    results = json.loads(out.read_text())
    want = {i for i in range(LIMIT) if (i % 4 == 0) != (category == "irrelevance")} - ({0} if failing else set())
    got = {i for i, x in enumerate(results["results"]) if x["right"]}
    assert got == want, [x for i, x in enumerate(results["results"]) if i in got ^ want]
    assert results["table"]["overall"] == [len(want), LIMIT, len(failing)]
    assert f"{100 * len(want) / LIMIT:.2f}" in r.stdout and f"{bfcl.PUBLISHED[category]:.2f}" in r.stdout
    assert oracle.most <= 3
