"""The networks, their checkpoints, the ensemble, and the one way from an image to labels.

    model = build("segformer-b1", classes); z = model(x)     # (B, 3, H, W) -> (B, C, h, w) logits at stride 4
    model, meta = load_model("outputs/best_student.pth")      # rebuilt from the checkpoint alone

At 512x512 with ten classes: SegFormer-B1 13.7 M parameters and 11.0 GMACs (15.3 as transformers writes it),
SegFormer-B3 47.2 M and 38.5 (77.2), DeepLabV3+ with ResNet50 40.3 M and 69.2, LR-ASPP with MobileNetV3-Large
3.2 M and 2.0 (`python evaluate.py CKPT...`).

To add an architecture: a module like DeepLabV3Plus below, with its `encoder` and `memory_format`, whose
forward(x, features=False) gives logits at stride 4 and, with `features`, also a list of four stages, and
whose last layer is one that is_classifier() knows; then its name in ARCHS, and a branch in build(),
guess_arch() and load_imagenet(). Define each BatchNorm directly after the convolution that feeds it:
fold_batchnorm() pairs them by that order.

Letters: B batch, C classes, H W pixels of the input, h w = H/4 W/4, K teachers, D width of SegFormer's head.
"""
import contextlib
import itertools
import json
import logging
import pickle
import re
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import nn
from torchvision.models.segmentation import lraspp_mobilenet_v3_large
from torchvision.models.segmentation.deeplabv3 import ASPP
from torchvision.ops import Conv2dNormActivation
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from data import (DESERT, MEAN, STD, InputError, brief, check_classes, class_names, is_int, normalize, number,
                  write_atomic)

SEGFORMERS = {                                   # blocks by stage, widths by stage, D
    "segformer-b0": ((2, 2, 2, 2), (32, 64, 160, 256), 256),
    "segformer-b1": ((2, 2, 2, 2), (64, 128, 320, 512), 256),
    "segformer-b2": ((3, 4, 6, 3), (64, 128, 320, 512), 768),
    "segformer-b3": ((3, 4, 18, 3), (64, 128, 320, 512), 768),
    "segformer-b4": ((3, 8, 27, 3), (64, 128, 320, 512), 768),
    "segformer-b5": ((3, 6, 40, 3), (64, 128, 320, 512), 768)}
ARCHS = ["deeplab", "lraspp", *SEGFORMERS]
# file names of the teachers' checkpoints: the original project's, which its users know
TEACHER_NAMES = {"deeplab": "deep_lab", "segformer-b3": "best_model"}


# ------------------------------------------------------------ architectures
class DeepLabV3Plus(nn.Module):
    """DeepLabV3+ (Chen et al. 2018) on torchvision's ResNet50, dilated to output stride 16."""

    encoder = "backbone."                        # how the keys of pretrained parameters begin
    memory_format = torch.channels_last          # convolutional networks are faster with it (the bench)

    def __init__(self, classes):
        super().__init__()
        self.backbone = torchvision.models.resnet50(replace_stride_with_dilation=[False, False, True])
        del self.backbone.fc
        self.aspp = ASPP(2048, [6, 12, 18], 256)
        self.low_level = Conv2dNormActivation(256, 48, 1)
        self.decoder = nn.Sequential(Conv2dNormActivation(48 + 256, 256), Conv2dNormActivation(256, 256))
        self.classifier = nn.Conv2d(256, classes, 1)

    def forward(self, x, features=False):
        """(B, 3, H, W) -> (B, C, h, w) logits; with `features` also four stages at strides 4, 8, 16, 16."""
        net = self.backbone
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        stages = []
        for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
            x = layer(x)
            stages.append(x)                                             # 256, 512, 1024, 2048 channels
        low = self.low_level(stages[0])
        deep = F.interpolate(self.aspp(x), low.shape[2:], mode="bilinear", align_corners=False)
        z = self.classifier(self.decoder(torch.cat([low, deep], 1)))
        return (z, stages) if features else z


class LRASPP(nn.Module):
    """LR-ASPP (Howard et al. 2019) on MobileNetV3-Large, torchvision's with its keys, for small computers.

    It computes logits at stride 8; they are upsampled once, because the losses expect stride 4."""

    encoder = "backbone."
    memory_format = torch.channels_last

    def __init__(self, classes):
        super().__init__()
        net = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=classes)
        self.backbone, self.classifier = net.backbone, net.classifier
        # "low" and "high", at strides 8 and 16, are for the head; 3, 6 and 12 are the last layers at stride
        # 4, at 8, and at 16 before the dilated ones
        self.backbone.return_layers = {"3": "3", "4": "low", "6": "6", "12": "12", "16": "high"}

    def forward(self, x, features=False):
        """(B, 3, H, W) -> (B, C, h, w) logits; with `features` also four stages at strides 4, 8, 16, 16."""
        maps = self.backbone(x)
        stages = [maps[name] for name in ("3", "6", "12", "high")]       # 24, 40, 112, 960 channels
        z = self.classifier(maps)                                        # (B, C, H/8, W/8)
        z = F.interpolate(z, stages[0].shape[2:], mode="bilinear", align_corners=False)
        return (z, stages) if features else z


class SegFormer(SegformerForSemanticSegmentation):
    """transformers' SegFormer (Xie et al. 2021), same parameters and keys, with a cheaper decode head.

    The stock head upsamples four stages to stride 4, concatenates them and multiplies by a 1x1 convolution.
    Bilinear upsampling and a 1x1 convolution commute, so here each stage is multiplied at its own size, by
    the product of its linear layer and its slice of the fuse weight, then upsampled and added: the same
    logits for half of B3's arithmetic."""

    encoder = "segformer."
    memory_format = torch.contiguous_format      # it turns maps into tokens and back
    merged = None                                # (weights, bias) with BatchNorm, see optimize_for_inference

    def forward(self, pixel_values, features=False):
        """(B, 3, H, W) -> (B, C, h, w) logits; with `features` also four stages at strides 4, 8, 16, 32."""
        stages = self.segformer(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
        head = self.decode_head
        weights, bias = self.merged or self.merge_head()
        y = None
        for stage, weight in zip(stages, weights, strict=True):
            # channels_last makes upsampling D channels cheap on a CPU
            part = F.conv2d(stage.contiguous(memory_format=torch.channels_last), weight)  # (B, D, its sides)
            if y is None:
                y = part + bias.view(-1, 1, 1).to(part.dtype)
            else:
                y = y + F.interpolate(part, y.shape[2:], mode="bilinear", align_corners=False)
        if self.merged is None:
            y = head.batch_norm(y)
        # dropout2d drops whole channels, as the authors' code does; transformers drops single cells, which
        # costs more on a CPU
        z = head.classifier(F.dropout2d(F.relu(y), head.dropout.p, self.training))
        return (z, list(stages)) if features else z

    def merge_head(self):
        """Four (D, width, 1, 1) weights and a (D,) bias, in float32: bf16 products lose digits."""
        head = self.decode_head
        # transformers 5 renamed them
        linears = head.linear_c if hasattr(head, "linear_c") else head.linear_projections
        weights, bias = [], 0
        with torch.autocast(head.linear_fuse.weight.device.type, enabled=False):
            slices = head.linear_fuse.weight.flatten(1).chunk(len(linears), 1)
            for piece, linear in zip(slices[::-1], linears, strict=True):            # deepest stage first
                weights.append((piece @ linear.proj.weight)[..., None, None])
                bias = bias + piece @ linear.proj.bias
        return weights, bias


def build(arch, classes, init="random", partial=False):
    """A network of `arch` for a class table. `init`: "random", "imagenet", a path or hub name: see --init.

    partial: --init-partial."""
    if arch == "deeplab":
        model = DeepLabV3Plus(len(classes))
    elif arch == "lraspp":
        model = LRASPP(len(classes))
    elif arch in SEGFORMERS:
        depths, widths, head_width = SEGFORMERS[arch]
        names = dict(enumerate(class_names(classes)))
        config = SegformerConfig(depths=list(depths), hidden_sizes=list(widths),
                                 decoder_hidden_size=head_width, id2label=names,
                                 label2id={name: n for n, name in names.items()})
        model = SegFormer(config)
    if init == "imagenet":
        load_imagenet(model, arch, classes)
    elif init != "random":
        load_init(model, arch, classes, init, partial=partial)
    return model


# ------------------------------------------------------------ ensemble and prediction
class Ensemble(nn.Module):
    """The weighted mean of several networks' logits, or of their probabilities, returned as logarithms.

    weights: (K,), or (K, C) by class, normalized over the networks. Weights by class act on logits centred at
    each pixel, since only differences between logits mean anything."""

    def __init__(self, models, weights, average="logits"):
        super().__init__()
        self.models, self.average = nn.ModuleList(models), average
        weights = weights.float() / weights.float().sum(0, keepdim=True)
        self.register_buffer("weights", weights.view(len(models), 1, -1, 1, 1))      # (K, 1, 1 or C, 1, 1)

    @torch.no_grad()
    def forward(self, x, features=False):
        """(B, 3, H, W) -> (B, C, h, w) float32; with `features` also K lists of stages."""
        mean, all_stages = None, []
        for model, weight in zip(self.models, self.weights, strict=True):
            z, stages = model(x, features=True) if features else (model(x), [])
            all_stages.append(stages)
            z = z.float()
            if mean is not None and z.shape[2:] != mean.shape[2:]:
                z = F.interpolate(z, mean.shape[2:], mode="bilinear", align_corners=False)
            if self.average == "probs":
                z = z.softmax(1)
            elif weight.numel() > 1:
                z = z - z.mean(1, keepdim=True)
            mean = weight * z if mean is None else mean + weight * z
        z = mean.clamp_min(1e-8).log() if self.average == "probs" else mean
        return (z, all_stages) if features else z


def ensemble_weights(value, metas):
    """--teacher-weights as (K,); for "auto" (K, C): each teacher by its validation IoU of each class.

    metas: the teachers' meta from load_model."""
    if value == "equal":
        return torch.full((len(metas),), 1 / len(metas))
    if value != "auto":
        return parse_weights(value, len(metas))
    if not all(meta["val_iou"] for meta in metas):
        raise InputError("--teacher-weights auto: a teacher's checkpoint has no validation IoU; give numbers")
    rows = [[meta["val_iou"].get(name) or 0.0 for name in class_names(meta["classes"])] for meta in metas]
    iou = torch.tensor(rows)                                                         # (K, C)
    return iou.where(iou.sum(0) > 0, 1.0)                     # a class that no teacher knows: equal weights


def parse_weights(value, count):
    """"2:1" -> (K,) float64, normalized; InputError unless there are K, none negative, not all 0."""
    try:
        weights = torch.tensor([float(v) for v in value.split(":")], dtype=torch.float64)
    except ValueError:
        weights = torch.tensor([float("nan")])
    if len(weights) != count or not weights.sum().isfinite() or (weights < 0).any() or weights.sum() <= 0:
        raise InputError(f"--teacher-weights {value}: give {count} numbers such as "
                         f"{':'.join(['1'] * count)}, none negative, not all 0")
    return weights / weights.sum()


@torch.no_grad()
def compute_logits(model, images, dtype=None, flip=False):
    """Whole images, uint8 (B, 3, h, w), see data.eval_image -> (B, C, h/4, w/4) float32.

    images: also a list of the same images at several scales: the mean over them, on the first one's grid;
    `flip`: the mean over each and its mirror image."""
    images = [images] if isinstance(images, torch.Tensor) else images
    mean = 0
    for image in images:
        x = normalize(image.to(next(model.parameters()).device, non_blocking=True))
        with autocast(x.device, dtype):
            z = model(x).float()
            if flip:
                z = z + model(x.flip(3)).float().flip(3)
        if image is not images[0]:
            z = F.interpolate(z, mean.shape[2:], mode="bilinear", align_corners=False)
        mean = mean + z
    return mean / (len(images) * (1 + flip))


def upsampled_labels(z, size):
    """(B, C, h, w) logits -> (B, *size) uint8: bilinear (align_corners=False), then the largest class."""
    return F.interpolate(z, tuple(size), mode="bilinear", align_corners=False).argmax(1).to(torch.uint8)


def predict(model, images, size, dtype=None, flip=False):
    """Whole images, see compute_logits -> (B, H, W) uint8 class indices at `size` (H, W).

    Validation, evaluate.py and infer.py take these two steps, so that their labels are equal."""
    return upsampled_labels(compute_logits(model, images, dtype, flip), size)


def optimize_for_inference(model, dtype=None):
    """Eval mode, no gradients, BatchNorm folded into convolutions, weights in `dtype`.

    Changes the model for good: its state dict is no longer the checkpoint's."""
    model = model.eval().requires_grad_(False).to(memory_format=model.memory_format)
    if isinstance(model, SegFormer):
        weights, bias = model.merge_head()
        norm = model.decode_head.batch_norm
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()                  # (D,)
        weights = [(weight * scale.view(-1, 1, 1, 1)).to(dtype or weight.dtype) for weight in weights]
        model.merged = weights, (bias - norm.running_mean) * scale + norm.bias
    else:
        fold_batchnorm(model)
    for module in model.modules():
        if dtype is not None and isinstance(module, (nn.Conv2d, nn.Linear)):
            module.to(dtype)                                  # autocast would cast them anew at every step
    return model


def fold_batchnorm(model):
    """Folds every BatchNorm that is defined right after a convolution, as in ResNet and nn.Sequential."""
    for parent in model.modules():
        for (conv_name, conv), (norm_name, norm) in itertools.pairwise(list(parent.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, conv_name, nn.utils.fuse_conv_bn_eval(conv, norm))
                setattr(parent, norm_name, nn.Identity())


# ------------------------------------------------------------ checkpoints
def save_model(path, model, arch, classes, **meta):
    """Writes a checkpoint of plain types: the state dict, spelt as transformers 4 does and save_pretrained
    of either version, and all that rebuilds the network."""
    state = {old_key(key): value for key, value in model.state_dict().items()}
    content = {"model_state_dict": state, "arch": arch, "classes": classes, "mean": list(MEAN),
               "std": list(STD), **meta}
    write_atomic(path, lambda file: torch.save(content, file))


def load_model(path, classes=None, flag=""):
    """(network in eval mode, meta) from a checkpoint alone, or a SegFormer's folder or hub name; a bare state
    dict needs `classes` if they are not the desert's.

    classes: the table wanted, whose names must be the checkpoint's; flag: what named the file, for messages.
    meta: arch, classes, mean, std, size, image_size [w, h], epoch, val_miou, val_iou {class: IoU}, args."""
    state, meta = read_checkpoint(path, flag)
    arch = guess_arch(state)
    if arch is None:
        raise InputError(f"{path}: holds no network of this project; name another")
    if meta.get("arch", arch) != arch:
        raise InputError(f"{path}: damaged, holds {arch}, not {meta['arch']}; train it again")
    meta = {"size": 512, "image_size": [960, 540], **meta, "arch": arch}
    meta["val_iou"] = meta.get("val_iou") or {}
    meta["classes"] = checkpoint_classes(path, state, meta, classes)
    sides = meta["image_size"] if isinstance(meta["image_size"], list) else []
    valid = {"size": is_int(meta["size"], 32, 8192), "val_iou": isinstance(meta["val_iou"], dict),
             "image_size": len(sides) == 2 and all(is_int(side, 1, 1e6) for side in sides)}
    for key, good in valid.items():
        if not good:
            raise InputError(f"{path}: damaged, its {key} is {meta[key]!r}; train it again")
    normalization = meta.get("mean", list(MEAN)), meta.get("std", list(STD))
    if normalization != (list(MEAN), list(STD)):
        raise InputError(f"{path}: was trained with another normalization {normalization}; train it again "
                         "or name another")
    model = build(arch, meta["classes"])
    load_weights(model, translate(state, model), str(path), arch)
    return model.eval(), meta


def load_models(paths, classes=None):
    """[(path, network, meta)] of several checkpoints; all must have `classes`, or the first one's table."""
    checkpoints = []
    for path in paths:
        model, meta = load_model(path, classes)
        classes = classes or meta["classes"]
        checkpoints.append((path, model, meta))
    return checkpoints


def checkpoint_classes(path, state, meta, classes):
    """The class table to use with a checkpoint: `classes` if given, and then the names must be equal.

    meta["names"]: of a folder, which has no ids and colours; [] if they are LABEL_0 and so on."""
    stored = check_classes(meta["classes"], str(path)) if "classes" in meta else classes or DESERT
    wanted = classes or stored
    # `is`: load_classes() without --classes returns DESERT itself, and a user's own table may equal it
    if meta.get("names") == [] and (classes is None or classes is DESERT):
        raise InputError(f"{path}: config.json names no classes; say with --classes FILE which they are")
    names = meta.get("names") or class_names(stored)
    for table in (names, wanted):
        if len(table) != count_classes(state):
            raise InputError(f"{path}: has {count_classes(state)} classes, the class table {len(table)}; "
                             "give the right --classes FILE")
    for n, (a, b) in enumerate(zip(names, class_names(wanted), strict=True)):
        if a != b:
            raise InputError(f"{path}: was trained on another class table, its class {n} is {a!r}, not "
                             f"{b!r}; give its own --classes FILE")
    return wanted


def read_checkpoint(path, flag=""):
    """(state dict, the rest) of a checkpoint, a bare state dict from elsewhere, or a Hugging Face folder."""
    where, file = f"{flag} {path}".strip(), weights_file(path, flag)
    content = safe_load(file, flag)
    state = content.get("model_state_dict", content) if isinstance(content, dict) else None
    good = isinstance(state, dict) and len(state) > 0
    if not good or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()):
        raise InputError(f"{where}: holds no state dict; name a checkpoint of this project")
    meta = {} if state is content else {k: v for k, v in content.items() if k != "model_state_dict"}
    state = {key.removeprefix("module."): value for key, value in state.items()}
    if file != Path(path):
        meta = {"arch": guess_arch(state) or "segformer", **folder_meta(file.parent, where)}
    return state, meta


def weights_file(path, flag=""):
    """The file with a network's weights: `path`, or one in that folder, or in the folder that a hub name is
    downloaded to. A hub name is OWNER/NAME, where no such path exists."""
    folder, names = Path(path), ("model.safetensors", "pytorch_model.bin")
    hub_name = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(?<!\.pth)(?<!\.pt)", str(path))
    if hub_name and not folder.exists():
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)                 # one line is enough
        with download_error(f"{flag} {path}".strip()):
            for name in names:
                wanted = ["config.json", "preprocessor_config.json", name]
                folder = Path(snapshot_download(str(path), allow_patterns=wanted))
                if (folder / name).exists():
                    break
    return next((folder / name for name in names if (folder / name).exists()), folder)


def folder_meta(folder, where):
    """Names and normalization of a Hugging Face folder; InputError unless its SegFormer computes as ours."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        labels = config.get("id2label", {})
        names = [labels[str(n)] for n in range(len(labels))]
        processor = folder / "preprocessor_config.json"
        found = json.loads(processor.read_text(encoding="utf-8")) if processor.exists() else {}
        mean, std = found.get("image_mean", list(MEAN)), found.get("image_std", list(STD))
        mean = mean if found.get("do_normalize", True) else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{where}: config.json or preprocessor_config.json is damaged ({brief(error)}); "
                         "name another") from None
    ours = {"model_type": "segformer", "num_attention_heads": [1, 2, 5, 8], "strides": [4, 2, 2, 2],
            "hidden_act": "gelu"}                             # what no shape of a weight tells
    for key, value in ours.items():
        if config.get(key, value) != value:
            raise InputError(f"{where}: its {key} is {config[key]}, not {value}; name another")
    generic = all(name == f"LABEL_{n}" for n, name in enumerate(names))
    return {"names": [] if generic else names, "mean": mean, "std": std}


def safe_load(path, flag=""):
    """torch.load with weights_only=True: plain types only; code in a pickle is refused without being run."""
    where = f"{flag} {path}".strip()
    try:
        if str(path).endswith(".safetensors"):
            return load_file(path)
        with warnings.catch_warnings(action="ignore"):        # of a foreign pickle's protocol; see below
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{where}: no such file; train it first or name another") from None
    except IsADirectoryError:
        raise InputError(f"{where}: is a folder without model.safetensors or pytorch_model.bin; "
                         "name another, or a .pth file") from None
    except pickle.UnpicklingError:
        raise InputError(f"{where}: holds something other than plain weights, or is no checkpoint; it was "
                         "not run. Save a state dict") from None
    except Exception as error:  # noqa: BLE001 -- torch.load may raise anything for a damaged file
        raise InputError(f"{where}: damaged or no checkpoint ({brief(error)}); train it again or name another"
                         ) from None


def load_weights(model, state, where, what):
    """load_state_dict that says in one line what is missing, unexpected or of another shape."""
    own = model.state_dict()
    wrong = [key for key in own if key not in state or own[key].shape != state[key].shape]
    wrong = [key for key in (*wrong, *(state.keys() - own.keys())) if not key.endswith("num_batches_tracked")]
    if wrong:
        raise InputError(f"{where}: its weights are not those of {what}: {len(wrong)} missing, unexpected or "
                         f"of another shape, such as {wrong[0]}")
    model.load_state_dict({**own, **state})


# ------------------------------------------------------------ pretrained weights
@contextlib.contextmanager
def download_error(where):
    """A failed download is one line, and never a silent start from random weights."""
    try:
        yield
    except (OSError, ValueError) as error:                    # ValueError: no valid name
        advice = "name a file or folder that is here"
        if where.startswith("--init"):
            advice = ("use --init PATH (a ResNet50 or MobileNetV3-Large state dict, a SegFormer's folder, "
                      "or a checkpoint) or --init random")
        raise InputError(f"{where}: is not here and cannot be downloaded ({brief(error)}); {advice}"
                         ) from None


def load_imagenet(model, arch, classes):
    """--init imagenet: an encoder trained on ImageNet, downloaded."""
    torchvisions = {"deeplab": torchvision.models.ResNet50_Weights,
                    "lraspp": torchvision.models.MobileNet_V3_Large_Weights}
    if arch in torchvisions:
        with download_error("--init imagenet"):
            state = torchvisions[arch].DEFAULT.get_state_dict(progress=True, check_hash=True)
        load_backbone(model, state, "--init imagenet")
    elif arch in SEGFORMERS:
        load_init(model, arch, classes, f"nvidia/mit-{arch[-2:]}", "--init imagenet:")


def load_backbone(model, state, where, partial=False):
    """A ResNet50 state dict into DeepLab's backbone, or a MobileNetV3-Large's into LR-ASPP's; every weight
    but the classifier's must arrive, with `partial` those of the parts (conv1, bn1, layer1 to layer4) that
    the state dict has."""
    what = "a MobileNetV3-Large" if isinstance(model, LRASPP) else "a ResNet50"
    state = {key.removeprefix("features."): value for key, value in state.items()
             if not key.startswith(("fc.", "classifier."))}
    if partial:
        arriving, own = {key.split(".")[0] for key in state}, model.backbone.state_dict()
        rest = {key: value for key, value in own.items() if key.split(".")[0] not in arriving}
        if rest:
            print(f"{where}: starts at random: {', '.join(dict.fromkeys(key.split('.')[0] for key in rest))}")
        state.update(rest)
    load_weights(model.backbone, state, where, what)


def load_init(model, arch, classes, init, flag="--init", partial=False):
    """--init: a ResNet50 state dict for deeplab, a MobileNetV3-Large's for lraspp; a checkpoint, or a folder
    or hub name of a SegFormer, of the same architecture, without the classifier where the classes are others;
    or an encoder alone (mit-bN)."""
    where = f"{flag} {init}"
    state, meta = read_checkpoint(init, flag)
    if arch == "deeplab" and "layer1.0.conv1.weight" in state:
        load_backbone(model, state, where, partial)
        return
    if partial:
        raise InputError(f"--init-partial: {init} is no ResNet50 state dict for --arch deeplab; leave it out")
    if arch == "lraspp" and "features.0.0.weight" in state:
        load_backbone(model, state, where)
        return
    own, names, found = model.state_dict(), meta.get("names"), guess_arch(state)
    trained_on = class_names(meta["classes"]) if "classes" in meta else names
    state = translate(state, model)
    if names is not None and not any(key.startswith("decode_head.") for key in state):
        state = {key: value for key, value in state.items() if not is_classifier(key)}  # ImageNet's
        state.update({key: value for key, value in own.items() if key.startswith("decode_head.")})
    elif found != arch:
        raise InputError(f"{where}: holds {found or 'no network of this project'}, not {arch}")
    elif len(classes) != count_classes(state) or trained_on not in (None, class_names(classes)):
        count = count_classes(state)
        others = f"{count} classes, not {len(classes)}" if count != len(classes) else "classes of other names"
        print(f"{where}: has {others}; its classifier is left out")
        state = {key: own[key] if is_classifier(key) else value for key, value in state.items()}
    load_weights(model, state, where, arch)


# ------------------------------------------------------------ keys of state dicts
# transformers 5 renamed SegFormer's parts; checkpoints of both spellings are read under either version, and
# written in the one of transformers 4, as save_pretrained does
RENAMED = [(r"stages\.(\d+)\.patch_embeddings\.", r"encoder.patch_embeddings.\1."),
           (r"stages\.(\d+)\.blocks\.", r"encoder.block.\1."),
           (r"stages\.(\d+)\.layer_norm\.", r"encoder.layer_norm.\1."),
           (r"attention\.q_proj\.", "attention.self.query."), (r"attention\.k_proj\.", "attention.self.key."),
           (r"attention\.v_proj\.", "attention.self.value."),
           (r"attention\.o_proj\.", "attention.output.dense."),
           (r"attention\.sequence_reduction\.sequence_reduction\.", "attention.self.sr."),
           (r"attention\.sequence_reduction\.layer_norm\.", "attention.self.layer_norm."),
           (r"mlp\.fc([12])\.", r"mlp.dense\1."), (r"layernorm_before\.", "layer_norm_1."),
           (r"layernorm_after\.", "layer_norm_2."), ("linear_projections", "linear_c")]


def old_key(key):
    """A key of SegFormer's state dict as transformers 4 spells it."""
    for new, old in RENAMED:
        key = re.sub(new, old, key)
    return key


def translate(state, model):
    """A state dict in either spelling, with the keys that `model` has under the installed transformers."""
    own = {old_key(key): key for key in model.state_dict()}
    return {own.get(old_key(key), key): value for key, value in state.items()}


def is_classifier(key):
    """Whether a key is of the last layer, whose outputs are the classes; LR-ASPP has two such layers."""
    layer = key.removeprefix("decode_head.").removesuffix(".weight").removesuffix(".bias")
    return layer in ("classifier", "classifier.low_classifier", "classifier.high_classifier")


def count_classes(state):
    return next((len(value) for key, value in state.items() if is_classifier(key)), None)


def guess_arch(state):
    """The architecture that a state dict belongs to, or None."""
    keys = {old_key(key): value for key, value in state.items()}
    if "backbone.layer1.0.conv1.weight" in keys and "aspp.project.0.weight" in keys:
        return "deeplab"
    if "backbone.16.0.weight" in keys and "classifier.low_classifier.weight" in keys:
        return "lraspp"
    blocks = []
    for stage in range(4):
        prefix = f"segformer.encoder.block.{stage}."
        blocks.append(len({key.split(".")[4] for key in keys if key.startswith(prefix)}))
    width = len(keys.get("segformer.encoder.patch_embeddings.0.proj.weight", ()))
    head_width = len(keys.get("decode_head.linear_fuse.weight", ()))
    for arch, (depths, widths, D) in SEGFORMERS.items():
        if (depths, widths[0], D) == (tuple(blocks), width, head_width):
            return arch
    return None


# ------------------------------------------------------------ device, precision, flags
def pick_device(name):
    """torch.device of --device; auto takes cuda, then mps, then cpu."""
    counts = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if name == "auto":
        name = next(kind for kind, count in counts.items() if count)
    kind, _, which = name.partition(":")
    if (which or "0") not in map(str, range(counts.get(kind, 0))):
        raise InputError(f"--device {name}: is not available on this machine; use auto, cuda, mps or cpu")
    if kind == "cuda":
        torch.set_float32_matmul_precision("high")            # here, so that every script computes alike
    return torch.device(name)


def amp_dtype(flag, device):
    """The autocast type for --amp on `device`, or None.

    auto: bf16 where the hardware multiplies it natively (T4 and P100 only emulate it, which
    torch.cuda.is_bf16_supported counts), fp16 on other GPUs, off elsewhere."""
    if flag != "auto":
        return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[flag]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16
    return None


def autocast(device, dtype):
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def describe_device(device, dtype):
    kind = f"{torch.get_num_threads()} threads"
    if device.type == "cuda":
        kind = torch.cuda.get_device_name(device)
    return f"{device.type}, {kind}, {str(dtype or torch.float32).removeprefix('torch.')}"


def parse_tta(text):
    """An argparse type: "flip,0.75,1.25" -> ([1, 0.75, 1.25], True), the scales and whether to mirror."""
    words = text.split(",")
    scales = [number(float, 0.25, 4)(word) for word in words if word != "flip"]
    return [1, *(scale for scale in dict.fromkeys(scales) if scale != 1)], "flip" in words


parse_tta.__name__ = "list like flip,0.75,1.25"               # argparse names it in its errors


def add_model_flags(parser, arch=None):
    """Flags of everything that runs a network. arch: the default; None where checkpoints say it."""
    group = parser.add_argument_group("networks")
    if arch:
        group.add_argument("--arch", type=lambda name: {"segformer": "segformer-b3"}.get(name, name),
                           choices=ARCHS, default=arch, metavar="ARCH",
                           help="deeplab, lraspp, segformer-b0 to -b5, or segformer, which is b3")
    group.add_argument("--device", default="auto", metavar="auto|cuda|mps|cpu",
                       help="where to compute; auto: the first of cuda, mps, cpu that is available")
    group.add_argument("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto",
                       help="precision; auto: what the device computes natively")
    return group
