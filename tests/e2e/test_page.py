"""The page at /: what it is allowed to do, the JSON behind it, and in a browser where there is one.

PAGE_SHOTS=DIR keeps pictures of it."""

import base64
import hashlib
import os
import pathlib
import re

import pytest

import browser
from cluster import Cluster, gather, wait

CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "What is a dog?"}], "temperature": 0,
       "chat_template_kwargs": {"enable_thinking": False}}
DOG = "A dog is a member of the genus Canis."
SHIFT = 8


def test_page(cluster):
    status, headers, page = cluster.get("/")
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    assert len(page.encode()) < 64 << 10
    policy = dict(p.split(" ", 1) for p in headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    for tag in ("script", "style"):
        block, = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.S)
        digest = base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    # Nothing from elsewhere, and nothing that the policy would refuse.
    assert not re.search(r"(src|href)=\"(?!data:)|https?://(?!www\.w3\.org/)| style=\"| on[a-z]+=\"|innerHTML", page)


def test_page_is_kept(cluster):
    _, headers, page = cluster.get("/")
    etag = headers["ETag"]
    for known in (etag, f"W/{etag}", f'"x", {etag}', "*"):
        status, again, body = cluster.request("GET", "/", headers={"If-None-Match": known})
        assert (status, body, again["ETag"]) == (304, "", etag), known
    for other in ('"x"', etag[:-2] + '"', etag.strip('"')):
        assert cluster.request("GET", "/", headers={"If-None-Match": other})[::2] == (200, page), other
    assert cluster.request("HEAD", "/")[0] == 200


def test_status(cluster):
    before = cluster.get("/status")[2]["cluster"]
    assert before["ready"] and before["model"] == "demo-model"
    answers = gather(cluster, CHAT, [{**ASK, "stream": True}] * 4)
    assert [a.text for a in answers] == [DOG] * 4

    def settled():  # workers speak of themselves ten times a second, samples are taken once
        c = cluster.get("/status")[2]["cluster"]
        decode = [w for w in c["workers"] if w["role"] == "decode"]
        done = sum(w["handoffs"] for w in decode) - sum(w["handoffs"] for w in before["workers"] if w["role"] == "decode")
        return done == 4 and any(c["history"]["tokens_per_s"]) and any(c["history"]["ttft_p99_ms"]) and c

    after = wait(settled, 5, "the four requests show", cluster.log)
    status, headers, all = cluster.get("/status")
    assert status == 200 and headers["Cache-Control"] == "no-store" and all["state"] == "running"
    assert all["router"]["rss_bytes"] > 1 << 20 and all["router"]["connections"] >= 1
    grown = {k: after["totals"][k] - before["totals"][k] for k in after["totals"]}
    assert (grown["requests"], grown["stop"], grown["error"]) == (4, 4, 0)
    assert grown["generated_tokens"] == 4 * 14 and grown["prompt_tokens"] == 4 * 10
    link, = after["links"]
    assert (link["prefill"], link["decode"], link["transports"][0]) == ("prefill/0", "decode/0", "shm")
    assert link["attempts"] - before["links"][0]["attempts"] == 4
    for w in after["workers"]:
        pages = w["pages"]
        assert w["state"] == "active" and w["pid"] == cluster.pid(w["name"].replace("/", "-"))
        assert pages["total"] == sum(pages[k] for k in pages if k != "total")
        assert w["handoff_bytes"] > 0 and w["steps"] > 0
    history = after["history"]
    lengths = {len(v) for k, v in history.items() if k != "interval_ms"}
    assert len(lengths) == 1 and 1 <= lengths.pop() <= 120 and history["interval_ms"] == 1000
    assert all["cluster"]["requests"] == {"queued": 0, "resuming": 0, "prefill": 0, "decode": 0}


# ---- in a browser ----

needs_browser = pytest.mark.skipif(not browser.find(), reason="no chromium here")


@pytest.fixture
def chromium():
    b = browser.Browser()
    yield b
    b.close()


@pytest.fixture
def shot(chromium):
    where = os.environ.get("PAGE_SHOTS")
    return lambda name: where and chromium.shot(pathlib.Path(where) / f"{name}.png")


@needs_browser
def test_chat(cluster, chromium, shot):
    b = chromium
    b.size(1280, 900)
    b.open(cluster.url)
    b.wait("document.querySelectorAll('.worker').length == 2 && document.querySelector('#state').innerText == 'ready'")
    assert b.js("document.querySelectorAll('.tile').length") == 4
    shot("idle")

    # Settings: a tool and no randomness.
    b.js("document.querySelector('#open-settings').click(); document.querySelector('#example').click()")
    b.js("document.querySelector('[name=temperature]').value = 0")
    shot("settings")
    b.js("document.querySelector('#settings .primary').click()")
    b.wait("(sessionStorage.getItem('settings') ?? '').includes('get_weather') && document.activeElement.id == 'input'")
    b.type("What is the weather")
    b.key("Enter", SHIFT)
    b.type("in Paris?")
    assert b.js("document.querySelector('#input').value") == "What is the weather\nin Paris?"
    b.js("document.querySelector('#input').value = 'What is the weather in Paris?'")
    b.key("Enter")
    b.wait("document.querySelector('.call form')", "a tool call")
    assert b.js("document.querySelector('.call b').innerText") == "get_weather"
    assert b.js("JSON.parse(document.querySelector('.call pre').innerText).city") == "Paris"
    assert b.js("!document.querySelector('details.think').open && "
                "document.querySelector('.think summary').innerText.startsWith('Thought for')")
    b.js("document.querySelector('.call textarea').focus()")
    b.type("21")
    b.key("Enter")
    b.wait("document.querySelectorAll('.foot').length == 2", "the answer after the result")
    assert "21" in b.js("[...document.querySelectorAll('.turn')].at(-1).innerText")
    shot("tool-call")

    # Escape stops, and the workers let go.
    b.js("sessionStorage.settings = JSON.stringify({max_tokens: '3000', temperature: '2'})")
    b.js("document.querySelector('#input').focus()")
    b.type("Tell me a short story.")
    b.js("const f = fetch; window.fetch = (u, o) => f(u, o?.body ? {...o, body: "
         "JSON.stringify({...JSON.parse(o.body), ignore_eos: true})} : o)")
    b.key("Enter")
    b.wait("running && document.querySelectorAll('.turn').length == 5 && document.querySelector('.running .text')")
    assert b.js("!document.querySelector('#stop').hidden")
    b.key("Escape")
    b.wait("document.querySelectorAll('.foot').length == 3")
    assert "stopped" in b.js("[...document.querySelectorAll('.foot')].at(-1).innerText")
    cluster.wait_idle()

    b.size(390, 844, dark=True)
    assert b.js("document.documentElement.scrollWidth") == 390
    shot("phone")
    b.js("document.querySelector('#tab-cluster').click()")
    assert b.js("document.querySelector('#cluster').scrollWidth") <= 390
    shot("phone-cluster")
    b.leave()


@needs_browser
def test_unequal_roles(chromium, shot):
    """Few workers of one role beside many of the other are no taller, and the page shows what they do."""
    b = chromium
    with Cluster("--device", "mock", prefill=1, decode=3) as c:
        b.size(1280, 900)
        b.open(c.url)
        b.wait("document.querySelectorAll('.worker').length == 4")
        answers = gather(c, "/v1/completions", [{"prompt": [i + 1] * 20, "max_tokens": 100, "ignore_eos": True, "stream": True}
                                                for i in range(60)])
        assert not any(a.error for a in answers)
        b.wait("document.querySelector('#sums').innerText.match(/Finished\\s+60/)", "they are counted")
        heights = b.js("[...document.querySelectorAll('.worker')].map(w => w.offsetHeight)")
        assert max(heights) < 1.5 * min(heights), heights
        shot("load")
        b.leave()


@needs_browser
def test_keys(chromium, shot, tmp_path):
    """The page is open, what it shows is not: it asks once and keeps the key for its tab."""
    keys = tmp_path / "keys"
    keys.write_text(f"alice:{hashlib.sha256(b'sk-alice').hexdigest()}\n")
    b = chromium
    with Cluster("--api-key-file", keys) as c:
        assert c.get("/")[0] == 200 and c.get("/status")[0] == 401
        b.size(1000, 700)
        b.open(c.url)
        for key in ("sk-mallory", "sk-alice"):
            b.wait("document.querySelector('#ask-key').open", "it asks")
            b.js("document.querySelector('#ask-key input').focus()")
            b.js("document.querySelector('#ask-key input').value = ''")
            b.type(key)
            b.key("Enter")
            b.wait("document.querySelector('#key-error').innerText || document.querySelector('.worker')"
                   if key == "sk-mallory" else "document.querySelectorAll('.worker').length == 2")
            shot(f"key-{key}")
        assert b.js("sessionStorage.getItem('key')") == "sk-alice"
        b.js("document.querySelector('#input').focus()")
        b.type("What is a dog?")
        b.key("Enter")
        b.wait("document.querySelector('.foot')")
        assert not b.js("document.querySelector('#log .error') != null")
        b.leave()
        c.wait_idle()
