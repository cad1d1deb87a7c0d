"""Released detectors of torchvision and mmdetection: their keys to ours."""

from vitrail.registry import Tensors, rename_keys


def from_foreign(state: Tensors) -> Tensors:
    """Whole files of either library; keys that are ours already stay, those of a backbone keep its layout."""
    if any(key.startswith("roi_heads.") for key in state):
        return from_torchvision(state)
    if any(key.startswith("roi_head.") for key in state):
        return from_mmdetection(state)
    return dict(state)


def from_torchvision(state: Tensors) -> Tensors:
    """`fasterrcnn_*`, `maskrcnn_*`, in the names of today and of the first releases.

    Background comes first there and last here; its boxes and masks, which nothing reads, are left out.
    Epsilons of the backbone's norms: the first releases, ResNets in the names of then, had 0; a MobileNet's
    is 1e-5, where the key map of classifiers, which comes after this one, expects 1e-3.
    """
    mobile = any(key.startswith("backbone.body.0.0.") for key in state)
    first = "rpn.head.conv.weight" in state
    less = 1e-3 - 1e-5 if mobile else (1e-5 if first else 0.0)
    if less:
        state = {
            k: v - less if k.startswith("backbone.") and k.endswith("running_var") else v
            for k, v in state.items()
        }
    out = rename_keys(
        state,
        [
            # Early releases had convolutions where sequences of one stand today.
            (r"^(backbone\.fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)$", r"\1.0.\2"),
            (r"^rpn\.head\.conv\.(weight|bias)$", r"rpn.head.conv.0.0.\1"),
            (
                r"^roi_heads\.mask_head\.mask_fcn(\d)\.",
                lambda m: f"roi_heads.mask_head.{int(m[1]) - 1}.0.",
            ),
            (r"^backbone\.fpn\.inner_blocks\.(\d+)\.0\.", r"neck.lateral.\1."),
            (r"^backbone\.fpn\.layer_blocks\.(\d+)\.0\.", r"neck.smooth.\1."),
            (r"^backbone\.fpn\.inner_blocks\.(\d+)\.1\.", r"neck.lateral_norms.\1."),
            (r"^backbone\.fpn\.layer_blocks\.(\d+)\.1\.", r"neck.smooth_norms.\1."),
            (r"^backbone\.body\.(\d+)\.", r"backbone.features.\1."),
            (r"^backbone\.body\.", "backbone."),
            (r"^rpn\.head\.conv\.(\d+)\.0\.", r"rpn.convs.\1."),
            (r"^rpn\.head\.cls_logits\.", "rpn.objectness."),
            (r"^rpn\.head\.bbox_pred\.", "rpn.deltas."),
            (r"^roi_heads\.box_head\.fc6\.", "stages.0.fcs.0."),
            (r"^roi_heads\.box_head\.fc7\.", "stages.0.fcs.1."),
            (r"^roi_heads\.box_head\.(\d+)\.0\.", r"stages.0.convs.\1."),
            (r"^roi_heads\.box_head\.(\d+)\.1\.", r"stages.0.norms.\1."),
            (r"^roi_heads\.box_head\.5\.", "stages.0.fcs.0."),
            (r"^roi_heads\.box_predictor\.cls_score\.", "stages.0.classes."),
            (r"^roi_heads\.box_predictor\.bbox_pred\.", "stages.0.deltas."),
            (r"^roi_heads\.mask_head\.(\d+)\.0\.", r"mask_stages.0.convs.\1."),
            (r"^roi_heads\.mask_head\.(\d+)\.1\.", r"mask_stages.0.norms.\1."),
            (r"^roi_heads\.mask_predictor\.conv5_mask\.", "mask_stages.0.grow."),
            (r"^roi_heads\.mask_predictor\.mask_fcn_logits\.", "mask_stages.0.masks."),
        ],
    )
    for key, value in out.items():
        if key.startswith("stages.0.classes."):
            out[key] = value.roll(-1, 0)
        elif key.startswith("stages.0.deltas."):
            out[key] = value[4:]
        elif key.startswith("mask_stages.0.masks."):
            out[key] = value[1:]
    return out


def from_mmdetection(state: Tensors) -> Tensors:
    """Faster, Mask, Cascade and Cascade Mask R-CNN with an FPN; background is last there too."""
    return rename_keys(
        state,
        [
            (r"^neck\.lateral_convs\.(\d+)\.conv\.", r"neck.lateral.\1."),
            (r"^neck\.fpn_convs\.(\d+)\.conv\.", r"neck.smooth.\1."),
            (r"^rpn_head\.rpn_conv\.", "rpn.convs.0."),
            (r"^rpn_head\.rpn_cls\.", "rpn.objectness."),
            (r"^rpn_head\.rpn_reg\.", "rpn.deltas."),
            # A single stage has no number.
            (r"^roi_head\.(bbox|mask)_head\.(?!\d)", r"roi_head.\1_head.0."),
            (r"^roi_head\.bbox_head\.(\d+)\.shared_fcs\.", r"stages.\1.fcs."),
            (r"^roi_head\.bbox_head\.(\d+)\.fc_cls\.", r"stages.\1.classes."),
            (r"^roi_head\.bbox_head\.(\d+)\.fc_reg\.", r"stages.\1.deltas."),
            (r"^roi_head\.mask_head\.(\d+)\.convs\.(\d+)\.conv\.", r"mask_stages.\1.convs.\2."),
            (r"^roi_head\.mask_head\.(\d+)\.upsample\.", r"mask_stages.\1.grow."),
            (r"^roi_head\.mask_head\.(\d+)\.conv_logits\.", r"mask_stages.\1.masks."),
        ],
    )
