"""Tests with oracles: values worked by hand, published libraries, invariants.

    python -m pytest -q test_all.py            # minutes; -m "" adds the slow ones
    OFFROAD_DATA=DIR python -m pytest ...      # also on real pairs, from a folder with train/ and val/
"""
import copy
import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
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
TINY = ["--init", "random", "--size", "64", "--batch-size", "4", "--lr", "1e-3", "--workers", "0", "--amp", "off", "--device", "cpu"]
B0 = ["--arch", "segformer-b0", *TINY]


# ---------------------------------------------------------------------------------------------- fixtures
@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    data.write_scenes(root, train=12, val=4, width=192, height=108)
    return root


@pytest.fixture(scope="session")
def trained(scenes, tmp_path_factory):
    """Outputs with a small DeepLab and SegFormer-B0 teacher and a B1 student after a few steps."""
    out = tmp_path_factory.mktemp("trained")
    common = ["--data", str(scenes), "--out", str(out), *TINY, "--steps", "3"]
    train_teacher.main(["--arch", "deeplab", *common])
    train_teacher.main(["--arch", "segformer-b0", *common])
    teachers = [str(out / "deep_lab.pth"), str(out / "segformer-b0.pth")]
    student, history = distill.main(["--teachers", *teachers, *common])
    return out, teachers, student, history


@pytest.fixture(autouse=True)
def short_timings(monkeypatch):
    """Speed is measured as in earnest, but briefly."""
    monkeypatch.setattr(evaluate.time_interleaved, "__defaults__", (0.1, 2))


@pytest.fixture(scope="session")
def pairs(scenes):
    return data.Pairs(scenes, "train", data.DESERT)


@pytest.fixture
def copy_of(scenes, tmp_path):
    """A fresh copy of the scenes to damage."""
    shutil.copytree(scenes, tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def fails(capsys):
    """Calls main(argv) and checks: exit status, one line on stderr with the given words, no traceback."""
    def check(main, argv, *words, status=2):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
        assert stop.value.code == status
        assert sum(line.startswith("error: ") for line in lines) == 1, lines
        assert "Traceback" not in "".join(lines)
        for word in words:
            assert str(word) in lines[-1], (word, lines[-1])
        return lines[-1]
    return check


def states_equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def read_log(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def without_times(record):
    return {key: value for key, value in record.items() if key not in ("images_per_s", "wait_s", "seconds", "peak_memory_mib")}


# ---------------------------------------------------------------------------------------------- data: reading
def test_class_table_is_the_desert_sets():
    table = [(c["name"], c["id"]) for c in data.DESERT]
    assert table == [("Trees", 100), ("Lush Bushes", 200), ("Dry Grass", 300), ("Dry Bushes", 500), ("Ground Clutter", 550),
                     ("Flowers", 600), ("Logs", 700), ("Rocks", 800), ("Landscape", 7100), ("Sky", 10000)]


def test_scenes_hold_all_classes_as_16_bit_ids(scenes):
    seen = set()
    for path in (scenes / "train" / "Segmentation").iterdir():
        with Image.open(path) as image:
            assert image.mode in ("I;16", "I")
            seen |= set(np.unique(np.asarray(image)).tolist())
    assert seen == {c["id"] for c in data.DESERT}


def test_ids_become_indices(pairs):
    raw, labels = data.read_mask(pairs.pairs[0][1]), pairs.read(0)[1]
    for index, entry in enumerate(data.DESERT):
        assert ((raw == entry["id"]) == (labels == index)).all()
    assert int(pairs.counts[0].sum()) == labels.size


@pytest.mark.parametrize("values, flag, form", [
    ([{100, 200}, {10000}], None, "ids"), ([{0, 3}, {9, 255}], None, "indices"), ([{100, 12345}], None, "ids"), ([{100, 255, 300}], None, "ids"),
    ([{0, 9}], "indices", "indices"), ([{100, 255, 7100}], None, "ids"), ([{100, 7100}, {255}], None, "ids")])
def test_mask_form_is_decided(values, flag, form):
    assert data.mask_form(values, ["a.png"] * len(values), data.DESERT, flag) == form


@pytest.mark.parametrize("values, word", [
    ([{0, 1, 2, 27, 39}], "high byte"), ([{100, 200, 255}], "clipped"), ([{100, 44, 188, 16}], "modulo 256"),
    ([{100, 7100}, {0, 1, 9}], "mix"), ([{12345, 54321}], "class table"), ([{0, 5, 10}], "label 10 .*class table"),
    ([{0, 5, 11, 255}], "label 11 .*class table"), ([{7100, 10000}, {27, 39}], "high byte")])
def test_mask_form_refuses(values, word):
    with pytest.raises(data.Fault, match=word):
        data.mask_form(values, ["a.png", "b.png"][:len(values)], data.DESERT)


def test_masks_that_fit_both_forms_need_the_flag():
    table = [{"name": n, "id": i, "color": [0, 0, 0]} for n, i in (("a", 1), ("b", 0))]
    with pytest.raises(data.Fault, match="--masks"):
        data.mask_form([{0, 1}], ["a.png"], table)
    assert data.mask_form([{0, 1}], ["a.png"], table, "indices") == "indices"
    straight = [{"name": n, "id": i, "color": [0, 0, 0]} for n, i in (("a", 0), ("b", 1))]
    assert data.mask_form([{0, 1}], ["a.png"], straight) == "ids"


def test_unknown_ids_are_ignored_counted_and_reported_once(copy_of, capsys):
    path = min((copy_of / "train" / "Segmentation").iterdir())
    mask = np.asarray(Image.open(path)).copy()
    mask[:10, :10] = 4242
    Image.fromarray(mask).save(path)
    split = data.Pairs(copy_of, "train", data.DESERT)
    assert split.unknown == {4242: 100} and (split.read(0)[1][:10, :10] == 255).all()
    assert split.describe().count("4242") == 1


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


def test_data_prints_what_the_splits_hold_and_draws_augmented_pairs(scenes, tmp_path, capsys):
    data.main(["--data", str(scenes), "--out", str(tmp_path), "--size", "64"])
    said = capsys.readouterr().out
    assert all(said.count(entry["name"]) == 2 for entry in data.DESERT) and "192x108 (12)" in said and "192x108 (4)" in said
    with Image.open(tmp_path / "augmented.png") as sheet:
        assert sheet.size == (6 * 64, 4 * 64) and len(set(sheet.getdata())) > 1000


def test_scan_is_reused_until_a_file_changes(copy_of, tmp_path, monkeypatch):
    calls = []
    once = data.scan_pair
    monkeypatch.setattr(data, "scan_pair", lambda pair: calls.append(pair) or once(pair))
    first = data.Pairs(copy_of, "train", data.DESERT, out=tmp_path)
    assert len(calls) == 12 and (tmp_path / "scan_train.json").exists()
    second = data.Pairs(copy_of, "train", data.DESERT, out=tmp_path)
    assert len(calls) == 12 and torch.equal(first.counts, second.counts) and first.digest == second.digest
    os.utime(first.pairs[3][1], (1, 1))
    data.Pairs(copy_of, "train", data.DESERT, out=tmp_path)
    assert len(calls) == 13


# ---------------------------------------------------------------------------------------------- data: augmentation
def test_whole_size():
    assert data.whole_size(960, 540, 512) == (896, 512)       # 910.2 / 32 = 28.4
    assert data.whole_size(540, 960, 256) == (256, 448)
    assert data.whole_size(100, 100, 64) == (64, 64)


def test_identity_affine_reproduces_image_and_mask(pairs):
    whole = np.eye(2, 3)
    image, mask = pairs.crop(0, 96, whole)
    stored = np.asarray(data.read_image(pairs.pairs[0][0]))
    assert np.array_equal(image.permute(1, 2, 0).numpy(), stored[:96, :96])
    assert np.array_equal(mask.numpy(), pairs.read(0)[1][:96, :96])


def test_affine_outside_is_ignored_and_flip_mirrors(pairs):
    width, _ = pairs.sizes[0]
    mirror = np.array([[-1.0, 0, width], [0, 1, 0]])
    _, mask = pairs.crop(0, 96, mirror)
    assert np.array_equal(mask.numpy(), pairs.read(0)[1][:96, ::-1][:, :96])
    _, mask = pairs.crop(0, 96, np.array([[1.0, 0, width - 40], [0, 1, 0]]))
    assert (mask[:, 40:] == 255).all() and (mask[:, :40] != 255).all()


def test_random_affine_keeps_scale_and_place():
    rng, seen = np.random.default_rng(0), []
    for _ in range(300):
        m = data.draw_affine(rng, 960, 540, 512)
        seen.append(512 / 540 / np.sqrt(abs(np.linalg.det(m[:, :2]))) / (512 / 540) ** 2)    # 1: the shorter side is 512
        centre = m @ [256, 256, 1]
        assert -1 <= centre[0] <= 961 and -1 <= centre[1] <= 541
        assert abs(np.degrees(np.arctan2(m[1, 0], m[1, 1]))) <= 10.01
    assert 0.5 <= min(seen) < 0.6 and 1.9 < max(seen) <= 2.0


def test_image_and_mask_move_together(tmp_path):
    """An image that is its own mask: after any random map, colours and labels still agree."""
    rng = np.random.default_rng(1)
    labels = np.kron(rng.integers(0, 10, (9, 16)), np.ones((24, 24), int)).astype(np.uint8)
    for part in ("Color_Images", "Segmentation"):
        (tmp_path / "train" / part).mkdir(parents=True)
    Image.fromarray(labels * 25).convert("RGB").save(tmp_path / "train" / "Color_Images" / "a.png")
    Image.fromarray(labels).save(tmp_path / "train" / "Segmentation" / "a.png")
    split = data.Pairs(tmp_path, "train", data.DESERT)
    assert split.form == "indices"
    for _ in range(10):
        image, mask = split.crop(0, 96, data.draw_affine(rng, *split.sizes[0], 96))
        keep = mask != 255
        agree = (image[0].float()[keep] / 25 - mask[keep].float()).abs() < 0.5
        assert agree.float().mean() > 0.85                    # the rest lies on edges, which bilinear mixes


def test_samples_depend_on_seed_epoch_position_only(pairs):
    crops = data.Crops(pairs, 64, seed=3)
    a, b = crops[2, 5, 1], crops[2, 5, 1]
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a[2], crops[3, 5, 1][2]) and not torch.equal(a[2], crops[2, 6, 1][2])


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_loader_gives_the_same_pixels_for_any_number_of_workers(pairs, workers):
    order = data.BatchSampler(len(pairs), 4, 0, 1, 6)
    batches = list(data.loader(data.Crops(pairs, 64, 0), workers, False, order))
    digest = sum(float(b.image.double().sum() + b.mask.double().sum() + b.matrix.double().sum() + b.jitter.double().sum()) for b in batches)
    assert len(batches) == 5
    expected = getattr(test_loader_gives_the_same_pixels_for_any_number_of_workers, "digest", digest)
    test_loader_gives_the_same_pixels_for_any_number_of_workers.digest = digest
    assert digest == expected


def test_order_visits_each_pair_once_an_epoch_and_splits_over_processes():
    whole = [k for batch in data.BatchSampler(13, 4, 7, 0, 6) for k in batch]
    for epoch in (0, 1):
        chosen = [n for e, _, n in whole if e == epoch]
        assert len(chosen) == 12 == len(set(chosen))
    halves = [[k for batch in data.BatchSampler(13, 2, 7, 0, 6, rank=r, world=2) for k in batch] for r in (0, 1)]
    assert sorted(halves[0] + halves[1]) == sorted(whole)
    micro = [k for batch in data.BatchSampler(13, 2, 7, 0, 6, accumulate=2) for k in batch]
    assert micro == whole
    resumed = [k for batch in data.BatchSampler(13, 4, 7, 4, 6) for k in batch]
    assert resumed == whole[16:]


def test_sampling_weights_prefer_rare_classes_and_are_deterministic():
    counts = torch.tensor([[90, 10, 0], [100, 0, 0], [100, 0, 0], [95, 0, 5]])
    odds = data.sampling_weights(counts)
    assert odds[3] > odds[0] > odds[1] > 0 and abs(float(odds[1] - odds[2])) < 1e-12
    order = [data.BatchSampler(4, 2, 5, 0, 2, odds=odds).epoch(1) for _ in range(2)]
    assert order[0] == order[1]


def test_class_weights_by_hand():
    counts = torch.tensor([[10, 40, 0, 50]])
    assert torch.allclose(data.class_weights(counts), torch.tensor([4.0, 1.0, 1.0, 0.8]))       # median of 10, 40, 50 is 40
    assert torch.allclose(data.class_weights(counts, "sqrt"), torch.tensor([2.0, 1.0, 1.0, math.sqrt(0.8)]))
    assert torch.equal(data.class_weights(counts, "none"), torch.ones(4))
    assert data.class_weights(torch.tensor([[1, 1000, 10**6]])).tolist() == pytest.approx([10.0, 1.0, 0.1])


@pytest.mark.parametrize("which, function", [(0, "adjust_brightness"), (1, "adjust_contrast"), (2, "adjust_saturation")])
def test_jitter_equals_torchvisions(which, function):
    image = torch.rand(3, 3, 8, 8) * 0.4 + 0.3                # so that nothing is clipped
    jitter = torch.tensor([[1.0, 1.0, 1.0, 0.0]] * 3)
    jitter[:, which] = torch.tensor([0.8, 1.0, 1.2])
    expected = torch.stack([getattr(torchvision.transforms.functional, function)(x, float(f)) for x, f in zip(image, jitter[:, which], strict=True)])
    assert torch.allclose(data.color_jitter(image, jitter), expected, atol=2e-3)


def test_hue_keeps_grey_and_luma_and_six_sixths_are_none():
    image = torch.rand(2, 3, 4, 4) * 0.2 + 0.4
    grey = image.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    turn = torch.tensor([[1, 1, 1, 1 / 6], [1, 1, 1, 0.1]])
    assert torch.allclose(data.color_jitter(grey, turn), grey, atol=1e-3)
    luma = torch.tensor([0.299, 0.587, 0.114])
    turned = data.color_jitter(image, turn)
    assert torch.allclose(torch.einsum("bchw,c->bhw", turned, luma), torch.einsum("bchw,c->bhw", image, luma), atol=1e-3)
    assert not torch.allclose(turned, image, atol=1e-2)
    for _ in range(5):
        turned[:1] = data.color_jitter(turned[:1], turn[:1])
    assert torch.allclose(turned[:1], image[:1], atol=5e-3)


# ---------------------------------------------------------------------------------------------- losses
def test_hard_loss_equals_torchs_at_full_size():
    torch.manual_seed(0)
    z, mask, weight = torch.randn(2, 5, 8, 8), torch.randint(0, 5, (2, 32, 32)), torch.rand(5) + 0.1
    mask[0, :10] = 255
    full = F.interpolate(z, (32, 32), mode="bilinear", align_corners=False)
    assert torch.allclose(losses.hard_loss(z, mask, weight), F.cross_entropy(full, mask, weight, ignore_index=255), atol=1e-6)


def test_hard_loss_of_nothing_valid_is_zero_with_zero_gradient():
    z = torch.randn(1, 3, 2, 2, requires_grad=True)
    loss = losses.hard_loss(z, torch.full((1, 8, 8), 255), torch.ones(3))
    loss.backward()
    assert loss.item() == 0 and (z.grad == 0).all()


def test_soft_loss_by_hand():
    z, t = torch.zeros(1, 2, 1, 1), torch.tensor([2 * math.log(3), 0.0]).view(1, 2, 1, 1)
    loss, met, bit = losses.soft_loss(z, t, torch.zeros(1, 4, 4, dtype=torch.long), T=2.0)
    expected = 4 * (0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5))       # teacher 3/4, 1/4; student 1/2, 1/2
    assert loss.item() == pytest.approx(expected, rel=1e-5) and met == 0 and not bit


def test_soft_loss_equals_torchs_kl_div_and_ignores_size():
    torch.manual_seed(1)
    z, t, mask = torch.randn(2, 4, 6, 6), torch.randn(2, 4, 6, 6), torch.zeros(2, 24, 24, dtype=torch.long)
    loss = losses.soft_loss(z, t, mask, 3.0)[0]
    expected = 9 * F.kl_div((z / 3).log_softmax(1), (t / 3).log_softmax(1), log_target=True, reduction="sum") / (2 * 36)
    assert torch.allclose(loss, expected, rtol=1e-5)
    tiled = losses.soft_loss(z.repeat(1, 1, 2, 3), t.repeat(1, 1, 2, 3), mask.repeat(1, 2, 3), 3.0)[0]
    assert torch.allclose(loss, tiled, rtol=1e-5)


@pytest.mark.parametrize("function", [
    lambda z, t, mask: losses.soft_loss(z, t, mask, 2.0)[0], losses.cwd_loss,
    lambda z, t, mask: losses.hard_loss(z, mask, torch.ones(4)) + 0 * t.sum()])
def test_ignored_pixels_give_no_gradient(function):
    torch.manual_seed(2)
    z, t = torch.randn(2, 4, 8, 8, requires_grad=True), torch.randn(2, 4, 8, 8)
    mask = torch.randint(0, 4, (2, 32, 32))
    mask[:, :, 16:] = 255
    function(z, t, mask).backward()
    assert (z.grad[..., 5:] == 0).all() and (z.grad[..., :4] != 0).any()


@pytest.mark.parametrize("function", [
    lambda z, t, mask: losses.soft_loss(z, t, mask, 2.0)[0], losses.cwd_loss,
    lambda z, t, mask: losses.feature_loss([z], [t]), lambda z, t, mask: losses.attention_loss([z], [t])])
def test_distillation_of_a_model_against_itself_is_zero(function):
    z = torch.randn(2, 4, 8, 8)
    assert abs(function(z, z.clone(), torch.zeros(2, 32, 32, dtype=torch.long)).item()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_losses_are_finite_in_half_precision(dtype, scale):
    torch.manual_seed(3)
    z, t = (scale * torch.randn(2, 4, 8, 8)).to(dtype).requires_grad_(), (scale * torch.randn(2, 4, 8, 8)).to(dtype)
    mask = torch.randint(0, 4, (2, 32, 32))
    mask[0] = 255                                             # one image without a valid pixel
    soft, met, _ = losses.soft_loss(z, t, mask, 2.0)
    total = soft + losses.cwd_loss(z, t, mask) + losses.hard_loss(z, mask, torch.ones(4))
    total = total + losses.feature_loss([z], [t]) + losses.attention_loss([z], [t])
    total.backward()
    assert total.dtype == torch.float32 and total.isfinite() and z.grad.isfinite().all() and (met > 0) == (scale > 1)


def test_soft_loss_counts_what_its_clamps_meet():
    t = torch.tensor([30.0, -30.0]).view(1, 2, 1, 1).repeat(1, 1, 2, 1)
    z = -t.clone()
    z[0, :, 1] = t[0, :, 1]
    loss, met, bit = losses.soft_loss(z, t, torch.zeros(1, 8, 4, dtype=torch.long), 1.0)
    assert met == 4 and loss.item() == pytest.approx(10, rel=1e-3) and not bit           # 20 nats at one cell of two
    loss, met, bit = losses.soft_loss(z, t, torch.zeros(1, 8, 4, dtype=torch.long), 3.0)
    assert loss.item() == pytest.approx(90, rel=1e-3) and met == 0
    assert losses.soft_loss(z[:, :, :1], t[:, :, :1], torch.zeros(1, 4, 4, dtype=torch.long), 3.0)[2]


def test_cwd_loss_by_hand():
    """One class map of two cells: softmax over cells at T 4 gives 3/4, 1/4 against 1/2, 1/2."""
    t = torch.tensor([4 * math.log(3), 0.0]).view(1, 1, 1, 2)
    loss = losses.cwd_loss(torch.zeros(1, 1, 1, 2), t, torch.zeros(1, 4, 8, dtype=torch.long))
    assert loss.item() == pytest.approx(16 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)), rel=1e-5)
    third = torch.cat([t, torch.full((1, 1, 1, 1), 50.0)], 3)                        # an ignored third cell changes nothing
    mask = torch.zeros(1, 4, 12, dtype=torch.long)
    mask[..., 8:] = 255
    assert losses.cwd_loss(torch.zeros(1, 1, 1, 3), third, mask).item() == pytest.approx(loss.item(), rel=1e-5)


def test_feature_and_attention_loss_by_hand():
    s = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)
    t = torch.tensor([4.0, 3.0]).view(1, 2, 1, 1)
    assert losses.feature_loss([s], [t]).item() == pytest.approx(2 * 0.2**2)             # (.6, .8) against (.8, .6)
    s = torch.tensor([[3.0, 0.0], [4.0, 0.0]]).T.reshape(1, 2, 1, 2)                 # energies 9/2 and 16/2
    t = torch.tensor([[1.0, 1.0]]).reshape(1, 1, 1, 2)
    length = math.hypot(9, 16)
    expected = (9 / length - 1 / math.sqrt(2)) ** 2 + (16 / length - 1 / math.sqrt(2)) ** 2
    assert losses.attention_loss([s], [t]).item() == pytest.approx(expected, rel=1e-5)


def test_ramp_and_learning_rate():
    assert [losses.ramp(0.3, 0.7, p) for p in (0, 0.5, 1)] == pytest.approx([0.3, 0.5, 0.7])
    rates = [train_teacher.learning_rate(s, 100, 1.0) for s in range(100)]
    assert rates[0] == pytest.approx(0.2) and max(rates) == rates[4] and rates[99] == pytest.approx(0.01)
    assert all(a > b for a, b in itertools.pairwise(rates[4:]))


# ---------------------------------------------------------------------------------------------- models
@pytest.mark.parametrize("arch, millions", [("deeplab", 40.35), ("segformer-b0", 3.72), ("segformer-b1", 13.68), ("segformer-b3", 47.23)])
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


def randomize_norms(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)


@pytest.mark.parametrize("arch", ["segformer-b0", "deeplab"])
def test_frozen_network_gives_the_same_logits(arch):
    torch.manual_seed(0)
    model = models.build(arch, data.DESERT).eval()
    randomize_norms(model)
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = model(x)
        frozen = models.freeze(copy.deepcopy(model), arch)
        assert torch.allclose(frozen(x), expected, atol=1e-3 * expected.abs().max())
        assert torch.equal(model(x), expected)                # the copy left the original alone
    assert not any(p.requires_grad for p in frozen.parameters())


def test_attention_runs_through_sdpa_where_offered():
    if getattr(transformers.SegformerForSemanticSegmentation, "_supports_sdpa", False):
        assert models.build("segformer-b0", data.DESERT).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("spelling", ["old", "new"])
def test_checkpoints_of_both_spellings_load(spelling, tmp_path):
    model = models.build("segformer-b0", data.DESERT)
    other = {respell(key, spelling): value for key, value in model.state_dict().items()}
    assert any(("stages.0" if spelling == "new" else "encoder.block.0") in key for key in other)
    torch.save({"model_state_dict": other, "arch": "segformer-b0", "classes": data.DESERT}, tmp_path / "a.pth")
    loaded, meta = models.load_model(tmp_path / "a.pth")
    assert states_equal(loaded.state_dict(), model.state_dict()) and meta["arch"] == "segformer-b0"


def respell(key, spelling):
    """A key as transformers 4 ("old") or 5 ("new") writes it."""
    key = models.old_key(key)
    if spelling == "new":
        for old, new in ((r"encoder\.patch_embeddings\.(\d)", r"stages.\1.patch_embeddings"), (r"encoder\.block\.(\d)", r"stages.\1.blocks"),
                         (r"encoder\.layer_norm\.(\d)", r"stages.\1.layer_norm"), ("attention.self.query", "attention.q_proj"),
                         ("attention.self.key", "attention.k_proj"), ("attention.self.value", "attention.v_proj"),
                         ("attention.self.sr", "attention.sequence_reduction.sequence_reduction"),
                         ("attention.self.layer_norm", "attention.sequence_reduction.layer_norm"), ("attention.output.dense", "attention.o_proj"),
                         (r"mlp\.dense(\d)", r"mlp.fc\1"), ("layer_norm_1", "layernorm_before"), ("layer_norm_2", "layernorm_after"),
                         ("linear_c", "linear_projections")):
            key = re.sub(old, new, key)
    return key


def test_student_checkpoint_loads_into_the_stock_class(trained):
    out, *_ = trained
    config = models.build("segformer-b1", data.DESERT).config
    student = transformers.SegformerForSemanticSegmentation(config)
    student.load_state_dict(torch.load(out / "best_student.pth", weights_only=True)["model_state_dict"])


def test_bare_state_dict_loads_with_arch(tmp_path, fails, scenes):
    model = models.build("segformer-b0", data.DESERT)
    torch.save({f"module.{key}": value for key, value in model.state_dict().items()}, tmp_path / "bare.pth")
    loaded, _ = models.load_model(tmp_path / "bare.pth", "segformer-b0", data.DESERT)
    assert states_equal(loaded.state_dict(), model.state_dict())
    image = str(next((scenes / "val" / "Color_Images").iterdir()))
    fails(infer.main, [image, "--checkpoint", str(tmp_path / "bare.pth")], "--arch segformer-b0")
    fails(infer.main, [image, "--checkpoint", str(tmp_path / "bare.pth"), "--arch", "deeplab"], "holds segformer-b0, not deeplab")


def test_folder_of_mit_weights_arrives_whole(tmp_path, fails, scenes):
    torch.manual_seed(5)
    config = models.build("segformer-b0", data.DESERT).config
    source = transformers.SegformerForImageClassification(config)
    source.save_pretrained(tmp_path / "mit-b0")
    model = models.build("segformer-b0", data.DESERT, str(tmp_path / "mit-b0"))
    mine = {models.old_key(k): v for k, v in model.state_dict().items() if not k.startswith("decode_head")}
    theirs = {models.old_key(k): v for k, v in source.state_dict().items() if not k.startswith("classifier")}
    assert states_equal(mine, theirs) and len(mine) > 100
    fails(train_teacher.main, ["--arch", "segformer-b1", "--data", str(scenes), "--out", str(tmp_path), "--init", str(tmp_path / "mit-b0")],
          "--init", "mit-b0", "not those of segformer-b1")


def test_resnet50_state_dict_arrives_whole(tmp_path):
    source = torchvision.models.resnet50()
    torch.save(source.state_dict(), tmp_path / "resnet.pth")
    model = models.build("deeplab", data.DESERT, str(tmp_path / "resnet.pth"))
    theirs = {k: v for k, v in source.state_dict().items() if not k.startswith("fc.")}
    assert states_equal(model.backbone.state_dict(), theirs)


def test_own_checkpoint_as_init(trained, capsys):
    out, *_ = trained
    model = models.build("segformer-b1", data.DESERT, str(out / "best_student.pth"))
    assert states_equal(model.state_dict(), models.load_model(out / "best_student.pth")[0].state_dict())
    other = models.build("segformer-b1", data.DESERT[:4], str(out / "best_student.pth"))
    assert other.decode_head.classifier.out_channels == 4 and "classifier is left out" in capsys.readouterr().out


def test_failed_download_is_said_in_one_line(monkeypatch, tmp_path, fails, scenes):
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *a, **k: (_ for _ in ()).throw(OSError("no route to host")))
    monkeypatch.setattr(models, "hf_hub_download", lambda *a, **k: (_ for _ in ()).throw(OSError("no route to host")))
    for arch in ("deeplab", "segformer"):
        monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", lambda *a, **k: (_ for _ in ()).throw(OSError("no route")))
        fails(train_teacher.main, ["--arch", arch, "--data", str(scenes), "--out", str(tmp_path)], "--init imagenet", "--init PATH", "--init random")


def test_ensemble_by_hand():
    class Fixed(nn.Module):
        def __init__(self, z):
            super().__init__()
            self.z = z

        def forward(self, x):
            return self.z

    a, b = torch.tensor([2.0, 0.0]).view(1, 2, 1, 1), torch.tensor([0.0, 4.0]).view(1, 2, 1, 1)
    both = [Fixed(a), Fixed(b)]
    assert models.Ensemble(both, torch.tensor([3.0, 1.0]))(None).flatten().tolist() == pytest.approx([1.5, 1.0])
    probs = models.Ensemble(both, torch.tensor([1.0, 1.0]), "probs")(None).exp()
    assert torch.allclose(probs, (a.softmax(1) + b.softmax(1)) / 2)
    by_class = models.Ensemble(both, torch.tensor([[1.0, 0.25], [0.0, 0.75]]))(None)        # centred: (1, -1) and (-2, 2)
    assert by_class.flatten().tolist() == pytest.approx([1.0, 0.25 * -1 + 0.75 * 2])
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
    flipped = models.predict(model, image, (64, 96), flip=True)
    assert torch.equal(flipped.flip(2), models.predict(model, image.flip(3), (64, 96), flip=True))


# ---------------------------------------------------------------------------------------------- training
def test_returns_student_and_history_and_writes_what_readme_says(trained):
    out, _, student, history = trained
    assert isinstance(student, transformers.SegformerForSemanticSegmentation) and not student.training
    names = {"deep_lab.pth", "deep_lab.jsonl", "deep_lab_curves.png", "segformer-b0.pth", "best_student.pth", "best_student.jsonl", "training_curves.png"}
    assert names <= {p.name for p in out.iterdir()} and (out / "checkpoints" / "best_student.pth").exists()
    log = read_log(out / "best_student.jsonl")
    run = log[0]["run"]
    assert {"args", "versions", "device", "parameters", "size"} <= run.keys() and run["parameters"] == sum(p.numel() for p in student.parameters())
    keys = {"epoch", "step", "loss", "hard", "soft", "alpha", "lr", "images_per_s", "wait_s", "peak_memory_mib", "val_miou", "val_iou",
            "skipped", "logits_clamped", "soft_clamped"}
    assert len(log) == 2 and keys <= log[1].keys() and log[1:] == history
    assert list(log[1]["val_iou"]) == [c["name"] for c in data.DESERT]
    assert log[1]["loss"] == pytest.approx((1 - 0.5) * log[1]["hard"] + 0.5 * log[1]["soft"], rel=0.3)


def test_checkpoint_holds_plain_types_and_its_scores(trained):
    out, *_ = trained
    content = torch.load(out / "best_student.pth", weights_only=True)
    assert {"model_state_dict", "arch", "classes", "mean", "std", "size", "epoch", "val_iou", "args"} <= content.keys()
    assert content["arch"] == "segformer-b1" and content["classes"] == data.DESERT and content["size"] == 64


def test_alpha_zero_equals_training_alone_bit_for_bit(scenes, tmp_path, monkeypatch):
    common = ["--data", str(scenes), *B0, "--steps", "4"]
    alone, first = train_teacher.main([*common, "--out", str(tmp_path / "a")])
    monkeypatch.setattr(distill, "load_teachers", lambda *a: pytest.fail("teachers were loaded"))
    student, second = distill.main([*common, "--out", str(tmp_path / "b"), "--alpha", "0:0"])
    assert states_equal(alone.state_dict(), student.state_dict())
    assert [r["val_iou"] for r in first] == [r["val_iou"] for r in second]


def test_teachers_are_unchanged_by_training_to_the_bit(trained, scenes, tmp_path, monkeypatch):
    _, teachers, *_ = trained
    kept = []
    once = distill.freeze
    monkeypatch.setattr(distill, "freeze", lambda *a: kept.append(once(*a)) or kept[-1])
    before = []
    fit = distill.fit
    monkeypatch.setattr(distill, "fit", lambda *a: before.extend({k: v.clone() for k, v in t.state_dict().items()} for t in kept) or fit(*a))
    distill.main(["--data", str(scenes), "--out", str(tmp_path), *B0, "--steps", "3", "--teachers", *teachers])
    assert len(kept) == 2
    for teacher, old in zip(kept, before, strict=True):
        assert states_equal(teacher.state_dict(), old) and not teacher.training
        assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_training_learns(scenes, tmp_path):
    _, history = train_teacher.main(["--data", str(scenes), *B0, "--out", str(tmp_path), "--epochs", "12", "--class-weights", "none"])
    assert history[-1]["loss"] < 0.75 * history[0]["loss"] and history[-1]["val_miou"] > 0.12


def test_the_ramp_ends_with_the_last_step(scenes, tmp_path, trained, monkeypatch):
    seen = []
    monkeypatch.setattr(distill, "ramp", lambda a, b, p: seen.append(losses.ramp(a, b, p)) or seen[-1])
    distill.main(["--data", str(scenes), "--out", str(tmp_path), *B0, "--steps", "5", "--alpha", "0.2:0.6", "--teachers", trained[1][0]])
    assert seen == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6])


@pytest.mark.parametrize("extra", [["--feature", "1", "--kl", "0"], ["--attention", "1"], ["--cwd", "3"], ["--average", "probs"],
                                   ["--teacher-weights", "auto"], ["--teacher-weights", "3:1"], ["--rare-class-sampling"],
                                   ["--class-weights", "sqrt"], ["--alpha", "0:0", "--feature", "0.5"]])
def test_every_signal_trains(extra, trained, scenes, tmp_path):
    argv = ["--data", str(scenes), "--out", str(tmp_path), *B0, "--steps", "3", "--teachers", *trained[1], *extra]
    student, history = distill.main(argv)
    record = history[-1]
    for flag, part in (("--feature", "feature"), ("--attention", "attention"), ("--cwd", "cwd")):
        assert (part in record) == (flag in extra) and record.get(part, 1) > 0
    assert ("soft" in record) == (extra[:1] != ["--feature"] and extra[:2] != ["--alpha", "0:0"] or "--kl" not in extra and "0:0" in extra)
    saved = torch.load(tmp_path / "student_segformer-b0.pth", weights_only=True)["model_state_dict"]
    assert saved.keys() == student.state_dict().keys()        # adapters are not part of it


def test_init_teacher_copies_an_even_choice_of_blocks(tmp_path):
    torch.manual_seed(0)
    teacher, student = models.build("segformer-b3", data.DESERT), models.build("segformer-b1", data.DESERT)
    distill.start_from_teacher(student, [teacher])
    mine = {models.old_key(k): v for k, v in student.state_dict().items()}
    theirs = {models.old_key(k): v for k, v in teacher.state_dict().items()}
    at = "segformer.encoder.block.2.{}.mlp.dense1.weight"
    assert torch.equal(mine[at.format(0)], theirs[at.format(0)]) and torch.equal(mine[at.format(1)], theirs[at.format(17)])
    assert torch.equal(mine["segformer.encoder.patch_embeddings.3.proj.weight"], theirs["segformer.encoder.patch_embeddings.3.proj.weight"])
    with pytest.raises(data.Fault, match="--init teacher"):
        distill.start_from_teacher(models.build("segformer-b0", data.DESERT), [teacher])


def test_same_command_twice_gives_the_same_bits_for_any_number_of_workers(scenes, tmp_path):
    runs = [train_teacher.main(["--data", str(scenes), *B0, "--steps", "4", "--out", str(tmp_path / str(w)), "--workers", str(w)]) for w in (0, 2)]
    assert states_equal(runs[0][0].state_dict(), runs[1][0].state_dict())
    assert [without_times(r) for r in runs[0][1]] == [without_times(r) for r in runs[1][1]]


def job_for(model, arch="segformer-b0", loss=None, amp=None, weight=None):
    weight = torch.ones(10) if weight is None else weight

    def alone(forward, batch, fraction):
        hard = losses.hard_loss(forward(batch.image), batch.mask, weight, batch.weight_sum)
        return hard, {"hard": hard}
    return train_teacher.make_job(model, arch, loss or alone, weight, train_teacher.World(0, 1, torch.device("cpu")), amp, 1e-3, 0)


def some_batch(count=4, side=64, seed=0):
    g = torch.Generator().manual_seed(seed)
    mask = torch.randint(0, 10, (count, side, side), generator=g).to(torch.uint8)
    mask[0, : side // 2] = 255                                # uneven numbers of valid pixels
    return data.Batch(torch.randint(0, 256, (count, 3, side, side), generator=g).to(torch.uint8), mask, torch.eye(2, 3).repeat(count, 1, 1),
                      torch.tensor([[1.0, 1, 1, 0]]).repeat(count, 1), torch.arange(count))


def halves(batch):
    return [data.Batch(*(v[part] for v in batch[:5])) for part in (slice(0, 2), slice(2, 4))]


def kd_loss_for_tests(weight):
    """Hard and soft loss against fixed logits made from the image itself."""
    def loss(forward, batch, fraction):
        z = forward(batch.image)
        t = F.avg_pool2d(batch.image, 4).repeat(1, 4, 1, 1)[:, :10]
        hard, soft = losses.hard_loss(z, batch.mask, weight, batch.weight_sum), losses.soft_loss(z, t, batch.mask, 2.0, batch.valid)[0]
        return hard + soft + losses.cwd_loss(z, t, batch.mask) * batch.share, {"hard": hard, "soft": soft}
    return loss


def test_two_half_batches_equal_one_whole():
    torch.manual_seed(0)
    weight = torch.rand(10) + 0.1
    model = models.build("segformer-b0", data.DESERT)
    job = job_for(model, loss=kd_loss_for_tests(weight), weight=weight)
    model.eval()                                              # BatchNorm and dropout see the batch otherwise
    grads, parts = [], []
    for batches in ([some_batch()], halves(some_batch())):
        parts.append(train_teacher.backward(job, batches, 0, 0.5))
        grads.append([p.grad.clone() for p in model.parameters()])
        job.optimizer.zero_grad()
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, atol=1e-5 * (1 + a.abs().max()))
    assert {k: float(v) for k, v in parts[0].items()} == pytest.approx({k: float(v) for k, v in parts[1].items()}, rel=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradient_that_is_not_finite_changes_nothing(bad):
    torch.manual_seed(0)
    model = models.build("deeplab", data.DESERT)
    state = {"bad": 1.0}

    def loss(forward, batch, fraction):
        value = forward(batch.image).float().mean() * state["bad"]
        return value, {"hard": value}
    job, sums = job_for(model, "deeplab", loss), {}
    train_teacher.train_step(job, [some_batch()], 0, 9, sums)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    moments = [v["exp_avg"].clone() for v in job.optimizer.state.values()]
    state["bad"] = bad
    _, finite = train_teacher.train_step(job, [some_batch()], 1, 9, sums)
    assert not finite and states_equal(before, model.state_dict())
    assert all(torch.equal(a, b["exp_avg"]) for a, b in zip(moments, job.optimizer.state.values(), strict=True))
    state["bad"] = 1.0
    _, finite = train_teacher.train_step(job, [some_batch()], 2, 9, sums)
    record = train_teacher.means(sums, job.world)
    assert finite and not states_equal(before, model.state_dict()) and record["skipped"] == 1 and math.isfinite(record["loss"])


def test_ten_bad_gradients_in_a_row_stop_the_run_and_keep_the_state(scenes, tmp_path, monkeypatch, fails):
    argv = ["--data", str(scenes), *B0, "--out", str(tmp_path), "--epochs", "20", "--save-minutes", "0"]
    once, calls = train_teacher.hard_loss, []

    def loss(*args):
        calls.append(1)
        return once(*args) * (float("nan") if len(calls) > 5 else 1)
    monkeypatch.setattr(train_teacher, "hard_loss", loss)
    line = fails(train_teacher.main, argv, "not finite", "step 20", "hard nan", "scene00", "--lr", status=1)
    assert line.count("scene00") == 4 and len(calls) == 20
    state = torch.load(tmp_path / "checkpoints" / "segformer-b0.pth", weights_only=True)
    assert all(v.isfinite().all() for v in state["model_state_dict"].values())


def test_out_of_memory_is_one_line(scenes, tmp_path, monkeypatch, fails):
    def loss(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(train_teacher, "hard_loss", loss)
    fails(train_teacher.main, ["--data", str(scenes), *B0, "--out", str(tmp_path)], "--batch-size 4", "--accumulate", "--size 64", status=1)


# ---------------------------------------------------------------------------------------------- resume
def test_same_command_again_returns_the_finished_run(trained, scenes, capsys):
    out, teachers, student, history = trained
    again, records = distill.main(["--teachers", *teachers, "--data", str(scenes), "--out", str(out), *TINY, "--steps", "3"])
    assert states_equal(again.state_dict(), student.state_dict()) and records == history
    assert "finished already" in capsys.readouterr().out


@pytest.mark.parametrize("extra, name", [(["--seed", "1"], "--seed (was 0, now 1)"), (["--lr", "2e-3"], "--lr"), (["--T", "3"], "--T"),
                                         (["--alpha", "0.5"], "--alpha"), (["--batch-size", "2"], "--batch-size"), (["--steps", "9"], "--steps")])
def test_other_settings_are_refused_by_name(extra, name, trained, scenes, fails):
    out, teachers, *_ = trained
    fails(distill.main, ["--teachers", *teachers, "--data", str(scenes), "--out", str(out), *TINY, "--steps", "3", *extra], name, "--overwrite", "--out")


def test_other_teachers_are_refused(trained, scenes, fails):
    out, teachers, *_ = trained
    fails(distill.main, ["--teachers", teachers[1], teachers[0], "--data", str(scenes), "--out", str(out), *TINY, "--steps", "3"], "--teachers")


def test_another_class_table_is_refused_and_the_same_one_elsewhere_is_not(scenes, tmp_path, fails, capsys):
    def argv(name):
        return ["--data", str(scenes), *B0, "--out", str(tmp_path / "o"), "--steps", "2", "--classes", str(tmp_path / name)]
    (tmp_path / "a.json").write_text(json.dumps(data.DESERT))
    train_teacher.main(argv("a.json"))
    (tmp_path / "b.json").write_text(json.dumps(data.DESERT, indent=1))
    train_teacher.main(argv("b.json"))
    assert "finished already" in capsys.readouterr().out
    (tmp_path / "a.json").write_text(json.dumps([{**c, "name": c["name"].replace("Logs", "Boats")} for c in data.DESERT]))
    fails(train_teacher.main, argv("a.json"), "--classes (another table)", "--overwrite")


@pytest.mark.parametrize("extra, word", [(["--seed", "5"], "--seed (was 0, now 5)"), (["--batch-size", "99"], "--batch-size 99")])
def test_refused_run_leaves_the_teacher_cache_alone(extra, word, trained, scenes, tmp_path, fails):
    argv = ["--data", str(scenes), "--out", str(tmp_path), *B0, "--steps", "2", "--cache-teachers"]
    distill.main([*argv, "--teachers", *trained[1]])
    kept = {end: (tmp_path / f"teacher_cache.{end}").read_bytes() for end in ("json", "f16", "done")}
    fails(distill.main, [*argv, "--teachers", trained[1][0], *extra], word)
    assert kept == {end: (tmp_path / f"teacher_cache.{end}").read_bytes() for end in kept}


def test_images_per_second_are_of_training_alone(scenes, tmp_path, monkeypatch):
    once = train_teacher.evaluate

    def slow(*args):
        time.sleep(3)
        return once(*args)
    monkeypatch.setattr(train_teacher, "evaluate", slow)
    _, history = train_teacher.main(["--data", str(scenes), *B0, "--out", str(tmp_path), "--steps", "1"])
    assert history[0]["seconds"] < 3 and history[0]["images_per_s"] == pytest.approx(4 / history[0]["seconds"])


def test_overwrite_keeps_the_old_state_until_the_new_one_is_written(scenes, tmp_path, monkeypatch):
    """Another process may be behind with its look at the files; what it finds then is the new run's."""
    argv = ["--data", str(scenes), *B0, "--out", str(tmp_path), "--steps", "2"]
    train_teacher.main(argv)
    state, seen = tmp_path / "checkpoints" / "segformer-b0.pth", []
    once = train_teacher.make_job
    monkeypatch.setattr(train_teacher, "make_job", lambda *a: seen.append(state.exists()) or once(*a))
    train_teacher.main([*argv, "--overwrite"])
    assert seen == [True]


def test_signal_after_the_last_validation_ends_the_command_and_keeps_the_result(scenes, tmp_path, monkeypatch, capsys):
    argv = ["--data", str(scenes), *B0, "--out", str(tmp_path), "--steps", "2"]
    once = train_teacher.report

    def report(*args):
        os.kill(os.getpid(), signal.SIGINT)
        once(*args)
    with monkeypatch.context() as patch:
        patch.setattr(train_teacher, "report", report)
        with pytest.raises(SystemExit) as stop:
            train_teacher.main(argv)
    assert stop.value.code == 130 and "stopped, after it had finished" in capsys.readouterr().err
    train_teacher.main(argv)
    assert "finished already" in capsys.readouterr().out


def test_overwrite_starts_afresh_and_a_foreign_checkpoint_is_kept(scenes, tmp_path, fails):
    argv = ["--data", str(scenes), *B0, "--out", str(tmp_path), "--steps", "2"]
    train_teacher.main(argv)
    _, history = train_teacher.main([*argv, "--seed", "1", "--overwrite"])
    assert history[-1]["step"] == 2
    shutil.rmtree(tmp_path / "checkpoints")
    fails(train_teacher.main, argv, "segformer-b0.pth", "no state", "--overwrite")


def test_killed_before_the_first_save_the_run_goes_on(scenes, tmp_path, monkeypatch):
    """A state stands on disk from the first step on, and the best checkpoint of a run without a state is its own."""
    argv = ["--data", str(scenes), *B0, "--out", str(tmp_path), "--epochs", "2"]
    once = train_teacher.train_step

    def killed(job, batches, now, *rest):
        if now == 4:
            raise RuntimeError("killed")
        return once(job, batches, now, *rest)
    with monkeypatch.context() as patch:
        patch.setattr(train_teacher, "train_step", killed)
        with pytest.raises(RuntimeError, match="killed"):
            train_teacher.main(argv)
    assert (tmp_path / "segformer-b0.pth").exists()
    _, history = train_teacher.main(argv)
    assert [r["step"] for r in history] == [3, 6]


def test_a_form_of_masks_named_later_is_the_same_run(scenes, tmp_path, capsys):
    argv = ["--data", str(scenes), *B0, "--out", str(tmp_path), "--steps", "2"]
    train_teacher.main(argv)
    train_teacher.main([*argv, "--masks", "ids"])
    assert "finished already" in capsys.readouterr().out


def test_damaged_records_of_a_run(scenes, tmp_path, fails):
    argv = ["--data", str(scenes), *B0, "--out", str(tmp_path), "--steps", "2"]
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


def test_an_epoch_without_a_finite_gradient_fails(scenes, tmp_path, monkeypatch, fails):
    once = train_teacher.hard_loss
    monkeypatch.setattr(train_teacher, "hard_loss", lambda *a: once(*a) * float("nan"))
    fails(train_teacher.main, ["--data", str(scenes), *B0, "--out", str(tmp_path), "--steps", "2"], "none of the 2 gradients", "--lr", status=1)
    assert not (tmp_path / "segformer-b0.pth").exists()


def test_pairs_repeated_by_links_count_twice(copy_of):
    for part in ("Color_Images", "Segmentation"):
        (copy_of / "train" / part / "zz.png").symlink_to("scene0000.png")
    split = data.Pairs(copy_of, "train", data.DESERT)
    assert len(split) == 13 and torch.equal(split.counts[0], split.counts[12])


@pytest.mark.slow
def test_sigterm_to_the_whole_group_saves(scenes, tmp_path):
    """As a scheduler sends it: data workers get the signal too."""
    argv = ["--data", str(scenes), *B0, "--workers", "2", "--epochs", "500", "--eval-every", "500", "--out", str(tmp_path)]
    child = subprocess.Popen([sys.executable, str(HERE / "train_teacher.py"), *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                             start_new_session=True)
    while "epoch 2," not in child.stdout.readline():
        pass
    os.killpg(child.pid, signal.SIGTERM)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 143 and "the same command goes on" in said and "Traceback" not in said


class StopAt:
    """Raises a signal in this process when the loop begins step `step`."""

    def __init__(self, monkeypatch, step, which):
        once = train_teacher.train_step

        def train_step(job, batches, now, *rest):
            if now == step:
                os.kill(os.getpid(), which)
            return once(job, batches, now, *rest)
        monkeypatch.setattr(train_teacher, "train_step", train_step)


@pytest.mark.parametrize("which, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_signal_saves_and_the_resumed_run_has_the_same_bits(which, status, amp, scenes, tmp_path, monkeypatch, capsys):
    def argv(out):
        return ["--data", str(scenes), *B0, "--out", str(tmp_path / out), "--epochs", "3", "--rare-class-sampling", "--amp", amp]
    whole, history = train_teacher.main(argv("whole"))
    with monkeypatch.context() as patch:
        StopAt(patch, 4, which)
        with pytest.raises(SystemExit) as stop:
            train_teacher.main(argv("cut"))
    assert stop.value.code == status and "after step 5 of 9" in capsys.readouterr().err
    log = tmp_path / "cut" / "segformer-b0.jsonl"
    log.write_text(log.read_text() + '{"epoch": 2, "torn')
    resumed, records = train_teacher.main(argv("cut"))
    assert "goes on after step 5" in capsys.readouterr().out
    assert states_equal(whole.state_dict(), resumed.state_dict())
    assert [without_times(r) for r in history] == [without_times(r) for r in records] and read_log(log)[1:] == records
    best = [torch.load(tmp_path / d / "segformer-b0.pth", weights_only=True) for d in ("whole", "cut")]
    assert states_equal(best[0]["model_state_dict"], best[1]["model_state_dict"]) and best[0]["epoch"] == best[1]["epoch"]


def test_signal_during_validation_stops_before_the_epoch_is_recorded(scenes, tmp_path, monkeypatch, capsys):
    argv = ["--data", str(scenes), *B0, "--out", str(tmp_path), "--epochs", "2"]
    once, calls = evaluate.confusion, []

    def confusion(*args):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return once(*args)
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "confusion", confusion)
        with pytest.raises(SystemExit) as stop:
            train_teacher.main(argv)
    assert stop.value.code == 143 and len(calls) == 2 and len(read_log(tmp_path / "segformer-b0.jsonl")) == 1
    _, history = train_teacher.main(argv)
    assert [r["step"] for r in history] == [3, 6] and history[0]["val_miou"] is not None
    assert history[0]["images_per_s"] is None and "epoch 1, step 3" in capsys.readouterr().out     # nothing was trained between


def test_handlers_are_put_back_and_not_touched_in_threads(scenes, tmp_path):
    import threading
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    result = []
    argv = ["--data", str(scenes), *B0, "--steps", "2"]
    thread = threading.Thread(target=lambda: result.append(train_teacher.main([*argv, "--out", str(tmp_path / "t")])))
    thread.start()
    thread.join()
    train_teacher.main([*argv, "--out", str(tmp_path / "m")])
    assert len(result) == 1 and (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


CHILD = """
import os, sys, time
import data, evaluate, train_teacher
replace, confusion, step = os.replace, evaluate.confusion, train_teacher.train_step
def slow(name, call):
    def run(*a, **k):
        print(name, flush=True); time.sleep(0.03)
        return call(*a, **k)
    return run
os.replace, evaluate.confusion, train_teacher.train_step = slow("SAVE", replace), slow("VALIDATION", confusion), slow("STEP", step)
import distill
(distill if sys.argv[1] == "distill" else train_teacher).main(sys.argv[2:])
"""


def killed_at(argv, phase, wait):
    """Runs the scripts in a real process and kills it `wait` seconds into its n-th phase; True if it ended before."""
    name, count = phase
    child = subprocess.Popen([sys.executable, "-c", CHILD, *argv], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=HERE)
    for line in child.stdout:
        count -= line.strip() == name
        if count == 0:
            time.sleep(wait)
            child.kill()
            break
    child.stdout.close()
    return child.wait() == 0


@pytest.mark.slow
def test_killed_at_random_moments_ends_with_the_same_bits(scenes, tmp_path, trained):
    rng = np.random.default_rng()
    print("seed", rng.bit_generator.seed_seq.entropy)

    def argv(out):
        return ["distill", "--data", str(scenes), *B0, "--amp", "fp16", "--out", str(tmp_path / out), "--epochs", "4", "--save-minutes", "0",
                "--workers", "1", "--teachers", *trained[1], "--cache-teachers"]
    assert killed_at(argv("whole"), ("NEVER", 1), 0)
    phases = [("STEP", 2), ("SAVE", 7), ("VALIDATION", 2), ("STEP", int(rng.integers(1, 4))), ("SAVE", int(rng.integers(2, 9))),
              ("VALIDATION", int(rng.integers(1, 5))), ("STEP", int(rng.integers(1, 3)))]
    ended = [killed_at(argv("cut"), phase, float(rng.uniform(0, 0.1))) for phase in phases]
    assert not any(ended[:5])
    assert killed_at(argv("cut"), ("NEVER", 1), 0)
    for path in ("student_segformer-b0.pth", "checkpoints/student_segformer-b0.pth"):
        a, b = (torch.load(tmp_path / d / path, weights_only=True) for d in ("whole", "cut"))
        assert states_equal(a["model_state_dict"], b["model_state_dict"]) and a["epoch"] == b["epoch"] and a["val_iou"] == b["val_iou"]
    logs = [[without_times(r) for r in read_log(tmp_path / d / "student_segformer-b0.jsonl")[1:]] for d in ("whole", "cut")]
    assert logs[0] == logs[1] and [r["epoch"] for r in logs[0]] == [1, 2, 3, 4]


@pytest.mark.parametrize("other", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_remembered_and_a_second_of_either_kind_would_end_the_process(other):
    before = signal.getsignal(other)
    with train_teacher.Signals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.number == signal.SIGINT and signal.getsignal(other) is signal.SIG_DFL
    assert signal.getsignal(other) is before


@pytest.mark.slow
def test_second_ctrl_c_stops_at_once(scenes, tmp_path):
    code = "import sys, time, train_teacher\nonce = train_teacher.train_step\n" \
           "def slow(*a):\n    print('STEP', flush=True); time.sleep(60); return once(*a)\n" \
           "train_teacher.train_step = slow; train_teacher.main(sys.argv[1:])"
    child = subprocess.Popen([sys.executable, "-c", code, "--data", str(scenes), *B0, "--out", str(tmp_path)], stdout=subprocess.PIPE,
                             stderr=subprocess.DEVNULL, text=True, cwd=HERE)
    while child.stdout.readline().strip() != "STEP":
        pass
    child.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert child.poll() is None                               # it finishes the step first
    child.send_signal(signal.SIGINT)
    assert child.wait(5) == -signal.SIGINT


def test_full_disk_leaves_the_old_file(tmp_path):
    import resource
    path = tmp_path / "a.pth"
    models.save_model(path, nn.Linear(2, 2), "deeplab", data.DESERT)
    old = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(data.Fault, match="cannot be written") as fault:
            models.save_model(path, nn.Linear(500, 500), "deeplab", data.DESERT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert fault.value.status == 1 and path.read_bytes() == old and list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------------------------------------- several processes
def gradients_of_a_process(rank, world, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29577", RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    with train_teacher.processes("cpu") as me:
        torch.manual_seed(0)
        weight = torch.rand(10) + 0.1
        model = models.build("segformer-b0", data.DESERT)
        job = train_teacher.make_job(model, "segformer-b0", kd_loss_for_tests(weight), weight, me, None, 1e-3, 0)
        model.eval()
        train_teacher.backward(job, [halves(some_batch())[rank]], 0, 0.5)
        torch.save([p.grad for p in model.parameters()], Path(folder) / f"{rank}.pth")


def test_two_processes_give_the_gradients_of_one(tmp_path):
    torch.manual_seed(0)
    weight = torch.rand(10) + 0.1
    model = models.build("segformer-b0", data.DESERT)
    job = job_for(model, loss=kd_loss_for_tests(weight), weight=weight)
    model.eval()
    train_teacher.backward(job, [some_batch()], 0, 0.5)
    torch.multiprocessing.spawn(gradients_of_a_process, (2, str(tmp_path)), 2)
    for rank in (0, 1):
        for p, grad in zip(model.parameters(), torch.load(tmp_path / f"{rank}.pth", weights_only=True), strict=True):
            assert torch.allclose(p.grad, grad, atol=1e-5 * (1 + p.grad.abs().max()))


def torchrun(script, argv, check=True):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29611", str(HERE / script), *argv]
    return subprocess.run(command, capture_output=True, text=True, env=env, check=check)


@pytest.mark.slow
def test_torchrun_trains_and_validates_like_one_process(scenes, tmp_path, trained):
    argv = ["--data", str(scenes), *B0, "--batch-size", "2", "--epochs", "2", "--teachers", *trained[1], "--feature", "1"]
    done = torchrun("distill.py", [*argv, "--out", str(tmp_path)])
    assert done.stdout.count("= 4, cpu") == 1                 # the global batch, printed once
    log = read_log(tmp_path / "student_segformer-b0.jsonl")
    assert [r["epoch"] for r in log[1:]] == [1, 2] and log[0]["run"]["processes"] == 2
    assert log[-1]["step"] == 6                               # 12 pairs / (2 x 2)
    rows = evaluate.main([str(tmp_path / "checkpoints" / "student_segformer-b0.pth"), "--data", str(scenes), "--amp", "off", "--device", "cpu",
                          "--out", str(tmp_path), "--workers", "0"])
    assert rows[0]["iou"] == log[-1]["val_iou"] and rows[0]["pixel_accuracy"] == log[-1]["val_pixel_accuracy"]
    refused = torchrun("distill.py", [*argv, "--out", str(tmp_path), "--seed", "5"], check=False)
    assert refused.returncode != 0 and "--seed (was 0, now 5)" in refused.stderr


@pytest.mark.slow
def test_where_one_process_fails_the_others_end_in_silence(scenes, tmp_path, trained):
    code = "import sys, distill\n" \
           "distill.shutil.disk_usage = lambda folder: type('disk', (), {'free': 0})\ndistill.main(sys.argv[1:])"
    (tmp_path / "child.py").write_text(f"import sys; sys.path.insert(0, {str(HERE)!r})\n{code}")
    argv = ["--data", str(scenes), *B0, "--batch-size", "2", "--steps", "2", "--out", str(tmp_path / "o"), "--teachers", *trained[1]]
    done = torchrun(tmp_path / "child.py", [*argv, "--cache-teachers"], check=False)
    assert done.returncode != 0 and done.stderr.count("error: ") == 1 and "0 MB are free" in done.stderr
    assert "gloo" not in done.stderr and 'distill.py", line' not in done.stderr


@pytest.mark.slow
def test_processes_agree_on_the_step_at_which_a_signal_to_one_stops_them(scenes, tmp_path):
    """SIGTERM to one of two processes only, then the same command again."""
    code = "import os, signal, sys, train_teacher\nonce = train_teacher.train_step\n" \
           "def step(job, batches, now, *rest):\n" \
           "    if now == 3 and os.environ['RANK'] == '1' and len(sys.argv) > 1 and sys.argv[1] == 'stop': os.kill(os.getpid(), signal.SIGTERM)\n" \
           "    return once(job, batches, now, *rest)\n" \
           "train_teacher.train_step = step\ntrain_teacher.main(sys.argv[2:])"
    (tmp_path / "child.py").write_text(f"import sys; sys.path.insert(0, {str(HERE)!r})\n{code}")
    argv = ["--data", str(scenes), *B0, "--batch-size", "2", "--epochs", "2", "--out", str(tmp_path / "o")]
    stopped = torchrun(tmp_path / "child.py", ["stop", *argv], check=False)
    assert stopped.returncode != 0 and "stopped after step 4 of 6" in stopped.stderr
    resumed = torchrun(tmp_path / "child.py", ["go", *argv])
    assert resumed.stdout.count("goes on after step 4 of 6") == 1
    assert [r["step"] for r in read_log(tmp_path / "o" / "segformer-b0.jsonl")[1:]] == [3, 6]


# ---------------------------------------------------------------------------------------------- the teacher cache
@pytest.fixture
def squares(tmp_path):
    """Square images whose whole is the crop, so that the identity map shows teachers the same pixels either way."""
    for n in range(4):
        image, mask = data.draw_scene(n, 96, 96)
        for part, content in (("Color_Images", image), ("Segmentation", Image.fromarray(mask))):
            (tmp_path / "squares" / "train" / part).mkdir(parents=True, exist_ok=True)
            content.save(tmp_path / "squares" / "train" / part / f"{n}.png")
    return data.Pairs(tmp_path / "squares", "train", data.DESERT)


def make_cache(folder, split, model, key="k"):
    cache = distill.Cache(folder, {"key": key}, split, 96)
    cache.build(model, train_teacher.World(0, 1, torch.device("cpu")), None, 0)
    return cache


def test_cache_under_the_identity_equals_the_teachers_online(squares, tmp_path):
    torch.manual_seed(0)
    model = models.build("segformer-b0", data.DESERT).eval()
    cache = make_cache(tmp_path, squares, model)
    crops = [squares.crop(n, 96, np.eye(2, 3)) for n in range(4)]
    batch = data.Batch(torch.stack([c[0] for c in crops]), torch.stack([c[1] for c in crops]), torch.eye(2, 3).repeat(4, 1, 1),
                       torch.tensor([[1.0, 1, 1, 0]]).repeat(4, 1), torch.arange(4))
    ready = data.to_device(batch, torch.device("cpu"))
    with torch.no_grad():
        online = model(ready.image)
    cached = cache.crops(ready)
    assert torch.allclose(cached, online, atol=2e-3)
    z = torch.randn(4, 10, 24, 24)
    a, b = (losses.soft_loss(z, t, ready.mask, 2.0)[0].item() for t in (online, cached))
    assert a == pytest.approx(b, rel=1e-3)


def test_cached_maps_follow_the_samples_own_matrix(squares, tmp_path):
    """A map of image coordinates, warped: cell centres arrive where the matrix says."""
    cache = distill.Cache(tmp_path, {}, squares, 96)
    cache.open(train_teacher.World(0, 1, torch.device("cpu")))
    y, x = np.meshgrid((np.arange(24) + 0.5) * 4, (np.arange(24) + 0.5) * 4, indexing="ij")
    maps = np.zeros((4, 10, 24, 24), np.float16)
    maps[:, 0], maps[:, 1] = x, y
    cache.values[:] = maps.ravel()
    rng = np.random.default_rng(0)
    matrix = torch.from_numpy(np.stack([data.draw_affine(rng, 96, 96, 96) for _ in range(4)])).float()
    batch = data.Batch(torch.zeros(4, 3, 96, 96), torch.zeros(4, 96, 96), matrix, torch.zeros(4, 4), torch.arange(4))
    warped = cache.crops(batch)
    for n in range(4):
        for i, j in ((12, 12), (8, 15), (0, 23)):
            place = matrix[n] @ torch.tensor([4 * j + 2.0, 4 * i + 2.0, 1.0])
            if ((place > 4) & (place < 92)).all():
                assert torch.allclose(warped[n, :2, i, j], place, atol=0.1)


def test_cache_goes_on_where_it_was_and_is_rebuilt_when_stale(squares, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model, seen = models.build("segformer-b0", data.DESERT).eval(), []
    once = distill.logits
    monkeypatch.setattr(distill, "logits", lambda *a: seen.append(1) or (_ for _ in ()).throw(KeyboardInterrupt) if len(seen) == 2 else seen.append(1) or once(*a))
    with pytest.raises(KeyboardInterrupt):
        make_cache(tmp_path, squares, model)
    monkeypatch.setattr(distill, "logits", lambda *a: seen.append(1) or once(*a))
    seen.clear()
    first = make_cache(tmp_path, squares, model).values.copy()
    assert len(seen) == 2                                     # two were done before the interruption
    make_cache(tmp_path, squares, model)
    assert len(seen) == 2
    again = make_cache(tmp_path, squares, model, key="other weights")
    assert len(seen) == 6 and np.array_equal(again.values, first)
    assert np.isfinite(first).all() and (first != 0).any()


def test_room_for_a_cache_is_looked_for_after_the_old_one_is_gone(squares, tmp_path, monkeypatch, fails):
    """A disk that holds one cache and no second one."""
    torch.manual_seed(0)
    model, values = models.build("segformer-b0", data.DESERT).eval(), tmp_path / "teacher_cache.f16"
    size = make_cache(tmp_path, squares, model).values.nbytes
    disk = type("disk", (), {"free": property(lambda self: size - (size if values.exists() else 0))})
    monkeypatch.setattr(distill.shutil, "disk_usage", lambda folder: disk())
    make_cache(tmp_path, squares, model, key="other weights")
    disk.free = 0
    with pytest.raises(data.Fault, match="0 MB are free"):
        make_cache(tmp_path, squares, model, key="yet others")


def test_cached_run_does_not_load_teachers_twice_and_says_what_it_takes(trained, scenes, tmp_path, capsys):
    argv = ["--data", str(scenes), "--out", str(tmp_path), *B0, "--steps", "3", "--teachers", *trained[1], "--cache-teachers"]
    _, history = distill.main(argv)
    said = capsys.readouterr().out
    assert "teacher cache: 12 of 12 images" in said and "MB" in said and "minutes" in said
    (tmp_path / "teacher_cache.f16").unlink()
    distill.main(argv)
    assert "finished already" in capsys.readouterr().out and not (tmp_path / "teacher_cache.f16").exists()
    online = distill.main([*(a for a in argv if a != "--cache-teachers"), "--out", str(tmp_path / "online")])[1]
    assert history[0]["soft"] == pytest.approx(online[0]["soft"], rel=0.5) and history[0]["hard"] == pytest.approx(online[0]["hard"], rel=0.1)


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
        once(["--demo", "--device", "cpu", "--amp", "bf16", "--out", str(tmp_path)])
    assert len(calls) == 4
    for argv in calls:
        assert argv[argv.index("--device") + 1] == "cpu" and argv[argv.index("--amp") + 1] == "bf16"


def test_bench_prints_every_piece_and_ratio(capsys, monkeypatch):
    once = evaluate.time_interleaved
    monkeypatch.setattr(evaluate, "time_interleaved", lambda calls, device, seconds: once(calls, device))
    result = distill.main(["--bench", "--size", "64", "--batch-size", "2", "--device", "cpu"])
    said = capsys.readouterr().out
    pieces = ["original step", "bare deeplab", "bare segformer-b3", "bare student", "step online", "step cached", "student alone", "decode a pair",
              "loader, a pair", "original / online", "original / cached", "online / bare pieces", "cached / student alone"]
    assert all(piece in said and result[piece] > 0 for piece in pieces) and "peak memory" in said
    assert result["original / online"] == pytest.approx(result["original step"] / result["step online"])


@pytest.mark.slow
def test_host_memory_does_not_grow_with_the_number_of_images(tmp_path):
    """Anonymous memory of one process over 5,000 small pairs, after the first 1,000 and at the end."""
    for part in ("Color_Images", "Segmentation"):
        (tmp_path / "train" / part).mkdir(parents=True)
    image, mask = data.draw_scene(0, 64, 48)
    for n in range(5000):
        image.save(tmp_path / "train" / "Color_Images" / f"{n}.bmp")
        Image.fromarray(mask).save(tmp_path / "train" / "Segmentation" / f"{n}.png")
    code = f"""
import data, distill, torch
def anonymous():
    return int(next(l for l in open('/proc/self/status') if l.startswith('RssAnon')).split()[1]) / 1024
split = data.Pairs({str(tmp_path)!r}, 'train', data.DESERT)
cache = distill.Cache({str(tmp_path)!r}, {{}}, split, 64)
import train_teacher
cache.open(train_teacher.World(0, 1, torch.device('cpu')))
order = data.BatchSampler(len(split), 10, 0, 0, 1000)
for n, batch in enumerate(data.loader(data.Crops(split, 64, 0), 0, False, order)):
    cache.crops(data.to_device(batch, torch.device("cpu")))
    if n in (100, 999): print(anonymous())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE, check=True)
    first, last = map(float, done.stdout.split())
    assert last - first < 30                                  # MiB, over two epochs


# ---------------------------------------------------------------------------------------------- evaluation
def test_scores_by_hand_and_as_scikit_learn():
    target, labels = torch.tensor([[0, 0, 1, 1], [1, 255, 3, 3]]), torch.tensor([[0, 1, 1, 1], [0, 0, 3, 1]])
    table = [{"name": n, "id": i, "color": [0, 0, 0]} for i, n in enumerate("abcd")]
    matrix = evaluate.confusion(labels, target, 4)
    scores = evaluate.summary(matrix, table)
    assert scores["iou"] == {"a": pytest.approx(1 / 3), "b": pytest.approx(2 / 5), "c": None, "d": pytest.approx(1 / 2)}
    assert scores["miou_present"] == pytest.approx((1 / 3 + 2 / 5 + 1 / 2) / 3) and scores["miou"] == pytest.approx((1 / 3 + 2 / 5 + 1 / 2) / 4)
    assert scores["precision"] == {"a": 0.5, "b": 0.5, "c": None, "d": 1.0} and scores["recall"]["b"] == pytest.approx(2 / 3)
    assert scores["pixel_accuracy"] == pytest.approx(4 / 7)
    metrics = pytest.importorskip("sklearn.metrics")
    keep = target != 255
    t, p = target[keep].numpy(), labels[keep].numpy()
    assert np.array_equal(matrix.numpy(), metrics.confusion_matrix(t, p, labels=range(4)))
    assert [v for v in scores["iou"].values() if v is not None] == pytest.approx(list(metrics.jaccard_score(t, p, labels=[0, 1, 3], average=None)))


def test_one_matrix_for_the_split_equals_the_sum_over_images(trained, scenes):
    model, _ = models.load_model(trained[0] / "best_student.pth")
    split = data.Pairs(scenes, "val", data.DESERT)
    whole = evaluate.evaluate(model, split, 64)
    by_hand = torch.zeros(10, 10, dtype=torch.int64)
    for n in range(len(split)):
        image = data.whole_image(data.read_image(split.pairs[n][0]), 64)
        labels, target = models.predict(model, image, (108, 192))[0].numpy(), split.read(n)[1]
        np.add.at(by_hand.numpy(), (target, labels), 1)
    assert torch.equal(whole, by_hand) and whole.sum() == 4 * 108 * 192
    parts = sum(evaluate.evaluate(model, split, 64, numbers=range(r, 4, 3)) for r in range(3))
    assert torch.equal(parts, whole)


def test_evaluate_writes_the_table_json_and_images(trained, scenes, tmp_path, capsys):
    out, teachers, *_ = trained
    argv = [*teachers, str(out / "best_student.pth"), "--data", str(scenes), "--ensemble", "--teacher-weights", "2:1", "--tta", "flip",
            "--out", str(tmp_path), "--json", str(tmp_path / "scores.json"), "--save-worst", "2", "--amp", "off", "--workers", "0", "--device", "cpu"]
    rows = evaluate.main(argv)
    said = capsys.readouterr().out
    names = ["deep_lab", "deep_lab + flip", "segformer-b0", "segformer-b0 + flip", "best_student", "best_student + flip", "ensemble", "ensemble + flip"]
    assert [row["name"] for row in rows] == names and all(name in said for name in ("GMACs", "agreement", "<50 ms", "512x512", "threads", *names))
    content = json.loads((tmp_path / "scores.json").read_text())
    assert {"name", "params", "gmacs", "miou", "miou_present", "pixel_accuracy", "iou", "ms", "fps", "size"} <= content["models"][0].keys()
    ensembled = rows[6]
    assert ensembled["agreement"] == 1 and ensembled["to_ensemble"] == 0 and 0 < rows[0]["agreement"] < 1
    expected = {f"confusion_{name.replace(' + ', '_')}.png" for name in names}
    assert {p.name for p in tmp_path.glob("confusion_*.png")} == expected and len(list((tmp_path / "worst_best_student").glob("*.png"))) == 2
    ensemble = models.Ensemble([models.load_model(t)[0] for t in teachers], torch.tensor([2.0, 1.0])).eval()
    expected = evaluate.summary(evaluate.evaluate(ensemble, data.Pairs(scenes, "val", data.DESERT), 64), data.DESERT)
    assert ensembled["miou"] == pytest.approx(expected["miou"], abs=2e-3)
    last = read_log(out / "best_student.jsonl")[-1]
    assert rows[4]["iou"] == last["val_iou"]                  # the log's own figures, to the bit


def test_ensemble_sees_one_size_whatever_its_members_were_trained_at(trained, scenes, tmp_path):
    _, (first, second), *_ = trained
    content = torch.load(second, weights_only=True)
    torch.save({**content, "size": 96}, tmp_path / "other.pth")
    argv = ["--data", str(scenes), "--ensemble", "--out", str(tmp_path), "--amp", "off", "--workers", "0", "--device", "cpu"]
    alike, mixed = (evaluate.main([str(first), str(other), *argv]) for other in (second, tmp_path / "other.pth"))
    assert mixed[2]["iou"] == alike[2]["iou"] and mixed[1]["iou"] != alike[1]["iou"] and mixed[0]["iou"] == alike[0]["iou"]


def test_a_checkpoint_named_ensemble_is_not_taken_for_it(trained, scenes, tmp_path):
    shutil.copy(trained[1][1], tmp_path / "ensemble.pth")
    argv = ["--data", str(scenes), "--out", str(tmp_path), "--amp", "off", "--workers", "0", "--device", "cpu"]
    rows = evaluate.main([str(tmp_path / "ensemble.pth"), *argv])
    assert "agreement" not in rows[0]
    shutil.move(tmp_path / "ensemble.pth", tmp_path / "Ensemble.pth")
    rows = evaluate.main([trained[1][0], str(tmp_path / "Ensemble.pth"), *argv, "--ensemble"])
    assert [row["name"] for row in rows] == ["deep_lab", "Ensemble", "ensemble"] and rows[2]["agreement"] == 1 > rows[1]["agreement"]


def test_networks_whose_images_would_have_one_name_are_refused(trained, scenes, tmp_path, fails):
    """And none is written; two of one name in two folders are told apart."""
    for name in ("n.v1.pth", "n_v1.pth", "ensemble.pth"):
        shutil.copy(trained[1][1], tmp_path / name)
    argv = ["--data", str(scenes), "--out", str(tmp_path / "o"), "--amp", "off", "--workers", "0", "--device", "cpu"]
    for names, extra in ((("n.v1.pth", "n_v1.pth"), []), (("n_v1.pth", "n_v1.pth"), []), (("ensemble.pth", "n_v1.pth"), ["--ensemble"])):
        line = fails(evaluate.main, [*(str(tmp_path / name) for name in names), *argv, *extra], "confusion_", "rename")
        assert not list((tmp_path / "o").glob("*.png")), line
    shutil.copy(trained[1][0], tmp_path / "o" / "n_v1.pth")
    rows = evaluate.main([str(tmp_path / "n_v1.pth"), str(tmp_path / "o" / "n_v1.pth"), *argv])
    assert [row["name"] for row in rows] == [str(tmp_path / "n_v1.pth"), str(tmp_path / "o" / "n_v1.pth")]


def test_an_image_without_labels_is_not_among_the_worst(trained, copy_of, tmp_path):
    path = min((copy_of / "val" / "Segmentation").iterdir())
    Image.fromarray(np.full_like(np.asarray(Image.open(path)), 255)).save(path)
    evaluate.main([str(trained[0] / "best_student.pth"), "--data", str(copy_of), "--out", str(tmp_path), "--workers", "0", "--save-worst", "4"])
    sheets = list((tmp_path / "worst_best_student").iterdir())
    assert len(sheets) == 3 and not any(path.stem in sheet.name for sheet in sheets)


def test_a_chart_of_two_classes_holds_its_title():
    table = data.DESERT[:2]
    image = np.asarray(evaluate.draw_confusion(torch.eye(2), table, "a network with a long name, val"))
    assert (image[4:22, -12:] == 255).all() and (image[4:22] != 255).any()


def test_absent_class_is_na(trained, tmp_path, copy_of, capsys):
    for path in (copy_of / "val" / "Segmentation").iterdir():
        mask = np.asarray(Image.open(path)).copy()
        mask[mask == 700] = 7100
        Image.fromarray(mask).save(path)
    shutil.move(copy_of / "val", tmp_path / "flat")
    rows = evaluate.main([str(trained[0] / "best_student.pth"), "--data", str(tmp_path / "flat"), "--split", ".", "--out", str(tmp_path), "--workers", "0"])
    assert rows[0]["iou"]["Logs"] is None and rows[0]["miou_present"] == pytest.approx(rows[0]["miou"] * 10 / 9)
    assert "n/a" in next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Logs"))


def test_gmacs_are_counted_after_the_rewrite():
    b1 = models.build("segformer-b1", data.DESERT).eval()
    assert evaluate.count_gmacs(models.freeze(b1, "segformer-b1")) == pytest.approx(11.0, abs=0.2)
    stock = transformers.SegformerForSemanticSegmentation(b1.config).eval()
    assert evaluate.count_gmacs(stock) == pytest.approx(15.3, abs=0.3)


def street(root):
    """An eleven-class set with 8-bit class indices."""
    table = [{"name": f"class {n}", "id": n, "color": [20 * n, 255 - 20 * n, 90]} for n in range(11)]
    (root / "classes.json").write_text(json.dumps(table))
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for part in ("Color_Images", "Segmentation"):
            (root / split / part).mkdir(parents=True)
        for n in range(count):
            labels = np.kron(rng.integers(0, 11, (4, 6)), np.ones((16, 16), int)).astype(np.uint8)
            Image.fromarray(np.stack([20 * labels, 255 - 20 * labels, 0 * labels + 90], -1)).save(root / split / "Color_Images" / f"größe {n}.png")
            Image.fromarray(labels).save(root / split / "Segmentation" / f"größe {n}.png")
    return ["--data", str(root), "--classes", str(root / "classes.json")]


def test_a_legend_of_many_classes_stays_inside_the_image():
    table = [{"name": f"class {n}", "id": n, "color": [n, 0, 0]} for n in range(100)]
    image, labels = Image.new("RGB", (320, 240), (90, 120, 60)), np.arange(320 * 240).reshape(240, 320) % 100
    with_legend, without = (np.asarray(data.overlay(image, labels, table, legend)) for legend in (True, False))
    assert (with_legend[-1] == without[-1]).all() and (with_legend[:200, 4] != without[:200, 4]).any(1).all()


def test_curves_and_confusion_of_255_classes_are_drawn():
    table = [{"name": f"class {n}", "id": n, "color": [n, 0, 0]} for n in range(255)]
    record = {"epoch": 1, "lr": 1e-4, "loss": 1.0, "val_iou": {c["name"]: c["id"] / 255 for c in table}}
    for image in (evaluate.draw_curves([record], table, []), evaluate.draw_confusion(torch.eye(255), table, "a")):
        assert len(image.getcolors(1 << 24)) > 10


def test_another_class_table_from_end_to_end(tmp_path, trained, fails, capsys):
    flags = street(tmp_path)
    student, _ = train_teacher.main([*flags, *B0, "--out", str(tmp_path / "o"), "--steps", "2", "--batch-size", "2"])
    assert student.decode_head.classifier.out_channels == 11 and "class indices" not in capsys.readouterr().err
    rows = evaluate.main([str(tmp_path / "o" / "segformer-b0.pth"), *flags, "--out", str(tmp_path / "o"), "--workers", "0"])
    assert list(rows[0]["iou"]) == [f"class {n}" for n in range(11)]
    infer.main([str(tmp_path / "val" / "Color_Images"), "--checkpoint", str(tmp_path / "o" / "segformer-b0.pth"), "--out", str(tmp_path / "p")])
    assert (tmp_path / "p" / "größe 0_mask.png").exists()
    infer.main(["--export", str(tmp_path / "hf"), "--checkpoint", str(tmp_path / "o" / "segformer-b0.pth")])
    assert json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())["size"] == {"height": 64, "width": 96}     # as in training
    fails(distill.main, [*flags, *B0, "--out", str(tmp_path / "o"), "--teachers", *trained[1]], trained[1][0],
          "10 classes, the class table 11")


def test_a_network_of_another_class_table_is_refused_by_all(tmp_path, scenes, trained, fails):
    """As many classes, but one by another name; other ids and colours of the same names are the user's to choose."""
    flags, checkpoint = ["--data", str(scenes), "--classes", str(tmp_path / "c.json"), "--out", str(tmp_path / "o")], trained[1][1]
    (tmp_path / "c.json").write_text(json.dumps([{**c, "name": c["name"].replace("Logs", "Boats")} for c in data.DESERT]))
    for main, argv in ((distill.main, [*B0, "--teachers", checkpoint]), (evaluate.main, [checkpoint]),
                       (infer.main, [str(scenes / "val" / "Color_Images"), "--checkpoint", checkpoint])):
        fails(main, [*argv, *flags], checkpoint, "class 6 is 'Logs', not 'Boats'", "--classes")
    (tmp_path / "c.json").write_text(json.dumps([{**c, "color": [9, 9, c["id"] % 256]} for c in data.DESERT]))
    infer.main([str(next((scenes / "val" / "Color_Images").iterdir())), "--checkpoint", checkpoint, *flags])
    with Image.open(next((tmp_path / "o").glob("*_mask.png"))) as mask:
        assert mask.getpalette()[:6] == [9, 9, 100, 9, 9, 200]


def test_missing_teachers_are_reported_before_all_pairs_are_read(tmp_path, scenes, fails):
    fails(distill.main, ["--data", str(scenes), *TINY, "--out", str(tmp_path)], "deep_lab.pth", "no such file")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------- inference and export
def test_labels_equal_evaluations_and_masks_hold_indices(trained, scenes, tmp_path):
    checkpoint = str(trained[0] / "best_student.pth")
    infer.main([str(scenes / "val" / "Color_Images"), "--checkpoint", checkpoint, "--out", str(tmp_path), "--raw", "--device", "cpu"])
    rows = evaluate.main([checkpoint, "--data", str(scenes), "--out", str(tmp_path), "--workers", "0", "--device", "cpu"])
    split, matrix = data.Pairs(scenes, "val", data.DESERT), torch.zeros(10, 10, dtype=torch.int64)
    for n, (path, _) in enumerate(split.pairs):
        with Image.open(tmp_path / f"{path.stem}_mask.png") as image:
            labels = torch.from_numpy(np.array(image))
            assert image.mode == "P" and image.size == (192, 108) and image.getpalette()[27:30] == data.DESERT[9]["color"]
        ids = np.asarray(Image.open(tmp_path / f"{path.stem}_ids.png"))
        assert np.array_equal(ids, np.array([c["id"] for c in data.DESERT])[labels.numpy()])
        assert Image.open(tmp_path / f"{path.stem}_overlay.png").size == (192, 108)
        matrix += evaluate.confusion(labels, torch.from_numpy(split.read(n)[1]), 10)
    assert evaluate.summary(matrix, data.DESERT)["iou"] == rows[0]["iou"]


def test_inputs_of_every_kind_and_bad_files_are_skipped(trained, scenes, tmp_path, capsys):
    image, _ = data.draw_scene(1, 120, 80)
    (tmp_path / "in" / "sub").mkdir(parents=True)
    image.save(tmp_path / "in" / "a.png")
    image.convert("L").save(tmp_path / "in" / "b.tif")
    image.convert("RGBA").save(tmp_path / "in" / "c.webp")
    image.save(tmp_path / "in" / "sub" / "a.jpg")
    (tmp_path / "in" / "broken.png").write_text("no image")
    common = ["--checkpoint", str(trained[0] / "best_student.pth"), "--device", "cpu"]
    with pytest.raises(SystemExit) as stop:
        infer.main([str(tmp_path / "in"), str(tmp_path / "in" / "*" / "*.jpg"), *common, "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert stop.value.code == 1 and "broken.png" in said and "labelling" not in said           # no rest of a progress bar
    assert {p.name for p in (tmp_path / "out").glob("*_mask.png")} == {"a_mask.png", "b_mask.png", "c_mask.png", "a_2_mask.png"}


def test_an_input_is_never_overwritten(trained, tmp_path, fails):
    image, _ = data.draw_scene(1, 120, 80)
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "a_mask.png")
    old = (tmp_path / "a_mask.png").read_bytes()
    fails(infer.main, [str(tmp_path / "a.png"), str(tmp_path / "a_mask.png"), "--checkpoint", str(trained[0] / "best_student.pth"),
                       "--out", str(tmp_path)], "--out", "a_mask.png", "overwrite")
    assert (tmp_path / "a_mask.png").read_bytes() == old


def test_only_what_would_be_written_counts_as_overwritten(trained, tmp_path, capsys):
    image, _ = data.draw_scene(1, 120, 80)
    for name in ("a.png", "a_overlay.png", "a_ids.png"):
        image.save(tmp_path / name)
    argv = [str(tmp_path / "a.png"), str(tmp_path / "a_overlay.png"), str(tmp_path / "a_ids.png"), "--checkpoint", str(trained[0] / "best_student.pth")]
    infer.main([*argv, "--out", str(tmp_path), "--no-overlay"])
    assert "3 image(s)" in capsys.readouterr().out and (tmp_path / "a_ids_mask.png").exists()


def test_a_file_named_twice_is_labelled_once(trained, tmp_path, monkeypatch, capsys):
    image, _ = data.draw_scene(1, 120, 80)
    image.save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    infer.main(["a.png", str(tmp_path / "a.png"), "*.png", "--checkpoint", str(trained[0] / "best_student.pth"), "--out", "o"])
    assert "1 image(s)" in capsys.readouterr().out


def test_hugging_face_export_touches_its_own_files_only_and_fails_in_one_line(trained, tmp_path, fails):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "mine.safetensors").write_text("")
    (tmp_path / "hf" / "mine.safetensors").chmod(0o600)
    argv = ["--checkpoint", str(trained[0] / "best_student.pth"), "--export"]
    infer.main([*argv, str(tmp_path / "hf")])
    assert (tmp_path / "hf" / "mine.safetensors").stat().st_mode & 0o777 == 0o600
    (tmp_path / "no" / "model.safetensors").mkdir(parents=True)
    fails(infer.main, [*argv, str(tmp_path / "no")], "--export", "cannot be written", status=1)


def test_hugging_face_folder_gives_the_same_labels(trained, tmp_path, scenes, fails):
    checkpoint = trained[0] / "best_student.pth"
    infer.main(["--export", str(tmp_path / "hf"), "--checkpoint", str(checkpoint), "--shape", "512x896"])
    files = {p.name: p.stat().st_mode for p in (tmp_path / "hf").iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= set(files) and len(set(files.values())) == 1
    model = transformers.AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "hf").eval()
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    assert list(model.config.id2label.values()) == [c["name"] for c in data.DESERT]
    image = data.read_image(next((scenes / "val" / "Color_Images").iterdir())).resize((896, 512))
    with torch.no_grad():
        z = model(**processor(image, return_tensors="pt")).logits
    ours = models.predict(models.load_model(checkpoint)[0], data.whole_image(image, 512), (512, 896))
    theirs = F.interpolate(z, (512, 896), mode="bilinear", align_corners=False).argmax(1)
    assert (ours.long() == theirs).float().mean() > 0.999
    segments = transformers.pipeline("image-segmentation", model=str(tmp_path / "hf"), device="cpu")(image)
    assert {s["label"] for s in segments} <= {c["name"] for c in data.DESERT} and segments
    fails(infer.main, ["--export", str(tmp_path / "d"), "--checkpoint", trained[1][0]], "only SegFormer", ".onnx")
    infer.main(["--export", str(tmp_path / "own"), "--checkpoint", str(checkpoint)])             # trained at 64: 960x540 is 128x64
    assert json.loads((tmp_path / "own" / "preprocessor_config.json").read_text())["size"] == {"height": 64, "width": 128}


def test_missing_optional_packages_are_one_line(trained, tmp_path, monkeypatch, fails):
    def missing(name):
        raise ImportError(name=name)
    monkeypatch.setattr(infer.importlib, "import_module", missing)
    fails(infer.main, ["--export", str(tmp_path / "a.onnx"), "--checkpoint", str(trained[0] / "best_student.pth")], "onnx is not installed",
          "pip install onnx onnxscript onnxruntime")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_faster_than_transformers_pipeline_and_stock_b3(trained, tmp_path, capsys):
    """From a 960x540 file to an index mask, in turn, at the same network input of 512x896; same labels."""
    checkpoint = trained[0] / "best_student.pth"
    infer.main(["--export", str(tmp_path / "hf"), "--checkpoint", str(checkpoint), "--shape", "512x896"])
    pipe = transformers.pipeline("image-segmentation", model=str(tmp_path / "hf"), device="cpu")
    data.draw_scene(1)[0].save(tmp_path / "a.png")
    ids = {c["name"]: n for n, c in enumerate(data.DESERT)}

    def theirs():
        labels = np.full((540, 960), 255, np.uint8)
        for segment in pipe(str(tmp_path / "a.png")):
            labels[np.asarray(segment["mask"]) > 0] = ids[segment["label"]]
        return labels

    def ours(model, dtype=None):
        image = data.read_image(tmp_path / "a.png")
        return models.predict(model, data.whole_image(image, 512), (540, 960), dtype)[0].numpy()
    device = torch.device("cpu")
    dtype = models.amp_dtype("auto", device)
    frozen, same = models.freeze(models.load_model(checkpoint)[0], "segformer-b1", dtype), models.load_model(checkpoint)[0]
    stock = transformers.SegformerForSemanticSegmentation(models.build("segformer-b3", data.DESERT).config).eval()
    teachers = {a: models.freeze(models.build(a, data.DESERT), a, dtype) for a in ("segformer-b3", "deeplab")}
    x = data.normalize(data.whole_image(data.read_image(tmp_path / "a.png"), 512))

    def forward(model):
        with torch.no_grad(), models.autocast(device, dtype):
            return model(x)

    def as_it_comes():
        with torch.no_grad():
            return stock(x).logits
    calls = {"pipeline": theirs, "file to labels": lambda: ours(frozen, dtype), "stock B3": as_it_comes, "student": lambda: forward(frozen),
             "B3 teacher": lambda: forward(teachers["segformer-b3"]), "DeepLab teacher": lambda: forward(teachers["deeplab"])}
    times = dict(zip(calls, evaluate.time_interleaved(list(calls.values()), device, 4.0, 5), strict=True))
    ms, lowest = {name: t[0] for name, t in times.items()}, {name: t[1] for name, t in times.items()}
    agreement, timed = (theirs() == ours(same)).mean(), (theirs() == ours(frozen, dtype)).mean()
    with capsys.disabled():
        print("\n" + ", ".join(f"{name} {value:.0f} ms" for name, value in ms.items())
              + f", labels equal on {100 * agreement:.2f} %, on {100 * timed:.2f} % as timed")
    assert agreement >= 0.99 and timed >= 0.99
    assert lowest["pipeline"] / lowest["file to labels"] >= 1.7 and lowest["stock B3"] / lowest["student"] >= 3     # steadier than medians


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["96x160", "dynamic"])
def test_onnx_gives_torchs_labels(shape, trained, tmp_path, capsys):
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    target = tmp_path / "student.onnx"
    infer.main(["--export", str(target), "--shape", shape, "--checkpoint", str(trained[0] / "best_student.pth")])
    said = capsys.readouterr().out
    assert said.count("% of the labels equal") == (3 if shape == "dynamic" else 1) and said.splitlines()[-1].startswith(f"{target}: ")
    timed = infer.session_of(target.read_bytes()).get_session_options()              # a session's idle threads must not slow what runs after it
    assert timed.get_session_config_entry("session.intra_op.allow_spinning") == "0" and timed.intra_op_num_threads == torch.get_num_threads()
    session = ort.InferenceSession(str(target), providers=["CPUExecutionProvider"])
    image = np.random.default_rng(0).integers(0, 256, (1, 3, 96, 160), dtype=np.uint8)
    labels = session.run(None, {"image": image})[0]
    ours = models.predict(models.load_model(trained[0] / "best_student.pth")[0], torch.from_numpy(image), (96, 160)).numpy()
    assert labels.dtype == np.uint8 and labels.shape == (1, 96, 160) and (labels == ours).mean() > 0.999


@pytest.mark.slow
def test_an_onnx_file_that_differs_from_torch_does_not_replace_a_good_one(trained, tmp_path, monkeypatch, fails):
    pytest.importorskip("onnxscript")
    target, once = tmp_path / "a.onnx", infer.session_of
    target.write_bytes(b"good")

    class Wrong:
        def __init__(self, *args):
            self.session = once(*args)

        def run(self, *args):
            return [9 - labels for labels in self.session.run(*args)]
    monkeypatch.setattr(infer, "session_of", Wrong)
    fails(infer.main, ["--export", str(target), "--shape", "64x96", "--checkpoint", trained[1][1]], "a.onnx", "differs from torch", status=1)
    assert target.read_bytes() == b"good" and list(tmp_path.iterdir()) == [target]


@pytest.mark.slow
def test_int8_onnx_is_a_quarter_of_the_size(trained, scenes, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    target = tmp_path / "new" / "student.int8.onnx"
    infer.main(["--export", str(target), "--shape", "96x160", "--checkpoint", str(trained[0] / "best_student.pth"), "--data", str(scenes),
                "--calibrate", str(scenes / "train" / "Color_Images")])
    assert target.stat().st_size < 0.3 * (trained[0] / "best_student.pth").stat().st_size and list(target.parent.iterdir()) == [target]
    said = capsys.readouterr().out
    assert all(name in said for name in ("torch fp32", "onnx fp32", "onnx int8", "mIoU"))
    assert said.splitlines()[-1].startswith(f"{target}: ") and "fp32.onnx" not in said


# ---------------------------------------------------------------------------------------------- bad input
def damage(folder, part, change):
    """change(path) on the first file of a part of the training split; returns its path."""
    path = min((folder / "train" / part).iterdir())
    change(path)
    return path


def change_masks(change):
    def apply(folder):
        for path in (folder / "train" / "Segmentation").iterdir():
            Image.fromarray(change(np.asarray(Image.open(path)))).save(path)
    return apply


def first(part, change):
    return lambda folder: damage(folder, part, change)


def empty(folder):
    for path in (*(folder / "train" / "Color_Images").iterdir(), *(folder / "train" / "Segmentation").iterdir()):
        path.unlink()


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def blank(*size):
    return lambda path: Image.new("RGB", size).save(path)


def half_as_indices(path):
    mask = np.asarray(Image.open(path))
    Image.fromarray(data.label_table(data.DESERT, "ids")[mask]).save(path)


def turned(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(path).save(path.with_suffix(".jpg"), exif=exif)
    path.unlink()


def four_bits():
    """A PNG of 192x108 in 4-bit greyscale, which Pillow reads times 17 and does not write."""
    import struct
    import zlib

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 192, 108, 4, 0, 0, 0, 0)) + \
        chunk(b"IDAT", zlib.compress(108 * (b"\0" + 96 * b"\x12"))) + chunk(b"IEND", b"")


FOUR_BITS = four_bits()
BAD_DATA = {
    "empty split": (empty, ["holds no images"]),
    "no mask": (first("Segmentation", Path.unlink), ["scene0000.png", "no partner", "Segmentation"]),
    "no image": (first("Color_Images", Path.unlink), ["scene0000.png", "no partner", "Color_Images"]),
    "zero bytes": (first("Color_Images", lambda p: p.write_bytes(b"")), ["scene0000.png", "cannot be read", "replace"]),
    "zero bytes mask": (first("Segmentation", lambda p: p.write_bytes(b"")), ["scene0000.png", "cannot be read"]),
    "truncated image": (first("Color_Images", truncate), ["scene0000.png", "damaged image"]),
    "truncated mask": (first("Segmentation", truncate), ["scene0000.png", "damaged mask"]),
    "text as png": (first("Color_Images", lambda p: p.write_text("hello")), ["scene0000.png", "cannot be read"]),
    "rgb mask": (first("Segmentation", lambda p: Image.open(p).convert("L").convert("RGB").save(p)), ["scene0000.png", "mode RGB", "greyscale"]),
    "high byte": (change_masks(lambda m: (m >> 8).astype(np.uint8)), ["high byte", "depth unchanged"]),
    "clipped": (change_masks(lambda m: m.clip(0, 255).astype(np.uint8)), ["clipped at 255", "depth unchanged"]),
    "modulo": (change_masks(lambda m: (m & 255).astype(np.uint8)), ["modulo 256", "depth unchanged"]),
    "one clipped": (first("Segmentation", lambda p: Image.fromarray(np.asarray(Image.open(p)).clip(0, 255).astype(np.uint8)).save(p)),
                    ["scene0000.png", "clipped at 255"]),
    "mixture": (first("Segmentation", half_as_indices), ["scene0000.png", "must not mix"]),
    "unknown ids only": (change_masks(lambda m: (m + 20000).astype(np.uint16)), ["no class table entry", "--classes"]),
    "mask of another size": (first("Segmentation", lambda p: Image.open(p).crop((0, 0, 100, 100)).save(p)), ["scene0000.png", "100x100", "192x108"]),
    "turned by exif": (first("Color_Images", turned), ["scene0000", "EXIF", "108x192"]),
    "1x1 image": (first("Color_Images", blank(1, 1)), ["scene0000.png", "1x1"]),
    "1x5000 image": (first("Color_Images", blank(1, 5000)), ["scene0000.png", "1x5000"]),
    "aspect above 8": (first("Color_Images", blank(900, 100)), ["scene0000.png", "aspect"]),
    "two of one stem": (first("Color_Images", lambda p: shutil.copy(p, p.with_suffix(".bmp"))), ["scene0000", "same stem"]),
    "no folder": (lambda d: shutil.rmtree(d / "val"), ["val", "No such file"]),
    "dangling link": (first("Color_Images", lambda p: (p.unlink(), p.symlink_to("nowhere"))), ["scene0000.png", "No such file"]),
    "4-bit mask": (first("Segmentation", lambda p: p.write_bytes(FOUR_BITS)), ["scene0000.png", "4 bits"]),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_one_line(case, copy_of, tmp_path, fails):
    change, words = BAD_DATA[case]
    change(copy_of)
    fails(train_teacher.main, ["--data", str(copy_of), *B0, "--out", str(tmp_path / "out")], *words)
    assert not list((tmp_path / "out").glob("*.pth"))


BAD_FLAGS = {
    "alpha too large": (distill.main, ["--alpha", "2:0"], ["--alpha 2:0", "0..1"]),
    "alpha nonsense": (distill.main, ["--alpha", "nonsense"], ["--alpha nonsense"]),
    "alpha of three": (distill.main, ["--alpha", "0:1:0"], ["--alpha 0:1:0"]),
    "alpha nan": (distill.main, ["--alpha", "nan"], ["--alpha nan"]),
    "T too large": (distill.main, ["--T", "1e200"], ["--T", "1e200"]),
    "kl too large": (distill.main, ["--kl", "1e300"], ["--kl"]),
    "weights that overflow": (distill.main, ["--teacher-weights", "1e308:1e308"], ["--teacher-weights 1e308:1e308"]),
    "T of 0": (distill.main, ["--T", "0"], ["--T", "'0'", "above 0"]),
    "negative T": (distill.main, ["--T", "-1"], ["--T", "-1"]),
    "weights of the wrong length": (distill.main, ["--teacher-weights", "1:1:1"], ["--teacher-weights 1:1:1", "2 numbers"]),
    "weights all zero": (distill.main, ["--teacher-weights", "0:0"], ["--teacher-weights 0:0"]),
    "weights negative": (distill.main, ["--teacher-weights", "2:-1"], ["--teacher-weights 2:-1", "negative"]),
    "weights nonsense": (distill.main, ["--teacher-weights", "a:b"], ["--teacher-weights a:b"]),
    "size": (distill.main, ["--size", "100"], ["--size", "multiple of 32", "96"]),
    "size of 0": (train_teacher.main, ["--size", "0"], ["--size", "0"]),
    "batch of 0": (train_teacher.main, ["--batch-size", "0"], ["--batch-size", "at least 1"]),
    "batch above the split": (train_teacher.main, ["--arch", "segformer-b0", "--batch-size", "99"], ["--batch-size 99", "12"]),
    "batch of 1 for deeplab": (train_teacher.main, ["--arch", "deeplab", "--batch-size", "1"], ["--batch-size 1", "BatchNorm"]),
    "lr": (train_teacher.main, ["--lr", "-1"], ["--lr"]),
    "epochs": (train_teacher.main, ["--epochs", "1.5"], ["--epochs", "whole number"]),
    "seed": (train_teacher.main, ["--seed", "-3"], ["--seed"]),
    "abbreviated": (train_teacher.main, ["--batch", "4"], ["--batch"]),
    "unknown architecture": (train_teacher.main, ["--arch", "unet"], ["--arch", "unet", "deeplab"]),
    "device": (train_teacher.main, ["--device", "tpu"], ["--device tpu"]),
    "no such data": (train_teacher.main, ["--data", "nowhere"], ["--data nowhere"]),
    "no such init": (train_teacher.main, ["--init", "nowhere.pth"], ["--init nowhere.pth", "no such file"]),
    "init teacher without one": (distill.main, ["--init", "teacher", "--teachers", "DEEPLAB"], ["--init teacher", "no teacher is a SegFormer"]),
    "no teachers": (distill.main, [], ["--teachers out/deep_lab.pth", "no such file"]),
    "cache and features": (distill.main, ["--cache-teachers", "--feature", "1", "--teachers", "DEEPLAB"], ["--cache-teachers", "--feature"]),
    "bench of features": (distill.main, ["--bench", "--feature", "1"], ["--bench", "--feature"]),
    "no checkpoints": (evaluate.main, ["nowhere.pth"], ["nowhere.pth", "no such file"]),
    "ensemble of the wrong length": (evaluate.main, ["DEEPLAB", "--ensemble", "--teacher-weights", "1:2"], ["--teacher-weights 1:2"]),
    "no such split": (evaluate.main, ["DEEPLAB", "--split", "nowhere"], ["nowhere"]),
    "no such image": (infer.main, ["nowhere.png", "--checkpoint", "DEEPLAB"], ["nowhere.png"]),
    "no image at all": (infer.main, [], ["nothing to do"]),
    "export of an unknown kind": (infer.main, ["--export", "student.pth", "--checkpoint", "STUDENT"], ["--export student.pth", ".onnx"]),
    "calibration without 8 bits": (infer.main, ["--export", "a.onnx", "--calibrate", "FOLDER", "--checkpoint", "STUDENT"], ["--calibrate", ".int8.onnx"]),
    "shape without an export": (infer.main, ["FOLDER", "--shape", "64x96", "--checkpoint", "STUDENT"], ["--shape 64x96", "--export"]),
    "shape": (infer.main, ["--export", "a.onnx", "--shape", "100x100", "--checkpoint", "DEEPLAB"], ["--shape 100x100"]),
    "int8 with no such images": (infer.main, ["--export", "a.int8.onnx", "--shape", "64x96", "--checkpoint", "STUDENT", "--calibrate", "nowhere",
                                                "--data", "SCENES"], ["nowhere"]),
    "int8 with no such split": (infer.main, ["--export", "a.int8.onnx", "--shape", "64x96", "--checkpoint", "STUDENT", "--calibrate", "SCENES",
                                             "--data", "SCENES", "--split", "zz"], ["zz"]),
    "name too long": (infer.main, [300 * "a" + ".png", "--checkpoint", "DEEPLAB"], ["aaa"]),
    "int8 without images": (infer.main, ["--export", "a.int8.onnx", "--checkpoint", "DEEPLAB"], ["--calibrate"]),
    "images and an export": (infer.main, ["a.png", "--export", "a.onnx", "--checkpoint", "DEEPLAB"], ["--export a.onnx", "a.png"]),
    "another class table": (infer.main, ["FOLDER", "--checkpoint", "DEEPLAB", "--classes", "OWN"], ["10 classes, the class table 3", "--classes"]),
    "checkpoint is a folder": (infer.main, ["FOLDER", "--checkpoint", "FOLDER"], ["is a folder"]),
    "nothing under --out": (evaluate.main, ["--out", "nowhere"], ["--out nowhere", "best_student.pth"]),
    "folder without images": (infer.main, ["FOLDER", "--checkpoint", "DEEPLAB"], ["without images"]),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flag_is_one_line(case, scenes, trained, tmp_path, monkeypatch, fails):
    main, argv, words = BAD_FLAGS[case]
    (tmp_path / "empty").mkdir()
    (tmp_path / "own.json").write_text(json.dumps(CLASSES[:3]))
    words_for = {"OWN": "own.json", "DEEPLAB": trained[1][0], "STUDENT": str(trained[0] / "best_student.pth"), "FOLDER": str(tmp_path / "empty"), "SCENES": str(scenes)}
    argv = [words_for.get(word, word) for word in argv]
    monkeypatch.chdir(tmp_path)
    extra = [] if main is infer.main else ["--data", str(scenes)] if "--data" not in argv else []
    extra += ["--init", "random", "--size", "64", "--out", "out"] if main in (distill.main, train_teacher.main) else []
    fails(main, [*extra, *argv], *words)
    assert not list(tmp_path.glob("**/*.pth")) and not list(tmp_path.glob("*.onnx"))


CLASSES = [{"name": f"c{n}", "id": n, "color": [n, n, n]} for n in range(256)]
BAD_CLASSES = {
    "bad json": ("[{", ["not a readable JSON"]), "no list": ("{}", ["no list"]), "one class": (CLASSES[:1], ["holds 1"]),
    "256 classes": (CLASSES, ["holds 256"]), "duplicate ids": ([CLASSES[0], {**CLASSES[1], "id": 0}], ["id 0 occurs twice"]),
    "duplicate names": ([CLASSES[0], {**CLASSES[1], "name": "c0"}], ["'c0' occurs twice"]),
    "missing keys": ([CLASSES[0], {"name": "a", "id": 3}], ["entry 1", "color"]),
    "two lines": ([CLASSES[0], {**CLASSES[1], "name": "a\nb"}], ["one line of text"]), "deep": (100_000 * "[", ["not a readable JSON"]),
    "id out of range": ([CLASSES[0], {**CLASSES[1], "id": 70000}], ["70000"]), "bad colour": ([CLASSES[0], {**CLASSES[1], "color": "red"}], ["red"]),
}


@pytest.mark.parametrize("case", BAD_CLASSES)
def test_bad_class_table_is_one_line(case, scenes, tmp_path, fails):
    content, words = BAD_CLASSES[case]
    (tmp_path / "c.json").write_text(content if isinstance(content, str) else json.dumps(content))
    fails(train_teacher.main, ["--data", str(scenes), "--classes", str(tmp_path / "c.json"), *B0, "--out", str(tmp_path / "o")], "--classes", "c.json", *words)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickle_with_code_is_refused_without_running_it(tmp_path, scenes, fails):
    with open(tmp_path / "evil.pth", "wb") as file:
        pickle.dump({"model_state_dict": Payload(tmp_path / "ran")}, file)
    torch.save({"model_state_dict": Payload(tmp_path / "ran")}, tmp_path / "evil2.pth")
    image = str(next((scenes / "val" / "Color_Images").iterdir()))
    for name in ("evil.pth", "evil2.pth"):
        fails(infer.main, [image, "--checkpoint", str(tmp_path / name)], name, "not run")
    assert not (tmp_path / "ran").exists()


def test_bad_checkpoints_are_one_line(trained, tmp_path, scenes, fails):
    good = trained[0] / "best_student.pth"
    (tmp_path / "cut.pth").write_bytes(good.read_bytes()[:100_000])
    (tmp_path / "text.pth").write_text("hello")
    torch.save({"a": 1}, tmp_path / "dict.pth")
    content = torch.load(good, weights_only=True)
    torch.save({**content, "arch": "deeplab"}, tmp_path / "arch.pth")
    torch.save({**content, "classes": data.DESERT[:5]}, tmp_path / "classes.pth")
    torch.save({**content, "image_size": "x"}, tmp_path / "image.pth")
    torch.save({**content, "val_iou": [1]}, tmp_path / "iou.pth")
    image = str(next((scenes / "val" / "Color_Images").iterdir()))
    for name, word in (("cut.pth", "damaged"), ("text.pth", "no checkpoint"), ("dict.pth", "no state dict"),
                       ("arch.pth", "holds segformer-b1, not deeplab"), ("classes.pth", "10 classes, the class table 5"), ("image.pth", "image_size 'x'"), ("iou.pth", "val_iou [1]")):
        fails(infer.main, [image, "--checkpoint", str(tmp_path / name)], name, word)
        fails(evaluate.main, [str(tmp_path / name), "--data", str(scenes)], name, word)
    (tmp_path / "c.json").write_text(json.dumps(data.DESERT))
    fails(evaluate.main, [str(tmp_path / "classes.pth"), "--data", str(scenes), "--classes", str(tmp_path / "c.json")], "10 classes, the class table 5")


def test_image_above_pillows_limit_is_one_line(copy_of, tmp_path, monkeypatch, fails):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 15_000)    # Pillow warns above it and refuses twice as much
    fails(train_teacher.main, ["--data", str(copy_of), *B0, "--out", str(tmp_path / "o")], "scene", "pixels", "Pillow's limit")


def test_dead_worker_is_one_line(scenes, tmp_path, fails):
    code = "import os, sys, data, train_teacher\nonce = data.Pairs.crop\n" \
           "def crop(self, *a):\n    os._exit(1)\ndata.Pairs.crop = crop; train_teacher.main(sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", code, "--data", str(scenes), *B0, "--workers", "1", "--out", str(tmp_path)], capture_output=True,
                          text=True, cwd=HERE, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr and done.stderr.count("error: a data worker died") == 1


def test_unreadable_folder_is_one_line(scenes, tmp_path, monkeypatch, fails):
    once = Path.iterdir

    def iterdir(self):                                        # root may read everything, so that permissions prove nothing
        if self.name == "Segmentation":
            raise PermissionError(13, "Permission denied", str(self))
        return once(self)
    monkeypatch.setattr(Path, "iterdir", iterdir)
    fails(train_teacher.main, ["--data", str(scenes), *B0, "--out", str(tmp_path / "o")], "Segmentation", "Permission denied")


def test_unusable_out_is_one_line(scenes, trained, tmp_path, fails):
    (tmp_path / "file").write_text("")
    student = str(trained[0] / "best_student.pth")
    image = str(next((scenes / "val" / "Color_Images").iterdir()))
    fails(infer.main, [image, "--checkpoint", student, "--out", str(tmp_path / "file")], "file", "cannot be written", status=1)
    fails(infer.main, ["--export", str(tmp_path / "file"), "--checkpoint", student], "is a file")
    fails(data.main, ["--data", str(scenes), "--out", str(tmp_path / "file")], "file", "cannot be written", status=1)
    fails(train_teacher.main, ["--data", str(scenes), *B0, "--out", str(tmp_path / "file" / "sub")], "--out", "choose another folder")


def test_names_with_spaces_and_letters_of_any_kind_work(copy_of, tmp_path):
    for part in ("Color_Images", "Segmentation"):
        for path in (copy_of / "train" / part).iterdir():
            path.rename(path.with_name(f"grüne Wüste {path.name}"))
    _, history = train_teacher.main(["--data", str(copy_of), *B0, "--out", str(tmp_path / "aus gabe ü"), "--steps", "1"])
    assert history and (tmp_path / "aus gabe ü" / "segformer-b0.pth").exists()


# ---------------------------------------------------------------------------------------------- finding data, the project itself
def test_data_is_found_here_or_under_kaggle_or_not_at_all(tmp_path, monkeypatch, fails):
    monkeypatch.chdir(tmp_path)
    line = fails(train_teacher.main, B0, data.ROOT_NAME, "--data", "--demo")
    assert "/kaggle/input" in line
    (tmp_path / "k" / data.ROOT_NAME / data.ROOT_NAME / "train").mkdir(parents=True)
    once = data.Path
    monkeypatch.setattr(data, "Path", lambda *p: once(*("k" if q == "/kaggle/input" else q for q in p)))
    assert data.find_data() == Path("k") / data.ROOT_NAME / data.ROOT_NAME
    (tmp_path / data.ROOT_NAME / "train").mkdir(parents=True)
    assert data.find_data() == Path(data.ROOT_NAME)


def test_nothing_happens_at_import_and_a_notebooks_argv_is_not_read(tmp_path):
    code = "import sys; sys.argv = ['kernel', '-f', 'x.json']\nimport data, models, losses, evaluate, train_teacher, distill, infer\n" \
           "try:\n    distill.main()\nexcept SystemExit as stop:\n    print('status', stop.code)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True, env={**os.environ, "PYTHONPATH": str(HERE)})
    assert done.stdout == "status 2\n" and "no data set" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", [data, train_teacher, distill, evaluate, infer])
def test_help_fits_and_every_flag_is_read(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "example: python" in text and len(text.splitlines()) <= 100
    source = "".join((HERE / f"{name}.py").read_text() for name in ("data", "train_teacher", "distill", "evaluate", "infer"))
    for flag in set(re.findall(r"--([a-zA-Z][\w-]*)", text)) - {"help"}:
        name = flag.replace("-", "_")
        assert re.search(rf"args\.{name}\b", source) or flag in ("data", "demo", "overwrite"), flag


def test_imports_go_one_way():
    order = ["data", "models", "losses", "evaluate", "train_teacher", "distill"]
    for n, name in enumerate(order):
        found = set(re.findall(r"^(?:from|import) (\w+)", (HERE / f"{name}.py").read_text(), re.MULTILINE))
        assert not found & {*order[n + 1:], "infer"}, name
    source = "".join((HERE / f"{name}.py").read_text() for name in [*order, "infer"])
    assert source.count("torch.load(") == len(re.findall(r"torch\.load\([^)]*weights_only=True\)", source)) > 0


# ---------------------------------------------------------------------------------------------- real pairs
@real
def test_real_pairs_are_what_the_readme_says():
    for split, count in (("train", 203), ("val", 33)):
        found = data.Pairs(REAL, split, data.DESERT)
        assert len(found) == count and found.form == "ids" and not found.unknown and (found.counts.sum(0) > 0).all()
        assert set(found.sizes) == {(960, 540)} and int(found.counts.sum()) == count * 960 * 540


@real
@pytest.mark.slow
def test_real_pairs_train_and_score(tmp_path):
    _, history = train_teacher.main(["--data", REAL, *B0, "--batch-size", "8", "--out", str(tmp_path), "--steps", "40"])
    assert history[-1]["val_iou"]["Sky"] > 0.6 and history[-1]["loss"] < history[0]["loss"]


@real
@pytest.mark.slow
def test_real_images_through_every_script(tmp_path, capsys):
    """DeepLab, SegFormer-B0 and a cached B1 for a few steps, their table with the ensemble, labels and an export."""
    out, common = tmp_path / "out", ["--data", REAL, *TINY, "--steps", "10"]
    train_teacher.main(["--arch", "deeplab", *common, "--out", str(out)])
    train_teacher.main(["--arch", "segformer-b0", *common, "--out", str(out)])
    teachers = [str(out / "deep_lab.pth"), str(out / "segformer-b0.pth")]
    _, history = distill.main([*common, "--out", str(out), "--teachers", *teachers, "--cache-teachers"])
    assert history[-1]["soft"] > 0 and history[-1]["soft_clamped"] == 0
    student = str(out / "best_student.pth")
    rows = evaluate.main([*teachers, student, "--data", REAL, "--ensemble", "--out", str(out)])
    assert [row["name"] for row in rows] == ["deep_lab", "segformer-b0", "best_student", "ensemble"] and rows[0]["iou"]["Sky"] > 0.3
    path = data.find_pairs(REAL, "val")[0][0]
    infer.main([str(path), "--checkpoint", student, "--out", str(out / "p")])
    assert Image.open(out / "p" / f"{path.stem}_mask.png").size == (960, 540)
    infer.main(["--export", str(out / "hf"), "--checkpoint", student])
    assert transformers.AutoModelForSemanticSegmentation.from_pretrained(out / "hf").config.id2label[9] == "Sky"
