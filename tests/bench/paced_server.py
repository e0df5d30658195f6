#!/usr/bin/env python3
"""A server that streams answers at a pace that is known: what a load generator measures is then known too.

    python3 tests/bench/paced_server.py --port 9000 --ttft-ms 100 --itl-ms 20

It speaks /v1/completions (and /v1/models), sends max_tokens events of one token each, every one by
itself, and after the last one usage and [DONE]. --itl-ms 0 sends as fast as it can. A prompt may ask for
trouble: "status 503", "cut 3" (hang up after 3 events), "error 3" (an error event), "garbage 3", "silent" (no answer),
"mute" (tokens without text: only the end is sent).
"""

import argparse
import asyncio
import json


class PacedServer:
    def __init__(self, ttft_s, itl_s):
        self.ttft_s, self.itl_s = ttft_s, itl_s
        self.server = None
        self.answers = []  # what was sent when, in the form of baton bench's "requests"

    async def start(self, port=0):
        self.server = await asyncio.start_server(self._connection, "127.0.0.1", port, backlog=4096)
        return self.server.sockets[0].getsockname()[1]

    async def _connection(self, reader, writer):
        try:
            while (line := await reader.readline()):
                length = 0
                while (header := (await reader.readline()).strip()):
                    if header.lower().startswith(b"content-length:"):
                        length = int(header.split(b":")[1])
                body = json.loads(await reader.readexactly(length)) if length else None
                path = line.split()[1].decode()
                if path == "/v1/models":
                    self._reply(writer, 200, {"data": [{"id": "paced"}]})
                elif path != "/v1/completions":
                    self._reply(writer, 404, {"error": {"message": f"no {path} here"}})
                elif not await self._answer(writer, body):
                    return
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    @staticmethod
    def _reply(writer, status, value):
        data = json.dumps(value).encode()
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n"
                     f"Content-Length: {len(data)}\r\n\r\n".encode() + data)

    async def _answer(self, writer, body):
        """False: the connection is to be closed."""
        prompt = body["prompt"] if isinstance(body["prompt"], str) else ""
        word, _, number = prompt.partition(" ")
        number = int(number) if number.isdigit() else 0
        if word == "status":
            self._reply(writer, number, {"error": {"message": f"told to say {number}"}})
            return True
        if word == "silent":
            await asyncio.sleep(3600)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")

        def event(value):
            data = value if isinstance(value, bytes) else b"data: " + json.dumps(value).encode() + b"\n\n"
            writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

        loop = asyncio.get_running_loop()
        began = loop.time()
        n = body["max_tokens"]
        answer = {"sent_us": began * 1e6, "event_us": [], "end_us": 0, "output_tokens": n}
        self.answers.append(answer)
        for i in range(n):
            if number and i == number:
                if word == "cut":
                    return False
                event({"error": {"message": "told to fail"}} if word == "error" else b"data: {oops\n\n")
                break
            wait = began + self.ttft_s + i * self.itl_s - loop.time()
            if wait > 0 or self.itl_s == 0:
                await asyncio.sleep(max(wait, 0))  # also lets the others have a turn
            if writer.is_closing():
                return False
            answer["end_us"] = loop.time() * 1e6
            answer["event_us"].append(answer["end_us"] - answer["sent_us"])
            if word == "mute" and i + 1 < n:
                continue
            event({"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "paced", "choices": [
                {"index": 0, "text": "" if word == "mute" else f" word{i % 10}", "logprobs": None,
                 "finish_reason": "length" if i + 1 == n else None}], "usage": None})
        if (body.get("stream_options") or {}).get("include_usage"):
            event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": n}})
        event(b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True


async def serve(args):
    server = PacedServer(args.ttft_ms / 1e3, args.itl_ms / 1e3)
    print(f"http://127.0.0.1:{await server.start(args.port)}", flush=True)
    await server.server.serve_forever()


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--port", type=int, default=0)
    p.add_argument("--ttft-ms", type=float, default=100)
    p.add_argument("--itl-ms", type=float, default=20)
    asyncio.run(serve(p.parse_args()))
