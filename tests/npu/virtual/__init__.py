"""Virtual Ascend NPUs: whole launch scripts run on ``npu:0`` .. ``npu:n-1``, on a Linux machine without any.

``python -m tests.npu.virtual -- COMMAND`` runs a command, and all that it starts, with virtual NPUs; the page
``docs/virtual_npu.md`` is for its users. The real torch_npu runs over the stand-in for CANN
(``tests/npu/cann_stub``), whose device memory is host memory:

* ``environment`` prepares the variables of a process, among them a directory that makes ``import torch`` call
  ``device.load`` in it;
* ``host_memory`` sees tensors of an NPU as CPU tensors;
* ``operators``, ``copies``, ``derivatives`` and ``random_numbers`` compute on those, ``saturation`` makes
  them compute as a 910A would;
* ``collectives`` lets gloo carry ``hccl``.
"""
