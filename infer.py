"""Labels images, and exports a network for use elsewhere.

    python infer.py img.png                      # -> outputs/predictions/img_mask.png, img_overlay.png
    python infer.py folder 'more/*.jpg' --raw --confidence --checkpoint outputs/best_student.pth
    python infer.py folder --checkpoint outputs/deep_lab.pth outputs/best_model.pth       # their ensemble
    ffmpeg -i drive.mp4 -f rawvideo -pix_fmt rgb24 - | python infer.py --stream 960x540 --smooth 0.6 |
        ffmpeg -f rawvideo -pix_fmt rgb24 -s 960x540 -r 30 -i - out.mp4      # -r: drive.mp4's rate
    python infer.py --export student_hf          # a Hugging Face folder (SegFormer only)
    python infer.py --export student.onnx --shape 512x896        # uint8 NCHW images in, uint8 labels out
    python infer.py --export student.int8.onnx --calibrate DIR/train/Color_Images --data DIR

A mask is a palette PNG: viewers show the class colours, np.asarray gives the class indices. The labels are
those of validation: the same reader, the same preprocessing, the same logits.

Measured: 385 ms from a 960x540 file to labels at 512x896, on two CPU cores in bf16; 2.6 times as fast as
transformers' pipeline in fp32 with the same weights; labels equal on 99.98 % of the pixels
(`python -m pytest -m slow -s -k pipeline test_all.py`).
"""
import argparse
import contextlib
import functools
import glob
import importlib
import io
import itertools
import json
import math
import re
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from PIL import Image
from safetensors import SafetensorError
from torch import nn

import data
from data import InputError, RunError
from evaluate import compute_scores, confusion_matrix, print_columns, time_interleaved
from models import (Ensemble, SegFormer, add_model_flags, amp_dtype, compute_logits, ensemble_weights,
                    load_models, optimize_for_inference, parse_tta, pick_device, upsampled_labels,
                    weights_file)


# ------------------------------------------------------------ labelling files
def image_logits(image, model, size, dtype=None, tta=None, tile=False):
    """PIL RGB -> (1, C, h, w) float32 logits at stride 4, of an image whose shorter side is made `size`, or
    see tiled_logits. tta: see models.parse_tta."""
    if tile and min(image.size) > size:                       # else nothing is lost by the usual scale
        window_logits = functools.partial(image_logits, model=model, size=size, dtype=dtype, tta=tta)
        return tiled_logits(image, window_logits, size)
    scales, flip = tta or ([1], False)
    return compute_logits(model, [data.eval_image(image, size * scale) for scale in scales], dtype, flip)


def tiled_logits(image, window_logits, size):
    """PIL RGB with sides above `size` -> (1, C, H / 4, W / 4) float32, H and W rounded up to multiples of 4.

    The scale is the image's own: windows of size x size pixels, a crop as in training, are labelled as they
    are. Right where things are as large in pixels as in training images whose shorter side is `size`, as in
    an aerial image; in a frame of a finer camera they are larger, and --size with more pixels may do better.
    Windows overlap by a quarter or more; their logits are averaged where they meet."""
    width, height = (4 * math.ceil(side / 4) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    lefts, tops = ([*range(0, side - size, 3 * size // 4), side - size] for side in (width, height))
    total, count = 0, torch.zeros(height // 4, width // 4)
    for top, left in itertools.product(tops, lefts):
        z = window_logits(image.crop((left, top, left + size, top + size)))          # (1, C, size/4, size/4)
        if top == left == 0:
            total, count = z.new_zeros(1, z.shape[1], *count.shape), count.to(z.device)
        rows, columns = slice(top // 4, (top + size) // 4), slice(left // 4, (left + size) // 4)
        total[..., rows, columns] += z
        count[rows, columns] += 1
    return total / count


def confidence(z, size):
    """(B, C, h, w) logits -> (B, *size) uint8: 255 times the largest probability, rounded."""
    probs = F.interpolate(z, tuple(size), mode="bilinear", align_corners=False).softmax(1)
    return (255 * probs.amax(1)).round().to(torch.uint8)


def label_files(args, logits, classes, device):
    """Writes mask and overlay of every input. Files that cannot be read are named and skipped.

    logits: a function of a PIL RGB image, see image_logits."""
    out = Path(args.out)
    inputs = find_inputs(args.inputs)
    wanted = {"_mask.png": True, "_overlay.png": not args.no_overlay, "_ids.png": args.raw,
              "_confidence.png": args.confidence}
    stems = output_stems(inputs, out, [ending for ending, given in wanted.items() if given])
    raw_ids = np.array([entry["id"] for entry in classes], np.uint16)
    milliseconds, skipped = [], 0
    bar = data.progress_bar(zip(inputs, stems, strict=True), "labelling", len(inputs))
    for path, stem in bar:
        start = time.perf_counter()
        try:
            image = data.read_image(path)
        except InputError as error:
            bar.clear()                                       # tqdm's own write would draw the bar again
            print(f"error: {error}; skipped", file=sys.stderr)
            skipped += 1
            continue
        z, size = logits(image), image.size[::-1]
        pred = upsampled_labels(z, size)[0].cpu().numpy()
        milliseconds.append(1000 * (time.perf_counter() - start))
        data.save_image(out / f"{stem}_mask.png", data.index_image(pred, classes))
        if not args.no_overlay:
            data.save_image(out / f"{stem}_overlay.png", data.overlay(image, pred, classes))
        if args.raw:
            data.save_image(out / f"{stem}_ids.png", Image.fromarray(raw_ids[pred]))
        if args.confidence:
            grey = Image.fromarray(confidence(z, size)[0].cpu().numpy())
            data.save_image(out / f"{stem}_confidence.png", grey)
    if milliseconds:
        print(f"{len(milliseconds)} image(s) labelled in {out}, {np.median(milliseconds):.0f} ms per image "
              f"from file to labels ({device.type})")
    if skipped:
        raise RunError(f"{skipped} of {len(inputs)} files were skipped, named above")


# ------------------------------------------------------------ labelling a video
def label_stream(args, logits, classes, source, sink):
    """Raw RGB frames from `source` -> overlays, or with --raw-labels class indices, to `sink`, each at once.

    With --smooth s, p = s * p before + (1 - s) * p of the frame, of probabilities at stride 4. Ends with the
    input, or at Ctrl-C; a torn last frame is left out. What it says goes to stderr."""
    width, height = args.stream
    whole, milliseconds, probs = 3 * width * height, [], None
    try:
        while frame := source.read(whole):
            if len(frame) < whole:
                print(f"the last frame is torn and left out: {len(frame)} of {whole} bytes", file=sys.stderr)
                break
            start = time.perf_counter()
            image = Image.frombytes("RGB", (width, height), frame)
            z = logits(image)
            if args.smooth and probs is None:
                probs = z.softmax(1)
            elif args.smooth:
                probs = args.smooth * probs + (1 - args.smooth) * z.softmax(1)
                z = probs.clamp_min(1e-8).log()               # as the mean of an Ensemble
            pred = upsampled_labels(z, (height, width))[0].cpu().numpy()
            sink.write((pred if args.raw_labels else data.overlay(image, pred, classes, False)).tobytes())
            sink.flush()
            milliseconds.append(1000 * (time.perf_counter() - start))
    finally:
        print(f"{len(milliseconds)} frame(s) labelled, {np.median(milliseconds or [0]):.0f} ms per frame "
              f"(median), {max(milliseconds, default=0):.0f} ms at worst", file=sys.stderr)


def find_inputs(names):
    """Files, folders and glob patterns -> a list of image files, each once."""
    suffixes = data.IMAGE_SUFFIXES | {".tif", ".tiff"}
    found = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            inside = [p for p in sorted(path.iterdir()) if p.suffix.lower() in suffixes and p.name[0] != "."]
            if not inside:
                raise InputError(f"{path}: a folder without images ({' '.join(sorted(suffixes))})")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            matches = [Path(match) for match in sorted(glob.glob(name, recursive=True))]
            matches = [match for match in matches if match.is_file()]
            if not matches:
                raise InputError(f"{name}: no such file, folder or pattern")
            found += matches
    return list({path.absolute(): path for path in found}.values())


def output_stems(inputs, out, endings):
    """A stem in `out` for each input: inputs of one name get _2, _3, ...; no output may be an input."""
    stems: list[str] = []
    originals = {path.resolve() for path in inputs}
    for path in inputs:
        stem, count = path.stem, 1
        while stem in stems:
            count += 1
            stem = f"{path.stem}_{count}"
        stems.append(stem)
        for ending in endings:
            if (out / f"{stem}{ending}").resolve() in originals:
                raise InputError(f"--out {out}: {stem}{ending} would overwrite an input; choose another")
    return stems


# ------------------------------------------------------------ what an export says of itself
NVIDIA_LICENCE = "https://github.com/NVlabs/SegFormer/blob/master/LICENSE"


def may_be_nvidias(meta):
    """Whether a network began with the weights of nvidia/mit-bN; also where nothing says it did not."""
    args = meta.get("args")
    init = args.get("init") if isinstance(args, dict) else None
    return meta["arch"].startswith("segformer") and init != "random"


def licence_note(meta):
    if not may_be_nvidias(meta):
        return "no licence of others is known"
    return ("began, or may have begun, with weights of nvidia/mit-bN, whose licence is non-commercial: "
            f"{NVIDIA_LICENCE}")


def onnx_facts(meta, size, kind):
    """{key: text} for the metadata_props of an ONNX file. size: "HxW" or "dynamic"; kind: see --input."""
    form = {"uint8": "uint8 RGB, (B, 3, H, W), 0 to 255",
            "float": "float32 RGB, (B, 3, H, W), (value / 255 - mean) / std"}
    return {"classes": json.dumps(meta["classes"]), "mean": json.dumps(data.MEAN),
            "std": json.dumps(data.STD), "size": size, "input": form[kind], "arch": meta["arch"],
            "licence": licence_note(meta)}


# ------------------------------------------------------------ export to Hugging Face
CARD_MARK = "<!-- infer.py writes over this file; delete this line to keep your own text -->"
CARD = """---
library_name: transformers
pipeline_tag: image-segmentation
{licence}tags:
- segformer
- semantic-segmentation
---
{mark}

# {name}

{arch}, {count} classes, trained on crops of {size}; the processor resizes images to {height}x{width}
(height x width). Validation mIoU {miou}, after epoch {epoch}. Licence: {note}.

| class | name | id | colour (RGB) | validation IoU |
|---|---|---|---|---|
{rows}

```python
from transformers import pipeline

segments = pipeline("image-segmentation", model={name!r})("image.png")   # a label and its mask each
```
"""


def model_card(meta, name, height, width):
    """The README.md of a Hugging Face folder. name: as from_pretrained takes it."""
    def score(value, missing="unknown"):
        return f"{value:.4f}" if isinstance(value, float) else missing
    rows, missing = [], "n/a" if meta["val_iou"] else "unknown"
    for n, entry in enumerate(meta["classes"]):
        title, colour = entry["name"].replace("|", r"\|"), ", ".join(map(str, entry["color"]))
        iou = score(meta["val_iou"].get(entry["name"]), missing)
        rows.append(f"| {n} | {title} | {entry['id']} | {colour} | {iou} |")
    licence = f"license: other\nlicense_name: nvidia-source-code-license\nlicense_link: {NVIDIA_LICENCE}\n"
    # load_model fills in a size where a file from elsewhere has none
    size = f"{meta['size']}x{meta['size']} pixels" if "args" in meta else "unknown size"
    return CARD.format(licence=licence if may_be_nvidias(meta) else "", mark=CARD_MARK, name=name,
                       arch=meta["arch"], count=len(rows), size=size, height=height, width=width,
                       note=licence_note(meta), miou=score(meta.get("val_miou")),
                       epoch=meta.get("epoch", "unknown"), rows="\n".join(rows))


def export_folder(model, meta, folder, height, width, name):
    """config.json with label names, weights in safetensors, preprocessor_config.json for height x width, and
    README.md; name: see model_card."""
    if folder.is_file() or folder.suffix in (".pth", ".pt", ".bin", ".safetensors"):
        raise InputError(f"--export {folder}: is a file or named like one; name a folder, FILE.onnx or "
                         "FILE.int8.onnx")
    if not isinstance(model, SegFormer):
        raise InputError(f"--export {folder}: only SegFormer has a Hugging Face form; export others to a "
                         ".onnx file")
    stock = transformers.SegformerForSemanticSegmentation(model.config)
    stock.load_state_dict(model.state_dict())
    processor = transformers.SegformerImageProcessor(
        size={"height": height, "width": width}, do_reduce_labels=False, image_mean=list(data.MEAN),
        image_std=list(data.STD))
    transformers.logging.disable_progress_bar()
    try:
        stock.save_pretrained(folder)
        processor.save_pretrained(folder)
        # safetensors writes for the owner's eyes only
        (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)
        card = folder / "README.md"
        if not card.exists() or CARD_MARK in card.read_text("utf-8", "replace"):
            data.write_atomic(card, model_card(meta, name, height, width).encode())
        else:
            print(f"{card}: was not written by infer.py and stays as it is")
    except (OSError, SafetensorError) as error:
        raise RunError(f"--export {folder}: cannot be written ({data.brief(error)}); choose another folder"
                       ) from None
    print(f"{folder}: loads with AutoModelForSemanticSegmentation.from_pretrained and in "
          f"pipeline('image-segmentation'), images as {height}x{width}")


def push_folder(folder, name):
    """Uploads to the hub what export_folder wrote, and nothing else that lies there."""
    files = ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]
    try:
        HfApi().create_repo(name, exist_ok=True)
        HfApi().upload_folder(repo_id=name, folder_path=folder, allow_patterns=files)
    except (OSError, ValueError, HTTPError) as error:
        raise RunError(f"--push {name}: {folder} is written but cannot be uploaded ({data.brief(error)}); "
                       "log in with `hf auth login`, or take a name of yours, and run it again") from None
    print(f"{folder}: uploaded to https://huggingface.co/{name}")


# ------------------------------------------------------------ export to ONNX
class OnnxForm(nn.Module):
    """A network as a file holds it: uint8 RGB or normalized float32, (B, 3, H, W) -> a tuple of what
    --outputs names, each uint8 (B, H, W): class indices, confidence()."""

    def __init__(self, model, outputs="labels"):
        super().__init__()
        self.model, self.outputs = model, outputs.split(",")

    def forward(self, image):
        # with float32, a file has no step that normalizes
        z = self.model(data.normalize(image) if image.dtype == torch.uint8 else image)
        known = {"labels": upsampled_labels, "confidence": confidence}
        return tuple(known[name](z, image.shape[2:]) for name in self.outputs)


def export_onnx(model, path, shape, meta, args):
    """Writes `path` if it gives what torch gives. shape: (H, W); args: the command's flags."""
    import_optional("onnx", "onnxscript", "onnxruntime")
    form, dynamic = OnnxForm(model, args.outputs).eval(), args.shape == "dynamic"
    # a batch of 2: torch.export takes a dimension of 1 as fixed
    image = torch.zeros(1 + dynamic, 3, *shape, dtype=torch.uint8 if args.input == "uint8" else torch.float32)
    sides = {"image": dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)} if dynamic else None
    buffer = io.BytesIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()):       # the exporter tells its steps
            program = torch.onnx.export(form, (image,), dynamo=True, dynamic_shapes=sides, optimize=True,
                                        input_names=["image"], output_names=form.outputs, verbose=False,
                                        opset_version=args.opset)
        size = "dynamic" if dynamic else f"{shape[0]}x{shape[1]}"
        program.model.metadata_props.update(onnx_facts(meta, size, args.input))
        program.save(buffer)
        session, opset = onnx_session(buffer.getvalue()), program.model.opset_imports[""]
    except Exception as error:                                # converters raise errors of any kind
        if args.opset is None:
            raise
        raise InputError(f"--opset {args.opset}: cannot be written or read here ({data.brief(error)}); leave "
                         "it out, or name another") from None
    if args.opset not in (None, opset):                       # torch keeps its own where it cannot convert
        raise InputError(f"--opset {args.opset}: torch could only write {opset}; leave it out, or name "
                         "one nearer to that")
    for b, h, w in [(1, *shape), (2, 480, 640), (1, 320, 544)] if dynamic else [(1, *shape)]:
        # a noisy ramp: on plain noise a network says one class everywhere
        image = (torch.linspace(0, 255, w) + 40 * torch.randn(b, 3, h, w)).clamp(0, 255).to(torch.uint8)
        if args.input == "float":
            image = data.normalize(image)
        for name, ours in zip(form.outputs, form(image), strict=True):
            # a probability halfway between two steps may be rounded to either
            steps, verb = (1, "within 1 of") if name == "confidence" else (0, "equal")
            apart = (onnx_output(session, image, name).int() - ours.int()).abs() > steps
            same = 1 - apart.float().mean().item()
            print(f"onnx fp32 at {b}x3x{h}x{w}: {100 * same:.3f} % of the {name} {verb} torch's")
            if same < 0.999:
                raise RunError(f"{path}: its {name} differs from torch on {100 * (1 - same):.2f} % of the "
                               "pixels and was not written; try another torch or onnxruntime")
    data.write_atomic(path, buffer.getvalue())


def export_int8(args, model, meta, target, shape):
    """Writes `target` in 8 bits, and prints its mIoU and time beside torch and the fp32 file."""
    # everything is read before anything is written
    split = data.Split(data.find_data(args.data), args.split, meta["classes"], args.masks,
                       val_share=args.val_share)
    files = find_inputs([args.calibrate])
    images = []
    for path in files[::math.ceil(len(files) / 64)]:          # of the whole drive, not its beginning
        images.append(data.resized_image(data.read_image(path), shape[1], shape[0]).numpy())
    form = OnnxForm(model).eval()
    rows = [("torch fp32", lambda image: form(image)[0], weights_file(args.checkpoint[0]).stat().st_size)]
    with tempfile.TemporaryDirectory() as folder:
        plain, small = Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"
        export_onnx(model, plain, shape, meta, args)
        quantize(plain, small, images)
        data.write_atomic(target, small.read_bytes())
        for name, path in (("onnx fp32", plain), ("onnx int8", small)):
            session = onnx_session(path.read_bytes())
            rows.append((name, functools.partial(onnx_output, session), path.stat().st_size))
    compare(split, rows, shape)


def quantize(path, target, images):
    """Weights and activations of the ONNX file `path` in 8 bits, calibrated on uint8 (1, 3, H, W) arrays.

    Attention's products, softmax and norms stay in float: quantized they cost more than they save."""
    onnx, quantization, preprocessing = import_optional(
        "onnx", "onnxruntime.quantization", "onnxruntime.quantization.shape_inference")

    class Reader(quantization.CalibrationDataReader):
        feeds = iter([{"image": image} for image in images])

        def get_next(self):
            return next(self.feeds, None)

    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder) / "ready.onnx"
        preprocessing.quant_pre_process(str(path), str(ready), skip_symbolic_shape=True)
        in_float = []
        for node in onnx.load(ready).graph.node:
            if node.op_type in ("MatMul", "Softmax", "LayerNormalization"):
                in_float.append(node.name)
        quantization.quantize_static(str(ready), str(target), Reader(), per_channel=True,
                                     quant_format=quantization.QuantFormat.QDQ, nodes_to_exclude=in_float,
                                     activation_type=quantization.QuantType.QUInt8,
                                     weight_type=quantization.QuantType.QInt8)


def compare(split, rows, shape):
    """Prints mIoU, milliseconds and size of each row (name, labels of a uint8 image, file size)."""
    classes, (height, width) = split.classes, shape
    confusions = [0] * len(rows)
    for n in range(len(split)):
        stored, mask = split.read(n)
        image, target = data.resized_image(stored, width, height), torch.from_numpy(mask)
        for k, (_, label, _) in enumerate(rows):
            pred = F.interpolate(label(image)[None], target.shape, mode="nearest-exact")[0, 0]
            confusions[k] += confusion_matrix(pred, target, len(classes))
    image = torch.zeros(1, 3, height, width, dtype=torch.uint8)
    times = time_interleaved([functools.partial(label, image) for _, label, _ in rows], torch.device("cpu"))
    lines = [["network", "mIoU", "ms", "spread", "MB"]]
    for (name, _, size), confusion, (ms, low, high) in zip(rows, confusions, times, strict=True):
        miou = compute_scores(confusion, classes)["miou"]
        lines.append([name, f"{miou:.4f}", f"{ms:.1f}", f"{low:.1f}-{high:.1f}", f"{size / 1e6:.1f}"])
    print(f"{split.name} of {len(split)} pairs at {height}x{width}, {torch.get_num_threads()} threads, "
          "median of interleaved runs\n")
    print_columns(lines)


def onnx_session(content):
    """An onnxruntime session of an ONNX file's bytes, with torch's number of threads."""
    onnxruntime, = import_optional("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # idle threads would spin, and slow what is timed in turn
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def onnx_output(session, image, name="labels"):
    return torch.from_numpy(session.run([name], {"image": image.numpy()})[0])


# ------------------------------------------------------------ checks, flags, the command
def import_optional(*modules):
    """Imports optional packages, or says in one line what to install."""
    try:
        return [importlib.import_module(module) for module in modules]
    except ImportError as error:
        raise InputError(f"--export: {error.name} is not installed; pip install onnx onnxscript onnxruntime"
                         ) from None


def frame_sides(text):
    """An argparse type: "960x540" -> (960, 540), the sides of a frame as ffmpeg writes them."""
    width, height = (data.number(int, 16, 16384)(part) for part in text.split("x"))
    return width, height


frame_sides.__name__ = "pair like 960x540"                    # argparse names it in its errors


def parse_shape(value):
    """"512x896" -> (512, 896)."""
    try:
        height, width = (data.image_side(part) for part in value.split("x"))
    except (ValueError, argparse.ArgumentTypeError):
        raise InputError(f"--shape {value}: give HEIGHTxWIDTH in multiples of 32, such as 512x896, or dynamic"
                         ) from None
    return height, width


def export(args, model, meta):
    width, height = data.eval_size(*meta["image_size"], args.size or meta["size"])
    target, dynamic, int8 = Path(args.export), args.shape == "dynamic", args.export.endswith(".int8.onnx")
    if args.shape and not dynamic:
        height, width = parse_shape(args.shape)
    if target.suffix != ".onnx":
        if dynamic:
            raise InputError("--shape dynamic: is for .onnx files; a Hugging Face folder has fixed sides")
        export_folder(model, meta, target, height, width, args.push or target.resolve().name)
        if args.push:
            push_folder(target, args.push)
        return
    if int8 and not args.calibrate:
        raise InputError(f"--export {target}: 8 bits need --calibrate DIR, images like those to come")
    if int8 and args.input == "float":
        raise InputError("--input float: 8 bits keep uint8 images; leave it out, or name --export FILE.onnx")
    if int8 and dynamic:
        raise InputError(f"--shape dynamic: 8 bits need fixed sides, such as {height}x{width}")
    model = optimize_for_inference(model)
    if int8:
        export_int8(args, model, meta, target, (height, width))
    else:
        export_onnx(model, target, (height, width), meta, args)
    sides = "B, 3, H, W), H and W multiples of 32" if dynamic else f"1, 3, {height}, {width})"
    print(f"{target}: takes {args.input} images of ({sides}")


def make_parser():
    parser = data.Parser(__doc__, "python infer.py drive/*.png --out labels --raw",
                         "%(prog)s [images] [flags]")
    parser.add_argument("inputs", nargs="*", metavar="IMAGE", help="files, folders, patterns")
    group = add_model_flags(parser)
    group.add_argument("--checkpoint", nargs="+", metavar="CKPT",
                       help="the network, outputs/best_student.pth if none is named; several: their "
                            "ensemble, at the first one's size")
    group.add_argument("--teacher-weights", default="equal", metavar="A:B:..|auto", help="of the ensemble")
    group.add_argument("--size", type=data.image_side,
                       help="shorter side of what the network sees, in pixels; usually that of training")
    group.add_argument("--tta", type=parse_tta, metavar="flip,0.75,1.25",
                       help="label by the mean over the image, mirrored and at these scales of --size")
    group.add_argument("--tile", action="store_true",
                       help="label large images at their own scale, in overlapping windows of --size pixels")
    group = parser.add_argument_group("output")
    group.add_argument("--out", metavar="DIR", default="outputs/predictions", help="where labels go")
    group.add_argument("--raw", action="store_true",
                       help="also NAME_ids.png: 16-bit raw ids, as the challenge wants them")
    group.add_argument("--confidence", action="store_true",
                       help="also NAME_confidence.png: 255 times the probability of the label")
    group.add_argument("--no-overlay", action="store_true", help="masks only")
    group = parser.add_argument_group("video")
    group.add_argument("--stream", type=frame_sides, metavar="WxH",
                       help="label raw RGB frames of these sides from stdin, and write overlays to stdout")
    group.add_argument("--raw-labels", action="store_true",
                       help="write class indices instead, a byte per pixel")
    group.add_argument("--smooth", type=data.number(float, 0, 0.99), default=0.0, metavar="S",
                       help="against flicker: the share of earlier frames in the mean of probabilities")
    group = data.add_data_flags(parser)
    group.add_argument("--split", default="val", help="what an int8 export is compared on")
    group = parser.add_argument_group("export")
    group.add_argument("--export", metavar="TARGET",
                       help="a folder (Hugging Face), FILE.onnx, or FILE.int8.onnx")
    group.add_argument("--shape", metavar="HxW|dynamic",
                       help="sides of the exported input; without it those of a whole image in training")
    group.add_argument("--input", choices=["uint8", "float"], default="uint8", metavar="uint8|float",
                       help="of an ONNX file; float: normalized float32, for TensorRT's and Isaac's nodes")
    group.add_argument("--outputs", choices=["labels", "labels,confidence"], default="labels",
                       metavar="labels[,confidence]",
                       help="of an ONNX file; confidence: 255 times the probability of the label")
    group.add_argument("--opset", type=data.number(int, 7, 99), metavar="N",
                       help="of an ONNX file; without it torch's own")
    group.add_argument("--calibrate", metavar="DIR", help="images for 8 bits, at most 64 of them are used")
    group.add_argument("--push", metavar="OWNER/NAME", help="upload the folder to the Hugging Face hub")
    return parser


def check_flags(args):
    """What argparse cannot see, before anything is read."""
    if args.calibrate and not (args.export or "").endswith(".int8.onnx"):
        raise InputError(f"--calibrate {args.calibrate}: is for 8 bits; name --export FILE.int8.onnx")
    if args.shape and not args.export:
        raise InputError(f"--shape {args.shape}: is for an export; name --export TARGET, or say --size to "
                         "label images")
    for flag, given in (("outputs", args.outputs != "labels"), ("input", args.input != "uint8"),
                        ("opset", args.opset)):
        if given and not (args.export or "").endswith(".onnx"):
            raise InputError(f"--{flag} {getattr(args, flag)}: is for ONNX files; name --export FILE.onnx")
    if args.push and (not args.export or args.export.endswith(".onnx")):
        raise InputError(f"--push {args.push}: uploads a Hugging Face folder; name --export DIR")
    if args.push and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", args.push):
        raise InputError(f"--push {args.push}: give OWNER/NAME, such as me/desert-b1")
    if args.stream and (args.inputs or args.export or args.raw or args.confidence or sys.stdin.isatty()):
        raise InputError("--stream: reads raw frames from a pipe to stdin and writes to stdout; leave out "
                         "images, --export, --raw and --confidence")
    if not args.stream and (args.smooth or args.raw_labels):
        raise InputError("--smooth, --raw-labels: are for a video; name --stream WxH, its frames' sides")
    if not args.inputs and not args.export and not args.stream:
        raise InputError("nothing to do: name images (before --checkpoint, which takes all names after it), "
                         "--stream WxH or --export TARGET")
    if args.inputs and args.export:
        raise InputError(f"--export {args.export}: labels no images ({args.inputs[0]}); run it twice")
    if args.export and (len(args.checkpoint) > 1 or args.tta or args.tile):
        raise InputError(f"--export {args.export}: takes one network as it is; name one --checkpoint, and no "
                         "--tta or --tile")


@torch.no_grad()
def main(argv=()):
    args = make_parser().parse_args(argv)
    args.checkpoint = args.checkpoint or ["outputs/best_student.pth"]
    check_flags(args)
    device = pick_device("cpu" if args.export else args.device)
    classes = data.load_classes(args.classes) if args.classes else None
    checkpoints = load_models(args.checkpoint, classes)
    _, model, meta = checkpoints[0]
    if args.export:
        export(args, model, meta)
        return
    dtype = amp_dtype(args.amp, device)
    networks = [optimize_for_inference(model.to(device), dtype) for _, model, _ in checkpoints]
    weights = ensemble_weights(args.teacher_weights, [meta for _, _, meta in checkpoints])
    model = Ensemble(networks, weights).to(device) if len(networks) > 1 else networks[0]
    logits = functools.partial(image_logits, model=model, size=args.size or meta["size"], dtype=dtype,
                               tta=args.tta, tile=args.tile)
    if not args.stream:
        label_files(args, logits, meta["classes"], device)
        return
    # a closed pipe, as of `| head -c`, ends the command; Python would try again to flush its own sys.stdout
    with contextlib.suppress(BrokenPipeError), open(sys.stdout.fileno(), "wb", closefd=False) as sink:
        label_stream(args, logits, meta["classes"], sys.stdin.buffer, sink)


if __name__ == "__main__":
    data.run_command(main)
