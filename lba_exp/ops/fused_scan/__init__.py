"""The selective scan's fused form: Triton kernels, and the operation of torch around them; Triton is imported where one first runs."""

from lba_exp.ops.fused_scan.operator import fused_scan, selective_scan_obstacle

__all__ = ["fused_scan", "selective_scan_obstacle"]
