"""How fast a run goes: tokens and steps per second, time lost waiting for data, time left, and MFU.

MFU (model FLOPs utilisation; Chowdhery et al. 2022, PaLM, appendix B) is the arithmetic the model needs for the tokens
and patches of pictures seen, over what the devices could have done in that time. Recomputed activations do not count,
so rematerialisation lowers it.
"""

import contextlib
import re
import time
from collections.abc import Callable, Iterator

# Dense bfloat16 TFLOP/s of one jax device, from the makers' data sheets. A TPU7x chip (2307) is two devices.
_TPU_PEAKS = {
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5": 459.0,
    "TPU v5p": 459.0,
    "TPU v6 lite": 918.0,
    "TPU v6e": 918.0,
    "TPU7x": 1153.5,
}
# Beginnings of device kinds, the longer first: "NVIDIA H100 80GB HBM3" is an H100.
_GPU_PEAKS = {
    "NVIDIA B200": 2250.0,
    "NVIDIA GH200": 989.4,
    "NVIDIA H200 NVL": 835.5,
    "NVIDIA H200": 989.4,
    "NVIDIA H100 PCIe": 756.4,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H100": 989.4,
    "NVIDIA A100": 312.0,
    "NVIDIA A40": 149.7,
    "NVIDIA L40S": 362.0,
    "NVIDIA L40": 181.0,
    "NVIDIA L4": 121.0,
}


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of one jax device of this `device_kind`; None where it is not known, as for every CPU."""
    for name, tera in _GPU_PEAKS.items():
        if re.match(rf"{name}(?![A-Za-z0-9])", device_kind):
            return tera * 1e12
    return _TPU_PEAKS[device_kind] * 1e12 if device_kind in _TPU_PEAKS else None


def flops_per_token(
    *, trained: int, frozen: int = 0, layers: int, heads: int, head_dim: int, context: float, forwards: int = 0
) -> float:
    """FLOPs a decoder needs to train on one token: 6 N + 12 layers · heads · head_dim · context.

    trained, frozen: parameters used in matrix products; a table that is only looked up does not count, one that is also
    the output head does. A frozen one costs 4 instead of 6: its gradient is not needed, that of its input is. context:
    tokens attended to, the row's length by PaLM's convention (causal masking not deducted), the mean length of
    documents in packed rows. `forwards`: how often the token goes forward besides, as through a reference, each a third
    of a whole model's training.
    """
    attention = 12 * layers * heads * head_dim * context
    return 6 * trained + 4 * frozen + attention + forwards * (2 * (trained + frozen) + attention / 3)


class Throughput:
    """Rates of a run, by the wall clock, without its first step (which compiles).

    Steps are dispatched ahead of the devices: call `read` right after metrics were fetched, which waits for them.
    """

    def __init__(
        self,
        *,
        total_steps: int,
        done_steps: int = 0,
        devices: int = 1,
        flops_per_token: float | None = None,
        flops_per_patch: float = 0.0,
        flops_per_pair: float = 0.0,
        device_peak: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._clock = clock
        self._left = total_steps - done_steps
        self._devices = devices
        self._flops = (flops_per_token or 0.0, flops_per_patch, flops_per_pair)
        known = flops_per_token is not None and device_peak is not None
        self._peak = device_peak * devices if known else None  # type: ignore[operator]
        self._born = clock()
        self._begun: float | None = None  # when the first step was over
        self._window = _Tally()
        self._run = _Tally()

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Around what brings the next batch."""
        begun = self._clock()
        yield
        self._count(waited=self._clock() - begun)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Around evaluation, saving and sampling: counts for the time left, not for the rates."""
        begun = self._clock()
        yield
        self._count(paused=self._clock() - begun)

    def step(self, *, tokens: int, rows: int, patches: int = 0, pairs: int = 0) -> None:
        """Counts one optimizer step with so many non-padding tokens and rows, over all devices; of pictures, patches
        and pairs of patches of one picture.
        """
        self._left -= 1
        if self._begun is None:
            self._begun = self._window.since = self._run.since = self._clock()
        else:
            self._count(steps=1, tokens=tokens, rows=rows, patches=patches, pairs=pairs)

    def read(self) -> dict[str, float]:
        """Rates since the last `read`; empty while no step but the first is over.

        tokens_per_second, tokens_per_second_per_device, steps_per_second, data_wait (share of the time spent waiting),
        goodput (share of all seconds since the run began that went into steps after the first: not into getting ready,
        compiling, waiting for data, evaluating, saving), eta_seconds (at the pace so far, pauses included), and mfu (0
        to 1) where it is known.
        """
        now = self._clock()
        if self._window.steps == 0:
            return {}
        rates = self._rates(self._window, now)
        rates["goodput"] = self._goodput(now)
        rates["eta_seconds"] = self._left * (now - self._run.since) / self._run.steps
        self._window = _Tally(since=now)
        return rates

    def summary(self) -> dict[str, float]:
        """The whole run by transformers' names: train_runtime (seconds, first step and pauses included) and rates."""
        now = self._clock()
        result = {"train_runtime": now - self._born}
        if self._run.steps:
            rates = self._rates(self._run, now)
            seconds = self._run.seconds(now)
            result |= {
                "train_samples_per_second": self._run.rows / seconds,
                "train_steps_per_second": rates["steps_per_second"],
                "train_tokens_per_second": rates["tokens_per_second"],
                "train_goodput": self._goodput(now),
            }
            result |= {"train_mfu": rates["mfu"]} if "mfu" in rates else {}
        return result

    def _goodput(self, now: float) -> float:
        productive = self._run.seconds(now) - self._run.waited
        return max(productive, 0.0) / max(now - self._born, 1e-9)

    def _rates(self, tally: "_Tally", now: float) -> dict[str, float]:
        seconds = tally.seconds(now)
        tokens = tally.tokens / seconds
        rates = {
            "tokens_per_second": tokens,
            "tokens_per_second_per_device": tokens / self._devices,
            "steps_per_second": tally.steps / seconds,
            "data_wait": tally.waited / seconds,
        }
        if self._peak is None:
            return rates
        counts = (tally.tokens, tally.patches, tally.pairs)
        flops = sum(count * each for count, each in zip(counts, self._flops, strict=True))
        return rates | {"mfu": flops / seconds / self._peak}

    def _count(self, **amounts: float) -> None:
        if self._begun is not None:
            for tally in (self._window, self._run):
                for name, amount in amounts.items():
                    setattr(tally, name, getattr(tally, name) + amount)


class _Tally:
    """Sums over a stretch of the run that began at `since`."""

    def __init__(self, since: float = 0.0):
        self.since = since
        self.steps = self.tokens = self.rows = self.patches = self.pairs = 0
        self.waited = self.paused = 0.0

    def seconds(self, now: float) -> float:
        return max(now - self.since - self.paused, 1e-9)
