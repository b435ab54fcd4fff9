"""What the switches of methods imply: parts, widths and lengths; without heavy imports."""

from __future__ import annotations

from fastdino.config import Config

# Unless --queue_length says otherwise: that of MoCo and of DINO's ablations.
CONTRAST_QUEUE = 65536


def uses_predictor(config: Config) -> bool:
    """Whether the student has a predictor."""
    choice = config.method.predictor
    return choice == "on" or (choice == "auto" and config.method.method == "byol")


def matches_regions(config: Config) -> bool:
    """Whether regions of views have a loss, a head and a center of their own."""
    return config.method.method == "esvit" and config.method.use_dense_prediction is not False


def has_dino_head(config: Config) -> bool:
    """Whether the student ends in DINO's head with prototypes."""
    return config.method.method in ("dino", "esvit") and config.method.loss == "ce"


def is_contrast(config: Config) -> bool:
    """Whether the loss tells an image from others in a queue."""
    return config.method.method == "mocov2" or config.method.loss == "infonce"


def queue_length(config: Config) -> int:
    """Embeddings in the queue; 0: there is none."""
    asked = config.method.queue_length
    if asked is not None:
        return asked
    return CONTRAST_QUEUE if is_contrast(config) else 0


def projector_widths(config: Config, width: int) -> tuple[int, ...]:
    """From features of ``width`` to the embedding, of a method whose head has no prototypes of its own:
    two layers in BYOL and SwAV, three in the MoCo-v2 of the DINO paper, DINO's own before its prototypes.
    """
    switches, model = config.method, config.model
    if switches.method == "byol":
        return width, switches.hidden_mlp or 4096, switches.feat_dim or 256
    if switches.method == "mocov2":
        hidden = switches.hidden_mlp or 2048
        return width, hidden, hidden, switches.feat_dim or 256
    if switches.method == "swav":
        return width, switches.hidden_mlp or 2048, switches.feat_dim or 128
    return width, *[model.head_hidden_dim] * (model.head_layers - 1), model.bottleneck_dim


def prototypes(config: Config) -> int:
    """K; 0 where embeddings are compared directly."""
    if config.method.method == "swav":
        return config.method.nmb_prototypes
    return config.model.out_dim if has_dino_head(config) else 0


def has_weight_norm(config: Config) -> bool:
    """Whether the prototypes are DINO's, of length 1 times a gain."""
    return has_dino_head(config) and config.model.bottleneck_dim > 0
