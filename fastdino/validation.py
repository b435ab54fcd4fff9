"""Which switches of the methods fit together: what is refused, with the reason, and what is only warned of.

:func:`fastdino.config.validate` calls it; like that module it imports nothing heavier than the standard
library.
"""

from __future__ import annotations

from fastdino.config import Config, ConfigError, parse_mesh, split_batch
from fastdino.switches import is_contrast, queue_length, uses_predictor


def validate_method(config: Config, processes: int) -> None:
    """Raises ConfigError naming a switch that the others, or the number of processes, leave no place for."""
    _check_switches(config)
    _check_teacher_temperature(config)
    _check_queue(config, processes)
    if parse_mesh(config.engine.mesh, processes) is not None:
        _check_sharded(config)
    if config.engine.cuda_graph and processes > 1 and config.method.teacher_op != "center":
        got = f"got true: --teacher_op {config.method.teacher_op} adds up over processes in the forward pass"
        raise ConfigError("cuda_graph", f"expected false with {processes} processes, {got}")


def _check_switches(config: Config) -> None:
    switches, given = config.method, f"with --method {config.method.method}"
    if switches.method != "dino":
        if switches.loss != "ce":
            raise ConfigError("loss", f"expected none {given}, which has its own, got {switches.loss}")
        if switches.teacher_op != "center":
            got = f"got {switches.teacher_op}, a switch of dino"
            raise ConfigError("teacher_op", f"expected none {given}, {got}")
    if switches.method != "esvit" and switches.use_dense_prediction:
        got = "got true: --method esvit matches regions"
        raise ConfigError("use_dense_prediction", f"expected none or false {given}, {got}")
    if switches.method == "esvit" and uses_predictor(config):
        raise ConfigError("predictor", f"expected auto or off {given}, got on")
    if switches.method == "swav":
        if switches.teacher != "ema":
            got = f"got {switches.teacher}: it has no teacher (dino with --teacher copy is the paper's SwAV)"
            raise ConfigError("teacher", f"expected none {given}, {got}")
        if uses_predictor(config):
            raise ConfigError("predictor", f"expected auto or off {given}, got on")
    if switches.loss != "ce" and switches.teacher_op != "center":
        got = f"got {switches.teacher_op}: --loss {switches.loss} has no distribution over prototypes"
        raise ConfigError("teacher_op", f"expected center, {got}")
    if switches.sk_joint and switches.teacher_op == "center":
        raise ConfigError("sk_joint", "expected false with --teacher_op center, got true")
    if config.model.bottleneck_dim == 0 and switches.method == "dino":
        if switches.loss != "ce":
            raise ConfigError("bottleneck_dim", f"expected a bottleneck with --loss {switches.loss}, got 0")
        if uses_predictor(config):
            raise ConfigError("bottleneck_dim", "expected a bottleneck with --predictor on, got 0")


def _check_teacher_temperature(config: Config) -> None:
    loss = config.loss
    warms_up = loss.warmup_teacher_temp_epochs > 0
    if loss.teacher_temp == 0:
        if warms_up and loss.warmup_teacher_temp != 0:
            got = f"got {loss.warmup_teacher_temp:g}"
            raise ConfigError("warmup_teacher_temp", f"expected 0 with --teacher_temp 0, {got}")
        if config.method.method == "esvit":
            raise ConfigError("teacher_temp", "expected a number > 0 with --method esvit, got 0")
        if config.method.teacher_op != "center":
            got = f"got 0: --teacher_op {config.method.teacher_op} divides by it"
            raise ConfigError("teacher_temp", f"expected a number > 0, {got}")
    elif warms_up and loss.warmup_teacher_temp == 0:
        got = "got 0 (a temperature of 0 is constant: --teacher_temp 0)"
        raise ConfigError("warmup_teacher_temp", f"expected a number > 0, {got}")


def _check_queue(config: Config, processes: int) -> None:
    length, switches = queue_length(config), config.method
    if length < 0:
        raise ConfigError("queue_length", f"expected a number >= 0, got {length}")
    contrast = is_contrast(config)
    if contrast and length == 0:
        raise ConfigError(
            "queue_length", "expected at least a batch of keys: contrast needs negatives, got 0"
        )
    if not contrast and switches.method != "swav" and length:
        needs = "--method mocov2, --method swav or --loss infonce"
        raise ConfigError("queue_length", f"expected 0 or none without {needs}, got {length}")
    if length == 0:
        return
    batch = split_batch(config, processes)[0]
    unit = 2 * batch if contrast else batch
    if length % unit:
        what = f"2 x {batch} (keys of both global crops of a batch)" if contrast else f"the batch of {batch}"
        near = max(unit, length // unit * unit)
        raise ConfigError(
            "queue_length", f"expected a multiple of {what}, got {length}; --queue_length {near} fits"
        )
    if config.engine.cuda_graph:
        raise ConfigError("cuda_graph", "expected false, got true: steps that fill a queue are not recorded")


def _check_sharded(config: Config) -> None:
    """Sharding knows the tensors of DINO's student and teacher; what others add is not dealt out."""
    mesh, switches = f"with --mesh {config.engine.mesh}", config.method
    if switches.method != "dino":
        raise ConfigError("method", f"expected dino {mesh}, got {switches.method}: its heads are not sharded")
    if switches.loss != "ce":
        got = f"got {switches.loss}: heads without prototypes are not sharded"
        raise ConfigError("loss", f"expected ce {mesh}, {got}")
    if uses_predictor(config):
        raise ConfigError("predictor", f"expected auto or off {mesh}, got on: it is not sharded")
    if switches.teacher == "prev_iter":
        raise ConfigError("teacher", f"expected ema, copy or prev_epoch {mesh}, got prev_iter")


def method_warnings(config: Config) -> list[str]:
    """What may run but is known to collapse, one sentence each."""
    switches, loss = config.method, config.loss
    found = []
    if switches.method == "byol" and not uses_predictor(config):
        found.append("--method byol --predictor off collapses in the paper (table 14)")
    if switches.method != "dino":
        return found
    follows = switches.teacher in ("copy", "prev_iter")
    if switches.loss == "mse" and follows and loss.center_momentum == 1.0:
        found.append(f"--loss mse --teacher {switches.teacher} without centering: nothing prevents collapse")
    if switches.loss == "ce" and follows and switches.teacher_op == "center":
        found.append(f"--teacher {switches.teacher} with centering alone collapses in the paper (figure 6)")
    if switches.loss == "ce" and switches.teacher_op == "center" and loss.center_momentum == 1.0:
        found.append("--center_momentum 1: without centering the teacher settles on one prototype (figure 7)")
    return found
