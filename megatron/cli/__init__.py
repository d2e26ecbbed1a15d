"""The programs: what the scripts at the root of the repository and in ``tools/`` run, and ``megatron-npu``.

A script there imports the module of its name here, so that an installation without a checkout has them all.
"""
