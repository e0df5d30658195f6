"""A headless Chromium for a test, spoken to over its debugging pipe: no driver, no packages.

find() says where one is. A page's script errors, refusals by its policy included, end the test."""

import base64
import json
import os
import shutil
import subprocess
import tempfile

from cluster import SLOWER, wait


def find():
    return next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)


class Browser:
    def __init__(self):
        self.dir = tempfile.mkdtemp(prefix="baton-browser-")
        there, self.out = os.pipe()
        self.inp, back = os.pipe()
        # Chromium reads descriptor 3 and writes 4.
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{there} 4>&{back}', "bash", find(), "--headless", "--no-sandbox", "--disable-gpu",
             "--disable-dev-shm-usage", "--no-first-run", "--remote-debugging-pipe",
             f"--user-data-dir={self.dir}", "about:blank"],
            pass_fds=(there, back), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL)
        os.close(there)
        os.close(back)
        self.rest, self.n, self.session, self.errors = b"", 0, None, []
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def _message(self):
        while b"\0" not in self.rest:
            data = os.read(self.inp, 1 << 16)
            assert data, "the browser is gone"
            self.rest += data
        line, self.rest = self.rest.split(b"\0", 1)
        return json.loads(line)

    def call(self, method, **params):
        self.n += 1
        m = {"id": self.n, "method": method, "params": params}
        if self.session:
            m["sessionId"] = self.session
        os.write(self.out, json.dumps(m).encode() + b"\0")
        while True:
            m = self._message()
            if m.get("id") == self.n:
                assert "error" not in m, f"{method}: {m['error']}"
                return m["result"]
            if m.get("method") == "Runtime.exceptionThrown":
                self.errors.append(m["params"]["exceptionDetails"])
            entry = m.get("params", {}).get("entry", {})
            if m.get("method") == "Log.entryAdded" and entry["level"] == "error" and entry["source"] != "network":
                self.errors.append(entry["text"])

    def js(self, expression):
        r = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in r, r
        assert not self.errors, self.errors
        return r["result"].get("value")

    def wait(self, expression, what=None, timeout=20):
        return wait(lambda: self.js(f"!!({expression})"), timeout, what or expression,
                    lambda: self.js("document.body.innerText"))

    def size(self, width, height, dark=False):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=width < 500)
        self.call("Emulation.setEmulatedMedia",
                  features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])

    def open(self, url):
        self.call("Page.navigate", url=url)
        self.wait("document.readyState == 'complete' && location.href != 'about:blank'")

    def leave(self):
        self.call("Page.navigate", url="about:blank")

    def type(self, text):
        self.call("Input.insertText", text=text)

    def key(self, key, modifiers=0):
        code = {"Enter": 13, "Escape": 27}[key]
        for kind in ("keyDown", "keyUp"):
            more = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code,
                      modifiers=modifiers, **more)

    def shot(self, path):
        with open(path, "wb") as f:
            f.write(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def close(self):
        os.close(self.out)
        self.process.kill()
        self.process.wait(10 * SLOWER)
        os.close(self.inp)
        shutil.rmtree(self.dir, ignore_errors=True)
