"""Measure a running server over HTTP. Every metric is defined in `bench.metrics`."""
