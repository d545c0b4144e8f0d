"""Snapshots: the format (docs/snapshots.md), and the engine, which runs in the worker process and knows no asyncio.

Use from the daemon, with `changes.workers.working(job, verb, spec, fds)`; "root" is the descriptor of the folder that
the snapshots lie in. Each verb's docstring has its specification:
- `save` (save.py; its module docstring is the protocol of passes):
      async with working(job, "save", {"root": root, "name": name, "id": id, "size": size,
                                       "memory": {"fd": fd, "offset": 0}}, [root, fd]) as worker:
          async for message in worker:
              if "ready" in message:    worker.tell({"pass": {"dirty": None}})      # the guest stands still
              if "passed" in message:   worker.tell({"finish": {"object": {...}, "consistency": {...}}})
      worker.result                     # {"end": true, "id": UUID, "bytes": N}
- `restore`, `verify` (restore.py), `flatten`, `cold` (rewrite.py): {"root", "name", ...}; they say {"total"}, {"done"}.
Errors are sentences: `working` raises them as QmpError.

Use in a thread, without a worker: `folder.names(root)`, `manifest.read(folder, name)`, `rewrite.manifests(root)` for
the catalogue, `rewrite.children(root, id)` (the deltas that need one), `folder.remove(root, name)`,
`folder.sweep(root)`.

What reads and writes bytes: `source.Memory` (an object), `stored.Stored` and its parts (a snapshot, every block
checked), `restore.Target` (memory to be filled), `save.Saving` with `half.Half` (a snapshot being written).
"""
