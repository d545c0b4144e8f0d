"""A program in a VMM's place that is none: pretender.py HOW -qmp unix:PATH,... [what else a VMM has].

HOW: silent, half (of a greeting), http, unversioned, dies (at the first command), empty (says {} to everything), or
liar (claims to be a QEMU that waits for a state, with the right memory, of which it has nothing).
"""

import json
import os
import socket
import sys
import time

how = sys.argv[1]
path = sys.argv[sys.argv.index("-qmp") + 1].removeprefix("unix:").partition(",")[0]
greeting = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}}, "capabilities": []}}
LIES = {
    "query-status": {"status": "inmigrate", "running": False},
    "query-memdev": [{"id": "ram", "size": 64 << 20, "share": True}],
    "qom-list": [],
    "qom-get": "x",
    "query-migrate": {},
}
if os.path.exists(path):
    os.unlink(path)
with socket.socket(socket.AF_UNIX) as listener:
    listener.bind(path)
    listener.listen()
    connection, _ = listener.accept()
    stream = connection.makefile("rw")
    said = {"silent": "", "half": json.dumps(greeting)[:20], "http": "HTTP/1.1 400 Bad Request\r\n\r\n",
            "unversioned": '{"QMP": {"capabilities": []}}\n'}.get(how, json.dumps(greeting) + "\n")
    stream.write(said)
    stream.flush()
    while how not in ("silent", "half", "http") and (line := stream.readline()):
        asked = json.loads(line)
        if how == "dies" and asked["execute"] != "qmp_capabilities":
            sys.exit(3)
        answer = {"return": LIES.get(asked["execute"], {}) if how == "liar" else {}, "id": asked.get("id")}
        stream.write(json.dumps(answer) + "\n")
        stream.flush()
    time.sleep(1000)
