"""The fused form: Triton kernels, how they are launched (``launch.py``, sizes in ``plan.py``), and the operation of torch around them.

Nothing in here imports Triton before a kernel runs, so that the package works where Triton is not installed.
"""

from lba_exp.ops.fused.operator import fused, obstacle

__all__ = ["fused", "obstacle"]
