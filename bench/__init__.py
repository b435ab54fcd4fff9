"""One file per claim. Importing the engine first gives all providers the settings of a training run."""

import fastdino.engine  # noqa: F401
