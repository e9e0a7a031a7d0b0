"""What all three scripts do by their command lines: train, evaluate, go on, predict, refuse."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, best, error_lines, result, run, same_weights, segmentation_folder
from PIL import Image

import caudo_diff
import data
import diffseg
import pepl

ROWS = {diffseg: list(diffseg.ROWS), pepl: list(pepl.METHODS), caudo_diff: caudo_diff.ROWS}
MORE = {diffseg: "ambiguity", pepl: "pseudo_labels", caudo_diff: "pseudo_labels"}
LOSSES = {diffseg: "known_cross_entropy", pepl: "hybrid_loss", caudo_diff: "denoiser_loss"}
PICTURES = {diffseg: "ambiguity coherence mask overlay", pepl: "cam"}
PICTURES[caudo_diff] = "mask overlay probability"


def name(x):
    return getattr(x, "__name__", x)


each_script = pytest.mark.parametrize("script", TINY, ids=name)


@each_script
def test_a_run_writes_its_table_and_eval_only_repeats_it(script, trained, capsys, monkeypatch):
    found, path = result(out := trained(script)), best(out)
    assert list(found["rows"]) == ROWS[script] and found[MORE[script]]
    path.with_name("result.json").unlink()
    seen = []
    for name in ("load_segmentation", "load_classification"):
        load = getattr(data, name)
        monkeypatch.setattr(
            data, name, lambda *a, load=load, **k: seen.append(a[2]) or load(*a, **k)
        )
    assert run(script, "--eval-only", "--checkpoint", path, "--device", "cpu") == 0
    assert seen == ["test"]
    assert result(out) == found
    figure = capsys.readouterr().out.split("Open ")[-1].strip()
    assert Image.open(figure).width > 400


@pytest.mark.parametrize(
    "script, at, steps", [(diffseg, 12, 30), (pepl, 42, 42), (caudo_diff, 42, 60)], ids=name
)
def test_resume_equals_an_unbroken_run(script, at, steps, trained, tmp_path, monkeypatch):
    whole, update, calls = trained(script), script.update_ema, []

    def interrupted(*args):  # in the sixth step of a network, two after it was saved
        calls.append(None)
        if len(calls) == at:
            raise KeyboardInterrupt
        update(*args)

    earlier = tmp_path / best(whole).relative_to(whole)
    earlier.parent.mkdir(parents=True)
    earlier.write_text("an earlier run's")
    monkeypatch.setattr(script, "update_ema", interrupted)
    assert run(script, *TINY[script], "--out", tmp_path) == 130 and not earlier.exists()
    assert run(script, *TINY[script], "--out", tmp_path, "--resume") == 0
    assert len(calls) == steps + 2 and same_weights(whole, tmp_path)
    assert result(tmp_path)["rows"] == result(whole)["rows"]


@each_script
def test_predict_draws_in_the_photographs_own_size(script, trained, tmp_path, capsys):
    Image.new("RGB", (60, 40), "red").save(tmp_path / "a.png")
    for name in "bc":
        (tmp_path / f"{name}.png").write_text("no image")
    flags = ["--predict", tmp_path, "--checkpoint", best(trained(script)), "--out", tmp_path]
    assert run(script, *flags) == 2
    b, c = error_lines(capsys)
    assert "b.png" in b and "c.png" in c
    drawn = sorted(tmp_path.rglob(f"{tmp_path.name}/a_*.png"))
    assert " ".join(p.stem[2:] for p in drawn) == PICTURES[script]
    assert all(Image.open(p).size == (60, 40) for p in drawn)
    for mask in tmp_path.rglob("a_mask.png"):
        assert np.isin(Image.open(mask), (0, 255)).all()


@pytest.mark.parametrize(
    "script, flags, words",
    [
        (diffseg, "--seed -1", "--seed"),
        (diffseg, "--size 7", "--size"),
        (diffseg, "--device tpu7", "use cpu"),
        (diffseg, "--checkpoint a.pt", "--resume"),
        (diffseg, "--data folder --data-root none", "none: this folder does not exist"),
        (pepl, "--labels-per-class 999", "lower --labels-per-class"),
        (pepl, "--arch tiny --pretrained", "--arch efficientnet_lite0"),
        (pepl, "--out /dev/null", "/dev/null"),
        (caudo_diff, "--exemplar img99", "--exemplar img99 is not one"),
        (caudo_diff, "--encoder resnet1", "resnet1"),
        (caudo_diff, "--method caudo_diff_crf", "name both"),
        (caudo_diff, "--data folder --data-root one", "no unlabelled image"),
    ],
    ids=name,
)
def test_bad_input_gets_one_line_and_status_2(script, flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    segmentation_folder(tmp_path / "one", n=1)
    assert run(script, *TINY[script], *flags.split()) == 2
    (line,) = error_lines(capsys)
    assert line.startswith(f"{script.__name__}.py: error: ") and words in line


@each_script
def test_a_loss_that_is_not_finite_stops_with_one_line(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, LOSSES[script], lambda *_: torch.tensor(torch.nan))
    assert run(script, *TINY[script], "--out", tmp_path) == 2
    assert "loss is nan" in error_lines(capsys)[0]


def test_readmes_snippet_segments_a_photograph(trained, tmp_path):
    Image.new("RGB", (60, 40), "red").save(tmp_path / "a.png")
    readme = (Path(data.__file__).parent / "README.md").read_text()
    (code,) = (x for x in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "best.pt" in x)
    code = code.replace("photo.jpg", str(tmp_path / "a.png"))
    code = code.replace("out/diffseg/synthetic/seed0/best.pt", str(best(trained(diffseg))))
    exec(code, found := {})
    assert found["mask"].shape == (1, 1, 16, 32) and found["mask"].dtype == torch.bool
