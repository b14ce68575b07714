"""Requests in, streamed tokens out, over any runner: tenants, steps, scheduling, sampling, text."""
