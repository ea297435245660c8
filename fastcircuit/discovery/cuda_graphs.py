"""Functions of buffers, recorded as CUDA graphs and replayed."""

from collections.abc import Callable, Hashable

import torch


class Recorder:
    """Runs functions by name: as they are the first time, recorded the second time, from then on by replay.

    The first run is a real one and warms up what a recording cannot hold (kernels that are compiled, workspaces, the
    optimizer's state), so nothing is run for show and no state has to be put back. All recordings share one pool of
    memory: they run one after the other, and what outlives them is in buffers of their caller.

    Args:
        device: where those buffers are; it is the current device of all that runs here, whichever it is outside.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()
            self._aside = torch.cuda.Stream()  # one for all: memory that is freed on a stream is used again on it alone
            # torch's own stream for recordings is on the device that recorded first.
            self._recording = torch.cuda.Stream()

    def __call__(self, key: Hashable, call: Callable[[], None]) -> None:
        """Do what ``call`` does; the same key must always come with the same function of the same buffers."""
        with torch.cuda.device(self._device):
            self._run(key, call)

    def _run(self, key: Hashable, call: Callable[[], None]) -> None:
        if key not in self._graphs:
            self._run_aside(call)
            self._graphs[key] = None
            return
        graph = self._graphs[key]
        if graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._recording):
                call()
            self._graphs[key] = graph
        graph.replay()

    def _run_aside(self, call: Callable[[], None]) -> None:
        """Run on a stream that is not the default one, as a recording does."""
        self._aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._aside):
            call()
        torch.cuda.current_stream().wait_stream(self._aside)
