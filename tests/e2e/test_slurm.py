"""deploy/slurm/baton.sbatch with an srun that starts every task on this machine, on CPUs."""

import json
import os
import signal
import socket
import subprocess
import urllib.request

import pytest

from cluster import BUILD, DEMO_MODEL, ROOT, SLOWER, wait

SBATCH = ROOT / "deploy" / "slurm" / "baton.sbatch"
IP = """#!/bin/sh
[ "$*" = "-4 -o addr show dev lo" ] && echo "1: lo    inet 127.0.0.1/8 scope host lo"
"""
SRUN = """#!/usr/bin/env python3
import os, signal, subprocess, sys
args, options = sys.argv[1:], {}
while args[0].startswith("--"):
    key, _, value = args.pop(0).partition("=")
    options[key] = value
    if key == "--nodelist" and not value:
        args.pop(0)
n, per_node = int(options["--ntasks"]), int(options.get("--ntasks-per-node") or 1)
tasks = [subprocess.Popen(args, env={**os.environ, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i % per_node)})
         for i in range(n)]
signal.signal(signal.SIGTERM, lambda *_: [t.send_signal(signal.SIGTERM) for t in tasks])
sys.exit(max(abs(t.wait()) for t in tasks))
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def job(tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("router/baton-router", "prefill_worker/baton-prefill", "decode_worker/baton-decode",
                 "deploy/baton"):
        (tools / name.split("/")[1]).symlink_to(BUILD / name)
    for name, text in (("srun", SRUN), ("ip", IP), ("scontrol", "#!/bin/sh\necho localhost\n")):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    processes = []

    def start(**env):
        settings = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "7",
                    "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS_PER_NODE": "3",
                    "ON_CPU": "1", "BATON_MODEL_DIR": str(DEMO_MODEL), "JOB_DIR": str(tmp_path),
                    "BATON_IFNAME": "lo", "BATON_THREADS": "1", "BATON_BIN_DIR": str(BUILD), **env}
        log = tmp_path / "log"
        with open(log, "wb") as f:
            p = subprocess.Popen(["bash", SBATCH], stdout=f, stderr=f, env=settings, start_new_session=True)
        p.log = log
        processes.append(p)
        return p

    yield start
    for p in processes:
        if p.poll() is None:
            os.killpg(p.pid, signal.SIGKILL)


def ports():
    return {"ROUTER_PORT": str(free_port()), "LINK_PORT": str(free_port()), "PEER_PORT": str(free_port())}


def test_job(job, tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("not the job's")
    chosen = ports()
    url = f"http://127.0.0.1:{chosen['ROUTER_PORT']}"
    p = job(**chosen)

    def ready():
        assert p.poll() is None, p.log.read_text()
        try:
            return urllib.request.urlopen(f"{url}/ready", timeout=5).status == 200
        except OSError:
            return False

    wait(ready, 30, "ready", p.log.read_text)
    body = json.dumps({"inputs": "a", "parameters": {"max_new_tokens": 4}}).encode()
    request = urllib.request.Request(f"{url}/generate", body, {"Content-Type": "application/json"})
    assert urllib.request.urlopen(request, timeout=20).status == 200
    wait(lambda: all(f" {name} " in p.log.read_text() for name in ("prefill/0", "prefill/1", "decode/2")), 10,
         "all workers speak", p.log.read_text)
    p.send_signal(signal.SIGTERM)
    assert p.wait(30 * SLOWER) == 0, p.log.read_text()
    assert not (tmp_path / "baton-7").exists() and mine.exists()  # keys are gone, nothing else is


@pytest.mark.parametrize("env, says", [
    ({"PREFILL_PER_NODE": "3"}, "PREFILL_PER_NODE=3"),
    ({"BATON_MODEL_DIR": "/nonexistent"}, "/nonexistent"),
])
def test_wrong_settings(job, env, says):
    p = job(**{**ports(), **env})
    assert p.wait(20 * SLOWER) != 0 and says in p.log.read_text()
