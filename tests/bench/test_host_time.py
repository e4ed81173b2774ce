"""The host's time to issue a call, on a device and a clock that this file makes up."""

import time

import pytest
import torch

from lba_exp.bench import measure

CYCLES = 2e6  # of the made-up device in a millisecond


class Device:
    """A clock in milliseconds, and the time until which the device is busy."""

    def __init__(self, monkeypatch):
        self.now = self.busy = 0.0
        self.waits = []
        device = self

        class Event:
            def record(self):
                self.at = device.busy

            def query(self):
                return device.now >= self.at

        class Current:
            def __init__(self, _):
                pass

            def __enter__(self):
                pass

            def __exit__(self, *_):
                pass

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "device", Current)
        monkeypatch.setattr(torch.cuda, "synchronize", self.wait)
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep)
        monkeypatch.setattr(time, "perf_counter", lambda: self.now / 1e3)

    def wait(self):
        self.now = max(self.now, self.busy)

    def sleep(self, cycles):
        self.waits.append(cycles)
        self.busy = max(self.now, self.busy) + cycles / CYCLES

    def run(self, host, kernels):
        """A call that the host issues in ``host`` ms, and whose kernels take ``kernels`` ms."""
        self.now += host
        self.busy = max(self.now, self.busy) + kernels


@pytest.fixture
def device(monkeypatch):
    return Device(monkeypatch)


@pytest.mark.parametrize("kernels", [0.001, 500.0])
def test_kernels_do_not_count(device, kernels):
    times = iter([0.3, 9.0, 0.2, 0.4, 0.3])
    found = measure.host_time(lambda: device.run(next(times), kernels), 5, torch.device("cuda"))
    assert found == pytest.approx(0.3) and device.waits == [measure.SHORTEST_WAIT] * 5
    assert device.now >= device.busy, "the device is free afterwards"


def test_a_slow_host_gets_a_longer_wait(device):
    assert measure.host_time(lambda: device.run(35.0, 1.0), 3, torch.device("cuda")) == pytest.approx(35.0)
    assert device.waits[-3:] == [4 * measure.SHORTEST_WAIT] * 3 and len(device.waits) == 4


def test_a_call_that_waits_for_the_device_has_no_figure(device):
    def waits():
        device.run(0.1, 1.0)
        device.wait()

    assert measure.host_time(waits, 3, torch.device("cuda")) is None and len(device.waits) == 4


def test_none_on_the_cpu():
    assert measure.host_time(lambda: pytest.fail("called"), 3, torch.device("cpu")) is None
