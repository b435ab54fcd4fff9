"""The losses of other code bases behind their own class names, signatures and state.

``dinov2`` (DINOLoss, iBOTPatchLoss), ``lightly`` (DINOLoss), ``solo_learn`` (DINOLoss); the official DINO
class is :class:`fastdino_kernels.modules.DINOLoss`. Each is written from the definition of its loss, and none
of the code bases is needed or imported.
"""
