"""A real cluster for a test: `baton serve` on a free port, in a directory of its own.

Nothing here sleeps for a fixed time: wait() asks again until a condition holds or its deadline
passes, and a failed wait prints the merged log of all processes.
"""

import asyncio
import http.client
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUILD = pathlib.Path(os.environ.get("E2E_BUILD_DIR", ROOT / "build"))
BATON = BUILD / "deploy" / "baton"
DEMO_MODEL = ROOT / "deploy" / "demo-model"
GOLDEN = ROOT / "tests" / "golden"
# Sanitizer builds are several times slower; deadlines that guard against hangs are not figures.
SLOWER = float(os.environ.get("E2E_SLOWER", "1"))


def wait(condition, timeout, what, log=None):
    """Returns the first true result of condition(); raises with what (and the log) after timeout."""
    deadline = time.monotonic() + timeout * SLOWER
    while True:
        result = condition()
        if result:
            return result
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout} s: {what}\n{log() if log else ''}")
        time.sleep(0.005)


class Cluster:
    def __init__(self, *flags, prefill=1, decode=1, env=None, topology=None):
        assert BATON.exists(), f"{BATON} is not built"
        self.dir = pathlib.Path(tempfile.mkdtemp(prefix="baton-e2e-"))
        self.run_dir = self.dir / "run"
        self.ready_file = self.dir / "ready"
        self.log_file = self.dir / "log"
        command = [BATON, "serve", "--port", "0", "--run-dir", self.run_dir, "--ready-file",
                   self.ready_file]
        if topology:
            command += ["--topology", topology]
        else:
            command += ["--prefill", prefill, "--decode", decode]
        if SLOWER > 1 and "--step-timeout-s" not in flags:
            command += ["--step-timeout-s", 10 * SLOWER]
        self.names = ["router"]
        self.workers = [f"prefill-{i}" for i in range(prefill)] + [f"decode-{i}" for i in range(decode)]
        self.names += self.workers
        with open(self.log_file, "wb") as log:
            self.process = subprocess.Popen([str(a) for a in [*command, *flags]], stdout=log, stderr=log,
                                            stdin=subprocess.DEVNULL, env={**os.environ, **(env or {})},
                                            cwd=ROOT)
        self.host, self.port = "127.0.0.1", None

    def ready(self, timeout=20):
        def check():
            if self.process.poll() is not None:
                raise AssertionError(f"baton serve ended with {self.process.returncode}\n{self.log()}")
            return self.ready_file.exists()

        wait(check, timeout, "the cluster is ready", self.log)
        self.port = int(self.ready_file.read_text().rsplit(":", 1)[1])
        self.fds_at_start = self.fds()
        return self

    @property
    def url(self):
        return f"http://{self.host}:{self.port}"

    def log(self):
        """What all processes said, without the settings that each prints at its start."""
        lines = self.log_file.read_text(errors="replace").splitlines(keepends=True)
        return "".join(x for x in lines if " config " not in x and " load percent=" not in x)

    # -- processes

    def pids(self):
        return json.loads((self.run_dir / "pids.json").read_text())

    def pid(self, name):
        return self.pids()[name]

    def kill(self, name, signum=signal.SIGKILL):
        """Sends the signal; returns the pid that got it."""
        pid = wait(lambda: self.pid(name), 5, f"{name} runs", self.log)
        os.kill(pid, signum)
        return pid

    def wait_restarted(self, name, old_pid, timeout=10):
        return wait(lambda: self.pid(name) not in (0, old_pid), timeout, f"{name} runs again", self.log)

    def fds(self):
        return len(os.listdir(f"/proc/{self.pid('router')}/fd"))

    def rss_kb(self, name):
        status = pathlib.Path(f"/proc/{self.pid(name)}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0])

    # -- admin sockets

    def admin(self, name, command):
        with socket.socket(socket.AF_UNIX) as s:
            s.settimeout(5 * SLOWER)
            s.connect(str(self.run_dir / f"{name}.admin"))
            s.sendall(command.encode() + b"\n")
            answer = b""
            while not answer.endswith(b"\n"):
                part = s.recv(65536)
                if not part:
                    break
                answer += part
        return json.loads(answer)

    def accounting(self, name):
        return self.admin(name, "accounting")

    def not_idle(self):
        """What keeps the cluster from being as it was at the start; "" if nothing does."""
        for name in self.workers:
            try:
                a = self.accounting(name)
            except OSError as e:
                return f"{name}: {e}"
            pages = a["pages"]
            used = {k: pages[k] for k in ("reserved", "in_flight", "live") if pages[k]}
            if pages["total"] != sum(pages[k] for k in ("free", "reserved", "in_flight", "live", "cached")):
                raise AssertionError(f"{name}: pages do not add up: {pages}")
            if used or any(a["requests"].values()):
                return f"{name}: {a}"
        router = self.accounting("router")
        if any(router["requests"].values()):
            return f"router: {router}"
        return ""

    def wait_idle(self, timeout=2):
        """Every page, request slot and connection is back where it was before the first request."""
        wait(lambda: not self.not_idle(), timeout, f"idle again; last: {self.not_idle()}", self.log)

    def wait_connections_closed(self, timeout=3):  # closing lingers for 2 s at most
        wait(lambda: self.fds() <= self.fds_at_start, timeout, "the router's descriptors are closed",
             lambda: f"{self.fds()} open, {self.fds_at_start} at the start")

    # -- HTTP

    def request(self, method, path, body=None, headers=None, timeout=60):
        """(status, headers, parsed JSON or text)"""
        c = http.client.HTTPConnection(self.host, self.port, timeout=timeout * SLOWER)
        try:
            if isinstance(body, (dict, list)):
                body = json.dumps(body)
            c.request(method, path, body, headers or ({"Content-Type": "application/json"} if body else {}))
            r = c.getresponse()
            data = r.read()
        finally:
            c.close()
        if data and "json" in (r.getheader("Content-Type") or ""):
            return r.status, r.headers, json.loads(data)
        return r.status, r.headers, data.decode()

    def get(self, path):
        return self.request("GET", path)

    def is_ready(self):
        try:
            return self.get("/ready")[0] == 200
        except OSError:
            return False  # the router is not there

    def post(self, path, body, **kw):
        return self.request("POST", path, body, **kw)

    # -- end

    def stop(self, timeout=20):
        """SIGTERM, as an operator would; returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout * SLOWER)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"baton serve did not end within {timeout} s\n{self.log()}")

    def close(self):
        try:
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGTERM)
                for patience in (2, 5):
                    try:
                        self.process.wait(patience)
                        break
                    except subprocess.TimeoutExpired:
                        self.process.send_signal(signal.SIGTERM)  # the second one kills at once
                else:
                    self.process.kill()
                    self.process.wait()
            log = self.log()
        finally:
            shutil.rmtree(self.dir, ignore_errors=True)
        assert "Sanitizer" not in log, log

    def __enter__(self):
        try:
            return self.ready()
        except BaseException:
            self.close()
            raise

    def __exit__(self, *exc):
        self.close()


class Answer:
    """What came back for one streamed request."""

    def __init__(self):
        self.status = None
        self.headers = {}
        self.body = b""
        self.events = []      # parsed `data:` payloads
        self.done = False     # saw [DONE], or a complete chunked body on /generate_stream
        self.whole = False    # the body ended as HTTP says it should
        self.left = False     # we hung up
        self.exception = None

    @property
    def error(self):
        """The explicit error, if there is one: an HTTP status or an error event."""
        if self.status != 200:
            return f"{self.status} {self.body[:300]!r} {self.exception!r}"
        for e in self.events:
            if "error" in e:
                return json.dumps(e["error"])
        return None

    @property
    def ids(self):
        return [e["token"]["id"] for e in self.events if "token" in e]

    @property
    def text(self):
        parts = []
        for e in self.events:
            if "token" in e:
                parts.append(e["token"].get("text") or "")
            for c in e.get("choices", []):
                parts.append(c.get("text") or c.get("delta", {}).get("content") or "")
        return "".join(parts)

    @property
    def finish_reason(self):
        for e in reversed(self.events):
            for c in e.get("choices", []):
                if c.get("finish_reason"):
                    return c["finish_reason"]
            if e.get("finish_reason"):
                return e["finish_reason"]
        return None


async def stream(cluster, path, body, leave_after=None, timeout=60, on_event=None, headers=None):
    """POSTs body and reads the answer as it comes. leave_after: hang up after that many events (0:
    right after sending). Never raises for what the server does; look at the Answer."""
    a = Answer()
    try:
        async with asyncio.timeout(timeout * SLOWER):
            await _stream(cluster, path, body, a, leave_after, on_event, headers or {})
    except (ConnectionError, asyncio.IncompleteReadError, TimeoutError) as e:
        a.exception = e
    return a


async def _stream(cluster, path, body, a, leave_after, on_event, headers):
    reader, writer = await asyncio.open_connection(cluster.host, cluster.port, limit=1 << 20)
    try:
        data = json.dumps(body).encode()
        more = "".join(f"{k}: {v}\r\n" for k, v in headers.items())
        writer.write(f"POST {path} HTTP/1.1\r\nHost: {cluster.host}\r\nContent-Type: application/json\r\n"
                     f"{more}Connection: close\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
        await writer.drain()
        if leave_after == 0:
            a.left = True
            return
        status = await reader.readline()
        if not status:
            return
        a.status = int(status.split()[1])
        while (line := (await reader.readline()).strip()):
            key, value = line.decode().split(":", 1)
            a.headers[key.lower()] = value.strip()
        if a.headers.get("transfer-encoding") != "chunked":
            a.body = await reader.readexactly(int(a.headers.get("content-length", 0)))
            a.whole = True
            return
        rest = b""
        while True:
            size = int((await reader.readline()).strip() or b"0", 16)
            chunk = await reader.readexactly(size + 2)
            if size == 0:
                a.whole = True
                return
            rest += chunk[:-2]
            a.body += chunk[:-2]
            while b"\n\n" in rest:
                event, rest = rest.split(b"\n\n", 1)
                for line in event.split(b"\n"):
                    if not line.startswith(b"data:"):
                        continue
                    payload = line[5:].strip()
                    if payload == b"[DONE]":
                        a.done = True
                        continue
                    a.events.append(json.loads(payload))
                    if on_event:
                        on_event(a)
                    if leave_after is not None and len(a.events) >= leave_after:
                        a.left = True
                        return
    finally:
        writer.close()


def gather(cluster, path, bodies, limit=None, **kw):
    """Streams all bodies at once (or limit at a time) and returns the Answers in order."""
    async def run():
        gate = asyncio.Semaphore(limit or len(bodies))

        async def one(body):
            async with gate:
                return await stream(cluster, path, body, **kw)

        return await asyncio.gather(*(one(b) for b in bodies))

    return asyncio.run(run())
