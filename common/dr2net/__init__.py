"""dr2net: finetune large pretrained vision models without storing their activations.

import dr2net, timm
model = timm.create_model("vit_small_patch16_224", pretrained=True)
dr2net.convert(model)                                    # in place, state_dict keys unchanged
dr2net.Schedule.constant(7 / 8, 1 / 8).apply(model, progress=0.0)
loss(model(batch)).backward()                            # activations are rebuilt, bit for bit, not stored
"""

from dr2net import integrations
from dr2net.branches import Branch, branches_of
from dr2net.budget import plan_budget
from dr2net.convert import Report, checkpoint_blocks, convert, deconvert, recompute, set_coefficients
from dr2net.error_law import anchor_spacing, growth, predicted_error
from dr2net.gradient_check import GradientError, gradient_error
from dr2net.options import Options
from dr2net.saving import restore, save
from dr2net.schedule import Schedule
from dr2net.sequence import ReversibleSequence
from dr2net.verify import Verification, verify

__version__ = "0.3.0"

__all__ = [
    "Branch",
    "GradientError",
    "Options",
    "Report",
    "ReversibleSequence",
    "Schedule",
    "Verification",
    "anchor_spacing",
    "branches_of",
    "checkpoint_blocks",
    "convert",
    "deconvert",
    "gradient_error",
    "growth",
    "integrations",
    "plan_budget",
    "predicted_error",
    "recompute",
    "restore",
    "save",
    "set_coefficients",
    "verify",
]
