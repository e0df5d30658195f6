"""embed.py FILE: an HTML page as a C header on stdout: page[], its ETag, and the Content-Security-Policy
under which its own <style> and <script> run (by their hashes) and nothing else does."""

import base64
import hashlib
import re
import sys

data = open(sys.argv[1], "rb").read()


def sources(tag):
    blocks = re.findall(b"<%s>(.*?)</%s>" % (tag, tag), data, re.S)
    assert blocks, f"{sys.argv[1]}: no {tag.decode()}"
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(b).digest()).decode()}'" for b in blocks)


policy = "; ".join(["default-src 'none'", f"script-src {sources(b'script')}", f"style-src {sources(b'style')}",
                    "connect-src 'self'", "img-src data:", "base-uri 'none'", "form-action 'none'",
                    "frame-ancestors 'none'"])
print("static const unsigned char page[] = {")
for i in range(0, len(data), 20):
    print(",".join(str(b) for b in data[i:i + 20]) + ",")
print("};")
print(f'static const char page_etag[] = "\\"{hashlib.sha256(data).hexdigest()[:16]}\\"";')
print(f'static const char page_policy[] = "{policy}";')
