"""embed.py FILE NAME: FILE as a C array NAME[] on stdout, with NAME_bytes."""

import sys

data = open(sys.argv[1], "rb").read()
name = sys.argv[2]
print(f"static const unsigned char {name}[] = {{")
for i in range(0, len(data), 20):
    print(",".join(str(b) for b in data[i:i + 20]) + ",")
print(f"}};\nstatic const unsigned {name}_bytes = {len(data)};")
