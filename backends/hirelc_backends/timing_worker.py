"""In: ONNX files and, over a pipe, how many rounds to run. Out: over the pipe, the nanoseconds of every single run.

This file runs as a process of its own on the machine that is timed. It needs numpy and onnxruntime, and nothing else.
"""

from __future__ import annotations

import gc
import json
import os
import queue
import random
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnxruntime

WARM_UP_RUNS = 20
"""Runs are steady within 1 to 2 % from the 4th to 7th on (20 sessions watched), so 20 leaves room."""
WARM_UP_SECONDS = 5.0
"""A slow file stops warming up after this, but not before 7 runs."""

SETTLE_NANOSECONDS = 5_000_000
"""Untimed runs of the same file, at least one, before a burst: each file finds the caches as it leaves them itself.
ResNet-18 at 64x64 beside its FP32 form, integer / FP32 time: 0.33 when single runs alternate, because each integer run
then fetches weights that 44 MB of FP32 weights have just driven out; 0.20 after settling; 0.18 with the files apart."""
BURST = 5
"""Timed runs of one file in a row; keeps what settling costs near the cost of the runs themselves."""

_NUMPY_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
}


def open_session(path: str, threads: int, profile_prefix: str | None = None) -> onnxruntime.InferenceSession:
    """Return a quiet CPU session that leaves the cores alone while it is idle."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    # A spinning pool of one session would eat the time of the other session in the same round.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if profile_prefix is not None:
        options.enable_profiling = True
        options.profile_file_prefix = profile_prefix
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def random_input(session: onnxruntime.InferenceSession, seed: int = 0) -> dict[str, Any]:
    """Return one input of batch 1 for `session`: standard normal, or all values of an integer type alike."""
    rng = np.random.default_rng(seed)
    feed: dict[str, Any] = {}
    for wanted in session.get_inputs():
        shape = [size if isinstance(size, int) else 1 for size in wanted.shape]
        dtype = _NUMPY_TYPES[wanted.type]
        if np.issubdtype(dtype, np.integer):
            feed[wanted.name] = rng.integers(0, 128, shape).astype(dtype)
        else:
            feed[wanted.name] = rng.standard_normal(shape).astype(dtype)
    return feed


def main(threads: int, seed: int, paths: list[str]) -> None:
    """Load and warm up every file, then answer each line `N` with N rounds of [[wall, CPU], ...] nanoseconds."""
    # Whatever a library prints must not end up between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    requests: queue.SimpleQueue[int] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()
    order, shuffle = list(range(len(paths))), random.Random(seed).shuffle
    sessions, warm_up_seconds = {}, 0.0
    # The same file loaded twice was 1.5 % faster the second time, so the order of loading is drawn too, and turned
    # around in the process with the next seed.
    random.Random(seed // 2).shuffle(order)
    if seed % 2:
        order.reverse()
    for index in order:
        path = paths[index]
        try:
            session = open_session(path, threads)
            feed = random_input(session)
            started = time.monotonic()
            for run in range(WARM_UP_RUNS):
                if run >= 7 and time.monotonic() - started > WARM_UP_SECONDS:
                    break
                session.run(None, feed)
            warm_up_seconds += (time.monotonic() - started) / (run + 1)
        except Exception as error:  # the runtime's own exception types share no narrower base
            answer({"refused": path, "reason": str(error)})
            return
        sessions[index] = (session, feed)

    # With one thread the calling thread does all the work, so its own clock leaves out every other process and thread.
    cpu_clock = time.thread_time_ns if threads == 1 else time.process_time_ns
    gc.collect()
    gc.disable()
    answer({"ready": True, "seconds_per_round": warm_up_seconds})
    while True:
        count = requests.get()
        samples: list[list[tuple[int, int]]] = []
        while len(samples) < count:
            rows = [[(0, 0)] * len(order) for _ in range(min(BURST, count - len(samples)))]
            shuffle(order)
            for index in order:
                session, feed = sessions[index]
                settled = time.perf_counter_ns() + SETTLE_NANOSECONDS
                session.run(None, feed)
                while time.perf_counter_ns() < settled:
                    session.run(None, feed)
                for row in rows:
                    cpu, wall = cpu_clock(), time.perf_counter_ns()
                    session.run(None, feed)
                    row[index] = (time.perf_counter_ns() - wall, cpu_clock() - cpu)
            samples += rows
        answer({"nanoseconds": samples})


def _listen(requests: queue.SimpleQueue[int]) -> None:
    # Reads in a thread, so that the end of the parent ends this process even in the middle of a long load or run.
    for line in sys.stdin:
        requests.put(int(line))
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
