"""Tests of the kernel package: what its ops compute, on every backend, against an independent fp64 oracle."""
