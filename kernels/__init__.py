"""CuTeDSL kernels: one file an op, with the kernel, its config space beside it and one `launch`.

A kernel file imports cutlass and `dsv4_compile.kernel`; it knows tensors and shapes, not graphs or models.  Nothing
here is imported before a CUDA lowering claims an op, so machines without a GPU never load CuTeDSL.
"""
