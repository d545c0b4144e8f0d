#!/bin/sh
# A thread of low priority that holds CPython's lock stops the thread of normal priority that waits for it.
. "$(dirname "$0")/common"
make_tree trixie python3
chroot "$tree" python3 - <<'PYTHON'
import os, platform, subprocess, sys, threading, time

CPU = max(os.sched_getaffinity(0))
SECONDS = 4.0


def worst(nice: int) -> float:
    """The longest that a thread which sleeps for a millisecond at a time was kept (seconds), beside one that computes."""
    end = time.monotonic() + SECONDS

    def compute() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
        while time.monotonic() < end:
            sum(range(1000))

    thread, longest = threading.Thread(target=compute), 0.0
    thread.start()
    while time.monotonic() < end:
        begun = time.monotonic()
        time.sleep(0.001)
        longest = max(longest, time.monotonic() - begun)
    thread.join()
    return longest


os.sched_setaffinity(0, {CPU})
sys.setswitchinterval(100e-6)
other = subprocess.Popen([sys.executable, "-c", "while True: pass"])  # on the same CPU
try:
    same, low = worst(0), worst(19)
finally:
    other.kill()
print(f"Python {platform.python_version()}, Linux {os.uname().release}: beside a thread of the same priority it waited "
      f"at most {same * 1e3:.0f} ms, beside one of nice 19 {low * 1e3:.0f} ms")
sys.exit(0 if low > 3 * same else 1)
PYTHON
