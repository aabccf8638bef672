"""Tollgate's external processor: the half of the gateway that decides. Envoy does the proxying."""
