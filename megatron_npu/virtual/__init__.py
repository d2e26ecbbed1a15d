"""Virtual Ascend NPUs: whole launch scripts run on ``npu:0`` .. ``npu:n-1``, on a Linux machine without any.

``python -m megatron_npu.virtual -- COMMAND`` runs a command, and all that it starts, with virtual NPUs; the
page ``docs/virtual_npu.md`` is for its users. The real torch_npu runs over a stand-in for CANN (``cann``),
whose device memory is host memory:

* ``environment`` prepares the variables of a process, among them a directory that makes ``import torch`` call
  ``device.load`` in it;
* ``host_memory`` sees tensors of an NPU as CPU tensors;
* ``operators``, ``derivatives`` and ``random_numbers`` compute on those, Ascend's own operators by what is in
  ``kernels``, and ``saturation`` makes all of them compute as a 910A would;
* ``collectives`` lets gloo carry ``hccl``.
"""
