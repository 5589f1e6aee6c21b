"""Hypothesis: no deadline (a first example compiles or imports), and the shrunk example is printed with its blob."""

from hypothesis import HealthCheck, settings

settings.register_profile("kernel", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("kernel")
