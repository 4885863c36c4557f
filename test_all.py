"""Tests with oracles: values worked by hand, published libraries, invariants.

    python -m pytest -q test_all.py                               # minutes; -m "" adds the slow ones
    python -m pytest -m slow -s -k bench test_all.py              # what a training step costs here
    OFFROAD_DATA=DIR python -m pytest ...                         # also on real pairs in DIR/train, DIR/val
    OFFROAD_WEIGHTS=DIR python -m pytest ...                      # also with DIR/resnet50_in1k_to_layer3.pth

A  pure functions: data, losses, models, scores
B  the pipeline, through each script's main()
C  bad input: tables of cases, one line and exit status 2 for each
D  slow: killed processes, signals, torchrun, ONNX, timing
"""
import argparse
import copy
import csv
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import torchvision
import transformers
from PIL import Image
from torch import nn

import data
import distill
import evaluate
import infer
import losses
import models
import train_teacher

HERE = Path(__file__).parent
REAL = os.environ.get("OFFROAD_DATA")
real = pytest.mark.skipif(not REAL, reason="OFFROAD_DATA names no folder of real pairs")
WEIGHTS = os.environ.get("OFFROAD_WEIGHTS")
CPU = torch.device("cpu")
ALONE = train_teacher.World(0, 1, CPU)           # the world of one process
PLAIN = {"amp": "off", "workers": 0, "device": "cpu"}
TINY = {"init": "random", "size": 64, "batch_size": 4, "lr": 1e-3, **PLAIN}
B0 = {"arch": "segformer-b0", **TINY}
EXACT = {"amp": "off", "device": "cpu"}


# ------------------------------------------------------------ helpers
def flags(*positional, **named):
    """flags("a.png", batch_size=4, demo=True, teachers=[p, q]) -> the list of a command line's words."""
    words = [str(word) for word in positional]
    for name, value in named.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            words.append(flag)
        elif isinstance(value, list | tuple):
            words += [flag, *map(str, value)]
        elif value is not None:
            words += [flag, str(value)]
    return words


def run_child(*command, deadline=120, env=None, check=True, cwd=HERE):
    """Runs Python with `command`, and fails instead of waiting for ever."""
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, cwd=cwd,
                          timeout=deadline, env={**os.environ, **(env or {})}, check=False)
    assert not check or done.returncode == 0, done.stderr
    return done


def start_child(*command, **how):
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": HERE, **how}
    return subprocess.Popen([sys.executable, *map(str, command)], **how)


def wait_for_line(child, text, count=1, deadline=120):
    """Reads a child's output until `text` has come `count` times; False if the child ended before."""
    alarm = threading.Timer(deadline, child.kill)             # a killed child ends the loop
    alarm.start()
    try:
        for line in child.stdout:
            count -= text in line
            if count == 0:
                return True
        return False
    finally:
        alarm.cancel()


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def torchrun(script, argv, check=True):
    """The script in two processes."""
    run = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    env = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return run_child(*run, HERE / script, *argv, env=env, check=check, deadline=300)


def states_equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def weights_of(path):
    return torch.load(path, weights_only=True)["model_state_dict"]


def spelt_old(state):
    return {models.old_key(key): value for key, value in state.items()}


def read_log(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def without_times(record):
    timed = ("images_per_s", "wait_s", "seconds", "peak_memory_mib")
    return {key: value for key, value in record.items() if key not in timed}


def randomize_norms(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    distill.write_scenes(root, train=12, val=4, width=192, height=108)
    return root


@pytest.fixture(scope="session")
def trained(scenes, tmp_path_factory):
    """(folder, teachers, student, history): DeepLab, SegFormer-B0 and a B1 student after a few steps."""
    out = tmp_path_factory.mktemp("trained")
    common = {"data": scenes, "out": out, **TINY, "steps": 3}
    train_teacher.main(flags(arch="deeplab", **common))
    train_teacher.main(flags(arch="segformer-b0", **common))
    teachers = [str(out / "deep_lab.pth"), str(out / "segformer-b0.pth")]
    student, history = distill.main(flags(teachers=teachers, **common))
    return out, teachers, student, history


@pytest.fixture(autouse=True)
def short_timings(monkeypatch):
    """Speed is measured as in earnest, but briefly."""
    monkeypatch.setattr(evaluate.time_interleaved, "__defaults__", (0.1, 2))


@pytest.fixture(scope="session")
def split(scenes):
    return data.Split(scenes, "train", data.DESERT)


@pytest.fixture
def copy_of(scenes, tmp_path):
    """A fresh copy of the scenes to damage."""
    shutil.copytree(scenes, tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def fails(capsys):
    """Runs main(argv) as a command and checks: exit status, one line on stderr with the words, no
    traceback."""
    def check(main, argv, *words, status=2):
        with pytest.raises(SystemExit) as stop:
            data.run_command(main, argv)
        lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
        assert stop.value.code == status
        assert sum(line.startswith("error: ") for line in lines) == 1, lines
        assert "Traceback" not in "".join(lines)
        for word in words:
            assert str(word) in lines[-1], (word, lines[-1])
        return lines[-1]
    return check


# ================================================================ A: pure functions
# ------------------------------------------------------------ reading
def test_class_table_is_the_desert_sets():
    table = [(c["name"], c["id"]) for c in data.DESERT]
    assert table == [("Trees", 100), ("Lush Bushes", 200), ("Dry Grass", 300), ("Dry Bushes", 500),
                     ("Ground Clutter", 550), ("Flowers", 600), ("Logs", 700), ("Rocks", 800),
                     ("Landscape", 7100), ("Sky", 10000)]


def test_scenes_hold_all_classes_as_16_bit_ids(scenes):
    seen = set()
    for path in (scenes / "train" / "Segmentation").iterdir():
        with Image.open(path) as image:
            assert image.mode in ("I;16", "I")
            seen |= set(np.unique(np.asarray(image)).tolist())
    assert seen == {c["id"] for c in data.DESERT}


def test_ids_become_indices(split):
    raw, target = data.read_mask(split.pairs[0][1]), split.read(0)[1]
    for index, entry in enumerate(data.DESERT):
        assert ((raw == entry["id"]) == (target == index)).all()
    assert int(split.counts[0].sum()) == target.size


@pytest.mark.parametrize("values, flag, form", [
    ([{100, 200}, {10000}], None, "ids"), ([{0, 3}, {9, 255}], None, "indices"),
    ([{100, 12345}], None, "ids"), ([{100, 255, 300}], None, "ids"), ([{0, 9}], "indices", "indices"),
    ([{100, 255, 7100}], None, "ids"), ([{100, 7100}, {255}], None, "ids")])
def test_label_format_is_found(values, flag, form):
    assert data.find_label_format(values, ["a.png"] * len(values), data.DESERT, flag) == form


@pytest.mark.parametrize("values, word", [
    ([{0, 1, 2, 27, 39}], "high byte"), ([{100, 200, 255}], "clipped"), ([{100, 44, 188, 16}], "modulo 256"),
    ([{100, 7100}, {0, 1, 9}], "mix"), ([{12345, 54321}], "class table"),
    ([{0, 5, 10}], "label 10 .*class table"), ([{0, 5, 11, 255}], "label 11 .*class table"),
    ([{7100, 10000}, {27, 39}], "high byte")])
def test_label_format_is_refused(values, word):
    with pytest.raises(data.InputError, match=word):
        data.find_label_format(values, ["a.png", "b.png"][:len(values)], data.DESERT)


def test_one_mask_that_only_looks_like_an_8_bit_copy_can_be_named_as_ids():
    """{100, 200, 255} may be clipped ids, or ids with ignored pixels; only the whole split tells."""
    values, paths = [{100, 7100}, {100, 200, 255}], ["a.png", "b.png"]
    with pytest.raises(data.InputError, match=r"b\.png.*clipped.*--masks ids"):
        data.find_label_format(values, paths, data.DESERT)
    assert data.find_label_format(values, paths, data.DESERT, "ids") == "ids"
    for flag in (None, "ids"):                                # where the whole split looks so, no flag helps
        with pytest.raises(data.InputError, match="clipped") as error:
            data.find_label_format([{100, 200, 255}], ["a.png"], data.DESERT, flag)
        assert "--masks" not in str(error.value)


def test_masks_that_fit_both_formats_need_the_flag():
    table = [{"name": n, "id": i, "color": [0, 0, 0]} for n, i in (("a", 1), ("b", 0))]
    with pytest.raises(data.InputError, match="--masks"):
        data.find_label_format([{0, 1}], ["a.png"], table)
    assert data.find_label_format([{0, 1}], ["a.png"], table, "indices") == "indices"
    straight = [{"name": n, "id": i, "color": [0, 0, 0]} for n, i in (("a", 0), ("b", 1))]
    assert data.find_label_format([{0, 1}], ["a.png"], straight) == "ids"


def test_ids_from_1_are_never_read_as_indices():
    """A pixel of value 1 is the first class as an id, and the second as an index."""
    table = [{"name": f"c{n}", "id": n + 1, "color": [n, 0, 0]} for n in range(5)]
    paths = ["a.png", "b.png"]
    for decisive in ([{1, 2, 255}, {3, 4, 5, 255}], [{0, 1, 2}, {0, 3, 4, 5}], [{5}, {1, 255}]):
        assert data.find_label_format(decisive, paths, table) == "ids"
    # no 5, which only ids hold: 255 is ignored either way, and 0 may be "no label" or the first class
    for values in ([{1, 2, 255}, {3, 4, 255}], [{0, 1, 2}, {0, 3, 4}], [{0, 1, 2, 14}, {3, 4}]):
        with pytest.raises(data.InputError, match="--masks ids or --masks indices"):
            data.find_label_format(values, paths, table)
        for flag in ("ids", "indices"):
            assert data.find_label_format(values, paths, table, flag) == flag
    with pytest.raises(data.InputError, match=r"a\.png.*must not mix.*--masks ids"):
        data.find_label_format([{0}, {5}], paths, table)


def test_unknown_ids_are_ignored_counted_and_reported_once(copy_of):
    path = min((copy_of / "train" / "Segmentation").iterdir())
    mask = np.asarray(Image.open(path)).copy()
    mask[:10, :10] = 4242
    Image.fromarray(mask).save(path)
    split = data.Split(copy_of, "train", data.DESERT)
    assert split.unknown == {4242: 100} and (split.read(0)[1][:10, :10] == 255).all()
    assert split.describe().count("4242") == 1
    mask[10, :9] = range(1, 10)  # nine more, of a pixel each: the first is the most
    Image.fromarray(mask).save(path)
    assert "ignored: 4242 " in data.Split(copy_of, "train", data.DESERT).describe()


def in_colors(path, mode="RGB"):
    """Rewrites a mask of raw ids in the desert's colours."""
    indices = data.lookup_table(data.DESERT, "ids")[np.asarray(Image.open(path))]
    if mode == "P":                                           # values 120 to 129, neither ids nor indices
        image = Image.fromarray(120 + indices)
        image.putpalette(np.roll(data.palette(data.DESERT), 120, 0).tobytes())
    else:
        image = Image.fromarray(data.palette(data.DESERT)[indices]).convert(mode)
    image.save(path)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_masks_in_colours_equal_those_of_ids_to_the_bit(mode, scenes, split, copy_of, tmp_path):
    for path in (copy_of / "train" / "Segmentation").iterdir():
        in_colors(path, mode)
    colored = data.Split(copy_of, "train", data.DESERT, out=tmp_path)
    again = data.Split(copy_of, "train", data.DESERT, "colors", tmp_path)            # from the kept scan
    for found in (colored, again):
        assert found.label_format == "colors" and "colours" in found.describe() and not found.unknown
        assert torch.equal(found.counts, split.counts)
        assert torch.equal(data.class_weights(found.counts), data.class_weights(split.counts))
        dataset = data.TrainDataset(found, 64, 0)
        for n in range(3):
            assert np.array_equal(found.read(n)[1], split.read(n)[1])
            for a, b in zip(dataset[2, n, n], data.TrainDataset(split, 64, 0)[2, n, n], strict=True):
                assert torch.equal(a, b)
    assert colored.digest == again.digest


def test_training_on_masks_in_colours_gives_the_weights_of_ids(scenes, copy_of, tmp_path, fails):
    for path in copy_of.glob("*/Segmentation/*"):
        in_colors(path)
    argv = {**B0, "steps": 2}
    model, history = train_teacher.main(flags(data=scenes, out=tmp_path / "ids", **argv))
    other, records = train_teacher.main(flags(data=copy_of, out=tmp_path / "colors", **argv))
    assert states_equal(model.state_dict(), other.state_dict())
    assert [without_times(r) for r in history] == [without_times(r) for r in records]
    fails(train_teacher.main, flags(data=copy_of, out=tmp_path / "colors", masks="ids", **argv),
          "holds colours", "--masks ids")
    fails(train_teacher.main, flags(data=scenes, out=tmp_path / "ids", masks="colors", **argv),
          "scene0000.png", "no colour of a class", "alike")


def test_palette_masks_of_known_indices_are_read_as_indices(scenes, split, copy_of, fails, tmp_path):
    """As infer.py writes them; one whose colours say otherwise is refused, unless --masks decides."""
    paths = sorted((copy_of / "train" / "Segmentation").iterdir())
    for n, path in enumerate(paths):
        data.index_image(split.read(n)[1], data.DESERT).save(path)
    found = data.Split(copy_of, "train", data.DESERT)
    assert found.label_format == "indices" and torch.equal(found.counts, split.counts)
    colored = data.Split(copy_of, "train", data.DESERT, "colors")
    assert torch.equal(colored.counts, split.counts)
    image = Image.fromarray(9 - split.read(0)[1])             # the same colours in the opposite order
    image.putpalette(data.palette(data.DESERT)[:10][::-1].tobytes())
    image.save(paths[0])
    fails(data.main, flags(data=copy_of, out=tmp_path), paths[0], "--masks indices", "--masks colors")
    assert torch.equal(data.Split(copy_of, "train", data.DESERT, "colors").counts, split.counts)
    assert torch.equal(data.Split(copy_of, "train", data.DESERT, "indices").counts[0],
                       split.counts[0].flip(0))


def test_palette_masks_of_many_classes_and_of_classes_of_one_colour_are_read_as_numbers(copy_of):
    table, labels = many_classes(250), np.arange(108 * 192, dtype=np.uint32).reshape(108, 192) % 250
    for classes in (table, [{**entry, "color": [0, 0, 0]} for entry in table]):
        for path in (copy_of / "train" / "Segmentation").iterdir():
            data.index_image(labels, classes).save(path)
        found = data.Split(copy_of, "train", classes)
        assert found.label_format != "colors" and np.array_equal(found.read(0)[1], labels)


def test_a_class_may_have_the_colour_of_ignored_numbers_in_a_palette(copy_of, fails, tmp_path):
    """Numbers outside the palette that infer.py writes are black there, and so is the class "background"."""
    table = [{"name": n, "id": 50 + i, "color": c} for i, (n, c) in enumerate(
        (("background", [0, 0, 0]), ("road", [200, 0, 0]), ("bush", [0, 200, 0])))]
    labels = np.resize(np.array([0, 0, 0, 0, 1, 1, 1, 2, 255, 255], np.uint8), (108, 192))
    paths = sorted((copy_of / "train" / "Segmentation").iterdir())
    for path in paths:
        data.index_image(labels, table).save(path)
    found = data.Split(copy_of, "train", table)
    assert found.label_format == "indices" and np.array_equal(found.read(0)[1], labels)
    (tmp_path / "own.json").write_text(json.dumps(table))
    data.index_image(labels, table[::-1]).save(paths[0])      # the same numbers in other classes' colours
    fails(data.main, flags(data=copy_of, classes=tmp_path / "own.json", out=tmp_path), paths[0], "palette")


def test_unknown_colours_are_ignored_counted_and_reported(split, copy_of):
    for path in (copy_of / "train" / "Segmentation").iterdir():
        in_colors(path)
    path = split.pairs[0][1].name
    mask = np.asarray(Image.open(copy_of / "train" / "Segmentation" / path)).copy()
    mask[:10, :10] = (0, 0, 255)                              # packed, this is the 255 of other formats
    Image.fromarray(mask).save(copy_of / "train" / "Segmentation" / path)
    found = data.Split(copy_of, "train", data.DESERT)
    assert found.unknown == {(0, 0, 255): 100} and (found.read(0)[1][:10, :10] == 255).all()
    assert int(found.counts[0].sum()) == int(split.counts[0].sum()) - 100
    assert found.describe().count("(0, 0, 255)") == 1


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "I;16", "LA", "1"])
def test_images_of_any_mode_load_as_rgb(mode, tmp_path):
    values = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (48, 1))
    if mode == "I;16":
        image = Image.fromarray(values.astype(np.uint16) * 257)
    elif mode == "CMYK":
        image = Image.fromarray(values).convert("RGB").convert("CMYK")
    else:
        image = Image.fromarray(values).convert(mode)
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    image.save(path)
    loaded = np.asarray(data.read_image(path)).astype(int)
    assert loaded.shape == (48, 64, 3)
    if mode != "1":
        assert abs(loaded[..., 1] - values).max() <= 6


def test_exif_rotated_image_loads_upright(tmp_path):
    image = Image.fromarray(np.tile(np.linspace(0, 255, 64).astype(np.uint8), (32, 1))).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6                                          # turn clockwise by 90 degrees to see it upright
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    loaded = np.asarray(data.read_image(tmp_path / "a.jpg")).astype(int)
    assert loaded.shape == (64, 32, 3) and loaded[0].mean() < 20 and loaded[-1].mean() > 235


def test_reading_an_image_leaves_the_warning_filters_alone(split):
    before = list(warnings.filters)
    data.read_image(split.pairs[0][0])
    assert list(warnings.filters) == before


def test_scan_is_reused_until_a_file_changes(copy_of, tmp_path, monkeypatch):
    calls = []
    once = data.scan_pair
    monkeypatch.setattr(data, "scan_pair", lambda pair: calls.append(pair) or once(pair))
    first = data.Split(copy_of, "train", data.DESERT, out=tmp_path)
    assert len(calls) == 12 and (tmp_path / "scan_train.json").exists()
    second = data.Split(copy_of, "train", data.DESERT, out=tmp_path)
    assert len(calls) == 12 and torch.equal(first.counts, second.counts) and first.digest == second.digest
    os.utime(first.pairs[3][1], (1, 1))
    data.Split(copy_of, "train", data.DESERT, out=tmp_path)
    assert len(calls) == 13


def test_pairs_repeated_by_links_count_twice(copy_of):
    for part in ("Color_Images", "Segmentation"):
        (copy_of / "train" / part / "zz.png").symlink_to("scene0000.png")
    split = data.Split(copy_of, "train", data.DESERT)
    assert len(split) == 13 and torch.equal(split.counts[0], split.counts[12])


def test_two_classes_of_one_colour_are_refused_where_masks_hold_colours(split, copy_of):
    table = [dict(entry) for entry in data.DESERT]
    table[6]["color"] = [196, 140, 96]
    assert torch.equal(data.Split(copy_of, "train", table).counts, split.counts)
    for path in (copy_of / "train" / "Segmentation").iterdir():
        in_colors(path)
    with pytest.raises(data.InputError, match=r"Logs and Landscape .*color, \[196, 140, 96\]"):
        data.Split(copy_of, "train", table)


# ------------------------------------------------------------ a share of train/ as validation
NAMES = [*(f"cc{n}" for n in range(1, 11)), *(f"mt{n}" for n in range(1, 5)), "x1"]


def stems(split):
    return [image.stem for image, _ in split.pairs]


@pytest.fixture
def runs(tmp_path):
    """A folder without val/: ten pairs of one run of names, four of another, one of a third."""
    labels = np.kron(np.arange(10, dtype=np.uint8).reshape(2, 5), np.ones((16, 16), np.uint8))
    for part in ("Color_Images", "Segmentation"):
        (tmp_path / "runs" / "train" / part).mkdir(parents=True)
    for n, name in enumerate(NAMES):
        rolled, folder = np.roll(labels, n, 1), tmp_path / "runs" / "train"
        Image.fromarray(data.palette(data.DESERT)[rolled]).save(folder / "Color_Images" / f"{name}.png")
        Image.fromarray(rolled).save(folder / "Segmentation" / f"{name}.png")
    return tmp_path / "runs"


@pytest.mark.parametrize("share, val, counts", [
    (0.15, "cc10 cc9 mt4", "cc 2, mt 1"),                     # 1.5 of 10 rounds up, .6 of 4 too; x1 is alone
    (0.01, "cc10 mt4", "cc 1, mt 1"),                         # at least one of each run with two or more
    (0.5, "cc10 cc6 cc7 cc8 cc9 mt3 mt4", "cc 5, mt 2")])
def test_the_last_share_of_each_run_of_names_validates(share, val, counts, runs):
    train, held = (data.Split(runs, name, data.DESERT, val_share=share) for name in ("train", "val"))
    assert stems(held) == val.split() and stems(train) == sorted({*NAMES} - {*val.split()})
    assert held.images == [image for image, _ in held.pairs] and len(held.counts) == len(held)
    assert held.describe().endswith(f"of train/ by --val-share {share}, pairs by run of names: {counts}")


def test_a_share_is_the_same_in_all_scripts_and_another_one_is_another_run(runs, tmp_path, fails, capsys):
    argv = {**B0, "data": runs, "out": tmp_path / "o", "steps": 1, "batch_size": 2}
    _, history = train_teacher.main(flags(**argv, val_share=0.15))
    said = capsys.readouterr().out
    assert "train: 12 pairs" in said and "val: 3 pairs" in said
    rows = evaluate.main(flags(tmp_path / "o" / "segformer-b0.pth", data=runs, out=tmp_path / "o", **PLAIN,
                               val_share=0.15))
    assert rows[0]["iou"] == history[-1]["val_iou"]
    train_teacher.main(flags(**argv, val_share=0.15))
    assert "finished already" in capsys.readouterr().out
    fails(train_teacher.main, flags(**argv, val_share=0.3), "--val-share (was 0.15, now 0.3)")
    data.main(flags(data=runs, out=tmp_path, size=32, val_share=0.3))
    said = capsys.readouterr().out
    assert "train: 11 pairs" in said and "val: 4 pairs" in said
    shutil.copytree(runs / "train", runs / "val")
    fails(train_teacher.main, flags(**argv), "--val-share (was 0.15, now None)")
    fails(train_teacher.main, flags(**argv, val_share=0.15), "--val-share 0.15", runs / "val", runs / "train")


def test_int8_networks_are_compared_on_the_share(runs, trained, tmp_path, monkeypatch):
    compared: list = []
    for name in ("export_onnx", "quantize"):
        monkeypatch.setattr(infer, name, lambda source, target, *_: Path(target).write_bytes(b"x"))
    monkeypatch.setattr(infer, "onnx_session", lambda content: None)
    monkeypatch.setattr(infer, "compare", lambda split, rows, shape: compared.extend(stems(split)))
    infer.main(flags(export=tmp_path / "a.int8.onnx", checkpoint=trained[1][1], data=runs, val_share=0.15,
                     calibrate=runs / "train" / "Color_Images"))
    assert compared == ["cc10", "cc9", "mt4"]


def test_pairs_held_for_validation_are_not_taken_as_images_without_labels(runs):
    folder = runs / "train" / "Color_Images"
    with pytest.raises(data.InputError, match="only images that have a mask"):
        data.Split(runs, "train", data.DESERT, unlabelled=[folder], val_share=0.5)


def test_a_share_needs_runs_of_names(runs, fails, tmp_path, trained):
    argv = {"data": runs, "out": tmp_path, "size": 32}
    fails(train_teacher.main, flags(data=runs, **B0, out=tmp_path), runs / "val", "--val-share")
    bad = flags(trained[1][1], **argv, split="test", val_share=0.15)
    fails(evaluate.main, bad, "--split test", "--val-share")
    for n, path in enumerate(sorted(runs.glob("train/*/*"))):
        path.rename(path.with_name(f"{chr(97 + n % len(NAMES))}1.png"))
    fails(data.main, flags(**argv, val_share=0.15), "--val-share 0.15", "runs of names")


# ------------------------------------------------------------ augmentation and order
def test_eval_size():
    assert data.eval_size(960, 540, 512) == (896, 512)        # 910.2 / 32 = 28.4
    assert data.eval_size(540, 960, 256) == (256, 448)
    assert data.eval_size(100, 100, 64) == (64, 64)


def test_identity_affine_reproduces_image_and_mask(split):
    image, target = split.crop(0, 96, np.eye(2, 3))
    stored = np.asarray(data.read_image(split.pairs[0][0]))
    assert np.array_equal(image.permute(1, 2, 0).numpy(), stored[:96, :96])
    assert np.array_equal(target.numpy(), split.read(0)[1][:96, :96])


def test_affine_outside_is_ignored_and_flip_mirrors(split):
    width, _ = split.sizes[0]
    _, target = split.crop(0, 96, np.array([[-1.0, 0, width], [0, 1, 0]]))
    assert np.array_equal(target.numpy(), split.read(0)[1][:96, ::-1][:, :96])
    _, target = split.crop(0, 96, np.array([[1.0, 0, width - 40], [0, 1, 0]]))
    assert (target[:, 40:] == 255).all() and (target[:, :40] != 255).all()


def test_random_affine_keeps_scale_and_place():
    rng, seen = np.random.default_rng(0), []
    for _ in range(300):
        affine = data.random_affine(rng, 960, 540, 512)
        seen.append(540 / 512 / np.sqrt(abs(np.linalg.det(affine[:, :2]))))  # 1: the shorter side is 512
        centre = affine @ [256, 256, 1]
        assert -1 <= centre[0] <= 961 and -1 <= centre[1] <= 541
        assert abs(np.degrees(np.arctan2(affine[1, 0], affine[1, 1]))) <= 10.01
    assert 0.5 <= min(seen) < 0.6 and 1.9 < max(seen) <= 2.0


def test_image_and_mask_move_together(tmp_path):
    """An image that is its own mask: after any random map, colours and labels still agree."""
    rng = np.random.default_rng(1)
    labels = np.kron(rng.integers(0, 10, (9, 16)), np.ones((24, 24), int)).astype(np.uint8)
    for part in ("Color_Images", "Segmentation"):
        (tmp_path / "train" / part).mkdir(parents=True)
    Image.fromarray(labels * 25).convert("RGB").save(tmp_path / "train" / "Color_Images" / "a.png")
    Image.fromarray(labels).save(tmp_path / "train" / "Segmentation" / "a.png")
    split = data.Split(tmp_path, "train", data.DESERT)
    assert split.label_format == "indices"
    for _ in range(10):
        image, target = split.crop(0, 96, data.random_affine(rng, *split.sizes[0], 96))
        valid = target != 255
        agree = (image[0].float()[valid] / 25 - target[valid].float()).abs() < 0.5
        assert agree.float().mean() > 0.85                    # the rest lies on edges, which bilinear mixes


@pytest.mark.parametrize("suffix, width", [(".png", 203), (".jpg", 203), (".jpg", 403)])
def test_image_and_mask_agree_where_the_image_is_reduced_to_uneven_sides(suffix, width, tmp_path):
    """Grey rises with x, and so do the labels: after a strong reduction they agree up to the right edge."""
    for part in ("Color_Images", "Segmentation"):
        (tmp_path / "train" / part).mkdir(parents=True)
    x = np.tile(np.arange(width), (90, 1))
    image = Image.fromarray((x * 250 // width).astype(np.uint8)).convert("RGB")
    image.save(tmp_path / "train" / "Color_Images" / f"a{suffix}", quality=100)
    Image.fromarray((x * 250 // width).astype(np.uint8)).save(tmp_path / "train" / "Segmentation" / "a.png")
    split = data.Split(tmp_path, "train", many_classes(250), "indices")
    shrink = width / 32                                       # 6.3 and 12.6 image pixels per crop pixel
    for shift in (0, width - 16 * shrink):
        crop, target = split.crop(0, 16, np.array([[shrink, 0, shift], [0, shrink, 0]]))
        valid = target[2] != 255
        assert (crop[0, 2, valid].float() - target[2, valid].float()).abs().max() <= 4


def test_samples_depend_on_seed_epoch_position_only(split):
    dataset = data.TrainDataset(split, 64, seed=3)
    a, b = dataset[2, 5, 1], dataset[2, 5, 1]
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    for other in (dataset[3, 5, 1], dataset[2, 6, 1], data.TrainDataset(split, 64, seed=4)[2, 5, 1]):
        assert not torch.equal(a[2], other[2])


def test_seeds_are_the_same_in_every_python_and_differ_by_purpose():
    assert data.seed_for("order", 0, 1) == 7789237259910890379
    assert data.seed_for("crop", 3, 1, 2) != data.seed_for("dropout", 3, 1, 2)
    assert data.seed_for("order", 1) != data.seed_for("order", 0)
    for name in ("data", "train_teacher", "distill"):
        assert "hash(" not in (HERE / f"{name}.py").read_text()


@pytest.mark.parametrize("workers", [1, 2])
def test_loader_gives_the_same_pixels_for_any_number_of_workers(split, workers):
    def batches(workers):
        order = data.BatchSampler(12, 4, 0, 1, 6)
        return list(data.load(data.TrainDataset(split, 64, 0), order, workers, False))
    expected, found = batches(0), batches(workers)
    assert len(found) == 5 == len(expected)
    for a, b in zip(expected, found, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[:5], b[:5], strict=True))


def test_order_visits_each_pair_once_an_epoch_and_splits_over_processes():
    def keys(*args, **named):
        return [key for batch in data.BatchSampler(*args, **named) for key in batch]
    whole = keys(13, 4, 7, 0, 6)
    for epoch in (0, 1):
        chosen = [n for e, _, n in whole if e == epoch]
        assert len(chosen) == 12 == len(set(chosen))
    halves = [keys(13, 2, 7, 0, 6, rank=rank, world=2) for rank in (0, 1)]
    assert sorted(halves[0] + halves[1]) == sorted(whole)
    assert keys(13, 2, 7, 0, 6, accumulate=2) == whole
    assert keys(13, 4, 7, 4, 6) == whole[16:]                 # resumed


def test_unlabelled_images_fill_their_share_of_each_batch():
    def batches(batch, unlabelled, **how):
        return list(data.BatchSampler(9, batch, 7, 0, 8, unlabelled=(unlabelled, 5), **how))
    whole = batches(4, 2)                                     # 9 // 2 = 4 steps an epoch
    for batch in whole:
        assert [index < 9 for _, _, index in batch] == [True, True, False, False]
        assert all(9 <= index < 14 for _, _, index in batch[2:])
    for epoch in (0, 1):
        keys = [key for batch in whole for key in batch if key[0] == epoch]
        assert len({position for _, position, _ in keys}) == len(keys) == 16
        drawn = [index for _, _, index in keys if index >= 9]
        assert len(set(drawn)) == 5 and max(map(drawn.count, drawn)) == 2            # 8 draws of 5 images
    halves = [batches(2, 1, rank=rank, world=2) for rank in (0, 1)]
    flat = itertools.chain.from_iterable
    assert sorted(flat(flat(halves))) == sorted(flat(whole)) == sorted(flat(batches(2, 1, accumulate=2)))
    plain = list(flat(data.BatchSampler(9, 2, 7, 0, 8)))      # the order of the pairs is that without them
    assert [key for key in flat(whole) if key[2] < 9] == plain


def test_a_share_of_unlabelled_images_that_a_split_lacks_is_refused_at_once():
    with pytest.raises(ValueError, match="4 unlabelled images per batch, but the split has none"):
        data.BatchSampler(12, 8, 0, 0, 1, unlabelled=(4, 0))


def test_sampling_odds_prefer_rare_classes_and_are_deterministic():
    counts = torch.tensor([[90, 10, 0], [100, 0, 0], [100, 0, 0], [95, 0, 5]])
    odds = data.sampling_odds(counts)
    assert odds[3] > odds[0] > odds[1] > 0 and abs(float(odds[1] - odds[2])) < 1e-12
    order = [data.BatchSampler(4, 2, 5, 0, 2, odds=odds).order(1) for _ in range(2)]
    assert order[0] == order[1]


def test_class_weights_by_hand():
    counts = torch.tensor([[10, 40, 0, 50]])                  # the median of 10, 40, 50 is 40
    assert torch.allclose(data.class_weights(counts), torch.tensor([4.0, 1.0, 1.0, 0.8]))
    roots = torch.tensor([2.0, 1.0, 1.0, math.sqrt(0.8)])
    assert torch.allclose(data.class_weights(counts, "sqrt"), roots)
    assert torch.equal(data.class_weights(counts, "none"), torch.ones(4))
    assert data.class_weights(torch.tensor([[1, 1000, 10**6]])).tolist() == pytest.approx([10.0, 1.0, 0.1])


@pytest.mark.parametrize("which, function", [(0, "adjust_brightness"), (1, "adjust_contrast"),
                                             (2, "adjust_saturation")])
def test_jitter_equals_torchvisions(which, function):
    image = torch.rand(3, 3, 8, 8) * 0.4 + 0.3                # so that nothing is clipped
    factors = torch.tensor([0.8, 1.0, 1.2])
    jitter = torch.tensor([[1.0, 1.0, 1.0, 0.0]] * 3)
    jitter[:, which] = factors
    adjust = getattr(torchvision.transforms.functional, function)
    expected = torch.stack([adjust(x, float(factor)) for x, factor in zip(image, factors, strict=True)])
    assert torch.allclose(data.color_jitter(image, jitter), expected, atol=2e-3)


def test_hue_keeps_grey_and_luma_and_six_sixths_are_none():
    image = torch.rand(2, 3, 4, 4) * 0.2 + 0.4
    grey = image.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    turn = torch.tensor([[1, 1, 1, 1 / 6], [1, 1, 1, 0.1]])
    assert torch.allclose(data.color_jitter(grey, turn), grey, atol=1e-3)
    luma = torch.tensor([0.299, 0.587, 0.114])
    turned = data.color_jitter(image, turn)
    lumas = [torch.einsum("bchw,c->bhw", each, luma) for each in (turned, image)]
    assert torch.allclose(*lumas, atol=1e-3) and not torch.allclose(turned, image, atol=1e-2)
    for _ in range(5):
        turned[:1] = data.color_jitter(turned[:1], turn[:1])
    assert torch.allclose(turned[:1], image[:1], atol=5e-3)


# ------------------------------------------------------------ losses
def share(tensor):
    """Pixel weights as the loop hands them over: their sum is 1."""
    return tensor / tensor.sum()


def hard(z, target, weight):
    return losses.hard_loss(z, target, share(losses.hard_weights(target, weight)))


def soft(z, t, target, T):
    return losses.soft_loss(z, t, share(losses.soft_weights(target)), T)


def cwd(z, t, target):
    return losses.cwd_loss(z, t, losses.soft_weights(target))


def test_hard_loss_equals_torchs_at_full_size():
    torch.manual_seed(0)
    z, target, weight = torch.randn(2, 5, 8, 8), torch.randint(0, 5, (2, 32, 32)), torch.rand(5) + 0.1
    target[0, :10] = 255
    full = F.interpolate(z, (32, 32), mode="bilinear", align_corners=False)
    expected = F.cross_entropy(full, target, weight, ignore_index=255)
    assert torch.allclose(hard(z, target, weight), expected, atol=1e-6)


def test_hard_loss_of_nothing_valid_is_zero_with_zero_gradient():
    z, target = torch.randn(1, 3, 2, 2, requires_grad=True), torch.full((1, 8, 8), 255)
    weights = {"hard": losses.hard_weights(target, torch.ones(3))}
    batch = data.Batch(None, None, None, None, None, weights)
    train_teacher.normalize_weights([batch], ALONE)
    loss = losses.hard_loss(z, target, batch.weights["hard"])
    loss.backward()
    assert loss.item() == 0 and (z.grad == 0).all()


def test_soft_loss_by_hand():
    z, t = torch.zeros(1, 2, 1, 1), torch.tensor([2 * math.log(3), 0.0]).view(1, 2, 1, 1)
    loss, clamped, bit = soft(z, t, torch.zeros(1, 4, 4, dtype=torch.long), T=2.0)
    expected = 4 * (0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5))  # 3/4, 1/4 against 1/2, 1/2
    assert loss.item() == pytest.approx(expected, rel=1e-5) and clamped == 0 and not bit


def test_soft_loss_equals_torchs_kl_div_and_ignores_size():
    torch.manual_seed(1)
    z, t, target = torch.randn(2, 4, 6, 6), torch.randn(2, 4, 6, 6), torch.zeros(2, 24, 24, dtype=torch.long)
    loss = soft(z, t, target, 3.0)[0]
    kl = F.kl_div((z / 3).log_softmax(1), (t / 3).log_softmax(1), log_target=True, reduction="sum")
    assert torch.allclose(loss, 9 * kl / (2 * 36), rtol=1e-5)
    tiled = soft(z.repeat(1, 1, 2, 3), t.repeat(1, 1, 2, 3), target.repeat(1, 2, 3), 3.0)[0]
    assert torch.allclose(loss, tiled, rtol=1e-5)


@pytest.mark.parametrize("function", [lambda z, t, target: soft(z, t, target, 2.0)[0], cwd,
                                      lambda z, t, target: hard(z, target, torch.ones(4)) + 0 * t.sum()])
def test_ignored_pixels_give_no_gradient(function):
    torch.manual_seed(2)
    z, t = torch.randn(2, 4, 8, 8, requires_grad=True), torch.randn(2, 4, 8, 8)
    target = torch.randint(0, 4, (2, 32, 32))
    target[:, :, 16:] = 255
    function(z, t, target).backward()
    assert (z.grad[..., 5:] == 0).all() and (z.grad[..., :4] != 0).any()


@pytest.mark.parametrize("function", [
    lambda z, t, target: soft(z, t, target, 2.0)[0], cwd,
    lambda z, t, target: losses.feature_loss(z, t), lambda z, t, target: losses.attention_loss(z, t)])
def test_distillation_of_a_model_against_itself_is_zero(function):
    z = torch.randn(2, 4, 8, 8)
    assert abs(function(z, z.clone(), torch.zeros(2, 32, 32, dtype=torch.long)).item()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_losses_are_finite_in_half_precision(dtype, scale):
    torch.manual_seed(3)
    z, t = ((scale * torch.randn(2, 4, 8, 8)).to(dtype) for _ in range(2))
    z.requires_grad_()
    target = torch.randint(0, 4, (2, 32, 32))
    target[0] = 255                                           # one image without a valid pixel
    loss, clamped, _ = soft(z, t, target, 2.0)
    total = loss + cwd(z, t, target) + hard(z, target, torch.ones(4))
    total = total + losses.feature_loss(z, t) + losses.attention_loss(z, t)
    total.backward()
    assert total.dtype == torch.float32 and total.isfinite() and z.grad.isfinite().all()
    assert (clamped > 0) == (scale > 1)


def test_soft_loss_counts_what_its_clamps_meet():
    t = torch.tensor([30.0, -30.0]).view(1, 2, 1, 1).repeat(1, 1, 2, 1)
    z = -t.clone()
    z[0, :, 1] = t[0, :, 1]
    target = torch.zeros(1, 8, 4, dtype=torch.long)
    loss, clamped, bit = soft(z, t, target, 1.0)
    assert clamped == 4 and not bit
    assert loss.item() == pytest.approx(10, rel=1e-3)         # 20 nats at one cell of two
    loss, clamped, bit = soft(z, t, target, 3.0)
    assert loss.item() == pytest.approx(90, rel=1e-3) and clamped == 0
    assert soft(z[:, :, :1], t[:, :, :1], target[:, :4], 3.0)[2]


def test_balanced_weights_by_hand_and_as_the_weighted_loss():
    teacher = torch.tensor([math.log(3), 0.0]).view(1, 2, 1, 1)                      # q = 3/4, 1/4
    weight = losses.balanced_weights(teacher, torch.tensor([1.0, 4.0]))
    assert weight.item() == pytest.approx(1 / (0.75 / 1 + 0.25 / 4))
    # a teacher that learnt with class weights w says q ~ w p; then W q = w p, the weighted loss' own target
    torch.manual_seed(0)
    p, w = torch.rand(2, 5, 3, 3).softmax(1), torch.rand(5) + 0.1
    q = p * w[:, None, None] / (p * w[:, None, None]).sum(1, keepdim=True)
    weight = losses.balanced_weights(q.log(), w)
    assert torch.allclose(weight[:, None] * q, w[:, None, None] * p, rtol=1e-5)


def test_cwd_loss_by_hand():
    """One class map of two cells: softmax over cells at T 4 gives 3/4, 1/4 against 1/2, 1/2."""
    t = torch.tensor([4 * math.log(3), 0.0]).view(1, 1, 1, 2)
    loss = cwd(torch.zeros(1, 1, 1, 2), t, torch.zeros(1, 4, 8, dtype=torch.long))
    assert loss.item() == pytest.approx(16 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)), rel=1e-5)
    third = torch.cat([t, torch.full((1, 1, 1, 1), 50.0)], 3)  # ignored: changes nothing
    target = torch.zeros(1, 4, 12, dtype=torch.long)
    target[..., 8:] = 255
    assert cwd(torch.zeros(1, 1, 1, 3), third, target).item() == pytest.approx(loss.item(), rel=1e-5)


def test_feature_and_attention_loss_by_hand():
    s = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)
    t = torch.tensor([4.0, 3.0]).view(1, 2, 1, 1)
    assert losses.feature_loss(s, t).item() == pytest.approx(2 * 0.2**2)  # (.6, .8) against (.8, .6)
    s = torch.tensor([[3.0, 0.0], [4.0, 0.0]]).T.reshape(1, 2, 1, 2)                 # energies 9/2 and 16/2
    t = torch.tensor([[1.0, 1.0]]).reshape(1, 1, 1, 2)
    length, half = math.hypot(9, 16), 1 / math.sqrt(2)
    expected = (9 / length - half) ** 2 + (16 / length - half) ** 2
    assert losses.attention_loss(s, t).item() == pytest.approx(expected, rel=1e-5)


def test_ramp_and_learning_rate():
    assert [losses.ramp(0.3, 0.7, p) for p in (0, 0.5, 1)] == pytest.approx([0.3, 0.5, 0.7])
    rates = [train_teacher.learning_rate(s, 100, 1.0) for s in range(100)]
    assert rates[0] == pytest.approx(0.2) and max(rates) == rates[4] and rates[99] == pytest.approx(0.01)
    assert all(a > b for a, b in itertools.pairwise(rates[4:]))


# ------------------------------------------------------------ networks and checkpoints
@pytest.mark.parametrize("arch, millions", [("deeplab", 40.35), ("lraspp", 3.22), ("segformer-b0", 3.72),
                                            ("segformer-b1", 13.68), ("segformer-b3", 47.23)])
def test_sizes_and_strides(arch, millions):
    model = models.build(arch, data.DESERT).eval()
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)
    with torch.no_grad():
        z, stages = model(torch.zeros(1, 3, 96, 64), features=True)
    assert z.shape == (1, 10, 24, 16) and [s.shape[2] for s in stages][:3] == [24, 12, 6] and len(stages) == 4


@pytest.mark.parametrize("arch", ["segformer-b0", "segformer-b1", "segformer-b3"])
def test_rewritten_head_equals_transformers(arch):
    """Logits, labels and the gradient of every parameter, against the stock class with the same weights."""
    torch.manual_seed(0)
    ours = models.build(arch, data.DESERT).eval()
    randomize_norms(ours)
    stock = transformers.SegformerForSemanticSegmentation(ours.config).eval()
    stock.load_state_dict(ours.state_dict())                  # the very same keys
    x = torch.randn(2, 3, 64, 96)
    a, b = ours(x), stock(x).logits
    assert torch.allclose(a, b, atol=2e-5) and torch.equal(a.argmax(1), b.argmax(1))
    for z in (a, b):
        (z * torch.linspace(-1, 1, z.numel()).view(z.shape)).sum().backward()
    for (name, p), q in zip(ours.named_parameters(), stock.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-3 * (1 + q.grad.abs().max())), name


def stock_lraspp(classes):
    """torchvision's own class, with random weights and norms."""
    stock = torchvision.models.segmentation.lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=classes)
    randomize_norms(stock)
    return stock.eval()


def doubling(n):
    """(2n, n): what linear interpolation to twice as many cells multiplies by, align_corners=False."""
    places = ((torch.arange(2 * n) + 0.5) / 2 - 0.5).clamp(0, n - 1)
    return (1 - (places[:, None] - torch.arange(n)).abs()).clamp(min=0)


def test_lraspp_equals_torchvisions():
    """Logits at stride 8 doubled, stages, and the gradient of every parameter, with the same weights."""
    torch.manual_seed(0)
    stock, ours = stock_lraspp(10), models.build("lraspp", data.DESERT).eval()
    ours.load_state_dict(stock.state_dict())                  # the very same keys
    x, layers = torch.randn(2, 3, 96, 64), list(stock.backbone.values())
    z, stages = ours(x, features=True)
    at_8 = stock.classifier(stock.backbone(x))
    assert at_8.shape == (2, 10, 12, 8) and torch.equal(
        stock(x)["out"], F.interpolate(at_8, (96, 64), mode="bilinear", align_corners=False))
    expected = doubling(12) @ at_8 @ doubling(8).T
    assert torch.allclose(z, expected, atol=1e-5 * at_8.abs().max().item())
    assert [s.shape[1:] for s in stages] == [(24, 24, 16), (40, 12, 8), (112, 6, 4), (960, 6, 4)]
    for stage, count in zip(stages, (4, 7, 13, 17), strict=True):
        assert torch.allclose(stage, nn.Sequential(*layers[:count])(x), atol=1e-5)
    assert len(layers) == 17
    for logits in (z, expected):
        (logits * torch.linspace(-1, 1, z.numel()).view(z.shape)).sum().backward()
    for (name, p), q in zip(ours.named_parameters(), stock.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-3 * (1 + q.grad.abs().max())), name


def test_lraspp_has_the_gmacs_that_torchvision_publishes():
    weights = torchvision.models.segmentation.LRASPP_MobileNet_V3_Large_Weights.DEFAULT
    model = models.build("lraspp", [{}] * 21).eval()
    assert sum(p.numel() for p in model.parameters()) == weights.meta["num_params"]
    assert evaluate.count_gmacs(model, 520) == pytest.approx(weights.meta["_ops"], abs=0.001)
    assert evaluate.count_gmacs(models.build("lraspp", data.DESERT).eval()) == pytest.approx(2.0, abs=0.05)


@pytest.mark.parametrize("arch", ["segformer-b0", "deeplab", "lraspp"])
def test_network_optimized_for_inference_gives_the_same_logits(arch):
    torch.manual_seed(0)
    model = models.build(arch, data.DESERT).eval()
    randomize_norms(model)
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = model(x)
        fast = models.optimize_for_inference(copy.deepcopy(model))
        assert torch.allclose(fast(x), expected, atol=1e-3 * expected.abs().max())
        assert torch.equal(model(x), expected)                # the copy left the original alone
    assert not any(p.requires_grad for p in fast.parameters())
    folded = not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    assert folded == (arch != "segformer-b0")                 # whose head merges it, see merge_head()


def test_attention_runs_through_sdpa_where_offered():
    offered = getattr(transformers.SegformerForSemanticSegmentation, "_supports_sdpa", False)
    if not offered:
        pytest.skip("this transformers has no other attention for SegFormer")
    assert models.build("segformer-b0", data.DESERT).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("spelling", ["old", "new"])
def test_checkpoints_of_both_spellings_load(spelling, tmp_path):
    model = models.build("segformer-b0", data.DESERT)
    other = {respell(key, spelling): value for key, value in model.state_dict().items()}
    assert any(("stages.0" if spelling == "new" else "encoder.block.0") in key for key in other)
    content = {"model_state_dict": other, "arch": "segformer-b0", "classes": data.DESERT}
    torch.save(content, tmp_path / "a.pth")
    loaded, meta = models.load_model(tmp_path / "a.pth")
    assert states_equal(loaded.state_dict(), model.state_dict()) and meta["arch"] == "segformer-b0"


NEW_SPELLING = [
    (r"encoder\.patch_embeddings\.(\d)", r"stages.\1.patch_embeddings"),
    (r"encoder\.block\.(\d)", r"stages.\1.blocks"), (r"encoder\.layer_norm\.(\d)", r"stages.\1.layer_norm"),
    ("attention.self.query", "attention.q_proj"), ("attention.self.key", "attention.k_proj"),
    ("attention.self.value", "attention.v_proj"), ("attention.output.dense", "attention.o_proj"),
    ("attention.self.sr", "attention.sequence_reduction.sequence_reduction"),
    ("attention.self.layer_norm", "attention.sequence_reduction.layer_norm"),
    (r"mlp\.dense(\d)", r"mlp.fc\1"), ("layer_norm_1", "layernorm_before"),
    ("layer_norm_2", "layernorm_after"), ("linear_c", "linear_projections")]


def respell(key, spelling):
    """A key as transformers 4 ("old") or 5 ("new") writes it."""
    key = models.old_key(key)
    for old, new in NEW_SPELLING if spelling == "new" else ():
        key = re.sub(old, new, key)
    return key


def test_student_checkpoint_loads_into_the_stock_class(trained, tmp_path):
    """Its keys are those of save_pretrained under either version of transformers; the stock class of the
    installed one takes them by way of translate()."""
    weights = weights_of(trained[0] / "best_student.pth")
    stock = transformers.SegformerForSemanticSegmentation(models.build("segformer-b1", data.DESERT).config)
    stock.save_pretrained(tmp_path)
    assert weights.keys() == safetensors.torch.load_file(tmp_path / "model.safetensors").keys()
    assert all(key == respell(key, "old") for key in weights)
    stock.load_state_dict(models.translate(weights, stock))
    loaded, _ = models.load_model(trained[0] / "best_student.pth")
    assert states_equal(stock.state_dict(), loaded.state_dict())


@pytest.mark.parametrize("spelling", ["old", "new"])
def test_a_run_saved_in_either_spelling_resumes_with_the_same_bits(spelling, scenes, tmp_path, monkeypatch):
    """Runs begun under transformers 5 before checkpoints had one spelling hold the new one."""
    def argv(out):
        return flags(data=scenes, **B0, out=tmp_path / out, steps=3)
    whole, _ = train_teacher.main(argv("whole"))
    with monkeypatch.context() as patch:
        at_step(patch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(train_teacher.Stopped):
            train_teacher.main(argv("stopped"))
    path = tmp_path / "stopped" / "checkpoints" / "segformer-b0.pth"
    content = torch.load(path, weights_only=True)
    state = content["model_state_dict"]
    content["model_state_dict"] = {respell(key, spelling): value for key, value in state.items()}
    torch.save(content, path)
    resumed, _ = train_teacher.main(argv("stopped"))
    assert states_equal(resumed.state_dict(), whole.state_dict())


def test_bare_state_dict_says_its_architecture(tmp_path, fails, scenes):
    path = tmp_path / "bare.pth"
    for arch in ("segformer-b0", "segformer-b1", "deeplab", "lraspp"):
        model = models.build(arch, data.DESERT)
        torch.save({f"module.{key}": value for key, value in model.state_dict().items()}, path)
        loaded, meta = models.load_model(path)
        assert states_equal(loaded.state_dict(), model.state_dict()) and meta["arch"] == arch
    argv = flags(next((scenes / "val" / "Color_Images").iterdir()), checkpoint=path)
    torch.save(torchvision.models.resnet18().state_dict(), path)
    fails(infer.main, argv, "no network of this project", "another")
    models.save_model(path, model, "deeplab", data.DESERT)
    fails(infer.main, argv, "holds lraspp, not deeplab")


def test_checkpoint_of_other_classes_as_init_leaves_out_the_classifier(tmp_path, capsys):
    path, classes = tmp_path / "a.pth", data.DESERT
    source = models.build("segformer-b0", classes)
    source.decode_head.classifier.bias.data += 1              # a new one's is 0
    models.save_model(path, source, "segformer-b0", classes)
    renamed = [{**entry, "name": entry["name"][::-1]} for entry in classes]
    for table, said in ((classes, 0), (renamed, 1)):
        own = models.build("segformer-b0", table, str(path)).state_dict()
        assert capsys.readouterr().out.count("classes of other names; its classifier is left out") == said
        for key, value in source.state_dict().items():
            assert torch.equal(own[key], value) == (not said or not key.startswith("decode_head.classifier"))


def test_folder_of_mit_weights_arrives_whole(tmp_path, fails, scenes):
    torch.manual_seed(5)
    config = models.build("segformer-b0", data.DESERT).config
    source = transformers.SegformerForImageClassification(config)
    source.save_pretrained(tmp_path / "mit-b0")
    model = models.build("segformer-b0", data.DESERT, str(tmp_path / "mit-b0"))
    own = {models.old_key(k): v for k, v in model.state_dict().items() if not k.startswith("decode_head")}
    theirs = {models.old_key(k): v for k, v in source.state_dict().items() if not k.startswith("classifier")}
    assert states_equal(own, theirs) and len(own) > 100
    argv = flags(arch="segformer-b1", data=scenes, out=tmp_path, init=tmp_path / "mit-b0")
    fails(train_teacher.main, argv, "--init", "mit-b0", "not those of segformer-b1")


def test_resnet50_state_dict_arrives_whole(tmp_path):
    source = torchvision.models.resnet50()
    torch.save(source.state_dict(), tmp_path / "resnet.pth")
    model = models.build("deeplab", data.DESERT, str(tmp_path / "resnet.pth"))
    theirs = {k: v for k, v in source.state_dict().items() if not k.startswith("fc.")}
    assert states_equal(model.backbone.state_dict(), theirs)


def test_mobilenet_state_dict_arrives_whole(tmp_path, monkeypatch, fails, scenes):
    """Of a file, and of the download that --init imagenet makes."""
    source = torchvision.models.mobilenet_v3_large()
    randomize_norms(source)
    torch.save(source.state_dict(), tmp_path / "large.pth")
    torch.save(torchvision.models.mobilenet_v3_small().state_dict(), tmp_path / "small.pth")

    def download(weights, **how):
        assert weights is torchvision.models.MobileNet_V3_Large_Weights.DEFAULT
        return source.state_dict()
    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", download)
    for init in ("imagenet", str(tmp_path / "large.pth")):
        model = models.build("lraspp", data.DESERT, init)
        assert states_equal(model.backbone.state_dict(), source.features.state_dict())
    common = {**TINY, "arch": "lraspp", "data": scenes, "out": tmp_path / "o"}
    argv = flags(**{**common, "init": tmp_path / "small.pth"})
    fails(train_teacher.main, argv, "small.pth", "not those of a MobileNetV3-Large")
    argv = flags(**{**common, "init": tmp_path / "large.pth", "init_partial": True})
    fails(train_teacher.main, argv, "--init-partial", "large.pth is no ResNet50")


def test_lraspp_of_other_classes_as_init_leaves_out_both_classifiers(tmp_path, capsys):
    """A bare state dict of torchvision's, with its 21 classes."""
    source, path = stock_lraspp(21), tmp_path / "coco.pth"
    theirs = source.state_dict()
    torch.save(theirs, path)
    assert (models.guess_arch(theirs), models.count_classes(theirs)) == ("lraspp", 21)
    own = models.build("lraspp", data.DESERT, str(path)).state_dict()
    assert "has 21 classes, not 10; its classifier is left out" in capsys.readouterr().out
    left_out = {key for key in theirs if not torch.equal(own[key], theirs[key])}
    both = {f"classifier.{layer}_classifier.{kind}" for layer in ("low", "high")
            for kind in ("weight", "bias")}
    assert left_out == both and all(len(own[key]) == 10 for key in both)
    with pytest.raises(data.InputError, match="has 21 classes, the class table 10"):
        models.load_model(path, data.DESERT)
    torch.save(stock_lraspp(10).state_dict(), path)
    own = models.build("lraspp", data.DESERT, str(path)).state_dict()
    assert states_equal(own, torch.load(path, weights_only=True)) and not capsys.readouterr().out


def test_resnet50_without_whole_layers_is_refused_or_completed_at_random(tmp_path, scenes, fails, capsys):
    """What is there arrives, the rest keeps the bits that it has without --init."""
    torch.manual_seed(1)
    source = torchvision.models.resnet50().state_dict()
    cut = {key: value for key, value in source.items() if not key.startswith(("layer4.", "bn1.", "fc."))}
    torch.save(cut, tmp_path / "cut.pth")
    del cut["layer2.0.conv1.weight"]                          # a hole, not a whole layer
    torch.save(cut, tmp_path / "hole.pth")
    common = {**TINY, "arch": "deeplab", "data": scenes, "out": tmp_path / "o", "steps": 1}
    argv = flags(**{**common, "init": tmp_path / "cut.pth"})
    fails(train_teacher.main, argv, f"--init {tmp_path / 'cut.pth'}", "not those of a ResNet50")
    torch.manual_seed(0)
    alone = models.build("deeplab", data.DESERT).state_dict()
    torch.manual_seed(0)
    model = models.build("deeplab", data.DESERT, str(tmp_path / "cut.pth"), partial=True)
    assert capsys.readouterr().out.endswith("cut.pth: starts at random: bn1, layer4\n")
    for key, value in model.state_dict().items():
        name = key.removeprefix("backbone.")
        arrives = key != name and name in source and not name.startswith(("layer4.", "bn1."))
        assert torch.equal(value, source[name] if arrives else alone[key]), key
    train_teacher.main([*argv, "--init-partial"])
    assert "starts at random: bn1, layer4" in capsys.readouterr().out
    common.update(init=tmp_path / "hole.pth", out=tmp_path / "p", init_partial=True)
    argv = flags(**common)
    fails(train_teacher.main, argv, "not those of a ResNet50", "layer2.0.conv1.weight")
    models.save_model(tmp_path / "a.pth", model, "deeplab", data.DESERT)
    argv = flags(**{**common, "init": tmp_path / "a.pth"})
    fails(train_teacher.main, argv, "--init-partial", "a.pth is no ResNet50")


@pytest.mark.skipif(not WEIGHTS, reason="OFFROAD_WEIGHTS names no folder with resnet50_in1k_to_layer3.pth")
def test_imagenet_weights_up_to_layer3_arrive(capsys):
    path = Path(WEIGHTS) / "resnet50_in1k_to_layer3.pth"
    model = models.build("deeplab", data.DESERT, str(path), partial=True)
    assert f"--init {path}: starts at random: layer4\n" in capsys.readouterr().out
    own, source = model.backbone.state_dict(), torch.load(path, weights_only=True)
    assert len(source) > 200 and all(torch.equal(own[key], value.float()) for key, value in source.items())


def test_own_checkpoint_as_init(trained, capsys):
    path = trained[0] / "best_student.pth"
    model = models.build("segformer-b1", data.DESERT, str(path))
    assert states_equal(model.state_dict(), models.load_model(path)[0].state_dict())
    other = models.build("segformer-b1", data.DESERT[:4], str(path))
    assert other.decode_head.classifier.out_channels == 4
    assert "classifier is left out" in capsys.readouterr().out


def test_failed_download_is_said_in_one_line(monkeypatch, tmp_path, fails, scenes):
    def no_route(*args, **kwargs):
        raise OSError("no route to host")
    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", no_route)
    monkeypatch.setattr(models, "snapshot_download", no_route)
    for arch in ("deeplab", "lraspp", "segformer"):
        argv = flags(arch=arch, data=scenes, out=tmp_path)
        fails(train_teacher.main, argv, "--init imagenet", "no route to host", "--init PATH", "--init random")
    name, common = "nvidia/segformer-b3-finetuned-ade-512-512", {"data": scenes, "out": tmp_path}
    fails(train_teacher.main, flags(init=name, **common), f"--init {name}:", "no route", "--init random")
    fails(distill.main, flags(teachers=name, **common), f"--teachers {name}:", "no route")
    fails(train_teacher.main, flags(init="outputs/typo.pth", **common), "outputs/typo.pth: no such file")


def save_folder(folder, names, spelling="old", arch="segformer-b0", **changed):
    """A fine-tuned SegFormer as others publish it; returns its network, a stock one, no weight as at first.

    names: of its classes, or their number; changed: values of config.json."""
    labels = {"num_labels": names} if isinstance(names, int) else {"id2label": dict(enumerate(names))}
    own = models.build(arch, data.DESERT).config
    config = transformers.SegformerConfig(depths=own.depths, hidden_sizes=own.hidden_sizes,
                                          decoder_hidden_size=own.decoder_hidden_size, **labels, **changed)
    torch.manual_seed(7)
    stock = transformers.SegformerForSemanticSegmentation(config).eval()
    randomize_norms(stock)
    for parameter in stock.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape)
    stock.save_pretrained(folder)
    transformers.SegformerImageProcessor().save_pretrained(folder)
    state = {respell(key, spelling): value for key, value in stock.state_dict().items()}
    safetensors.torch.save_file(state, folder / "model.safetensors", {"format": "pt"})
    return stock


@pytest.mark.parametrize("spelling", ["old", "new"])
def test_fine_tuned_folder_as_init_brings_encoder_and_head(spelling, tmp_path, fails, scenes, capsys):
    names = data.class_names(data.DESERT)
    for folder, labels in (("ade", 150), ("same", names), ("turned", names[::-1])):
        stock = save_folder(tmp_path / folder, labels, spelling)
        own = models.build("segformer-b0", data.DESERT, str(tmp_path / folder))
        out, left_out = capsys.readouterr().out, set()
        ours, theirs = spelt_old(own.state_dict()), spelt_old(stock.state_dict())
        for key, value in theirs.items():
            if ours[key].shape != value.shape or not torch.equal(ours[key], value):
                left_out.add(key)
        classifier = {"decode_head.classifier.weight", "decode_head.classifier.bias"}
        assert left_out == (set() if folder == "same" else classifier)
        assert out.count("its classifier is left out") == (folder != "same")
        assert ("150 classes, not 10" in out) == (folder == "ade")
        assert ("classes of other names" in out) == (folder == "turned")
        if folder == "same":
            x = torch.randn(1, 3, 64, 96)
            assert torch.allclose(own.eval()(x), stock(x).logits, atol=2e-5)
    argv = flags(arch="segformer-b1", data=scenes, out=tmp_path / "o", init=tmp_path / "ade")
    fails(train_teacher.main, argv, f"--init {tmp_path / 'ade'}: holds segformer-b0, not segformer-b1")
    argv = flags(arch="deeplab", data=scenes, out=tmp_path / "o", init=tmp_path / "ade")
    fails(train_teacher.main, argv, "holds segformer-b0, not deeplab")
    train_teacher.main(flags(**{**B0, "init": tmp_path / "ade"}, data=scenes, out=tmp_path / "o", steps=1))


@pytest.mark.parametrize("spelling", ["old", "new"])
def test_anybodys_segformer_is_a_checkpoint(spelling, tmp_path, scenes, fails, capsys):
    """It teaches, is scored and labels images, with the logits of the stock class."""
    stock = save_folder(tmp_path / "hf", data.class_names(data.DESERT), spelling)
    model, meta = models.load_model(tmp_path / "hf")
    x = torch.randn(2, 3, 64, 96)
    assert torch.allclose(model(x), stock(x).logits, atol=2e-5)
    assert meta["classes"] == data.DESERT and meta["val_iou"] == {} and meta["size"] == 512
    assert meta["arch"] == "segformer-b0" and meta["image_size"] == [960, 540]
    common = {"data": scenes, "out": tmp_path / "o"}
    distill.main(flags(**B0, **common, teachers=tmp_path / "hf", cache_teachers=True, steps=2))
    weights = tmp_path / "hf" / "model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:16]
    assert json.loads((tmp_path / "o" / "teacher_cache.json").read_text())["teachers"] == [digest]
    rows = evaluate.main(flags(tmp_path / "hf", **common, size=64, workers=0))
    assert rows[0]["size"] == weights.stat().st_size
    infer.main(flags(next((scenes / "val" / "Color_Images").iterdir()), checkpoint=tmp_path / "hf", size=64,
                     out=tmp_path / "p"))
    capsys.readouterr()
    argv = flags(**B0, **common, teachers=tmp_path / "hf", teacher_weights="auto", overwrite=True)
    fails(distill.main, argv, "--teacher-weights auto")


def test_folders_that_cannot_teach_are_refused_in_one_line(tmp_path, scenes, fails):
    names, processor = data.class_names(data.DESERT), tmp_path / "mean" / "preprocessor_config.json"
    save_folder(tmp_path / "turned", names[::-1])
    save_folder(tmp_path / "ade", 150)
    save_folder(tmp_path / "generic", 10)
    save_folder(tmp_path / "heads", names, num_attention_heads=[1, 1, 5, 8])
    for name in ("mean", "raw", "cut", "other"):
        save_folder(tmp_path / name, names)
    processor.write_text(json.dumps({"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}))
    (tmp_path / "raw" / "preprocessor_config.json").write_text('{"do_normalize": false}')
    (tmp_path / "cut" / "config.json").write_text('{"id2label": {"a": ')
    (tmp_path / "other" / "config.json").write_text('{"model_type": "resnet"}')
    encoder = transformers.SegformerForImageClassification(models.build("segformer-b0", data.DESERT).config)
    encoder.save_pretrained(tmp_path / "mit")
    common = {"data": scenes, "out": tmp_path / "o", **B0}
    for name, words in (("turned", ["class 0 is 'Sky', not 'Trees'", "--classes"]),
                        ("ade", ["config.json names no classes", "--classes FILE"]),
                        ("generic", ["config.json names no classes", "--classes FILE"]),
                        ("heads", ["num_attention_heads is [1, 1, 5, 8]"]),
                        ("mean", ["another normalization ([0.5, 0.5, 0.5]"]), ("raw", ["normalization"]),
                        ("cut", ["config.json", "damaged"]), ("other", ["model_type is resnet"]),
                        ("mit", ["no network of this project"])):
        fails(distill.main, flags(teachers=tmp_path / name, **common), tmp_path / name, *words)
    (tmp_path / "desert.json").write_text(json.dumps(data.DESERT))
    named = {**common, "classes": tmp_path / "desert.json"}
    fails(distill.main, flags(teachers=tmp_path / "ade", **named), "150 classes, the class table 10")
    distill.main(flags(teachers=tmp_path / "generic", **named, steps=1))


class Fixed(nn.Module):
    """A network that always gives the same logits."""

    def __init__(self, z):
        super().__init__()
        self.z = z

    def forward(self, x):
        return self.z


def test_ensemble_by_hand():
    a, b = torch.tensor([2.0, 0.0]).view(1, 2, 1, 1), torch.tensor([0.0, 4.0]).view(1, 2, 1, 1)
    both = [Fixed(a), Fixed(b)]
    mean = models.Ensemble(both, torch.tensor([3.0, 1.0]))(None)
    assert mean.flatten().tolist() == pytest.approx([1.5, 1.0])
    probs = models.Ensemble(both, torch.tensor([1.0, 1.0]), "probs")(None).exp()
    assert torch.allclose(probs, (a.softmax(1) + b.softmax(1)) / 2)
    by_class = models.Ensemble(both, torch.tensor([[1.0, 0.25], [0.0, 0.75]]))(None)
    expected = [1.0, 0.25 * -1 + 0.75 * 2]                    # centred logits are (1, -1) and (-2, 2)
    assert by_class.flatten().tolist() == pytest.approx(expected)
    bigger = models.Ensemble([Fixed(a), Fixed(b.expand(1, 2, 3, 3))], torch.ones(2))(None)
    assert bigger.shape == (1, 2, 1, 1)


def test_predict_is_bilinear_then_argmax():
    torch.manual_seed(0)
    model = models.build("segformer-b0", data.DESERT).eval()
    image = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        z = model(data.normalize(image))
    expected = F.interpolate(z, (50, 70), mode="bilinear", align_corners=False).argmax(1)
    assert torch.equal(models.predict(model, image, (50, 70)).long(), expected)
    with torch.no_grad():
        mean = (z + model(data.normalize(image.flip(3))).flip(3)) / 2
    assert torch.equal(models.compute_logits(model, image, flip=True), mean)         # to the bit
    flipped = models.predict(model, image, (64, 96), flip=True)
    assert torch.equal(flipped.flip(2), models.predict(model, image.flip(3), (64, 96), flip=True))


def test_tta_is_the_mean_over_scales_and_mirrors_on_the_unscaled_grid():
    """A network that averages cells of 4x4 pixels: the mean by hand."""
    assert models.parse_tta("flip,0.75,1.25") == ([1, 0.75, 1.25], True)
    assert models.parse_tta("flip") == ([1], True) and models.parse_tta("1.5,1,1.5") == ([1, 1.5], False)
    model = nn.Sequential(nn.AvgPool2d(4), nn.Conv2d(3, 2, 1))
    images = [torch.randint(0, 256, (1, 3, side, 2 * side), dtype=torch.uint8) for side in (64, 32, 96)]
    with torch.no_grad():
        maps = [model(data.normalize(image)) for image in images]
    for n in (1, 2):
        maps[n] = F.interpolate(maps[n], (16, 32), mode="bilinear", align_corners=False)
    for flip in (False, True):                                # this network commutes with the mirror
        z = models.compute_logits(model, images, flip=flip)
        assert z.shape == (1, 2, 16, 32) and torch.allclose(z, sum(maps) / 3, atol=1e-5)


# ------------------------------------------------------------ scores and pictures
def test_scores_by_hand_and_as_scikit_learn():
    target = torch.tensor([[0, 0, 1, 1], [1, 255, 3, 3]])
    pred = torch.tensor([[0, 1, 1, 1], [0, 0, 3, 1]])
    table = [{"name": n, "id": i, "color": [0, 0, 0]} for i, n in enumerate("abcd")]
    confusion = evaluate.confusion_matrix(pred, target, 4)
    scores = evaluate.compute_scores(confusion, table)
    assert scores["iou"] == {"a": pytest.approx(1 / 3), "b": pytest.approx(2 / 5), "c": None,
                             "d": pytest.approx(1 / 2)}
    assert scores["miou_present"] == pytest.approx((1 / 3 + 2 / 5 + 1 / 2) / 3)
    assert scores["miou"] == pytest.approx((1 / 3 + 2 / 5 + 1 / 2) / 4)
    assert scores["precision"] == {"a": 0.5, "b": 0.5, "c": None, "d": 1.0}
    assert scores["recall"]["b"] == pytest.approx(2 / 3) and scores["pixel_accuracy"] == pytest.approx(4 / 7)
    metrics = pytest.importorskip("sklearn.metrics")
    valid = target != 255
    t, p = target[valid].numpy(), pred[valid].numpy()
    assert np.array_equal(confusion.numpy(), metrics.confusion_matrix(t, p, labels=range(4)))
    jaccard = metrics.jaccard_score(t, p, labels=[0, 1, 3], average=None)
    assert [v for v in scores["iou"].values() if v is not None] == pytest.approx(list(jaccard))


def test_union_miou_counts_a_class_that_is_only_predicted():
    """Three classes: the first right in 3 of 4 pixels, the second never in a mask but predicted once."""
    table = [{"name": n, "id": i, "color": [0, 0, 0]} for i, n in enumerate("abc")]
    scores = evaluate.compute_scores(torch.tensor([[3, 1, 0], [0, 0, 0], [0, 0, 0]]), table)
    assert (scores["miou"], scores["miou_union"], scores["miou_present"]) == (0.25, 0.375, 0.75)


def test_bootstrap_by_hand():
    """Two images; the first network is right on both, the second on the first image only.

    A draw holds the first image 0, 1 or 2 times with odds 1/4, 1/2, 1/4, so the second network's mIoU over
    two classes is 0, 1/3 or 1: IoU of 1 of (1 + 2 - 1) pixels for each class where one image is wrong."""
    right, wrong = torch.eye(2, dtype=torch.int64), torch.eye(2, dtype=torch.int64).flip(0)
    networks = torch.stack([torch.stack([right, right]), torch.stack([right, wrong])])
    intervals, differences = evaluate.bootstrap(networks)
    assert intervals == [[1, 1], [0, 1]] and differences == [[0, 0], [-1, 0]]
    rng = np.random.default_rng(0)
    many = torch.from_numpy(rng.integers(0, 9, (1, 400, 3, 3)))
    (low, high), = evaluate.bootstrap(many)[0]
    table = [{"name": n, "id": i, "color": [0, 0, 0]} for i, n in enumerate("abc")]
    draws = []
    for _ in range(1000):                                     # the same, image by image
        sample = many[0, rng.integers(0, 400, 400)].sum(0)
        draws.append(evaluate.compute_scores(sample, table)["miou_present"])
    assert [low, high] == pytest.approx(np.quantile(draws, [0.025, 0.975]).tolist(), abs=2e-3)


def test_one_matrix_for_the_split_equals_the_sum_over_images(trained, scenes):
    model, _ = models.load_model(trained[0] / "best_student.pth")
    split = data.Split(scenes, "val", data.DESERT)
    whole = evaluate.evaluate(model, split, 64)
    by_hand = torch.zeros(10, 10, dtype=torch.int64)
    for n in range(len(split)):
        image = data.eval_image(data.read_image(split.pairs[n][0]), 64)
        pred, target = models.predict(model, image, (108, 192))[0].numpy(), split.read(n)[1]
        np.add.at(by_hand.numpy(), (target, pred), 1)
    assert torch.equal(whole, by_hand) and whole.sum() == 4 * 108 * 192
    parts = sum(evaluate.evaluate(model, split, 64, indices=range(r, 4, 3)) for r in range(3))
    assert torch.equal(parts, whole)


def test_gmacs_are_counted_after_the_rewrite():
    b1 = models.build("segformer-b1", data.DESERT).eval()
    fast = models.optimize_for_inference(b1)
    assert evaluate.count_gmacs(fast) == pytest.approx(11.0, abs=0.2)
    stock = transformers.SegformerForSemanticSegmentation(b1.config).eval()
    assert evaluate.count_gmacs(stock) == pytest.approx(15.3, abs=0.3)


def many_classes(count):
    return [{"name": f"class {n}", "id": n, "color": [n, 0, 0]} for n in range(count)]


def test_a_chart_of_two_classes_holds_its_title():
    chart = evaluate.draw_confusion(torch.eye(2), data.DESERT[:2], "a network with a long name, val")
    image = np.asarray(chart)
    assert (image[4:22, -12:] == 255).all() and (image[4:22] != 255).any()


def test_bars_are_as_long_as_their_values():
    chart = np.asarray(evaluate.draw_bars([("a", 0.25, 0.2, 0.3), ("longer name", 0.5, 0.4, 0.6)], "title"))
    blue = (chart == evaluate.LINE_COLORS[0]).all(2)
    lengths = [int(blue[row].sum()) for row in (42, 72)]      # above the line of the interval
    assert lengths[1] == pytest.approx(560 * 0.5 / 0.6, abs=2)
    assert lengths[1] == pytest.approx(2 * lengths[0], abs=2)


def test_bars_of_networks_that_are_right_nowhere_are_drawn():
    assert evaluate.draw_bars([("a", 0.0, 0.0, 0.0)], "title").size[0] > 100


def test_a_share_that_is_no_tenth_of_a_percent_is_not_rounded_up():
    assert [data.percent(share) for share in (0.5, 0.001, 0.0004)] == ["50.0 %", "0.1 %", "< 0.1 %"]


def test_a_legend_of_many_classes_stays_inside_the_image():
    image, labels = Image.new("RGB", (320, 240), (90, 120, 60)), np.arange(320 * 240).reshape(240, 320) % 100
    drawn = [np.asarray(data.overlay(image, labels, many_classes(100), legend)) for legend in (True, False)]
    assert (drawn[0][-1] == drawn[1][-1]).all() and (drawn[0][:200, 4] != drawn[1][:200, 4]).any(1).all()


def test_curves_and_confusion_of_255_classes_are_drawn():
    table = many_classes(255)
    record = {"epoch": 1, "lr": 1e-4, "loss": 1.0, "val_iou": {c["name"]: c["id"] / 255 for c in table}}
    charts = evaluate.draw_curves([record], table, []), evaluate.draw_confusion(torch.eye(255), table, "a")
    assert all(len(chart.getcolors(1 << 24)) > 10 for chart in charts)


# ------------------------------------------------------------ the teacher cache
@pytest.fixture
def squares(tmp_path):
    """Square images whose whole is the crop: under the identity teachers see the same pixels either way."""
    for n in range(4):
        image, mask = distill.draw_scene(n, 96, 96)
        for part, content in (("Color_Images", image), ("Segmentation", Image.fromarray(mask))):
            (tmp_path / "squares" / "train" / part).mkdir(parents=True, exist_ok=True)
            content.save(tmp_path / "squares" / "train" / part / f"{n}.png")
    return data.Split(tmp_path / "squares", "train", data.DESERT)


def make_cache(folder, split, model, key="k"):
    cache = distill.TeacherCache(folder, {"key": key}, split, 96)
    cache.build(model, ALONE, None, 0)
    return cache


def test_cache_under_the_identity_equals_the_teachers_online(squares, tmp_path):
    torch.manual_seed(0)
    model = models.build("segformer-b0", data.DESERT).eval()
    cache = make_cache(tmp_path, squares, model)
    crops = [squares.crop(n, 96, np.eye(2, 3)) for n in range(4)]
    images, targets = (torch.stack(column) for column in zip(*crops, strict=True))
    plain = torch.tensor([[1.0, 1, 1, 0]]).repeat(4, 1)
    batch = data.Batch(images, targets, torch.eye(2, 3).repeat(4, 1, 1), plain, torch.arange(4))
    batch = data.augment_on_device(batch, CPU)
    with torch.no_grad():
        online = model(batch.image)
    cached = cache.crops(batch)
    assert torch.allclose(cached, online, atol=2e-3)
    z = torch.randn(4, 10, 24, 24)
    assert soft(z, online, batch.target, 2.0)[0].item() == pytest.approx(
        soft(z, cached, batch.target, 2.0)[0].item(), rel=1e-3)


def test_cached_maps_follow_the_samples_own_affine_map(squares, tmp_path):
    """A map of image coordinates, warped: cell centres arrive where the affine map says."""
    cache = distill.TeacherCache(tmp_path, {}, squares, 96)
    cache.open(ALONE)
    y, x = np.meshgrid((np.arange(24) + 0.5) * 4, (np.arange(24) + 0.5) * 4, indexing="ij")
    maps = np.zeros((4, 10, 24, 24), np.float16)
    maps[:, 0], maps[:, 1] = x, y
    cache.values[:] = maps.ravel()
    rng = np.random.default_rng(0)
    affine = torch.from_numpy(np.stack([data.random_affine(rng, 96, 96, 96) for _ in range(4)])).float()
    batch = data.Batch(torch.zeros(4, 3, 96, 96), torch.zeros(4, 96, 96), affine, None, torch.arange(4))
    warped, compared = cache.crops(batch), 0
    for n, i, j in itertools.product(range(4), (0, 8, 12, 20), (3, 12, 15, 23)):
        place = affine[n] @ torch.tensor([4 * j + 2.0, 4 * i + 2.0, 1.0])
        if ((place > 4) & (place < 92)).all():
            compared += 1
            assert torch.allclose(warped[n, :2, i, j], place, atol=0.1)
    assert compared > 10


def test_cache_resumes_and_is_rebuilt_when_stale(squares, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model, seen, once = models.build("segformer-b0", data.DESERT).eval(), [], distill.compute_logits

    def interrupted(*args):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(1)
        return once(*args)
    monkeypatch.setattr(distill, "compute_logits", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_cache(tmp_path, squares, model)
    monkeypatch.setattr(distill, "compute_logits", lambda *args: seen.append(1) or once(*args))
    seen.clear()
    first = make_cache(tmp_path, squares, model).values.copy()
    assert len(seen) == 2                                     # two were done before the interruption
    make_cache(tmp_path, squares, model)
    assert len(seen) == 2
    again = make_cache(tmp_path, squares, model, key="other weights")
    assert len(seen) == 6 and np.array_equal(again.values, first)
    assert np.isfinite(first).all() and (first != 0).any()


def test_room_for_a_cache_is_looked_for_after_the_old_one_is_gone(squares, tmp_path, monkeypatch):
    """A disk that holds one cache and no second one."""
    torch.manual_seed(0)
    model, values = models.build("segformer-b0", data.DESERT).eval(), tmp_path / "teacher_cache.f16"
    size = make_cache(tmp_path, squares, model).values.nbytes
    disk = argparse.Namespace()

    def disk_usage(folder):
        disk.free = size - (size if values.exists() else 0)
        return disk
    monkeypatch.setattr(distill.shutil, "disk_usage", disk_usage)
    make_cache(tmp_path, squares, model, key="other weights")
    size = 0
    with pytest.raises(data.InputError, match="0 MB are free"):
        make_cache(tmp_path, squares, model, key="yet others")


# ------------------------------------------------------------ a step of the loop
def fit_once(scenes, out, world=ALONE, loss_fn=None, prepare=None, **changes):
    """fit() on the scenes with losses of its own: (model, gradients of the last step, record, optimizer)."""
    argv = flags(**{"data": scenes, "out": out, **B0, "steps": 1, **changes})
    args = distill.make_parser().parse_args(argv)
    train = data.Split(scenes, "train", data.DESERT, unlabelled=args.unlabelled)
    val = data.Split(scenes, "val", data.DESERT)
    torch.manual_seed(0)
    class_weight, model = torch.rand(10) + 0.1, models.build(args.arch, data.DESERT)
    kept: dict = {}

    def three_losses(network, batch, progress):
        network.eval()                                        # BatchNorm and dropout see the batch otherwise
        z = network(batch.image)
        own = {"hard": losses.hard_loss(z, batch.target, batch.weights["hard"]),
               "soft": losses.soft_loss(z, batch.teacher, batch.weights["soft"], 2.0)[0],
               "cwd": losses.cwd_loss(z, batch.teacher, batch.weights["soft"])}
        return sum(own.values()), own

    def prepare_with_teacher(batch):                          # a teacher made from the image itself
        return distill.make_prepare(args, world, train, class_weight, lambda batch: (
            F.avg_pool2d(batch.image, 4).repeat(1, 4, 1, 1)[:, :10], []))(batch)

    def keep_gradients(parameters, limit, once=nn.utils.clip_grad_norm_):
        kept["gradients"] = [p.grad.clone() for p in parameters]
        return once(parameters, limit)

    def keep_optimizer(*args, once=torch.optim.AdamW, **kwargs):
        kept["optimizer"] = once(*args, **kwargs)
        return kept["optimizer"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.utils, "clip_grad_norm_", keep_gradients)
        patch.setattr(torch.optim, "AdamW", keep_optimizer)
        state = train_teacher.State("a", args, world, train, val)
        functions = prepare or prepare_with_teacher, loss_fn or three_losses
        _, history = train_teacher.fit(model, state, *functions, train, val, class_weight, args, world)
    return model, kept["gradients"], history[-1], kept["optimizer"]


@pytest.fixture(scope="session")
def unlabelled(tmp_path_factory):
    """A folder of five images without masks."""
    folder = tmp_path_factory.mktemp("unlabelled")
    for n in range(5):
        distill.draw_scene(500 + n, 160, 96)[0].save(folder / f"drive{n}.png")
    return folder


@pytest.mark.parametrize("how", ["labelled", "unlabelled"])
def test_two_half_batches_equal_one_whole(how, scenes, unlabelled, tmp_path):
    changes = {"unlabelled": unlabelled, "soft_weights": "balanced"}
    changes = changes if how == "unlabelled" else {}
    whole = fit_once(scenes, tmp_path / "whole", batch_size=4, **changes)
    halves = fit_once(scenes, tmp_path / "halves", batch_size=2, accumulate=2, **changes)
    for a, b in zip(whole[1], halves[1], strict=True):
        assert torch.allclose(a, b, atol=1e-5 * (1 + a.abs().max())) and (a != 0).any()
    for key in ("loss", "hard", "soft", "cwd"):
        assert whole[2][key] == pytest.approx(halves[2][key], rel=1e-4)


def test_an_unlabelled_image_changes_no_hard_loss_and_counts_for_the_soft_one(scenes, unlabelled):
    args = distill.make_parser().parse_args([])
    split = data.Split(scenes, "train", data.DESERT, unlabelled=[unlabelled])
    assert (len(split), split.unlabelled, len(split.sizes)) == (12, 5, 17)
    dataset, teacher = data.TrainDataset(split, 64, 0), torch.randn(2, 10, 16, 16)
    batch = data.collate([dataset[0, 3, 4], dataset[0, 90, 14]])
    prepare = distill.make_prepare(args, ALONE, split, torch.ones(10), lambda batch: (teacher, []))
    ready = prepare(batch)
    assert (ready.target[1] == 255).all() and (ready.weights["hard"][1] == 0).all()
    assert torch.equal(ready.target[0], batch.target[0].long()) and (ready.target[0] != 255).any()
    inside = batch.target[1, 2::4, 2::4] != 255               # the dummy labels of the loader
    assert torch.equal(ready.weights["soft"][1], inside.float()) and inside.any()
    assert torch.equal(ready.weights["soft_unlabelled"][0], torch.zeros(16, 16))
    assert torch.equal(ready.weights["soft_unlabelled"][1], inside.float())
    z = torch.randn(2, 10, 16, 16, requires_grad=True)
    losses.hard_loss(z, ready.target, ready.weights["hard"]).backward()
    assert (z.grad[1] == 0).all() and (z.grad[0] != 0).any()


def gradients_of_a_process(rank, scenes, folder, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    with train_teacher.join_processes("cpu") as world:
        _, gradients, record, _ = fit_once(scenes, folder / "two", world, batch_size=2)
        torch.save([gradients, record["loss"]], folder / f"{rank}.pth")


def test_two_processes_give_the_gradients_of_one(scenes, tmp_path):
    _, gradients, record, _ = fit_once(scenes, tmp_path / "one", batch_size=4)
    torch.multiprocessing.spawn(gradients_of_a_process, (scenes, tmp_path, free_port()), 2)
    for rank in (0, 1):
        found, loss = torch.load(tmp_path / f"{rank}.pth", weights_only=True)
        assert loss == pytest.approx(record["loss"], rel=1e-4)
        for a, b in zip(gradients, found, strict=True):
            assert torch.allclose(a, b, atol=1e-5 * (1 + a.abs().max()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradient_that_is_not_finite_changes_nothing(bad, scenes, tmp_path):
    """The second of three steps: weights, BatchNorm's buffers and the optimizer's moments stay as they
    were."""
    factors, snapshots, networks = iter([1.0, bad, 1.0]), [], []

    def prepare(batch):
        if networks:
            snapshots.append({key: value.clone() for key, value in networks[0].state_dict().items()})
        return data.augment_on_device(batch, CPU)._replace(weights={"hard": torch.ones(1)})

    def loss_fn(network, batch, progress):
        networks.append(network)
        value = network(batch.image).float().mean() * next(factors)
        return value, {"hard": value}
    changes = {"prepare": prepare, "loss_fn": loss_fn, "arch": "deeplab", "steps": 3}
    model, _, record, optimizer = fit_once(scenes, tmp_path, **changes)
    after_first, after_second = snapshots
    assert states_equal(after_first, after_second) and not states_equal(after_second, model.state_dict())
    assert record["skipped"] == 1 and math.isfinite(record["loss"])
    assert {int(moments["step"]) for moments in optimizer.state.values()} == {2}


# ================================================================ B: the pipeline
def test_returns_student_and_history_and_writes_what_readme_says(trained):
    out, _, student, history = trained
    assert isinstance(student, transformers.SegformerForSemanticSegmentation) and not student.training
    names = {"deep_lab.pth", "deep_lab.jsonl", "deep_lab_curves.png", "segformer-b0.pth", "best_student.pth",
             "best_student.jsonl", "best_student.csv", "training_curves.png"}
    assert names <= {p.name for p in out.iterdir()} and (out / "checkpoints" / "best_student.pth").exists()
    log = read_log(out / "best_student.jsonl")
    run = log[0]["run"]
    assert {"args", "versions", "device", "parameters", "size"} <= run.keys()
    assert run["parameters"] == sum(p.numel() for p in student.parameters())
    keys = {"epoch", "step", "loss", "hard", "soft", "alpha", "lr", "images_per_s", "wait_s", "val_miou",
            "peak_memory_mib", "val_iou", "skipped", "logits_clamped", "soft_clamped"}
    assert len(log) == 2 and keys <= log[1].keys() and log[1:] == history
    assert list(log[1]["val_iou"]) == [c["name"] for c in data.DESERT]
    assert log[1]["loss"] == pytest.approx(0.5 * log[1]["hard"] + 0.5 * log[1]["soft"], rel=0.3)


@pytest.fixture
def partly_labelled(copy_of):
    """The scenes, where the validation images have labels on very different shares of their pixels."""
    for n, path in enumerate(sorted((copy_of / "val" / "Segmentation").iterdir())):
        convert(lambda values, n=n: np.where(np.arange(len(values))[:, None] < 30 * n, 4242, values).astype(
            np.uint16))(path)
    return copy_of


def test_validation_loss_is_cross_entropy_over_all_pixels_of_the_split(partly_labelled, tmp_path,
                                                                       monkeypatch):
    panels: dict = {}
    monkeypatch.setattr(evaluate, "draw_panel", lambda draw, x, y, title, epochs, series, *colors:
                        panels.update({title: series}))
    argv = flags(**{**B0, "data": partly_labelled, "out": tmp_path, "epochs": 2, "eval_every": 2})
    model, history = train_teacher.main(argv)
    train, val = (data.Split(partly_labelled, name, data.DESERT) for name in ("train", "val"))
    logits, targets = [], []
    for n in range(len(val)):
        image, target = val.read(n)
        z = models.compute_logits(model, data.eval_image(image, 64))
        z = F.interpolate(z, target.shape, mode="bilinear", align_corners=False)     # (1, 10, H, W)
        logits.append(z[0].flatten(1).T.double())
        targets.append(torch.from_numpy(target).flatten().long())
    weight = data.class_weights(train.counts).double()
    single = [float(F.cross_entropy(z, t, weight, ignore_index=255))
              for z, t in zip(logits, targets, strict=True)]
    expected = float(F.cross_entropy(torch.cat(logits), torch.cat(targets), weight, ignore_index=255))
    assert history[0]["val_loss"] is None and history[1]["val_loss"] == pytest.approx(expected, rel=1e-5)
    assert abs(statistics.mean(single) / expected - 1) > 1e-3                    # no mean over images
    assert panels["loss and its parts"]["validation loss"] == [None, history[1]["val_loss"]]


def validation_of_a_process(rank, scenes, folder, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    with train_teacher.join_processes("cpu") as world:
        torch.save(validate_fresh(scenes, world), folder / f"{rank}.pth")


def validate_fresh(scenes, world):
    torch.manual_seed(0)
    model, args = models.build("segformer-b0", data.DESERT), argparse.Namespace(size=64, workers=0)
    val = data.Split(scenes, "val", data.DESERT)
    return train_teacher.validate(model, val, args, world, None, torch.linspace(0.1, 3, 10))


def test_two_processes_give_the_validation_of_one(partly_labelled, tmp_path):
    scores = validate_fresh(partly_labelled, ALONE)
    torch.multiprocessing.spawn(validation_of_a_process, (partly_labelled, tmp_path, free_port()), 2)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pth", weights_only=True)
        assert found.pop("loss") == pytest.approx(scores["loss"], rel=1e-9)
        assert found == {key: value for key, value in scores.items() if key != "loss"}


def test_validation_without_a_label_or_with_infinite_logits_has_no_loss(copy_of, monkeypatch):
    for path in (copy_of / "val" / "Segmentation").iterdir():
        convert(lambda values: np.full_like(values, 255))(path)
    monkeypatch.setattr(data, "find_label_format", lambda *a: "indices")
    assert validate_fresh(copy_of, ALONE)["loss"] is None
    monkeypatch.setattr(train_teacher, "hard_loss", lambda z, target, weight: torch.tensor(torch.inf))
    assert validate_fresh(copy_of, ALONE)["loss"] is None


def test_csv_holds_the_numbers_of_the_history(trained, scenes, tmp_path):
    out, _, _, records = trained
    _, history = train_teacher.main(flags(data=scenes, **B0, out=tmp_path, epochs=3, eval_every=2))
    for path, epochs in ((tmp_path / "segformer-b0.csv", history), (out / "best_student.csv", records)):
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == len(epochs)
        for row, record in zip(rows, epochs, strict=True):
            iou = record["val_iou"] or dict.fromkeys(data.class_names(data.DESERT))
            flat = {**record, **{f"val_iou_{name}": value for name, value in iou.items()}}
            del flat["val_iou"]
            assert {key: float(text) if text else None for key, text in row.items()} == flat
    assert list(row)[:3] == ["epoch", "step", "alpha"]


def test_csv_has_the_columns_of_all_epochs_and_quotes_names():
    table = train_teacher.csv_table([{"epoch": 1, "step": 3, "val_iou": None},
                                     {"epoch": 2, "step": 6, "val_iou": {'Lush, "Bushes"': 0.1, "b": None}}])
    assert table == 'epoch,step,"val_iou_Lush, ""Bushes""",val_iou_b\n1,3,,\n2,6,0.1,\n'
    assert train_teacher.csv_table([]) == "epoch,step\n"


def test_checkpoint_holds_plain_types_and_its_scores(trained):
    content = torch.load(trained[0] / "best_student.pth", weights_only=True)
    keys = {"model_state_dict", "arch", "classes", "mean", "std", "size", "epoch", "val_iou", "args"}
    assert keys <= content.keys() and content["size"] == 64
    assert content["arch"] == "segformer-b1" and content["classes"] == data.DESERT


def test_alpha_zero_equals_training_alone_bit_for_bit(scenes, tmp_path, monkeypatch):
    common = {"data": scenes, **B0, "steps": 4}
    alone, first = train_teacher.main(flags(out=tmp_path / "a", **common))
    monkeypatch.setattr(distill, "load_teachers", lambda *a: pytest.fail("teachers were loaded"))
    student, second = distill.main(flags(out=tmp_path / "b", alpha="0:0", **common))
    assert states_equal(alone.state_dict(), student.state_dict())
    assert [r["val_iou"] for r in first] == [r["val_iou"] for r in second]


def test_teachers_are_unchanged_by_training_to_the_bit(trained, scenes, tmp_path, monkeypatch):
    teachers, before, fit = [], [], distill.fit
    optimize = distill.optimize_for_inference

    def keep(*args):
        teachers.append(optimize(*args))
        return teachers[-1]

    def snapshot(*args):
        before.extend({key: value.clone() for key, value in t.state_dict().items()} for t in teachers)
        return fit(*args)
    monkeypatch.setattr(distill, "optimize_for_inference", keep)
    monkeypatch.setattr(distill, "fit", snapshot)
    distill.main(flags(data=scenes, out=tmp_path, **B0, steps=3, teachers=trained[1]))
    assert len(teachers) == 2
    for teacher, old in zip(teachers, before, strict=True):
        assert states_equal(teacher.state_dict(), old) and not teacher.training
        assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_training_learns(scenes, tmp_path):
    _, history = train_teacher.main(flags(data=scenes, out=tmp_path, **B0, epochs=12, class_weights="none"))
    assert history[-1]["loss"] < 0.75 * history[0]["loss"] and history[-1]["val_miou"] > 0.12


def test_the_ramp_ends_with_the_last_step(scenes, tmp_path, trained, monkeypatch):
    seen = []
    monkeypatch.setattr(distill, "ramp", lambda a, b, p: seen.append(losses.ramp(a, b, p)) or seen[-1])
    distill.main(flags(data=scenes, out=tmp_path, **B0, steps=5, alpha="0.2:0.6", teachers=trained[1][0]))
    assert seen == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6])


SIGNALS = [({"feature": 1, "kl": 0}, {"feature"}), ({"attention": 1}, {"soft", "attention"}),
           ({"cwd": 3}, {"soft", "cwd"}), ({"average": "probs"}, {"soft"}),
           ({"teacher_weights": "auto"}, {"soft"}), ({"teacher_weights": "3:1"}, {"soft"}),
           ({"rare_class_sampling": True}, {"soft"}),
           ({"class_weights": "sqrt"}, {"soft"}), ({"alpha": "0:0", "feature": 0.5}, {"soft", "feature"}),
           ({"arch": "lraspp", "cwd": 3, "feature": 1, "attention": 1},
            {"soft", "cwd", "feature", "attention"}),
           ({"arch": "lraspp", "cache_teachers": True, "cwd": 3}, {"soft", "cwd"})]


@pytest.mark.parametrize("extra, parts", SIGNALS, ids=lambda value: " ".join(sorted(value)))
def test_every_signal_trains(extra, parts, trained, scenes, tmp_path):
    common = {**B0, **extra}
    argv = flags(**common, data=scenes, out=tmp_path, steps=3, teachers=trained[1])
    student, history = distill.main(argv)
    found = {key for key in ("soft", "cwd", "feature", "attention") if key in history[-1]}
    assert found == parts and all(history[-1][key] > 0 for key in parts)
    saved = weights_of(tmp_path / f"student_{common['arch']}.pth")
    assert saved.keys() == spelt_old(student.state_dict()).keys()                    # no adapters among them


def test_init_teacher_copies_an_even_choice_of_blocks():
    torch.manual_seed(0)
    teacher, student = models.build("segformer-b3", data.DESERT), models.build("segformer-b1", data.DESERT)
    distill.start_from_teacher(student, [teacher])
    own, theirs = spelt_old(student.state_dict()), spelt_old(teacher.state_dict())
    block = "segformer.encoder.block.2.{}.mlp.dense1.weight"
    assert torch.equal(own[block.format(0)], theirs[block.format(0)])
    assert torch.equal(own[block.format(1)], theirs[block.format(17)])
    embedding = "segformer.encoder.patch_embeddings.3.proj.weight"
    assert torch.equal(own[embedding], theirs[embedding])
    with pytest.raises(data.InputError, match="--init teacher"):
        distill.start_from_teacher(models.build("segformer-b0", data.DESERT), [teacher])


def test_hard_weight_constant_keeps_the_hard_loss_whole(trained, scenes, tmp_path):
    for how, share in (("ramp", 0.5), ("constant", 1.0)):
        changes = {"out": tmp_path / how, "alpha": 0.5, "hard_weight": how}
        _, (record,) = distill.main(flags(data=scenes, **B0, steps=1, teachers=trained[1], **changes))
        assert record["loss"] == pytest.approx(share * record["hard"] + 0.5 * record["soft"], rel=1e-5)


def test_a_batch_of_which_half_has_no_label_needs_half_as_many_pairs(trained, copy_of, unlabelled, tmp_path):
    for part in ("Color_Images", "Segmentation"):
        for path in sorted((copy_of / "train" / part).iterdir())[6:]:
            path.unlink()
    settings = {**B0, "batch_size": 8, "steps": 1, "teachers": trained[1][1]}
    _, history = distill.main(flags(data=copy_of, out=tmp_path, unlabelled=unlabelled, **settings))
    assert history[-1]["step"] == 1                           # 4 of 6 pairs


def test_a_setting_that_was_measured_to_lose_says_so(trained, scenes, unlabelled, tmp_path, capsys):
    common = {"data": scenes, **B0, "steps": 1, "teachers": trained[1][1]}
    for name, extra in (("plain", {}), ("more", {"unlabelled": unlabelled}), ("alone", {"alpha": 0})):
        distill.main(flags(out=tmp_path / name, **common, **extra))
        assert ("note: from random weights" in capsys.readouterr().out) == (name == "plain")


def test_training_images_among_the_unlabelled_are_not_taken_twice(scenes, copy_of, unlabelled):
    folder = copy_of / "train" / "Color_Images"
    split = data.Split(copy_of, "train", data.DESERT, unlabelled=[folder, unlabelled][1:])
    shutil.copy(next(unlabelled.iterdir()), copy_of / "train" / "more.png")
    (copy_of / "more").mkdir()
    for path in (*folder.iterdir(), copy_of / "train" / "more.png"):
        (copy_of / "more" / path.name).symlink_to(path)
    mixed = data.Split(copy_of, "train", data.DESERT, unlabelled=[copy_of / "more"])
    assert split.unlabelled == 5 and mixed.unlabelled == 1 and mixed.images[-1].name == "more.png"
    assert len({split.digest, mixed.digest, data.Split(copy_of, "train", data.DESERT).digest}) == 3


def test_same_command_gives_the_same_bits_for_any_number_of_workers(scenes, tmp_path):
    results = []
    for workers in (0, 2):
        argv = flags(**{"data": scenes, **B0, "steps": 4, "out": tmp_path / str(workers), "workers": workers})
        results.append(train_teacher.main(argv))
    assert states_equal(results[0][0].state_dict(), results[1][0].state_dict())
    assert [without_times(r) for r in results[0][1]] == [without_times(r) for r in results[1][1]]


def test_images_per_second_are_of_training_alone(scenes, tmp_path, monkeypatch):
    once, start, before = train_teacher.evaluate, time.perf_counter(), []

    def slow(*args):
        before.append(time.perf_counter() - start)
        time.sleep(0.2)
        return once(*args)
    monkeypatch.setattr(train_teacher, "evaluate", slow)
    _, history = train_teacher.main(flags(data=scenes, out=tmp_path, **B0, steps=2))
    assert len(before) == len(history) == 1 and 0 < history[0]["seconds"] < before[0]
    assert history[0]["images_per_s"] == pytest.approx(2 * 4 / history[0]["seconds"])


def test_training_needs_no_module_that_windows_lacks(scenes, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)        # importing it fails, as on Windows
    _, history = train_teacher.main(flags(data=scenes, out=tmp_path, **B0, steps=1))
    assert history[0]["peak_memory_mib"] is None


def test_cached_run_says_what_the_cache_takes_and_builds_it_once(trained, scenes, tmp_path, capsys):
    common = {"data": scenes, **B0, "steps": 3, "teachers": trained[1]}
    argv = flags(out=tmp_path, cache_teachers=True, **common)
    _, history = distill.main(argv)
    said = capsys.readouterr().out
    assert "teacher cache: 12 of 12 images" in said and "MB" in said and "minutes" in said
    (tmp_path / "teacher_cache.f16").unlink()
    distill.main(argv)
    assert "finished already" in capsys.readouterr().out and not (tmp_path / "teacher_cache.f16").exists()
    _, online = distill.main(flags(out=tmp_path / "online", **common))
    assert history[0]["soft"] == pytest.approx(online[0]["soft"], rel=0.5)
    assert history[0]["hard"] == pytest.approx(online[0]["hard"], rel=0.1)


def test_demo_hands_its_device_and_precision_to_every_script(tmp_path, monkeypatch):
    class Evaluated(Exception):
        pass

    calls, once = [], distill.main

    def last(argv):
        calls.append(argv)
        raise Evaluated
    monkeypatch.setattr(train_teacher, "main", calls.append)
    monkeypatch.setattr(distill, "main", lambda argv: calls.append(argv) or ("student", []))
    monkeypatch.setattr(evaluate, "main", last)
    with pytest.raises(Evaluated):
        once(flags(demo=True, device="cpu", amp="bf16", out=tmp_path))
    assert len(calls) == 4
    for argv in calls:
        assert argv[argv.index("--device") + 1] == "cpu" and argv[argv.index("--amp") + 1] == "bf16"


def test_data_prints_what_the_splits_hold_and_draws_augmented_pairs(scenes, tmp_path, capsys):
    data.main(flags(data=scenes, out=tmp_path, size=64))
    said = capsys.readouterr().out
    assert all(said.count(entry["name"]) == 2 for entry in data.DESERT)
    assert "192x108 (12)" in said and "192x108 (4)" in said
    with Image.open(tmp_path / "augmented.png") as sheet:
        assert sheet.size == (6 * 64, 4 * 64) and len(sheet.getcolors(1 << 24)) > 1000


# ------------------------------------------------------------ resuming
def test_same_command_again_returns_the_finished_run(trained, scenes, capsys):
    out, teachers, student, history = trained
    again, records = distill.main(flags(teachers=teachers, data=scenes, out=out, **TINY, steps=3))
    assert states_equal(again.state_dict(), student.state_dict()) and records == history
    assert "finished already" in capsys.readouterr().out


@pytest.mark.parametrize("changed, name", [
    ({"seed": 1}, "--seed (was 0, now 1)"), ({"lr": 2e-3}, "--lr"), ({"T": 3}, "--T"),
    ({"alpha": 0.5}, "--alpha"), ({"batch_size": 2}, "--batch-size"), ({"steps": 9}, "--steps")])
def test_other_settings_are_refused_and_listed(changed, name, trained, scenes, fails):
    argv = flags(**{"teachers": trained[1], "data": scenes, "out": trained[0], **TINY, "steps": 3, **changed})
    fails(distill.main, argv, name, "--overwrite", "--out")


def test_other_teachers_are_refused(trained, scenes, fails):
    argv = flags(teachers=trained[1][::-1], data=scenes, out=trained[0], **TINY, steps=3)
    fails(distill.main, argv, "--teachers")


def test_another_class_table_is_refused_and_the_same_one_elsewhere_is_not(scenes, tmp_path, fails, capsys):
    def argv(name):
        return flags(data=scenes, **B0, out=tmp_path / "o", steps=2, classes=tmp_path / name)
    (tmp_path / "a.json").write_text(json.dumps(data.DESERT))
    train_teacher.main(argv("a.json"))
    (tmp_path / "b.json").write_text(json.dumps(data.DESERT, indent=1))
    train_teacher.main(argv("b.json"))
    assert "finished already" in capsys.readouterr().out
    renamed = [{**c, "name": c["name"].replace("Logs", "Boats")} for c in data.DESERT]
    (tmp_path / "a.json").write_text(json.dumps(renamed))
    fails(train_teacher.main, argv("a.json"), "--classes (another table)", "--overwrite")


@pytest.mark.parametrize("changed, word", [({"seed": 5}, "--seed (was 0, now 5)"),
                                           ({"batch_size": 99}, "--batch-size 99")])
def test_refused_run_leaves_the_teacher_cache_alone(changed, word, trained, scenes, tmp_path, fails):
    common = {"data": scenes, "out": tmp_path, **B0, "steps": 2, "cache_teachers": True}
    distill.main(flags(teachers=trained[1], **common))
    kept = {end: (tmp_path / f"teacher_cache.{end}").read_bytes() for end in ("json", "f16", "done")}
    fails(distill.main, flags(**{"teachers": trained[1][0], **common, **changed}), word)
    assert kept == {end: (tmp_path / f"teacher_cache.{end}").read_bytes() for end in kept}


def test_settings_may_change_where_nothing_was_trained_yet(scenes, tmp_path, monkeypatch):
    """As after a step that ran out of memory, whose message says to lower the batch."""
    def out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory")
    with monkeypatch.context() as patch:
        at_step(patch, 0, out_of_memory)
        with pytest.raises(data.RunError, match="out of memory"):
            train_teacher.main(flags(data=scenes, **B0, out=tmp_path, steps=2))
    changes = {"batch_size": 2, "accumulate": 2}
    _, history = train_teacher.main(flags(**{"data": scenes, **B0, "out": tmp_path, "steps": 2, **changes}))
    assert history[-1]["step"] == 2


def test_the_way_on_that_a_failed_run_names_works(scenes, tmp_path, monkeypatch):
    def out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory")
    common = {"data": scenes, **B0, "steps": 4}
    with monkeypatch.context() as patch:
        at_step(patch, 2, out_of_memory)
        with pytest.raises(data.RunError) as error:
            train_teacher.main(flags(**common, out=tmp_path / "a", save_minutes=0))
    last = tmp_path / "a" / "checkpoints" / "segformer-b0.pth"
    assert str(error.value).endswith(f"with --init {last}, the last saved state, and another --out")
    assert torch.load(last, weights_only=True)["training"]["step"] == 2
    common["batch_size"] = 2
    with pytest.raises(data.InputError, match="--batch-size"):
        train_teacher.main(flags(**common, out=tmp_path / "a"))
    _, history = train_teacher.main(flags(**{**common, "out": tmp_path / "b", "init": last}))
    assert history[-1]["step"] == 4


def test_resuming_needs_no_first_weights(scenes, trained, tmp_path, capsys):
    shutil.copy(trained[1][1], tmp_path / "first.pth")
    argv = flags(**{"data": scenes, **B0, "out": tmp_path, "steps": 2, "init": tmp_path / "first.pth"})
    train_teacher.main(argv)
    (tmp_path / "first.pth").unlink()
    train_teacher.main(argv)
    assert "finished already" in capsys.readouterr().out


def test_overwrite_keeps_the_old_state_until_the_new_one_is_written(scenes, tmp_path, monkeypatch):
    """Another process may look at the files later; what it finds then is the new run's."""
    argv = flags(data=scenes, **B0, out=tmp_path, steps=2)
    train_teacher.main(argv)
    state, seen, once = tmp_path / "checkpoints" / "segformer-b0.pth", [], train_teacher.to_training
    monkeypatch.setattr(train_teacher, "to_training", lambda *a: seen.append(state.exists()) or once(*a))
    train_teacher.main([*argv, "--overwrite"])
    assert seen == [True]


def test_overwrite_starts_again_and_a_foreign_checkpoint_is_kept(scenes, tmp_path, fails):
    argv = flags(data=scenes, **B0, out=tmp_path, steps=2)
    train_teacher.main(argv)
    _, history = train_teacher.main([*argv, "--seed", "1", "--overwrite"])
    assert history[-1]["step"] == 2
    shutil.rmtree(tmp_path / "checkpoints")
    fails(train_teacher.main, argv, "segformer-b0.pth", "no state", "--overwrite")


def at_step(monkeypatch, step, action):
    """Calls action() when the loop begins step `step` (counted from 0)."""
    once = train_teacher.normalize_weights
    count = itertools.count()

    def normalize_weights(*args):
        if next(count) == step:
            action()
        return once(*args)
    monkeypatch.setattr(train_teacher, "normalize_weights", normalize_weights)


def test_lraspp_trains_alone_resumes_and_is_scored(scenes, tmp_path, monkeypatch):
    """With a batch of one: nothing in it normalizes over the batch after global pooling."""
    def argv(out):
        return flags(**{**TINY, "arch": "lraspp", "data": scenes, "out": tmp_path / out, "batch_size": 1},
                     steps=3)
    whole, history = train_teacher.main(argv("whole"))
    with monkeypatch.context() as patch:
        at_step(patch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(train_teacher.Stopped):
            train_teacher.main(argv("stopped"))
    resumed, _ = train_teacher.main(argv("stopped"))
    assert states_equal(resumed.state_dict(), whole.state_dict())
    best = tmp_path / "whole" / "lraspp.pth"
    row, = evaluate.main(flags(best, data=scenes, out=tmp_path, **PLAIN))
    assert row["name"] == "lraspp" and row["miou"] == pytest.approx(history[-1]["val_miou"], abs=1e-9)


def test_killed_before_the_first_save_the_run_resumes(scenes, tmp_path, monkeypatch):
    """A state is saved before the first step, and the best checkpoint without a newer state is the run's
    own."""
    def killed():
        raise RuntimeError("killed")
    argv = flags(data=scenes, **B0, out=tmp_path, epochs=2)
    with monkeypatch.context() as patch:
        at_step(patch, 4, killed)
        with pytest.raises(RuntimeError, match="killed"):
            train_teacher.main(argv)
    assert (tmp_path / "segformer-b0.pth").exists()
    _, history = train_teacher.main(argv)
    assert [r["step"] for r in history] == [3, 6]


def test_a_format_of_masks_named_later_is_the_same_run(scenes, tmp_path, capsys):
    argv = flags(data=scenes, **B0, out=tmp_path, steps=2)
    train_teacher.main(argv)
    train_teacher.main([*argv, "--masks", "ids"])
    assert "finished already" in capsys.readouterr().out


def test_damaged_records_of_a_run(scenes, tmp_path, fails):
    argv = flags(data=scenes, **B0, out=tmp_path, steps=2)
    train_teacher.main(argv)
    for content in ("[]", "3", "{", "null"):
        (tmp_path / "scan_train.json").write_text(content)
        train_teacher.main(argv)
    best, state = tmp_path / "segformer-b0.pth", tmp_path / "checkpoints" / "segformer-b0.pth"
    kept = best.read_bytes()
    best.unlink()
    fails(train_teacher.main, argv, "is gone", "--overwrite")
    best.write_bytes(kept)
    for content in ([1, 2], {"training": None}, {"a": torch.ones(1)}):
        torch.save(content, state)
        fails(train_teacher.main, argv, "checkpoints", "--overwrite")
    state.write_bytes(b"")
    fails(train_teacher.main, argv, "checkpoints", "--overwrite")


def test_unlabelled_images_resume_with_the_same_bits(trained, scenes, unlabelled, tmp_path, monkeypatch):
    how = {"unlabelled": unlabelled, "soft_weights": "balanced", "hard_weight": "constant",
           "teachers": trained[1][1], "cache_teachers": True, "epochs": 2}

    def argv(out):
        return flags(data=scenes, **B0, out=tmp_path / out, **how)
    whole, history = distill.main(argv("whole"))
    assert [r["step"] for r in history] == [6, 12]            # 12 pairs, 2 of them a step
    assert history[-1]["soft_unlabelled"] > 0
    with monkeypatch.context() as patch:
        at_step(patch, 8, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(train_teacher.Stopped):
            distill.main(argv("cut"))
    cut, records = distill.main(argv("cut"))
    assert states_equal(whole.state_dict(), cut.state_dict())
    assert [without_times(r) for r in history] == [without_times(r) for r in records]
    assert (tmp_path / "cut" / "teacher_cache.done").read_bytes() == b"\1" * 17      # maps of all images


@pytest.mark.parametrize("which, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_signal_saves_and_the_resumed_run_has_the_same_bits(which, status, amp, scenes, tmp_path, monkeypatch,
                                                            capsys):
    def argv(out):
        changes = {"out": tmp_path / out, "epochs": 3, "rare_class_sampling": True, "amp": amp}
        return flags(**{"data": scenes, **B0, **changes})
    whole, history = train_teacher.main(argv("whole"))
    with monkeypatch.context() as patch:
        at_step(patch, 4, lambda: os.kill(os.getpid(), which))
        with pytest.raises(SystemExit) as stop:
            data.run_command(train_teacher.main, argv("cut"))
    assert stop.value.code == status and "after step 5 of 9" in capsys.readouterr().err
    log = tmp_path / "cut" / "segformer-b0.jsonl"
    log.write_text(log.read_text() + '{"epoch": 2, "torn')
    resumed, records = train_teacher.main(argv("cut"))
    assert "resumes after step 5" in capsys.readouterr().out
    assert states_equal(whole.state_dict(), resumed.state_dict())
    assert [without_times(r) for r in history] == [without_times(r) for r in records]
    assert read_log(log)[1:] == records
    best = [torch.load(tmp_path / d / "segformer-b0.pth", weights_only=True) for d in ("whole", "cut")]
    assert states_equal(best[0]["model_state_dict"], best[1]["model_state_dict"])
    assert best[0]["epoch"] == best[1]["epoch"]


def test_signal_during_validation_stops_before_the_epoch_is_recorded(scenes, tmp_path, monkeypatch, capsys):
    argv = flags(data=scenes, **B0, out=tmp_path, epochs=2)
    once, calls = evaluate.confusion_matrix, []

    def confusion_matrix(*args):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return once(*args)
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "confusion_matrix", confusion_matrix)
        with pytest.raises(train_teacher.Stopped) as stop:
            train_teacher.main(argv)
    assert stop.value.status == 143 and len(calls) == 2
    assert len(read_log(tmp_path / "segformer-b0.jsonl")) == 1
    _, history = train_teacher.main(argv)
    assert [r["step"] for r in history] == [3, 6] and history[0]["val_miou"] is not None
    # nothing was trained between
    assert history[0]["images_per_s"] is None and "epoch 1, step 3" in capsys.readouterr().out


def test_signal_after_the_last_validation_ends_the_command_and_keeps_the_result(scenes, tmp_path, monkeypatch,
                                                                                capsys):
    argv = flags(data=scenes, **B0, out=tmp_path, steps=2)
    once = train_teacher.report

    def report(*args):
        os.kill(os.getpid(), signal.SIGINT)
        once(*args)
    with monkeypatch.context() as patch:
        patch.setattr(train_teacher, "report", report)
        with pytest.raises(SystemExit) as stop:
            data.run_command(train_teacher.main, argv)
    assert stop.value.code == 130 and "stopped, after it had finished" in capsys.readouterr().err
    train_teacher.main(argv)
    assert "finished already" in capsys.readouterr().out


def test_handlers_are_put_back_and_not_touched_in_threads(scenes, tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    common, result = {"data": scenes, **B0, "steps": 2}, []

    def run():
        result.append(train_teacher.main(flags(out=tmp_path / "thread", **common)))
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    train_teacher.main(flags(out=tmp_path / "main", **common))
    assert len(result) == 1 and (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize("other", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_remembered_and_a_second_of_either_kind_would_end_the_process(other):
    before = signal.getsignal(other)
    with train_teacher.Signals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.number == signal.SIGINT and signal.getsignal(other) is signal.SIG_DFL
    assert signal.getsignal(other) is before


def test_ten_bad_gradients_in_a_row_stop_the_run_and_keep_the_state(scenes, tmp_path, monkeypatch, fails):
    once, calls = train_teacher.hard_loss, []

    def loss(z, *args):
        if z.requires_grad:                                   # in training, not in validation
            calls.append(1)
        return once(z, *args) * (float("nan") if len(calls) > 5 else 1)
    monkeypatch.setattr(train_teacher, "hard_loss", loss)
    argv = flags(data=scenes, **B0, out=tmp_path, epochs=20, save_minutes=0)
    line = fails(train_teacher.main, argv, "not finite", "step 20", "hard nan", "scene00", "--lr", status=1)
    assert line.count("scene00") == 4 and len(calls) == 20
    assert all(v.isfinite().all() for v in weights_of(tmp_path / "checkpoints" / "segformer-b0.pth").values())


def test_signal_while_a_file_is_decoded_is_no_damaged_file(scenes, tmp_path, monkeypatch):
    argv = flags(data=scenes, **B0, out=tmp_path, epochs=2)
    once = Image.Image.convert

    def convert(image, *args):
        if sys._getframe(1).f_code.co_name == "read_image" and validating:
            os.kill(os.getpid(), signal.SIGTERM)
        return once(image, *args)
    validating: list = []
    validate = train_teacher.validate
    monkeypatch.setattr(Image.Image, "convert", convert)
    monkeypatch.setattr(train_teacher, "validate", lambda *a: validating.append(1) or validate(*a))
    with pytest.raises(train_teacher.Stopped) as stop:
        train_teacher.main(argv)
    assert stop.value.status == 143 and validating == [1]


def test_an_epoch_without_a_finite_gradient_fails(scenes, tmp_path, monkeypatch, fails):
    once = train_teacher.hard_loss
    monkeypatch.setattr(train_teacher, "hard_loss", lambda *a: once(*a) * float("nan"))
    argv = flags(data=scenes, **B0, out=tmp_path, steps=2)
    fails(train_teacher.main, argv, "none of the 2 gradients", "--lr", status=1)
    assert not (tmp_path / "segformer-b0.pth").exists()


def test_out_of_memory_is_one_line(scenes, tmp_path, monkeypatch, fails):
    def loss(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(train_teacher, "hard_loss", loss)
    argv = flags(data=scenes, **B0, out=tmp_path)
    fails(train_teacher.main, argv, "--batch-size 4", "--accumulate", "--size 64", status=1)


def test_full_disk_leaves_the_old_file(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "a.pth"
    models.save_model(path, nn.Linear(2, 2), "deeplab", data.DESERT)
    old = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(data.RunError, match="cannot be written") as error:
            models.save_model(path, nn.Linear(500, 500), "deeplab", data.DESERT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.status == 1 and path.read_bytes() == old and list(tmp_path.iterdir()) == [path]


# ------------------------------------------------------------ evaluation
def test_evaluate_writes_the_table_json_and_images(trained, scenes, tmp_path, capsys):
    out, teachers, *_ = trained
    argv = flags(*teachers, out / "best_student.pth", data=scenes, out=tmp_path, ensemble=True,
                 tta="flip,1.5", teacher_weights="2:1", json=tmp_path / "scores.json", save_worst=2, **PLAIN)
    rows = evaluate.main(argv)
    said = capsys.readouterr().out
    plain = ["deep_lab", "segformer-b0", "best_student", "ensemble"]
    names = [name + end for name in plain for end in ("", " + tta")]
    assert [row["name"] for row in rows] == names
    assert all(word in said for word in ("GMACs", "agreement", "<50 ms", "512x512", "threads", *names))
    content = json.loads((tmp_path / "scores.json").read_text())
    keys = {"name", "params", "gmacs", "miou", "miou_present", "miou_union", "pixel_accuracy", "iou", "ms",
            "fps", "size", "interval", "difference"}
    assert keys <= content["models"][0].keys()
    assert rows[6]["agreement"] == 1 and rows[6]["to_ensemble"] == 0 and 0 < rows[0]["agreement"] < 1
    student = models.optimize_for_inference(models.load_model(out / "best_student.pth")[0])
    forwards = [evaluate.count_gmacs(student, side) for side in (512, 768)]
    assert (rows[4]["gmacs"], rows[5]["gmacs"]) == (forwards[0], 2 * sum(forwards))
    assert rows[7]["gmacs"] == pytest.approx(rows[1]["gmacs"] + rows[3]["gmacs"])
    assert rows[0]["difference"] == [0, 0] and rows[0]["interval"][0] <= rows[0]["miou_present"] + 0.05
    assert (tmp_path / "miou.png").exists() and "to the first, 95 %" in said
    charts = {f"confusion_{name.replace(' + ', '_')}.png" for name in names}
    assert {p.name for p in tmp_path.glob("confusion_*.png")} == charts
    assert len(list((tmp_path / "worst_best_student").glob("*.png"))) == 2
    members = [models.load_model(teacher)[0] for teacher in teachers]
    ensemble = models.Ensemble(members, torch.tensor([2.0, 1.0])).eval()
    confusion = evaluate.evaluate(ensemble, data.Split(scenes, "val", data.DESERT), 64)
    assert rows[6]["miou"] == pytest.approx(evaluate.compute_scores(confusion, data.DESERT)["miou"], abs=2e-3)
    last = read_log(out / "best_student.jsonl")[-1]
    assert rows[4]["iou"] == last["val_iou"]                  # the log's own figures, to the bit


def test_ensemble_sees_one_size_whatever_its_members_were_trained_at(trained, scenes, tmp_path):
    first, second = trained[1]
    content = torch.load(second, weights_only=True)
    torch.save({**content, "size": 96}, tmp_path / "other.pth")
    common = {"data": scenes, "ensemble": True, "out": tmp_path, **PLAIN}
    alike = evaluate.main(flags(first, second, **common))
    mixed = evaluate.main(flags(first, tmp_path / "other.pth", **common))
    assert mixed[2]["iou"] == alike[2]["iou"] and mixed[1]["iou"] != alike[1]["iou"]
    assert mixed[0]["iou"] == alike[0]["iou"]


def test_a_checkpoint_named_ensemble_is_not_taken_for_it(trained, scenes, tmp_path):
    shutil.copy(trained[1][1], tmp_path / "ensemble.pth")
    common = {"data": scenes, "out": tmp_path, **PLAIN}
    rows = evaluate.main(flags(tmp_path / "ensemble.pth", **common))
    assert "agreement" not in rows[0]
    shutil.move(tmp_path / "ensemble.pth", tmp_path / "Ensemble.pth")
    rows = evaluate.main(flags(trained[1][0], tmp_path / "Ensemble.pth", ensemble=True, **common))
    assert [row["name"] for row in rows] == ["deep_lab", "Ensemble", "ensemble"]
    assert rows[2]["agreement"] == 1 > rows[1]["agreement"]


def test_networks_whose_images_would_have_one_name_are_refused(trained, scenes, tmp_path, fails):
    """And none is written; two of one name in two folders are told apart."""
    for name in ("n.v1.pth", "n_v1.pth", "ensemble.pth"):
        shutil.copy(trained[1][1], tmp_path / name)
    common = {"data": scenes, "out": tmp_path / "o", **PLAIN}
    for a, b, ensemble in (("n.v1", "n_v1", None), ("n_v1", "n_v1", None), ("ensemble", "n_v1", True)):
        argv = flags(tmp_path / f"{a}.pth", tmp_path / f"{b}.pth", ensemble=ensemble, **common)
        fails(evaluate.main, argv, "confusion_", "rename")
        assert not list((tmp_path / "o").glob("*.png"))
    shutil.copy(trained[1][0], tmp_path / "o" / "n_v1.pth")
    paths = [tmp_path / "n_v1.pth", tmp_path / "o" / "n_v1.pth"]
    assert [row["name"] for row in evaluate.main(flags(*paths, **common))] == [str(path) for path in paths]


def test_an_image_without_labels_is_not_among_the_worst(trained, copy_of, tmp_path):
    path = min((copy_of / "val" / "Segmentation").iterdir())
    Image.fromarray(np.full_like(np.asarray(Image.open(path)), 255)).save(path)
    evaluate.main(flags(trained[0] / "best_student.pth", data=copy_of, out=tmp_path, workers=0, save_worst=4))
    sheets = list((tmp_path / "worst_best_student").iterdir())
    assert len(sheets) == 3 and not any(path.stem in sheet.name for sheet in sheets)


def test_absent_class_is_na(trained, tmp_path, copy_of, capsys):
    for path in (copy_of / "val" / "Segmentation").iterdir():
        mask = np.asarray(Image.open(path)).copy()
        mask[mask == 700] = 7100
        Image.fromarray(mask).save(path)
    shutil.move(copy_of / "val", tmp_path / "flat")
    argv = flags(trained[0] / "best_student.pth", data=tmp_path / "flat", split=".", out=tmp_path, workers=0)
    rows = evaluate.main(argv)
    assert rows[0]["iou"]["Logs"] is None
    assert rows[0]["miou_present"] == pytest.approx(rows[0]["miou"] * 10 / 9)
    assert "n/a" in next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Logs"))


# ------------------------------------------------------------ another class table
def street(root):
    """Flags of an eleven-class set with 8-bit class indices and names beyond ASCII."""
    table = [{"name": f"class {n}", "id": n, "color": [20 * n, 255 - 20 * n, 90]} for n in range(11)]
    (root / "classes.json").write_text(json.dumps(table))
    rng = np.random.default_rng(0)
    for name, count in (("train", 6), ("val", 2)):
        for part in ("Color_Images", "Segmentation"):
            (root / name / part).mkdir(parents=True)
        for n in range(count):
            labels = np.kron(rng.integers(0, 11, (4, 6)), np.ones((16, 16), int)).astype(np.uint8)
            colors = np.stack([20 * labels, 255 - 20 * labels, 0 * labels + 90], -1)
            Image.fromarray(colors).save(root / name / "Color_Images" / f"größe {n}.png")
            Image.fromarray(labels).save(root / name / "Segmentation" / f"größe {n}.png")
    return {"data": root, "classes": root / "classes.json"}


def test_another_class_table_from_end_to_end(tmp_path, trained, fails, capsys):
    own, out = street(tmp_path), tmp_path / "o"
    checkpoint = out / "segformer-b0.pth"
    student, _ = train_teacher.main(flags(**{**own, **B0, "out": out, "steps": 2, "batch_size": 2}))
    assert student.decode_head.classifier.out_channels == 11
    assert "class indices" not in capsys.readouterr().err
    rows = evaluate.main(flags(checkpoint, **own, out=out, workers=0))
    assert list(rows[0]["iou"]) == [f"class {n}" for n in range(11)]
    infer.main(flags(tmp_path / "val" / "Color_Images", checkpoint=checkpoint, out=tmp_path / "p"))
    assert (tmp_path / "p" / "größe 0_mask.png").exists()
    infer.main(flags(export=tmp_path / "hf", checkpoint=checkpoint))
    preprocessor = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert preprocessor["size"] == {"height": 64, "width": 96}                       # as in training
    argv = flags(**own, **B0, out=out, teachers=trained[1])
    fails(distill.main, argv, trained[1][0], "10 classes, the class table 11")


def test_a_network_of_another_class_table_is_refused_by_all(tmp_path, scenes, trained, fails):
    """As many classes, but one by another name; ids and colours of the same names are the user's to
    choose."""
    common = {"data": scenes, "classes": tmp_path / "c.json", "out": tmp_path / "o"}
    checkpoint, images = trained[1][1], scenes / "val" / "Color_Images"
    renamed = [{**c, "name": c["name"].replace("Logs", "Boats")} for c in data.DESERT]
    (tmp_path / "c.json").write_text(json.dumps(renamed))
    for main, argv in ((distill.main, flags(**B0, teachers=checkpoint)), (evaluate.main, [checkpoint]),
                       (infer.main, flags(images, checkpoint=checkpoint))):
        fails(main, [*argv, *flags(**common)], checkpoint, "class 6 is 'Logs', not 'Boats'", "--classes")
    recolored = [{**c, "color": [9, 9, c["id"] % 256]} for c in data.DESERT]
    (tmp_path / "c.json").write_text(json.dumps(recolored))
    infer.main(flags(next(images.iterdir()), checkpoint=checkpoint, **common))
    with Image.open(next((tmp_path / "o").glob("*_mask.png"))) as mask:
        assert mask.getpalette()[:6] == [9, 9, 100, 9, 9, 200]


# ------------------------------------------------------------ inference and the Hugging Face folder
@pytest.mark.parametrize("tta", [None, "flip", "flip,0.75,1.25"])
def test_labels_equal_evaluations_and_masks_hold_indices(tta, trained, scenes, tmp_path):
    checkpoint = trained[0] / "best_student.pth"
    images = scenes / "val" / "Color_Images"
    infer.main(flags(images, checkpoint=checkpoint, out=tmp_path, raw=True, tta=tta, size=128, device="cpu"))
    rows = evaluate.main(flags(checkpoint, data=scenes, out=tmp_path, workers=0, tta=tta, size=128,
                               device="cpu"))
    split, confusion = data.Split(scenes, "val", data.DESERT), torch.zeros(10, 10, dtype=torch.int64)
    raw_ids = np.array([c["id"] for c in data.DESERT])
    for n, (path, _) in enumerate(split.pairs):
        with Image.open(tmp_path / f"{path.stem}_mask.png") as image:
            pred = torch.from_numpy(np.array(image))
            assert image.mode == "P" and image.size == (192, 108)
            assert image.getpalette()[27:30] == data.DESERT[9]["color"]
        ids = np.asarray(Image.open(tmp_path / f"{path.stem}_ids.png"))
        assert np.array_equal(ids, raw_ids[pred.numpy()])
        assert Image.open(tmp_path / f"{path.stem}_overlay.png").size == (192, 108)
        confusion += evaluate.confusion_matrix(pred, torch.from_numpy(split.read(n)[1]), 10)
    assert evaluate.compute_scores(confusion, data.DESERT)["iou"] == rows[-1]["iou"]


@pytest.fixture
def one_image(tmp_path):
    path = tmp_path / "a.png"
    distill.draw_scene(1, 120, 80)[0].save(path)
    return path


@pytest.fixture(scope="session")
def untrained(tmp_path_factory):
    """Checkpoints of two SegFormers-B0 with random weights and a louder classifier, for size 64."""
    folder = tmp_path_factory.mktemp("untrained")
    for n in range(2):
        torch.manual_seed(n)
        model = models.build("segformer-b0", data.DESERT)
        with torch.no_grad():
            model.decode_head.classifier.weight.mul_(20)          # else nearly every pixel has one label
        models.save_model(folder / f"b0_{n}.pth", model, "segformer-b0", data.DESERT, size=64)
    return [folder / f"b0_{n}.pth" for n in range(2)]


def test_labels_of_several_checkpoints_are_those_of_evaluations_ensemble(untrained, scenes, tmp_path, fails):
    common = {"teacher_weights": "3:1", "out": tmp_path, "device": "cpu"}
    images = scenes / "val" / "Color_Images"
    infer.main(flags(images, checkpoint=untrained, **common))
    rows = evaluate.main(flags(*untrained, data=scenes, workers=0, ensemble=True, **common))
    split, confusion = data.Split(scenes, "val", data.DESERT), torch.zeros(10, 10, dtype=torch.int64)
    for n, (path, _) in enumerate(split.pairs):
        pred = torch.from_numpy(np.array(Image.open(tmp_path / f"{path.stem}_mask.png")))
        confusion += evaluate.confusion_matrix(pred, torch.from_numpy(split.read(n)[1]), 10)
    scored = evaluate.compute_scores(confusion, data.DESERT)
    assert scored["iou"] == rows[2]["iou"] != rows[0]["iou"]
    own = [{**entry, "name": entry["name"] + "s"} for entry in data.DESERT]
    models.save_model(tmp_path / "own.pth", models.build("segformer-b0", own), "segformer-b0", own)
    argv = flags(images, checkpoint=[untrained[0], tmp_path / "own.pth"])
    fails(infer.main, argv, "own.pth", "another class table")


def test_confidence_is_the_largest_probability(untrained, one_image, tmp_path):
    infer.main(flags(one_image, checkpoint=untrained[0], out=tmp_path, confidence=True, **EXACT))
    model, _ = models.load_model(untrained[0])
    image = data.eval_image(data.read_image(one_image), 64)
    with torch.no_grad():
        z = models.optimize_for_inference(model)(data.normalize(image))
    z = F.interpolate(z, (80, 120), mode="bilinear", align_corners=False)[0].double()
    probs = z.exp() / z.exp().sum(0)                          # (10, 80, 120)
    with Image.open(tmp_path / "a_confidence.png") as grey:
        assert grey.mode == "L" and grey.size == (120, 80)
        error = torch.from_numpy(np.array(grey)).double() - 255 * probs.amax(0)
    assert error.abs().max() < 0.501 and probs.amax(0).max() - probs.amax(0).min() > 0.1


@pytest.mark.parametrize("width, height", [(64, 64), (160, 97), (65, 333)])
def test_windows_of_a_network_that_sees_single_cells_give_the_plain_logits(width, height):
    """One that averages cells of 4x4 pixels: in windows or not, the logits at an image's own scale are the
    same. Those that only count: each cell holds the mean of the windows' numbers."""
    image = distill.draw_scene(0, width, height)[0]
    model = nn.Sequential(nn.AvgPool2d(4), nn.Conv2d(3, 2, 1))
    sides = [4 * math.ceil(side / 4) for side in (width, height)]
    plain = models.compute_logits(model, data.resized_image(image, *sides))
    for tta in (None, ([1], True)):
        z = infer.tiled_logits(image, lambda crop, tta=tta: infer.image_logits(crop, model, 64, tta=tta), 64)
        assert z.shape == plain.shape and torch.allclose(z, plain, atol=1e-5)
    numbers = itertools.count()
    z = infer.tiled_logits(image, lambda crop: torch.full((1, 1, 16, 16), float(next(numbers))), 64)[0, 0]
    if (width, height) == (160, 97):                          # windows at 0, 48, 96 and at 0, 36
        assert [z[0, n].item() for n in (0, 11, 12, 15, 16, 24, 28, 39)] == [0, 0, .5, .5, 1, 1.5, 2, 2]
        assert z[9, 12].item() == (0 + 1 + 3 + 4) / 4 and z[24, 39].item() == 5


def test_tile_takes_the_plain_path_where_nothing_would_shrink_and_windows_elsewhere(untrained, tmp_path):
    image = distill.draw_scene(0, 200, 150)[0]
    for name, sides in (("small", (60, 48)), ("equal", (64, 64)), ("long", (200, 64)), ("large", (200, 150))):
        image.resize(sides).save(tmp_path / f"{name}.png")
    argv = flags(*sorted(tmp_path.glob("*.png")), checkpoint=untrained[0], **EXACT)
    for out, tile in (("plain", None), ("tiled", True)):
        infer.main([*argv, *flags(out=tmp_path / out, tile=tile)])
    masks = {}
    for path in sorted(tmp_path.glob("*/*_mask.png")):
        masks[path.parent.name, path.stem.removesuffix("_mask")] = np.array(Image.open(path))
    for name in ("small", "equal", "long"):
        assert np.array_equal(masks["plain", name], masks["tiled", name])
    assert masks["tiled", "large"].shape == (150, 200)
    assert not np.array_equal(masks["plain", "large"], masks["tiled", "large"])


def stream(argv, frames, capfdbinary, monkeypatch):
    """(stdout as uint8, stderr) of infer.py with --stream 120x80 and `frames` as its stdin."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(frames)))
    capfdbinary.readouterr()
    infer.main([*argv, *flags(stream="120x80", **EXACT)])
    out, err = capfdbinary.readouterr()
    return np.frombuffer(out, np.uint8), err.decode()


def test_a_stream_gives_the_labels_of_files(untrained, one_image, tmp_path, capfdbinary, monkeypatch):
    argv = flags(checkpoint=untrained[0])
    infer.main([str(one_image), *argv, *flags(out=tmp_path, **EXACT)])
    mask, image = np.array(Image.open(tmp_path / "a_mask.png")), data.read_image(one_image)
    assert len(np.unique(mask)) > 1
    for smooth in (None, 0.6):                                # the first frame as it is
        extra = flags(raw_labels=True, smooth=smooth)
        out, err = stream([*argv, *extra], image.tobytes(), capfdbinary, monkeypatch)
        assert np.array_equal(out.reshape(80, 120), mask) and "1 frame(s)" in err
    out, err = stream(argv, image.tobytes() + bytes(5), capfdbinary, monkeypatch)
    assert np.array_equal(out.reshape(80, 120, 3), data.overlay(image, mask, data.DESERT, False))
    assert "torn" in err and "5 of 28800 bytes" in err and "1 frame(s)" in err and "at worst" in err
    out, err = stream(argv, b"", capfdbinary, monkeypatch)
    assert out.size == 0 and err.startswith("0 frame(s) labelled, 0 ms")


def test_smoothed_labels_by_hand(untrained, capfdbinary, monkeypatch):
    images = [distill.draw_scene(n, 120, 80)[0] for n in (1, 2)]
    model = models.optimize_for_inference(models.load_model(untrained[0])[0])
    with torch.no_grad():
        a, b = [model(data.normalize(data.eval_image(image, 64))).softmax(1) for image in images]
    mean = (0.6 * a + 0.4 * b).log()
    expected = F.interpolate(mean, (80, 120), mode="bilinear", align_corners=False).argmax(1)[0].numpy()
    frames = b"".join(image.tobytes() for image in images)
    argv = flags(checkpoint=untrained[0], raw_labels=True)
    out, _ = stream([*argv, "--smooth", "0.6"], frames, capfdbinary, monkeypatch)
    plain, _ = stream(argv, frames, capfdbinary, monkeypatch)
    assert np.array_equal(out.reshape(2, 80, 120)[1], expected)
    assert np.array_equal(out[:9600], plain[:9600]) and not np.array_equal(out, plain)


def test_a_stream_ends_cleanly_at_ctrl_c_and_where_its_reader_closes(untrained):
    """In real pipes: each frame is out before the next is in."""
    argv = flags(HERE / "infer.py", checkpoint=untrained[0], stream="32x32", raw_labels=True, **EXACT)
    how = {"stdin": subprocess.PIPE, "text": False, "env": {**os.environ, "OMP_NUM_THREADS": "1"},
           # a shell's background jobs ignore Ctrl-C, and so would the child
           "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    for end in ("ctrl-c", "closed"):
        with start_child(*argv, **how) as child:
            alarm = threading.Timer(120, child.kill)
            alarm.start()
            for _ in range(2):
                child.stdin.write(bytes(3072))
                child.stdin.flush()
                assert len(child.stdout.read(1024)) == 1024
            if end == "ctrl-c":
                child.send_signal(signal.SIGINT)
            else:
                child.stdout.close()
                child.stdin.write(bytes(3072))
                child.stdin.flush()
            err = child.stderr.read().decode()
            alarm.cancel()
            assert child.wait(60) == (130 if end == "ctrl-c" else 0)
        assert re.search(r"[12] frame\(s\) labelled, ", err)  # the second may be out but not yet counted
        assert "Traceback" not in err and "Exception" not in err and "Broken" not in err


def test_a_closed_pipe_ends_a_command_without_a_traceback():
    """As in `python data.py | head`: while it prints, and when all is still in the buffer at the end."""
    for text in ("'x' * 10 ** 6", "'x'"):
        script = f"import sys, data; sys.stdin.read(); data.run_command(lambda argv: print({text}))"
        with start_child("-c", script, stdin=subprocess.PIPE) as child:
            child.stdout.close()
            child.stdin.close()
            assert child.stderr.read() == "stopped: what read the output has closed it\n"
        assert child.returncode == 1


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="ffmpeg is not installed")
def test_a_stream_between_two_ffmpegs(untrained, tmp_path):
    for n in range(3):
        distill.draw_scene(n, 120, 80)[0].save(tmp_path / f"{n}.png")
    ffmpeg, raw = ["ffmpeg", "-v", "error"], ["-f", "rawvideo", "-pix_fmt", "rgb24"]
    middle = [sys.executable, HERE / "infer.py", *flags(checkpoint=untrained[0], stream="120x80", **EXACT)]
    last = [*ffmpeg, *raw, "-s", "120x80", "-i", "-", "-pix_fmt", "rgb24", "out_%d.png"]
    how = {"cwd": tmp_path, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with (subprocess.Popen([*ffmpeg, "-i", "%d.png", *raw, "-"], **how) as reader,
          subprocess.Popen(middle, stdin=reader.stdout, **how) as labeller,
          subprocess.Popen(last, stdin=labeller.stdout, **how) as writer):
        reader.stdout.close()                                 # so that one that ends early ends the others
        labeller.stdout.close()
        said = labeller.stderr.read().decode()
        assert [p.wait(300) for p in (reader, labeller, writer)] == [0, 0, 0]
    assert "3 frame(s) labelled" in said
    infer.main(flags(tmp_path / "2.png", checkpoint=untrained[0], out=tmp_path, **EXACT))
    assert Image.open(tmp_path / "out_3.png").tobytes() == Image.open(tmp_path / "2_overlay.png").tobytes()


def test_inputs_of_every_kind_and_bad_files_are_skipped(trained, tmp_path, capsys):
    image, _ = distill.draw_scene(1, 120, 80)
    (tmp_path / "in" / "sub").mkdir(parents=True)
    image.save(tmp_path / "in" / "a.png")
    image.convert("L").save(tmp_path / "in" / "b.tif")
    image.convert("RGBA").save(tmp_path / "in" / "c.webp")
    image.save(tmp_path / "in" / "sub" / "a.jpg")
    (tmp_path / "in" / "broken.png").write_text("no image")
    argv = flags(tmp_path / "in", tmp_path / "in" / "*" / "*.jpg", checkpoint=trained[0] / "best_student.pth",
                 device="cpu", out=tmp_path / "out")
    with pytest.raises(data.RunError, match="1 of 5 files"):
        infer.main(argv)
    said = capsys.readouterr().err
    assert "broken.png" in said and "labelling" not in said   # no rest of a progress bar
    masks = {p.name for p in (tmp_path / "out").glob("*_mask.png")}
    assert masks == {"a_mask.png", "b_mask.png", "c_mask.png", "a_2_mask.png"}


def test_an_input_is_never_overwritten(trained, one_image, tmp_path, fails):
    shutil.copy(one_image, tmp_path / "a_mask.png")
    old = (tmp_path / "a_mask.png").read_bytes()
    argv = flags(one_image, tmp_path / "a_mask.png", checkpoint=trained[0] / "best_student.pth", out=tmp_path)
    fails(infer.main, argv, "--out", "a_mask.png", "overwrite")
    assert (tmp_path / "a_mask.png").read_bytes() == old


def test_only_what_would_be_written_counts_as_overwritten(trained, one_image, tmp_path, capsys):
    inputs = [one_image, *(tmp_path / name for name in ("a_overlay.png", "a_ids.png"))]
    for path in inputs[1:]:
        shutil.copy(one_image, path)
    infer.main(flags(*inputs, checkpoint=trained[0] / "best_student.pth", out=tmp_path, no_overlay=True))
    assert "3 image(s)" in capsys.readouterr().out and (tmp_path / "a_ids_mask.png").exists()


def test_a_file_named_twice_is_labelled_once(trained, one_image, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    infer.main(flags("a.png", one_image, "*.png", checkpoint=trained[0] / "best_student.pth", out="o"))
    assert "1 image(s)" in capsys.readouterr().out


def test_hugging_face_export_touches_its_own_files_only_and_fails_in_one_line(trained, tmp_path, fails):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "mine.safetensors").write_text("")
    (tmp_path / "hf" / "mine.safetensors").chmod(0o600)
    checkpoint = trained[0] / "best_student.pth"
    infer.main(flags(checkpoint=checkpoint, export=tmp_path / "hf"))
    assert (tmp_path / "hf" / "mine.safetensors").stat().st_mode & 0o777 == 0o600
    (tmp_path / "no" / "model.safetensors").mkdir(parents=True)
    argv = flags(checkpoint=checkpoint, export=tmp_path / "no")
    fails(infer.main, argv, "--export", "cannot be written", status=1)


def test_hugging_face_folder_gives_the_same_labels(trained, tmp_path, scenes, fails):
    checkpoint = trained[0] / "best_student.pth"
    infer.main(flags(export=tmp_path / "hf", checkpoint=checkpoint, shape="512x896"))
    files = {p.name: p.stat().st_mode for p in (tmp_path / "hf").iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= set(files)
    assert len(set(files.values())) == 1
    model = transformers.AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "hf").eval()
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    assert list(model.config.id2label.values()) == [c["name"] for c in data.DESERT]
    image = data.read_image(next((scenes / "val" / "Color_Images").iterdir())).resize((896, 512))
    with torch.no_grad():
        z = model(**processor(image, return_tensors="pt")).logits
    ours = models.predict(models.load_model(checkpoint)[0], data.eval_image(image, 512), (512, 896))
    theirs = F.interpolate(z, (512, 896), mode="bilinear", align_corners=False).argmax(1)
    assert (ours.long() == theirs).float().mean() > 0.999
    segments = transformers.pipeline("image-segmentation", model=str(tmp_path / "hf"), device="cpu")(image)
    assert segments and {s["label"] for s in segments} <= {c["name"] for c in data.DESERT}
    fails(infer.main, flags(export=tmp_path / "d", checkpoint=trained[1][0]), "only SegFormer", ".onnx")
    infer.main(flags(export=tmp_path / "own", checkpoint=checkpoint))                # trained at 64: 128x64
    preprocessor = json.loads((tmp_path / "own" / "preprocessor_config.json").read_text())
    assert preprocessor["size"] == {"height": 64, "width": 128}


def test_the_card_of_a_hugging_face_folder_says_what_it_is_and_loads_it(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = trained[0] / "best_student.pth"
    infer.main(flags(export="hf", checkpoint=checkpoint, shape="64x96"))
    card = huggingface_hub.ModelCard.load("hf/README.md")
    front, meta = card.data.to_dict(), torch.load(checkpoint, weights_only=True)
    assert (front["library_name"], front["pipeline_tag"]) == ("transformers", "image-segmentation")
    assert "license" not in front and "segformer" in front["tags"]                   # it began at random
    assert f"mIoU {meta['val_miou']:.4f}, after epoch {meta['epoch']}." in card.text
    assert f"| 9 | Sky | 10000 | 130, 190, 240 | {meta['val_iou']['Sky']:.4f} |\n" in card.text
    assert card.text.count("\n| ") == 11 and "crops of 64x64 pixels" in card.text
    image = distill.draw_scene(1)[0].resize((96, 64))
    image.save("image.png")
    save = "for n, s in enumerate(segments): s['mask'].save(f'{n}.png'); print(s['label'])\n"
    Path("card.py").write_text(re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1] + save)
    labels = run_child("card.py", cwd=tmp_path).stdout.splitlines()
    ours = models.predict(models.load_model(checkpoint)[0], data.eval_image(image, 64), (64, 96))
    pred, names = np.full((64, 96), 255), data.class_names(data.DESERT)
    for n, label in enumerate(labels):
        pred[np.asarray(Image.open(f"{n}.png")) > 0] = names.index(label)
    assert (pred == ours[0].numpy()).mean() > 0.999
    infer.main(flags(export="hf", checkpoint=checkpoint, shape="96x96"))
    assert "images to 96x96" in Path("hf/README.md").read_text()
    Path("hf/README.md").write_text("mine")
    infer.main(flags(export="hf", checkpoint=checkpoint))
    assert Path("hf/README.md").read_text() == "mine"


def test_a_card_names_nvidias_licence_and_claims_no_scores_that_it_lacks():
    meta = {"arch": "segformer-b1", "classes": data.DESERT, "size": 512, "val_iou": {}}
    card = huggingface_hub.ModelCard(infer.model_card(meta, "me/desert", 512, 896))
    front = card.data.to_dict()
    assert (front["license"], front["license_name"]) == ("other", "nvidia-source-code-license")
    assert front["license_link"] == infer.NVIDIA_LICENCE and "non-commercial" in card.text
    assert "mIoU unknown, after epoch unknown." in card.text and "crops of unknown size" in card.text
    assert card.text.count("| unknown |\n") == 10


def test_push_uploads_what_was_written_and_fails_in_one_line(trained, tmp_path, monkeypatch, fails):
    calls, folder = [], tmp_path / "hf"

    class Api:
        def create_repo(self, name, exist_ok):
            calls.append((name, exist_ok))

        def upload_folder(self, repo_id, folder_path, allow_patterns):
            written = {path.name for path in folder.iterdir()}
            calls.append((repo_id, folder_path, written - set(allow_patterns)))
    monkeypatch.setattr(infer, "HfApi", Api)
    folder.mkdir()
    (folder / "secret.txt").write_text("")
    argv = flags(export=folder, checkpoint=trained[1][1], push="me/desert")
    infer.main(argv)
    assert calls == [("me/desert", True), ("me/desert", folder, {"secret.txt"})]
    assert "model='me/desert'" in (folder / "README.md").read_text()
    for error in (OSError("no way"), infer.HTTPError("no way")):
        def refuse(self, name, exist_ok, error=error):
            raise error
        monkeypatch.setattr(Api, "create_repo", refuse)
        fails(infer.main, argv, "--push me/desert", "no way", "hf auth login", status=1)
    assert len(calls) == 2


def test_missing_optional_packages_are_one_line(trained, tmp_path, monkeypatch, fails):
    def missing(name):
        raise ImportError(name=name)
    monkeypatch.setattr(infer.importlib, "import_module", missing)
    argv = flags(export=tmp_path / "a.onnx", checkpoint=trained[0] / "best_student.pth")
    fails(infer.main, argv, "onnx is not installed", "pip install onnx onnxscript onnxruntime")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------ the project itself
def test_data_is_found_here_or_under_kaggle_or_not_at_all(tmp_path, monkeypatch, fails):
    monkeypatch.chdir(tmp_path)
    line = fails(train_teacher.main, flags(**B0), data.ROOT_NAME, "--data", "--demo")
    assert "/kaggle/input" in line
    nested = tmp_path / "k" / data.ROOT_NAME / data.ROOT_NAME
    (nested / "train").mkdir(parents=True)
    once = data.Path
    monkeypatch.setattr(data, "Path", lambda p: once("k" if p == "/kaggle/input" else p))
    assert data.find_data() == nested.relative_to(tmp_path)
    (tmp_path / data.ROOT_NAME / "train").mkdir(parents=True)
    monkeypatch.setattr(Path, "rglob", lambda *a: pytest.fail("walked through every attached data set"))
    assert data.find_data() == Path(data.ROOT_NAME)


def test_nothing_happens_at_import_and_a_notebooks_argv_is_not_read(tmp_path):
    """Called from Python, main() raises: a notebook shows one line of its own, not "To exit: use 'quit'"."""
    code = ("import sys; sys.argv = ['kernel', '-f', 'x.json']\n"
            "import data, models, losses, evaluate, train_teacher, distill, infer\n"
            "try:\n    distill.main()\nexcept data.InputError as error:\n    print(error.status, error)")
    done = run_child("-c", code, cwd=tmp_path, env={"PYTHONPATH": str(HERE)})
    assert done.stdout.startswith("2 no data set") and done.stderr == ""
    assert not list(tmp_path.iterdir())


def test_progress_bars_are_the_notebooks_own():
    import tqdm.auto
    assert data.tqdm is tqdm.auto.tqdm


SCRIPTS = [data, train_teacher, distill, evaluate, infer]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_fits_and_every_flag_is_read(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "example: python" in text and len(text.splitlines()) <= 100
    source = "".join((HERE / f"{module.__name__}.py").read_text() for module in SCRIPTS)
    for flag in set(re.findall(r"--([a-zA-Z][\w-]*)", text)) - {"help", "nproc-per-node"}:
        name = flag.replace("-", "_")
        assert re.search(rf"args\.{name}\b", source) or flag in ("data", "demo", "overwrite"), flag


def test_help_says_each_default_that_the_parser_has(capsys):
    with pytest.raises(SystemExit):
        distill.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for action in distill.make_parser()._actions:
        if action.default not in (None, [], argparse.SUPPRESS) and action.default is not False:
            assert f"(default: {action.default})" in text, action.dest


def test_imports_go_one_way():
    order = ["data", "models", "losses", "evaluate", "train_teacher", "distill"]
    for n, name in enumerate(order):
        found = set(re.findall(r"^(?:from|import) (\w+)", (HERE / f"{name}.py").read_text(), re.MULTILINE))
        assert not found & {*order[n + 1:], "infer"}, name
    source = "".join((HERE / f"{name}.py").read_text() for name in [*order, "infer"])
    safe = re.findall(r"torch\.load\([^)]*weights_only=True\)", source)
    assert source.count("torch.load(") == len(safe) > 0


# ================================================================ C: bad input
def damage(part, change):
    """Applies change(path) to the first file of a part of the training split."""
    return lambda folder: change(min((folder / "train" / part).iterdir()))


def image(change):
    return damage("Color_Images", change)


def mask(change):
    return damage("Segmentation", change)


def convert(change):
    """Rewrites a mask file with other values."""
    return lambda path: Image.fromarray(change(np.asarray(Image.open(path)))).save(path)


def all_masks(change):
    def apply(folder):
        for path in (folder / "train" / "Segmentation").iterdir():
            convert(change)(path)
    return apply


def all_colors(change, but_one=False):
    def apply(folder):
        for path in sorted((folder / "train" / "Segmentation").iterdir())[but_one:]:
            in_colors(path)
            convert(lambda values: change(values).astype(np.uint8))(path)
    return apply


def empty(folder):
    for part in ("Color_Images", "Segmentation"):
        for path in (folder / "train" / part).iterdir():
            path.unlink()


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def blank(*size):
    return lambda path: Image.new("RGB", size).save(path)


def high_byte(values):
    return (values >> 8).astype(np.uint8)


def clip(values):
    return values.clip(0, 255).astype(np.uint8)


def turned(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(path).save(path.with_suffix(".jpg"), exif=exif)
    path.unlink()


def dangling(path):
    path.unlink()
    path.symlink_to("nowhere")


def four_bits(path):
    """A PNG of 192x108 in 4-bit greyscale, which Pillow reads times 17 and does not write."""
    def chunk(kind, content):
        length, checksum = struct.pack(">I", len(content)), struct.pack(">I", zlib.crc32(kind + content))
        return length + kind + content + checksum
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 192, 108, 4, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(108 * (b"\0" + 96 * b"\x12")))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b""))


BAD_DATA = {
    "empty split": (empty, ["holds no images"]),
    "no mask": (mask(Path.unlink), ["scene0000.png", "no partner", "Segmentation"]),
    "no image": (image(Path.unlink), ["scene0000.png", "no partner", "Color_Images"]),
    "zero bytes": (image(lambda p: p.write_bytes(b"")), ["scene0000.png", "cannot be read", "replace"]),
    "zero bytes mask": (mask(lambda p: p.write_bytes(b"")), ["scene0000.png", "cannot be read"]),
    "truncated image": (image(truncate), ["scene0000.png", "damaged image"]),
    "truncated mask": (mask(truncate), ["scene0000.png", "damaged mask"]),
    "text as png": (image(lambda p: p.write_text("hello")), ["scene0000.png", "cannot be read"]),
    "one rgb mask": (mask(blank(192, 108)), ["scene0001.png", "must not mix"]),
    "rgb masks of numbers": (all_masks(lambda m: np.dstack([m // 100, m // 100, m // 100]).astype(np.uint8)),
                             ["scene0000.png", "no colour", "--classes"]),
    "colours of a JPEG": (all_colors(lambda m: np.random.default_rng(0).integers(0, 256, (108, 192, 3))),
                          ["scene0000.png", "more than 100 colours", "JPEG"]),
    "one of ids among colours": (all_colors(lambda m: m, but_one=True), ["scene0000.png", "must not mix"]),
    "transparent mask": (mask(lambda p: Image.new("RGBA", (192, 108), (0, 0, 0, 9)).save(p)),
                         ["scene0000.png", "transparent"]),
    "grey mask with alpha": (mask(lambda p: Image.new("LA", (192, 108)).save(p)),
                             ["scene0000.png", "mode LA", "greyscale"]),
    "high byte": (all_masks(high_byte), ["high byte", "depth unchanged"]),
    "clipped": (all_masks(clip), ["clipped at 255", "depth unchanged"]),
    "modulo": (all_masks(lambda m: (m & 255).astype(np.uint8)), ["modulo 256", "depth unchanged"]),
    "one clipped": (mask(convert(clip)), ["scene0000.png", "clipped at 255"]),
    "mixture": (mask(convert(lambda m: data.lookup_table(data.DESERT, "ids")[m])),
                ["scene0000.png", "must not mix"]),
    "unknown ids only": (all_masks(lambda m: (m + 20000).astype(np.uint16)),
                         ["no class table entry", "--classes"]),
    "mask of another size": (mask(convert(lambda m: m[:100, :100])), ["scene0000.png", "100x100", "192x108"]),
    "turned by exif": (image(turned), ["scene0000", "EXIF", "108x192"]),
    "1x1 image": (image(blank(1, 1)), ["scene0000.png", "1x1"]),
    "1x5000 image": (image(blank(1, 5000)), ["scene0000.png", "1x5000"]),
    "aspect above 8": (image(blank(900, 100)), ["scene0000.png", "aspect"]),
    "two of one stem": (image(lambda p: shutil.copy(p, p.with_suffix(".bmp"))), ["scene0000", "same stem"]),
    "no folder": (lambda folder: shutil.rmtree(folder / "val"), ["val", "No such file"]),
    "dangling link": (image(dangling), ["scene0000.png", "No such file"]),
    "4-bit mask": (mask(four_bits), ["scene0000.png", "4 bits"]),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_one_line(case, copy_of, tmp_path, fails):
    change, words = BAD_DATA[case]
    change(copy_of)
    fails(train_teacher.main, flags(data=copy_of, **B0, out=tmp_path / "out"), *words)
    assert not list((tmp_path / "out").glob("*.pth"))


def kd(**named):
    return distill.main, flags(**named)


def teacher(**named):
    return train_teacher.main, flags(**named)


def scores(*positional, **named):
    return evaluate.main, flags(*positional, **named)


def labels(*positional, **named):
    return infer.main, flags(*positional, **named)


INT8 = {"export": "a.int8.onnx", "shape": "64x96", "checkpoint": "STUDENT", "data": "SCENES"}
BAD_FLAGS = {                                    # words in capitals stand for paths, see below
    "alpha too large": (kd(alpha="2:0"), ["--alpha 2:0", "0..1"]),
    "alpha nonsense": (kd(alpha="nonsense"), ["--alpha nonsense"]),
    "alpha of three": (kd(alpha="0:1:0"), ["--alpha 0:1:0"]),
    "alpha nan": (kd(alpha="nan"), ["--alpha nan"]),
    "T too large": (kd(T="1e200"), ["--T", "1e200"]),
    "kl too large": (kd(kl="1e300"), ["--kl"]),
    "weights that overflow": (kd(teacher_weights="1e308:1e308"), ["--teacher-weights 1e308:1e308"]),
    "T of 0": (kd(T="0"), ["--T", "0 is not at least 0.001"]),
    "negative T": (kd(T="-1"), ["--T", "-1"]),
    "weights of the wrong length": (kd(teacher_weights="1:1:1"), ["--teacher-weights 1:1:1", "2 numbers"]),
    "weights all zero": (kd(teacher_weights="0:0"), ["--teacher-weights 0:0"]),
    "weights negative": (kd(teacher_weights="2:-1"), ["--teacher-weights 2:-1", "negative"]),
    "weights nonsense": (kd(teacher_weights="a:b"), ["--teacher-weights a:b"]),
    "size": (kd(size=100), ["--size", "multiple of 32", "96"]),
    "size of 0": (teacher(size="0"), ["--size", "0"]),
    "batch of 0": (teacher(batch_size="0"), ["--batch-size", "at least 1"]),
    "batch above the split": (teacher(arch="segformer-b0", batch_size=99), ["--batch-size 99", "12"]),
    "batch of 1 for deeplab": (teacher(arch="deeplab", batch_size=1), ["--batch-size 1", "BatchNorm"]),
    "lr": (teacher(lr="-1"), ["--lr"]),
    "epochs": (teacher(epochs="1.5"), ["--epochs", "whole number"]),
    "seed": (teacher(seed="-3"), ["--seed"]),
    "abbreviated": (teacher(batch=4), ["--batch"]),
    "unknown architecture": (teacher(arch="unet"), ["--arch", "unet", "deeplab", "lraspp"]),
    "device": (teacher(device="tpu"), ["--device tpu", "not available"]),
    "no such data": (teacher(data="nowhere"), ["--data nowhere"]),
    "no such init": (teacher(init="nowhere.pth"), ["--init nowhere.pth", "no such file"]),
    "init teacher without one": (kd(init="teacher", teachers="DEEPLAB"),
                                 ["--init teacher", "no teacher is a SegFormer"]),
    "no teachers": (kd(), ["--teachers out/deep_lab.pth", "no such file"]),
    "cache and features": (kd(cache_teachers=True, feature=1, teachers="DEEPLAB"),
                           ["--cache-teachers", "--feature"]),
    "unlabelled nowhere": (kd(unlabelled="nowhere", teachers="DEEPLAB"),
                           ["--unlabelled nowhere", "no such folder"]),
    "unlabelled empty": (kd(unlabelled="FOLDER", teachers="DEEPLAB"), ["--unlabelled", "holds no images"]),
    "unlabelled alone": (kd(unlabelled="FOLDER", alpha=0), ["--unlabelled", "--alpha"]),
    "unlabelled share": (kd(unlabelled="FOLDER", unlabelled_share=1),
                         ["--unlabelled-share 1", "--batch-size 8"]),
    "no checkpoints": (scores("nowhere.pth"), ["nowhere.pth", "no such file"]),
    "ensemble of the wrong length": (scores("DEEPLAB", ensemble=True, teacher_weights="1:2"),
                                     ["--teacher-weights 1:2"]),
    "tta nonsense": (scores("DEEPLAB", tta="flop"), ["--tta", "list like flip,0.75,1.25", "flop"]),
    "tta too large": (labels("FOLDER", tta="flip,9"), ["--tta", "9 is not at least 0.25 and at most 4"]),
    "no such split": (scores("DEEPLAB", split="nowhere"), ["nowhere"]),
    "no such image": (labels("nowhere.png", checkpoint="DEEPLAB"), ["nowhere.png"]),
    "no image at all": (labels(), ["nothing to do"]),
    "export of an unknown kind": (labels(export="student.pth", checkpoint="STUDENT"),
                                  ["--export student.pth", ".onnx"]),
    "calibration without 8 bits": (labels(export="a.onnx", calibrate="FOLDER", checkpoint="STUDENT"),
                                   ["--calibrate", ".int8.onnx"]),
    "shape without an export": (labels("FOLDER", shape="64x96", checkpoint="STUDENT"),
                                ["--shape 64x96", "--export"]),
    "dynamic folder": (labels(export="hf", shape="dynamic", checkpoint="STUDENT"),
                       ["--shape dynamic", ".onnx"]),
    "outputs of a folder": (labels(export="hf", outputs="labels,confidence", checkpoint="STUDENT"),
                            ["--outputs labels,confidence", "--export FILE.onnx"]),
    "outputs of labels": (labels("FOLDER", outputs="labels,confidence", checkpoint="STUDENT"),
                          ["--outputs labels,confidence", "--export FILE.onnx"]),
    "input of a folder": (labels(export="hf", input="float", checkpoint="STUDENT"),
                          ["--input float", "--export FILE.onnx"]),
    "floats in 8 bits": (labels(**INT8, calibrate="SCENES", input="float"), ["--input float", "uint8"]),
    "opset of a folder": (labels(export="hf", opset=20, checkpoint="STUDENT"),
                          ["--opset 20", "--export FILE.onnx"]),
    "opset nonsense": (labels(export="a.onnx", opset=1), ["--opset", "1 is not at least 7"]),
    "push without a folder": (labels(export="a.onnx", push="me/desert"),
                              ["--push me/desert", "--export DIR"]),
    "push of labels": (labels("FOLDER", push="me/desert"), ["--push me/desert", "--export DIR"]),
    "push to no owner": (labels(export="hf", push="desert"), ["--push desert", "OWNER/NAME"]),
    "outputs nonsense": (labels(export="a.onnx", outputs="logits"), ["--outputs", "logits"]),
    "shape": (labels(export="a.onnx", shape="100x100", checkpoint="DEEPLAB"), ["--shape 100x100"]),
    "int8 with no such images": (labels(**INT8, calibrate="nowhere"), ["nowhere"]),
    "int8 with no such split": (labels(**INT8, calibrate="SCENES", split="zz"), ["zz"]),
    "name too long": (labels(300 * "a" + ".png", checkpoint="DEEPLAB"), ["aaa"]),
    "int8 without images": (labels(export="a.int8.onnx", checkpoint="DEEPLAB"), ["--calibrate"]),
    "an export of several": (labels(export="hf", checkpoint=["DEEPLAB", "STUDENT"]),
                             ["--export hf", "one --checkpoint"]),
    "a stream of images": (labels("a.png", stream="96x64"), ["--stream", "leave out images"]),
    "a stream of no size": (labels(stream="960"), ["--stream", "pair like 960x540"]),
    "smooth without a stream": (labels("a.png", smooth=0.6), ["--smooth", "--stream WxH"]),
    "smooth of 1": (labels(stream="96x64", smooth=1), ["--smooth", "at most 0.99"]),
    "images after --checkpoint": (labels(checkpoint=["DEEPLAB", "a.png"]), ["before --checkpoint"]),
    "images and an export": (labels("a.png", export="a.onnx", checkpoint="DEEPLAB"),
                             ["--export a.onnx", "a.png"]),
    "another class table": (labels("FOLDER", checkpoint="DEEPLAB", classes="OWN"),
                            ["10 classes, the class table 3", "--classes"]),
    "checkpoint is a folder": (labels("FOLDER", checkpoint="FOLDER"), ["is a folder"]),
    "nothing under --out": (scores(out="nowhere"), ["--out nowhere", "best_student.pth"]),
    "folder without images": (labels("FOLDER", checkpoint="DEEPLAB"), ["without images"]),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flag_is_one_line(case, scenes, trained, tmp_path, monkeypatch, fails):
    (main, argv), words = BAD_FLAGS[case]
    (tmp_path / "empty").mkdir()
    (tmp_path / "own.json").write_text(json.dumps(CLASSES[:3]))
    paths = {"OWN": "own.json", "DEEPLAB": trained[1][0], "STUDENT": str(trained[0] / "best_student.pth"),
             "FOLDER": str(tmp_path / "empty"), "SCENES": str(scenes)}
    argv = [paths.get(word, word) for word in argv]
    monkeypatch.chdir(tmp_path)
    extra = flags(data=scenes) if main is not infer.main and "--data" not in argv else []
    if main in (distill.main, train_teacher.main):
        extra += flags(init="random", size=64, out="out")
    fails(main, [*extra, *argv], *words)
    assert not list(tmp_path.glob("**/*.pth")) and not list(tmp_path.glob("*.onnx"))


CLASSES = [{"name": f"c{n}", "id": n, "color": [n, n, n]} for n in range(256)]
BAD_CLASSES = {
    "bad json": ("[{", ["not a readable JSON"]), "no list": ("{}", ["no list"]),
    "deep": (100_000 * "[", ["not a readable JSON"]), "one class": (CLASSES[:1], ["holds 1"]),
    "256 classes": (CLASSES, ["holds 256"]),
    "duplicate ids": ([CLASSES[0], {**CLASSES[1], "id": 0}], ["id 0 occurs twice"]),
    "duplicate names": ([CLASSES[0], {**CLASSES[1], "name": "c0"}], ["'c0' occurs twice"]),
    "missing keys": ([CLASSES[0], {"name": "a", "id": 3}], ["entry 1", "color"]),
    "two lines": ([CLASSES[0], {**CLASSES[1], "name": "a\nb"}], ["one line of text"]),
    "id out of range": ([CLASSES[0], {**CLASSES[1], "id": 70000}], ["70000"]),
    "bad colour": ([CLASSES[0], {**CLASSES[1], "color": "red"}], ["red"]),
}


@pytest.mark.parametrize("case", BAD_CLASSES)
def test_bad_class_table_is_one_line(case, scenes, tmp_path, fails):
    content, words = BAD_CLASSES[case]
    (tmp_path / "c.json").write_text(content if isinstance(content, str) else json.dumps(content))
    argv = flags(data=scenes, classes=tmp_path / "c.json", **B0, out=tmp_path / "o")
    fails(train_teacher.main, argv, "--classes", "c.json", *words)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickle_with_code_is_refused_without_running_it(tmp_path, scenes, fails):
    with open(tmp_path / "evil.pth", "wb") as file:
        pickle.dump({"model_state_dict": Payload(tmp_path / "ran")}, file)
    torch.save({"model_state_dict": Payload(tmp_path / "ran")}, tmp_path / "evil2.pth")
    path = next((scenes / "val" / "Color_Images").iterdir())
    for name in ("evil.pth", "evil2.pth"):
        fails(infer.main, flags(path, checkpoint=tmp_path / name), name, "not run")
    assert not (tmp_path / "ran").exists()


def test_bad_checkpoints_are_one_line(trained, tmp_path, scenes, fails):
    good = trained[0] / "best_student.pth"
    content = torch.load(good, weights_only=True)
    (tmp_path / "cut.pth").write_bytes(good.read_bytes()[:100_000])
    (tmp_path / "text.pth").write_text("hello")
    torch.save({"a": 1}, tmp_path / "dict.pth")
    changes = {"arch": "deeplab", "classes": data.DESERT[:5], "image_size": "x", "val_iou": [1], "size": -1,
               "mean": [0, 0, 0]}
    for name, changed in changes.items():
        torch.save({**content, name: changed}, tmp_path / f"{name}.pth")
    path = next((scenes / "val" / "Color_Images").iterdir())
    for name, word in (("cut.pth", "damaged"), ("text.pth", "no checkpoint"), ("dict.pth", "no state dict"),
                       ("arch.pth", "holds segformer-b1, not deeplab"), ("val_iou.pth", "val_iou is [1]"),
                       ("image_size.pth", "image_size is 'x'"),
                       ("classes.pth", "10 classes, the class table 5"),
                       ("size.pth", "size is -1"), ("mean.pth", "another normalization")):
        fails(infer.main, flags(path, checkpoint=tmp_path / name), name, word)
        fails(evaluate.main, flags(tmp_path / name, data=scenes), name, word)
    (tmp_path / "c.json").write_text(json.dumps(data.DESERT))
    argv = flags(tmp_path / "classes.pth", data=scenes, classes=tmp_path / "c.json")
    fails(evaluate.main, argv, "10 classes, the class table 5")


def test_missing_teachers_are_reported_before_all_pairs_are_read(tmp_path, scenes, fails):
    fails(distill.main, flags(data=scenes, **TINY, out=tmp_path), "deep_lab.pth", "no such file")
    assert not list(tmp_path.iterdir())


def test_image_above_pillows_limit_is_one_line(copy_of, tmp_path, monkeypatch, fails):
    argv = flags(data=copy_of, **B0, out=tmp_path / "o")
    for limit in (15_000, 5_000):                             # Pillow warns above it, and refuses twice it
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        fails(train_teacher.main, argv, "scene", "pixels", "Pillow's limit")


def test_dead_worker_is_one_line(scenes, tmp_path):
    code = ("import os, sys, data, train_teacher\n"
            "data.Split.crop = lambda *a: os._exit(1)\n"
            "data.run_command(train_teacher.main)")
    argv = flags(**{"data": scenes, **B0, "workers": 1, "out": tmp_path})
    done = run_child("-c", code, *argv, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.count("error: a data worker died") == 1


def test_unreadable_folder_is_one_line(scenes, tmp_path, monkeypatch, fails):
    once = Path.iterdir

    def iterdir(self):                                        # root may read everything, whatever its mode
        if self.name == "Segmentation":
            raise PermissionError(13, "Permission denied", str(self))
        return once(self)
    monkeypatch.setattr(Path, "iterdir", iterdir)
    argv = flags(data=scenes, **B0, out=tmp_path / "o")
    fails(train_teacher.main, argv, "Segmentation", "Permission denied")


def test_unusable_out_is_one_line(scenes, trained, tmp_path, fails):
    file, student = tmp_path / "file", trained[0] / "best_student.pth"
    file.write_text("")
    path = next((scenes / "val" / "Color_Images").iterdir())
    fails(infer.main, flags(path, checkpoint=student, out=file), "file", "cannot be written", status=1)
    fails(infer.main, flags(export=file, checkpoint=student), "is a file")
    fails(data.main, flags(data=scenes, out=file), "file", "cannot be written", status=1)
    fails(train_teacher.main, flags(data=scenes, **B0, out=file / "sub"), "--out", "choose another")


def test_names_with_spaces_and_letters_of_any_kind_work(copy_of, tmp_path):
    for part in ("Color_Images", "Segmentation"):
        for path in (copy_of / "train" / part).iterdir():
            path.rename(path.with_name(f"grüne Wüste {path.name}"))
    _, history = train_teacher.main(flags(data=copy_of, **B0, out=tmp_path / "aus gabe ü", steps=1))
    assert history and (tmp_path / "aus gabe ü" / "segformer-b0.pth").exists()


# ================================================================ D: slow
# ------------------------------------------------------------ killed processes and signals
# prints a line and sleeps a little at each save, validated image and step, so that kills hit all of them
SLOWED = """
import os, sys, time
import data, evaluate, train_teacher
def slow(name, call):
    def run(*a, **k):
        print(name, flush=True); time.sleep(0.03)
        return call(*a, **k)
    return run
os.replace = slow("SAVE", os.replace)
evaluate.confusion_matrix = slow("VALIDATION", evaluate.confusion_matrix)
train_teacher.normalize_weights = slow("STEP", train_teacher.normalize_weights)
import distill
distill.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_killed_at_random_moments_ends_with_the_same_bits(scenes, tmp_path, trained):
    rng = np.random.default_rng()
    print("seed", rng.bit_generator.seed_seq.entropy)

    def run(out, phase="NEVER", count=1):
        """Runs the script in a process of its own, killed soon after its n-th phase; True if it finished."""
        changes = {"amp": "fp16", "workers": 1, "out": tmp_path / out, "epochs": 4, "save_minutes": 0}
        argv = flags(**{"data": scenes, **B0, **changes, "teachers": trained[1], "cache_teachers": True})
        child = start_child("-c", SLOWED, *argv, stderr=subprocess.DEVNULL)
        if wait_for_line(child, phase, count, deadline=300):
            time.sleep(float(rng.uniform(0, 0.1)))
            child.kill()
        child.stdout.close()
        return child.wait() == 0
    assert run("whole")
    kills = [("STEP", 2), ("SAVE", 7), ("VALIDATION", 2), ("STEP", int(rng.integers(1, 4))),
             ("SAVE", int(rng.integers(2, 9))), ("VALIDATION", int(rng.integers(1, 5))),
             ("STEP", int(rng.integers(1, 3)))]
    finished = [run("cut", *kill) for kill in kills]
    assert not any(finished[:5])
    assert run("cut")
    for path in ("student_segformer-b0.pth", "checkpoints/student_segformer-b0.pth"):
        a, b = (torch.load(tmp_path / d / path, weights_only=True) for d in ("whole", "cut"))
        assert states_equal(a["model_state_dict"], b["model_state_dict"])
        assert a["epoch"] == b["epoch"] and a["val_iou"] == b["val_iou"]
    logs = []
    for out in ("whole", "cut"):
        logs.append([without_times(r) for r in read_log(tmp_path / out / "student_segformer-b0.jsonl")[1:]])
    assert logs[0] == logs[1] and [r["epoch"] for r in logs[0]] == [1, 2, 3, 4]


@pytest.mark.slow
def test_sigterm_to_the_whole_group_saves(scenes, tmp_path):
    """As a scheduler sends it: data workers get the signal too."""
    argv = flags(**{"data": scenes, **B0, "workers": 2, "epochs": 500, "eval_every": 500, "out": tmp_path})
    child = start_child(HERE / "train_teacher.py", *argv, start_new_session=True)
    assert wait_for_line(child, "epoch 2,")
    os.killpg(child.pid, signal.SIGTERM)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 143 and "Rerun the same command to resume" in said and "Traceback" not in said


@pytest.mark.slow
def test_second_ctrl_c_stops_at_once(scenes, tmp_path):
    code = ("import sys, time, train_teacher\nonce = train_teacher.normalize_weights\n"
            "def slow(*a):\n    print('STEP', flush=True); time.sleep(60); return once(*a)\n"
            "train_teacher.normalize_weights = slow; train_teacher.main(sys.argv[1:])")
    child = start_child("-c", code, *flags(data=scenes, **B0, out=tmp_path))
    assert wait_for_line(child, "STEP")
    child.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert child.poll() is None                               # it finishes the step first
    child.send_signal(signal.SIGINT)
    assert child.wait(5) == -signal.SIGINT


# ------------------------------------------------------------ several processes
def child_script(tmp_path, code):
    """A script that changes something before it runs the project's own."""
    path = tmp_path / "child.py"
    path.write_text(f"import sys; sys.path.insert(0, {str(HERE)!r})\n{code}")
    return path


@pytest.mark.slow
def test_torchrun_trains_and_validates_like_one_process(scenes, tmp_path, trained):
    settings = {"data": scenes, **B0, "batch_size": 2, "epochs": 2, "teachers": trained[1], "feature": 1}
    argv = flags(out=tmp_path, **settings)
    done = torchrun("distill.py", argv)
    assert done.stdout.count("2 process(es) = 4, ") == 1      # the whole batch, printed once
    log = read_log(tmp_path / "student_segformer-b0.jsonl")
    assert [r["epoch"] for r in log[1:]] == [1, 2] and log[0]["run"]["processes"] == 2
    assert log[-1]["step"] == 6                               # 12 pairs / (2 x 2)
    last = tmp_path / "checkpoints" / "student_segformer-b0.pth"
    rows = evaluate.main(flags(last, data=scenes, out=tmp_path, **PLAIN))
    assert rows[0]["iou"] == log[-1]["val_iou"] and rows[0]["pixel_accuracy"] == log[-1]["val_pixel_accuracy"]
    refused = torchrun("distill.py", [*argv, "--seed", "5"], check=False)
    assert refused.returncode != 0 and "--seed (was 0, now 5)" in refused.stderr


@pytest.mark.slow
def test_where_one_process_fails_the_others_end_without_a_message(scenes, tmp_path, trained):
    script = child_script(tmp_path, "import data, distill\n"
                          "distill.shutil.disk_usage = lambda folder: type('disk', (), {'free': 0})\n"
                          "data.run_command(distill.main)")
    settings = {"data": scenes, **B0, "batch_size": 2, "steps": 2, "teachers": trained[1],
                "cache_teachers": True}
    done = torchrun(script, flags(out=tmp_path / "o", **settings), check=False)
    assert done.returncode != 0 and done.stderr.count("error: ") == 1 and "0 MB are free" in done.stderr
    assert "gloo" not in done.stderr and 'distill.py", line' not in done.stderr


@pytest.mark.slow
def test_processes_agree_on_the_step_at_which_a_signal_to_one_stops_them(scenes, tmp_path):
    """SIGTERM to one of two processes only, then the same command again."""
    script = child_script(tmp_path, """
import itertools, os, signal, data, train_teacher
once, count = train_teacher.normalize_weights, itertools.count()
def normalize_weights(*a):
    if next(count) == 3 and os.environ["RANK"] == "1" and "STOP" in os.environ:
        os.kill(os.getpid(), signal.SIGTERM)
    return once(*a)
train_teacher.normalize_weights = normalize_weights
data.run_command(train_teacher.main)""")
    argv = flags(**{"data": scenes, **B0, "batch_size": 2, "epochs": 2, "out": tmp_path / "o"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STOP", "1")
        stopped = torchrun(script, argv, check=False)
    assert stopped.returncode != 0 and "stopped after step 4 of 6" in stopped.stderr
    resumed = torchrun(script, argv)
    assert resumed.stdout.count("resumes after step 4 of 6") == 1
    assert [r["step"] for r in read_log(tmp_path / "o" / "segformer-b0.jsonl")[1:]] == [3, 6]


def warning_filters_after_joining(rank, folder, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    before = list(warnings.filters)
    with train_teacher.join_processes("cpu") as world:
        world.barrier()                                       # neither leaves before the other has come
    (folder / str(rank)).write_text(str(list(warnings.filters) == before))


@pytest.mark.slow
def test_joining_processes_leaves_the_warning_filters_alone(tmp_path):
    torch.multiprocessing.spawn(warning_filters_after_joining, (tmp_path, free_port()), 2)
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["True", "True"]


# ------------------------------------------------------------ memory
@pytest.mark.slow
def test_host_memory_does_not_grow_with_the_number_of_images(tmp_path):
    """Anonymous memory of one process over 5,000 small pairs, after the first 1,000 and at the end."""
    for part in ("Color_Images", "Segmentation"):
        (tmp_path / "train" / part).mkdir(parents=True)
    image, labels = distill.draw_scene(0, 64, 48)
    for n in range(5000):
        image.save(tmp_path / "train" / "Color_Images" / f"{n}.bmp")
        Image.fromarray(labels).save(tmp_path / "train" / "Segmentation" / f"{n}.png")
    code = """
import sys, torch, data, distill, train_teacher
def anonymous_mib():
    return int(next(l for l in open('/proc/self/status') if l.startswith('RssAnon')).split()[1]) / 1024
split = data.Split(sys.argv[1], 'train', data.DESERT)
cache = distill.TeacherCache(sys.argv[1], {}, split, 64)
cache.open(train_teacher.World(0, 1, torch.device('cpu')))
batches = data.load(data.TrainDataset(split, 64, 0), data.BatchSampler(len(split), 10, 0, 0, 1000), 0, False)
for n, batch in enumerate(batches):
    cache.crops(data.augment_on_device(batch, torch.device('cpu')))
    if n in (100, 999): print(anonymous_mib())
"""
    done = run_child("-c", code, tmp_path, deadline=300)
    first, last = map(float, done.stdout.split())
    assert last - first < 30                                  # over two epochs


# ------------------------------------------------------------ ONNX
@pytest.mark.slow
@pytest.mark.parametrize("shape", ["96x160", "dynamic"])
def test_onnx_gives_torchs_labels(shape, trained, tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    target, checkpoint = tmp_path / "student.onnx", trained[0] / "best_student.pth"
    infer.main(flags(export=target, shape=shape, checkpoint=checkpoint))
    said = capsys.readouterr().out
    assert said.count("% of the labels equal") == (3 if shape == "dynamic" else 1)
    assert said.splitlines()[-1].startswith(f"{target}: ")
    # a session's idle threads must not slow what runs after it
    options = infer.onnx_session(target.read_bytes()).get_session_options()
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert options.intra_op_num_threads == torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(target), providers=["CPUExecutionProvider"])
    image = np.random.default_rng(0).integers(0, 256, (1, 3, 96, 160), dtype=np.uint8)
    pred = session.run(None, {"image": image})[0]
    ours = models.predict(models.load_model(checkpoint)[0], torch.from_numpy(image), (96, 160)).numpy()
    assert pred.dtype == np.uint8 and pred.shape == (1, 96, 160) and (pred == ours).mean() > 0.999


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["labels", "confidence"])
def test_an_onnx_file_unlike_torch_replaces_no_good_one(wrong, trained, tmp_path, monkeypatch, fails):
    pytest.importorskip("onnxscript")
    target, once = tmp_path / "a.onnx", infer.onnx_output
    target.write_bytes(b"good")

    def output(session, image, name):
        return once(session, image, name) + 3 * (name == wrong)
    monkeypatch.setattr(infer, "onnx_output", output)
    argv = flags(export=target, shape="64x96", checkpoint=trained[1][1], outputs="labels,confidence")
    fails(infer.main, argv, "a.onnx", f"its {wrong} differs from torch", status=1)
    assert target.read_bytes() == b"good" and list(tmp_path.iterdir()) == [target]


@pytest.mark.slow
def test_int8_onnx_is_a_quarter_of_the_size(trained, scenes, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    target, checkpoint = tmp_path / "new" / "student.int8.onnx", trained[0] / "best_student.pth"
    infer.main(flags(export=target, shape="96x160", checkpoint=checkpoint, data=scenes,
                     calibrate=scenes / "train" / "Color_Images", outputs="labels,confidence"))
    assert target.stat().st_size < 0.3 * checkpoint.stat().st_size
    assert list(target.parent.iterdir()) == [target]
    said = capsys.readouterr().out
    assert all(name in said for name in ("torch fp32", "onnx fp32", "onnx int8", "mIoU"))
    assert said.splitlines()[-1].startswith(f"{target}: ") and "fp32.onnx" not in said
    session = infer.onnx_session(target.read_bytes())
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["classes"]) == data.DESERT and facts["size"] == "96x160"
    image = torch.from_numpy(np.array(distill.draw_scene(1)[0].resize((160, 96)))).permute(2, 0, 1)[None]
    z = models.compute_logits(models.load_model(checkpoint)[0], image)
    apart = infer.onnx_output(session, image, "confidence").int() - infer.confidence(z, (96, 160)).int()
    assert apart.abs().float().mean() < 10                    # of 255: 8 bits shift logits a little


def export_b0(trained, tmp_path, **how):
    """(session, {key: text} of its metadata) of SegFormer-B0's ONNX file, as onnxruntime reads it."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    infer.main(flags(export=tmp_path / "b0.onnx", checkpoint=trained[1][1], **how))
    session = onnxruntime.InferenceSession(str(tmp_path / "b0.onnx"), providers=["CPUExecutionProvider"])
    return session, session.get_modelmeta().custom_metadata_map


@pytest.mark.parametrize("arch, args, theirs", [
    ("segformer-b1", {"init": "imagenet"}, True), ("segformer-b3", {"init": "nvidia/mit-b3"}, True),
    ("segformer-b1", None, True), ("segformer-b1", "damaged", True),
    ("segformer-b1", {"init": "a.pth"}, True), ("segformer-b1", {"init": "random"}, False),
    ("deeplab", {"init": "imagenet"}, False), ("lraspp", {"init": "imagenet"}, False)])
def test_nvidias_licence_is_named_unless_none_of_its_weights_can_be_in(arch, args, theirs):
    facts = infer.onnx_facts({"arch": arch, "classes": data.DESERT, "args": args}, "64x96", "uint8")
    assert ("non-commercial" in facts["licence"]) == theirs


@pytest.mark.slow
def test_an_onnx_file_says_what_it_is(trained, tmp_path):
    _, facts = export_b0(trained, tmp_path, shape="64x96")
    assert json.loads(facts["classes"]) == data.DESERT
    assert json.loads(facts["mean"]) == [0.485, 0.456, 0.406]
    assert json.loads(facts["std"]) == [0.229, 0.224, 0.225]
    assert facts["size"] == "64x96" and facts["arch"] == "segformer-b0" and "uint8" in facts["input"]
    assert "non-commercial" not in facts["licence"]           # it began at random


def probabilities(checkpoint, x):
    """Normalized (B, 3, H, W) -> (B, C, H, W) float64 probabilities by transformers' own SegFormer."""
    model = models.load_model(checkpoint)[0]
    stock = transformers.SegformerForSemanticSegmentation(model.config).eval()
    stock.load_state_dict(model.state_dict())
    with torch.no_grad():
        z = stock(x).logits.double()
    return F.interpolate(z, x.shape[2:], mode="bilinear", align_corners=False).softmax(1).numpy()


@pytest.mark.slow
def test_an_onnx_file_also_gives_the_labels_probabilities(trained, tmp_path):
    session, _ = export_b0(trained, tmp_path, shape="64x96", outputs="labels,confidence")
    image = np.array(distill.draw_scene(1)[0].resize((96, 64))).transpose(2, 0, 1)[None]
    pred, sure = session.run(["labels", "confidence"], {"image": image})
    probs = probabilities(trained[1][1], data.normalize(torch.from_numpy(image)))
    assert sure.dtype == np.uint8 and sure.shape == pred.shape == (1, 64, 96)
    assert (probs.argmax(1) == pred).mean() > 0.999
    assert np.abs(255 * probs.max(1) - sure).max() < 0.6      # rounded, and fp32 beside fp64
    assert len(np.unique(sure)) > 5


@pytest.mark.slow
def test_an_onnx_file_takes_floats_normalized_as_it_says(trained, tmp_path):
    session, facts = export_b0(trained, tmp_path, shape="64x96", input="float")
    taken, = session.get_inputs()
    assert (taken.name, taken.type, taken.shape) == ("image", "tensor(float)", [1, 3, 64, 96])
    image = np.asarray(distill.draw_scene(2)[0].resize((96, 64))) / 255
    image = (image - json.loads(facts["mean"])) / json.loads(facts["std"])           # (H, W, 3)
    image = image.transpose(2, 0, 1)[None].astype(np.float32)
    pred = session.run(["labels"], {"image": image})[0]
    assert (probabilities(trained[1][1], torch.from_numpy(image)).argmax(1) == pred).mean() > 0.999
    assert "float32" in facts["input"] and pred.dtype == np.uint8


@pytest.mark.slow
@pytest.mark.parametrize("opset", [17, 20])
def test_an_onnx_file_of_dynamic_shape_and_an_opset_takes_batches(opset, trained, tmp_path):
    onnx = pytest.importorskip("onnx")
    session, facts = export_b0(trained, tmp_path, shape="dynamic", opset=opset)
    opsets = {entry.domain: entry.version for entry in onnx.load(tmp_path / "b0.onnx").opset_import}
    assert opsets[""] == opset and facts["size"] == "dynamic"
    images = [np.asarray(distill.draw_scene(n)[0].resize((160, 96))).transpose(2, 0, 1) for n in range(3)]
    pred = session.run(None, {"image": np.stack(images)})[0]                         # (3, 96, 160)
    probs = probabilities(trained[1][1], data.normalize(torch.from_numpy(np.stack(images))))
    assert pred.shape == (3, 96, 160) and (probs.argmax(1) == pred).mean() > 0.999
    alone = session.run(None, {"image": images[1][None]})[0]
    assert (alone[0] == pred[1]).mean() > 0.999


@pytest.mark.slow
def test_an_opset_that_nothing_here_writes_is_one_line(trained, tmp_path, fails):
    pytest.importorskip("onnxscript")
    argv = flags(export=tmp_path / "a.onnx", shape="64x96", checkpoint=trained[1][1], opset=99)
    fails(infer.main, argv, "--opset 99", "leave it out")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_onnx_file_of_deeplab_takes_batches(trained, tmp_path, capsys):
    pytest.importorskip("onnxscript")
    infer.main(flags(export=tmp_path / "a.onnx", shape="dynamic", outputs="labels,confidence",
                     checkpoint=trained[1][0]))
    said = capsys.readouterr().out                            # the command's own comparison with torch
    assert said.count("% of the labels equal") == said.count("% of the confidence within 1") == 3
    assert "at 2x3x480x640" in said and (tmp_path / "a.onnx").exists()


@pytest.mark.slow
def test_onnx_and_int8_of_lraspp(scenes, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model, checkpoint = models.build("lraspp", data.DESERT).eval(), tmp_path / "lraspp.pth"
    model.load_state_dict(stock_lraspp(10).state_dict())
    image = data.eval_image(distill.draw_scene(1, 160, 96)[0], 96)                   # (1, 3, 96, 160)
    with torch.no_grad():                                     # else every pixel has one label
        z = model(data.normalize(image))
        model.classifier.high_classifier.bias -= z.mean((0, 2, 3))
    models.save_model(checkpoint, model, "lraspp", data.DESERT, size=64)
    infer.main(flags(export=tmp_path / "a.onnx", shape="dynamic", checkpoint=checkpoint))
    labels = infer.onnx_output(infer.onnx_session((tmp_path / "a.onnx").read_bytes()), image)
    ours = models.predict(models.load_model(checkpoint)[0], image, (96, 160))
    assert (labels == ours).float().mean() > 0.999 and len(ours.unique()) > 3
    infer.main(flags(export=tmp_path / "a.int8.onnx", shape="96x160", checkpoint=checkpoint, data=scenes,
                     calibrate=scenes / "train" / "Color_Images"))
    assert "onnx int8" in capsys.readouterr().out
    assert (tmp_path / "a.int8.onnx").stat().st_size < 0.4 * checkpoint.stat().st_size


# ------------------------------------------------------------ timing
def stock_segformer(arch):
    """transformers' own class, with random weights."""
    return transformers.SegformerForSemanticSegmentation(models.build(arch, data.DESERT).config)


@pytest.mark.slow
def test_faster_than_transformers_pipeline_and_stock_b3(trained, tmp_path, capsys):
    """From a 960x540 file to an index mask, in turn, at the same network input of 512x896; same labels."""
    checkpoint, path = trained[0] / "best_student.pth", tmp_path / "a.png"
    infer.main(flags(export=tmp_path / "hf", checkpoint=checkpoint, shape="512x896"))
    pipe = transformers.pipeline("image-segmentation", model=str(tmp_path / "hf"), device="cpu")
    distill.draw_scene(1)[0].save(path)
    ids = {c["name"]: n for n, c in enumerate(data.DESERT)}
    dtype = models.amp_dtype("auto", CPU)

    def fast(arch, model=None):
        return models.optimize_for_inference(model or models.build(arch, data.DESERT), dtype)
    student = fast("segformer-b1", models.load_model(checkpoint)[0])
    b3, deeplab = fast("segformer-b3"), fast("deeplab")
    in_fp32 = models.load_model(checkpoint)[0]
    stock = stock_segformer("segformer-b3").eval()
    x = data.normalize(data.eval_image(data.read_image(path), 512))

    def pipeline():
        pred = np.full((540, 960), 255, np.uint8)
        for segment in pipe(str(path)):
            pred[np.asarray(segment["mask"]) > 0] = ids[segment["label"]]
        return pred

    def file_to_labels(model, dtype):
        image = data.eval_image(data.read_image(path), 512)
        return models.predict(model, image, (540, 960), dtype)[0].numpy()

    def forward(model):
        with torch.no_grad(), models.autocast(CPU, dtype):
            return model(x)

    def stock_forward():
        with torch.no_grad():
            return stock(x).logits
    calls = {"pipeline": pipeline, "file to labels": lambda: file_to_labels(student, dtype),
             "stock B3": stock_forward, "student": lambda: forward(student),
             "B3 teacher": lambda: forward(b3), "DeepLab teacher": lambda: forward(deeplab)}
    times = dict(zip(calls, evaluate.time_interleaved(list(calls.values()), CPU, 4.0, 5), strict=True))
    agreement = [(pipeline() == file_to_labels(*how)).mean() for how in ((in_fp32, None), (student, dtype))]
    with capsys.disabled():
        print("\n" + ", ".join(f"{name} {ms:.0f} ms" for name, (ms, _, _) in times.items())
              + f", labels equal on {100 * agreement[0]:.2f} %, on {100 * agreement[1]:.2f} % as timed")
    assert min(agreement) >= 0.99
    lowest = {name: low for name, (_, low, _) in times.items()}                      # steadier than medians
    assert lowest["pipeline"] / lowest["file to labels"] >= 1.7
    assert lowest["stock B3"] / lowest["student"] >= 3


def usual_step(device, dtype, batch, class_weight):
    """The step of the notebook that this project replaces: torchvision's DeepLabV3 at output stride 8 and
    transformers' SegFormers as they come, fp32 off a GPU, every map of logits brought to full size."""
    deeplab = torchvision.models.segmentation.deeplabv3_resnet50(
        weights=None, weights_backbone=None, num_classes=10)
    deeplab, teacher = deeplab.to(device).eval(), stock_segformer("segformer-b3").to(device).eval()
    student = stock_segformer("segformer-b1").to(device).train()
    optimizer = torch.optim.AdamW(student.parameters(), 6e-5)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    dtype = dtype if device.type == "cuda" else None

    def full(z):
        return F.interpolate(z.float(), batch.target.shape[1:], mode="bilinear", align_corners=False)

    def step():
        with models.autocast(device, dtype):
            with torch.no_grad():
                z_t = 0.5 * full(deeplab(batch.image)["out"]) + 0.5 * full(teacher(batch.image).logits)
            z_s = full(student(batch.image).logits)
            kl = F.kl_div((z_s / 2).log_softmax(1), (z_t / 2).softmax(1), reduction="none").sum(1).mean() * 4
            loss = 0.5 * kl + 0.5 * F.cross_entropy(z_s, batch.target, class_weight, ignore_index=255)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.item()
    return step


def steps_of_fit(args, split, ask_teachers, folder, steps):
    """Milliseconds of single steps of fit(), without the first two: the time between two calls of
    prepare()."""
    shutil.rmtree(folder, ignore_errors=True)
    class_weight = data.class_weights(split.counts)
    prepare, starts = distill.make_prepare(args, ALONE, split, class_weight, ask_teachers), []

    def timed_prepare(batch):
        starts.append(time.perf_counter())
        return prepare(batch)
    args = argparse.Namespace(**{**vars(args), "out": folder, "steps": steps + 3})
    state = train_teacher.State("bench", args, ALONE, split, split)
    model = models.build("segformer-b1", data.DESERT)
    loss_fn = distill.make_loss(args)
    train_teacher.fit(model, state, timed_prepare, loss_fn, split, split, class_weight, args, ALONE)
    return [1000 * (b - a) for a, b in itertools.pairwise(starts)][2:]


def bench(folder, size, batch_size, rounds):
    """Prints what each piece of a training step costs here, timed in turn, and the ratios that matter."""
    distill.write_scenes(folder / "data", train=batch_size * 12, val=1)
    split = data.Split(folder / "data", "train", data.DESERT)
    args = distill.make_parser().parse_args(flags(init="random", size=size, batch_size=batch_size, workers=0,
                                                  device="cpu", eval_every=1000, epochs=1000))
    dtype, rng = models.amp_dtype("auto", CPU), np.random.default_rng(0)
    raw = data.collate([data.TrainDataset(split, size, 0)[0, n, n] for n in range(batch_size)])
    batch, class_weight = data.augment_on_device(raw, CPU), data.class_weights(split.counts)
    teachers = {}
    for arch in ("deeplab", "segformer-b3"):
        teachers[arch] = models.optimize_for_inference(models.build(arch, data.DESERT), dtype)
    ensemble = models.Ensemble(list(teachers.values()), torch.ones(2))
    cache = distill.TeacherCache(folder, {"bench": 0}, split, size)
    cache.build(ensemble, ALONE, dtype, 0)
    pair, crop = split.pairs[0], split.crop

    def forward(model):
        with torch.no_grad(), models.autocast(CPU, dtype):
            return model(batch.image)
    student, z_t = models.build("segformer-b1", data.DESERT), forward(ensemble)
    optimizer = torch.optim.AdamW(student.parameters(), 6e-5, fused=True)

    def bare_student():
        with models.autocast(CPU, dtype):
            z = student(batch.image)
            loss = 0.5 * soft(z, z_t, batch.target, 2.0)[0] + 0.5 * hard(z, batch.target, class_weight)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    calls = {"usual step": usual_step(CPU, dtype, batch, class_weight), "bare student": bare_student,
             "bare deeplab": lambda: forward(teachers["deeplab"]),
             "bare segformer-b3": lambda: forward(teachers["segformer-b3"]),
             "decode a pair": lambda: (data.read_image(pair[0]), data.read_mask(pair[1])),
             "decode and augment": lambda: crop(0, size, data.random_affine(rng, *split.sizes[0], size))}
    variants = {"step, teachers online": lambda b: (forward_on(ensemble, b.image, dtype), []),
                "step, teachers cached": lambda b: (cache.crops(b), []), "step, student alone": None}
    ready = crop(0, size, data.random_affine(rng, *split.sizes[0], size))
    times: dict = {name: [] for name in (*calls, *variants)}
    for _ in range(rounds):
        for name, call in calls.items():
            repeats = 20 if name.startswith("decode") else 2
            times[name] += [low for _, low, _ in evaluate.time_interleaved([call] * repeats, CPU, 0, 1)]
        split.crop = lambda *a: ready                         # so that the loop never waits for a file
        for name, ask_teachers in variants.items():
            times[name] += steps_of_fit(args, split, ask_teachers, folder / "run", 3)
        del split.crop
    ms = {name: statistics.median(values) for name, values in times.items()}
    bare = sum(ms[name] for name in ms if name.startswith("bare"))
    online, cached, alone = (ms[name] for name in variants)
    ratios = {"usual / online": (ms["usual step"] / online, ">= 3.5"),
              "usual / cached": (ms["usual step"] / cached, ">= 9"),
              "online / bare pieces": (online / bare, "<= 1.05"),
              "cached / alone": (cached / alone, "<= 1.25"),
              "augmentation, ms a pair": (ms["decode and augment"] - ms["decode a pair"], "<= 8")}
    device = models.describe_device(CPU, dtype)
    print(f"\n{device}, {batch_size} crops of {size}x{size}, torch {torch.__version__}\n")
    lines = [["piece", "median ms", "lowest", "highest"]]
    for name, values in times.items():
        lines.append([name, *(f"{value:.1f}" for value in (ms[name], min(values), max(values)))])
    evaluate.print_columns(lines)
    lines = [[name, f"{value:.2f}", aim] for name, (value, aim) in ratios.items()]
    evaluate.print_columns([["ratio", "here", "aim"], *lines])
    print(f"peak memory of the process: {train_teacher.peak_memory(CPU) / 1024:.2f} GiB")
    return ms, {name: value for name, (value, _) in ratios.items()}


def forward_on(model, x, dtype):
    with torch.no_grad(), models.autocast(CPU, dtype):
        return model(x)


@pytest.mark.slow
@pytest.mark.parametrize("size, batch_size", [(256, 4), (512, 1)])
def test_bench(size, batch_size, tmp_path):
    ms, ratios = bench(tmp_path, size, batch_size, rounds=2)
    assert all(value > 0 for value in ms.values())
    assert ratios["usual / cached"] > ratios["usual / online"] > 2                   # on a noisy machine


# ------------------------------------------------------------ real pairs
@real
def test_real_pairs_are_what_the_results_say():
    for name, count in (("train", 203), ("val", 33)):
        found = data.Split(REAL, name, data.DESERT)
        assert len(found) == count and found.label_format == "ids" and not found.unknown
        assert (found.counts.sum(0) > 0).all()
        assert set(found.sizes) == {(960, 540)} and int(found.counts.sum()) == count * 960 * 540


@real
@pytest.mark.slow
def test_real_pairs_train_and_score(tmp_path):
    argv = flags(**{"data": REAL, **B0, "batch_size": 8, "out": tmp_path, "steps": 40})
    _, history = train_teacher.main(argv)
    assert history[-1]["val_iou"]["Sky"] > 0.6 and history[-1]["loss"] < history[0]["loss"]


@real
@pytest.mark.slow
def test_real_images_through_every_script(tmp_path):
    """DeepLab, SegFormer-B0 and a cached B1 for a few steps, their table with the ensemble, labels, an
    export."""
    out, common = tmp_path / "out", {"data": REAL, **TINY, "steps": 20, "out": tmp_path / "out"}
    train_teacher.main(flags(arch="deeplab", **common))
    train_teacher.main(flags(arch="segformer-b0", **common))
    teachers, student = [out / "deep_lab.pth", out / "segformer-b0.pth"], out / "best_student.pth"
    _, history = distill.main(flags(teachers=teachers, cache_teachers=True, **common))
    assert history[-1]["soft"] > 0 and history[-1]["soft_clamped"] == 0
    rows = evaluate.main(flags(*teachers, student, data=REAL, ensemble=True, out=out))
    assert [row["name"] for row in rows] == ["deep_lab", "segformer-b0", "best_student", "ensemble"]
    assert rows[0]["iou"]["Sky"] > 0.3
    path = data.find_pairs(REAL, "val")[0][0]
    infer.main(flags(path, checkpoint=student, out=out / "p"))
    assert Image.open(out / "p" / f"{path.stem}_mask.png").size == (960, 540)
    infer.main(flags(export=out / "hf", checkpoint=student))
    exported = transformers.AutoModelForSemanticSegmentation.from_pretrained(out / "hf")
    assert exported.config.id2label[9] == "Sky"
