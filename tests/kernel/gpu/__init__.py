"""The ops on a CUDA device: numbers, sizes past 2^31, and how they behave at run time.

Sizes are compile-time constants of the Triton kernels, so these tests vary tokens and balance freely but reuse a few
widths. To look for stray accesses on small shapes:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m pytest tests/kernel/gpu -k odd
    compute-sanitizer --tool racecheck python -m pytest tests/kernel/gpu -k odd

What they found last is in benchmarks/results/nvidia-h200/compute-sanitizer.txt.
"""
