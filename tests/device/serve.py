"""Whole clusters on GPUs, from the programs that tests/device/pack gathered.

  serve.py demo PREFIX [cuda:N cuda:M]   the demo model's goldens, mtp-step 0, 1, 2, 4, auto; handoff on one
                                         GPU or, given two, from the first to the second
  serve.py faults PREFIX [devices, flags] 10,000 handoffs, then workers killed in the middle of others
  serve.py flash PREFIX [devices, flags] full size, dummy weights: 512 requests of 300 + 200 tokens
  serve.py bench PREFIX [devices, workloads, flags]
                                         full size, dummy weights: baton bench's workloads by name;
                                         ShareGPT's prompts where PREFIX/sharegpt.jsonl is, else synthetic ones
Only the standard library, since such a machine may have no more. All of a machine at once: machine.py.
"""

import concurrent.futures
import http.client
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from prefix import ROOT, flash_dir, sharegpt, use

prefix = use(sys.argv[2])
from cluster import Cluster  # noqa: E402

MARGIN = 0.3
CASES = json.loads((ROOT / "tests" / "golden" / "golden.json").read_text())["cases"]


def generate(cluster, prompt, n, **parameters):
    status, _, answer = cluster.post("/generate", {"inputs": prompt, "parameters": {
        "max_new_tokens": n, "do_sample": False, "return_details": True, **parameters}})
    assert status == 200, (status, answer)
    return [t["id"] for t in answer["tokens"]]


def spread(devices, shared=None):
    """A topology file: prefill on the first device, decode on the last. shared: settings of both where
    that is one device."""
    prefill, decode = (shared or ({}, {})) if len(devices) == 1 else ({}, {})
    path = pathlib.Path(tempfile.mkdtemp()) / "topology.json"
    path.write_text(json.dumps({"all": {}, "prefill": [{"device": devices[0], **prefill}],
                                "decode": [{"device": devices[-1], **decode}]}))
    return path


def demo(devices, flags):
    failed, texts = 0, {}
    for mtp in (0, 1, 2, 4, "auto"):
        cluster = Cluster("--mtp-step", mtp, "--max-total-token-num", 32768, "--log-level", "info", *flags,
                          topology=spread(devices))
        try:
            begin = time.monotonic()
            cluster.ready(60)
            ready = time.monotonic() - begin
            wrong = 0
            for name, case in CASES.items():
                ids = generate(cluster, case["prompt"], len(case["greedy_ids"]))
                if case["min_margin"] > MARGIN and ids != case["greedy_ids"]:
                    wrong += 1
                    print(f"  {name}: {ids}\n  want {case['greedy_ids']}")
                texts.setdefault(name, []).append(ids)
            with concurrent.futures.ThreadPoolExecutor(64) as pool:
                names = [n for n in CASES if CASES[n]["min_margin"] > MARGIN] * 20
                answers = list(pool.map(lambda n: generate(cluster, CASES[n]["prompt"],
                                                           len(CASES[n]["greedy_ids"])), names))
            many = sum(a != CASES[n]["greedy_ids"] for n, a in zip(names, answers))
            drawn = [generate(cluster, CASES["story"]["prompt"], 48, do_sample=True, temperature=0.9, seed=7)
                     for _ in range(2)]
            texts.setdefault("drawn", []).append(drawn[0])
            print(f"mtp-step {mtp}: ready in {ready:.2f} s, {wrong} of {len(CASES)} cases wrong, "
                  f"{many} of {len(names)} concurrent ones, same draw twice: {drawn[0] == drawn[1]}")
            failed += wrong + many + (drawn[0] != drawn[1])
            for worker in cluster.workers:
                print("  accounting", worker, json.dumps(cluster.admin(worker, "accounting")))
        except Exception as e:  # the next mtp-step still tells something
            failed += 1
            print(f"mtp-step {mtp}: {e}\n{cluster.log()[-6000:]}")
        finally:
            cluster.process.terminate()
            cluster.process.wait(20)
    differ = [name for name, t in texts.items() if any(x != t[0] for x in t)]
    print("texts that differ between mtp-steps:", differ or "none")
    print("transport:", [line for line in cluster.log().splitlines() if "transport=" in line][:1])
    return failed + sum(CASES.get(n, {"min_margin": 0})["min_margin"] > MARGIN for n in differ)


def all_of(cluster, names, watch=None):
    """Asks for every case in names, 64 at a time; returns how many answers were wrong or missing, and the
    longest wait for one."""
    def one(name):
        begin = time.monotonic()
        try:
            right = generate(cluster, CASES[name]["prompt"], len(CASES[name]["greedy_ids"])) == CASES[name]["greedy_ids"]
        except Exception as e:
            print("  ", name, repr(e)[:200])
            right = False
        return right, time.monotonic() - begin
    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        answers = [pool.submit(one, n) for n in names]
        if watch:
            watch(answers)
        answers = [a.result() for a in answers]
    return sum(not right for right, _ in answers), max(t for _, t in answers)


def faults(devices, flags):
    """Handoffs by the thousand, then processes that are killed while prompts and pages are on their way."""
    names = [n for n in CASES if CASES[n]["min_margin"] > MARGIN]
    failed = 0
    cluster = Cluster("--mtp-step", 2, "--max-total-token-num", 32768, "--prefix-cache", "off", *flags,
                      topology=spread(devices))
    try:
        cluster.ready(60)
        begin = time.monotonic()
        n = int(os.environ.get("HANDOFFS", "10000"))
        wrong, longest = all_of(cluster, [names[i % len(names)] for i in range(n)])
        print(f"{n} handoffs in {time.monotonic() - begin:.1f} s: {wrong} wrong, longest answer {longest:.2f} s")
        failed += wrong
        for victim in ("decode-0", "prefill-0", "decode-0"):
            def kill(answers):
                while sum(a.done() for a in answers) < 100:
                    time.sleep(0.01)
                pid = cluster.kill(victim)
                begin = time.monotonic()
                cluster.wait_restarted(victim, pid, 30)
                print(f"  {victim} killed, runs again after {time.monotonic() - begin:.2f} s")
            wrong, longest = all_of(cluster, [names[i % len(names)] for i in range(600)], kill)
            print(f"{victim} killed among 600 requests: {wrong} wrong, longest answer {longest:.2f} s")
            failed += wrong
        for line in cluster.get("/metrics")[2].splitlines():
            if line.startswith("baton_handoff"):
                print("  ", line)
        for worker in cluster.workers:
            print("  accounting", worker, json.dumps(cluster.admin(worker, "accounting")["pages"]))
        ends = [line for line in cluster.log().splitlines() if "pair ended" in line or "damaged" in line or
                "transport=" in line]
        print("\n".join(ends[:12]))
    finally:
        cluster.process.terminate()
        cluster.process.wait(30)
    return failed


def stream(cluster, prompt, n):
    """One streamed completion: (time to first token, times between tokens, tokens, end to end)."""
    connection = http.client.HTTPConnection(cluster.host, cluster.port, timeout=300)
    begin = time.monotonic()
    connection.request("POST", "/v1/completions", json.dumps(
        {"model": "flash", "prompt": prompt, "max_tokens": n, "stream": True, "temperature": 0,
         "ignore_eos": True, "stream_options": {"include_usage": True}}), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    first, last, gaps, tokens = 0, 0, [], 0
    for line in answer:
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            if event.get("error"):
                raise RuntimeError(event)
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
            if event["choices"]:
                now = time.monotonic()
                if first:
                    gaps.append(now - last)
                first, last = first or now, now
    connection.close()
    return first - begin, gaps, tokens, last - begin


def attempt(*a):
    try:
        return stream(*a)
    except Exception as e:
        return e


def flash(devices, flags):
    n_requests, n_prompt, n_output = 512, 300, 200
    cluster = Cluster("--model-dir", flash_dir(), "--load-format", "dummy", "--served-model-name", "flash",
                      "--running-max-req-size", 512, "--max-req-total-len", 8192,
                      *flags, topology=spread(devices, (
                          {"max_total_token_num": 32768, "chunked_prefill_size": 4096},
                          {"mem_fraction": 0.94})))
    try:
        begin = time.monotonic()
        cluster.ready(120)
        print(f"start to ready: {time.monotonic() - begin:.2f} s")
        for line in cluster.log().splitlines():
            if any(x in line for x in ("memory", "weights ", "KV pool", "transport=")):
                print("  ", line)
        prompts = [[(i * 7919 + j * 104729) % 2900 for j in range(n_prompt)] for i in range(n_requests)]
        stream(cluster, prompts[0], 8)
        begin = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(n_requests) as pool:
            results = list(pool.map(lambda p: attempt(cluster, p, n_output), prompts))
        failures = [r for r in results if isinstance(r, Exception)]
        results = [r for r in results if not isinstance(r, Exception)]
        print(f"failures: {len(failures)}", failures[:1])
        wall = time.monotonic() - begin
        tokens = sum(r[2] for r in results)
        ttft = sorted(r[0] for r in results)
        gaps = sorted(g for r in results for g in r[1])
        for at in (0, 1, 2, 5, 20, 100, 150):
            some = sorted(r[1][at] for r in results if len(r[1]) > at)
            print(f"  gap {at}: p50 {some[len(some) // 2]:.4f} p99 {some[len(some) * 99 // 100]:.4f} s")
        print(f"{n_requests} requests at once, {n_prompt} + {n_output} tokens: {wall:.2f} s, "
              f"{tokens / wall:.0f} output tokens/s, short {sum(r[2] != n_output for r in results)}")
        for name, x in (("TTFT", ttft), ("ITL", gaps), ("E2E", sorted(r[3] for r in results))):
            print(f"  {name} mean {statistics.mean(x):.4f} p50 {x[len(x) // 2]:.4f} "
                  f"p99 {x[len(x) * 99 // 100]:.4f} s")
        for line in cluster.get("/metrics")[2].splitlines():
            if line.startswith(("baton_step", "vllm:spec_decode_num")):
                print("  ", line)
        for worker in cluster.workers:
            print("  accounting", worker, json.dumps(cluster.admin(worker, "accounting")))
        return len(failures)
    except Exception as e:
        print(f"{e}\n{cluster.log()[-8000:]}")
        return 1
    finally:
        cluster.process.terminate()
        cluster.process.wait(30)


def bench(devices, rest):
    workloads = [a for a in rest if a in ("burst", "high-conc", "moderate", "steady")]
    flags = [a for a in rest if a not in workloads]
    cluster = Cluster("--model-dir", flash_dir(), "--load-format", "dummy", "--served-model-name", "flash",
                      "--running-max-req-size", 512, "--max-req-total-len", 8192,
                      *flags, topology=spread(devices, (
                          {"max_total_token_num": 32768, "chunked_prefill_size": 4096},
                          {"mem_fraction": 0.94})))
    failed = 0
    try:
        cluster.ready(120)
        for workload in workloads:
            report = pathlib.Path(os.environ.get("OUT", cluster.dir)) / f"{workload}.json"
            more = {"moderate": ["--num-prompts", "200"], "steady": ["--num-prompts", "80"]}.get(workload, [])
            more += sharegpt(prefix)
            failed += subprocess.run([prefix / "baton-bench", "--url", cluster.url, "--workload", workload,
                                      "--vocab-size", "2900", "--num-warmups", "64", "--json", report,
                                      *more]).returncode
            for line in cluster.get("/metrics")[2].splitlines():
                if line.startswith(("baton_step", "baton_handoff", "vllm:spec_decode_num")) and "per_pos" not in line:
                    print("  ", line)
    finally:
        if failed:
            print(cluster.log()[-6000:])
        cluster.process.terminate()
        cluster.process.wait(30)
    return failed


if __name__ == "__main__":
    rest = sys.argv[3:]
    on = [a for a in rest if a == "cpu" or a.startswith("cuda:")] or ["cuda:0"]
    others = [a for a in rest if a not in on]
    sys.exit({"demo": demo, "faults": faults, "flash": flash, "bench": bench}[sys.argv[1]](on, others) > 0)
