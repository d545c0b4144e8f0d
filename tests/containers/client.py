"""A client in a container of its own: makes an object, maps its memory, writes or reads.

client.py write TEXT [PROPERTY=VALUE...]    object-add with these properties, and TEXT into its first bytes
client.py read ID                           prints the first bytes

It has nothing in common with the daemon but the socket; the memory comes through it as an fd.
"""

import json
import mmap
import os
import sys

from gmemd.client.client import Client

SIZE = 2 << 20  # bytes


def memory(client: Client, name: str) -> mmap.mmap:
    """Map the memory of an object."""
    info, [fd] = client.execute_fds("memdev-get-fd", {"id": name})
    print(json.dumps(info), file=sys.stderr)
    try:
        return mmap.mmap(fd, info["size"], offset=info["offset"])
    finally:
        os.close(fd)


def main() -> None:
    """Do what the command line says."""
    what, argument, *properties = sys.argv[1:]
    with Client(os.environ["GMEMD_SOCKET"], timeout=180, wait=180) as client:
        if what == "write":
            options = {"size": SIZE, "share": True, **dict(word.split("=", 1) for word in properties)}
            client.execute("object-add", options)
            with memory(client, options["id"]) as view:
                view[: len(argument)] = argument.encode()
        else:
            with memory(client, argument) as view:
                print(view[: view.find(b"\0")].decode())


main()
