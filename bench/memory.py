"""Peak memory of one case in its own process: ``python -m bench.memory fastcircuit`` prints bytes above the weights.

Cases: a training step (``fastcircuit``, ``published``), or an attribution (``eap-ours``, ``eap-ig-published``, ...).
"""

import sys

from bench.cases import attribution
from bench.cases.training_step import GPT2_SMALL, STEPS, random_model


def status(field: str) -> int:
    """Bytes of a line of /proc/self/status. Not getrusage: its peak begins with that of the process that started us."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def main() -> None:
    model = random_model(GPT2_SMALL)
    with_weights = status("VmRSS")
    case = sys.argv[1]
    step = STEPS[case](model, GPT2_SMALL) if case in STEPS else attribution.CALLS[case](model)
    for _ in range(2):
        step()
    print(status("VmHWM") - with_weights)


if __name__ == "__main__":
    main()
