"""``explain`` and real traffic agree in mode ipvs: in a lab of its own, beside the other tests."""

import json
import subprocess
import sys

LIMIT_SECONDS = 600


def test_explain_traffic_and_the_kernel_agree():
    words = [sys.executable, "-m", "tests.netns.agreement", "ipvs", "briefly"]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True) as process:
        output, errors = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 0, errors
    told = json.loads(output)
    assert told["disagreements"] == []
    assert told["count"] > 100
    assert told["refusals"] == {
        "default/fenced": ["denied"],
        "default/nobody-home": ["rejected"],
        "shop/apart": ["dropped"],
        "shop/inner": ["dropped"],
    }
    verdicts = {name: [f[1] for f in found] for name, found in told["verdicts"].items()}
    assert verdicts == {name: ["agrees"] * len(found) for name, found in verdicts.items()}
