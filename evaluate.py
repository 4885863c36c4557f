"""Scores that can be compared: one confusion matrix for a whole split, at the masks' own resolution.

    python evaluate.py                                        # the teachers and the student in outputs/
    python evaluate.py CKPT ... --data DIR --split val --ensemble

Prints parameters, GMACs and mIoU with its 95 % interval over the images, speed measured side by side, and
IoU, precision and recall by class. A class that no mask holds is n/a: it counts as 0 in the mIoU over all
classes, and is left out of the mIoU over the classes present. Both are printed.

Measured: four networks and an ensemble on 33 pairs of 960x540 at --size 128, with speed: 0.7 minutes on two
CPU cores in bf16.

Letters: C classes, H W sides of a stored mask. Rows of a confusion matrix are the truth, columns predictions.
"""
import copy
import functools
import json
import math
import re
import statistics
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
from data import InputError
from models import (TEACHER_NAMES, Ensemble, add_model_flags, amp_dtype, compute_logits, describe_device,
                    ensemble_weights, load_models, optimize_for_inference, parse_tta, pick_device, predict,
                    upsampled_labels, weights_file)


# ------------------------------------------------------------ scores
def confusion_matrix(pred, target, num_classes):
    """(H, W) predicted and true class indices -> (C, C) int64 pixel counts; ignored pixels do not count."""
    valid = target != data.IGNORE
    pairs = target[valid].long() * num_classes + pred[valid].long()
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def compute_scores(confusion, classes):
    """(C, C) -> {"miou", "miou_present", "miou_union", "pixel_accuracy", "iou", "precision", "recall"}.

    The last three are {class name: value}, None for a class that no mask holds. miou: over all classes, where
    such a class counts as 0; miou_present: without them; miou_union: over the classes that a mask or a
    prediction holds, which is what transformers and mmsegmentation print."""
    counts = confusion.cpu().double()                         # on the CPU first: MPS has no float64
    hits, truth, predicted = counts.diag(), counts.sum(1), counts.sum(0)
    union = int((truth + predicted > 0).sum())
    by_class = {"iou": hits / (truth + predicted - hits), "precision": hits / predicted.clamp(min=1),
                "recall": hits / truth.clamp(min=1)}
    scores: dict = {}
    for key, values in by_class.items():
        scores[key] = {}
        for entry, value, pixels in zip(classes, values.tolist(), truth.tolist(), strict=True):
            scores[key][entry["name"]] = value if pixels else None
    present = [value for value in scores["iou"].values() if value is not None]
    return {"miou": sum(present) / len(classes), "miou_present": sum(present) / max(1, len(present)),
            "miou_union": sum(present) / max(1, union),
            "pixel_accuracy": float(hits.sum() / counts.sum().clamp(min=1)), **scores}


def bootstrap(confusions, draws=1000):
    """How far the mIoU depends on the images that happened to be in the split.

    confusions: (R, N, C, C) of R networks on N images. The images are drawn N times with replacement, the
    same for all networks. Returns [(low, high)], 95 % of the mIoU over the classes present, and [(low,
    high)], 95 % of its difference to the first network's."""
    counts = confusions.double()
    n = counts.shape[1]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(torch.ones(draws, n), n, replacement=True, generator=generator)
    times = torch.zeros(draws, n, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn).double())
    hits, truth, predicted = counts.diagonal(dim1=2, dim2=3), counts.sum(3), counts.sum(2)       # (R, N, C)
    hits, truth, predicted = times @ hits, times @ truth, times @ predicted  # (R, draws, C)
    present = truth > 0
    iou = (hits / (truth + predicted - hits).clamp(min=1)).where(present, 0)
    miou = iou.sum(2) / present.sum(2).clamp(min=1)                                              # (R, draws)
    edges = torch.tensor([0.025, 0.975], dtype=torch.float64)
    return [miou.quantile(edges, 1).T.tolist(), (miou - miou[0]).quantile(edges, 1).T.tolist()]


def evaluate(model, split, size, dtype=None, workers=0, indices=None, see_logits=None):
    """The (C, C) confusion matrix of a network over a split.

    model: from optimize_for_inference; indices: of the images, where not all of the split is meant;
    see_logits: called for each image with its (1, C, h, w) logits and (1, H, W) int64 target."""
    classes = len(split.classes)
    device = next(model.parameters()).device
    confusion = torch.zeros(classes, classes, dtype=torch.int64, device=device)
    for _, target, (pred,), (z,) in predict_split([(model, [size], False)], split, dtype, workers, indices):
        confusion += confusion_matrix(pred, target, classes)
        if see_logits:
            see_logits(z, target[None].long())
    return confusion


def predict_split(networks, split, dtype=None, workers=0, indices=None):
    """Yields (index, (H, W) target, [(H, W) pred of each network], [its (1, C, h, w) logits]) of a split, on
    the networks' device. The labels are predict()'s.

    networks: [(model, sizes of its images, whether to add the mirrored ones)], see compute_logits."""
    device = next(networks[0][0].parameters()).device
    sizes = sorted({size for _, own, _ in networks for size in own})  # each image is resized once for each
    indices = range(len(split)) if indices is None else indices
    dataset = data.EvalDataset(split, sizes)
    for index, images, target in data.load(dataset, indices, workers, device.type == "cuda"):
        logits = []
        for model, own, flip in networks:
            scaled = [images[sizes.index(size)] for size in own]
            logits.append(compute_logits(model, scaled, dtype, flip))
        yield index, target.to(device), [upsampled_labels(z, target.shape)[0] for z in logits], logits


# ------------------------------------------------------------ speed
def time_interleaved(calls, device, seconds=1.5, least=5):
    """Milliseconds of each call, [(median, lowest, highest)].

    The calls are run in turn, so that a machine that slows down slows all of them."""
    for call in calls:                                        # warm-up
        call()
    times: list = [[] for _ in calls]
    end = time.perf_counter() + seconds * len(calls)
    while len(times[0]) < least or (time.perf_counter() < end and len(times[0]) < 100):
        for call, own in zip(calls, times, strict=True):
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            own.append(1000 * (time.perf_counter() - start))
    return [(statistics.median(own), min(own), max(own)) for own in times]


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@torch.no_grad()
def count_gmacs(model, side=512):
    """Multiply-adds of one forward of side x side, in 1e9: matrix products, convolutions, attention."""
    x = torch.zeros(1, 3, side, side, device=next(model.parameters()).device)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(x)
    return counter.get_total_flops() / 2e9


# ------------------------------------------------------------ the command
def main(argv=()):
    args = make_parser().parse_args(argv)
    device = pick_device(args.device)
    dtype = amp_dtype(args.amp, device)
    checkpoints, split = open_inputs(args)
    print(split.describe())
    rows, networks = make_rows(args, checkpoints, device, dtype)
    score_rows(args, rows, networks, split, dtype)
    print(f"speed: batch 1, {describe_device(device, dtype)}, median of interleaved runs\n", flush=True)
    sizes = measure_speed(rows, networks, split, device, dtype)
    print_table(rows, split.classes, sizes)
    worst = f", {args.out}/worst_NAME/" if args.save_worst else ""
    print(f"images: {args.out}/miou.png, {args.out}/confusion_NAME.png{worst}")
    if args.json:
        content = {"split": args.split, "pairs": len(split), "device": device.type, "models": rows}
        data.write_atomic(args.json, json.dumps(content, indent=1).encode())
    return rows


def make_rows(args, checkpoints, device, dtype):
    """One row of the table for each checkpoint and the ensemble, and for each row its network.

    checkpoints: [(path, model, meta)]; returns ([row], [(model, sizes, flip)]), see predict_split. With --tta
    each row is followed by one for the mean over the mirrored and scaled images."""
    scales, flip = args.tta or ([1], False)
    plain = []                                                # [(row, model, size, GMACs with --tta)]
    stems = [Path(path).stem for path, _, _ in checkpoints]
    for (path, model, meta), stem in zip(checkpoints, stems, strict=True):
        counted = optimize_for_inference(copy.deepcopy(model))
        gmacs = [count_gmacs(counted, data.eval_size(512, 512, 512 * scale)[0]) for scale in scales]
        row = {"name": stem if stems.count(stem) == 1 else str(path),
               "params": sum(p.numel() for p in model.parameters()),
               "size": weights_file(path).stat().st_size, "gmacs": gmacs[0]}
        model = optimize_for_inference(model.to(device), dtype)
        plain.append((row, model, args.size or meta["size"], (1 + flip) * sum(gmacs)))
    if args.ensemble:
        members = [n for n, stem in enumerate(stems) if not stem.startswith(("best_student", "student"))]
        if not members:
            raise InputError("--ensemble: all checkpoints are students; name the teachers too")
        weights = ensemble_weights(args.teacher_weights, [checkpoints[n][2] for n in members])
        member_rows, models, sizes, tta_gmacs = zip(*(plain[n] for n in members), strict=True)
        row = {key: sum(row[key] for row in member_rows) for key in ("params", "size", "gmacs")}
        plain.append(({"name": "ensemble", **row}, Ensemble(models, weights).to(device), sizes[0],
                      sum(tta_gmacs)))
    rows, networks = [], []
    for row, model, size, gmacs in plain:
        rows.append(row)
        networks.append((model, [size], False))
        if args.tta:
            rows.append({**row, "name": f"{row['name']} + tta", "gmacs": gmacs})
            networks.append((model, [size * scale for scale in scales], flip))
    names = [file_name(row) for row in rows]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two networks would write {args.out}/confusion_{name}.png; name each once, "
                             "or rename a checkpoint")
    return rows, networks


def score_rows(args, rows, networks, split, dtype):
    """One pass over the split for all rows: adds the scores to `rows` and writes the pictures."""
    classes = split.classes
    confusions = torch.zeros(len(rows), len(split), len(classes), len(classes), dtype=torch.int64)
    worst: list = [[] for _ in rows]                          # [(mIoU of the image, index, pred)] of each row
    agreeing, pixels = [0] * len(rows), 0
    ensemble = [row["name"] for row in rows].index("ensemble") if args.ensemble else None
    predictions = predict_split(networks, split, dtype, args.workers)
    for index, target, preds, _ in data.progress_bar(predictions, "scoring", len(split)):
        pixels += target.numel()
        for n, pred in enumerate(preds):
            confusion = confusion_matrix(pred, target, len(classes)).cpu()
            confusions[n, index] = confusion
            if ensemble is not None:
                agreeing[n] += int((pred == preds[ensemble]).sum())
            if args.save_worst and confusion.any():
                worst[n].append((compute_scores(confusion, classes)["miou_present"], index, pred.cpu()))
                worst[n] = sorted(worst[n], key=lambda entry: entry[:2])[:args.save_worst]
    intervals, differences = bootstrap(confusions)
    for n, row in enumerate(rows):
        confusion = confusions[n].sum(0)
        row.update(compute_scores(confusion, classes), interval=intervals[n], difference=differences[n])
        chart = draw_confusion(confusion, classes, f"{row['name']}, {split.name}")
        data.save_image(Path(args.out) / f"confusion_{file_name(row)}.png", chart)
        save_worst(Path(args.out) / f"worst_{file_name(row)}", worst[n], split)
    bars = [(row["name"], row["miou_present"], *row["interval"]) for row in rows]
    title = f"mIoU of the classes in {split.name}, and its 95 % interval over {len(split)} images"
    data.save_image(Path(args.out) / "miou.png", draw_bars(bars, title))
    if ensemble is not None:
        for row, count in zip(rows, agreeing, strict=True):
            row["to_ensemble"] = row["miou"] - rows[ensemble]["miou"]
            row["agreement"] = count / pixels


def measure_speed(rows, networks, split, device, dtype):
    """Adds ms and FPS of predict() to `rows`, at 512x512 and the first image's size; returns both."""
    width, height = data.eval_size(*split.sizes[0], networks[0][1][0])
    sizes = [(512, 512), (height, width)]
    for row in rows:
        row["speed"] = []
    for h, w in sizes:
        calls = []
        for model, own, flip in networks:
            # eval_size keeps the order of the sides that it is given
            sides = [data.eval_size(h, w, min(h, w) * size / own[0]) for size in own]
            images = [torch.zeros(1, 3, *side, dtype=torch.uint8, device=device) for side in sides]
            calls.append(functools.partial(predict, model, images, (h, w), dtype, flip))
        for row, (ms, low, high) in zip(rows, time_interleaved(calls, device), strict=True):
            row["speed"].append({"height": h, "width": w, "ms": ms, "lowest": low, "highest": high,
                                 "fps": 1000 / ms})
    for row in rows:
        row["ms"], row["fps"] = row["speed"][0]["ms"], row["speed"][0]["fps"]
    return sizes


# ------------------------------------------------------------ the table
def print_table(rows, classes, sizes):
    """Size and scores, then speed, then IoU, precision and recall by class."""
    scores = [("miou", "mIoU", ".4f"), ("miou_present", "present", ".4f"), ("miou_union", "union", ".4f"),
              ("pixel_accuracy", "pixel acc", ".4f"), ("to_ensemble", "to ensemble", "+.4f"),
              ("agreement", "agreement", ".4f")]
    scores = [score for score in scores if score[0] in rows[0]]
    lines = [["model", "params M", "GMACs", "MB", *(title for _, title, _ in scores)]]
    lines[0] += ["95 %", "to the first, 95 %"]
    for row in rows:
        lines.append([row["name"], f"{row['params'] / 1e6:.1f}", f"{row['gmacs']:.1f}",
                      f"{row['size'] / 1e6:.1f}"])
        lines[-1] += [format(row[key], form) for key, _, form in scores]
        difference = row["miou_present"] - rows[0]["miou_present"]
        (low, high), (least, most) = row["interval"], row["difference"]
        lines[-1] += [f"{low:.3f}-{high:.3f}",
                      "" if row is rows[0] else f"{difference:+.3f} ({least:+.3f} to {most:+.3f})"]
    print_columns(lines)

    lines = [["speed"]]
    for h, w in sizes:
        lines[0] += [f"{h}x{w}: ms", "spread", "FPS"]
    lines[0].append("both <50 ms")
    for row in rows:
        lines.append([row["name"]])
        for speed in row["speed"]:
            lines[-1] += [f"{speed['ms']:.1f}", f"{speed['lowest']:.1f}-{speed['highest']:.1f}",
                          f"{speed['fps']:.1f}"]
        lines[-1].append("yes" if all(speed["ms"] < 50 for speed in row["speed"]) else "no")
    print_columns(lines)

    lines = [["IoU / precision / recall", *(row["name"] for row in rows)]]
    for name in data.class_names(classes):
        lines.append([name])
        for row in rows:
            values = [row[key][name] for key in ("iou", "precision", "recall")]
            lines[-1].append("n/a" if None in values else " / ".join(f"{value:.3f}" for value in values))
    print_columns(lines)


def print_columns(lines):
    """Prints lists of cells in columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *cells in lines:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *padded]).rstrip())
    print()


# ------------------------------------------------------------ pictures
INK, PAPER, GRID = (30, 30, 30), (255, 255, 255), (225, 225, 225)
LINE_COLORS = [(31, 119, 180), (214, 39, 40), (44, 160, 44), (255, 127, 14), (148, 103, 189),
               (140, 86, 75), (227, 119, 194), (23, 190, 207)]
font = ImageFont.load_default                                 # font(size in pixels)


def draw_confusion(confusion, classes, title):
    """A confusion matrix in % of each row, with names and numbers."""
    count = len(classes)
    share = (confusion / confusion.sum(1, keepdim=True).clamp(min=1)).tolist()
    cell, margin = max(16, min(48, 900 // count)), 150
    title += ": row truth, column prediction, in % of the row"
    side = margin + count * cell + 10
    image = Image.new("RGB", (max(side, int(font(14).getlength(title)) + 24), side + 24), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((8, 6), title, INK, font(14))
    top = margin + 24
    for row, name in enumerate(data.class_names(classes)):
        y, middle = top + row * cell, top + (row + 0.5) * cell
        draw.text((margin - 8, middle), name[:24], INK, font(15), anchor="rm")
        upright = Image.new("RGB", (margin, cell), PAPER)
        ImageDraw.Draw(upright).text((4, cell / 2), name[:24], INK, font(15), anchor="lm")
        image.paste(upright.rotate(90, expand=True), (margin + row * cell, 24))
        for column in range(count):
            value, x = share[row][column], margin + column * cell
            shade = tuple(int(255 - value * (255 - v)) for v in (20, 90, 160))
            draw.rectangle((x, y, x + cell - 2, y + cell - 2), shade)
            if value >= 0.005:
                ink = PAPER if value > 0.6 else INK
                draw.text((x + cell / 2, middle), f"{100 * value:.0f}", ink, font(cell // 3), anchor="mm")
        if not confusion[row].sum():
            draw.text((margin + 6, middle), "n/a: in no mask", INK, font(14), anchor="lm")
    return image


def draw_bars(rows, title):
    """A chart of horizontal bars with their intervals: rows is [(name, value, low, high)]."""
    left, right, height = 24 + max(int(font(15).getlength(name)) for name, *_ in rows), 560, 30
    image = Image.new("RGB", (left + right + 90, height * len(rows) + 50), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((10, 10), title, INK, font(16))
    scale = right / max(1e-9, *(high for *_, high in rows))
    for n, (name, value, low, high) in enumerate(rows):
        y = 40 + height * n
        draw.text((left - 8, y + 10), name, INK, font(15), anchor="rm")
        draw.rectangle((left, y, left + scale * value, y + 20), LINE_COLORS[0])
        draw.line((left + scale * low, y + 10, left + scale * high, y + 10), INK, 2)
        for edge in (low, high):
            draw.line((left + scale * edge, y + 5, left + scale * edge, y + 15), INK, 2)
        draw.text((left + scale * high + 8, y + 10), f"{value:.3f}", INK, font(15), anchor="lm")
    return image


def draw_curves(history, classes, parts):
    """Epoch records -> a picture of loss and parts, mIoU, IoU by class, alpha and learning rate."""
    epochs = [record["epoch"] for record in history]
    top_lr = max(record["lr"] for record in history)

    def series(key):
        return [record.get(key) for record in history]

    by_class = {}
    for name in data.class_names(classes):
        by_class[name] = [(record.get("val_iou") or {}).get(name) for record in history]
    rates = [record["lr"] / top_lr for record in history]
    image = Image.new("RGB", (1400, 900), PAPER)
    draw = ImageDraw.Draw(image)
    draw_panel(draw, 0, 0, "loss and its parts", epochs,
               {**{key: series(key) for key in ("loss", *parts)}, "validation loss": series("val_loss")})
    draw_panel(draw, 700, 0, "validation mIoU and pixel accuracy", epochs,
               {"mIoU": series("val_miou"), "pixel accuracy": series("val_pixel_accuracy")})
    darker = [tuple(v * 3 // 4 for v in entry["color"]) for entry in classes]  # pale ones cannot be seen
    draw_panel(draw, 0, 450, "validation IoU by class", epochs, by_class, darker)
    draw_panel(draw, 700, 450, "alpha and learning rate", epochs,
               {"alpha": series("alpha"), f"lr / {top_lr:.1e}": rates})
    return image


def draw_panel(draw, x, y, title, epochs, series, colors=LINE_COLORS):
    """One line chart of 700x450 pixels at (x, y): series is {name: [value or None for each epoch]}."""
    left, top, right, bottom = x + 64, y + 34, x + 510, y + 420
    draw.text((left, y + 6), title, INK, font(18))
    known = [value for values in series.values() for value in values if value is not None]
    if not known:
        return
    low, high = min(0, *known), max(*known, 1e-9)
    step = 10 ** math.floor(math.log10(high - low))           # grid lines at round numbers
    while (high - low) / step < 4:
        step /= 2
    first, last = math.floor(low / step), math.ceil(high / step)

    def place(epoch, value):
        return (left + epoch / epochs[-1] * (right - left),
                bottom - (value / step - first) / (last - first) * (bottom - top))

    for n in range(first, last + 1):
        _, height = place(0, n * step)
        draw.line((left, height, right, height), GRID)
        draw.text((left - 6, height), f"{n * step:.3g}", INK, font(13), anchor="rm")
    draw.text((left, bottom + 6), "0", INK, font(13), anchor="ma")
    draw.text((right, bottom + 6), f"epoch {epochs[-1]}", INK, font(13), anchor="ma")
    row = min(18, (bottom - top) / len(series))               # many classes stand closer
    for n, (name, values) in enumerate(series.items()):
        color = colors[n % len(colors)]
        points = [(epoch, v) for epoch, v in zip(epochs, values, strict=True) if v is not None]
        places = [place(*point) for point in points]
        if len(places) > 1:
            draw.line(places, color, 2)
        for px, py in places:
            draw.ellipse((px - 2, py - 2, px + 2, py + 2), color)
        legend = top + row * n
        draw.rectangle((right + 22, legend + 0.1 * row, right + 34, legend + 0.7 * row), color)
        value = f"{points[-1][1]:.3f}" if points else "n/a"
        draw.text((right + 40, legend), f"{name[:16]} {value}", INK, font(min(13, row)))


def save_worst(folder, worst, split):
    """A sheet of image, truth, prediction and errors for each of `worst`: [(mIoU, index, pred)]."""
    if worst:
        for old in folder.glob("[01].[0-9][0-9][0-9]_*.png"):  # of an earlier evaluation
            old.unlink()
    for score, index, pred in worst:
        image, mask = split.read(index)
        target = torch.from_numpy(mask)
        errors = torch.zeros(*target.shape, 3, dtype=torch.uint8)
        errors[(pred != target) & (target != data.IGNORE)] = torch.tensor([230, 30, 30], dtype=torch.uint8)
        errors[target == data.IGNORE] = 128
        parts = [image, data.overlay(image, mask, split.classes), data.overlay(image, pred, split.classes),
                 Image.blend(image, Image.fromarray(errors.numpy()), 0.7)]
        sheet = Image.new("RGB", (len(parts) * image.width, image.height))
        for n, part in enumerate(parts):
            sheet.paste(part, (n * image.width, 0))
        data.save_image(folder / f"{score:.3f}_{split.pairs[index][0].stem}.png", sheet)


def file_name(row):
    """What a row's files are called: "a + tta" -> "a_tta"."""
    return re.sub(r"[^\w-]+", "_", row["name"])


# ------------------------------------------------------------ flags and checks
def open_inputs(args):
    """([(path, model, meta)], split) of the command line; all networks have the first one's class table."""
    names = [f"{name}.pth" for name in (*TEACHER_NAMES.values(), "best_student")]
    paths = args.checkpoints or [path for name in names if (path := Path(args.out) / name).exists()]
    if not paths:
        raise InputError(f"no checkpoints: none named, and --out {args.out} holds none of {', '.join(names)}")
    classes = data.load_classes(args.classes) if args.classes else None
    checkpoints = load_models(paths, classes)
    classes, root = checkpoints[0][2]["classes"], data.find_data(args.data)
    split = data.Split(root, args.split, classes, args.masks, args.out, val_share=args.val_share)
    return checkpoints, split


def make_parser():
    parser = data.Parser(__doc__, "python evaluate.py outputs/*.pth --ensemble --json scores.json",
                         "%(prog)s [checkpoints] [flags]")
    parser.add_argument("checkpoints", nargs="*", help="without any: the teachers and the student in --out")
    images = data.add_data_flags(parser)
    images.add_argument("--split", default="val", help="folder below --data; . if --data holds Color_Images")
    images.add_argument("--size", type=data.image_side,
                        help="shorter side of what networks see, in pixels; usually that of training")
    images.add_argument("--workers", type=data.number(int, 0, 256), default=min(2, data.count_cores()),
                        help="processes that read files")
    group = add_model_flags(parser)
    group.add_argument("--ensemble", action="store_true",
                       help="add the ensemble of all but best_student*, student*, at the first one's size")
    group.add_argument("--teacher-weights", default="equal", metavar="A:B:..|auto", help="of the ensemble")
    group.add_argument("--tta", type=parse_tta, metavar="flip,0.75,1.25",
                       help="also score the mean over the image, mirrored and at these scales of --size")
    output = parser.add_argument_group("output")
    output.add_argument("--json", metavar="FILE", help="also write the table there, with sizes in bytes")
    output.add_argument("--save-worst", type=data.number(int, 0), default=0, metavar="N",
                        help="pictures of the N images with the lowest scores")
    output.add_argument("--out", metavar="DIR", default="outputs", help="where pictures go")
    return parser


if __name__ == "__main__":
    data.run_command(main)
