"""The loop around a method: step, update, schedules, processes, checkpoints, logs.

Importing it before torch sets two switches that torch and its OpenMP read once, at their start, unless the
user set them: threads sleep at barriers (data threads need the cores that spinning would burn), and large
tensors live on huge pages (page faults dominate eager training on CPUs)."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
