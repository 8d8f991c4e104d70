#!/usr/bin/env python3
"""A program that answers as a vLLM server does, without a model: tokens follow from the seed.

Started in vLLM's place by naming it as the interpreter. HEADWATER_TEST_SERVER (JSON) says how it
misbehaves: `busy` (how often it answers 503 first), `dies_after` (requests; only while the file
`once` does not exist), `stale` (how many answers come from other weights), `silent` (it never
listens), `slow` (seconds an answer takes), `info` (changes to what it says it is), `dies_taking`
(it ends in the middle of weights that come through a link; while `once` does not exist),
`forgets` (how many links it forgets before weights come).
"""

import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

MISBEHAVES = json.loads(os.environ.get("HEADWATER_TEST_SERVER", "{}"))
KEY = os.environ.get("VLLM_API_KEY", "")
LOCK = threading.Lock()
STATE = {"version": "default", "asked": 0, "at_once": 0, "most": 0, "loads": 0, "stale": 0}
STATE |= {"joins": 0, "left": 0, "sums": []}
LINK = []
INFO = {
    "protocol": 2,
    "workers": 1,
    "copies": 1,
    "vocab_size": 64,
    "max_model_len": 128,
    "max_logprobs": 64,
    "logprobs_mode": "processed_logprobs",
    "dtype": "float32",
}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if self.path == "/state":
            return self.answer(200, STATE)
        if self.path == "/health":
            return self.answer(200, {})
        if self.headers["Authorization"] != f"Bearer {KEY}":
            return self.answer(401, {})
        if self.path == "/headwater/info" and MISBEHAVES.get("info") != "none":
            return self.answer(200, INFO | MISBEHAVES.get("info", {}))
        return self.answer(404, {})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/headwater/join":
            self.join(body)
            return
        if self.path == "/headwater/leave":
            if not LINK or body["link"] in (None, LINK[0].name):
                LINK.clear()
                STATE["left"] += 1
            self.answer(200, {})
            return
        if "plan" in body and not self.receive(body):
            return
        if self.path == "/headwater/weights":
            STATE["version"] = body["version"]
            STATE["loads"] += 1
            self.answer(200, {"version": body["version"]})
            return
        with LOCK:
            STATE["asked"] += 1
            STATE["at_once"] += 1
            STATE["most"] = max(STATE["most"], STATE["at_once"])
            asked = STATE["asked"]
        time.sleep(MISBEHAVES.get("slow", 0.0))
        if asked <= MISBEHAVES.get("busy", 0):
            self.answer(503, {"error": "busy"})
        else:
            self.maybe_die(asked)
            self.answer(200, self.generated(body))
        with LOCK:
            STATE["at_once"] -= 1

    def join(self, terms):
        import torch
        from headwater_vllm.link import Receiver

        LINK[:] = [Receiver(terms, 0, torch.device("cpu"))]
        STATE["joins"] += 1
        if STATE["joins"] <= MISBEHAVES.get("forgets", 0):
            LINK.clear()
        self.answer(200, {})

    def receive(self, body):
        """Take weights, and note their sum; whether they are there."""
        if not LINK or LINK[0].name != body["link"]:
            self.answer(500, {"error": "no link to a trainer"})
            return False
        once, total = Path(MISBEHAVES.get("once", "")), 0.0
        for _, tensor in LINK[0].tensors(body["plan"]):
            if MISBEHAVES.get("dies_taking") and not once.exists():
                once.touch()
                print("killed while it takes weights", flush=True)
                os._exit(3)
            total += float(tensor.double().sum())
        STATE["sums"].append(total)
        return True

    def maybe_die(self, asked):
        once = MISBEHAVES.get("once")
        if asked == MISBEHAVES.get("dies_after") and not (once and Path(once).exists()):
            print("out of something", flush=True)
            if once:
                Path(once).touch()
            os._exit(3)

    def generated(self, body):
        params = body["sampling_params"]
        seed = params.get("seed", 0)
        ids = [(seed + place) % 60 for place in range(1 + seed % params["max_tokens"])]
        version = STATE["version"]
        with LOCK:
            if STATE["stale"] < MISBEHAVES.get("stale", 0):
                STATE["stale"] += 1
                version = "another"
        content = [{"token_id": token, "logprob": -0.5} for token in ids]
        spans = [{"version": version, "start": 0, "end": len(ids)}]
        scores = [None] + [{str(t): {"logprob": -1.0, "rank": 1}} for t in body["token_ids"][1:]]
        choice = {"token_ids": ids, "logprobs": {"content": content}, "weight_versions": spans}
        return {"choices": [choice], "prompt_logprobs": scores}

    def answer(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


if __name__ == "__main__":
    print("key", KEY, flush=True)
    if MISBEHAVES.get("silent"):
        time.sleep(60)
    if MISBEHAVES.get("refuses"):
        sys.exit("No module named vllm")
    ENGINE = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
    subprocess.Popen(ENGINE)  # vLLM's engine is a process of its server's too
    PORT = int(sys.argv[sys.argv.index("--port") + 1])
    ThreadingHTTPServer.request_queue_size = 128
    ThreadingHTTPServer(("127.0.0.1", PORT), Handler).serve_forever()
