"""The Triton kernels, one file a job. Each file's launcher has a twin of the same name in ``reference.py``."""
