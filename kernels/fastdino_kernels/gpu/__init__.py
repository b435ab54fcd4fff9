"""The Triton forms of the operations, one file each; imported only when a tensor needs them.

A file holds the kernels, their launchers and the operators; the public function of the same name, one folder
up, checks the arguments and decides that they are used. ``TRITON_INTERPRET=1`` runs them on CPU tensors
under ``backend("triton")``. Each file lists its :class:`~fastdino_kernels.gpu.launch.Launch` configurations
in ``launches()``, from which they are compiled ahead of time, without a GPU.
"""
