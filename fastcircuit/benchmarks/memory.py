"""Peak memory of one variant, from after its operands were made: of a process of its own, or of the device's counters.

``python -m fastcircuit.benchmarks.memory`` with a JSON request on stdin prints the bytes.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from fastcircuit.benchmarks.case import Case, Target, Variant
from fastcircuit.errors import RunError

CALLS, SLOW = 2, 10.0  # seconds: a call that takes longer is not repeated
STATUS, PEAK_FROM_NOW = Path("/proc/self/status"), (Path("/proc/self/clear_refs"), "5")


def peak_bytes(case: Case, name: str, target: Target, threads: int) -> int | None:
    """Bytes that making and calling variant ``name`` needs at its peak; None where it cannot be measured."""
    if case.device == "cuda":
        return _device_peak(case, name)
    if not STATUS.exists() or not os.access(PEAK_FROM_NOW[0], os.W_OK):
        return None
    request = {"suite": case.suite, "key": case.key, "variant": name, "quick": target.quick, "threads": threads}
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "fastcircuit.benchmarks.memory"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    if done.returncode:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise RunError(f"{case.key}: the peak memory of {name} could not be measured: {reason}")
    return int(done.stdout.splitlines()[-1])


def _device_peak(case: Case, name: str) -> int:
    import torch

    state = case.setup()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _use(case.variants[name](state))
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _use(variant: Variant) -> None:
    start = time.perf_counter()
    for _ in range(CALLS):
        variant.call()
        if time.perf_counter() - start > SLOW:
            return


def _status(field: str) -> int:
    """Bytes of a line of /proc/self/status. Not getrusage: its peak begins with that of the process that started us."""
    with STATUS.open() as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def main() -> None:
    import torch

    from fastcircuit.benchmarks.registry import load
    from fastcircuit.ops.memory import free_cached_memory

    request = json.load(sys.stdin)
    torch.set_num_threads(request["threads"])
    (case,) = (case for case in load(request["suite"], Target("cpu", request["quick"])) if case.key == request["key"])
    state = case.setup()
    free_cached_memory(torch.device("cpu"))  # what setup has used would be taken again, and not be seen
    PEAK_FROM_NOW[0].write_text(PEAK_FROM_NOW[1])
    before = _status("VmRSS")
    _use(case.variants[request["variant"]](state))
    print(_status("VmHWM") - before)


if __name__ == "__main__":
    main()
