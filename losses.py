"""The losses: pure functions of tensors, in float32 whatever the autocast type.

    L = a * (kl * KL + cwd * CWD) + (1 - a) * CE + feature * F + attention * A,   a = ramp(start, end, progress)

hard_loss and soft_loss take what they are divided by (`weight_sum`, `valid`), so that gradient accumulation and several
processes give the mean over the whole step, not a mean of means; left out, the batch's own is used. The others are means
over the images of a batch.

Measured on 203 real pairs from random weights: hard loss alone mIoU .346, with KL .307, with CWD .344 (README, "Ablation").

Letters: B batch, C classes, H W crop sides, h w = H/4 W/4, T temperature. Index 255 means "ignore".
"""
import torch
import torch.nn.functional as F

from data import IGNORE

LOGIT_LIMIT, SOFT_LIMIT = 10.0, 100.0            # clamps of logits / T, and of the soft loss


def ramp(start, end, progress):
    """The balance between soft and hard loss; linear, progress 0 -> 1 over the run."""
    return start + (end - start) * progress


def sum_weights(mask, class_weight):
    """Sum of the class weights of the valid pixels of (B, H, W): what the hard loss is divided by."""
    valid = mask != IGNORE
    return (class_weight[mask.where(valid, 0)] * valid).sum()


def small_mask(mask):
    """(B, H, W) -> (B, h, w): the labels nearest to the centres of the logits' cells."""
    return mask[:, 2::4, 2::4]


def count_valid(mask):
    """Number of valid cells at stride 4: what the soft loss is divided by."""
    return (small_mask(mask) != IGNORE).sum()


def hard_loss(z, mask, class_weight, weight_sum=None):
    """Weighted cross-entropy at full size: (B, C, h, w) logits, upsampled bilinearly to (B, H, W) int64 labels.

    Sum of weighted losses / sum of weights, as torch's; 0 where nothing is valid."""
    z = F.interpolate(z.float(), mask.shape[1:], mode="bilinear", align_corners=False)
    loss = F.cross_entropy(z, mask, class_weight, ignore_index=IGNORE, reduction="sum")
    weight_sum = sum_weights(mask, class_weight) if weight_sum is None else weight_sum
    return loss / weight_sum.clamp(min=1e-8)


def soft_loss(z, teacher, mask, T, valid=None):
    """T^2 * KL(teacher / T || student / T) (Hinton et al. 2015): (loss, how many logits met the clamp, whether the loss did).

    z, teacher: (B, C, h, w) logits; mask: (B, H, W). Summed over classes, mean over valid cells. logits / T are clamped
    to +-10 and the loss to 100: a clamp that bites has no gradient, so it is counted."""
    keep = small_mask(mask) != IGNORE                                                # (B, h, w)
    raw_s, raw_t = z.float() / T, teacher.float() / T
    log_s = raw_s.clamp(-LOGIT_LIMIT, LOGIT_LIMIT).log_softmax(1)
    log_t = raw_t.clamp(-LOGIT_LIMIT, LOGIT_LIMIT).log_softmax(1)
    divergence = (log_t.exp() * (log_t - log_s)).sum(1)                              # (B, h, w)
    valid = keep.sum() if valid is None else valid
    loss = T * T * divergence.where(keep, 0).sum() / valid.clamp(min=1)
    met = (((raw_s.detach().abs() > LOGIT_LIMIT) | (raw_t.abs() > LOGIT_LIMIT)) & keep[:, None]).sum()
    return loss.clamp(0, SOFT_LIMIT), met, (loss.detach() > SOFT_LIMIT)


def cwd_loss(z, teacher, mask, T=4.0):
    """Channel-wise distillation (CWD, Shu et al. 2021, section 3.2): T^2 * KL of each class map's softmax over its
    valid cells, mean over images and classes. log_softmax in float32: softmax().log() gives NaN in half precision."""
    keep = (small_mask(mask) != IGNORE).flatten(1)[:, None]                          # (B, 1, h*w)
    out = torch.finfo(torch.float32).min / 4
    log_s = (z.float() / T).flatten(2).masked_fill(~keep, out).log_softmax(2)        # (B, C, h*w)
    log_t = (teacher.float() / T).flatten(2).masked_fill(~keep, out).log_softmax(2)
    return T * T * (log_t.exp() * (log_t - log_s)).where(keep, 0).sum(2).mean()


def resized(feature, like):
    return feature if feature.shape[2:] == like.shape[2:] else \
        F.interpolate(feature, like.shape[2:], mode="bilinear", align_corners=False)


def feature_loss(stages, teacher_stages):
    """Mean squared difference of stage features, each position scaled to unit length over its channels.

    Lists of (B, width, h, w) with equal widths; sizes are aligned to the student's. FitNets' hint (Romero et al.
    2015) with the normalisation of later work, so that one weight serves every stage and teacher."""
    total = 0.0
    for s, t in zip(stages, teacher_stages, strict=True):
        s, t = F.normalize(s.float(), dim=1), F.normalize(resized(t.float(), s), dim=1)
        total = total + (s - t).square().sum(1).mean()
    return total / len(stages)


def energy(stage):
    """(B, width, h, w) -> (B, 1, h, w): mean square over the channels."""
    return stage.float().square().mean(1, keepdim=True)


def attention_loss(stages, teacher_stages):
    """Attention transfer (Zagoruyko and Komodakis 2017, equation 2): the squared distance of normalised energy maps,
    summed over positions, mean over images and stages. Widths may differ; sizes are aligned to the student's."""
    total = 0.0
    for s, t in zip(stages, teacher_stages, strict=True):
        map_s, map_t = (F.normalize(e.flatten(1), dim=1) for e in (energy(s), resized(energy(t), s)))          # (B, h*w)
        total = total + (map_s - map_t).square().sum(1).mean()
    return total / len(stages)
