"""`--device mock`: a cluster at a GPU's pace whose every token is known in advance."""

import asyncio
import json
import re
import subprocess
import threading

import pytest

from cluster import BATON, ROOT, SLOWER, Cluster, stream, wait

MASK = (1 << 64) - 1
SEED = 0x1234567890abcdef
FAST = {"decode_ms": [[1, 3], [32, 5]], "verify_row_ms": [[1, 0.05]], "draft_ms": [[1, 0.2]], "prefill_chunk_ms": 2}
DRAFTS = ("--mtp-step", "2", "--mtp-simulate-acceptance", "0.7")


def mix(x):
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9 & MASK
    x = (x ^ x >> 27) * 0x94d049bb133111eb & MASK
    return x ^ x >> 31


def token(seed, position):
    """engine.h: mock_token, of the demo model's 3000 ids that are text."""
    return (mix(seed + position * 0x9e3779b97f4a7c15 & MASK) >> 32) * 3000 >> 32


@pytest.fixture
def mock(tmp_path):
    clusters = []

    def begin(*flags, costs=FAST, **kw):
        file = tmp_path / "costs.json"
        file.write_text(json.dumps(costs))
        clusters.append(Cluster("--device", "mock", "--mock-costs", file, *flags, **kw).ready())
        return clusters[-1]

    yield begin
    for c in clusters:
        c.close()


def ask(c, n):
    status, _, body = c.post("/generate", {"inputs": "Tell me a story.", "parameters": {
        "max_new_tokens": n, "seed": SEED % 2**63, "ignore_eos": True, "return_details": True}})
    assert status == 200, body
    want = [token(SEED % 2**63, body["prompt_tokens"] + i) for i in range(n)]
    assert [t["id"] for t in body["tokens"]] == want


@pytest.mark.parametrize("flags", [(), DRAFTS, (*DRAFTS, "--mtp-mode", "vanilla_with_att", "--kv-transport", "tcp")])
def test_tokens_are_known(mock, flags):
    c = mock(*flags, "--chunked-prefill-size", 7)
    for n in (1, 2, 150):
        ask(c, n)
    c.wait_idle()


@pytest.mark.parametrize("accepted, row_ms, low, high", [(0, 3, 0, 1), (0.95, 0.05, 3, 4)])
def test_drafts_are_as_many_as_pay(mock, accepted, row_ms, low, high):
    """The mock's own drafts are never right; a coin makes them so."""
    c = mock("--mtp-step", "auto", "--mtp-simulate-acceptance", accepted,
             costs={**FAST, "verify_row_ms": [[1, row_ms]]})
    for _ in range(3):
        ask(c, 300)

    def chosen():
        return int(re.search(r"^baton_mtp_step\{.*\} (\d+)$", c.get("/metrics")[2], re.M).group(1))

    wait(lambda: low <= chosen() <= high, 5, f"{low} to {high} drafts", c.log)
    c.wait_idle()


def test_same_text_after_a_worker_died(mock):
    c = mock(*DRAFTS, decode=2, costs={**FAST, "decode_ms": [[1, 20]]})
    errors = []

    def run():
        try:
            ask(c, 120)
        except AssertionError as e:
            errors.append(e)

    asked = threading.Thread(target=run)
    asked.start()
    busy = wait(lambda: [w for w in ("decode-0", "decode-1") if c.accounting(w)["requests"].get("running")], 5,
                "a decode worker runs the request", c.log)[0]
    c.kill(busy)
    asked.join()
    assert not errors, errors
    assert re.search(r"^baton_resumed_streams_total(\{.*\})? 1$", c.get("/metrics")[2], re.M)
    c.wait_idle(10)


class Streams:
    """Requests in threads of their own: what each has so far can be looked at."""

    def __init__(self, cluster):
        self.cluster = cluster
        self.threads = []

    def begin(self, n, **kw):
        seen = []
        body = {"inputs": "Tell me a story.", "parameters": {"max_new_tokens": n, "ignore_eos": True}}
        run = stream(self.cluster, "/generate_stream", body, on_event=lambda a: seen.append(a.events[-1]), **kw)
        self.threads.append(threading.Thread(target=asyncio.run, args=(run,)))
        self.threads[-1].start()
        return seen

    def join(self):
        for t in self.threads:
            t.join()


def test_the_next_step_has_who_came_during_this_one(mock):
    c = mock(costs={**FAST, "decode_ms": [[1, 800]]})
    s = Streams(c)
    first = s.begin(8, leave_after=6)
    wait(lambda: len(first) >= 2, 10, "a step of the first stream", c.log)
    second = s.begin(3)
    wait(lambda: second, 10, "the second stream's first token", c.log)
    steps = len(first)
    wait(lambda: c.accounting("decode-0")["requests"]["running"] == 2, 10, "its pages are there", c.log)
    assert len(first) == steps, "the handoff waited for the step"
    s.join()
    c.wait_idle(5)


def test_mail_is_read_while_a_chunk_computes(mock):
    c = mock("--prefix-cache", "off", costs={**FAST, "prefill_chunk_ms": 800})
    s = Streams(c)
    s.begin(2)
    wait(lambda: c.accounting("prefill-0")["requests"]["computing"] == 1, 10, "a chunk", c.log)
    s.begin(2, leave_after=0)
    s.begin(2)
    wait(lambda: c.accounting("prefill-0")["requests"] == {"queued": 1, "computing": 1, "handoff": 0}, 10,
         "one more prompt in the queue, and one that came and went", c.log)
    s.join()
    c.wait_idle(5)


def test_clients_leave_while_their_prompts_compute(mock):
    c = mock(*DRAFTS, costs={**FAST, "decode_ms": [[1, 100]], "prefill_chunk_ms": 100})
    s = Streams(c)
    for i in range(30):
        s.begin(20, leave_after=i % 4)
    s.join()
    c.wait_idle(10)
    ask(c, 10)


def test_the_four_workloads(mock, tmp_path):
    c = mock(*DRAFTS, prefill=2, decode=2)
    for name, flags in (("burst", ("--num-prompts", 100)),
                        ("high-conc", ("--num-prompts", 100, "--max-concurrency", 25)),
                        ("moderate", ("--num-prompts", 40, "--request-rate", 100)),
                        ("steady", ("--num-prompts", 40, "--request-rate", 50))):
        out = tmp_path / f"{name}.json"
        r = subprocess.run([str(a) for a in (BATON, "bench", "--url", c.url, "--workload", name, *flags, "--input-len",
                            "lognormal:100:0.9:4:400", "--output-len", "lognormal:30:0.9:4:100", "--progress", "off",
                            "--json", out)], capture_output=True, text=True, timeout=60 * SLOWER, cwd=ROOT)
        assert r.returncode == 0, r.stderr
        run = json.loads(out.read_text())
        assert run["summary"]["failed"] == 0
        assert all(x["output_tokens"] == x["wanted_tokens"] for x in run["requests"])
    c.wait_idle(5)
    assert all(c.accounting(w)["pages"]["total"] == 16384 for w in c.workers)  # 1048576 tokens


@pytest.mark.parametrize("flags, says", [
    (("--device", "mock", "--mock-costs", "/nonexistent.json"), "/nonexistent.json"),
    (("--mock-costs", "x.json"), "--mock-costs x.json is for --device mock"),
])
def test_wrong_settings(tmp_path, flags, says):
    r = subprocess.run([str(a) for a in (BATON.parents[1] / "decode_worker" / "baton-decode", "--model-dir",
                        ROOT / "deploy" / "demo-model", "--router-endpoint", f"ipc://{tmp_path}/r", *flags)],
                       capture_output=True, text=True, timeout=20 * SLOWER)
    assert r.returncode != 0 and says in r.stdout + r.stderr
