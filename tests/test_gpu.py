"""The scripts on a pretended GPU: no tensors on different devices, exact resume, CPU reads."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY, best, run, same_weights

import data

HOME = Path(data.__file__).parent
LESS = {"diffseg": ["--outputs", "2", "--method", "diffseg_student"], "pepl": []}
LESS["caudo_diff"] = ["--method", "caudo_diff_prior"]
SKIP = 77  # exit status of a process in which this version of torch cannot pretend


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a process without a real GPU")
@pytest.mark.parametrize("script, at", [("diffseg", 8), ("pepl", 42), ("caudo_diff", 21)])
def test_a_script_trains_resumes_evaluates_and_predicts_on_a_gpu(script, at, tmp_path):
    command = [sys.executable, __file__, script, str(at), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(HOME)}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    if ran.returncode == SKIP:
        pytest.skip("torch's private functions for such a device differ")
    assert ran.returncode == 0, ran.stderr[-3000:]


def main(script, at, folder):
    """The test's own process; `at` is the call of update_ema at which a run is interrupted."""
    try:
        from pretend import NAME, pretend
    except (ImportError, AttributeError):
        sys.exit(SKIP)
    more, script = LESS[script], importlib.import_module(script)
    folder, calls = Path(folder), []
    flags = [*(NAME if flag == "cpu" else flag for flag in TINY[script]), *more]
    update, data.parse_device = script.update_ema, str

    def interrupted(*args):
        calls.append(None)
        if len(calls) == int(at):
            raise KeyboardInterrupt
        update(*args)

    with pretend():
        assert run(script, *flags, "--out", folder / "whole") == 0
        script.update_ema = interrupted
        assert run(script, *flags, "--out", folder / "cut") == 130
        assert run(script, *flags, "--out", folder / "cut", "--resume") == 0
        figure, path = next((folder / "whole").rglob("*.png")), best(folder / "whole")
        use = ["--checkpoint", path, "--out", folder, "--device"]
        assert run(script, "--predict", figure, *use, NAME) == 0
    assert same_weights(folder / "whole", folder / "cut")
    assert run(script, "--eval-only", *use, "cpu") == 0


if __name__ == "__main__":
    main(*sys.argv[1:])
