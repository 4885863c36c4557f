"""The losses: pure functions of tensors, computed in float32 whatever the autocast type.

    L = a * (kl * KL + cwd * CWD) + (1 - a) * CE + feature * F + attention * A, a = ramp(start, end, progress)
                                    (1 with --hard-weight constant)

CE and KL are sums over pixels, each times its weight. normalize_weights() in train_teacher.py has scaled the
weights beforehand, so that these sums are weighted means over a whole step, in however many micro-batches and
processes it is computed. The other losses are means over the images of a batch.

To add a loss: write it here; in distill.py add its term to loss_fn, a flag for its weight, and the flag to
needs_teachers().

Letters: B batch, C classes, H W crop sides, h w = H/4 W/4 (the logits' sides), T temperature.
Label 255 means "ignore".
"""
import torch
import torch.nn.functional as F

from data import IGNORE

LOGIT_LIMIT, SOFT_LIMIT = 10.0, 100.0            # clamps of logits / T, and of the soft loss


def ramp(start, end, progress):
    """The balance between soft and hard loss; linear, progress 0 -> 1 over the run."""
    return start + (end - start) * progress


# ------------------------------------------------------------ pixel weights
def hard_weights(target, class_weight):
    """(B, H, W) labels -> (B, H, W): the class weight of each pixel, 0 where the label is ignored."""
    valid = target != IGNORE
    return class_weight[target.where(valid, 0)] * valid


def soft_weights(target):
    """(B, H, W) labels -> (B, h, w): 1 for each cell of the logits whose centre has a label, else 0."""
    return (target[:, 2::4, 2::4] != IGNORE).float()


def balanced_weights(teacher, class_weight):
    """(B, C, h, w) teacher logits, (C,) class weights w -> (B, h, w): W = 1 / sum_c q(c) / w(c), q = softmax.

    A teacher trained with class weights w learns q proportional to w p, where p are the true probabilities;
    then weighted cross-entropy is W times the cross-entropy with q. So W gives the soft loss the class
    balance of the hard loss, without a label."""
    q = teacher.float().softmax(1)
    return 1 / (q / class_weight[:, None, None]).sum(1)


# ------------------------------------------------------------ losses on logits
def hard_loss(z, target, weight):
    """Weighted cross-entropy at full size: (B, C, h, w) logits, (B, H, W) int64 labels and pixel weights."""
    z = F.interpolate(z.float(), target.shape[1:], mode="bilinear", align_corners=False)
    return (weight * F.cross_entropy(z, target, ignore_index=IGNORE, reduction="none")).sum()


def soft_loss(z, teacher, weight, T):
    """T^2 * KL(teacher / T || student / T), Hinton et al. 2015; z, teacher: (B, C, h, w), weight: (B, h, w).

    Returns (loss, number of logits clamped, whether the loss was clamped). logits / T are clamped to +-10 and
    the loss to 100: beyond a clamp there is no gradient, so it is counted."""
    z, teacher = z.float() / T, teacher.float() / T
    log_s = z.clamp(-LOGIT_LIMIT, LOGIT_LIMIT).log_softmax(1)
    log_t = teacher.clamp(-LOGIT_LIMIT, LOGIT_LIMIT).log_softmax(1)
    kl = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(1)            # (B, h, w)
    loss = T * T * (weight * kl).sum()
    clamped = (z.detach().abs() > LOGIT_LIMIT) | (teacher.abs() > LOGIT_LIMIT)
    return loss.clamp(0, SOFT_LIMIT), (clamped & (weight > 0)[:, None]).sum(), loss.detach() > SOFT_LIMIT


def cwd_loss(z, teacher, weight, T=4.0):
    """Channel-wise distillation, CWD (Shu et al. 2021, section 3.2); shapes as in soft_loss.

    T^2 * KL of each class map's softmax over the cells with a weight; mean over images and classes."""
    keep = (weight > 0).flatten(1)[:, None]                                          # (B, 1, h*w)
    lowest = torch.finfo(torch.float32).min / 4  # not -inf: an image without a valid cell would give nan
    # log_softmax in float32: softmax().log() gives nan in half precision
    log_s = (z.float() / T).flatten(2).masked_fill(~keep, lowest).log_softmax(2)     # (B, C, h*w)
    log_t = (teacher.float() / T).flatten(2).masked_fill(~keep, lowest).log_softmax(2)
    kl = F.kl_div(log_s, log_t, reduction="none", log_target=True)
    return T * T * kl.where(keep, 0).sum(2).mean()


# ------------------------------------------------------------ losses on a stage
def feature_loss(student, teacher):
    """Mean squared difference of a stage's features, each position scaled to unit length over its channels.

    (B, width, h, w) of equal widths. FitNets' hint (Romero et al. 2015) with the normalization of later work,
    so that one weight serves every stage and teacher."""
    student = F.normalize(student.float(), dim=1)
    teacher = F.normalize(resized(teacher.float(), student), dim=1)
    return (student - teacher).square().sum(1).mean()


def attention_loss(student, teacher):
    """Attention transfer (Zagoruyko and Komodakis 2017, equation 2); (B, width, h, w) of any widths.

    The squared distance of normalized attention maps, summed over positions, mean over images."""
    student = attention_map(student)
    teacher = resized(attention_map(teacher), student)
    student, teacher = F.normalize(student.flatten(1), dim=1), F.normalize(teacher.flatten(1), dim=1)
    return (student - teacher).square().sum(1).mean()


def attention_map(stage):
    """(B, width, h, w) -> (B, 1, h, w): mean square over the channels."""
    return stage.float().square().mean(1, keepdim=True)


def resized(feature, like):
    """`feature` at the size of `like`: teachers' strides differ."""
    return F.interpolate(feature, like.shape[2:], mode="bilinear", align_corners=False)
