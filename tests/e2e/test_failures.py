"""Processes die; clients get the text they would have got, or an explicit error, and never wait.

Every client must end in one of two ways: the complete fault-free text, or a prefix of it followed by
an error that says so. The launcher restarts what died, and new requests work.
"""

import asyncio
import os
import signal
import time

import pytest

from cluster import SLOWER, gather, stream, wait

N = 24
N_TOKENS = 120
END_WITHIN_S = 5  # after the fault, for those whose answer breaks


def body(i):
    story = ["fox", "owl", "cat", "dog", "horse", "bear", "goat", "mouse"][i % 8]
    return {"inputs": f"[gMASK]<sop><|user|>Tell me a story about a {story}.<|assistant|></think>",
            "parameters": {"max_new_tokens": N_TOKENS, "return_details": True, "do_sample": True,
                           "temperature": 1.0, "top_p": 0.95, "seed": i, "ignore_eos": True}}


BODIES = [body(i) for i in range(N)]


def reference(cluster):
    answers = gather(cluster, "/generate_stream", BODIES)
    assert all(a.error is None for a in answers), [a.error for a in answers if a.error]
    return [a.ids for a in answers]


def under_load(cluster, fault, after=60, timeout=60):
    """All streams at once; calls fault() when `after` tokens have come in all. Returns answers and
    the seconds from the fault to the end of each."""
    seen = 0
    hit_at = None
    ends = [None] * N

    def on_event(_):
        nonlocal seen, hit_at
        seen += 1
        if seen == after:
            hit_at = time.monotonic()
            fault()

    async def one(i):
        a = await stream(cluster, "/generate_stream", BODIES[i], on_event=on_event, timeout=timeout)
        ends[i] = time.monotonic()
        return a

    async def run():
        return await asyncio.gather(*(one(i) for i in range(N)))

    answers = asyncio.run(run())
    assert hit_at, "the fault was never injected"
    return answers, [e - hit_at for e in ends]


def check(answers, after_s, want, need_complete=0):
    """Counts complete answers; fails on wrong, repeated or missing tokens and on silent ends."""
    complete = 0
    for i, (a, s) in enumerate(zip(answers, after_s)):
        what = f"stream {i}: {len(a.ids)} of {len(want[i])} tokens, error {a.error}"
        assert a.ids == want[i][:len(a.ids)], f"{what}: wrong tokens\n{a.ids}\n{want[i]}"
        if a.error is None:
            assert a.whole and a.ids == want[i], f"{what}: ended without a word"
            complete += 1
        else:
            assert s < END_WITHIN_S * SLOWER, f"{what}: told only after {s:.1f} s"
    print(f"{complete} of {N} complete, the last after {max(after_s):.2f} s")
    assert complete >= need_complete, [a.error for a in answers if a.error][:3]


def works_again(cluster, want, timeout=10):
    wait(cluster.is_ready, timeout, "ready again", cluster.log)

    def right():
        answers = gather(cluster, "/generate_stream", BODIES[:4])
        return all(a.error is None for a in answers) and [a.ids for a in answers]

    assert wait(right, timeout, "new requests work", cluster.log) == want[:4]


@pytest.mark.parametrize("after", [1, 40, 600])
@pytest.mark.parametrize("victim", ["decode-1", "prefill-1"])
def test_worker_killed_with_another_left(start, victim, after):
    c = start("--mtp-step", 2, "--threads", 1, prefill=2, decode=2)
    want = reference(c)
    pids = c.pids()
    answers, after_s = under_load(c, lambda: c.kill(victim), after)
    check(answers, after_s, want, need_complete=N)
    c.wait_restarted(victim, pids[victim])
    works_again(c, want)


@pytest.mark.parametrize("victim", ["decode-0", "prefill-0"])
def test_only_worker_killed(start, victim):
    c = start("--mtp-step", 2)
    want = reference(c)
    pids = c.pids()
    answers, after_s = under_load(c, lambda: c.kill(victim), 100)
    check(answers, after_s, want)
    c.wait_restarted(victim, pids[victim])
    works_again(c, want)


@pytest.mark.parametrize("after", [1, 40])
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_both_of_a_role_killed_at_once(start, role, after):
    """Streams wait for the next life of either: that both died with them is nobody's fault."""
    c = start("--mtp-step", 2, "--threads", 1, prefill=2, decode=2)
    want = reference(c)
    pids = c.pids()

    def fault():
        for i in range(2):
            c.kill(f"{role}-{i}")

    answers, after_s = under_load(c, fault, after)
    check(answers, after_s, want, need_complete=N)
    for i in range(2):
        c.wait_restarted(f"{role}-{i}", pids[f"{role}-{i}"])
    works_again(c, want)


def test_ready_tells_the_truth(start):
    c = start("--mtp-step", 2, "--worker-wait-s", 4)
    c.kill("decode-0", signal.SIGSTOP)
    wait(lambda: c.get("/ready")[0] == 503, 4, "/ready is 503 while the only decode worker is frozen", c.log)
    assert c.get("/health")[0] == 200
    status, headers, answer = c.post("/v1/completions", {"model": "demo-model", "prompt": "a"})
    assert status == 503 and answer["error"]["message"] and int(headers["Retry-After"]) >= 1
    c.kill("decode-0", signal.SIGCONT)
    wait(lambda: c.get("/ready")[0] == 200, 4, "/ready is 200 again", c.log)


def test_decode_worker_frozen(start):
    c = start("--mtp-step", 2, "--threads", 1, prefill=2, decode=2)
    want = reference(c)
    answers, after_s = under_load(c, lambda: c.kill("decode-1", signal.SIGSTOP), 100)
    check(answers, after_s, want, need_complete=N)
    c.kill("decode-1", signal.SIGCONT)  # wakes up with streams that have moved on without it
    works_again(c, want)


@pytest.mark.parametrize("victim, point", [("decode-1", "decode.step"), ("prefill-1", "prefill.chunk")])
def test_engine_stuck(start, victim, point):
    """A device that hangs: the process answers everything but makes no step. Heartbeats do not see
    that; the router does, tells it to leave, and the launcher starts a fresh one."""
    c = start("--mtp-step", 2, "--threads", 1, "--step-timeout-s", 2, prefill=2, decode=2)
    want = reference(c)
    pids = c.pids()
    answer = c.admin(victim, f"failpoint {point}=sleep:60000")
    if "error" in answer:
        pytest.skip("this build has no failpoints")
    answers = gather(c, "/generate_stream", BODIES)
    assert [a.error for a in answers] == [None] * N
    assert [a.ids for a in answers] == want
    c.wait_restarted(victim, pids[victim])
    works_again(c, want)


def test_request_that_kills(start):
    """A request that kills whoever runs it costs a bounded number of workers and gets an error."""
    env = {"BATON_FAILPOINTS": "prefill.dequeue=kill"}
    c = start("--mtp-step", 2, "--threads", 1, prefill=2, decode=1, env=env)
    c.broken = True
    status, headers, answer = c.post("/generate", BODIES[0])
    assert status == 500 and answer["error"]["message"]
    assert headers["x-should-retry"] == "false"
    assert c.log().count("was killed") <= 3


@pytest.mark.parametrize("point", ["kv.send@0=error", "kv.recv@0=error", "prefill.ready@0=drop",
                                   "decode.emit@20=kill", "kv.send@1=kill", "kv.recv@1=kill",
                                   "prefill.ready@2=kill", "router.tokens@9=drop", "decode.preempt=off"])
def test_failpoints(start, point):
    """Faults at the seams of the handoff: the same text, or an explicit error."""
    c = start("--mtp-step", 2, "--threads", 1, "--prefix-cache", "off", "--step-timeout-s", 3,
              "--prefill-timeout-s", 4, prefill=2, decode=2)
    want = reference(c)
    names = ["router"] if point.startswith("router") else \
        [f"{point.split('.')[0].replace('kv', 'prefill')}-1"]
    if point.startswith("kv.recv"):
        names = ["decode-1"]
    for name in names:
        answer = c.admin(name, f"failpoint {point}")
        if "error" in answer and "no failpoints" in answer["error"]:
            pytest.skip("this build has no failpoints")
        assert "error" not in answer, answer
    began = time.monotonic()
    answers = gather(c, "/generate_stream", BODIES)
    spent = time.monotonic() - began
    check(answers, [0] * N, want)
    print(f"{point}: {spent:.2f} s")
    works_again(c, want)


def test_router_killed(start):
    c = start("--mtp-step", 2, prefill=2, decode=2)
    want = reference(c)
    pids = c.pids()
    killed_at = []

    def fault():
        killed_at.append(time.monotonic())
        c.kill("router")

    answers, after_s = under_load(c, fault, 100)
    for i, a in enumerate(answers):  # its connections die with it: the client sees them cut, not ended
        assert a.ids == want[i][:len(a.ids)]
        assert a.error or not a.whole or a.ids == want[i]
        assert after_s[i] < END_WITHIN_S * SLOWER
    c.wait_restarted("router", pids["router"])
    works_again(c, want)
    print(f"working again {time.monotonic() - killed_at[0]:.2f} s after the kill")
    assert {k: v for k, v in c.pids().items() if k != "router"} == \
        {k: v for k, v in pids.items() if k != "router"}, "the workers lived through it"


def test_worker_killed_again_and_again(start):
    """Three restarts, then it stays down: the cluster goes on with the other one."""
    c = start("--mtp-step", 2, "--threads", 1, prefill=1, decode=2)
    c.workers = [w for w in c.workers if w != "decode-1"]
    pid = c.pid("decode-1")
    for _ in range(3):
        c.kill("decode-1")
        pid = c.wait_restarted("decode-1", pid) and c.pid("decode-1")
    c.kill("decode-1")
    wait(lambda: "decode-1 keeps dying" in c.log(), 5, "the launcher gives it up", c.log)
    assert c.pid("decode-1") == 0
    assert c.get("/ready")[0] == 200
    assert gather(c, "/generate_stream", BODIES[:2])[0].error is None


def test_drain(start):
    """SIGTERM: running answers finish, then everything ends with code 0 and nothing is left over."""
    c = start("--mtp-step", 2)
    want = reference(c)
    c.broken = True  # it is gone at the end
    run_dir = c.run_dir
    pids = c.pids()
    answers, after_s = under_load(c, lambda: c.process.send_signal(signal.SIGTERM), 100)
    # Those that had not been accepted yet are refused, which is explicit too.
    for i, a in enumerate(answers):
        assert a.status is None or a.status != 200 or (a.error is None and a.ids == want[i]), a.error
    assert c.process.wait(20 * SLOWER) == 0, c.log()
    assert not run_dir.exists()
    for name, pid in pids.items():
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_worker_killed_while_draining(start):
    """The answers that the drain waits for go on at the worker's next life."""
    c = start("--mtp-step", 2)
    want = reference(c)
    c.broken = True  # it is gone at the end
    pid = c.pid("decode-0")

    def fault():
        c.process.send_signal(signal.SIGTERM)
        wait(lambda: "draining" in c.log(), 5, "it drains", c.log)
        os.kill(pid, signal.SIGKILL)

    answers, _ = under_load(c, fault, 100)
    accepted = [i for i, a in enumerate(answers) if a.status == 200]
    assert accepted
    for i in accepted:
        assert answers[i].error is None and answers[i].ids == want[i], answers[i].error
    assert c.process.wait(20 * SLOWER) == 0, c.log()
