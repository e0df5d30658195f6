"""Processes started one by one, as on several hosts: tcp endpoints and a key pair for each."""

import json
import os
import subprocess
import urllib.request

import pytest

from cluster import BATON, BUILD, DEMO_MODEL, SLOWER, wait

PROGRAMS = {"router": BUILD / "router" / "baton-router", "prefill": BUILD / "prefill_worker" / "baton-prefill",
            "decode": BUILD / "decode_worker" / "baton-decode"}


class Hosts:
    def __init__(self, where):
        self.dir, self.processes, self.allow = where, [], where / "allow"
        self.allow.write_text("# the whole cluster\n")

    def keygen(self, role, name=None, listed=True):
        file = self.dir / f"{name or role}.key"
        r = subprocess.run([BATON, "keygen", role, file], capture_output=True, text=True, check=True)
        if listed:
            with open(self.allow, "a") as f:
                f.write(r.stdout)
        return file

    def start(self, role, *flags, key=None):
        if key:
            flags = (*flags, "--curve-key-file", key, "--curve-allow-file", self.allow)
        command = [PROGRAMS[role], "--model-dir", DEMO_MODEL, *flags]
        log = self.dir / f"{role}-{len(self.processes)}.log"
        with open(log, "wb") as f:
            p = subprocess.Popen([str(a) for a in command], stdout=f, stderr=f, stdin=subprocess.DEVNULL)
        p.log = log
        self.processes.append(p)
        return p

    def logs(self):
        return "\n".join(p.log.read_text() for p in self.processes)

    def close(self):
        for p in self.processes:
            p.terminate()
        for p in self.processes:
            p.wait(10 * SLOWER)


@pytest.fixture
def hosts(tmp_path):
    h = Hosts(tmp_path)
    yield h
    h.close()


def start_router(hosts, key=None):
    """The router on free ports; returns its endpoint for workers and its URL."""
    port_file = hosts.dir / "port"
    p = hosts.start("router", "--router-endpoint", "tcp://127.0.0.1:0", "--port", 0, "--port-file", port_file,
                    key=key)
    wait(lambda: port_file.exists() or p.poll() is not None, 10, "the router listens", hosts.logs)
    assert p.poll() is None, hosts.logs()
    line = next(x for x in p.log.read_text().splitlines() if "waiting for workers" in x)
    endpoint = line.split("endpoint=")[1].split()[0].split("?")[0]
    return endpoint, f"http://127.0.0.1:{port_file.read_text().strip()}"


def is_ready(url):
    try:
        return urllib.request.urlopen(f"{url}/ready", timeout=5).status == 200
    except OSError:
        return False


def test_a_cluster_with_keys(hosts):
    keys = {role: hosts.keygen(role) for role in PROGRAMS}
    endpoint, url = start_router(hosts, keys["router"])
    hosts.start("prefill", "--router-endpoint", endpoint, key=keys["prefill"])
    hosts.start("decode", "--router-endpoint", endpoint, "--peer-endpoint", "tcp://127.0.0.1:0",
                key=keys["decode"])
    wait(lambda: is_ready(url), 20, "ready", hosts.logs)
    body = json.dumps({"inputs": "a", "parameters": {"max_new_tokens": 4}}).encode()
    answer = urllib.request.urlopen(urllib.request.Request(
        f"{url}/generate", body, {"Content-Type": "application/json"}), timeout=20)
    assert answer.status == 200
    for key in keys.values():
        secret = next(x.split()[1] for x in key.read_text().splitlines() if x.startswith("secret"))
        assert secret not in hosts.logs()


def test_a_worker_that_is_not_listed(hosts):
    """It never becomes part of the cluster; the one with a key does, on the same router."""
    router = hosts.keygen("router")
    prefill, decode = hosts.keygen("prefill"), hosts.keygen("decode")
    stranger = hosts.keygen("decode", "stranger", listed=False)
    endpoint, url = start_router(hosts, router)
    hosts.start("prefill", "--router-endpoint", endpoint, key=prefill)
    hosts.start("decode", "--router-endpoint", endpoint, "--peer-endpoint", "tcp://127.0.0.1:0", "--name",
                "decode/stranger", key=stranger)
    hosts.start("decode", "--router-endpoint", endpoint, "--peer-endpoint", "tcp://127.0.0.1:0", "--name",
                "decode/listed", key=decode)
    wait(lambda: is_ready(url), 20, "ready", hosts.logs)
    log = hosts.processes[0].log.read_text()
    assert "decode/listed" in log and "decode/stranger" not in log


@pytest.mark.parametrize("role, flags, says", [
    ("router", ("--router-endpoint", "tcp://0.0.0.0:0", "--port", "0"), "--curve-key-file"),
    ("decode", ("--router-endpoint", "tcp://192.0.2.1:9"), "--curve-key-file"),
    ("prefill", ("--router-endpoint", "tcp://127.0.0.1:9", "--curve-key-file", "/nonexistent"),
     "--curve-allow-file"),
])
def test_refused_without_keys(hosts, role, flags, says):
    p = hosts.start(role, *flags)
    assert p.wait(20 * SLOWER) in (1, 2) and says in p.log.read_text()


def test_keygen(tmp_path):
    file = tmp_path / "k"
    r = subprocess.run([BATON, "keygen", "decode", file], capture_output=True, text=True)
    assert r.returncode == 0 and r.stdout.startswith("decode ") and os.stat(file).st_mode & 0o777 == 0o600
    before = file.read_text()
    r = subprocess.run([BATON, "keygen", "decode", file], capture_output=True, text=True)
    assert r.returncode == 1 and str(file) in r.stderr and file.read_text() == before
    assert subprocess.run([BATON, "keygen", "king", tmp_path / "x"], capture_output=True).returncode == 2
