"""embed.py NAME FILE: a file as a C header on stdout: NAME[], NAME_etag and, of an HTML page, NAME_policy: the
Content-Security-Policy under which its own <style> and <script> run (by their hashes) and nothing else does."""

import base64
import hashlib
import re
import sys

name, path = sys.argv[1:]
data = open(path, "rb").read()


def sources(tag):
    blocks = re.findall(b"<%s>(.*?)</%s>" % (tag, tag), data, re.S)
    assert blocks, f"{path}: no {tag.decode()}"
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(b).digest()).decode()}'" for b in blocks)


print(f"static const unsigned char {name}[] = {{")
for i in range(0, len(data), 20):
    print(",".join(str(b) for b in data[i:i + 20]) + ",")
print("};")
print(f'static const char {name}_etag[] = "\\"{hashlib.sha256(data).hexdigest()[:16]}\\"";')
if path.endswith(".html"):
    policy = "; ".join(["default-src 'none'", f"script-src {sources(b'script')}", f"style-src {sources(b'style')}",
                        "connect-src 'self'", "img-src data:", "base-uri 'none'", "form-action 'none'",
                        "frame-ancestors 'none'"])
    print(f'static const char {name}_policy[] = "{policy}";')
