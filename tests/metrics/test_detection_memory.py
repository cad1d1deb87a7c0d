"""Memory of an evaluation of many objects, in a process of its own."""

import subprocess
import sys

import pytest

MEASURE = """
import threading, time
import numpy as np
from pathlib import Path
from vitrail.metrics.detection import Annotated, DetectionMetrics, Found

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

DetectionMetrics(1).compute()
start, peak = resident(), [0]
def watch():
    while True:
        peak[0] = max(peak[0], resident())
        time.sleep(0.01)
threading.Thread(target=watch, daemon=True).start()
rng = np.random.default_rng(0)
metrics = DetectionMetrics(1)
images, each = {images}, {each}
for i in range(images):
    corner = rng.random((each, 2)) * 600
    boxes = np.concatenate([corner, corner + np.exp(rng.uniform(2, 5, (each, 2)))], 1)
    found = boxes + rng.normal(0, 2, boxes.shape)
    found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
    labels, scores = np.zeros(each, int), rng.random(each)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    truth = Annotated(boxes, labels, np.zeros(each, bool), areas)
    metrics.update(i, Found(found, scores, labels), truth)
found = metrics.compute()
assert found["num_objects"] == [images * each] and 0.1 < found["box"]["AP"] < 0.9
print((peak[0] - start) / 2**20)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("images", "each"), [(2000, 100), (534, 375)])
def test_200_000_objects_are_measured_within_a_gibibyte(images, each):
    code = MEASURE.replace("{images}", str(images)).replace("{each}", str(each))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1024
