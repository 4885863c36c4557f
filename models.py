"""The networks, their checkpoints, the ensemble, and predict(): the one way from an image to labels.

    model = build("segformer-b1", classes); z = model(x)                # (B, 3, H, W) -> (B, C, h, w) logits at stride 4
    model, meta = load_model("outputs/best_student.pth")                # rebuilt from the checkpoint alone

At 512x512 with ten classes: SegFormer-B1 13.7 M parameters and 11.0 GMACs (15.3 as transformers writes it),
SegFormer-B3 47.2 M and 38.5 (77.2), DeepLabV3+ with ResNet50 40.3 M and 69.2 (`python evaluate.py CKPT...` counts).

Letters: B batch, C classes, H W pixels of the input, h w = H/4 W/4, K teachers, D width of SegFormer's head.
"""
import itertools
import logging
import pickle
import re
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
import transformers
from huggingface_hub import hf_hub_download
from torch import nn
from torchvision.models.segmentation.deeplabv3 import ASPP
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from data import DESERT, MEAN, STD, Fault, brief, check_classes, class_names, normalize, write_atomic

SEGFORMERS = {                                   # blocks by stage, widths by stage, D
    "segformer-b0": ((2, 2, 2, 2), (32, 64, 160, 256), 256), "segformer-b1": ((2, 2, 2, 2), (64, 128, 320, 512), 256),
    "segformer-b2": ((3, 4, 6, 3), (64, 128, 320, 512), 768), "segformer-b3": ((3, 4, 18, 3), (64, 128, 320, 512), 768),
    "segformer-b4": ((3, 8, 27, 3), (64, 128, 320, 512), 768), "segformer-b5": ((3, 6, 40, 3), (64, 128, 320, 512), 768)}
ARCHS = ["deeplab", "segformer", *SEGFORMERS]    # what --arch takes; segformer is segformer-b3


# ---------------------------------------------------------------------------------------------- architectures
class DeepLabV3Plus(nn.Module):
    """DeepLabV3+ (Chen et al. 2018) on torchvision's ResNet50 dilated to output stride 16; logits at stride 4."""

    def __init__(self, classes):
        super().__init__()
        self.backbone = torchvision.models.resnet50(replace_stride_with_dilation=[False, False, True])
        del self.backbone.fc
        self.aspp = ASPP(2048, [6, 12, 18], 256)
        self.low_level = conv_block(256, 48, 1)
        self.decoder = nn.Sequential(conv_block(48 + 256, 256, 3), conv_block(256, 256, 3))
        self.classifier = nn.Conv2d(256, classes, 1)

    def forward(self, x, features=False):
        """x: (B, 3, H, W) normalised -> (B, C, h, w) logits; with `features` also four stages at strides 4, 8, 16, 16."""
        net = self.backbone
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        stages = []
        for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
            x = layer(x)
            stages.append(x)                                             # 256, 512, 1024, 2048 channels
        deep = F.interpolate(self.aspp(x), stages[0].shape[2:], mode="bilinear", align_corners=False)
        z = self.classifier(self.decoder(torch.cat([self.low_level(stages[0]), deep], 1)))
        return (z, stages) if features else z


def conv_block(inputs, outputs, kernel):
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False),
                         nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class SegFormer(SegformerForSemanticSegmentation):
    """transformers' class with its very parameters and keys, and a decode head that does the same arithmetic cheaper.

    The head upsamples four stages to stride 4, concatenates them and multiplies by a 1x1 convolution. Bilinear
    upsampling and a 1x1 convolution commute, so each stage is multiplied at its own size by the product of its linear
    layer and its slice of the fuse weight, then upsampled and added: the same logits for half of B3's arithmetic."""

    folded = None                                # (four weights, bias) with BatchNorm folded in, see `freeze`

    def forward(self, pixel_values, features=False):
        """(B, 3, H, W) normalised -> (B, C, h, w) logits; with `features` also four stages at strides 4, 8, 16, 32."""
        stages = self.segformer(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
        head = self.decode_head
        weights, bias = self.folded or self.merged_head()
        y = None
        for stage, weight in zip(stages, weights, strict=True):
            # (B, D, ...) at the stage's own size; in channels_last, which makes upsampling D channels cheap on a CPU
            part = F.conv2d(stage.contiguous(memory_format=torch.channels_last), weight)
            if y is None:
                y = part + bias.view(-1, 1, 1).to(part.dtype)
            else:
                y = y + F.interpolate(part, y.shape[2:], mode="bilinear", align_corners=False)
        if self.folded is None:
            y = head.batch_norm(y)
        # whole maps are dropped, as in the authors' code; drawing a number for every cell and channel costs more on a CPU
        z = head.classifier(F.dropout2d(F.relu(y), head.dropout.p, self.training))
        return (z, list(stages)) if features else z

    def merged_head(self):
        """Four (D, width, 1, 1) weights and one (D,) bias; in float32, since a product rounded to bf16 loses digits."""
        head = self.decode_head
        linears = head.linear_c if hasattr(head, "linear_c") else head.linear_projections
        with torch.autocast(head.linear_fuse.weight.device.type, enabled=False):
            slices = head.linear_fuse.weight.flatten(1).chunk(len(linears), 1)[::-1]    # concatenated deepest first
            pairs = [(piece, linear.proj) for piece, linear in zip(slices, linears, strict=True)]
            weights = [(piece @ proj.weight)[..., None, None] for piece, proj in pairs]
            return weights, torch.stack([piece @ proj.bias for piece, proj in pairs]).sum(0)


def build(arch, classes, init="random"):
    """A network of `arch` for a class table. `init`: "random", "imagenet", or a path (see README, "Weights")."""
    if arch == "deeplab":
        model = DeepLabV3Plus(len(classes))
        if init == "imagenet":
            weights = torchvision.models.ResNet50_Weights.DEFAULT
            load_backbone(model, downloaded(lambda: weights.get_state_dict(progress=True, check_hash=True)), "--init imagenet")
    else:
        depths, widths, head = SEGFORMERS[arch]
        names = {"id2label": dict(enumerate(class_names(classes))), "label2id": {name: n for n, name in enumerate(class_names(classes))}}
        config = SegformerConfig(depths=list(depths), hidden_sizes=list(widths), decoder_hidden_size=head, **names)
        if init == "imagenet":
            return downloaded(lambda: load_folder(f"nvidia/mit-{arch[-2:]}", arch, config))
        if init != "random" and Path(init).is_dir():
            return load_folder(init, arch, config)
        model = SegFormer(config)
    if init not in ("random", "imagenet"):
        load_file(model, arch, classes, init)
    return model


# ---------------------------------------------------------------------------------------------- pretrained weights
def downloaded(fetch):
    """fetch(), or one line if there is no way to the weights: never a silent start from random ones."""
    try:
        return fetch()
    except OSError as error:
        raise Fault(f"--init imagenet: the weights cannot be downloaded ({brief(error)}); use --init PATH "
                    "(a ResNet50 state dict, a folder of mit-bN, or a checkpoint) or --init random") from None


def load_folder(path, arch, config):
    """The encoder of a mit-bN folder (or hub name) with a new head; every encoder weight must arrive."""
    transformers.logging.set_verbosity_error()                # it warns of the new head, which is meant
    transformers.logging.disable_progress_bar()
    local = Path(path).is_dir()
    if not local:                                             # one small file first: every one is tried for half a minute
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        hf_hub_download(path, "config.json")
    try:
        model, info = SegFormer.from_pretrained(path, config=config, output_loading_info=True, ignore_mismatched_sizes=True)
    except Exception as error:
        if not local:
            raise
        raise Fault(f"--init {path}: not a readable folder of nvidia/mit-{arch[-2:]} ({brief(error)})") from None
    mismatched = [key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"]]
    missing = [key for key in (*info["missing_keys"], *mismatched) if not key.startswith("decode_head.")]
    unexpected = [key for key in info["unexpected_keys"] if not key.startswith(("classifier.", "decode_head."))]
    if missing or unexpected:
        raise Fault(f"--init {path}: its weights are not those of {arch}: {len(missing)} missing or of another shape, "
                    f"{len(unexpected)} unexpected, such as {(missing + unexpected)[0]}")
    return model


def load_backbone(model, state, where):
    """A ResNet50 state dict into DeepLab's backbone; every weight but the classifier's must arrive."""
    found = {key: value for key, value in state.items() if not key.startswith("fc.")}
    fill(model.backbone, found, where, "a ResNet50")


def load_file(model, arch, classes, path):
    """--init PATH: a ResNet50 state dict for deeplab, or a checkpoint of the same architecture."""
    state, _ = read_checkpoint(path, "--init")
    if arch == "deeplab" and "layer1.0.conv1.weight" in state:
        return load_backbone(model, state, f"--init {path}")
    if guess_arch(state) != arch:
        raise Fault(f"--init {path}: holds {guess_arch(state) or 'no network of this project'}, not {arch}")
    if len(classes) != count_classes(state):                  # another class table: all but the classifier
        print(f"--init {path}: has {count_classes(state)} classes, not {len(classes)}; its classifier is left out")
        own = model.state_dict()
        state = {key: own[key] if is_classifier(key) else value for key, value in translate(state, model).items()}
    fill(model, translate(state, model), f"--init {path}", arch)


def fill(model, state, where, what):
    """load_state_dict that says in one line what is missing, unexpected or of another shape."""
    own = model.state_dict()
    wrong = [key for key in (*own, *state) if key not in state or key not in own or own[key].shape != state[key].shape]
    wrong = [key for key in wrong if not key.endswith("num_batches_tracked")]
    if wrong:
        raise Fault(f"{where}: its weights are not those of {what}: {len(wrong)} missing, unexpected or of another shape, "
                    f"such as {wrong[0]}")
    model.load_state_dict({**own, **state})


# ---------------------------------------------------------------------------------------------- key spellings
OLD_SPELLING = [                                 # transformers 5's names of SegFormer's parts -> those of 4
    (r"stages\.(\d+)\.patch_embeddings\.", r"encoder.patch_embeddings.\1."), (r"stages\.(\d+)\.blocks\.", r"encoder.block.\1."),
    (r"stages\.(\d+)\.layer_norm\.", r"encoder.layer_norm.\1."), (r"attention\.q_proj\.", "attention.self.query."),
    (r"attention\.k_proj\.", "attention.self.key."), (r"attention\.v_proj\.", "attention.self.value."),
    (r"attention\.sequence_reduction\.sequence_reduction\.", "attention.self.sr."),
    (r"attention\.sequence_reduction\.layer_norm\.", "attention.self.layer_norm."),
    (r"attention\.o_proj\.", "attention.output.dense."), (r"mlp\.fc([12])\.", r"mlp.dense\1."),
    (r"layernorm_before\.", "layer_norm_1."), (r"layernorm_after\.", "layer_norm_2."), ("linear_projections", "linear_c")]


def old_key(key):
    for new, old in OLD_SPELLING:
        key = re.sub(new, old, key)
    return key


def translate(state, model):
    """A state dict in either spelling, with the keys that `model` has under the installed transformers."""
    own = {old_key(key): key for key in model.state_dict()}
    return {own.get(old_key(key), key): value for key, value in state.items()}


def is_classifier(key):
    return key.startswith(("classifier.", "decode_head.classifier."))


def count_classes(state):
    return next((len(value) for key, value in state.items() if is_classifier(key)), None)


def guess_arch(state):
    """The architecture that a state dict belongs to, or None."""
    keys = {old_key(key): value for key, value in state.items()}
    if "backbone.layer1.0.conv1.weight" in keys and "aspp.project.0.weight" in keys:
        return "deeplab"
    blocks = tuple(len({k.split(".")[4] for k in keys if k.startswith(f"segformer.encoder.block.{s}.")}) for s in range(4))
    width = len(keys.get("segformer.encoder.patch_embeddings.0.proj.weight", ()))
    head = len(keys.get("decode_head.linear_fuse.weight", ()))
    return next((arch for arch, (depths, widths, D) in SEGFORMERS.items() if (depths, widths[0], D) == (blocks, width, head)), None)


# ---------------------------------------------------------------------------------------------- checkpoints
def read_file(path, flag=""):
    """torch.load with weights_only=True: plain types only, code in a pickle is refused without being run."""
    where = f"{flag} {path}".strip()
    try:
        with warnings.catch_warnings(action="ignore"):        # of a foreign pickle's protocol: what follows says it better
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise Fault(f"{where}: no such file; train it first or name another") from None
    except IsADirectoryError:
        raise Fault(f"{where}: is a folder; name a .pth file") from None
    except pickle.UnpicklingError:
        raise Fault(f"{where}: holds something other than plain weights, or is no checkpoint; it was not run. Save a state dict") from None
    except Exception as error:  # noqa: BLE001 -- a torn file fails anywhere in torch.load
        raise Fault(f"{where}: damaged or no checkpoint ({brief(error)}); train it again or name another") from None


def read_checkpoint(path, flag=""):
    """(state dict, the rest of the checkpoint) of a file of this project, or of a bare state dict from elsewhere."""
    content = read_file(path, flag)
    state = content.get("model_state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()):
        raise Fault(f"{f'{flag} {path}'.strip()}: holds no state dict; name a checkpoint of this project")
    meta = {} if state is content else {key: value for key, value in content.items() if key != "model_state_dict"}
    return {key.removeprefix("module."): value for key, value in state.items()}, meta


def load_model(path, arch=None, classes=None, flag=""):
    """(network, meta) rebuilt from a checkpoint alone; a bare state dict needs `arch`, and `classes` if not the desert's.

    `classes`: the table wanted, whose names must be the checkpoint's; `flag`: what named the file, for messages.
    meta: arch, classes, mean, std, size, image_size (w, h), epoch, val_miou, val_iou {class: IoU or None}, args."""
    state, meta = read_checkpoint(path, flag)
    found = guess_arch(state)
    wanted = arch or meta.get("arch")
    if wanted is None:
        raise Fault(f"{path}: a bare state dict does not say its architecture; give --arch{f' {found}' if found else ''}")
    if found != wanted:
        raise Fault(f"{path}: holds {found or 'no network of this project'}, not {wanted}")
    own = check_classes(meta["classes"], str(path)) if "classes" in meta else classes or DESERT
    for table in (own, classes or own):
        if len(table) != count_classes(state):
            raise Fault(f"{path}: has {count_classes(state)} classes, the class table {len(table)}; give the right --classes FILE")
    for n, (a, b) in enumerate(zip(class_names(own), class_names(table), strict=True)):
        if a != b:
            raise Fault(f"{path}: was trained on another class table, its class {n} is {a!r}, not {b!r}; give its own --classes FILE")
    if [meta.get("mean", list(MEAN)), meta.get("std", list(STD))] != [list(MEAN), list(STD)]:
        raise Fault(f"{path}: was trained with another normalisation ({meta['mean']}, {meta['std']}); train it again")
    meta = {"size": 512, "image_size": [960, 540], **meta, "val_iou": meta.get("val_iou") or {}, "arch": wanted, "classes": table}
    image = meta["image_size"]
    fits = {"size": type(meta["size"]) is int and meta["size"] >= 32, "val_iou": isinstance(meta["val_iou"], dict),
            "image_size": isinstance(image, list) and len(image) == 2 and all(type(v) is int and v > 0 for v in image)}
    for key in (key for key, good in fits.items() if not good):
        raise Fault(f"{path}: has {key} {meta[key]!r}; the file is damaged, train it again")
    model = build(wanted, table)
    fill(model, translate(state, model), str(path), wanted)
    return model.eval(), meta


def save_model(path, model, arch, classes, **meta):
    """Writes a checkpoint of plain types: model_state_dict with transformers' own keys, and what rebuilds the network."""
    content = {"model_state_dict": model.state_dict(), "arch": arch, "classes": classes, "mean": list(MEAN),
               "std": list(STD), **meta}
    write_atomic(path, lambda file: torch.save(content, file))


# ---------------------------------------------------------------------------------------------- precision, freezing
def amp_dtype(flag, device):
    """The autocast type for --amp on `device`, or None. auto: bf16 where the hardware multiplies it natively (T4 and
    P100 only emulate it, and torch's own test counts that), fp16 on other GPUs, off elsewhere."""
    if flag == "off":
        return None
    if flag == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
        return torch.bfloat16 if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported() else None
    return {"bf16": torch.bfloat16, "fp16": torch.float16}[flag]


def autocast(device, dtype):
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def memory_format(arch):
    """The fixed rule, chosen with `distill.py --bench`: convolutional networks gain from channels_last,
    SegFormer, which turns maps into tokens and back, does not."""
    return torch.channels_last if arch == "deeplab" else torch.contiguous_format


def freeze(model, arch, dtype=None):
    """A network for inference: eval mode, no gradients, BatchNorm folded into convolutions, weights in `dtype`.

    Changes the model for good: its state dict is no longer the checkpoint's."""
    model = model.eval().requires_grad_(False).to(memory_format=memory_format(arch))
    if isinstance(model, SegFormer):
        weights, bias = model.merged_head()
        norm = model.decode_head.batch_norm
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()                  # (D,)
        weights = [(weight * scale.view(-1, 1, 1, 1)).to(dtype or weight.dtype) for weight in weights]
        model.folded = weights, (bias - norm.running_mean) * scale + norm.bias
    else:
        fold_batchnorm(model)
    for module in model.modules():
        if dtype is not None and isinstance(module, (nn.Conv2d, nn.Linear)):
            module.to(dtype)                                  # what autocast would do anew at every step
    return model


def fold_batchnorm(model):
    """Folds every BatchNorm that follows a convolution in definition order, as in ResNet and nn.Sequential."""
    for parent in model.modules():
        children = list(parent.named_children())
        for (conv_name, conv), (norm_name, norm) in itertools.pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, conv_name, nn.utils.fuse_conv_bn_eval(conv, norm))
                setattr(parent, norm_name, nn.Identity())


# ---------------------------------------------------------------------------------------------- ensemble, prediction
class Ensemble(nn.Module):
    """The weighted mean of several networks' logits (or probabilities, returned as their logarithm).

    weights: (K,) or (K, C), normalised here over the networks. Weights by class act on logits centred at each pixel,
    since only differences between logits mean anything."""

    def __init__(self, models, weights, average="logits"):
        super().__init__()
        self.models, self.average = nn.ModuleList(models), average
        weights = weights.float() / weights.float().sum(0, keepdim=True)
        self.register_buffer("weights", weights.view(len(models), 1, -1, 1, 1))      # (K, 1, 1 or C, 1, 1)

    @torch.no_grad()
    def forward(self, x, features=False):
        """(B, 3, H, W) -> (B, C, h, w) float32; with `features` also K lists of stages."""
        outputs = [model(x, features=True) if features else (model(x), []) for model in self.models]
        size, mean = outputs[0][0].shape[2:], 0
        for (z, _), weight in zip(outputs, self.weights, strict=True):
            z = z.float()
            if z.shape[2:] != size:
                z = F.interpolate(z, size, mode="bilinear", align_corners=False)
            if self.average == "probs":
                z = z.softmax(1)
            elif weight.numel() > 1:
                z = z - z.mean(1, keepdim=True)
            mean = mean + weight * z
        z = mean.clamp_min(1e-8).log() if self.average == "probs" else mean
        return (z, [stages for _, stages in outputs]) if features else z


@torch.no_grad()
def logits(model, image, dtype=None, flip=False):
    """Whole images (see data.whole_image), uint8 (B, 3, h, w) -> (B, C, h/4, w/4) float32 logits on the model's device.

    `flip`: the mean over the image and its mirror image."""
    x = normalize(image.to(next(model.parameters()).device, non_blocking=True))
    with autocast(x.device, dtype):
        z = model(x).float()
        return (z + model(x.flip(3)).float().flip(3)) / 2 if flip else z


def upsampled_labels(z, size):
    """(B, C, h, w) logits -> (B, *size) uint8: bilinear (align_corners=False), then the largest class."""
    return F.interpolate(z, tuple(size), mode="bilinear", align_corners=False).argmax(1).to(torch.uint8)


def predict(model, image, size, dtype=None, flip=False):
    """Whole images, uint8 (B, 3, h, w) -> (B, H, W) uint8 class indices at `size` (H, W): the one path of
    validation, evaluate.py and infer.py, so that their labels are equal."""
    return upsampled_labels(logits(model, image, dtype, flip), size)
